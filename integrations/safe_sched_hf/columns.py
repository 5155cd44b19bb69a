"""Columns of the training set: an audit's probabilities as prior, and weights for `safe_sched.Fixed`.

A column goes with its rows wherever they go: a trainer that shuffles the set, or drops rows of it, cannot mix up which
number belongs to which row. Its numbers are tied to the rows' keys, by one of three ways:

- the trainer's own rows still have the column: they are read once, at the start;
- packing has dropped it: the rows from before are prepared once more, without packing (``rows=``);
- a stream: each row's number is noted when the data loader collates the row.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from safe_sched.errors import DataError, OptionError
from safe_sched.rows.index import RowIndex
from safe_sched.rows.values import RowValues
from safe_sched_hf.rows import is_stream, keys_of_collated, keys_of_rows, keys_of_tokens

HAND_OVER = "hand over the rows as they were before: SafeSchedCallback(..., rows=train_dataset)"


def require_prior(prior: Any, scheduler: Any) -> None:
    """Raise an `OptionError` unless ``prior`` may name a column, and the scheduler takes what is in it."""
    if not isinstance(prior, str):
        raise OptionError(
            f"prior is a {type(prior).__name__}; allowed: the name of a column of the training set, which goes with "
            'its rows. Of findings: dataset.add_column("p_harmful", findings.table["p_harmful"].to_pylist()), before '
            'anything drops or moves rows, then prior="p_harmful"'
        )
    if not scheduler.takes_prior:
        raise OptionError(f"{scheduler.name!r} takes no prior; use BDS, NeuralBDS or Fixed, or leave prior out")


def read_prior(dataset: Any, column: str) -> Tensor:
    """The numbers in a column of a training set.

    Args:
        dataset: What the trainer trains on: map-style, with named columns or rows that are mappings.
        column: Its name.

    Returns:
        float64 (rows,), in the order of the set; nan where a row has no number.

    Raises:
        DataError: There is no such column, or what is in it are no numbers.

    Example:
        >>> read_prior([{"input_ids": [1], "p": 0.25}, {"input_ids": [2], "p": None}], "p")
        tensor([0.2500,    nan], dtype=torch.float64)
    """
    if not hasattr(dataset, "__len__"):
        raise DataError("a prior needs a training set whose rows are known at the start; this one is a stream")
    if column not in (names := column_names(dataset)):
        raise DataError(
            f"the training set has the columns {', '.join(map(repr, names))}, but not {column!r}, which prior= names. "
            "Train on the rows that `safe-sched audit --out` wrote, or add the column. Packing drops every column but "
            "the tokens: train without it"
        )
    return torch.tensor(
        [
            math.nan if value is None else _number(value, f"row {row} of the training set", column, "from 0 to 1")
            for row, value in enumerate(_values(dataset, column))
        ],
        dtype=torch.float64,
    )


def column_names(dataset: Any) -> list[str]:
    """The columns of a map-style set: those that every row has, where its rows are mappings."""
    names = getattr(dataset, "column_names", None)
    if names is not None:
        return list(names)
    rows = [dataset[i] for i in range(len(dataset))]
    return [name for name in (rows[0] if rows else {}) if all(name in row for row in rows)]


def _values(dataset: Any, column: str) -> Sequence[Any]:
    if hasattr(dataset, "column_names"):
        return dataset.with_format(None)[column]
    return [dataset[i][column] for i in range(len(dataset))]


def _number(value: Any, row: str, column: str, allowed: str) -> float:
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # of a set that is formatted as tensors or arrays
        value = value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise DataError(f"{row} has {str(value)[:40]!r} in the column {column!r}; allowed: a number {allowed}")


def weight_of(value: Any, row: str, column: str) -> float:
    """What a column holds for a row, as its weight.

    Raises:
        DataError: It is no finite number >= 0; naming the row.
    """
    weight = math.nan if value is None else _number(value, row, column, ">= 0")
    if not 0 <= weight < math.inf:
        seen = "no number" if value is None else weight
        raise DataError(
            f"{row} has {seen} in the column {column!r}; allowed: a finite number >= 0. Give every row a weight, 1 for "
            "those that are to count as usual"
        )
    return weight


class ColumnReader:
    """Reads columns of a training set for a scheduler, tied to the rows' keys.

    Args:
        trainer: About to train.
        loader: Its data loader.
        rows: The training set as it was before the trainer prepared it, or what loads it with a named column, or None.
    """

    def __init__(self, trainer: Any, loader: Any, rows: Any = None) -> None:
        self._trainer, self._loader, self._rows = trainer, loader, rows
        self._read: dict[str, Callable[[Tensor], Tensor]] = {}

    @classmethod
    def connect(cls, index: RowIndex, trainer: Any, loader: Any, rows: Any = None) -> ColumnReader:
        """Let the schedulers of an index read columns, and say whether positions name rows there."""
        reader = cls(trainer, loader, rows)
        index.columns, index.moved = reader, moved_by(trainer, loader.dataset, index)
        return reader

    def __call__(self, column: str) -> Callable[[Tensor], Tensor]:
        """What looks up the numbers of a column by row key.

        Raises:
            DataError: No row has the column any more, or a row has no number >= 0 there.
        """
        if column not in self._read:
            streamed = is_stream(self._trainer.train_dataset) and self._rows is None
            self._read[column] = self._noted(column) if streamed else self._whole(column)
        return self._read[column]

    def settings(self) -> dict[str, dict[str, str]]:
        """A digest of every column read, for the manifest and the check at a resume; streams are not known yet."""
        whole = {name: found.fingerprint() for name, found in self._read.items() if isinstance(found, RowValues)}
        return {"columns": whole} if whole else {}

    def _whole(self, column: str) -> RowValues:
        own, collate = self._trainer.train_dataset, self._loader.collate_fn
        name = f"the column {column!r}"
        if not is_stream(own) and column in column_names(own):
            tokens = own
            if isinstance(own, datasets.Dataset):  # without what the collator does not take
                kept = getattr(self._loader.dataset, "column_names", own.column_names)
                tokens = own.select_columns([c for c in own.column_names if c in kept and c != column])
            keys, _, _ = keys_of_rows(tokens, collate)
            source, remedy = own, "rows change between the training set and its batches; switch that off"
        else:
            source = self._before(column)
            tokens = source.select_columns([c for c in ("input_ids", "labels") if c in source.column_names])
            both = "labels" in source.column_names
            keys = keys_of_tokens(tokens)[0] if both else keys_of_rows(tokens, collate)[0]
            remedy = "the rows handed over are not those that the trainer trains on; give rows=train_dataset"
        weights = [weight_of(v, f"row {i} of the training set", column) for i, v in enumerate(_values(source, column))]
        if keys.numel() != len(weights):
            raise DataError(
                f"{name} has {len(weights)} numbers, but the collator makes {keys.numel()} rows of them; {HAND_OVER}"
            )
        return RowValues.of(keys, torch.tensor(weights, dtype=torch.float32), name, remedy)

    def _before(self, column: str) -> datasets.Dataset:
        """The rows as they were, prepared once more as the trainer did, but neither packed nor shuffled."""
        rows: Any = self._rows(column) if callable(self._rows) else self._rows
        if rows is None:
            raise DataError(f"{_missing(self._trainer, column)}: {HAND_OVER}")
        if not isinstance(rows, datasets.Dataset):
            if is_stream(rows):
                raise DataError("rows= is a stream; allowed: a datasets.Dataset or a list of rows")
            rows = datasets.Dataset.from_list(list(rows))
        if column not in rows.column_names:
            names = ", ".join(map(repr, rows.column_names))
            raise DataError(f"the rows handed over have the columns {names}, but not {column!r}; add it")
        return _prepared(self._trainer, rows, column)

    def _noted(self, column: str) -> Callable[[Tensor], Tensor]:
        if self._trainer.args.world_size > 1 or self._loader.num_workers:
            raise DataError(
                f"the column {column!r} of a stream can be read in one process only, with dataloader_num_workers=0; "
                f"otherwise {HAND_OVER}"
            )
        loader = getattr(self._loader, "base_dataloader", self._loader)  # accelerate hands reads on, not writes
        loader.collate_fn = noted = _Noted(loader.collate_fn, column, _missing(self._trainer, column))
        return noted.weights_of


class _Noted:
    """A collator that notes the number in a column of every row, by the key that the row has in the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any], column: str, missing: str) -> None:
        self._collate, self._column, self._missing = collate, column, missing
        self._rows = 0
        self._weights: dict[int, tuple[int, float]] = {}

    def __call__(self, items: list[Mapping[str, Any]]) -> Any:
        weights = []
        for number, item in enumerate(items, self._rows):
            if self._column not in item:
                raise DataError(f"{self._missing}: {HAND_OVER}")
            weights.append(weight_of(item[self._column], f"row {number} of the stream", self._column))
        batch = self._collate([{k: v for k, v in item.items() if k != self._column} for item in items])
        keys = keys_of_collated(batch)[0].tolist()
        if len(keys) != len(items):
            raise DataError(f"the collator makes {len(keys)} rows of {len(items)}, so no weight is theirs: {HAND_OVER}")
        for number, (key, weight) in enumerate(zip(keys, weights, strict=True), self._rows):
            first, known = self._weights.setdefault(key, (number, weight))
            if known != weight:
                raise DataError(
                    f"the column {self._column!r}: rows {first} and {number} of the stream have the same content but "
                    f"weights {known} and {weight}; give identical rows one weight"
                )
        self._rows += len(items)
        return batch

    def weights_of(self, keys: Tensor) -> Tensor:
        """float32 (any,), the weights of rows that have come by."""
        unknown = sum(key not in self._weights for key in keys.tolist())
        if unknown:
            raise DataError(
                f"{unknown} rows of the stream are trained on with other tokens than the data loader collated; switch "
                "off what changes them at run time"
            )
        return torch.tensor([self._weights[key][1] for key in keys.tolist()], dtype=torch.float32)


def _missing(trainer: Any, column: str) -> str:
    if getattr(trainer.args, "packing", False):
        return f"packing dropped the column {column!r} of the training set"
    return f"the rows that the trainer holds have no column {column!r}"


def moved_by(trainer: Any, dataset: Any, index: RowIndex) -> str | None:
    """Why the position of a row in the set that a user gave is not its position in training, or None."""
    args = trainer.args
    if getattr(args, "packing", False) or "seq_lengths" in (getattr(dataset, "column_names", None) or ()):
        return "packing cuts the rows and moves them"
    if getattr(args, "shuffle_dataset", False):
        return "shuffle_dataset=True moves the rows"
    if any(kind.__module__.startswith("axolotl.") for kind in type(trainer).__mro__):
        return "Axolotl shuffles the rows and drops some"
    if index.row_slots is not None and index.rows != len(dataset):
        return f"the collator makes {index.rows} rows of {len(dataset)}"
    return None


def _prepared(trainer: Any, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Rows as a `trl.SFTTrainer` prepares them without packing; other trainers take tokens as they are."""
    if not hasattr(trainer, "_prepare_dataset") or getattr(trainer, "_skip_prepare_dataset", False):
        return rows
    args = copy.copy(trainer.args)
    strategy = args.packing_strategy if args.packing else None
    if strategy == "wrapped":
        raise DataError(
            f"packing_strategy='wrapped' cuts rows anywhere and joins the pieces, so no line has a weight of its "
            f"own in the column {column!r}; use packing_strategy='bfd'"
        )
    args.shuffle_dataset = args.use_liger_kernel = False  # the kernel's preparation drops other columns
    if strategy is not None:  # packing cuts overlong rows at their end
        args.truncation_mode = "keep_start"
    if strategy == "bfd_split":
        args.max_length = None
    prepared = trainer._prepare_dataset(
        rows, trainer.processing_class, args, False, trainer._formatting_func, "weighted"
    )
    if strategy != "bfd_split":
        return prepared
    size = trainer.args.max_length

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pieces = [
            (ids[at : at + size], labels[at : at + size], value)
            for ids, labels, value in zip(batch["input_ids"], batch["labels"], batch[column], strict=True)
            for at in range(0, len(ids), size)
        ]
        return {name: [piece[i] for piece in pieces] for i, name in enumerate(("input_ids", "labels", column))}

    return prepared.select_columns(["input_ids", "labels", column]).map(cut, batched=True)
