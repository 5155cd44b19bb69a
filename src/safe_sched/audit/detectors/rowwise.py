"""Detectors that look at one row at a time and learn nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence, Sort


def nothing(rows: int) -> tuple[np.ndarray, list[str | None]]:
    """Values and reasons of rows of which nothing is said yet."""
    return np.full(rows, np.nan, np.float32), [None] * rows


class Rowwise:
    """A detector in all but its name and `look`."""

    kind: ClassVar[Sort] = "quality"

    def look(self, row: AuditRow) -> tuple[float, str] | None:
        """The value of a row and the reason in words; None where there is nothing to say."""
        raise NotImplementedError

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Nothing is learnt."""

    def ready(self) -> None:
        """Nothing is learnt."""

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """What `look` says of each row, nan where that is nothing."""
        value, reasons = nothing(len(rows))
        for number, found in enumerate(map(self.look, rows)):
            if found is not None:
                value[number], reasons[number] = found
        return Evidence(value, reasons, [None] * len(rows))
