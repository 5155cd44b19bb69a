"""Lisa in a trainer: safe phases between the trainer's own steps, and the pull that ties the two together.

User steps are the trainer's own, so batches, counters and schedules are those of the plain run and no batch is lost.
The pull is put into the empty gradients before a step, so clipping sees the sum. When a user phase is full, the safe
phase runs at the end of that step, before the trainer saves: a checkpoint never lies within one. A safe step is an
optimiser step like the trainer's: same optimiser, autocast and clipping. Its learning rate is the mean one of the user
phase that it follows; at the end of a schedule that falls to 0 the current one would teach nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from safe_sched.errors import ModelError, OptionError, StateError
from safe_sched.scheduler import Scheduler
from safe_sched.schedulers.lisa import Lisa, LisaState, copy_of, distance, pull
from safe_sched.training.session import Session
from safe_sched_hf.distributed import telling
from safe_sched_hf.safety import SafetyData, SafetySet, backward_safety_share


class Alternation:
    """The turns of one ``train()``.

    Args:
        trainer: At the start of training, with its optimiser.
        session: Of a `Lisa`, before a saved state is loaded into it.
        safety: Its safety rows; None where it takes no safe steps.
        weight: Factor of the safety loss.

    Raises:
        ModelError: The optimiser has no gradients to add to.
        OptionError: Training ends before the first user phase does.
    """

    def __init__(self, trainer: Trainer, session: Session, safety: SafetySet | None, weight: float) -> None:
        assert isinstance(session.scheduler, Lisa)
        refuse_optimizer(trainer)
        _require_a_turn(session.scheduler, trainer.state.max_steps)
        self.trainer = trainer
        self.session = session
        self.scheduler = session.scheduler
        self.safety = safety
        self.weight = weight
        self.state.rates = torch.zeros(len(self._groups), dtype=torch.float64)
        self._switch()

    @property
    def state(self) -> LisaState:
        """Where in its turns the run is."""
        state = self.session.state
        assert isinstance(state, LisaState)
        return state

    @property
    def _model(self) -> nn.Module:
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        return model

    @property
    def _optimizer(self) -> Any:
        return self.trainer.optimizer

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def resumed(self) -> None:
        """Put a loaded anchor where the parameters are.

        Raises:
            StateError: It is not one of these parameters.
        """
        anchor = self.state.anchor
        for name, parameter in self._parameters().items() if self.scheduler.rho else ():
            if name not in anchor or anchor[name].shape != parameter.shape:
                raise StateError(
                    f"the saved state has no anchor of the shape {tuple(parameter.shape)} for {name}: it belongs to "
                    "another model. Resume with the same model and adapter, or start again without resuming."
                )
            anchor[name] = anchor[name].to(parameter)

    # a user step ------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """The pull of a user step, on empty gradients."""
        self._pull()

    def after_optimizer(self) -> None:
        """Note the learning rates of a user step, before its schedule goes on."""
        self.state.rates += torch.tensor([float(group["lr"]) for group in self._groups], dtype=torch.float64)

    def after_step(self, *, last: bool, log: bool) -> dict[str, float]:
        """A safe phase, where one is due.

        Args:
            last: Whether training ends with this step.
            log: Whether the trainer is about to log.

        Returns:
            Numbers to log.
        """
        found: dict[str, float] = {}
        due = self.scheduler.due(self.state, last=last)
        if self.scheduler.rho and (log or due):
            found["safe_sched/user_distance"] = distance(self._parameters(), self.state.anchor)
        if due:
            found |= self._safe_phase(due)
        return found | ({"safe_sched/safe_steps": float(self.state.safe_steps)} if log else {})

    def summary(self) -> dict[str, int]:
        """For the manifest: optimiser steps on safety rows, and how many rows they took, repeats counted."""
        rows = 0 if self.safety is None else self.state.safe_steps * self.safety.batch_size
        return {"safe_steps": self.state.safe_steps, "safety_rows_trained_on": rows}

    # a safe phase -----------------------------------------------------------------------------------------------

    def _safe_phase(self, steps: int) -> dict[str, float]:
        self._switch()
        losses = []
        with self._mean_rates():
            for _ in range(steps):
                losses.append(self._safe_step())
                self.state.safe_steps += 1
        found = {"safe_sched/safety_loss": sum(losses) / len(losses)}
        if self.scheduler.rho:
            found["safe_sched/safe_distance"] = distance(self._parameters(), self.state.anchor)
        self._switch()
        self.state.since = 0
        self.state.rates.zero_()
        return found

    def _safe_step(self) -> float:
        trainer, model, number = self.trainer, self._model, self.state.safe_steps
        assert self.safety is not None
        _train_mode(self._optimizer)
        self._pull()
        exchange = self.session.exchange
        with telling(exchange):
            # no backward of the trainer's follows in which the ranks would average their gradients
            loss = backward_safety_share(
                trainer, self.safety, number, self.weight, f"in safe step {number}", exchange, reduce=exchange.ranks > 1
            )
        if trainer.args.max_grad_norm > 0:
            trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        self._optimizer.step()
        model.zero_grad()
        return loss

    @contextlib.contextmanager
    def _mean_rates(self) -> Iterator[None]:
        """The mean learning rates of the user phase, for as long as this lasts."""
        groups = self._groups
        kept = [group["lr"] for group in groups]
        try:
            for group, total in zip(groups, self.state.rates.tolist(), strict=True):
                mean = total / self.state.since
                group["lr"] = torch.full_like(group["lr"], mean) if isinstance(group["lr"], Tensor) else mean
            yield
        finally:
            for group, rate in zip(groups, kept, strict=True):
                group["lr"] = rate

    # the pull ---------------------------------------------------------------------------------------------------

    def _switch(self) -> None:
        if not self.scheduler.rho:
            return
        parameters, anchor = self._parameters(), self.state.anchor
        if parameters.keys() != anchor.keys():
            self.state.anchor = copy_of(parameters)
            return
        with torch.no_grad():
            for name, parameter in parameters.items():
                anchor[name].copy_(parameter)  # in place: never two copies

    def _pull(self) -> None:
        if not self.scheduler.rho:
            return
        _train_mode(self._optimizer)
        scaler = self.trainer.accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        pull(self._parameters(), self.state.anchor, self.scheduler.rho, scale)


def _train_mode(optimizer: Any) -> None:
    """Schedule-free optimisers keep other parameters for evaluation."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()


def check_options(
    scheduler: Scheduler[Any], safety_data: SafetyData | None, safety_weight: float, model_temperature: float
) -> None:
    """Refuse options of the callback that do not go together with `Lisa`; harmless for other schedulers.

    Raises:
        OptionError: Naming what to give instead.
    """
    if not isinstance(scheduler, Lisa):
        return
    if scheduler.safe_steps and safety_data is None:
        raise OptionError(
            f"Lisa(safe_steps={scheduler.safe_steps}) trains on safety rows in turns: give safety_data, for example "
            'safety_data="core"'
        )
    if scheduler.safe_steps and not safety_weight:
        raise OptionError("safety_weight=0 leaves Lisa's safe steps nothing to learn: give safety_weight > 0")
    if model_temperature:
        raise OptionError(
            f"model_temperature={model_temperature} samples the posterior of one loss, and Lisa takes turns between "
            "two; use model_temperature=0, or another scheduler"
        )


def _require_a_turn(scheduler: Lisa, max_steps: int) -> None:
    if scheduler.safe_steps and max_steps < scheduler.user_steps:
        short = max(1, max_steps // 10)
        raise OptionError(
            f"Lisa(user_steps={scheduler.user_steps}) in a run of {max_steps} optimiser steps takes no whole turn: one "
            "safe phase at the end would undo what was learned, or nothing. Give several short turns, for example "
            f"Lisa(safe_steps={-(-short * scheduler.safe_steps // scheduler.user_steps)}, user_steps={short})."
        )


def refuse_optimizer(trainer: Trainer) -> None:
    """Refuse optimisers that step while gradients are still being computed.

    Raises:
        ModelError: Naming the option.
    """
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim)).lower()
    if "lomo" in name or "layerwise" in name:
        raise ModelError(
            f"optim={name!r} steps within the backward, where Lisa's pull and its safe steps cannot reach it. Use "
            "another optimiser, for example optim='adamw_torch'."
        )
