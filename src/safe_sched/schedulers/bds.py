"""BDS: Bayesian Data Scheduler, one logit per row (arXiv 2510.27172), with its evidence term.

The joint posterior of model and row logits z is::

    p(theta, z | D_ft, D_safe)  ~  p(D_safe | theta) * p(D_ft | theta, z) / p(D_ft | z) * p(theta) p(z)

For one row, with the model held, the middle factors leave ``exp(-E_i w(z_i))``. The evidence ``E_i`` is the difference
between the loss under the safety-aware model and under one that does not care, on a scale on which it is the log-odds
of the row being harmful (`estimators.calibration`); scores of one row add up. So the energy of a row's logit is::

    U(z_i) = E_i w(z_i) - log p(z_i)

    w(z) = sigmoid(z) / its prior mean      "sigmoid": each row for itself; a whole batch can be turned away
         = N softmax(z)                     "softmax": mean 1 over the training set, as in the paper
         = max(z, 0) / its prior mean       "identity"

and it is sampled by preconditioned SGLD (`safe_sched.estimators.sgld`) whenever a row's evidence has changed; the row's
weight is the posterior mean of w, its probability of being harmful that of ``1 - sigmoid(z)``. Weight 1 is what a row
has before anything is known of it. The paper's released code drops the evidence; see `schedulers.bds_released`.

**Priors.** *Gaussian on the logits*: ``-log p(z) = (z - mean)**2 / (2 std**2)``; it pulls towards the weight that every
row starts with. *Harmful share*: each row is harmful with a share q, ``q ~ Beta(a, b)`` with ``a + b = prior_rows``
and mean ``prior_share``. Integrating q out, with H the sum of the M judged rows' harmful probabilities, gives
``Beta(a + H, b + M - H) / Beta(a, b)``, whose derivative by one row's ``1 - sigmoid(z)`` is ``digamma(a + H) -
digamma(b + M - H)``: close to the log-odds of the share found so far. It is added to every row's evidence, so one row
in ten thousand needs more evidence than one in two. The released prior has the wrong sign, and under softmax a share
prior is constant: it is refused there. With softmax and identity, which nothing bounds above, only ``max(E, 0)``
enters: without that the posterior of softmax puts all mass on the most harmless row.

============  ==========================  ==================
symbol        name here                   unit
============  ==========================  ==================
z             ``logits``                  1
w             weights                     1
E             ``log_odds``                nats
x             score                       1, see `safe_sched.estimators.calibration`
============  ==========================  ==================

Cost: nothing for a step without new scores; otherwise ``burn_in + draws`` updates of the rows that were scored, all at
once. 12 bytes per row; no pass over all rows, and no pass of the model but the probe's, see `docs/methods/bds.md`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.errors import OptionError
from safe_sched.estimators.calibration import Calibration
from safe_sched.estimators.prior import RowPrior
from safe_sched.estimators.reference import load_reference
from safe_sched.estimators.sgld import Langevin, acceptance, effective_draws, normal, rhat, sample
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, State
from safe_sched.schedulers.bds_released import Released
from safe_sched.schedulers.options import options, settings_of

Transform = Literal["softmax", "sigmoid", "identity"]
Prior = Literal["harmful_share", "gaussian", "flat"]

RESOLVED = 3.0
"""Log-odds, 20 to 1, beyond which a row is not measured again."""

EARLY = 12
"""Optimiser steps in which scores are doubtful: a task that is new to the model may look like something to refuse."""

_RANGE, _GRID = 60.0, 0.1  # of the log-odds for which P(harmful) is tabulated
_STD = {"sigmoid": 4.0, "softmax": 1.0, "identity": 0.5}
_MEAN = {"sigmoid": 0.0, "softmax": 0.0, "identity": 1.0}
_RELEASED_ONLY = ("learning_rate", "betas", "eps", "initial_logit")


@dataclass
class BDSState(State):
    """What is known of every row.

    Attributes:
        log_odds: float16 (slots,), the sum E of what its scores said.
        harmful: float16 (slots,), posterior probability of being harmful, as sampled last.
        low, high: float16 (slots,), its 5 % and 95 % quantiles.
        sampled: float16 (slots,), the log-odds, share included, that a row's draws belong to.
        scored: uint8 (slots,), scores so far, 255 for more.
        since: uint8 (slots,), the update at which a row was scored last, 255 for later ones.
        logits: float32 (slots,), posterior mean of z, for the softmax; or (0,).
        weight: float32 (slots,), posterior mean of w, for the identity; or (0,).
        steps: Updates so far.
        calibration: float64 (4,), see `safe_sched.estimators.calibration.Calibration`.
        judged: float64 (2,), rows with a score, and the sum of their probabilities.
        counts: int32 (slots,), rows that share a slot; (0,) where every row has its own.
        rows: N.
        log_total: float64 (), log of the sum over the N rows of exp(z).
        reference: float32 (slots,) losses of the reference model, or (0,).
        moments: float32 (5, slots): visits, mean loss, mean safety loss, sum of their co-deviations, sum
            of squared deviations of the safety loss; or (5, 0).
        row_prior: float16 (slots,), log-odds that were given before the run (`safe_sched.estimators.prior`), or (0,).
    """

    log_odds: Tensor
    harmful: Tensor
    low: Tensor
    high: Tensor
    sampled: Tensor
    scored: Tensor
    since: Tensor
    logits: Tensor
    weight: Tensor
    steps: int
    calibration: Tensor
    judged: Tensor
    counts: Tensor
    rows: int
    log_total: Tensor
    reference: Tensor
    moments: Tensor
    row_prior: Tensor


@options
class BDS:
    """Bayesian Data Scheduler with one logit per training row. The defaults need no tuning.

    Args:
        evidence: Where a row's score comes from: ``"probe"`` (the default), ``"reference"``, ``"covariance"``, or None
            to leave the weights at 1 (and to bring scores yourself, through ``session.learn``).
        reference: For ``evidence="reference"``: a file written by ``safe-sched losses``, or ``"adapter:NAME"`` for a
            PEFT adapter of the model that was trained without safety data.
        transform: From logit to weight; None is ``"sigmoid"``.
        prior: ``"harmful_share"`` (sigmoid's default), ``"gaussian"`` (the default of the others), ``"flat"``.
        prior_share: Share of harmful rows expected, in (0, 1).
        prior_rows: How many rows that expectation is worth, > 0.
        prior_std: Standard deviation of a logit, > 0; None: 4 for sigmoid, 1 for softmax, 0.5 for identity.
        temperature: 1 samples the posterior, 0 takes its mode.
        step_size: Of SGLD, > 0, relative to the width of the posterior.
        step_decay: Exponent of its schedule, 0 to 1.
        burn_in, draws, thin, chains: Lengths of the chains, and how many there are.
        max_probes: How often one row is measured at most, 1 to 255; a row is measured until its log-odds are beyond 3.
        seed: Of the chains.
        compat: ``"released"``: the rule of the authors' released code instead, see `schedulers.bds_released`.
        learning_rate, betas, eps, initial_logit: Options of the released rule alone.

    Raises:
        OptionError: Options that do not go together, or out of range.

    Example:
        Three rows, of which the last resists staying safe.

        >>> from safe_sched import BDS
        >>> from safe_sched.rows.index import RowIndex
        >>> scheduler = BDS()
        >>> state = scheduler.init(RowIndex(torch.tensor([1, 2, 3])))
        >>> for _ in range(3):
        ...     _ = scheduler.learn(state, torch.tensor([0, 1, 2]), torch.tensor([0.0, 0.1, 1.0]))
        >>> [round(w) for w in scheduler.slot_weights(state).tolist()]
        [1, 1, 0]
    """

    name: ClassVar[str] = "bds"

    evidence: Literal["probe", "reference", "covariance"] | None = "probe"
    reference: str | None = None
    transform: Transform | None = None
    prior: Prior | None = None
    prior_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    prior_rows: Annotated[float, Field(gt=0)] = 10.0
    prior_std: Annotated[float, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    step_size: Annotated[float, Field(gt=0, le=1)] = 0.25
    step_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    burn_in: Annotated[int, Field(ge=0)] = 16
    draws: Annotated[int, Field(ge=4)] = 32
    thin: Annotated[int, Field(ge=1)] = 1
    chains: Annotated[int, Field(ge=1)] = 8
    max_probes: Annotated[int, Field(ge=1, le=255)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    compat: Literal["released"] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    eps: Annotated[float, Field(gt=0)] | None = None
    initial_logit: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in _RELEASED_ONLY if getattr(self, name) is not None]
        if self.compat is None and given:
            raise OptionError(
                f'BDS: {", ".join(given)} belongs to the released rule; add compat="released" or leave it out'
            )
        if self.compat == "released":
            default = _posterior_options(BDS()) | ({"evidence": None} if self.evidence is None else {})
            mine = [name for name, value in _posterior_options(self).items() if value != default[name]]
            if mine:
                raise OptionError(f'BDS(compat="released"): the released rule has no {", ".join(mine)}; leave it out')
            object.__setattr__(self, "evidence", None)  # what integrations ask
            return
        if self.prior == "harmful_share" and self._transform != "sigmoid":
            raise OptionError(
                f'BDS(transform="{self._transform}", prior="harmful_share"): a share of rows has no meaning for '
                'weights that are relative; use prior="gaussian", or transform="sigmoid"'
            )
        if self.prior == "flat" and self.temperature > 0:
            raise OptionError(
                'BDS(prior="flat"): a flat prior on logits has no posterior to sample; use temperature=0, or '
                'prior="gaussian"'
            )
        if (self.reference is not None) != (self.evidence == "reference"):
            raise OptionError(
                'BDS: evidence="reference" and reference=... (a file written by `safe-sched losses`, or '
                '"adapter:NAME") go together'
            )

    @functools.cached_property
    def _released(self) -> Released | None:
        if self.compat is None:
            return None
        chosen = {name: getattr(self, name) for name in (*_RELEASED_ONLY, "transform")}
        return Released(**{name: value for name, value in chosen.items() if value is not None})

    @property
    def _transform(self) -> Transform:
        return self.transform or "sigmoid"

    @property
    def _prior(self) -> Prior:
        return self.prior or ("harmful_share" if self._transform == "sigmoid" else "gaussian")

    def _precision(self, transform: Transform) -> float:
        std = self.prior_std if self.prior_std and transform == self._transform else _STD[transform]
        return 0.0 if self._prior == "flat" else std**-2.0

    @property
    def state_type(self) -> type[State]:
        """The class of its state."""
        return BDSState if self._released is None else self._released.state_type

    @property
    def needs_nll(self) -> bool:
        """Whether it reads the rows' losses."""
        return self._released is not None or self.evidence in ("reference", "covariance")

    @property
    def adapter(self) -> str | None:
        """The PEFT adapter whose losses are the reference, where that is one."""
        kind, _, name = (self.reference or "").partition(":")
        return name if kind == "adapter" else None

    def settings(self) -> dict[str, object]:
        """The options as plain JSON values."""
        if self._released is not None:
            return {**settings_of(self._released), "name": self.name, "compat": "released"}
        known = {name: value for name, value in settings_of(self).items() if name not in (*_RELEASED_ONLY, "compat")}
        return known | {"transform": self._transform, "prior": self._prior}

    # state ------------------------------------------------------------------------------------------------------

    def init(self, index: RowIndex) -> Any:
        """See `safe_sched.scheduler.Scheduler.init`.

        Raises:
            DataError: The reference file lacks a row of the training set.
        """
        if self._released is not None:
            return self._released.init(index)
        n, counts = index.slots, index.counts
        start = _MEAN[self._transform]
        from_file = self.evidence == "reference" and self.adapter is None
        return BDSState(
            log_odds=torch.zeros(n, dtype=torch.float16),
            harmful=torch.full((n,), 1 - self._mean_under_prior("sigmoid"), dtype=torch.float16),
            low=torch.zeros(n, dtype=torch.float16),
            high=torch.ones(n, dtype=torch.float16),
            sampled=torch.zeros(n, dtype=torch.float16),
            scored=torch.zeros(n, dtype=torch.uint8),
            since=torch.zeros(n, dtype=torch.uint8),
            logits=torch.full((n if self._transform == "softmax" else 0,), start),
            weight=torch.ones(n if self._transform == "identity" else 0),
            steps=0,
            calibration=Calibration.fresh(),
            judged=torch.zeros(2, dtype=torch.float64),
            counts=torch.empty(0, dtype=torch.int32) if counts is None else counts.to(torch.int32),
            rows=index.rows,
            log_total=torch.tensor(math.log(max(index.rows, 1)) + start, dtype=torch.float64),
            reference=load_reference(Path(str(self.reference)), index) if from_file else self._unknown_losses(n),
            moments=torch.zeros(5, n if self.evidence == "covariance" else 0),
            row_prior=torch.empty(0, dtype=torch.float16),
        )

    def with_prior(self, state: Any, prior: RowPrior) -> Any:
        """See `safe_sched.estimators.prior.Informed`: what is known of a row before the run counts like a score.

        Raises:
            OptionError: The transform gives relative weights, or the rule is the released one.
        """
        if self._released is not None or self._transform != "sigmoid":
            raise OptionError(
                "BDS: a prior for every row is a probability, which the released rule and relative weights have no "
                'place for; use transform="sigmoid", the default, or give no prior'
            )
        told = prior.log_odds.half()
        known, total = told != 0, told.float() + self._share_log_odds(state.judged)
        kept = {name: getattr(state, name) for name in ("harmful", "low", "high", "sampled")}
        found = (self._curve(total), self._curve(total, 1), self._curve(total, 2), total)
        return replace(
            state,
            row_prior=told,
            **{name: torch.where(known, new.half(), kept[name]) for name, new in zip(kept, found, strict=True)},
        )

    def _unknown_losses(self, n: int) -> Tensor:
        return torch.full((n if self.evidence == "reference" else 0,), math.nan)

    def grow(self, state: Any, index: RowIndex) -> Any:
        """See `safe_sched.scheduler.Scheduler.grow`: new rows start where all rows started."""
        if self._released is not None:
            return self._released.grow(state, index)
        fresh = self.init(index)
        old = state.log_odds.numel()
        grown = {
            name: torch.cat([getattr(state, name), getattr(fresh, name)[..., old:]], dim=-1)
            for name in (
                *("log_odds", "harmful", "low", "high", "sampled", "scored", "since"),
                *("logits", "weight", "reference", "moments"),
            )
        }
        added = torch.tensor(math.log(max(index.slots - old, 1)) + _MEAN[self._transform], dtype=torch.float64)
        total = torch.logaddexp(state.log_total, added) if old else added
        return replace(state, **grown, rows=index.rows, log_total=total)

    # weights ----------------------------------------------------------------------------------------------------

    def weights(self, state: Any, batch: Observation) -> Tensor:
        """See `safe_sched.scheduler.Scheduler.weights`."""
        if self._released is not None:
            return self._released.weights(state, batch)
        return self._weights(state, batch.slots)

    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        """See `safe_sched.scheduler.Scheduler.slot_weights`."""
        return self._released.slot_weights(state, slots) if self._released else self._weights(state, slots)

    def _weights(self, state: BDSState, where: Any) -> Tensor:
        if self._transform == "softmax":
            return torch.exp(state.logits[where] + (math.log(max(state.rows, 1)) - float(state.log_total)))
        if self._transform == "identity":
            return state.weight[where]
        benign = (1 - self._now(state, where, state.harmful)) / self._prior_mean
        return torch.where(self._known(state, where), benign, 1.0)

    def _known(self, state: BDSState, where: Any) -> Tensor:
        """Of which rows something is known: a score, or a prior of their own."""
        scored = state.scored[where] > 0
        return scored | (state.row_prior[where] != 0) if state.row_prior.numel() else scored

    def _said(self, state: BDSState, where: Any) -> Tensor:
        """Log-odds of rows by their scores and their own prior, float16."""
        told = state.log_odds[where]
        return told + state.row_prior[where] if state.row_prior.numel() else told

    def _now(self, state: BDSState, where: Any, sampled: Tensor, which: int = 0) -> Tensor:
        """What was sampled of P(harmful), float32, with the change since in the share found: exact, by a sum over z."""
        then = state.sampled[where].float()
        now = torch.where(self._known(state, where), self._total(state, where), then)
        return (sampled[where].float() + self._curve(now, which) - self._curve(then, which)).clamp(0, 1)

    def log_odds(self, state: Any, slots: Any) -> Tensor:
        """What scores say, without a prior, for `safe_sched.schedulers.combined`: float32, nats; 0 where unknown."""
        return state.log_odds[slots].float()

    def columns(self, state: Any) -> dict[str, Tensor]:
        """What the table says of every slot beside its weight."""
        if self._released is not None:
            return {}
        everywhere = slice(None)
        p = self._now(state, everywhere, state.harmful)
        return {
            "p_harmful": p,
            "p_harmful_low": torch.minimum(self._now(state, everywhere, state.low, 1), p),
            "p_harmful_high": torch.maximum(self._now(state, everywhere, state.high, 2), p),
            "log_odds": state.log_odds.float(),
            "scored": state.scored.to(torch.int32),
            **self._prior_column(state),
        }

    def _prior_column(self, state: BDSState) -> dict[str, Tensor]:
        return {"prior_log_odds": state.row_prior.float()} if state.row_prior.numel() else {}

    # learning ---------------------------------------------------------------------------------------------------

    def due(self, state: Any, slots: Tensor) -> Tensor:
        """Which rows are still open: bool (rows,)."""
        if self.evidence != "probe":
            return torch.zeros(slots.numel(), dtype=torch.bool)
        unsure = self._total(state, slots).abs() < RESOLVED
        return (
            (state.scored[slots] == 0)
            | (unsure & (state.scored[slots] < self.max_probes))
            | self.doubtful(state, slots)
        )

    def doubtful(self, state: Any, slots: Tensor) -> Tensor:
        """Which rows should be measured again before they come by: bool (rows,).

        Those that were not cleared in the first `EARLY` updates, once as many more are done: where the task is new to
        the model, it is about to refuse harmless rows too.
        """
        if self.evidence != "probe":
            return torch.zeros(slots.numel(), dtype=torch.bool)
        seen = (state.scored[slots] > 0) & (state.scored[slots] < self.max_probes)
        early = (state.since[slots] < EARLY) & (state.steps >= 2 * EARLY)
        return seen & early & (self._total(state, slots) > -RESOLVED)

    def _total(self, state: BDSState, slots: Any) -> Tensor:
        return self._said(state, slots).float() + self._share_log_odds(state.judged)

    def update(self, state: Any, step: Observation) -> dict[str, float]:
        """See `safe_sched.scheduler.Scheduler.update`: scores that need no probe."""
        if self._released is not None:
            return self._released.update(state, step)
        if self.evidence == "reference":
            assert step.nll is not None
            known = torch.isfinite(state.reference[step.slots])
            state.steps += 1
            return self.learn(state, step.slots[known], (step.nll - state.reference[step.slots])[known])
        if self.evidence == "covariance":
            return self._covariance(state, step)
        state.steps += 1
        return {}

    def learn(self, state: Any, slots: Tensor, scores: Tensor) -> dict[str, float]:
        """Take scores in, and sample the logits of their rows again.

        Args:
            state: Changed in place.
            slots: int64 (rows,).
            scores: float (rows,), finite; positive where staying safe makes the row harder to learn.

        Returns:
            Numbers to log: the calibration, and how the chains did.
        """
        if self._released is not None:
            raise OptionError('BDS(compat="released") takes no scores; leave compat out')
        if not slots.numel():
            return {}
        slots, place = torch.unique(slots, return_inverse=True)
        each = torch.bincount(place).double()
        score = torch.zeros(slots.numel(), dtype=torch.float64).index_add_(0, place, scores.double()) / each
        calibration = Calibration(state.calibration)
        says = calibration.fit(score).float()
        if self.evidence == "probe":
            # a model that has learned to comply has nothing to lose: a low score clears a row the first time only
            later = (state.scored[slots] > 0) & (state.since[slots] >= EARLY)
            says = torch.where(later, says.clamp(min=0), says)
        if self.evidence not in ("reference", "covariance"):  # whose scores of one row are one measurement, carried on
            says += state.log_odds[slots]
        state.log_odds[slots] = says.half()
        state.since[slots] = min(state.steps, 255)
        new = state.scored[slots] == 0
        state.harmful[slots[new]] = 0.0
        state.scored[slots] = (state.scored[slots].long() + 1).clamp(max=255).to(torch.uint8)
        chains = self._resample(state, slots)
        state.judged[0] += float(new.sum())  # only now: till then they would count as judged and harmless
        return {
            **chains,
            "score_variance": calibration.variance,
            "score_harmful_mean": calibration.harmful_mean,
            "harmful_rows": float(state.judged[1]),
            "rows_scored": float(state.judged[0]),
        }

    def _resample(self, state: BDSState, slots: Tensor) -> dict[str, float]:
        """Sample the logits of some scored rows, distinct ones, and keep what their draws say."""
        total, visits = self._total(state, slots), state.scored[slots].long()
        chains = self._sample(total, "sigmoid", slots, visits)
        u = torch.sigmoid(chains.draws)
        before = state.harmful[slots].double()
        state.harmful[slots] = (1 - u.mean((0, 2))).half()
        harmful = (1 - u).transpose(0, 1).flatten(1)
        for edge, share in ((state.low, 0.05), (state.high, 0.95)):
            edge[slots] = harmful.kthvalue(math.ceil(share * harmful.shape[1]), dim=1).values.half()
        state.judged[1] += (state.harmful[slots].double() - before).sum()
        state.sampled[slots] = total.half()
        if self._transform != "sigmoid":
            self._set_weights(state, slots, visits)
        return chains.diagnostics

    def _set_weights(self, state: BDSState, slots: Tensor, visits: Tensor) -> None:
        conflict = state.log_odds[slots].float().clamp(min=0)
        draws = self._sample(conflict, self._transform, slots, visits).draws
        if self._transform == "identity":
            state.weight[slots] = draws.clamp(min=0).mean((0, 2)) / self._prior_mean
            return
        # the mean of dU/dz is 0 over the posterior: this form of the mean logit has no noise where there is no evidence
        precision = self._precision("softmax")
        logits = -conflict * draws.exp().mean((0, 2)) / precision if precision else draws.mean((0, 2))
        counts = state.counts[slots] if state.counts.numel() else 1
        scale = float(state.log_total)
        moved = (counts * (torch.exp(logits.double() - scale) - torch.exp(state.logits[slots].double() - scale))).sum()
        state.logits[slots] = logits
        state.log_total = torch.tensor(scale + math.log1p(max(float(moved), -1 + 1e-12)), dtype=torch.float64)

    def _share_log_odds(self, judged: Tensor) -> float:
        """The harmful-share prior's log-odds for one row, given the rows judged so far."""
        if self._prior != "harmful_share":
            return 0.0
        a = self.prior_rows * self.prior_share
        b = self.prior_rows - a
        rows, harmful = float(judged[0]), min(max(float(judged[1]), 0.0), float(judged[0]))
        pair = torch.digamma(torch.tensor([a + harmful, b + rows - harmful], dtype=torch.float64))
        return float(pair[0] - pair[1])

    def _covariance(self, state: BDSState, step: Observation) -> dict[str, float]:
        """Running slope of every row's loss on the safety loss, by Welford's recursion."""
        assert step.nll is not None
        if step.safety_loss is None:
            raise OptionError('BDS(evidence="covariance") needs a safety loss in every step: give safety_data')
        slots, place = torch.unique(step.slots, return_inverse=True)
        nll = torch.zeros(slots.numel()).index_add_(0, place, step.nll) / torch.bincount(place)
        visits, loss, safe, together, square = state.moments[:, slots]
        state.steps += 1
        visits = visits + 1
        before, apart = nll - loss, step.safety_loss - safe
        loss, safe = loss + before / visits, safe + apart / visits
        together = together + before * (step.safety_loss - safe)
        square = square + apart * (step.safety_loss - safe)
        state.moments[:, slots] = torch.stack([visits, loss, safe, together, square])
        ready = (visits >= 2) & (square > 0)
        # nats of the row per nat of the safety loss: the slope of the one on the other
        return self.learn(state, slots[ready], -(together / square)[ready])

    # the posterior of a logit -----------------------------------------------------------------------------------

    def energy(self, z: Tensor, evidence: Tensor, transform: Transform) -> Tensor:
        """``U(z)``, for any shapes that go together; weights here are not divided by their prior mean."""
        rest = self._precision(transform) * (z - _MEAN[transform]).square() / 2
        return evidence * _unscaled(z, transform) + rest

    def gradient(self, z: Tensor, evidence: Tensor, transform: Transform) -> Tensor:
        """``dU/dz``."""
        precision = self._precision(transform)
        if transform == "sigmoid":
            s = torch.sigmoid(z)
            return torch.addcmul(precision * z, evidence, torch.addcmul(s, s, s, value=-1))
        if transform == "softmax":
            return torch.addcmul(precision * z, evidence, torch.exp(z))
        return evidence * (z > 0) + precision * (z - _MEAN[transform])

    def _sample(self, evidence: Tensor, transform: Transform, slots: Tensor, visits: Tensor) -> _Chains:
        evidence = evidence.float()
        precision = self._precision(transform)
        std = precision**-0.5 if precision else _STD[transform]
        if transform == "sigmoid":
            start, bend = (-evidence).clamp(-2 * std, 2 * std), 0.02 * evidence.abs()
        elif transform == "softmax":
            # where the prior's pull balances the evidence's push: E std**2 exp(z) = -z
            start = -torch.log1p(evidence * std**2).clamp(max=3 * std)
            bend = evidence * start.exp()
        else:
            # beyond 0 the density falls off over 1 / E
            start, bend = 1 - (std**2 * evidence).clamp(max=1.0), 0.1 * evidence.square()
        precondition = (1 / (std**-2 + bend))[:, None]
        how = Langevin(
            self.temperature, self.step_size, self.step_decay, self.burn_in, self.draws, self.thin, self.chains
        )
        gradient = lambda z: self.gradient(z, evidence[:, None], transform)  # noqa: E731
        draws = sample(gradient, start, slots, visits, how, seed=self.seed, precondition=precondition)
        if not self.temperature:
            return _Chains(draws, {})
        # fresh numbers: those of the visit have been used
        xi = normal(self.seed + 1, slots, visits, 1, self.chains)[0]
        energy = lambda z: self.energy(z, evidence[:, None], transform)  # noqa: E731
        accepted = acceptance(energy, gradient, draws[-1], xi, how, precondition)
        return _Chains(
            draws,
            {
                "rhat": float(rhat(draws).median()),
                "effective_draws": float(effective_draws(draws).median()),
                "acceptance": float(accepted.mean()),
            },
        )

    @functools.cached_property
    def _prior_mean(self) -> float:
        """The mean of w before any evidence: the weight that counts as 1."""
        return self._mean_under_prior(self._transform)

    def _curve(self, total: Tensor, which: int = 0) -> Tensor:
        """P(harmful), or its 5 % or 95 % quantile, for log-odds, share included, without Monte-Carlo noise: float32."""
        points = self._curve_points[which]
        place = ((total.double() + _RANGE) / _GRID).clamp(0, len(points) - 1.001)
        low = place.long()
        left, right = points[low], points[low + 1]
        return torch.lerp(left, right, place - low).float()

    @functools.cached_property
    def _curve_points(self) -> Tensor:
        precision = self._precision("sigmoid") or _STD["sigmoid"] ** -2.0
        width, heat = 10 * precision**-0.5 * max(self.temperature, 1.0) ** 0.5, self.temperature
        z = torch.linspace(-width, width, 2001, dtype=torch.float64)
        totals = torch.arange(-_RANGE, _RANGE + _GRID, _GRID, dtype=torch.float64)[:, None]
        energy = self.energy(z, totals, "sigmoid")
        harmful = torch.sigmoid(-z)
        if not heat:
            return harmful[energy.argmin(1)].expand(3, -1)
        density = torch.softmax(-energy / heat, 1)
        below = density.cumsum(1) - density / 2  # of z, which falls as P(harmful) rises
        places = [(below < share).sum(1).clamp(max=z.numel() - 1) for share in (0.95, 0.05)]
        return torch.stack([(density * harmful).sum(1), *(harmful[place] for place in places)])

    def _mean_under_prior(self, transform: Transform) -> float:
        """The mean of a transform under ``exp(-U / T)`` without scores, by a sum over the logit; T = 0: at the mode."""
        precision, heat = self._precision(transform), self.temperature
        if not precision:
            return float(_unscaled(torch.tensor(_MEAN[transform]), transform))
        width = 10 * (precision**-0.5) * max(heat, 1.0) ** 0.5
        z = torch.linspace(-width, width, 8001, dtype=torch.float64) + _MEAN[transform]
        evidence = torch.tensor(self._share_log_odds(torch.zeros(2)), dtype=torch.float64)
        energy, w = self.energy(z, evidence, transform), _unscaled(z, transform)
        return float((torch.softmax(-energy / heat, 0) * w).sum() if heat else w[energy.argmin()])


@dataclass(frozen=True)
class _Chains:
    draws: Tensor
    diagnostics: dict[str, float]


def _unscaled(z: Tensor, transform: Transform) -> Tensor:
    if transform == "sigmoid":
        return torch.sigmoid(z)
    return torch.exp(z) if transform == "softmax" else z.clamp(min=0)


def _posterior_options(scheduler: BDS) -> dict[str, Any]:
    shared = (*_RELEASED_ONLY, "compat", "transform", "name")
    return {name: value for name, value in settings_of(scheduler).items() if name not in shared}
