"""What an audit found: a table with one line per row, and a summary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

VERSION = 1
"""Of the summary's schema."""

COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("row", pa.int64()),
    ("where", pa.string()),
    ("p_harmful", pa.float32()),
    ("p_low", pa.float32()),
    ("p_high", pa.float32()),
    ("is_harmful_issue", pa.bool_()),
    ("weight", pa.float32()),
    ("reason", pa.string()),
    ("group", pa.string()),
)
"""The columns of `Findings.table` before those of the signals. Numbers are null where a row could not be read."""


@dataclass(frozen=True)
class Signal:
    """A detector, as the report names it.

    Attributes:
        name: Its column.
        about: What it sees, in a line.
        kind: ``"harm"`` or ``"quality"``.
        said: Rows of which it said something in words.
    """

    name: str
    about: str
    kind: Literal["harm", "quality"]
    said: int = 0


@dataclass(frozen=True)
class Bad:
    """What could not be read.

    Attributes:
        where: The file and the line, or the row.
        reason: What is wrong with it.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Share:
    """An expected share with its interval, each from 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The audit in numbers. `as_json` is what ``--json`` prints.

    Attributes:
        rows: Rows of the input: those in the table.
        scored: Rows that have a ``p_harmful``.
        bad_rows: What could not be read: lines that are no rows, and rows of no known schema.
        bad: The first of them, by name.
        flagged: Rows with ``is_harmful_issue``.
        expected_share: Harmful rows over scored rows, with a 95 % interval.
        coverage: Scored rows over all rows and bad lines, from 0 to 1.
        threshold: Rows whose ``p_harmful`` is at least this are flagged.
        signals: The detectors.
        sources: What was audited.
        seconds: How long each stage took.
        versions: Of this package and what the result depends on.
        limited: The number of rows that the audit was limited to, or None.
        model: The model that was asked, or None.
        calibration: How ``p_harmful`` came about, in words.
        version: Of this schema.
    """

    rows: int
    scored: int
    bad_rows: int
    bad: tuple[Bad, ...]
    flagged: int
    expected_share: Share
    coverage: float
    threshold: float
    signals: tuple[Signal, ...]
    sources: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    limited: int | None = None
    model: str | None = None
    calibration: str = ""
    version: int = VERSION

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values.

        Example:
            >>> share = Share(0.0, 0.0, 0.01)
            >>> Summary(2, 2, 0, (), 0, share, 1.0, 0.5, ()).as_json()["expected_share"]
            {'value': 0.0, 'low': 0.0, 'high': 0.01}
        """
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


@dataclass(frozen=True)
class Findings:
    """What `safe_sched.audit.audit` returns.

    Attributes:
        table: One line per row, in the order of the input: the columns of `COLUMNS`, then one float column per signal.
        summary: The audit in numbers.
    """

    table: pa.Table
    summary: Summary
