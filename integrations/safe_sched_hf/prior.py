"""What is believed of each training row before the run, read from a column of the training set.

A column goes with its rows wherever they go: a trainer that shuffles the set, or drops rows of it, cannot mix up which
number belongs to which row, and a table of another file cannot be given by mistake.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safe_sched.errors import DataError, OptionError


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
    names = getattr(dataset, "column_names", None)
    if names is None:
        rows = [dataset[i] for i in range(len(dataset))]
        names = [name for name in (rows[0] if rows else {}) if all(name in row for row in rows)]
        values: Sequence[Any] = [row[column] for row in rows] if column in names else []
    else:
        values = dataset.with_format(None)[column] if column in names else []
    if column not in names:
        raise DataError(
            f"the training set has the columns {', '.join(map(repr, names))}, but not {column!r}, which prior= names. "
            "Train on the rows that `safe-sched audit --out` wrote, or add the column. Packing drops every column but "
            "the tokens: train without it"
        )
    return torch.tensor([_number(value, i, column) for i, value in enumerate(values)], dtype=torch.float64)


def _number(value: Any, row: int, column: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise DataError(
        f"row {row} of the training set has {str(value)[:40]!r} in the column {column!r}; allowed: a number from 0 to 1"
    )
