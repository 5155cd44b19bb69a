r"""From signals to a probability: how likely is each row harmful, and how sure is that?

The harm signals are put on one scale and added up to a score s, which a mixture explains:

    h(s) = (1 - pi) f_0(s) + pi f_1(s),     p(s) = pi f_1(s) / h(s)

f_0, the harmless rows, is a mixture of this file's ordinary rows, up to two normal densities, and of harmless rows that
sound harmful, one that starts at the scores of *known* ones. f_1, the harmful rows, is a normal density that starts at
the scores of known harmful rows. Both may move some way from there, since the file's rows are other rows. So a hump
where known harmless rows stand is explained by harmless rows. p is made monotone: a more suspicious row is never less
likely harmful. Intervals come from the bootstrap: what p would have been with other rows of the same kind, and with
known rows that stand a little elsewhere. They do not cover harmful rows that no signal sees.

What a model says is added to the log-odds of p afterwards (`safe_sched.audit.calibration.contrast`).

Where labels are given, p is the isotonic regression of the labels on s, to which all signals are added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from safe_sched.audit.calibration.contrast import Contrast
from safe_sched.audit.calibration.mixture import TwoGroupMixture, fit_mixture
from safe_sched.errors import DataError

GRID = 400
"""Places on the scale of scores at which densities are known."""

BOOTSTRAPS = 60
LEVEL, SHARE_LEVEL = 0.9, 0.95
"""Of a row's interval, and of the expected share's."""

LABELS = 20
"""Labelled rows that isotonic regression takes, at least, and both kinds among them."""

_SHIFT = 0.3  # of the known rows' spread: how unsure it is that the file's harmful rows are where these are
_ROUNDS = 6  # of finding out what each signal is worth
_WIDEST = 12.0  # a signal's value counts up to this many standard deviations, or up to what known rows have
_FARTHEST = 100.0
_RIDGE = 0.1


@dataclass(frozen=True)
class Scale:
    """What a signal's values are counted in: (value - centre) / width, at most ``widest``."""

    centre: float
    width: float
    widest: float = _WIDEST

    @staticmethod
    def of(values: np.ndarray, *known: np.ndarray) -> Scale:
        """That of most rows: median, and median absolute deviation; as wide as to hold known rows."""
        values = values[~np.isnan(values)]
        if values.size == 0:
            return Scale(0.0, 1.0)
        centre = float(np.median(values))
        spread = 1.4826 * float(np.median(np.abs(values - centre)))
        width = spread if spread > 1e-9 else float(values.std()) or 1.0
        far = [float(np.quantile(np.abs(one - centre), 0.99)) / width for one in known if one.size]
        return Scale(centre, width, min(max([_WIDEST, *far]), _FARTHEST))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """0 where there is no value: it says nothing for or against."""
        return np.nan_to_num(np.clip((values - self.centre) / self.width, -self.widest, self.widest), nan=0.0)


@dataclass(frozen=True)
class FileCalibration:
    """How scores become probabilities.

    Attributes:
        scales: Of every harm signal.
        weights: What each counts in the score, >= 0.
        grid: float64 (GRID,), scores.
        curve: float64 (GRID,), the probability at each.
        curves: float64 (BOOTSTRAPS, GRID), what it would have been with other rows.
        about: How it came about, in words.
        contrast: What the signals that are not in the score add to a probability; None: nothing.
    """

    scales: Mapping[str, Scale]
    weights: Mapping[str, float]
    grid: np.ndarray
    curve: np.ndarray
    curves: np.ndarray
    about: str
    contrast: Contrast | None = None

    def score(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The combined score of some rows, float64 (rows,)."""
        parts = [weight * self.scales[name](values[name]) for name, weight in self.weights.items()]
        return np.sum(parts, axis=0)

    def added(self, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """What the signals that are not in the score add to the log-odds of some rows, float64 (rows,)."""
        return None if self.contrast is None else self.contrast.log_odds(values)

    def chances(self, score: np.ndarray, added: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability, and the ends of its interval, of rows with these scores, and with what `added` gave for them."""
        low, high = np.quantile(self.curves, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        mid, low, high = (self._at(score, curve, added) for curve in (self.curve, low, high))
        return mid, np.minimum(low, mid), np.maximum(high, mid)

    def sums(self, score: np.ndarray, added: np.ndarray | None = None) -> np.ndarray:
        """Expected harmful rows among these, under the curve and under each of `curves`: float64 (1 + BOOTSTRAPS,)."""
        whole = self._at(score, self.curve, added).sum()
        if self.contrast is None or added is None:
            return np.concatenate([[whole], self.curves @ _binned(score, self.grid)])
        return np.array([whole, *(self._at(score, curve, added).sum() for curve in self.curves)])

    def _at(self, score: np.ndarray, curve: np.ndarray, added: np.ndarray | None) -> np.ndarray:
        p = np.interp(score, self.grid, curve)
        return p if self.contrast is None or added is None else self.contrast.added(p, added)


def calibrate(
    values: Mapping[str, np.ndarray],
    known: Mapping[str, np.ndarray],
    harmless: Mapping[str, np.ndarray] | None = None,
    *,
    absolute: Iterable[str] = (),
    labels: np.ndarray | None = None,
    seed: int = 0,
) -> FileCalibration:
    """Fit to the harm signals of a file.

    Args:
        values: float (rows,) by signal: larger is more suspicious, nan where it has nothing to say.
        known: float (n,) by signal, where it is known: the values of rows that are harmful for sure.
        harmless: float (m,) by signal, where it is known: the values of harmless rows that sound harmful.
        absolute: Signals whose values mean the same in every file (`safe_sched.audit.calibration.contrast`).
        labels: float (rows,): 1 harmful, 0 not, nan unknown; None: none.
        seed: Of the bootstrap.

    Raises:
        DataError: There are labels, but too few.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> bad = rng.normal(8, 1, 50)
        >>> fitted = calibrate({"text": np.concatenate([rng.normal(0, 1, 950), bad])}, {"text": rng.normal(8, 1, 100)})
        >>> p, low, high = fitted.chances(fitted.score({"text": np.array([0.0, 8.0])}))
        >>> p.round(2)
        array([0., 1.])
    """
    rng = np.random.default_rng(seed)
    known_rows = labels is not None and ~np.isnan(labels)
    labelled = labels is not None and bool(np.any(known_rows))
    named_apart = set(absolute)
    contrast, told, apart = None, "", [name for name in values if name in named_apart]
    if len(apart) < len(values) and not labelled:  # with labels, or with nothing beside them, they are in the score
        sides = [{name: one[name] for name in apart if name in one} for one in (known, harmless or {})]
        contrast = Contrast.of(*sides)
        told = _told(apart, () if contrast is None else contrast.used)
        values, known, harmless = (
            {name: value for name, value in one.items() if name not in apart} for one in (values, known, harmless or {})
        )
    both = known, harmless or {}
    scales = {name: Scale.of(value, *(one[name] for one in both if name in one)) for name, value in values.items()}
    z = np.array([scales[name](value) for name, value in values.items()]).reshape(len(values), -1)
    anchors, others = (
        {row: scales[name](some[name]) for row, name in enumerate(values) if name in some} for some in both
    )
    weights = _start(len(values), anchors)
    score = weights @ z
    mixture, grid, counts, ends = _mixture(score, weights, anchors, others)
    for _ in range(_ROUNDS):
        if len(values) == 1 or mixture.share * score.size < 3:
            break
        weights = _worth(z, np.interp(score, grid, mixture.chance()), anchors)
        score = weights @ z
        mixture, grid, counts, ends = _mixture(score, weights, anchors, others)
    named = dict(zip(values, map(float, weights), strict=True))
    if labels is not None and labelled:
        curve, curves = _isotonic(score[known_rows], labels[known_rows], grid, rng)
        about = f"isotonic regression on {np.count_nonzero(known_rows)} labelled rows"
        return FileCalibration(scales, named, grid, curve, curves, about)
    curves = np.empty((BOOTSTRAPS, GRID))
    for number in range(BOOTSTRAPS):
        drawn = rng.multinomial(int(counts.sum()), counts / counts.sum()).astype(float) if counts.sum() else counts
        moved = [moved_rows(end, rng) for end in ends]
        curves[number] = fit_mixture(grid, drawn, *moved, start=mixture).chance()
    return FileCalibration(scales, named, grid, mixture.chance(), curves, mixture.about() + told, contrast)


def _told(apart: Iterable[str], used: Iterable[str]) -> str:
    """What became of the signals that are not in the score, in words."""
    left = [name for name in apart if name not in used]
    with_them = f"; then {' and '.join(used)}, by what known rows have of them" if used else ""
    return with_them + (f"; without {' and '.join(left)}: known rows are not told apart by it" if left else "")


def moved_rows(known: np.ndarray | None, rng: np.random.Generator) -> np.ndarray | None:
    """Known rows as they might as well be."""
    return None if known is None else rng.choice(known, known.size) + _SHIFT * known.std() * rng.normal()


def _start(count: int, anchors: Mapping[int, np.ndarray]) -> np.ndarray:
    """Until more is known: signals with known rows by how far these stand out; without any, all alike."""
    if not anchors:
        return np.full(count, 1 / max(count, 1))
    weights = np.zeros(count)
    for row, z in anchors.items():
        weights[row] = max(np.median(z), 0.0) / (1 + z.var())
    return weights / (weights.sum() or 1.0)


def _worth(z: np.ndarray, chance: np.ndarray, anchors: Mapping[int, np.ndarray]) -> np.ndarray:
    """Fisher's discriminant between rows that are likely harmful and the others; no signal counts backwards."""
    one, none = chance / chance.sum(), (1 - chance) / (1 - chance).sum()
    gap = z @ one - z @ none
    both = [(z - (z @ w)[:, None]) * np.sqrt(w) for w in (one, none)]
    spread = (both[0] @ both[0].T + both[1] @ both[1].T) / 2
    weights = np.maximum(np.linalg.solve(spread + _RIDGE * np.eye(len(z)), gap), 0.0)
    return weights / weights.sum() if weights.sum() > 0 else _start(len(z), anchors)


def _mixture(
    score: np.ndarray, weights: np.ndarray, harmful: Mapping[int, np.ndarray], harmless: Mapping[int, np.ndarray]
) -> tuple[TwoGroupMixture, np.ndarray, np.ndarray, tuple[np.ndarray | None, np.ndarray | None]]:
    """The mixture on a grid, and where known rows stand on it, harmful and harmless ones."""
    known = _known(weights, harmful), _known(weights, harmless)
    ends = np.concatenate([score, *(one for one in known if one is not None)])
    low, high = (ends.min(), ends.max()) if ends.size else (0.0, 1.0)
    margin = 0.02 * (high - low) + 1e-6
    grid = np.linspace(low - margin, high + margin, GRID)
    counts = _binned(score, grid)
    return fit_mixture(grid, counts, *known), grid, counts, known


def _known(weights: np.ndarray, values: Mapping[int, np.ndarray]) -> np.ndarray | None:
    """Scores of known rows, where the signals that know them make up the score."""
    part = sum(weights[row] for row in values)
    if not values or part <= 0.5:
        return None
    size = min(z.size for z in values.values())
    return np.sum([weights[row] * z[:size] for row, z in values.items()], axis=0) / part


def _binned(score: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """How many scores are nearest to each place of the grid."""
    step = grid[1] - grid[0]
    places = np.clip(np.rint((score - grid[0]) / step).astype(int), 0, grid.size - 1)
    return np.bincount(places, minlength=grid.size).astype(float)


def _isotonic(
    score: np.ndarray, labels: np.ndarray, grid: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.isotonic import IsotonicRegression

    bad = int(labels.sum())
    if labels.size < LABELS or bad in (0, labels.size):
        raise DataError(
            f"{labels.size} rows have a label, {bad} of them harmful; needed: at least {LABELS}, of both kinds. Label "
            "more rows, or leave the labels out"
        )

    def fit(which: np.ndarray) -> np.ndarray:
        model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        return model.fit(score[which], labels[which]).predict(grid)

    every = np.arange(labels.size)
    return fit(every), np.array([fit(rng.choice(every, every.size)) for _ in range(BOOTSTRAPS)])
