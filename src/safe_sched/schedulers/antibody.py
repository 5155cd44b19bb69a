"""Antibody: how likely is a row's answer, against a refusal, under the aligned model? (arXiv 2603.00498)

Its fine-tuning stage weighs row i by a log-likelihood ratio ``r_i`` in nats, low where the model would rather refuse::

    r_i = log p(opens as y_i does | x_i) - log p(opens otherwise | x_i)       "opening", the default
    r_i = NLL(refusal | x_i) - NLL(y_i | x_i)                                 "token_mean", the released code
          the same with sums over tokens                                      "sequence_sum", the paper

Between two ways to open an answer, refusing or not, the first ratio does not ask how well the model knows the task: a
task that is new to it makes every answer unlikely, and the other two ratios low for harmless rows. A row that refuses
what the model would not refuse is as conspicuous as one that complies where it would.

From ratio to weight, with ``logit_i = clip(slope * (r_i - threshold))`` calibrated on safety prompts::

    w_i = sigmoid(logit_i / tau) / its highest value                          "sigmoid": each row for itself
    w_i = exp(r_i / tau) * sum_j n_j / sum_j n_j exp(r_j / tau)               "softmax": over the rows j of a pool

The softmax is the paper's, ``sum_i w_i sum_t CE_it / sum_i w_i n_i`` with n_i label tokens. It is relative: a batch of
nothing but harmful rows keeps its whole mass. The sigmoid turns such a batch away.

**Anchor.** A ratio under a model that an attack has moved says nothing: it inverts. With ``anchor`` a row's ratio is
taken once, under the model that training began with (the adapter switched off, or, where all parameters train, at the
row's first visit), and kept by row. A model to which the task is new refuses some of it in its first steps, so rows
that were not cleared in the first `EARLY` steps get one more look, once as many more are done, at the model as it is
then and only while it still refuses safety prompts. Both looks weigh the same.

**Calibration.** At the start the same ratio is taken for safety prompts, with refusals and with the opening of an
inert compliance. A model that does not refuse them, or a ratio that ranks rows which the model would answer below
compliance with harmful prompts, is *inverted*: the run stops, or falls back, as ``on_inversion`` says.

Cost: see `docs/methods/antibody.md`. 5 bytes per row; no pass over all rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.errors import CoverageError, ModelError, OptionError
from safe_sched.estimators.calibration import LIMIT
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, State
from safe_sched.schedulers.options import options, settings_of

Ratio = Literal["opening", "token_mean", "sequence_sum"]
RefusalCost = Literal["shared_prefix", "first_token", "exact"]

EARLY = 12
"""Optimiser steps in which a ratio may be low because the task is new to the model."""

OTHERS = 8
"""Training rows that the model would answer, below which nothing is said about inversion."""

_NEW, _FINE, _OPENINGS, _ABSTAINS = range(4)  # verdicts
_STEEPEST = 6.0  # nats of logit per nat of ratio


@dataclass
class AntibodyState(State):
    """What is known of every row.

    Attributes:
        ratio: float32 (slots,), r in nats; nan before it was taken.
        looks: uint8 (slots,), 0, 1 in the first `EARLY` steps, 2 where no more are to come.
        steps: Updates so far.
        observed: The step at which safety prompts were asked last.
        strength: float64 (2,), mean log-odds of refusing safety prompts: at the start, and when last looked at.
        threshold, slope: float64 (), of the logit.
        verdict: 0 before the calibration, 1 fine, 2 fell back to openings, 3 abstains.
        source: 0 before the calibration, 1 the adapter switched off, 2 the model as it trains.
        openings: int64 (any,), which of the known openings are compared with.
    """

    sized_later: ClassVar[frozenset[str]] = frozenset({"openings"})

    ratio: Tensor
    looks: Tensor
    steps: int
    observed: int
    strength: Tensor
    threshold: Tensor
    slope: Tensor
    verdict: int
    source: int
    openings: Tensor


@dataclass(frozen=True)
class Check:
    """What a calibration sees of the model at the start.

    Attributes:
        refused: float (prompts,), log-odds of refusing some safety prompts.
        refusing: float (prompts,), ratio of their refusals.
        complying: float (prompts,), ratio of an inert compliance with them.
        others: float (rows,), ratio of training rows whose prompts the model would rather answer.
    """

    refused: Tensor
    refusing: Tensor
    complying: Tensor
    others: Tensor


@options
class Antibody:
    """Likelihood-ratio weights: a row teaches little where the aligned model would rather have refused.

    Args:
        tau: Temperature, > 0: of the softmax in nats of ratio, of the sigmoid in nats of logit.
        ratio: ``"opening"``, ``"token_mean"`` or ``"sequence_sum"``, see `safe_sched.schedulers.antibody`.
        refusals: Refusals to compare with; None: about a hundred that come with the package.
        anchor: Whether a row's ratio is taken under the aligned start and kept. ``"start"``: where all parameters
            train, so that no adapter can be switched off, ask all rows before the first step and not as they come by.
        refusal_cost: ``"shared_prefix"``: one forward of the prompt, on which all refusals grow. ``"first_token"``: the
            first token of a refusal only, read from the training forward. ``"exact"``: a line of its own for every
            prompt with a refusal.
        pool: Of the softmax: the rows of an ``"optimizer_step"`` or of a ``"micro_batch"``.
        gate: ``"sigmoid"`` or ``"softmax"``.
        refusals_per_row: With the two published ratios: refusals that a row is compared with, >= 1; a mean over them.
        on_inversion: ``"stop"``; ``"fallback"``: take openings where a published ratio is inverted, and weigh all rows
            alike where the model does not refuse; ``"ignore"``.

    Raises:
        OptionError: Options that do not go together, or out of range.

    Example:
        The published rule, exactly; and what three ratios mean by default.

        >>> from safe_sched import Antibody
        >>> from safe_sched.rows.index import RowIndex
        >>> published = Antibody(anchor=False, ratio="token_mean", refusal_cost="exact", pool="micro_batch",
        ...                      gate="softmax", refusals_per_row=1, on_inversion="ignore")
        >>> scheduler = Antibody()
        >>> state = scheduler.init(RowIndex(torch.tensor([1, 2, 3])))
        >>> _ = scheduler.learn(state, torch.tensor([0, 1, 2]), torch.tensor([8.0, 3.0, -5.0]))
        >>> [round(w, 2) for w in scheduler.slot_weights(state).tolist()]
        [1.0, 0.95, 0.01]
    """

    name: ClassVar[str] = "antibody"
    state_type = AntibodyState

    tau: Annotated[float, Field(gt=0)] = 1.0
    ratio: Ratio = "opening"
    refusals: tuple[str, ...] | None = None
    anchor: bool | Literal["start"] = True
    refusal_cost: RefusalCost = "shared_prefix"
    pool: Literal["optimizer_step", "micro_batch"] = "optimizer_step"
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    refusals_per_row: Annotated[int, Field(ge=1)] = 1
    on_inversion: Literal["stop", "fallback", "ignore"] = "stop"

    def __post_init__(self) -> None:
        if self.refusals is not None and (not self.refusals or not all(text.strip() for text in self.refusals)):
            raise OptionError("Antibody(refusals=...): give at least one refusal, and no empty text; or leave it out")
        if self.refusals_per_row > 1 and (self.ratio == "opening" or self.refusal_cost == "first_token"):
            raise OptionError(
                f"Antibody(refusals_per_row={self.refusals_per_row}): openings are compared with all refusals at once; "
                'it belongs to ratio="token_mean" and ratio="sequence_sum", with "shared_prefix" or "exact"'
            )

    @property
    def evidence(self) -> str | None:
        """What it learns from: see `safe_sched.scheduler.Evidential`."""
        return "refusal"

    @property
    def needs_nll(self) -> bool:
        """Whether it reads the rows' losses; where it does, they are part of the ratio."""
        return False

    @property
    def reads_ahead(self) -> bool:
        """Whether a micro-batch's weights need the ratios of later ones of the same optimiser step."""
        return self.gate == "softmax" and self.pool == "optimizer_step"

    def settings(self) -> dict[str, object]:
        """The options as plain JSON values."""
        return settings_of(self) | {"refusals": None if self.refusals is None else list(self.refusals)}

    # state ------------------------------------------------------------------------------------------------------

    def init(self, index: RowIndex) -> AntibodyState:
        """See `safe_sched.scheduler.Scheduler.init`."""
        return AntibodyState(
            ratio=torch.full((index.slots,), torch.nan),
            looks=torch.zeros(index.slots, dtype=torch.uint8),
            steps=0,
            observed=0,
            strength=torch.zeros(2, dtype=torch.float64),
            threshold=torch.tensor(0.0, dtype=torch.float64),
            slope=torch.tensor(1.0, dtype=torch.float64),
            verdict=_NEW,
            source=0,
            openings=torch.empty(0, dtype=torch.long),
        )

    def grow(self, state: AntibodyState, index: RowIndex) -> AntibodyState:
        """See `safe_sched.scheduler.Scheduler.grow`."""
        new = index.slots - state.ratio.numel()
        return replace(
            state,
            ratio=torch.cat([state.ratio, torch.full((new,), torch.nan)]),
            looks=torch.cat([state.looks, state.looks.new_zeros(new)]),
        )

    # calibration ------------------------------------------------------------------------------------------------

    def kind(self, state: AntibodyState) -> Ratio:
        """The ratio that is taken now: another than asked for after a fallback."""
        return "opening" if state.verdict == _OPENINGS else self.ratio

    def calibrate(self, state: AntibodyState, check: Check) -> dict[str, float]:
        """Set threshold and slope, before the first step; returns numbers to log.

        Args:
            state: Changed in place.
            check: Ratios of safety prompts, and of training rows.

        Raises:
            ModelError: The ratio is inverted, and ``on_inversion`` says to stop.
        """
        state.strength[:] = check.refused.double().mean()
        state.verdict = _FINE
        refuses = float((check.refused > 0).double().mean())
        if refuses < 0.5:
            self._inverted(
                state,
                _ABSTAINS,
                f"the model refuses {refuses:.0%} of {check.refused.numel()} safety prompts, so what it would refuse "
                "says nothing about which rows are harmful. Start from an aligned model (FlatAlignmentCallback makes "
                'one), give safety_data in the format that it refuses, or use BDS(). With on_inversion="fallback" all '
                "rows are weighed alike.",
            )
        elif self.ratio != "opening" and check.others.numel() >= OTHERS:
            below = (check.complying[:, None] < check.others).double().mean()
            auroc = float(below + (check.complying[:, None] == check.others).double().mean() / 2)
            if auroc < 0.5:
                self._inverted(
                    state,
                    _OPENINGS,
                    f"the ratio {self.ratio!r} is inverted on this data: it ranks training rows that the model would "
                    "answer below compliance with harmful prompts (AUROC "
                    f"{auroc:.2f}, {check.others.numel()} rows), as a task that is new to the model makes it do. "
                    'Use ratio="opening", or on_inversion="fallback" to have it taken from here on.',
                )
        if self.kind(state) == "opening":
            strength = float(state.strength[0])
            threshold, far = 0.0, strength / 2
        else:
            threshold = float((check.complying.double().mean() + check.refusing.double().mean()) / 2)
            far = threshold - float(check.complying.double().mean())
        state.threshold.fill_(threshold)
        state.slope.fill_(min(max(LIMIT / max(far, 1e-6), 1.0), _STEEPEST))
        return self._report(state)

    def _inverted(self, state: AntibodyState, verdict: int, message: str) -> None:
        if self.on_inversion == "stop":
            raise ModelError(f"Antibody: {message}")
        if self.on_inversion == "fallback":
            state.verdict = verdict
            warnings.warn(f"Antibody falls back: {message}", stacklevel=4)

    def observe(self, state: AntibodyState, refused: Tensor, *, unread: bool) -> dict[str, float]:
        """Look at the safety prompts again, while the model trains; returns numbers to log.

        Args:
            state: Changed in place.
            refused: float (prompts,), log-odds of refusing them.
            unread: Whether there are rows whose first ratio this model is to give.

        Raises:
            ModelError: It no longer refuses them, and ``on_inversion`` says to stop.
        """
        state.strength[1] = refused.double().mean()
        refuses = float((refused > 0).double().mean())
        if unread and refuses < 0.5:
            self._inverted(
                state,
                _ABSTAINS,
                f"in training the model has come to refuse only {refuses:.0%} of {refused.numel()} safety prompts, so "
                "it can no longer tell which of the rows still to come are harmful. Give safety_data to train on "
                'beside the rows, lower the learning rate, or train an adapter. With on_inversion="fallback" rows '
                "without a ratio are weighed as if nothing were known of them.",
            )
        return self._report(state)

    def _report(self, state: AntibodyState) -> dict[str, float]:
        return {
            "refusing_safety_prompts": float(state.strength[1]),
            "inverted": float(state.verdict > _FINE),
        }

    # ratios -----------------------------------------------------------------------------------------------------

    def due(self, state: AntibodyState, slots: Tensor) -> Tensor:
        """Whose ratio should be taken now: bool (rows,)."""
        start, now = state.strength.tolist()
        asked = self.asked(state, slots)
        return asked if not self.anchor or now >= max(start / 2, 0) else asked & (state.looks[slots] == 0)

    def asked(self, state: AntibodyState, slots: Tensor) -> Tensor:
        """Whose ratio is still to be taken, as long as safety prompts are refused: bool (rows,)."""
        if state.verdict == _ABSTAINS:
            return torch.zeros(slots.numel(), dtype=torch.bool)
        if not self.anchor:
            return torch.ones(slots.numel(), dtype=torch.bool)
        asked = state.looks[slots] == 0
        if self.kind(state) == "opening" and state.steps >= 2 * EARLY:
            asked |= (state.looks[slots] == 1) & (self._logits(state, slots) < LIMIT / 2)
        return asked

    def doubtful(self, state: AntibodyState, slots: Tensor) -> Tensor:
        """See `safe_sched.scheduler.Evidential`: none; a row that is not cleared is looked at when it comes by."""
        return torch.zeros(slots.numel(), dtype=torch.bool)

    def learn(self, state: AntibodyState, slots: Tensor, scores: Tensor) -> dict[str, float]:
        """Take ratios in.

        Args:
            state: Changed in place.
            slots: int64 (rows,).
            scores: float (rows,), r in nats.
        """
        slots, place = torch.unique(slots, return_inverse=True)
        each = torch.bincount(place, minlength=slots.numel())
        ratio = torch.zeros(slots.numel(), dtype=torch.float64).index_add_(0, place, scores.double()) / each
        kept = state.ratio[slots].double()
        if self.anchor:  # two looks weigh the same, and a copy of the row in another micro-batch is no look
            ratio = torch.where(torch.isnan(kept), ratio, (ratio + kept) / 2)
            ratio = torch.where(state.looks[slots] == 2, kept, ratio)
        state.ratio[slots] = ratio.float()
        state.looks[slots] = 1 if state.steps < EARLY else 2
        return {}

    def _logits(self, state: AntibodyState, where: Any) -> Tensor:
        """float32, positive for harmless rows, within +-LIMIT; nan where no ratio was taken."""
        return (float(state.slope) * (state.ratio[where] - float(state.threshold))).clamp(-LIMIT, LIMIT)

    # weights ----------------------------------------------------------------------------------------------------

    def weights(self, state: AntibodyState, batch: Observation) -> Tensor:
        """See `safe_sched.scheduler.Scheduler.weights`.

        Raises:
            CoverageError: A row of the pool was not compared with a refusal.
        """
        slots, tokens = batch.slots, batch.label_tokens
        if batch.step_rows is not None and self.reads_ahead:
            slots, tokens = batch.step_rows
        known = ~torch.isnan(state.ratio[slots])
        if state.verdict != _ABSTAINS and not bool(known.all()):
            raise CoverageError(
                f"{int((~known).sum())} rows of step {batch.step} were not compared with a refusal. Antibody needs an "
                'integration that runs the model for it (evidence "refusal"), such as SafeSchedCallback.'
            )
        if self.gate == "sigmoid" or not bool(known.any()):
            return self._known_or_one(state, batch.slots)
        x, tokens = state.ratio[slots][known].double() / self.tau, tokens[known]
        total = (torch.exp(x - x.max()) * tokens).sum() / tokens.sum()
        mine = torch.exp(state.ratio[batch.slots].double() / self.tau - x.max()) / total
        return torch.where(torch.isnan(mine), 1.0, mine).float()

    def _known_or_one(self, state: AntibodyState, where: Any) -> Tensor:
        # in double: a row's weight may not depend on its place in the batch, and the highest must be exactly 1
        most = torch.sigmoid(torch.tensor(LIMIT / self.tau, dtype=torch.float64))
        logits = self._logits(state, where).double()
        return torch.where(torch.isnan(logits), 1.0, torch.sigmoid(logits / self.tau) / most).float()

    def slot_weights(self, state: AntibodyState, slots: Any = slice(None)) -> Tensor:
        """See `scheduler.Scheduler.slot_weights`; with softmax as if all rows compared so far were the pool."""
        if self.gate == "sigmoid":
            return self._known_or_one(state, slots)
        known = ~torch.isnan(state.ratio)
        if not bool(known.any()):
            return torch.ones(state.ratio.numel())[slots]
        x = state.ratio.double() / self.tau
        relative = torch.exp(x - x[known].max())
        return torch.where(known, relative / relative[known].mean(), 1.0).float()[slots]

    def update(self, state: AntibodyState, step: Observation) -> dict[str, float]:
        """See `safe_sched.scheduler.Scheduler.update`: there is nothing to learn from losses."""
        state.steps += 1
        return {}

    def log_odds(self, state: AntibodyState, slots: Any) -> Tensor:
        """Evidence that rows are harmful, for `safe_sched.schedulers.combined`: float32, nats; 0 where unknown."""
        return torch.nan_to_num(-self._logits(state, slots), nan=0.0)

    def columns(self, state: AntibodyState) -> dict[str, Tensor]:
        """What the table says of every slot beside its weight."""
        return {
            "p_harmful": torch.sigmoid(self.log_odds(state, slice(None))),
            "ratio": state.ratio,
        }
