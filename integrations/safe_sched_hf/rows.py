"""The key of every training row, as the trainer's own collator will show it.

A table of tokens is hashed column by column, without building a batch, where that gives the keys that the collator
gives on a few rows tried; otherwise every row goes through the collator once.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from safe_sched.errors import DataError
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import batch_fields, keys_of, keys_of_flat
from safe_sched.rows.nll import label_counts

_TRIED = 16  # rows that decide whether the fast path is right
_CHUNK = 1 << 17  # tokens read at once: arrays that stay in the cache; ten times as many take ten times as long
_COLLATED = 64  # rows collated at once


def index_rows(dataset: Any, collate: Callable[[list[Any]], Any], *, progress: bool = False) -> RowIndex:
    """Index a training set by row key.

    Args:
        dataset: What the trainer's data loader reads: a map-style set, or an iterable one, whose rows are only known
            as they come.
        collate: The data loader's collator.
        progress: Whether to show a bar.

    Raises:
        DataError: The set is empty, or has rows without a label token (naming them).
    """
    if is_stream(dataset):
        return RowIndex(None)
    if len(dataset) == 0:
        raise DataError("the training set has no rows; give the trainer at least one row to train on")
    keys, counts, packed = keys_of_rows(dataset, collate, progress=progress)
    empty = (counts == 0).nonzero().flatten()
    if empty.numel() and (not packed or empty.numel() == counts.numel()):
        more = ", ..." if empty.numel() > 5 else ""
        raise DataError(
            f"{empty.numel()} of {counts.numel()} training rows have no label token, so nothing can be learned from "
            f"them (rows {empty[:5].tolist()}{more}). Their answers are empty, masked or cut off "
            "by max_length: remove these rows or raise max_length."
        )
    return RowIndex(keys[counts > 0], counts[counts > 0])


def is_stream(dataset: Any) -> bool:
    """Whether the rows of a training set are only known as they come."""
    return isinstance(dataset, IterableDataset | datasets.IterableDataset) or not hasattr(dataset, "__len__")


def keys_of_rows(
    dataset: Any, collate: Callable[[list[Any]], Any], *, progress: bool = False
) -> tuple[Tensor, Tensor, bool]:
    """Keys and label tokens of the rows of a map-style set, those of packed lines one after another.

    Returns:
        int64 (rows,) and int64 (rows,), and whether lines are packed.
    """
    with leaving_random_numbers():
        fast = _from_columns(dataset, collate, progress)
        return fast if fast is not None else _from_batches(dataset, collate, progress)


def first_rows(dataset: Any, count: int = 4) -> list[list[int]]:
    """The token ids of the first rows, none of a stream: reading one would use it up."""
    # what shards a stream among processes has a length that it cannot tell
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return []
    with leaving_random_numbers():
        rows = [dataset[i] for i in range(min(count, len(dataset)))]
    return [list(row["input_ids"]) for row in rows if "input_ids" in row]


def _from_columns(
    dataset: Any, collate: Callable[[list[Any]], Any], progress: bool
) -> tuple[Tensor, Tensor, bool] | None:
    """Keys straight from the columns, or None where they are not what the collator makes of them."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return None
    if "input_ids" not in dataset.column_names:
        return None
    tried = sorted({int(i) for i in np.linspace(0, len(dataset) - 1, _TRIED)})
    expected = keys_of_collated(collate([dataset[i] for i in tried]))
    if not torch.equal(expected[0], keys_of_table(_tokens_of(dataset)[tried])[0]):
        return None
    return *keys_of_tokens(dataset, progress=progress), "seq_lengths" in dataset.column_names


def _tokens_of(dataset: datasets.Dataset) -> Any:
    columns = [c for c in ("input_ids", "labels", "seq_lengths") if c in dataset.column_names]
    return dataset.select_columns(columns).with_format("arrow")


def keys_of_tokens(dataset: datasets.Dataset, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and label tokens of the rows of a set of tokens, straight from its columns."""
    table, count = _tokens_of(dataset), len(dataset)
    bar = tqdm(total=count, desc="identifying rows", unit="row", disable=not progress, leave=False)
    tried = table[:: max(1, count // _TRIED)] if count else table[:]
    tokens = pc.call_function("sum", [pc.call_function("list_value_length", [tried.column("input_ids")])]).as_py()
    at_once = max(1, _CHUNK * len(tried) // max(1, tokens or 0))
    parts = []
    with bar:
        for start in range(0, count, at_once):
            parts.append(keys_of_table(table[slice(start, start + at_once)]))
            bar.update(min(at_once, count - start))
    return torch.cat([k for k, _ in parts]), torch.cat([n for _, n in parts])


def keys_of_table(table: pa.Table) -> tuple[Tensor, Tensor]:
    """Keys and label tokens of the rows in a table of tokens, those of packed lines one after another."""

    def column(name: str) -> tuple[Tensor, Tensor]:
        lists = table.column(name).combine_chunks()
        flat = pc.call_function("list_flatten", [lists]).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return torch.tensor(flat), torch.tensor(
            pc.call_function("list_value_length", [lists]).to_numpy().astype(np.int64)
        )

    tokens, lengths = column("input_ids")
    labels = column("labels")[0] if "labels" in table.column_names else None
    if "seq_lengths" in table.column_names:
        lengths = column("seq_lengths")[0]
    return keys_of_flat(tokens, labels, lengths)


def _from_batches(dataset: Any, collate: Callable[[list[Any]], Any], progress: bool) -> tuple[Tensor, Tensor, bool]:
    parts: list[tuple[Tensor, Tensor]] = []
    packed = False
    starts = range(0, len(dataset), _COLLATED)
    for start in tqdm(starts, desc="identifying rows", unit="batch", disable=not progress, leave=False):
        items = [dataset[i] for i in range(start, min(start + _COLLATED, len(dataset)))]
        try:
            collated = collate(items)
        except (ValueError, RuntimeError):
            # a collator that cannot pad takes rows of one length only
            parts += [keys_of_collated(collate([item])) for item in items]
            continue
        packed |= batch_fields(collated)[2].rows != len(items)
        parts.append(keys_of_collated(collated))
    return torch.cat([k for k, _ in parts]), torch.cat([n for _, n in parts]), packed


def keys_of_collated(inputs: Any) -> tuple[Tensor, Tensor]:
    """Keys and label tokens of the rows of a micro-batch."""
    input_ids, labels, layout = batch_fields(inputs)
    return keys_of(input_ids, labels, layout), label_counts(labels, layout)


@contextlib.contextmanager
def leaving_random_numbers() -> Iterator[None]:
    """Leave every generator as it was: a collator may draw numbers, and training must not notice."""
    state, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)
    np.random.set_state(legacy)
