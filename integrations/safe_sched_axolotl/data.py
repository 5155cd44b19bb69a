"""Axolotl's data sets as rows, read by Axolotl itself: with all that ``datasets:`` can say, from files to clouds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from safe_sched.errors import DataError, OptionError, unknown_name
from safe_sched_axolotl.block import plain

WHERE = frozenset(
    {"path", "name", "split", "data_files", "ds_type", "revision", "shards", "shards_idx", "preprocess_shards"}
)
"""Keys of a data set that say which rows it has; the others say how they are read."""


def is_dataset_syntax(rows: Any) -> bool:
    """Whether a value is a list of data sets as ``datasets:`` has them, not a list of rows.

    Example:
        >>> is_dataset_syntax([{"path": "safety.jsonl", "type": "alpaca"}]), is_dataset_syntax("core")
        (True, False)
    """
    entries = [rows] if isinstance(rows, Mapping) else rows
    return isinstance(entries, list) and any(isinstance(one, Mapping) and "path" in one for one in entries)


def checked_entry(entry: Any, where: str) -> Any:
    """A data set of a block of ours, as Axolotl's own class has it.

    Args:
        entry: What the YAML says.
        where: The key's path, for messages.

    Raises:
        OptionError: It has a key that Axolotl does not read, or a value that it does not take.
    """
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]
    from axolotl.utils.schemas.datasets import SFTDataset  # pyright: ignore[reportMissingImports]

    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise OptionError(f"{where}: {plain(entry)!r}; allowed: a data set with path and type, as under datasets:")
    for name in entry:
        if name not in SFTDataset.model_fields:
            raise OptionError(f"{where}.{name}: {unknown_name('key', str(name), SFTDataset.model_fields)}")
    try:
        return DictDefault(SFTDataset(**plain(entry)).model_dump(exclude_none=True))
    except ValueError as error:
        raise OptionError(f"{where}: {' '.join(str(error).split())}") from error


def load(entry: Any, cfg: Any, where: str) -> Iterator[Dataset]:
    """The rows of a data set, as they are before they are tokens: one table for each of its names.

    Args:
        entry: With the keys of ``datasets:``.
        cfg: Axolotl's configuration, checked.
        where: The key's path, for messages.

    Raises:
        DataError: It cannot be loaded, or is a stream.
    """
    from axolotl.utils.data.shared import (  # pyright: ignore[reportMissingImports]
        datasets_with_name_generator,
        load_dataset_with_config,
    )

    for one in datasets_with_name_generator([entry]):
        try:
            loaded = load_dataset_with_config(one, cfg.hf_use_auth_token)
        except Exception as error:  # whatever datasets, the hub or a cloud raises
            raise DataError(f"{where}: {one.path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        if isinstance(loaded, dict):  # splits by name
            split = one.split or "train"
            if split not in loaded:
                raise DataError(f"{where}: no split {split!r}; there: {', '.join(map(repr, loaded))}")
            loaded = loaded[split]
        if isinstance(loaded, IterableDataset):
            raise DataError(f"{where}: {one.path} is a stream, and is needed as a whole; give a file")
        if one.shards:
            loaded = loaded.shuffle(seed=cfg.seed).shard(num_shards=one.shards, index=one.shards_idx or 0)
        yield loaded


def tokenised(rows: Dataset, entry: Mapping[str, Any], cfg: Any, tokenizer: Any, where: str) -> Dataset:
    """What Axolotl's prompt strategy makes of rows: ``input_ids`` and ``labels``, in the order of the rows.

    Args:
        rows: As `load` gives them.
        entry: With the keys of ``datasets:``.
        cfg: Axolotl's configuration, checked.
        tokenizer: The run's.
        where: The key's path, for messages.

    Raises:
        DataError: The strategy cannot read the rows, or leaves some out.
    """
    from axolotl.utils.config import normalize_cfg_datasets  # pyright: ignore[reportMissingImports]
    from axolotl.utils.data.wrappers import get_dataset_wrapper  # pyright: ignore[reportMissingImports]
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]

    own = DictDefault(plain(cfg) | {"datasets": [plain(entry)], "dataset_num_proc": 1, "skip_prepare_dataset": False})
    normalize_cfg_datasets(own)
    entry, kind = own.datasets[0], own.datasets[0].get("type")
    base, _, style = kind.partition(":") if isinstance(kind, str) else (None, None, None)
    try:
        tokens, _ = get_dataset_wrapper(
            dataset_config=entry,
            tokenizer=tokenizer,
            cfg=own,
            dataset_base_type=base,
            dataset=rows,
            dataset_prompt_style=style or None,
        )
    except Exception as error:  # whatever a prompt strategy raises over a row
        raise DataError(
            f"{where}: Axolotl cannot read these rows as type {kind!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    if missing := {"input_ids", "labels"} - set(tokens.column_names):
        raise DataError(f"{where}: type {kind!r} makes no {sorted(missing)}; give prompts with answers")
    if len(tokens) != len(rows):
        raise DataError(f"{where}: of {len(rows)} rows {len(rows) - len(tokens)} were left out; correct or remove them")
    return tokens.select_columns(["input_ids", "labels"])
