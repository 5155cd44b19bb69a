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

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.errors import CoverageError, ModelError, OptionError
from safe_sched.estimators.calibration import LIMIT
from safe_sched.needs import Need, OnInversion, Ratio, RefusalCost, RefusalOdds
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, PerRow, Scheduler, State, mean_by_slot, options

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
        strength: float64 (2,), mean log-odds of refusing safety prompts: at the start, and when last looked at.
        threshold, slope: float64 (), of the logit.
        verdict: 0 before the calibration, 1 fine, 2 fell back to openings, 3 abstains.
    """

    ratio: Annotated[Tensor, PerRow(math.nan)]
    looks: Annotated[Tensor, PerRow(dtype=torch.uint8)]
    steps: int
    strength: Tensor
    threshold: Tensor
    slope: Tensor
    verdict: int


@options
class Antibody(Scheduler[AntibodyState]):
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
        >>> _ = scheduler.learn(state, "refusal_odds", torch.tensor([0, 1, 2]), torch.tensor([8.0, 3.0, -5.0]))
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
    on_inversion: OnInversion = "stop"

    def __post_init__(self) -> None:
        if self.refusals is not None and (not self.refusals or not all(text.strip() for text in self.refusals)):
            raise OptionError("Antibody(refusals=...): give at least one refusal, and no empty text; or leave it out")
        if self.refusals_per_row > 1 and (self.ratio == "opening" or self.refusal_cost == "first_token"):
            raise OptionError(
                f"Antibody(refusals_per_row={self.refusals_per_row}): openings are compared with all refusals at once; "
                'it belongs to ratio="token_mean" and ratio="sequence_sum", with "shared_prefix" or "exact"'
            )

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Scheduler.needs`."""
        return (self._need(self.ratio),)

    def needs_now(self, state: AntibodyState) -> tuple[Need, ...]:
        """See `Scheduler.needs_now`: after a fallback, openings in the place of a published ratio."""
        return (self._need(self.kind(state)),)

    def _need(self, ratio: Ratio) -> RefusalOdds:
        return RefusalOdds(
            ratio,
            refusals=self.refusals,
            anchor=self.anchor,
            cost=self.refusal_cost,
            refusals_per_row=self.refusals_per_row,
            ahead=self.reads_ahead,
            on_inversion=self.on_inversion,
        )

    @property
    def reads_ahead(self) -> bool:
        """Whether a micro-batch's weights need the ratios of later ones of the same optimiser step."""
        return self.gate == "softmax" and self.pool == "optimizer_step"

    def settings(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return super().settings() | {"refusals": None if self.refusals is None else list(self.refusals)}

    # state ------------------------------------------------------------------------------------------------------

    def init(self, index: RowIndex) -> AntibodyState:
        """See `Scheduler.init`."""
        return AntibodyState.fresh(
            index.slots,
            steps=0,
            strength=torch.zeros(2, dtype=torch.float64),
            threshold=torch.tensor(0.0, dtype=torch.float64),
            slope=torch.tensor(1.0, dtype=torch.float64),
            verdict=_NEW,
        )

    # calibration ------------------------------------------------------------------------------------------------

    def kind(self, state: AntibodyState) -> Ratio:
        """The ratio that is taken now: another than asked for after a fallback."""
        return "opening" if state.verdict == _OPENINGS else self.ratio

    def calibrate(self, state: AntibodyState, need: str, known: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Scheduler.calibrate`: at the start set threshold and slope, later look at the safety prompts again.

        Args:
            state: Changed in place.
            need: ``"refusal_odds"``.
            known: ``refused``, float (prompts,), log-odds of refusing some safety prompts. At the start besides:
                ``refusing`` and ``complying``, float (prompts,), the ratios of their refusals and of an inert
                compliance with them; ``others``, float (rows,), those of training rows whose prompts the model would
                rather answer. Later: ``unread``, whether there are rows whose first ratio this model is to give.

        Raises:
            ModelError: The ratio is inverted, or the model no longer refuses, and ``on_inversion`` says to stop.
        """
        if "unread" in known:
            return self._observe(state, known["refused"], unread=bool(known["unread"]))
        refused, refusing, complying, others = (known[name] for name in ("refused", "refusing", "complying", "others"))
        state.strength[:] = refused.double().mean()
        state.verdict = _FINE
        refuses = float((refused > 0).double().mean())
        if refuses < 0.5:
            self._inverted(
                state,
                _ABSTAINS,
                f"the model refuses {refuses:.0%} of {refused.numel()} safety prompts, so what it would refuse "
                "says nothing about which rows are harmful. Start from an aligned model (FlatAlignmentCallback makes "
                'one), give safety_data in the format that it refuses, or use BDS(). With on_inversion="fallback" all '
                "rows are weighed alike.",
            )
        elif self.ratio != "opening" and others.numel() >= OTHERS:
            below = (complying[:, None] < others).double().mean()
            auroc = float(below + (complying[:, None] == others).double().mean() / 2)
            if auroc < 0.5:
                self._inverted(
                    state,
                    _OPENINGS,
                    f"the ratio {self.ratio!r} is inverted on this data: it ranks training rows that the model would "
                    "answer below compliance with harmful prompts (AUROC "
                    f"{auroc:.2f}, {others.numel()} rows), as a task that is new to the model makes it do. "
                    'Use ratio="opening", or on_inversion="fallback" to have it taken from here on.',
                )
        if self.kind(state) == "opening":
            strength = float(state.strength[0])
            threshold, far = 0.0, strength / 2
        else:
            threshold = float((complying.double().mean() + refusing.double().mean()) / 2)
            far = threshold - float(complying.double().mean())
        state.threshold.fill_(threshold)
        state.slope.fill_(min(max(LIMIT / max(far, 1e-6), 1.0), _STEEPEST))
        return self._report(state)

    def _inverted(self, state: AntibodyState, verdict: int, message: str) -> None:
        if self.on_inversion == "stop":
            raise ModelError(f"Antibody: {message}")
        if self.on_inversion == "fallback":
            state.verdict = verdict
            warnings.warn(f"Antibody falls back: {message}", stacklevel=4)

    def _observe(self, state: AntibodyState, refused: Tensor, *, unread: bool) -> dict[str, float]:
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

    def due(self, state: AntibodyState, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.due`: rows without a ratio, and doubtful ones as long as safety prompts are refused."""
        start, now = state.strength.tolist()
        unknown = self.unknown(state, need, slots)
        if self.anchor and now < max(start / 2, 0):
            return unknown
        return unknown | self.doubtful(state, need, slots)

    def unknown(self, state: AntibodyState, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.unknown`: rows without a ratio."""
        return (state.looks[slots] == 0) & (state.verdict != _ABSTAINS)

    def doubtful(self, state: AntibodyState, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.doubtful`: all without an anchor; else rows that were not cleared early on."""
        if state.verdict == _ABSTAINS or (self.anchor and (self.kind(state) != "opening" or state.steps < 2 * EARLY)):
            return torch.zeros(slots.numel(), dtype=torch.bool)
        if not self.anchor:
            return torch.ones(slots.numel(), dtype=torch.bool)
        return (state.looks[slots] == 1) & (self._logits(state, slots) < LIMIT / 2)

    def revisit(self, state: AntibodyState, slots: Tensor) -> Tensor:
        """See `Scheduler.revisit`: twice at most; what is measured is measured again as it comes by."""
        return self.due(state, RefusalOdds.name, slots)

    def learn(self, state: AntibodyState, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        """Take ratios in.

        Args:
            state: Changed in place.
            need: ``"refusal_odds"``.
            slots: int64 (rows,).
            values: float (rows,), r in nats.
        """
        if need != RefusalOdds.name:
            return super().learn(state, need, slots, values)
        slots, ratio = mean_by_slot(slots, values.double())
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
        """See `Scheduler.weights`.

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
                "integration that measures refusal_odds, such as SafeSchedCallback."
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
        """See `Scheduler.slot_weights`; with softmax as if all rows compared so far were the pool."""
        if self.gate == "sigmoid":
            return self._known_or_one(state, slots)
        known = ~torch.isnan(state.ratio)
        if not bool(known.any()):
            return torch.ones(state.ratio.numel())[slots]
        x = state.ratio.double() / self.tau
        relative = torch.exp(x - x[known].max())
        return torch.where(known, relative / relative[known].mean(), 1.0).float()[slots]

    def update(self, state: AntibodyState, step: Observation) -> dict[str, float]:
        """See `Scheduler.update`: there is nothing to learn from losses."""
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
