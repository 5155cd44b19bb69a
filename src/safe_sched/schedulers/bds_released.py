"""The rule of the released BDS code (arXiv 2510.27172), for comparisons.

Joint posterior of model and row logits z, with weights that rise and fall with the logits::

    p(theta, z | D_ft, D_safe)  ~  p(D_safe | theta) * prod_i exp(-w_i(z) * nll_i(theta)) * p(theta) p(z)

    w_i = N * softmax(z)_i        "softmax": mean 1 over the training set
        = 2 * sigmoid(z_i)        "sigmoid": each row for itself, 1 at z = 0
        = max(z_i, 0)             "identity"

The released rule follows, by AdamW, the gradient of the weighted loss of the user rows U of one optimiser step,
with the losses held fixed and no Langevin noise: a point estimate. For softmax, with pi = softmax(z)::

    L_z    = (1/|U|) sum_{i in U} w_i nll_i
    dz_j   = (N pi_j / |U|) * ( 1[j in U] nll_j  -  sum_{i in U} pi_i nll_i )        for every row j of the N

Every row moves at every step: outside U the gradient is tiny, and AdamW takes it at full size.

============  =========================  ==================
symbol        name here                  unit
============  =========================  ==================
z             ``logits``                 1
w             weights                    1
nll           ``nll``                    nats per token
N, U          ``rows``, the step's rows  rows
============  =========================  ==================

Cost: one pass over N numbers per optimiser step, 12 bytes per row; no pass of the model. Limits, measured in
docs/methods/bds.md: near-inert for a few epochs; and since the loss itself is the signal, hard rows lose weight
whether they are harmful or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.needs import NLL
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, Scheduler, State, options

# 1 MiB of scratch: large enough for two threads, small enough to stay in the cache
_CHUNK = 1 << 18


@dataclass
class ReleasedState(State):
    """Logits, AdamW's two moments, and the sum that the softmax divides by.

    Attributes:
        logits: float32 (slots,).
        mean: float32 (slots,), running mean of the gradient.
        square: float32 (slots,), running mean of its square.
        counts: int32 (slots,), rows that share a slot; (0,) where every row has its own.
        rows: N.
        steps: Updates so far.
        log_total: float64 (), log of sum_i exp(z_i) over the N rows.
    """

    logits: Tensor
    mean: Tensor
    square: Tensor
    counts: Tensor
    rows: int
    steps: int
    log_total: Tensor


@options
class BDSReleased(Scheduler[ReleasedState]):
    """One logit per training row, moved by AdamW along the raw loss.

    Args:
        transform: From logit to weight: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
        learning_rate: AdamW step size of the logits, > 0.
        betas: AdamW's two decay rates, each in [0, 1).
        eps: AdamW's regulariser, > 0.
        initial_logit: z of every row before the first step.

    Example:
        Two rows, the first with the higher loss: its weight falls.

        >>> from safe_sched import BDSReleased
        >>> from safe_sched.rows.index import RowIndex
        >>> from safe_sched.scheduler import Observation
        >>> scheduler = BDSReleased(learning_rate=0.1)
        >>> state = scheduler.init(RowIndex(torch.tensor([1, 2])))
        >>> loss = torch.tensor([2.0, 1.0])
        >>> seen = Observation(torch.tensor([0, 1]), torch.tensor([5, 5]), measured={"nll": loss})
        >>> _ = scheduler.update(state, seen)
        >>> scheduler.slot_weights(state)
        tensor([0.9003, 1.0997])
    """

    name: ClassVar[str] = "bds_released"
    state_type = ReleasedState
    needs = (NLL(),)

    transform: Literal["softmax", "sigmoid", "identity"] = "softmax"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    initial_logit: float = 0.1

    def init(self, index: RowIndex) -> ReleasedState:
        """See `Scheduler.init`."""
        counts = index.counts
        return ReleasedState(
            logits=torch.full((index.slots,), self.initial_logit),
            mean=torch.zeros(index.slots),
            square=torch.zeros(index.slots),
            counts=torch.empty(0, dtype=torch.int32) if counts is None else counts.to(torch.int32),
            rows=index.rows,
            steps=0,
            log_total=torch.tensor(math.log(max(index.rows, 1)) + self.initial_logit, dtype=torch.float64),
        )

    def grow(self, state: ReleasedState, index: RowIndex) -> ReleasedState:
        """See `Scheduler.grow`: new rows start where all rows started."""
        new = index.slots - state.logits.numel()
        return replace(
            state,
            logits=torch.cat([state.logits, torch.full((new,), self.initial_logit)]),
            mean=torch.cat([state.mean, torch.zeros(new)]),
            square=torch.cat([state.square, torch.zeros(new)]),
            rows=index.rows,
            log_total=torch.logaddexp(
                # an empty stream has no rows, whose sum is 0
                state.log_total if state.rows else torch.tensor(-math.inf, dtype=torch.float64),
                torch.tensor(math.log(new) + self.initial_logit, dtype=torch.float64),
            ),
        )

    def weights(self, state: ReleasedState, batch: Observation) -> Tensor:
        """See `Scheduler.weights`."""
        return self._transform(state, state.logits[batch.slots])

    def slot_weights(self, state: ReleasedState, slots: Any = slice(None)) -> Tensor:
        """See `Scheduler.slot_weights`."""
        return self._transform(state, state.logits[slots])

    def _transform(self, state: ReleasedState, logits: Tensor) -> Tensor:
        if self.transform == "softmax":
            return torch.exp(logits + (math.log(max(state.rows, 1)) - float(state.log_total)))
        return 2 * torch.sigmoid(logits) if self.transform == "sigmoid" else logits.clamp(min=0)

    def update(self, state: ReleasedState, step: Observation) -> dict[str, float]:
        """One AdamW step on the logits, in place.

        Args:
            state: Changed in place.
            step: All rows of the optimiser step, with their losses under the parameters before it.
        """
        state.steps += 1
        slots, place = torch.unique(step.slots, return_inverse=True)
        loss = torch.zeros(slots.numel(), dtype=torch.float64).index_add_(0, place, step["nll"].double())
        loss /= step.slots.numel()
        gradient, spread = self._batch_gradient(state, slots, loss)

        # the pass over all rows does not know the batch: put its rows aside and bring them back with their own gradient
        aside = [x[slots].clone() for x in (state.logits, state.mean, state.square)]
        scratch = torch.empty(min(_CHUNK, state.logits.numel()))
        for start in range(0, state.logits.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            dense = scratch[: state.logits[part].numel()]
            if spread:
                torch.sub(state.logits[part], float(state.log_total), out=dense)
                dense.exp_().mul_(spread)
                if state.counts.numel():
                    dense.mul_(state.counts[part])
            else:
                dense.zero_()
            self._adam(state, dense, state.logits[part], state.mean[part], state.square[part])
        self._adam(state, gradient.float(), *aside)
        for whole, rows in zip((state.logits, state.mean, state.square), aside, strict=True):
            whole[slots] = rows
        if self.transform == "softmax":
            state.log_total = self._log_total(state, scratch)
        return {}

    def _batch_gradient(self, state: ReleasedState, slots: Tensor, loss: Tensor) -> tuple[Tensor, float]:
        """Gradient of the step's slots, and the factor of pi that is the gradient of every other slot.

        Args:
            state: Before the update.
            slots: int64 (distinct,), the distinct slots of the step.
            loss: float64 (distinct,), ``(1/|U|) * sum of nll`` over the rows of U in each slot.
        """
        logits = state.logits[slots].double()
        if self.transform == "sigmoid":
            s = torch.sigmoid(logits)
            return 2 * s * (1 - s) * loss, 0.0
        if self.transform == "identity":
            return loss * (logits > 0), 0.0
        pi = torch.exp(logits - state.log_total)
        total = float((pi * loss).sum())
        counts = state.counts[slots] if state.counts.numel() else 1
        return state.rows * pi * (loss - counts * total), -state.rows * total

    def _adam(self, state: ReleasedState, gradient: Tensor, logits: Tensor, mean: Tensor, square: Tensor) -> None:
        """AdamW without decay on a part of the rows, in place; uses up ``gradient``."""
        beta1, beta2 = self.betas
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # both bias corrections folded into two numbers, to save a pass
        root = math.sqrt(1 - beta2**state.steps)
        denominator = torch.sqrt(square, out=gradient).add_(self.eps * root)
        logits.addcdiv_(mean, denominator, value=-self.learning_rate * root / (1 - beta1**state.steps))

    @staticmethod
    def _log_total(state: ReleasedState, scratch: Tensor) -> Tensor:
        shift, total = float(state.log_total) - math.log(max(state.rows, 1)), 0.0
        for start in range(0, state.logits.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            values = torch.sub(state.logits[part], shift, out=scratch[: state.logits[part].numel()]).exp_()
            if state.counts.numel():
                values.mul_(state.counts[part])
            total += float(values.sum())
        # a stream without rows so far has nothing to sum
        return torch.tensor(shift + math.log(total), dtype=torch.float64) if total else state.log_total
