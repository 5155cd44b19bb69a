"""The geometry of the report's charts: numbers from which the template draws SVG. No script is needed to see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safe_sched.report.words import percent

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 40
CELL, LABEL, LETTER = 46, 190, 7.2


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: the flagged rows stand in front of all rows."""

    x: float
    width: float
    y: float
    height: float
    flagged_y: float
    flagged_height: float
    label: str


@dataclass(frozen=True)
class Histogram:
    """A histogram with a logarithmic axis of counts: the few rows that matter stand beside thousands that do not.

    Attributes:
        bars: From left to right.
        rows: What the bars say, in figures: the range, all rows, flagged rows.
        x_ticks, y_ticks: Place and label.
        threshold: Where the threshold stands, None where it is outside.
    """

    bars: tuple[Bar, ...]
    rows: tuple[tuple[str, str, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    threshold: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    base: int = HEIGHT - BOTTOM


def histogram_chart(every: np.ndarray, flagged: np.ndarray, threshold: float) -> Histogram:
    """A histogram of ``p_harmful``.

    Args:
        every: int (bins,), scored rows in equal parts of 0 to 1.
        flagged: int (bins,), flagged rows in them.
        threshold: At which rows are flagged.
    """
    bins, base = len(every), HEIGHT - BOTTOM
    step = (WIDTH - LEFT - RIGHT) / bins
    top = 10 ** max(1, math.ceil(math.log10(max(2, int(every.max(initial=0))))))

    def height(count: int) -> float:
        return 0.0 if count <= 0 else (base - TOP) * math.log10(1 + count) / math.log10(1 + top)

    bars, rows = [], []
    for i, (many, bad) in enumerate(zip(every.tolist(), flagged.tolist(), strict=True)):
        span = f"{i / bins:.2f} to {(i + 1) / bins:.2f}"
        bars.append(
            Bar(
                x=round(LEFT + i * step + 1, 2),
                width=round(step - 2, 2),
                y=round(base - height(many), 2),
                height=round(height(many), 2),
                flagged_y=round(base - height(bad), 2),
                flagged_height=round(height(bad), 2),
                label=f"p_harmful {span}: {many:,} rows, {bad:,} of them flagged",
            )
        )
        rows.append((span, f"{many:,}", f"{bad:,}"))
    ticks, count = [(float(base), "0")], 10  # 1 would stand too near to 0
    while count <= top:
        ticks.append((round(base - height(count), 2), f"{count:,}"))
        count *= 10
    across = [(round(LEFT + i / 5 * (WIDTH - LEFT - RIGHT), 2), f"{i / 5:.1f}") for i in range(6)]
    inside = not math.isnan(threshold) and 0 <= threshold <= 1
    at = round(LEFT + threshold * (WIDTH - LEFT - RIGHT), 2) if inside else None
    return Histogram(tuple(bars), tuple(rows), tuple(across), tuple(ticks), at)


@dataclass(frozen=True)
class Square:
    """One pair of signals."""

    x: int
    y: int
    shade: float
    way: str
    value: str
    label: str


@dataclass(frozen=True)
class Matrix:
    """Correlations as coloured squares."""

    squares: tuple[Square, ...]
    names: tuple[str, ...]
    width: int
    height: int
    cell: int = CELL
    label: int = LABEL


def matrix_chart(names: Sequence[str], correlations: Sequence[Sequence[float | None]]) -> Matrix:
    """How signals go together, the lower half of the matrix without its diagonal.

    Args:
        names: Of the signals; those that go with none are left out.
        correlations: From `safe_sched.report.view.correlations`.
    """
    there = [i for i, line in enumerate(correlations) if any(one is not None for j, one in enumerate(line) if i != j)]
    names = [names[i] for i in there]
    correlations = [[correlations[i][j] for j in there] for i in there]
    label = min(LABEL, round(max(map(len, names), default=0) * LETTER) + 12)
    squares = []
    for i in range(1, len(names)):
        for j in range(i):
            value = correlations[i][j]
            value = None if value is None else round(value, 2) + 0.0  # no minus before a zero
            said = "none can be told" if value is None else f"{value:.2f}"
            squares.append(
                Square(
                    x=label + j * CELL,
                    y=(i - 1) * CELL,
                    shade=0.0 if value is None else round(0.06 + 0.46 * abs(value), 3),
                    way="pos" if (value or 0) >= 0 else "neg",
                    value="–" if value is None else f"{value:.2f}".replace("-", "−"),
                    label=f"{names[i]} and {names[j]}: {said}",
                )
            )
    size = max(0, len(names) - 1)
    return Matrix(
        tuple(squares), tuple(names), label + size * CELL + 4, size * CELL + 24 + round(0.65 * label), label=label
    )


@dataclass(frozen=True)
class Interval:
    """The expected share on an axis of its own scale."""

    low: float
    high: float
    at: float
    ticks: tuple[tuple[float, str], ...]


def interval_chart(value: float, low: float, high: float, width: int = 240) -> Interval | None:
    """An interval between 0 and a round share above it; None where it is not known."""
    if any(math.isnan(one) for one in (value, low, high)):
        return None
    end = next(one for one in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if high <= one or one == 1.0)
    place = [round(min(1.0, one / end) * width, 2) for one in (low, high, value)]
    return Interval(place[0], place[1], place[2], ((0.0, "0"), (float(width), percent(end))))
