"""The evidence term of BDS: what a row's loss says once it is compared with a model that does not care for safety.

In the posterior of the row logits (arXiv 2510.27172) a row enters with ``w_i * (nll_i(aware) - nll_i(agnostic))``. That
difference is the *score* of a row: positive where staying safe makes the row harder to learn. Three estimators give it:

``probe``       the model is moved a little in the direction in which it refuses more, and the row's loss read again
``reference``   the loss under a model that was trained without safety data, from a file or a second adapter
``covariance``  minus the covariance of the row's loss and the safety loss over the steps of a noisy run

Scores have no natural scale, and early in a run they may be noise. `Calibration` turns them into log-odds: a mixture
of two Gaussians with one variance, harmless rows at 0 and harmful ones at ``m`` (near 1 for the probe), fitted while
the run goes on::

    log p(x | harmful) / p(x | harmless)  =  (x - m/2) m / variance,     held within +-LIMIT

While scores are noise the variance is large and the log-odds are small: that is the rule for when to believe them.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 6.0
"""No single score says more than this: odds of e**6, about 400 to 1."""

_MEMORY = 64.0  # scores that the fit remembers
_PRIOR_VARIANCE, _VARIANCE_ROWS = 0.25, 8.0  # half way between the two means, as heavy as 8 scores
_PRIOR_MEAN, _MEAN_ROWS = 1.0, 8.0
_LOWEST_MEAN, _HIGHEST_MEAN = 0.4, 8.0


class Calibration:
    """The fitted mixture: sums over past scores, in a tensor that belongs to a scheduler's state.

    The four sums are the number of scores near m, their sum, the squared distances of all scores to the nearer mean,
    and the number of scores; they fade with a memory of some 64 scores.

    Example:
        Scores that separate make a later score say more.

        >>> import torch
        >>> calibration = Calibration(Calibration.fresh())
        >>> before = calibration.log_odds(torch.tensor([1.0]))
        >>> for _ in range(20):
        ...     _ = calibration.fit(torch.tensor([1.0, 0.0, 0.02, -0.01]))
        >>> bool(calibration.log_odds(torch.tensor([1.0])) > before)
        True
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    @staticmethod
    def fresh() -> Tensor:
        """The sums before any score: float64 (4,)."""
        return torch.zeros(4, dtype=torch.float64)

    @property
    def harmful_mean(self) -> float:
        """m, where harmful rows score."""
        near, total = self.sums[:2].tolist()
        mean = (total + _PRIOR_MEAN * _MEAN_ROWS) / (near + _MEAN_ROWS)
        return min(max(mean, _LOWEST_MEAN), _HIGHEST_MEAN)

    @property
    def variance(self) -> float:
        """Of a score around its mean."""
        squares, count = self.sums[2:].tolist()
        return (squares + _PRIOR_VARIANCE * _VARIANCE_ROWS) / (count + _VARIANCE_ROWS)

    def log_odds(self, scores: Tensor) -> Tensor:
        """What each score says by itself: float64, of the same shape, within +-LIMIT."""
        mean = self.harmful_mean
        raw = (scores.double() - mean / 2) * (mean / self.variance)
        return LIMIT * torch.tanh(raw / LIMIT)

    def fit(self, scores: Tensor) -> Tensor:
        """Learn from some scores, in place, then say what they mean.

        Every score counts for the mean that it is nearer to: a soft assignment would take its own doubt for noise.

        Args:
            scores: float (n,).

        Returns:
            float64 (n,), the log-odds of each.
        """
        x, mean = scores.double(), self.harmful_mean
        near = (x > mean / 2).double()
        squares = torch.minimum(x.square(), (x - mean).square())
        # a few wild scores may not make the fit forget what it knows
        squares = squares.clamp(max=4 * mean * mean)
        seen = [near.sum(), (near * x.clamp(max=4 * mean)).sum(), squares.sum(), torch.tensor(float(x.numel()))]
        self.sums.mul_((1 - 1 / _MEMORY) ** x.numel()).add_(torch.stack(seen).double())
        return self.log_odds(x)
