"""``method: {name: fixed, column: weight}``: the weight column of the data sets, tied to the tokens of each row.

Axolotl drops the columns of a data set when it makes tokens, shuffles the rows and drops some. So the data sets are
loaded and tokenised once more by Axolotl's own functions, in the order of the files, and each weight is tied to tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, concatenate_datasets

from safe_sched.errors import DataError, OptionError
from safe_sched_axolotl.block import KEY
from safe_sched_axolotl.data import load, tokenised
from safe_sched_hf.columns import weight_of
from safe_sched_hf.config import Settings


def refuse_weights(settings: Settings, config: Mapping[str, Any]) -> None:
    """Stop where given weights cannot be tied to rows.

    Raises:
        OptionError: Naming the key.
    """
    scheduler: Any = settings.scheduler()
    if getattr(scheduler, "values", None) is not None and scheduler.keys is None:
        raise OptionError(
            f"{KEY}.method.values: Axolotl shuffles the rows and drops some, so positions do not name them. Put the "
            f"weights into a column of the data set: {KEY}.method: {{name: fixed, column: weight}}"
        )
    for key in ("streaming", "pretraining_dataset", "skip_prepare_dataset"):
        if settings.weight_column() is not None and config.get(key):
            raise OptionError(
                f"{KEY}.method.column: {settings.weight_column()!r}: with {key} Axolotl drops the column before anyone "
                f"can tie it to tokens; remove {key}"
            )


def weighted_rows(cfg: Any, tokenizer: Any, column: str) -> Dataset:
    """The tokens of all training data sets with a column of weights.

    Args:
        cfg: Axolotl's configuration, checked.
        tokenizer: The run's.
        column: The name of the column, the same in every data set.

    Returns:
        ``input_ids``, ``labels`` and the column.

    Raises:
        DataError: A data set has no such column, a row has no number >= 0 there, or Axolotl leaves rows out.
    """
    size = cfg.sequence_len if (cfg.excess_length_strategy or "").lower() == "truncate" else None

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name][:size] for name in ("input_ids", "labels")}

    parts = []
    for number, entry in enumerate(cfg.datasets):
        where = f"datasets.{number}"
        for rows in load(entry, cfg, where):
            if column not in rows.column_names:
                names = ", ".join(map(repr, rows.column_names))
                raise DataError(f"{where}: {entry['path']} has the columns {names}, but not {column!r}; add it")
            values = [weight_of(v, f"{where}: row {i}", column) for i, v in enumerate(rows.with_format(None)[column])]
            tokens = tokenised(rows, entry, cfg, tokenizer, where)
            parts.append(Dataset.from_dict(tokens.map(cut)[:] | {column: values}))
    return concatenate_datasets(parts)
