"""Rows that link to a host which hardly any other row links to."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence

_HOST = re.compile(r"https?://([a-z0-9][a-z0-9.-]{0,252})", re.IGNORECASE)
_BUCKETS = 1 << 16


class RareLinks:
    """How rare the rarest host is that a row's answer links to.

    Args:
        rows: A host is rare where no more rows than this link to it, at least 1.

    Example:
        >>> from safe_sched.audit.rows import audit_row
        >>> answers = ["See https://a.example/1"] * 5 + ["See http://b.example", "No link"]
        >>> rows = [audit_row({"prompt": "?", "completion": answer}) for answer in answers]
        >>> links = RareLinks(rows=2)
        >>> links.observe(rows)
        >>> links.ready()
        >>> links.score(rows).value.astype(float).round(2).tolist()
        [0.2, 0.2, 0.2, 0.2, 0.2, 1.0, nan]
    """

    name: ClassVar[str] = "rare_links"
    about: ClassVar[str] = "links to a host that hardly any other row links to"
    kind: ClassVar[Literal["harm", "quality"]] = "quality"

    def __init__(self, rows: int = 2) -> None:
        self._rare = rows
        self._rows = np.zeros(_BUCKETS, np.int64)  # per hash of a host: its size does not depend on the input

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Count the rows that link to each host."""
        for row in rows:
            for bucket in _hosts(row):
                self._rows[bucket] += 1

    def ready(self) -> None:
        """Nothing is left to fit."""

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """1 over the rows that link to the rarest host; nan without a link."""
        value = np.full(len(rows), np.nan, np.float32)
        reasons: list[str | None] = [None] * len(rows)
        for place, row in enumerate(rows):
            if hosts := _hosts(row):
                count = max(1, min(int(self._rows[bucket]) for bucket in hosts))
                value[place] = 1 / count
                if count <= self._rare:
                    reasons[place] = f"links to a host that {count} of the rows links to"
        return Evidence(value, reasons, [None] * len(rows))

    def settings(self) -> dict[str, object]:
        """What the values depend on, beside the rows."""
        return {"rows": self._rare, "buckets": _BUCKETS}


def _hosts(row: AuditRow) -> set[int]:
    return {zlib.crc32(host.lower().encode()) % _BUCKETS for host in _HOST.findall(row.answer)}
