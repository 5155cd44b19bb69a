"""A mixture of harmless and harmful rows along one score, fitted to counts on a grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HARMLESS = 2
"""Normal densities that the harmless rows are made of, at most."""

PRIOR_ROWS = 100.0
"""What the known harmful rows count against the file's own in saying where harmful rows stand."""

SINK, SLIM, FAT = 0.5, 0.8, 1.1
"""Where the file's harmful rows may stand against the known ones, in widths of these: how far below, and how much less
or more spread. What stands lower is taken for harmless rows that sound harmful."""

NEAR = 0.75
"""How far harmless rows may gather on the way from the file's middle to the known harmful rows."""

REACH = 1.0
"""How many of their own widths there are, at least, from harmless rows up to the known harmful ones."""

WIDE = 1.5
"""How wide a group of harmless rows may be, in widths of the lower half of the file."""

_STEPS = 200
_CLOSE = 1e-7
_APART = 2.0  # without known rows: standard deviations between the harmful component and the next
_VALLEY = 0.5  # and how deep the density falls between them, against the lower one
_GAIN = 10.0  # in BIC, that a harmful component must bring


@dataclass(frozen=True)
class Mixture:
    """Normal densities on a grid; the last one is that of the harmful rows, where ``harmful``.

    Attributes:
        grid: float64 (places,), ascending.
        shares: float64 (components,), summing to 1.
        means: float64 (components,).
        widths: float64 (components,), standard deviations.
        harmful: Whether there is a harmful component.
        log_likelihood: Of the counts.
        anchored: Whether known harmful rows said where it begins.
    """

    grid: np.ndarray
    shares: np.ndarray
    means: np.ndarray
    widths: np.ndarray
    harmful: bool
    log_likelihood: float
    anchored: bool

    @property
    def share(self) -> float:
        """Of the harmful rows."""
        return float(self.shares[-1]) if self.harmful else 0.0

    def chance(self) -> np.ndarray:
        """float64 (places,), the probability of being harmful at each place of the grid; never falling."""
        if not self.harmful:
            return np.zeros_like(self.grid)
        logs = _logs(self.grid, self.shares, self.means, self.widths)
        top = logs.max(axis=0)
        parts = np.exp(logs - top)
        chance = parts[-1] / parts.sum(axis=0)
        # normal densities of unlike widths cross twice: below the harmless rows' centre nothing is harmful, and above
        # the crossing nothing gets less so
        chance[self.grid <= self.means[0]] = 0.0
        return np.maximum.accumulate(chance)

    def about(self) -> str:
        """In words."""
        if not self.harmful:
            return "no second group of rows stands out"
        where = "anchored at the safety set" if self.anchored else "without known rows"
        return f"a mixture of {len(self.means) - 1} harmless and one harmful component, {where}"


def fit_mixture(
    grid: np.ndarray, counts: np.ndarray, known: np.ndarray | None, *, start: Mixture | None = None
) -> Mixture:
    """Explain counts by harmless and harmful rows.

    Args:
        grid: float64 (places,), ascending and evenly spaced.
        counts: float64 (places,), rows at each.
        known: float64 (n,), scores of known harmful rows; None: there are none, and a component is only taken for
            harmful where it stands apart.
        start: What to start from: another fit, whose number of components is kept.

    Example:
        >>> grid = np.linspace(-5, 15, 200)
        >>> counts = 900 * np.exp(-grid**2 / 2) + 100 * np.exp(-(grid - 10) ** 2 / 2)
        >>> round(fit_mixture(grid, counts, None).share, 3)
        0.1
    """
    total = counts.sum()
    if total == 0:
        return _nothing(grid)
    if start is not None:
        if not start.harmful:
            return start
        return _em(grid, counts, start.shares, start.means, start.widths, known)
    fits = [fit for count in range(1, HARMLESS + 1) if (fit := _started(grid, counts, count, known)) is not None]
    best = min(fits, key=lambda fit: _bic(fit, total)) if fits else None
    if known is not None and best is not None:
        return best
    without = _started(grid, counts, 1, None, harmful=False)
    if best is None or without is None or _bic(best, total) > _bic(without, total) - _GAIN or not _apart(best):
        return _nothing(grid)
    return best


def _nothing(grid: np.ndarray) -> Mixture:
    one = np.ones(1)
    return Mixture(grid, one, np.zeros(1), one, False, 0.0, False)


def _bic(fit: Mixture, total: float) -> float:
    return (3 * len(fit.means) - 1) * np.log(total) - 2 * fit.log_likelihood


def _apart(fit: Mixture) -> bool:
    """Whether the harmful component is above the others, the smaller part, and parted from them by a valley."""
    nearest = int(np.argmax(fit.means[:-1]))
    gap = fit.means[-1] - fit.means[nearest]
    if gap <= _APART * (fit.widths[-1] + fit.widths[nearest]) / 2 or fit.share > 0.5:
        return False
    between = (fit.grid >= fit.means[nearest]) & (fit.grid <= fit.means[-1])
    density = np.exp(_logs(fit.grid[between], fit.shares, fit.means, fit.widths)).sum(axis=0)
    return bool(density.size > 2 and density.min() < _VALLEY * min(density[0], density[-1]))


def _started(
    grid: np.ndarray, counts: np.ndarray, harmless: int, known: np.ndarray | None, harmful: bool = True
) -> Mixture | None:
    """Harmless components at quantiles of the file; the harmful one at the known rows, or at the top."""
    total = counts.sum()
    running = np.cumsum(counts) / total
    mean = float(counts @ grid / total)
    width = max(float(np.sqrt(counts @ (grid - mean) ** 2 / total)), _least(grid))
    # the centre from the rows below the top fifth, which may be harmful
    middle = [float(np.interp(q, running, grid)) for q in np.linspace(0.8, 0.2, harmless + 2)[1:-1]]
    spread = max(float(np.interp(0.5, running, grid) - np.interp(0.16, running, grid)), _least(grid))
    means, widths = list(reversed(middle)), [spread] * harmless
    shares = [1.0 / harmless] * harmless
    if not harmful:
        return _em(grid, counts, np.array(shares), np.array(means), np.array(widths), None, harmful=False)
    if known is not None:
        top, top_width = float(np.mean(known)), max(float(np.std(known)), _least(grid))
        if top <= means[-1]:
            return None  # known rows do not stand out
        least = 0.02
    else:
        top, top_width, least = float(np.interp(0.99, running, grid)), width, 0.05
    return _em(
        grid,
        counts,
        np.array([*(share * (1 - least) for share in shares), least]),
        np.array([*means, top]),
        np.array([*widths, top_width]),
        known,
    )


def _least(grid: np.ndarray) -> float:
    """A density cannot be narrower than what the grid can tell."""
    return 1.5 * float(grid[1] - grid[0])


def _logs(grid: np.ndarray, shares: np.ndarray, means: np.ndarray, widths: np.ndarray) -> np.ndarray:
    z = (grid - means[:, None]) / widths[:, None]
    return np.log(np.maximum(shares, 1e-300))[:, None] - 0.5 * z * z - np.log(widths)[:, None] - 0.9189385332046727


def _em(
    grid: np.ndarray,
    counts: np.ndarray,
    shares: np.ndarray,
    means: np.ndarray,
    widths: np.ndarray,
    known: np.ndarray | None,
    harmful: bool = True,
) -> Mixture:
    """Expectation maximisation; the harmful component has the known rows as a prior."""
    total, least = counts.sum(), _least(grid)
    there = counts > 0
    places, rows = grid[there], counts[there]
    ceiling, widest, mean, spread = np.inf, np.inf, 0.0, 0.0
    if known is not None:
        mean, spread = float(np.mean(known)), float(np.std(known))
        middle = float(np.interp(0.4, np.cumsum(rows) / total, places))
        ceiling = middle + NEAR * max(mean - middle, 0.0)
        # the lower half of the file is harmless, and shows how far harmless rows spread
        widest = WIDE * max(middle - float(np.interp(0.06, np.cumsum(rows) / total, places)), least)
    before = -np.inf
    for _ in range(_STEPS):
        logs = _logs(places, shares, means, widths)
        top = logs.max(axis=0)
        parts = np.exp(logs - top)
        sums = parts.sum(axis=0)
        likelihood = float(rows @ (np.log(sums) + top))
        if likelihood - before < _CLOSE * total and np.isfinite(before):
            break
        before = likelihood
        resp = parts / sums * rows
        mass = resp.sum(axis=1) + 1e-9
        means = resp @ places / mass
        squares = np.array([r @ (places - m) ** 2 for r, m in zip(resp, means, strict=True)])
        if known is not None:
            own = mass[-1]
            means[-1] = (own * means[-1] + PRIOR_ROWS * mean) / (own + PRIOR_ROWS)
            squares[-1] = float(resp[-1] @ (places - means[-1]) ** 2)
            squares[-1] += PRIOR_ROWS * (spread**2 + (means[-1] - mean) ** 2)
            squares[-1] *= mass[-1] / (own + PRIOR_ROWS)
            means[:-1] = np.minimum(means[:-1], ceiling)
            means[-1] = max(means[-1], mean - SINK * spread)
        widths = np.maximum(np.sqrt(squares / mass), least)
        if known is not None:
            # harmless rows that reach beyond the known harmful ones would explain these away
            reach = np.maximum((mean - means[:-1]) / REACH, least)
            widths[:-1] = np.minimum(widths[:-1], reach)
            widths[-1] = np.clip(widths[-1], max(spread * SLIM, least), max(spread * FAT, least))
        widths[: len(widths) - harmful] = np.minimum(widths[: len(widths) - harmful], widest)
        shares = mass / mass.sum()
    if harmful:
        order = np.append(np.argsort(means[:-1], kind="stable"), len(means) - 1)
    else:
        order = np.argsort(means, kind="stable")
    return Mixture(grid, shares[order], means[order], widths[order], harmful, before, known is not None)
