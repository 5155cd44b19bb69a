"""What a report may show of the rows: their texts where that is asked for, else only how long they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safe_sched.audit.inputs import Inputs, Rows, Unread, opened_sources
from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.data.terminal_text import printable
from safe_sched.errors import DataError

LONGEST = 4000
"""Characters of one text."""

PARTS = 30
"""Texts of one row."""

BUDGET = 20_000_000
"""Characters of all rows together; behind them, rows are redacted."""

_ROLES = {"system", "user", "assistant", "tool", "text"}

RowsGiven = str | Path | Iterable[Any]
Part = dict[str, Any]


def parts_of(source: RowsGiven, wanted: Mapping[int, str], show_text: bool) -> dict[int, list[Part] | None]:
    """The texts of some rows, or how long they are.

    Args:
        source: The rows that were audited, in their order; gone through once.
        wanted: Numbers of the rows, from 0, and where each stands.
        show_text: Whether the texts themselves are given.

    Returns:
        Of every wanted row its parts: ``role``, ``characters``, ``lines`` and ``text``, which is None where redacted;
        or None for a row that is of no known schema.

    Raises:
        DataError: The source cannot be read, or these are not the rows that were audited.
    """
    missing = set(wanted)
    found: dict[int, list[Part] | None] = {}
    budget = BUDGET if show_text else 0
    with contextlib.ExitStack() as stack:
        rows: Iterable[Any] = source if not isinstance(source, str | Path) else [source]
        if isinstance(rows, list | tuple) and rows and not isinstance(rows[0], AuditRow | Unread):
            rows = Inputs(opened_sources(rows, stack))
        named = isinstance(rows, Inputs) and not isinstance(rows.sources[0], Rows)
        for number, row in enumerate(rows):
            if not missing:
                break
            if number not in missing:
                continue
            missing.discard(number)
            if named and row.where != wanted[number]:
                raise DataError(
                    f"row {number} is {printable(row.where)}, but was {printable(wanted[number])} in the audit; "
                    "give the rows that were audited"
                )
            found[number] = _parts(row, number, budget)
            budget -= sum(len(part["text"] or "") for part in found[number] or ())
    if missing:
        raise DataError(f"the rows end before row {min(missing)}, which the report shows; give those that were audited")
    return found


def _parts(row: Any, number: int, budget: int) -> list[Part] | None:
    """The parts of a row; their texts where all of them fit."""
    if isinstance(row, Unread):
        return None
    try:
        example = (row if isinstance(row, AuditRow) else audit_row(row, number)).example
    except (DataError, RecursionError):
        return None
    fits = sum(min(LONGEST, len(part.text)) for part in example.parts[:PARTS]) < budget
    shown: list[Part] = [
        {
            # a role is whatever the data says, so it may hold text as well
            "role": part.role if part.role in _ROLES else "another role",
            "characters": len(part.text),
            "lines": part.text.count("\n") + 1,
            "text": printable(part.text[:LONGEST]) if fits else None,
        }
        for part in example.parts[:PARTS]
    ]
    if (more := len(example.parts) - PARTS) > 0:
        rest = sum(len(part.text) for part in example.parts[PARTS:])
        shown.append({"role": f"{more:,} more texts", "characters": rest, "lines": 0, "text": None})
    return shown
