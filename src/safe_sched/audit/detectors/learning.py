r"""Learning to tell what is asked, from positives, harmless prompts, and a file of which nothing is known.

Two logistic regressions. The second is fitted once, to positives and known harmless prompts: it has not seen the file,
so rows of the file get from it what known rows of their kind get. The first is fitted to the file, in rounds:

    q_i = 0                                                       first, the whole file counts as harmless
    f   = fit( positives + q x file  against  benign + (1 - q) x file )
    q_i = pi e^a / (pi e^a + kappa e^(a - b) + 1 - pi - kappa),   a = slope f(x_i) + offset, b: of the second

so harmful rows stop counting as harmless ones, and teach what harmful rows of this file are like. pi and kappa, the
shares of harmful rows and of harmless ones that sound like them, are those that explain the file best. The first rounds
only take rows away from the harmless side.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safe_sched.audit.detectors.ngrams import GRAMS, Grams, weight_of, words_of

FOLDS = 4
ROUNDS = (0.0, 0.5, 0.5, 0.5, 0.5, 0.5)
"""How much a row that is likely harmful counts as a positive, by round."""

_OWN = 0.6  # of the positives' weight, for the package's own prompts beside a set that was given
_BENIGN = 0.35  # of the harmless side's weight, for prompts that are known to be harmless
_STRENGTH = (1.0, 0.3)  # of the fit: first round, and second classifier; later rounds; smaller is smoother
_FIRST_TEXT = 0.5  # words count less than the lexicon there: few texts, or harmful rows among the harmless ones
_SHARE = (0.005, 0.3)  # of harmful rows, and of those that sound like them, at least and at most, while learning
_LEAST = 0.1  # q below which a row is no positive
_STEEPEST = 4.0
_RIDGE = 1e-3  # that holds the slope of a logistic curve near 1
_LOW = 0.02  # of the file, that stands below a row without words


@dataclass(frozen=True)
class Learnt:
    """Both classifiers, as log-odds.

    Attributes:
        weights: float64 (FOLDS, GRAMS + AREAS, 2), against the file's ordinary prompts, and against harmless ones that
            sound like positives.
        offsets: float64 (FOLDS, 2).
        mixed: Of the file's harmless prompts, the share of those that sound like positives.
        known: float32 (own,), values of the package's own prompts, each by a fit that has not seen it.
        harmless: float32 (benign,), values of the known harmless prompts, likewise.
        low: The low end of the file.
    """

    weights: np.ndarray
    offsets: np.ndarray
    mixed: float
    known: np.ndarray
    harmless: np.ndarray
    low: float

    def logits(self, fold: int, places: np.ndarray, areas: np.ndarray) -> np.ndarray:
        """float64 (2,), what both say of one text, from `Grams.indices`; `together` makes one value of it."""
        weights = self.weights[fold]
        hashed = np.add.reduce(weights.take(places, axis=0), axis=0) * weight_of(places.size)
        return hashed + areas @ weights[GRAMS:] + self.offsets[fold]


@dataclass(frozen=True)
class Explained:
    """What the rows of a file are, as far as both classifiers say.

    Attributes:
        harmful: float64 (rows,), how likely each is harmful.
        ordinary: float64 (rows,), and how likely it is one of the file's ordinary rows; the rest sounds harmful.
        mixed: Of the harmless rows, the share of those that sound harmful.
        slope, offset: Of the first classifier's log-odds.
    """

    harmful: np.ndarray
    ordinary: np.ndarray
    mixed: float
    slope: float = 1.0
    offset: float = 0.0


def fold_of(words: Sequence[str]) -> int:
    """The fold that a text belongs to."""
    return zlib.crc32(" ".join(words).encode("utf-8", "replace")) % FOLDS


def together(one: Any, other: Any, mixed: float) -> Any:
    """Log-odds against both sorts of harmless rows, of which ``mixed`` is the share of the second.

    Example:
        >>> [round(float(together(9.0, -2.0, mixed)), 2) for mixed in (0.5, 0.0)]
        [-1.31, 9.0]
    """
    return -np.logaddexp(np.log1p(-mixed) - one, (np.log(mixed) if mixed > 0 else -np.inf) - other)


def learn(grams: Grams, positives: Sequence[str], own: int, benign: Sequence[str], texts: Sequence[str]) -> Learnt:
    """Fit both classifiers.

    Args:
        grams: Turns texts into vectors.
        positives: Prompts that are to be refused, the package's own first.
        own: How many these are.
        benign: Known harmless prompts.
        texts: Prompts of the file.
    """
    from scipy.sparse import diags, vstack

    groups = [positives, benign, texts]
    fold = np.array([fold_of(words_of(text)) for group in groups for text in group], int)
    matrix: Any = vstack([grams.matrix(group) for group in groups], format="csr")
    less = np.where(np.arange(matrix.shape[1]) < GRAMS, _FIRST_TEXT, 1.0)
    small: Any = (matrix @ diags(less)).tocsr()
    at, end = len(positives), len(positives) + len(benign)
    base = np.full(at, 1 / own if own == at else _OWN / own)
    base[own:] = (1 - _OWN) / max(at - own, 1)
    weights, offsets = np.zeros((2, FOLDS, matrix.shape[1])), np.zeros((2, FOLDS))
    values = np.zeros((2, matrix.shape[0]))

    def fit(which: int, x: Any, harmless: np.ndarray, harmful: np.ndarray, pull: float, strength: float) -> None:
        for k in range(FOLDS):
            mine = fold == k
            weights[which, k], offsets[which, k] = _fit(
                x, ~mine, base, harmless, harmful, pull, (own, at, end), strength
            )
            values[which, mine] = x[mine] @ weights[which, k] + offsets[which, k]

    def scale(which: int, slope: float, offset: float) -> None:
        weights[which] *= slope
        offsets[which] = slope * offsets[which] + offset
        values[which] = slope * values[which] + offset

    nobody = np.zeros(len(texts))
    fit(1, small, nobody, nobody, 0.0, _STRENGTH[0])
    weights[1] *= less
    scale(1, *_platt(values[1, :own], values[1, at:end], np.ones(len(benign))))
    found = Explained(nobody, 1 - nobody, 0.0)
    for number, pull in enumerate(ROUNDS):
        fit(0, matrix if number else small, 1 - found.harmful, found.harmful, pull, _STRENGTH[number > 0])
        found = explain(values[0, :own], values[:, end:], found if number else None)
    scale(0, found.slope, found.offset)
    every = together(values[0], values[1], found.mixed)
    known, harmless, file = (part.astype(np.float32) for part in np.split(every, [at, end]))
    low = float(np.quantile(file if file.size else harmless, _LOW))
    paired = np.ascontiguousarray(weights.transpose(1, 2, 0))  # a text's places bring both numbers at once
    return Learnt(paired, offsets.T.copy(), found.mixed, known[:own], harmless, low)


def _fit(
    matrix: Any,
    used: np.ndarray,
    base: np.ndarray,
    harmless: np.ndarray,
    harmful: np.ndarray,
    pull: float,
    split: tuple[int, int, int],
    strength: float,
) -> tuple[np.ndarray, float]:
    """One logistic regression in which both sides weigh the same."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    own, at, end = split
    likely = used[end:] & (harmful > _LEAST)
    positive = np.where(used[:at], base, 0.0)
    taught = harmful[likely].sum()
    some = used[:own].sum()  # not all: how much the file teaches does not depend on the size of a safety set
    share = some / (some + pull * taught)  # of the positives' weight, for known ones
    benign, file = used[at:end].astype(float), np.where(used[end:], harmless, 0.0)
    known = _BENIGN if file.sum() > 0 else 1.0
    weight = np.concatenate(
        [
            share * positive / positive.sum(),
            known * benign / benign.sum(),
            (1 - known) * file / (file.sum() or 1.0),
            (1 - share) * harmful[likely] / (taught or 1.0),
        ]
    )
    x: Any = vstack([matrix, matrix[end:][likely]], format="csr")
    y = np.concatenate([np.ones(at), np.zeros(used.size - at), np.ones(np.count_nonzero(likely))])
    there = weight > 0
    model: Any = LogisticRegression(C=strength, solver="liblinear", dual=True, tol=1e-2, max_iter=300, random_state=0)
    model.fit(x[there], y[there], sample_weight=weight[there] * np.count_nonzero(there) / 2)
    return model.coef_[0], float(model.intercept_[0])


def explain(known: np.ndarray, values: np.ndarray, before: Explained | None) -> Explained:
    """What the rows of a file are.

    Args:
        known: float64 (own,), what the first classifier says of positives.
        values: float64 (2, rows), what both say of the file; the second in log-odds.
        before: Of the round before; None: there was none, and the lower half of the file says what is ordinary.
    """
    from scipy.special import softmax

    one, other = values
    if one.size == 0:
        return Explained(one, one, 0.0)
    if before is None:
        middle = np.median(one)
        half = one[one <= middle]
        slope, offset = _platt(known, np.concatenate([half, 2 * middle - half]), np.ones(2 * half.size))
    else:
        slope, offset = _platt(known, one, before.ordinary)
    slope = min(slope, _STEEPEST)
    logit = slope * one + offset
    odds = np.stack([np.zeros(one.size), logit, logit - other])  # ordinary, harmful, sounds so: against ordinary
    shares, parts = np.array([0.9, 0.05, 0.05]), odds
    for _ in range(50):
        parts = softmax(np.log(shares)[:, None] + odds, axis=0)
        shares[1:] = np.clip(parts[1:].mean(axis=1), *_SHARE)
        shares[0] = 1 - shares[1:].sum()
    return Explained(parts[1], parts[0], float(shares[2] / (shares[0] + shares[2])), slope, offset)


def _platt(positive: np.ndarray, negative: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Slope and offset of a logistic curve between two kinds of values that weigh the same; slopes are held near 1.

    scikit-learn's own, `CalibratedClassifierCV`, takes no such prior: where the two kinds do not overlap it decides.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    x = np.concatenate([positive, negative])
    y = np.concatenate([np.ones(positive.size), np.zeros(negative.size)])
    w = np.concatenate([np.full(positive.size, 1 / positive.size), weight / weight.sum()]) / 2

    def loss(curve: np.ndarray) -> tuple[float, np.ndarray]:
        slope, offset = curve
        logit = slope * x + offset
        off = w * (expit(logit) - y)
        value = w @ (np.logaddexp(0, logit) - y * logit) + _RIDGE / 2 * (slope - 1) ** 2
        return value, np.array([off @ x + _RIDGE * (slope - 1), off.sum()])

    slope, offset = minimize(loss, (1.0, 0.0), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return max(float(slope), 0.1), float(offset)
