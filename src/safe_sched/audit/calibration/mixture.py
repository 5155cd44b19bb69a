"""A mixture of harmless and harmful rows along one score, fitted to counts on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDINARY = 2
"""Normal densities that the file's ordinary rows are made of, at most."""

PRIOR_ROWS, PRIOR_HARMLESS = 30.0, 100.0
"""What known rows count against the file's own in saying where rows of their kind stand."""

SINK = 0.5
"""How far the file's harmful rows may stand below the known ones, and its harmless ones that sound harmful above those
that are known: in widths of these."""

SLIM, FAT = 0.8, 1.2
"""How much less or more spread the file's rows of a kind may have than the known ones."""

NEAR = 0.75
"""Without known harmless rows: how far harmless rows may gather on the way from the file's middle to the known harmful
ones."""

REACH = 1.0
"""How many of their own widths there are, at least, from harmless rows up to the known harmful ones."""

WIDE = 1.5
"""How wide a group of the file's ordinary rows may be, in widths of the lower half of the file."""

_STEPS = 200
_CLOSE = 1e-7
_APART = 2.0  # without known rows: standard deviations between the harmful component and the next
_VALLEY = 0.5  # and how deep the density falls between them, against the lower one
_GAIN = 10.0  # in BIC, that a harmful component must bring


@dataclass(frozen=True)
class TwoGroupMixture:
    """Normal densities on a grid; the last one is that of the harmful rows, where ``harmful``.

    Attributes:
        grid: float64 (places,), ascending.
        shares: float64 (components,), summing to 1.
        means: float64 (components,).
        widths: float64 (components,), standard deviations.
        harmful: Whether there is a harmful component.
        log_likelihood: Of the counts.
        anchored: How many of the last components stand where known rows do: none, the harmful one, or also that of
            harmless rows that sound harmful.
    """

    grid: np.ndarray
    shares: np.ndarray
    means: np.ndarray
    widths: np.ndarray
    harmful: bool
    log_likelihood: float
    anchored: int

    @property
    def share(self) -> float:
        """Of the harmful rows."""
        return float(self.shares[-1]) if self.harmful else 0.0

    def chance(self) -> np.ndarray:
        """float64 (places,), the probability of being harmful at each place of the grid; never falling."""
        if not self.harmful:
            return np.zeros_like(self.grid)
        from scipy.special import softmax

        chance = softmax(_logs(self.grid, self.shares, self.means, self.widths), axis=0)[-1]
        # normal densities of unlike widths cross twice: below the harmless rows' centre nothing is harmful, and above
        # the crossing nothing gets less so
        chance[self.grid <= self.means[0]] = 0.0
        return np.maximum.accumulate(chance)

    def about(self) -> str:
        """In words."""
        if not self.harmful:
            return "no second group of rows stands out"
        if not self.anchored:
            return f"{len(self.means) - 1} harmless and one harmful component, without known rows"
        ordinary = len(self.means) - self.anchored
        return (
            f"{ordinary} component{'s' * (ordinary != 1)} of ordinary rows, "
            f"{'one of harmless rows that sound harmful, ' * (self.anchored - 1)}and one of harmful rows, anchored at "
            "the safety set"
        )


def fit_mixture(
    grid: np.ndarray,
    counts: np.ndarray,
    known: np.ndarray | None,
    harmless: np.ndarray | None = None,
    *,
    start: TwoGroupMixture | None = None,
) -> TwoGroupMixture:
    """Explain counts by harmless and harmful rows.

    Args:
        grid: float64 (places,), ascending and evenly spaced.
        counts: float64 (places,), rows at each.
        known: float64 (n,), scores of known harmful rows; None: there are none, and a component is only taken for
            harmful where it stands apart.
        harmless: float64 (m,), scores of harmless rows that sound harmful; None: there are none. They only count beside
            known harmful ones.
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
        return _em(grid, counts, start.shares, start.means, start.widths, _anchors(known, harmless))
    anchors = _anchors(known, harmless)
    fits = [fit for count in range(1, ORDINARY + 1) if (fit := _started(grid, counts, count, anchors)) is not None]
    best = min(fits, key=lambda fit: _bic(fit, total)) if fits else None
    if known is not None and best is not None:
        return best
    without = _started(grid, counts, 1, (), harmful=False)
    if best is None or without is None or _bic(best, total) > _bic(without, total) - _GAIN or not _apart(best):
        return _nothing(grid)
    return best


@dataclass(frozen=True)
class _Anchor:
    """Where known rows of a kind stand."""

    mean: float
    spread: float


def _anchors(known: np.ndarray | None, harmless: np.ndarray | None) -> tuple[_Anchor, ...]:
    """Of the last components: harmless rows that sound harmful, if known, and harmful ones."""
    if known is None:
        return ()
    found = [_Anchor(float(np.mean(x)), float(np.std(x))) for x in (harmless, known) if x is not None and x.size]
    # harmless rows that do not stand lower say nothing of where the border is
    return tuple(found[-1:] if len(found) == 2 and found[0].mean >= found[1].mean else found)


def _nothing(grid: np.ndarray) -> TwoGroupMixture:
    one = np.ones(1)
    return TwoGroupMixture(grid, one, np.zeros(1), one, False, 0.0, 0)


def _bic(fit: TwoGroupMixture, total: float) -> float:
    return (3 * len(fit.means) - 1) * np.log(total) - 2 * fit.log_likelihood


def _apart(fit: TwoGroupMixture) -> bool:
    """Whether the harmful component is above the others, the smaller part, and parted from them by a valley."""
    nearest = int(np.argmax(fit.means[:-1]))
    gap = fit.means[-1] - fit.means[nearest]
    if gap <= _APART * (fit.widths[-1] + fit.widths[nearest]) / 2 or fit.share > 0.5:
        return False
    between = (fit.grid >= fit.means[nearest]) & (fit.grid <= fit.means[-1])
    density = np.exp(_logs(fit.grid[between], fit.shares, fit.means, fit.widths)).sum(axis=0)
    return bool(density.size > 2 and density.min() < _VALLEY * min(density[0], density[-1]))


def _started(
    grid: np.ndarray, counts: np.ndarray, ordinary: int, anchors: Sequence[_Anchor], harmful: bool = True
) -> TwoGroupMixture | None:
    """Ordinary components at quantiles of the file; the others at the known rows, or at the top."""
    total = counts.sum()
    running = np.cumsum(counts) / total
    mean = float(counts @ grid / total)
    width = max(float(np.sqrt(counts @ (grid - mean) ** 2 / total)), _least(grid))
    # the centre from the rows below the top fifth, which may be harmful
    middle = [float(np.interp(q, running, grid)) for q in np.linspace(0.8, 0.2, ordinary + 2)[1:-1]]
    spread = max(float(np.interp(0.5, running, grid) - np.interp(0.16, running, grid)), _least(grid))
    means, widths = list(reversed(middle)), [spread] * ordinary
    if not harmful:
        more, least = [], 0.0
    elif anchors:
        if anchors[-1].mean <= means[-1]:
            return None  # known rows do not stand out
        more, least = [(one.mean, one.spread) for one in anchors], 0.02
    else:
        more, least = [(float(np.interp(0.99, running, grid)), width)], 0.05
    shares = [(1 - least * len(more)) / ordinary] * ordinary + [least] * len(more)
    means += [one for one, _ in more]
    widths += [max(one, _least(grid)) for _, one in more]
    return _em(grid, counts, np.array(shares), np.array(means), np.array(widths), anchors, harmful)


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
    anchors: Sequence[_Anchor],
    harmful: bool = True,
) -> TwoGroupMixture:
    """Expectation maximisation; the last components have known rows as a prior."""
    total, least = counts.sum(), _least(grid)
    there = counts > 0
    places, rows = grid[there], counts[there]
    free = len(means) - max(len(anchors), harmful)  # components of ordinary rows
    ceiling, widest, top = np.inf, np.inf, np.inf
    if anchors:
        top = anchors[-1].mean
        middle = float(np.interp(0.4, np.cumsum(rows) / total, places))
        # no ordinary row is more suspicious than those that were chosen to sound harmful
        ceiling = middle + max((NEAR * (top - middle)) if len(anchors) == 1 else anchors[0].mean - middle, 0.0)
        # the lower half of the file is harmless, and shows how far harmless rows spread
        widest = WIDE * max(middle - float(np.interp(0.06, np.cumsum(rows) / total, places)), least)
    before = -np.inf
    for _ in range(_STEPS):
        logs = _logs(places, shares, means, widths)
        sums = np.logaddexp.reduce(logs, axis=0)
        likelihood = float(rows @ sums)
        if likelihood - before < _CLOSE * total and np.isfinite(before):
            break
        before = likelihood
        resp = np.exp(logs - sums) * rows
        mass = resp.sum(axis=1) + 1e-9
        means = resp @ places / mass
        means[:free] = np.minimum(means[:free], ceiling)
        prior = np.zeros(len(means))
        for number, known in enumerate(anchors, free):
            last, reach = number == len(means) - 1, SINK * known.spread
            prior[number] = PRIOR_ROWS if last else PRIOR_HARMLESS
            means[number] = (mass[number] * means[number] + prior[number] * known.mean) / (mass[number] + prior[number])
            means[number] = max(means[number], known.mean - reach) if last else min(means[number], known.mean + reach)
        squares = np.array([r @ (places - m) ** 2 for r, m in zip(resp, means, strict=True)])
        for number, known in enumerate(anchors, free):
            squares[number] += prior[number] * (known.spread**2 + (means[number] - known.mean) ** 2)
        widths = np.maximum(np.sqrt(squares / (mass + prior)), least)
        for number, known in enumerate(anchors, free):
            widths[number] = np.clip(widths[number], max(known.spread * SLIM, least), max(known.spread * FAT, least))
        # ordinary rows that reach beyond the known harmful ones would explain these away
        narrow = np.minimum(np.maximum((top - means[:free]) / REACH, least), widest)
        widths[:free] = np.minimum(widths[:free], narrow)
        shares = mass / mass.sum()
    order = np.append(np.argsort(means[:free], kind="stable"), np.arange(free, len(means)))
    return TwoGroupMixture(grid, shares[order], means[order], widths[order], harmful, before, len(anchors))
