"""What is believed of each training row before the run: an audit's ``p_harmful``, as prior log-odds.

An audit says of row i that it is harmful with probability ``p_i``, and so of the whole set that a share ``q`` of it is,
the mean of ``p_i``. What it knows of *this* row, and not of the set, is the ratio of their odds, a Bayes factor::

    A_i = log p_i / (1 - p_i)  -  log q / (1 - q),        held within -CLEARS and LIMIT

``A_i`` is added to what the row's scores say; how many harmful rows there are stays the scheduler's own question.
Where all rows have the same p, every ``A_i`` is 0 and nothing changes, bit for bit. What clears a row is held closer
than what speaks against it: to an audit that cannot see what is wrong with a row the row looks harmless.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_sched.errors import DataError
from safe_sched.estimators.calibration import LIMIT
from safe_sched.rows.index import RowIndex

CLEARS = 2.0
"""Nats by which one expert can clear a row at most."""


@dataclass(frozen=True)
class RowPrior:
    """A prior for every slot of a training set.

    Attributes:
        p: float64 (slots,), from 0 to 1; the mean of its rows where several share a slot.
        log_odds: float32 (slots,), nats, ``A_i`` above.

    Example:
        Four rows, a fifth of a harmful row among them.

        >>> from safe_sched.rows.index import RowIndex
        >>> prior = RowPrior.of(torch.tensor([0.04, 0.04, 0.04, 0.68]), RowIndex(torch.tensor([1, 2, 3, 4])))
        >>> [round(x, 2) for x in prior.log_odds.tolist()]  # the mean is 0.2
        [-1.79, -1.79, -1.79, 2.14]
    """

    p: Tensor
    log_odds: Tensor

    @staticmethod
    def of(p: Tensor, index: RowIndex) -> RowPrior:
        """The prior of a training set.

        Args:
            p: float (rows,), the probability of being harmful of every row of the set, in its order.
            index: The rows of the set.

        Raises:
            DataError: There is not one number from 0 to 1 per row, or the set is a stream.
        """
        if index.row_slots is None:
            raise DataError("a prior needs a training set whose rows are known at the start; this one is a stream")
        p = p.double()
        if p.numel() != index.rows:
            raise DataError(
                f"the prior has {p.numel()} numbers for {index.rows} training rows; give one per row. Rows that were "
                "packed have none of their own: train without packing"
            )
        bad = (~((p >= 0) & (p <= 1))).nonzero().flatten()  # nan as well
        if bad.numel():
            raise DataError(
                f"{bad.numel()} of {p.numel()} training rows have no probability as prior (first: row {int(bad[0])}, "
                f"{float(p[bad[0]])}); allowed: a number from 0 to 1. Rows that an audit could not score have none: "
                "take them out of the training set, or give them the share of harmful rows that you expect"
            )
        slots = index.row_slots.long()
        each = torch.bincount(slots, minlength=index.slots)
        mean = torch.zeros(index.slots, dtype=torch.float64).index_add_(0, slots, p) / each
        if bool((p == p[0]).all()):  # exactly, and also where log-odds would be infinite
            return RowPrior(torch.full_like(mean, float(p[0])), torch.zeros(index.slots))
        log_odds = (torch.logit(mean) - torch.logit(p.mean())).clamp(-CLEARS, LIMIT)
        return RowPrior(mean, log_odds.float())

    def fingerprint(self) -> str:
        """A name for it, the same for every order of the rows: 16 hexadecimal digits."""
        return hashlib.sha256(self.p.numpy().tobytes()).hexdigest()[:16]
