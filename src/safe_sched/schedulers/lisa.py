"""Lisa, lazy safety alignment (arXiv 2405.18641): user steps and safe steps take turns, tied to each other.

With theta the trainable parameters, f the trainer's own loss and h the loss of a safety batch, a run repeats::

    user_steps optimiser steps on    f(theta) + (rho / 2) |theta - anchor|^2
    safe_steps optimiser steps on    h(theta) + (rho / 2) |theta - anchor|^2

The anchor of a phase is where the other one ended, and in the first phase where training began. Both are the
parameters at the last switch, so one copy of the trainable parameters is kept and not two.

All rows weigh the same, unless another scheduler is asked for their weights. Steps are the optimiser's, whatever the
gradient accumulation. What a trainer has to do is in `safe_sched_hf.lisa`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.errors import ModelError, OptionError
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Columns, Observation, Scheduler, State, experts_of
from safe_sched.schedulers.options import options


@dataclass
class LisaState(State):
    """Where in its turns a run is.

    Attributes:
        slots: Distinct rows of the training set.
        since: User steps since the last switch.
        safe_steps: Safe steps done in all; which safety rows come next follows from it.
        rates: float64 (parameter groups,), sum of the learning rates of the user steps since the last switch.
        anchor: The trainable parameters by name, as they were at the last switch; empty where rho is 0.
        rows: What the scheduler that weighs the rows has learned, where there is one.
    """

    rows_type: ClassVar[type[State] | None] = None

    slots: int
    since: int = 0
    safe_steps: int = 0
    rates: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    anchor: dict[str, Tensor] = field(default_factory=dict)
    rows: State | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The counts and rates, a tensor for every parameter of the anchor, and those of ``rows``."""
        found = {name: torch.tensor(getattr(self, name)) for name in ("slots", "since", "safe_steps")}
        found["rates"] = self.rates
        found |= {f"anchor.{name}": value.cpu() for name, value in self.anchor.items()}
        return found | ({} if self.rows is None else {f"rows.{k}": v for k, v in self.rows.tensors().items()})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LisaState:
        """The inverse of `tensors`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}

        return cls(
            slots=int(tensors["slots"]),
            since=int(tensors["since"]),
            safe_steps=int(tensors["safe_steps"]),
            rates=tensors["rates"],
            anchor=part("anchor."),
            rows=None if cls.rows_type is None else cls.rows_type.from_tensors(part("rows.")),
        )


@options
class Lisa:
    """User steps and safe steps in turns, each pulled towards where the other ended.

    Args:
        safe_steps: Optimiser steps on safety rows in a turn, >= 0; 0 leaves the pull towards the start alone.
        user_steps: Optimiser steps on the user's rows in a turn, >= 1.
        rho: Strength of the pull, >= 0, usually 0.01 to 1; 0 for none, which also saves the copy of the parameters.
        scheduler: Weighs the user's rows in the user steps: a scheduler such as `BDS`, or its name. None: weight 1.

    Raises:
        OptionError: An option is unknown or out of range, or the scheduler cannot be used within Lisa.

    Example:
        >>> from safe_sched import Lisa
        >>> from safe_sched.rows.index import RowIndex
        >>> scheduler = Lisa(safe_steps=2, user_steps=18)
        >>> state = scheduler.init(RowIndex(torch.tensor([1, 2, 3])))
        >>> state.since = 18
        >>> scheduler.due(state)
        2
        >>> Lisa(user_steps=0)
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: Lisa(user_steps=0): Input should be greater than or equal to 1
    """

    name: ClassVar[str] = "lisa"

    safe_steps: Annotated[int, Field(ge=0)] = 100
    user_steps: Annotated[int, Field(ge=1)] = 900
    rho: Annotated[float, Field(ge=0)] = 0.1
    scheduler: Any = None

    def __post_init__(self) -> None:
        if self.scheduler is None:
            return
        from safe_sched.schedulers.catalog import build  # late: the catalogue holds this class

        inner = build(self.scheduler)
        if not isinstance(inner, Scheduler) or isinstance(inner, Lisa) or getattr(inner, "needs_features", False):
            raise OptionError(
                f"Lisa(scheduler={getattr(inner, 'name', inner)!r}) cannot weigh the rows of Lisa's user steps; "
                "use BDS, Antibody, a combination of them, or Fixed"
            )
        if any(getattr(part, "evidence", None) == "covariance" for part in getattr(inner, "parts", (inner,))):
            raise OptionError(
                'evidence="covariance" needs a safety loss in every user step, and Lisa takes its safety rows in steps '
                'of their own; use evidence="probe"'
            )
        object.__setattr__(self, "scheduler", inner)

    # a scheduler ------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Scheduler[Any], ...]:
        """The schedulers that weigh its rows."""
        return () if self.scheduler is None else getattr(self.scheduler, "parts", (self.scheduler,))

    def experts(self, state: LisaState) -> list[tuple[Scheduler[Any], Any]]:
        """`parts`, each with its own state."""
        return [] if self.scheduler is None else experts_of(self.scheduler, state.rows)

    @property
    def state_type(self) -> type[LisaState]:
        """The class of its state."""
        return self._state_type

    @functools.cached_property
    def _state_type(self) -> type[LisaState]:
        if self.scheduler is None:
            return LisaState
        kind = self.scheduler.state_type
        later = frozenset(f"rows.{name}" for name in kind.sized_later)
        return type("LisaState", (LisaState,), {"rows_type": kind, "sized_later": later})

    @property
    def needs_nll(self) -> bool:
        """Whether the scheduler of its rows reads their losses."""
        return self.scheduler is not None and self.scheduler.needs_nll

    def settings(self) -> dict[str, object]:
        """The options as plain JSON values."""
        inner = None if self.scheduler is None else self.scheduler.settings()
        counts = {"safe_steps": self.safe_steps, "user_steps": self.user_steps, "rho": self.rho}
        return {"name": self.name, **counts, "scheduler": inner}

    def init(self, index: RowIndex) -> LisaState:
        """See `safe_sched.scheduler.Scheduler.init`."""
        return self.state_type(index.slots, rows=None if self.scheduler is None else self.scheduler.init(index))

    def grow(self, state: LisaState, index: RowIndex) -> LisaState:
        """See `safe_sched.scheduler.Scheduler.grow`."""
        state.slots = index.slots
        if self.scheduler is not None:
            state.rows = self.scheduler.grow(state.rows, index)
        return state

    def weights(self, state: LisaState, batch: Observation) -> Tensor:
        """1, or what the scheduler of the rows says."""
        if self.scheduler is None:
            return torch.ones(batch.slots.numel())
        return self.scheduler.weights(state.rows, batch)

    def slot_weights(self, state: LisaState, slots: Any = slice(None)) -> Tensor:
        """See `safe_sched.scheduler.Scheduler.slot_weights`."""
        if self.scheduler is None:
            return torch.ones(state.slots)[slots]
        return self.scheduler.slot_weights(state.rows, slots)

    def update(self, state: LisaState, step: Observation) -> dict[str, float]:
        """Count a user step."""
        state.since += 1
        return {} if self.scheduler is None else self.scheduler.update(state.rows, step)

    def columns(self, state: LisaState) -> dict[str, Tensor]:
        """Those of the scheduler of the rows."""
        return self.scheduler.columns(state.rows) if isinstance(self.scheduler, Columns) else {}

    # turns ------------------------------------------------------------------------------------------------------

    def due(self, state: LisaState, *, last: bool = False) -> int:
        """How many safe steps to take now.

        Args:
            state: After a user step.
            last: Whether training ends here. A last user phase that is shorter than the others is followed by a safe
                phase that is as much shorter, rounded up.
        """
        if last or state.since >= self.user_steps:
            return -(-self.safe_steps * min(state.since, self.user_steps) // self.user_steps)
        return 0


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
