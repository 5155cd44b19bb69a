r"""What the signals of a model add to a probability: by what known rows have of them.

Signals whose values mean the same in every file (`safe_sched.audit.signals.absolute`) are not measured against one.
Known harmful rows, and harmless ones that sound like them, say what a value is worth, by a logistic regression between
the two in which both sides weigh the same:

    L(x) = sum_k a_k (x_k - m_k) / d_k + b,  a_k >= 0        logit p = logit p_file + L

m is half way between the two kinds and d their spread, so a value that is missing says nothing.

*Nobody is surer than known rows allow.* n rows cannot show that something happens less often than about once in 2n, so
|L| <= log 2n, with n of the rarer kind. The model has seen more of a row than the words of its prompt, and so the last
word: what it is added to is held within `YIELDS` of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

YIELDS = 0.9
"""How far the log-odds that a model's signals are added to may go, against these."""


@dataclass(frozen=True)
class Contrast:
    """Log-odds from known rows.

    Attributes:
        names: The signals.
        middle: float64 (signals,), half way between harmful and harmless rows.
        spread: float64 (signals,).
        slopes: float64 (signals,), >= 0; 0 where known harmful rows have less of the signal.
        offset: Log-odds half way.
        cap: The most that is said, in nats.
    """

    names: tuple[str, ...]
    middle: np.ndarray
    spread: np.ndarray
    slopes: np.ndarray
    offset: float
    cap: float

    @staticmethod
    def of(harmful: Mapping[str, np.ndarray], harmless: Mapping[str, np.ndarray]) -> Contrast | None:
        """Learn from known rows; None where there is nothing to tell them apart by.

        Args:
            harmful: float (n,) by signal.
            harmless: float (m,) by signal.
        """
        names = tuple(name for name in harmful if name in harmless)
        if not names:
            return None
        sizes = [min(side[name].size for name in names) for side in (harmful, harmless)]
        both = zip((harmful, harmless), sizes, strict=True)
        sides = [np.array([side[name][:size] for name in names], float).T for side, size in both]
        one, none = (side[~np.isnan(side).any(axis=1)] for side in sides)
        if min(len(one), len(none)) < 2:
            return None
        middle = (one.mean(axis=0) + none.mean(axis=0)) / 2
        spread = np.sqrt((one.var(axis=0) + none.var(axis=0)) / 2) + 1e-9
        slopes, offset = _logistic((one - middle) / spread, (none - middle) / spread)
        if not slopes.any():
            return None
        return Contrast(names, middle, spread, slopes, offset, float(np.log(2 * min(len(one), len(none)))))

    @property
    def used(self) -> tuple[str, ...]:
        """The signals that count."""
        return tuple(name for name, slope in zip(self.names, self.slopes, strict=True) if slope > 0)

    def strongest(self, values: Mapping[str, np.ndarray], place: int) -> str:
        """The signal that speaks most for harm in one of some rows."""
        z = (np.array([values[name][place] for name in self.names], float) - self.middle) / self.spread
        return self.names[int(np.argmax(np.nan_to_num(z * self.slopes, nan=-np.inf)))]

    def log_odds(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """L of some rows, float64 (rows,): nan where none of the signals says anything."""
        x = np.array([values[name] for name in self.names], float).T
        missing = np.isnan(x)
        z = np.where(missing, 0.0, (x - self.middle) / self.spread)
        found = np.clip(z @ self.slopes + self.offset, -self.cap, self.cap)
        return np.where(missing.all(axis=1), np.nan, found)

    def added(self, p: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
        """Probabilities with what `log_odds` gave; as they were where that is nan.

        Example:
            >>> import numpy as np
            >>> one = Contrast(("x",), np.zeros(1), np.ones(1), np.ones(1), 0.0, 4.0)
            >>> one.added(np.array([0.5, 0.5, 0.3]), np.array([0.0, 2.0, np.nan])).round(2)
            array([0.5 , 0.88, 0.3 ])
        """
        most = YIELDS * self.cap
        with np.errstate(divide="ignore"):
            before = np.clip(np.log(p) - np.log1p(-p), -most, most)
        after = 1 / (1 + np.exp(-(before + log_odds)))
        return np.where(np.isnan(log_odds), p, after)


def _logistic(one: np.ndarray, none: np.ndarray) -> tuple[np.ndarray, float]:
    """Slopes and offset; a signal that would count backwards is left out."""
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate([one, none])
    y = np.concatenate([np.ones(len(one)), np.zeros(len(none))])
    slopes = np.zeros(x.shape[1])
    used: Sequence[int] = range(x.shape[1])
    while len(used):
        model = LogisticRegression(C=1.0, class_weight="balanced").fit(x[:, list(used)], y)
        found = np.asarray(model.coef_)[0]
        if (found > 0).all():
            slopes[list(used)] = found
            return slopes, float(np.asarray(model.intercept_)[0])
        used = [place for place, slope in zip(used, found, strict=True) if slope > 0]
    return slopes, 0.0
