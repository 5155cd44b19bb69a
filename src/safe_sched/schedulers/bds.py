"""BDS: Bayesian Data Scheduler, one logit per row (arXiv 2510.27172), with its evidence term.

The joint posterior of model and row logits z is::

    p(theta, z | D_ft, D_safe)  ~  p(D_safe | theta) * p(D_ft | theta, z) / p(D_ft | z) * p(theta) p(z)

For one row, with the model held, the middle factors leave ``exp(-E_i w(z_i))``. The evidence ``E_i`` is the difference
between the loss under the safety-aware model and under one that does not care, on a scale on which it is the log-odds
of the row being harmful (`safe_sched.estimators.calibration`); scores of one row add up. So the energy of a row's logit
is::

    U(z_i) = E_i sigmoid(z_i) + z_i**2 / (2 std**2)

and it is sampled by preconditioned SGLD (`safe_sched.estimators.sgld`) whenever a row's evidence has changed. The row's
weight is the posterior mean of ``w = sigmoid(z) / its prior mean``, its probability of being harmful that of ``1 -
sigmoid(z)``. Weight 1 is what a row has before anything is known of it. The paper's released code drops the evidence
and takes ``w = N softmax(z)``; see `safe_sched.schedulers.bds_released`.

**The share of harmful rows.** Each row is harmful with a share q, ``q ~ Beta(a, b)`` with ``a + b = prior_rows`` and
mean ``prior_share``. Integrating q out, with H the sum of the M judged rows' harmful probabilities, gives::

    Beta(a + H, b + M - H) / Beta(a, b)

Its derivative by one row's ``1 - sigmoid(z)`` is ``digamma(a + H) - digamma(b + M - H)``: close to the log-odds of the
share found so far. It is added to every row's evidence, so one row in ten thousand needs more evidence than one in two.
The released prior has the wrong sign.

============  ==========================  ==================
symbol        name here                   unit
============  ==========================  ==================
z             drawn, not kept             1
w             weights                     1
E             ``log_odds``                nats
x             score                       1, see `safe_sched.estimators.calibration`
============  ==========================  ==================

Cost: nothing for a step without new scores; otherwise some 50 updates of the rows that were scored, all at once.
12 bytes per row; no pass over all rows, and no pass of the model but the probe's, see `docs/methods/bds.md`.
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
from safe_sched.needs import NLL, Need, Probe, ReferenceLoss
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, PerRow, Scheduler, State, mean_by_slot, options

RESOLVED = 3.0
"""Log-odds, 20 to 1, beyond which a row is not measured again."""

EARLY = 12
"""Optimiser steps in which scores are doubtful: a task that is new to the model may look like something to refuse."""

_RANGE, _GRID = 60.0, 0.1  # of the log-odds for which P(harmful) is tabulated
_STD = 4.0  # of a logit under its prior
_BURN_IN, _CHAINS, _STEP_SIZE = 16, 8, 0.25  # of SGLD; the step relative to the width of the posterior


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
        steps: Updates so far.
        calibration: float64 (4,), see `safe_sched.estimators.calibration.Calibration`.
        judged: float64 (2,), rows with a score, and the sum of their probabilities.
        reference: float32 (slots,), losses of the reference model, nan where unknown; or (0,).
        row_prior: float16 (slots,), log-odds that were given before the run (`safe_sched.estimators.prior`), or (0,).
    """

    log_odds: Annotated[Tensor, PerRow(dtype=torch.float16)]
    harmful: Annotated[Tensor, PerRow(dtype=torch.float16)]
    low: Annotated[Tensor, PerRow(dtype=torch.float16)]
    high: Annotated[Tensor, PerRow(1, dtype=torch.float16)]
    sampled: Annotated[Tensor, PerRow(dtype=torch.float16)]
    scored: Annotated[Tensor, PerRow(dtype=torch.uint8)]
    since: Annotated[Tensor, PerRow(dtype=torch.uint8)]
    steps: int
    calibration: Tensor
    judged: Tensor
    reference: Tensor
    row_prior: Tensor


@options
class BDS(Scheduler[BDSState]):
    """Bayesian Data Scheduler with one logit per training row. The defaults need no tuning.

    Args:
        evidence: Where a row's score comes from: ``"probe"`` (the default), ``"reference"``, or None to leave the
            weights at 1 (and to bring scores yourself, through ``session.learn("probe", ...)``).
        reference: For ``evidence="reference"``: a file written by ``safe-sched losses``, or ``"adapter:NAME"`` for a
            PEFT adapter of the model that was trained without safety data.
        prior_share: Share of harmful rows expected, in (0, 1).
        prior_rows: How many rows that expectation is worth, > 0.
        temperature: 1 samples the posterior, 0 takes its mode.
        draws: Kept draws of each chain, >= 4.
        max_probes: How often one row is measured at most, 1 to 255; a row is measured until its log-odds are beyond 3.
        seed: Random seed of the chains.

    Raises:
        OptionError: Options that do not go together, or out of range.

    Example:
        Three rows, of which the last resists staying safe.

        >>> from safe_sched import BDS
        >>> from safe_sched.rows.index import RowIndex
        >>> scheduler = BDS()
        >>> state = scheduler.init(RowIndex(torch.tensor([1, 2, 3])))
        >>> for _ in range(3):
        ...     _ = scheduler.learn(state, "probe", torch.tensor([0, 1, 2]), torch.tensor([0.0, 0.1, 1.0]))
        >>> [round(w) for w in scheduler.slot_weights(state).tolist()]
        [1, 1, 0]
    """

    name: ClassVar[str] = "bds"
    state_type = BDSState
    takes_prior = True

    evidence: Literal["probe", "reference"] | None = "probe"
    reference: str | None = None
    prior_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    prior_rows: Annotated[float, Field(gt=0)] = 10.0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    draws: Annotated[int, Field(ge=4)] = 32
    max_probes: Annotated[int, Field(ge=1, le=255)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0

    def __post_init__(self) -> None:
        if (self.reference is not None) != (self.evidence == "reference"):
            raise OptionError(
                'BDS: evidence="reference" and reference=... (a file written by `safe-sched losses`, or '
                '"adapter:NAME") go together'
            )

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Scheduler.needs`."""
        if self.evidence == "reference":
            return (NLL(),) if self.adapter is None else (NLL(), ReferenceLoss(self.adapter))
        return (Probe(),) if self.evidence == "probe" else ()

    @property
    def adapter(self) -> str | None:
        """The PEFT adapter whose losses are the reference, where that is one."""
        kind, _, name = (self.reference or "").partition(":")
        return name if kind == "adapter" else None

    # state ------------------------------------------------------------------------------------------------------

    def init(self, index: RowIndex) -> Any:
        """See `Scheduler.init`.

        Raises:
            DataError: The reference file lacks a row of the training set.
        """
        n = index.slots
        from_file = self.evidence == "reference" and self.adapter is None
        return BDSState.fresh(
            n,
            harmful=torch.full((n,), 1 - self._prior_mean, dtype=torch.float16),
            steps=0,
            calibration=Calibration.fresh(),
            judged=torch.zeros(2, dtype=torch.float64),
            reference=load_reference(Path(str(self.reference)), index) if from_file else self._unknown_losses(n),
            row_prior=torch.empty(0, dtype=torch.float16),
        )

    def with_prior(self, state: Any, prior: RowPrior) -> Any:
        """See `Scheduler.with_prior`: what is known of a row before the run counts like a score."""
        told = prior.log_odds.half()
        known, total = told != 0, told.float() + self.share_log_odds(state.judged)
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
        """See `Scheduler.grow`: new rows start where all rows started."""
        fresh, old = self.init(index), state.slots
        longer = {
            name: torch.cat([getattr(state, name), getattr(fresh, name)[old:]]) for name in ("harmful", "reference")
        }
        return replace(state.grown(index.slots), **longer)

    # weights ----------------------------------------------------------------------------------------------------

    def weights(self, state: Any, batch: Observation) -> Tensor:
        """See `Scheduler.weights`."""
        return self.slot_weights(state, batch.slots)

    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        """See `Scheduler.slot_weights`."""
        benign = (1 - self._now(state, slots, state.harmful)) / self._prior_mean
        return torch.where(self._known(state, slots), benign, 1.0)

    def _known(self, state: BDSState, where: Any) -> Tensor:
        """Of which rows something is known: a score, or a prior of their own."""
        scored = state.scored[where] > 0
        return scored | (state.row_prior[where] != 0) if state.row_prior.numel() else scored

    def said(self, state: BDSState, where: Any) -> Tensor:
        """Log-odds of rows by their scores and their own prior, float16."""
        told = state.log_odds[where]
        return told + state.row_prior[where] if state.row_prior.numel() else told

    def _now(self, state: BDSState, where: Any, sampled: Tensor, which: int = 0) -> Tensor:
        """What was sampled of P(harmful), float32, with the change since in the share found: exact, by a sum over z."""
        then = state.sampled[where].float()
        now = torch.where(self._known(state, where), self._total(state, where), then)
        return (sampled[where].float() + self._curve(now, which) - self._curve(then, which)).clamp(0, 1)

    def log_odds(self, state: Any, slots: Any) -> Tensor:
        """See `Scheduler.log_odds`: what scores say."""
        return state.log_odds[slots].float()

    def columns(self, state: Any) -> dict[str, Tensor]:
        """See `Scheduler.columns`."""
        everywhere = slice(None)
        p = self._now(state, everywhere, state.harmful)
        return {
            "p_harmful": p,
            "p_harmful_low": torch.minimum(self._now(state, everywhere, state.low, 1), p),
            "p_harmful_high": torch.maximum(self._now(state, everywhere, state.high, 2), p),
            "log_odds": state.log_odds.float(),
            "scored": state.scored.to(torch.int32),
            **self.prior_column(state),
        }

    def prior_column(self, state: BDSState) -> dict[str, Tensor]:
        """The rows' own prior log-odds for the table, where they were given."""
        return {"prior_log_odds": state.row_prior.float()} if state.row_prior.numel() else {}

    # learning ---------------------------------------------------------------------------------------------------

    def due(self, state: Any, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.due`: rows that are still open, and those without a reference loss."""
        if need == "reference_loss":
            return torch.isnan(state.reference[slots])
        if self.evidence != "probe":
            return torch.zeros(slots.numel(), dtype=torch.bool)
        unsure = self._total(state, slots).abs() < RESOLVED
        return (
            (state.scored[slots] == 0)
            | (unsure & (state.scored[slots] < self.max_probes))
            | self.doubtful(state, need, slots)
        )

    def doubtful(self, state: Any, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.doubtful`.

        Those that were not cleared in the first `EARLY` updates, once as many more are done: where the task is new to
        the model, it is about to refuse harmless rows too.
        """
        if self.evidence != "probe":
            return torch.zeros(slots.numel(), dtype=torch.bool)
        seen = (state.scored[slots] > 0) & (state.scored[slots] < self.max_probes)
        early = (state.since[slots] < EARLY) & (state.steps >= 2 * EARLY)
        return seen & early & (self._total(state, slots) > -RESOLVED)

    def revisit(self, state: Any, slots: Tensor) -> Tensor:
        """See `Scheduler.revisit`."""
        return self.doubtful(state, Probe.name, slots)

    def _total(self, state: BDSState, slots: Any) -> Tensor:
        return self.said(state, slots).float() + self.share_log_odds(state.judged)

    def update(self, state: Any, step: Observation) -> dict[str, float]:
        """See `Scheduler.update`: scores against a reference need no probe."""
        state.steps += 1
        if self.evidence != "reference":
            return {}
        known = torch.isfinite(state.reference[step.slots])
        return self._take(state, step.slots[known], (step["nll"] - state.reference[step.slots])[known])

    def learn(self, state: Any, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        """Take scores in, and sample the logits of their rows again; or reference losses.

        Args:
            state: Changed in place.
            need: ``"probe"`` or ``"reference_loss"``.
            slots: int64 (rows,).
            values: float (rows,), finite; scores are positive where staying safe makes the row harder to learn.

        Returns:
            Numbers to log: the calibration, and how the chains did.
        """
        if need == "reference_loss":
            state.reference[slots] = values
            return {}
        if need != Probe.name:
            return super().learn(state, need, slots, values)
        return self._take(state, slots, values)

    def _take(self, state: BDSState, slots: Tensor, scores: Tensor) -> dict[str, float]:
        if not slots.numel():
            return {}
        slots, score = mean_by_slot(slots, scores.double())
        calibration = Calibration(state.calibration)
        says = calibration.fit(score).float()
        if self.evidence == "probe":
            # a model that has learned to comply has nothing to lose: a low score clears a row the first time only
            later = (state.scored[slots] > 0) & (state.since[slots] >= EARLY)
            says = torch.where(later, says.clamp(min=0), says)
        if self.evidence != "reference":  # whose scores of one row are one measurement, carried on
            says += state.log_odds[slots]
        state.log_odds[slots] = says.half()
        state.since[slots] = min(state.steps, 255)
        new = state.scored[slots] == 0
        state.harmful[slots[new]] = 0.0
        state.scored[slots] = (state.scored[slots].long() + 1).clamp(max=255).to(torch.uint8)
        diagnostics = self._resample(state, slots)
        state.judged[0] += float(new.sum())  # only now: till then they would count as judged and harmless
        return {
            **diagnostics,
            "score_variance": calibration.variance,
            "score_harmful_mean": calibration.harmful_mean,
            "harmful_rows": float(state.judged[1]),
            "rows_scored": float(state.judged[0]),
        }

    def _resample(self, state: BDSState, slots: Tensor) -> dict[str, float]:
        """Sample the logits of some scored rows, distinct ones, and keep what their draws say."""
        total = self._total(state, slots)
        draws, diagnostics = self.sample(total, slots, state.scored[slots].long())
        u = torch.sigmoid(draws)
        before = state.harmful[slots].double()
        state.harmful[slots] = (1 - u.mean((0, 2))).half()
        harmful = (1 - u).transpose(0, 1).flatten(1)
        for edge, share in ((state.low, 0.05), (state.high, 0.95)):
            edge[slots] = harmful.kthvalue(math.ceil(share * harmful.shape[1]), dim=1).values.half()
        state.judged[1] += (state.harmful[slots].double() - before).sum()
        state.sampled[slots] = total.half()
        return diagnostics

    def share_log_odds(self, judged: Tensor) -> float:
        """The harmful-share prior's log-odds for one row, given the rows judged so far."""
        a = self.prior_rows * self.prior_share
        b = self.prior_rows - a
        rows, harmful = float(judged[0]), min(max(float(judged[1]), 0.0), float(judged[0]))
        pair = torch.digamma(torch.tensor([a + harmful, b + rows - harmful], dtype=torch.float64))
        return float(pair[0] - pair[1])

    # the posterior of a logit -----------------------------------------------------------------------------------

    def energy(self, z: Tensor, evidence: Tensor) -> Tensor:
        """``U(z)``, for any shapes that go together; weights here are not divided by their prior mean."""
        return evidence * torch.sigmoid(z) + z.square() / (2 * _STD**2)

    def gradient(self, z: Tensor, evidence: Tensor) -> Tensor:
        """``dU/dz``."""
        s = torch.sigmoid(z)
        return torch.addcmul(_STD**-2.0 * z, evidence, torch.addcmul(s, s, s, value=-1))

    def sample(self, evidence: Tensor, slots: Tensor, visits: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Draws of the logits of some rows, and diagnostics of the chains.

        Args:
            evidence: float (rows,), E with the share's log-odds, nats.
            slots: int64 (rows,), distinct.
            visits: int64 (rows,), how often each was scored; with the slot it seeds the row's noise.

        Returns:
            float32 (draws, rows, chains); medians of R-hat, effective draws and mean acceptance.
        """
        evidence = evidence.float()
        start, bend = (-evidence).clamp(-2 * _STD, 2 * _STD), 0.02 * evidence.abs()
        precondition = (1 / (_STD**-2 + bend))[:, None]
        how = Langevin(self.temperature, _STEP_SIZE, burn_in=_BURN_IN, draws=self.draws, chains=_CHAINS)
        gradient = lambda z: self.gradient(z, evidence[:, None])  # noqa: E731
        draws = sample(gradient, start, slots, visits, how, seed=self.seed, precondition=precondition)
        if not self.temperature:
            return draws, {}
        # fresh numbers: those of the visit have been used
        xi = normal(self.seed + 1, slots, visits, 1, _CHAINS)[0]
        energy = lambda z: self.energy(z, evidence[:, None])  # noqa: E731
        accepted = acceptance(energy, gradient, draws[-1], xi, how, precondition)
        return draws, {
            "rhat": float(rhat(draws).median()),
            "effective_draws": float(effective_draws(draws).median()),
            "acceptance": float(accepted.mean()),
        }

    @functools.cached_property
    def _prior_mean(self) -> float:
        """The mean of ``sigmoid(z)`` before any evidence, which counts as weight 1; at temperature 0, the mode."""
        heat = self.temperature
        width = 10 * _STD * max(heat, 1.0) ** 0.5
        z = torch.linspace(-width, width, 8001, dtype=torch.float64)
        evidence = torch.tensor(self.share_log_odds(torch.zeros(2)), dtype=torch.float64)
        energy, w = self.energy(z, evidence), torch.sigmoid(z)
        return float((torch.softmax(-energy / heat, 0) * w).sum() if heat else w[energy.argmin()])

    def _curve(self, total: Tensor, which: int = 0) -> Tensor:
        """P(harmful), or its 5 % or 95 % quantile, for log-odds, share included, without Monte-Carlo noise: float32."""
        points = self._curve_points[which]
        place = ((total.double() + _RANGE) / _GRID).clamp(0, len(points) - 1.001)
        low = place.long()
        left, right = points[low], points[low + 1]
        return torch.lerp(left, right, place - low).float()

    @functools.cached_property
    def _curve_points(self) -> Tensor:
        width, heat = 10 * _STD * max(self.temperature, 1.0) ** 0.5, self.temperature
        z = torch.linspace(-width, width, 2001, dtype=torch.float64)
        totals = torch.arange(-_RANGE, _RANGE + _GRID, _GRID, dtype=torch.float64)[:, None]
        energy = self.energy(z, totals)
        harmful = torch.sigmoid(-z)
        if not heat:
            return harmful[energy.argmin(1)].expand(3, -1)
        density = torch.softmax(-energy / heat, 1)
        below = density.cumsum(1) - density / 2  # of z, which falls as P(harmful) rises
        places = [(below < share).sum(1).clamp(max=z.numel() - 1) for share in (0.95, 0.05)]
        return torch.stack([(density * harmful).sum(1), *(harmful[place] for place in places)])
