"""Losses of a reference model: one Parquet file, tied to rows by their keys.

Columns: ``key`` uint64, the row's content (`safe_sched.rows.keys`); ``nll`` float32, the mean loss of its label tokens
in nats per token; ``label_tokens`` int32. Written by ``safe-sched losses`` and read by ``BDS(evidence="reference")``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from safe_sched.data.writing import replacing
from safe_sched.errors import DataError
from safe_sched.rows.index import RowIndex

_COLUMNS = ("key", "nll", "label_tokens")


def save_reference(path: Path, keys: Tensor, nll: Tensor, label_tokens: Tensor) -> None:
    """Write the losses of some rows; the file appears whole or not at all.

    Args:
        path: Where to.
        keys: int64 (rows,).
        nll: float32 (rows,), nats per token.
        label_tokens: int64 (rows,).
    """
    columns = (keys.numpy().view(np.uint64), nll.float().numpy(), label_tokens.to(torch.int32).numpy())
    with replacing(path) as file:
        pyarrow.parquet.write_table(pa.table(dict(zip(_COLUMNS, columns, strict=True))), file)


def load_reference(path: Path, index: RowIndex) -> Tensor:
    """The losses of a training set's rows.

    Args:
        path: From `save_reference`.
        index: The rows of the training set; a stream has none yet.

    Returns:
        float32 (slots,), nats per token.

    Raises:
        DataError: The file cannot be read, or lacks rows of the training set.
    """
    try:
        table = pyarrow.parquet.read_table(path, columns=list(_COLUMNS[:2]))
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(
            f"no reference losses in {path} ({error}). Write them with: safe-sched losses MODEL DATA"
        ) from error
    if index.streaming:
        raise DataError(
            'evidence="reference" needs a training set whose rows are known at the start; this one is a stream. Use '
            'evidence="probe"'
        )
    keys = torch.from_numpy(table.column("key").to_numpy().view(np.int64).copy())
    keys, order = keys.sort()
    losses = torch.from_numpy(table.column("nll").to_numpy().astype(np.float32))[order]
    at = torch.searchsorted(keys, index.keys).clamp(max=max(keys.numel() - 1, 0))
    missing = int((keys[at] != index.keys).sum()) if keys.numel() else index.slots
    if missing:
        raise DataError(
            f"{path} has no loss for {missing} of {index.slots} distinct training rows: it belongs to another data "
            "set, tokenizer or chat template. Write it again: safe-sched losses MODEL DATA"
        )
    bad = (~torch.isfinite(losses[at])).nonzero().flatten()
    if bad.numel():
        raise DataError(
            f"{path} holds {bad.numel()} losses that are not finite; write it again from a model that has them"
        )
    return losses[at]
