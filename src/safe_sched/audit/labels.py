"""What a user knows of some rows: that they are harmful, or that they are not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from safe_sched.audit.inputs import Entry
from safe_sched.audit.rows import AuditRow
from safe_sched.errors import DataError

Labels = str | Sequence[bool | int | float | None]
"""The name of a column, or one value per row: 1 is harmful, 0 is not, None is unknown."""

_KNOWN = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0, "": math.nan}


class KnownLabels:
    """What is known of some rows, by column or by number."""

    def __init__(self, labels: Labels | None) -> None:
        self._labels = labels

    def require(self, rows: int, known: int, limit: int | None) -> None:
        """Raise a `DataError` where labels were given that say nothing, or more of them than there are rows."""
        if self._labels is None:
            return
        if not isinstance(self._labels, str) and len(self._labels) > rows and limit is None:
            raise DataError(f"there are {len(self._labels)} labels for {rows} rows; give one per row, or None")
        if not known:
            raise DataError("labels= was given, and no row has a label; label some rows, or leave labels out")

    def of(self, entries: Sequence[Entry]) -> np.ndarray:
        """Float32 (entries,): 1, 0, or nan where nothing is known.

        Raises:
            DataError: A label is missing, or is something else.
        """
        if self._labels is None:
            return np.full(len(entries), np.nan, np.float32)
        return np.array([_one(entry, self._labels) for entry in entries], np.float32)


def _one(entry: Entry, labels: Labels) -> float:
    if isinstance(labels, str):
        row = entry.example.row if isinstance(entry, AuditRow) else entry.row
        if labels not in row:
            if not isinstance(entry, AuditRow):
                return math.nan  # it has no number either
            raise DataError(
                f"{entry.where} has no column {labels!r}, which labels= names. Where a trainer's own file describes "
                "the data, only the columns that are trained on are read: name the data file itself"
            )
        value = row[labels]
    else:
        if entry.number >= len(labels):
            raise DataError(f"there are {len(labels)} labels, and more rows; give one per row, or None")
        value = labels[entry.number]
    told = math.nan if value is None else _KNOWN.get(str(value).strip().lower(), value)
    if isinstance(told, str) or (told not in (0, 1) and not math.isnan(told)):
        raise DataError(f"{entry.where} has the label {str(value)[:40]!r}; allowed: 0, 1, or None for unknown")
    return float(told)
