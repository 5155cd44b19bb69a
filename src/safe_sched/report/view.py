"""What a report shows of some findings: counts, groups, an order of the rows. No layout, no texts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from safe_sched.audit.findings import Findings
from safe_sched.errors import DataError

BINS = 20
"""Of the histogram of ``p_harmful``."""

COMPARED = 50_000
"""Rows that correlations between signals are computed on, spread evenly over the table."""

FILL = 200
"""Rows that are shown at least, flagged or not, so that a clean file's report shows what came closest."""

_LEAST = np.finfo(np.float64).min
_AREAS = "words of "
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class GroupView:
    """Rows that belong together.

    Attributes:
        name: As the detectors name the group; for flagged rows of none see `buckets`.
        rows: How many there are.
        flagged: How many of them are flagged.
        expected: The sum of their ``p_harmful``: how many harmful rows to expect among them.
        worst: Index of the one with the highest ``p_harmful``.
    """

    name: str
    rows: int
    flagged: int
    expected: float
    worst: int


@dataclass(frozen=True)
class View:
    """The table of some findings as arrays, in the order of the table.

    Attributes:
        p, low, high, weight: float64 (rows,), nan where a row has none.
        flagged: bool (rows,).
        where, reason, group: Columns of texts.
        signals: float64 (rows,) of every signal by name, nan where it says nothing.
        order: int64 (rows,), row indices: flagged ones first, then by falling ``p_harmful``, unscored ones last.
        said: bool (rows,), rows that have a reason.
        kinds: ``"harm"`` or ``"quality"``, of every signal.
    """

    p: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    flagged: np.ndarray
    where: pa.ChunkedArray
    reason: pa.ChunkedArray
    group: pa.ChunkedArray
    signals: dict[str, np.ndarray]
    order: np.ndarray
    said: np.ndarray
    kinds: dict[str, str]


def view_of(findings: Findings) -> View:
    """Look at findings as a report does.

    Args:
        findings: Of an audit.

    Raises:
        DataError: The table lacks a column, or has another number of rows than the summary says.
    """
    table, names = findings.table, [signal.name for signal in findings.summary.signals]
    needed = ["where", "p_harmful", "p_low", "p_high", "is_harmful_issue", "weight", "reason", "group", *names]
    if lacking := [name for name in needed if name not in table.column_names]:
        raise DataError(
            f"the findings lack the columns {', '.join(map(repr, lacking))}; give what safe_sched.audit.audit returned"
        )
    if table.num_rows != findings.summary.rows:
        raise DataError(
            f"the findings have {table.num_rows} rows, but their summary counts {findings.summary.rows}; give the "
            "table and the summary of one audit"
        )
    p = _numbers(table["p_harmful"])
    flagged = pc.fill_null(table["is_harmful_issue"], False).to_numpy().astype(bool)
    number = np.arange(len(p))
    return View(
        p=p,
        low=_numbers(table["p_low"]),
        high=_numbers(table["p_high"]),
        weight=_numbers(table["weight"]),
        flagged=flagged,
        where=table["where"],
        reason=table["reason"],
        group=table["group"],
        signals={name: _numbers(table[name]) for name in names},
        order=np.lexsort((number, -np.nan_to_num(p, nan=-1.0), ~flagged)),
        said=table["reason"].is_valid().to_numpy().astype(bool),
        kinds={signal.name: signal.kind for signal in findings.summary.signals},
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy()


def shown_rows(view: View, at_most: int) -> np.ndarray:
    """Indices of the rows that a report lists, the worst first.

    Flagged rows, those that something was said of, and as many others as make `FILL`.
    """
    chosen = view.flagged[view.order] | view.said[view.order]
    chosen[:FILL] |= ~np.isnan(view.p[view.order[:FILL]])
    return view.order[chosen][:at_most]


def histogram(view: View) -> tuple[np.ndarray, np.ndarray]:
    """How many scored rows, and how many flagged ones, have a ``p_harmful`` in each of `BINS` equal parts of 0 to 1."""
    edges = np.linspace(0.0, 1.0, BINS + 1)
    scored = ~np.isnan(view.p)
    every, _ = np.histogram(view.p[scored], edges)
    flagged, _ = np.histogram(view.p[scored & view.flagged], edges)
    return every, flagged


def standing(view: View, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Of some rows and every signal, the share of all rows that have less of it; 0 where it says nothing."""
    found = {}
    for name, values in view.signals.items():
        there = np.sort(values[~np.isnan(values)])
        below = np.searchsorted(there, values[rows], side="left") + (len(values) - len(there))
        found[name] = np.where(np.isnan(values[rows]), 0.0, below / max(1, len(values)))
    return found


def strongest(view: View, rows: np.ndarray) -> list[str | None]:
    """The harm signal that singles out each of some rows the most; None where none does."""
    ranks = {name: rank for name, rank in standing(view, rows).items() if view.kinds[name] == "harm"}
    if not ranks or not len(rows):
        return [None] * len(rows)
    names, stacked = list(ranks), np.stack(list(ranks.values()))
    return [names[best] if stacked[best, i] > 0 else None for i, best in enumerate(stacked.argmax(0).tolist())]


def buckets(view: View) -> tuple[np.ndarray, list[str]]:
    """Which group every row stands in.

    Flagged rows of no group of the table stand together where they have a reason in common: the most frequent of a
    row's reasons that is not said of more than half of them, else the most frequent one; where there is none, the
    signal that singles the row out.

    Returns:
        int64 (rows,), -1 for rows of no group; and the names that it counts.
    """
    coded = view.group.combine_chunks().dictionary_encode()
    names: list[str] = coded.dictionary.to_pylist()
    code = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = np.flatnonzero(view.flagged & (code < 0))
    known: dict[str, int] = {}
    for row, name in zip(alone.tolist(), _in_common(view, alone), strict=True):
        code[row] = known.setdefault(name, len(names) + len(known))
    return code, names + list(known)


def _in_common(view: View, rows: np.ndarray) -> list[str]:
    said = [_apart(reason) if reason else [] for reason in view.reason.take(rows).to_pylist()]
    count = Counter(one for reasons in said for one in set(reasons))
    signals = strongest(view, rows)
    return [
        min(reasons, key=lambda one: (count[one] > len(rows) / 2, -count[one], one))
        if reasons
        else f"signal: {signal or 'none alone'}"
        for reasons, signal in zip(said, signals, strict=True)
    ]


def _apart(reason: str) -> list[str]:
    """What is said of a row, one by one: without numbers, and "words of war, drugs" as two."""
    parts = [_NUMBER.sub("N", one) for one in reason.split("; ")]
    lists = [one.removeprefix(_AREAS).split(", ") if one.startswith(_AREAS) else None for one in parts]
    return [
        one
        for part, areas in zip(parts, lists, strict=True)
        for one in ([_AREAS + a for a in areas] if areas else [part])
    ]


def groups(view: View) -> list[GroupView]:
    """The groups, those with most harmful rows to expect first, then the larger ones."""
    code, names = buckets(view)
    inside = np.flatnonzero(code >= 0)
    if not len(inside):
        return []
    p = np.nan_to_num(view.p[inside], nan=0.0)
    size = np.bincount(code[inside], minlength=len(names))
    flagged = np.bincount(code[inside], view.flagged[inside], minlength=len(names))
    expected = np.bincount(code[inside], p, minlength=len(names))
    by_code = inside[np.lexsort((inside, -p, code[inside]))]
    first = np.r_[0, np.cumsum(size)[:-1]]
    order = [one for one in np.lexsort((-size, -np.round(expected, 6))).tolist() if size[one]]
    return [
        GroupView(names[one], int(size[one]), int(flagged[one]), float(expected[one]), int(by_code[first[one]]))
        for one in order
    ]


def correlations(view: View) -> list[list[float | None]]:
    """Spearman's rank correlation of every two signals; None where one is the same for all rows.

    A signal that says nothing of a row counts as less than any value.
    """
    step = max(1, -(-len(view.p) // COMPARED))
    ranks = [_ranks(values[::step]) for values in view.signals.values()]
    found: list[list[float | None]] = [[None] * len(ranks) for _ in ranks]
    for i, left in enumerate(ranks):
        for j, right in enumerate(ranks[: i + 1]):
            if len(left) and left.std() > 0 and right.std() > 0:
                found[i][j] = found[j][i] = float(np.clip(np.corrcoef(left, right)[0, 1], -1.0, 1.0))
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the mean rank where values are equal; nan is less than any value."""
    from scipy.stats import rankdata

    return rankdata(np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=_LEAST))


def separation(view: View, name: str) -> float | None:
    """How likely a flagged row has more of a signal than one that is scored and not; None without both.

    Ties count half, and a signal that says nothing of a row is less than any value. It says what the flags go by, not
    whether they are right.
    """
    there = ~np.isnan(view.p)
    flagged = view.flagged[there]
    ones, others = int(flagged.sum()), int((~flagged).sum())
    if not ones or not others:
        return None
    ranks = _ranks(view.signals[name][there])
    return float((ranks[flagged].sum() - ones * (ones + 1) / 2) / (ones * others))
