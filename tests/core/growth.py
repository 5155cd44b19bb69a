"""How work grows with its input, on a machine of any load."""

from __future__ import annotations

import time
from collections.abc import Callable

LINEAR = 8.0
"""Bound on `growth`: linear work gives 4, quadratic work 16."""


def growth(work: Callable[[int], object], size: int, repeats: int = 5) -> float:
    """Processor time of ``work(4 * size)`` over that of ``work(size)``.

    The sizes take turns and the least time of each counts, so other processes slow both alike. Runs are repeated only
    while the growth looks more than linear. A millisecond is added to each time, for the coarseness of the clock.
    """
    small = large = found = float("inf")
    for _ in range(repeats):
        small = min(small, _time(work, size))
        large = min(large, _time(work, 4 * size))
        small = min(small, _time(work, size))
        found = (large + 1e-3) / (small + 1e-3)
        if found < LINEAR:
            break
    return found


def _time(work: Callable[[int], object], size: int) -> float:
    begin = time.process_time()
    work(size)
    return time.process_time() - begin
