"""Lisa, lazy safety alignment (arXiv 2405.18641): user steps and safe steps take turns, tied to each other.

With theta the trainable parameters, f the trainer's own loss (rows weighted by the scheduler of the run) and h the loss
of a safety batch, a run repeats::

    user_steps optimiser steps on    f(theta) + (rho / 2) |theta - anchor|^2
    safe_steps optimiser steps on    h(theta) + (rho / 2) |theta - anchor|^2

The anchor of a phase is where the other one ended, and in the first phase where training began. Both are the parameters
at the last switch, so one copy of the trainable parameters is kept and not two.

User steps are the trainer's own, so batches, counters and schedules are those of the plain run and no batch is lost.
The pull is put into the empty gradients before a step, so clipping sees the sum. When a user phase is full, the safe
phase runs at the end of that step, before the trainer saves: a checkpoint never lies within one. A safe step is an
optimiser step like the trainer's: same optimiser, autocast and clipping. Its learning rate is the mean one of the user
phase that it follows; at the end of a schedule that falls to 0 the current one would teach nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.errors import ModelError, OptionError, StateError
from safe_sched.scheduler import Scheduler, checked
from safe_sched.training.loop import Part, Run
from safe_sched.training.session import Batch
from safe_sched_hf.distributed import telling
from safe_sched_hf.safety import backward_safety_share


@checked
class Lisa(Part):
    """User steps and safe steps in turns, each pulled towards where the other ended.

    Args:
        safe_steps: Optimiser steps on safety rows in a turn, >= 0; 0 leaves the pull towards the start alone.
        user_steps: Optimiser steps on the user's rows in a turn, >= 1.
        rho: Strength of the pull, >= 0, usually 0.01 to 1; 0 for none, which also saves the copy of the parameters.

    Raises:
        OptionError: An option is unknown or out of range; or, when training starts, it ends before the first user
            phase.

    Example:
        >>> from safe_sched_hf import Lisa, SafeSchedCallback
        >>> callback = SafeSchedCallback("bds", parts=[Lisa(safe_steps=2, user_steps=18)], safety_data="core")
        >>> Lisa(user_steps=0)
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: Lisa(user_steps=0): Input should be greater than or equal to 1
    """

    name: ClassVar[str] = "lisa"
    brings_safety_rows = True
    unsharded = "Lisa, which keeps a copy of the parameters"

    safe_steps: Annotated[int, Field(ge=0)] = 100
    user_steps: Annotated[int, Field(ge=1)] = 900
    rho: Annotated[float, Field(ge=0)] = 0.1

    def settings(self) -> dict[str, Any]:
        """See `Part.settings`."""
        return {"name": self.name, "safe_steps": self.safe_steps, "user_steps": self.user_steps, "rho": self.rho}

    def require(self, scheduler: Scheduler[Any], options: Mapping[str, Any]) -> None:
        """See `Part.require`."""
        if self.safe_steps and options.get("safety_data") is None:
            raise OptionError(
                f"Lisa(safe_steps={self.safe_steps}) trains on safety rows in turns: give safety_data, for example "
                'safety_data="core"'
            )
        if self.safe_steps and not options.get("safety_weight"):
            raise OptionError("safety_weight=0 leaves Lisa's safe steps nothing to learn: give safety_weight > 0")
        if temperature := options.get("model_temperature"):
            raise OptionError(
                f"model_temperature={temperature} samples the posterior of one loss, and Lisa takes turns between "
                "two; use model_temperature=0, or leave Lisa out"
            )

    def refuse(self, trainer: Any) -> None:
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

    def begin(self, run: Run) -> None:
        """See `Part.begin`."""
        if run.trainer is None:
            raise OptionError(
                "Lisa takes steps of its own and needs a trainer to take them with; use SafeSchedCallback"
            )
        self.refuse(run.trainer)
        self._require_a_turn(run.trainer.state.max_steps)
        self.run = run
        self.since = self.safe_steps_done = 0
        self.anchor: dict[str, Tensor] = {}
        self.rates = torch.zeros(len(self._groups), dtype=torch.float64)
        self._switch()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.run.optimizer.param_groups

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.run.model.named_parameters() if p.requires_grad}

    def _require_a_turn(self, max_steps: int) -> None:
        if self.safe_steps and max_steps < self.user_steps:
            short = max(1, max_steps // 10)
            raise OptionError(
                f"Lisa(user_steps={self.user_steps}) in a run of {max_steps} optimiser steps takes no whole turn: one "
                "safe phase at the end would undo what was learned, or nothing. Give several short turns, for example "
                f"Lisa(safe_steps={-(-short * self.safe_steps // self.user_steps)}, user_steps={short})."
            )

    def due(self, since: int, *, last: bool = False) -> int:
        """How many safe steps to take now.

        Args:
            since: User steps since the last switch.
            last: Whether training ends here. A last user phase that is shorter than the others is followed by a safe
                phase that is as much shorter, rounded up.

        Example:
            >>> Lisa(safe_steps=2, user_steps=18).due(18)
            2
        """
        if last or since >= self.user_steps:
            return -(-self.safe_steps * min(since, self.user_steps) // self.user_steps)
        return 0

    # events -----------------------------------------------------------------------------------------------------

    def before_step(self, batches: Sequence[Batch]) -> None:
        """The pull of a user step, on empty gradients."""
        self._pull()

    def after_optimizer(self) -> None:
        """Note the learning rates of a user step, before its schedule goes on."""
        self.since += 1
        self.rates += torch.tensor([float(group["lr"]) for group in self._groups], dtype=torch.float64)

    def after_step(self, *, last: bool, log: bool) -> dict[str, float]:
        """A safe phase, where one is due."""
        found: dict[str, float] = {}
        due = self.due(self.since, last=last)
        if self.rho and (log or due):
            found["user_distance"] = distance(self._parameters(), self.anchor)
        if due:
            found |= self._safe_phase(due)
        return found | ({"safe_steps": float(self.safe_steps_done)} if log else {})

    def summary(self) -> dict[str, int]:
        """Optimiser steps on safety rows so far, and how many rows they took, repeats counted."""
        rows = 0 if self.run.safety is None else self.safe_steps_done * self.run.safety.batch_size
        return {"safe_steps_done": self.safe_steps_done, "safety_rows_trained_on": rows}

    def save(self) -> dict[str, Tensor]:
        """See `Part.save`: user steps since the last switch, safe steps done, the sum of the rates, and the anchor."""
        counts = {"since": torch.tensor(self.since), "safe_steps_done": torch.tensor(self.safe_steps_done)}
        return counts | {"rates": self.rates} | {f"anchor.{name}": value.cpu() for name, value in self.anchor.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Part.load`.

        Raises:
            StateError: The anchor is not one of these parameters.
        """
        if not {"since", "safe_steps_done", "rates"} <= tensors.keys():
            raise StateError(
                f"the saved state holds {sorted(tensors) or 'nothing'} of Lisa; needed: since, safe_steps_done, rates "
                "and its anchor. Resume from another checkpoint, or start again without resuming."
            )
        self.since, self.safe_steps_done = int(tensors["since"]), int(tensors["safe_steps_done"])
        self.rates = tensors["rates"]
        anchor = {name.removeprefix("anchor."): t for name, t in tensors.items() if name.startswith("anchor.")}
        for name, parameter in self._parameters().items() if self.rho else ():
            if name not in anchor or anchor[name].shape != parameter.shape:
                raise StateError(
                    f"the saved state has no anchor of the shape {tuple(parameter.shape)} for {name}: it belongs to "
                    "another model. Resume with the same model and adapter, or start again without resuming."
                )
            anchor[name] = anchor[name].to(parameter)
        self.anchor = anchor

    # a safe phase -----------------------------------------------------------------------------------------------

    def _safe_phase(self, steps: int) -> dict[str, float]:
        self._switch()
        losses = []
        with self._mean_rates():
            for _ in range(steps):
                losses.append(self._safe_step())
                self.safe_steps_done += 1
        found = {"safety_loss": sum(losses) / len(losses)}
        if self.rho:
            found["safe_distance"] = distance(self._parameters(), self.anchor)
        self._switch()
        self.since = 0
        self.rates.zero_()
        return found

    def _safe_step(self) -> float:
        run, number = self.run, self.safe_steps_done
        _train_mode(run.optimizer)
        self._pull()
        with telling(run.exchange):
            # no backward of the trainer's follows in which the ranks would average their gradients
            loss = backward_safety_share(
                run, run.safety, number, f"in safe step {number}", reduce=run.exchange.ranks > 1
            )
        trainer = run.trainer
        if trainer.args.max_grad_norm > 0:
            trainer.accelerator.clip_grad_norm_(run.model.parameters(), trainer.args.max_grad_norm)
        run.optimizer.step()
        run.model.zero_grad()
        return loss

    @contextlib.contextmanager
    def _mean_rates(self) -> Iterator[None]:
        """The mean learning rates of the user phase, for as long as this lasts."""
        groups = self._groups
        kept = [group["lr"] for group in groups]
        try:
            for group, total in zip(groups, self.rates.tolist(), strict=True):
                mean = total / self.since
                group["lr"] = torch.full_like(group["lr"], mean) if isinstance(group["lr"], Tensor) else mean
            yield
        finally:
            for group, rate in zip(groups, kept, strict=True):
                group["lr"] = rate

    # the pull ---------------------------------------------------------------------------------------------------

    def _switch(self) -> None:
        if not self.rho:
            return
        parameters, anchor = self._parameters(), self.anchor
        if parameters.keys() != anchor.keys():
            self.anchor = copy_of(parameters)
            return
        with torch.no_grad():
            for name, parameter in parameters.items():
                anchor[name].copy_(parameter)  # in place: never two copies

    def _pull(self) -> None:
        if not self.rho:
            return
        _train_mode(self.run.optimizer)
        scaler = self.run.trainer.accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        pull(self._parameters(), self.anchor, self.rho, scale)


def _train_mode(optimizer: Any) -> None:
    """Schedule-free optimisers keep other parameters for evaluation."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()


# the pull --------------------------------------------------------------------------------------------------------


def copy_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An anchor: the parameters as they are now, by name."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def pull(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], rho: float, scale: float = 1.0) -> None:
    """Add the gradient of ``(rho / 2) |theta - anchor|^2`` to the parameters' gradients: ``rho (theta - anchor)``.

    Args:
        parameters: theta by name, tensors that are trained.
        anchor: Tensors of the same names and shapes, on the same devices.
        rho: >= 0.
        scale: What the gradients are to be multiplied by, where the trainer scales its loss.

    Raises:
        ModelError: Other parameters are trained now than when the anchor was taken.

    Example:
        >>> theta = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> pull({"theta": theta}, {"theta": torch.tensor([1.0, 1.0])}, rho=0.5)
        >>> theta.grad
        tensor([0., 1.])
    """
    _require_same_names(parameters, anchor)
    for name, parameter in parameters.items():
        gradient = (parameter - anchor[name]).mul_(rho * scale)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


@torch.no_grad()
def distance(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> float:
    """``|theta - anchor|``, the Euclidean norm over all parameters together.

    Example:
        >>> distance({"theta": torch.tensor([3.0, 4.0])}, {"theta": torch.zeros(2)})
        5.0
    """
    _require_same_names(parameters, anchor)
    apart = [float((parameter - anchor[name]).float().norm()) for name, parameter in parameters.items()]
    return float(torch.tensor(apart, dtype=torch.float64).norm())


def _require_same_names(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
    if changed := parameters.keys() ^ anchor.keys():
        raise ModelError(
            f"Lisa pulls towards the parameters of the last switch, and {len(changed)} of them were frozen or unfrozen "
            f"since (first: {min(changed)}). Choose what is trained before training starts."
        )
