"""What a scheduler is: a rule that turns what was measured of rows into one weight per row.

A complete scheduler is a state, `Scheduler.weights` and, where it learns, `Scheduler.update`::

    @dataclass
    class LossState(State):
        loss: Annotated[Tensor, PerRow(math.nan)]          # float32 (slots,), nan: not seen yet

    class DropHardest(Scheduler[LossState]):
        name = "drop_hardest"
        state_type = LossState
        needs = (NLL(),)

        def weights(self, state, batch):
            return (~(state.loss[batch.slots] > 5)).float()

        def update(self, state, step):
            slots, loss = step.mean_by_slot("nll")
            state.loss[slots] = loss
            return {}

A *slot* is the place of a row among the distinct rows of the training set: identical rows share one slot. The loop that
calls a scheduler is in `safe_sched.training.loop`; the laws that it must obey are run by `safe_sched.testing`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, Self, TypeVar, dataclass_transform, get_type_hints

import pydantic.dataclasses
import torch
from pydantic import ConfigDict, ValidationError
from torch import Tensor

from safe_sched.errors import OptionError, unknown_name
from safe_sched.estimators.prior import RowPrior
from safe_sched.needs import Need
from safe_sched.rows.index import RowIndex


@dataclass(frozen=True)
class Observation:
    """What is known of some rows: of one micro-batch for ``weights``, of the whole step for ``update``.

    Attributes:
        slots: int64 (rows,), each row's place among the distinct rows of the training set.
        label_tokens: int64 (rows,), label tokens of each row, at least 1.
        step: Optimiser steps done before this one.
        measured: What was measured of every row, by the name of the need: float32 (rows,) or (rows, width).
        step_rows: ``slots`` and ``label_tokens`` of all rows of the optimiser step, this micro-batch's among them.
    """

    slots: Tensor
    label_tokens: Tensor
    step: int = 0
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    step_rows: tuple[Tensor, Tensor] | None = None

    def __getitem__(self, need: str) -> Tensor:
        """The values of a need, in the order of the rows.

        Raises:
            OptionError: Nothing of that name was measured.
        """
        if need not in self.measured:
            raise OptionError(
                f"nothing was measured under the name {need!r}; measured: {sorted(self.measured) or 'nothing'}. "
                "Declare it in the scheduler's needs"
            )
        return self.measured[need]

    def mean_by_slot(self, need: str) -> tuple[Tensor, Tensor]:
        """The distinct slots, and the mean value of each: rows that come twice in a step count once.

        Args:
            need: The name of something that was measured.

        Returns:
            int64 (distinct,) in rising order; float32 (distinct,) or (distinct, width).

        Example:
            >>> loss = torch.tensor([1.0, 5.0, 3.0])
            >>> seen = Observation(torch.tensor([4, 2, 4]), torch.ones(3), measured={"nll": loss})
            >>> seen.mean_by_slot("nll")
            (tensor([2, 4]), tensor([5., 2.]))
        """
        return mean_by_slot(self.slots, self[need])

    @staticmethod
    def concatenate(parts: Sequence[Observation]) -> Observation:
        """Several observations of one step as one; what was not measured in all of them is left out."""
        names = [name for name in parts[0].measured if all(name in part.measured for part in parts)]
        return Observation(
            slots=torch.cat([part.slots for part in parts]),
            label_tokens=torch.cat([part.label_tokens for part in parts]),
            step=parts[0].step,
            measured={name: torch.cat([part.measured[name] for part in parts]) for name in names},
            step_rows=parts[0].step_rows,
        )


def mean_by_slot(slots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct slots in rising order, and the mean of each one's values, taken in float64.

    Args:
        slots: int64 (rows,).
        values: float (rows,) or (rows, width).

    Returns:
        int64 (distinct,), float (distinct,) or (distinct, width) of the type of ``values``.
    """
    slots, place = torch.unique(slots, return_inverse=True)
    total = torch.zeros(slots.numel(), *values.shape[1:], dtype=torch.float64).index_add_(0, place, values.double())
    each = torch.bincount(place, minlength=slots.numel()).double()
    return slots, (total / each.view(-1, *[1] * (values.dim() - 1))).to(values.dtype)


# state ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerRow:
    """Marks a field of a `State` with one number per slot: ``loss: Annotated[Tensor, PerRow(math.nan)]``.

    Args:
        fill: The value of a slot of which nothing is known.
        dtype: Of the tensor.
    """

    fill: float = 0.0
    dtype: torch.dtype = torch.float32


@dataclass
class State:
    """Base of every scheduler's state: a dataclass of tensors and integers.

    The declared fields are all there is to save, so a resume needs no code in the scheduler. Fields marked as `PerRow`
    have one number per slot and grow with a streamed training set.
    """

    sized_later: ClassVar[frozenset[str]] = frozenset()
    """Fields whose sizes are only known once training has begun, such as the width of features."""

    @classmethod
    def fresh(cls, slots: int, **others: Any) -> Self:
        """A state in which nothing is known of any row.

        Args:
            slots: Distinct rows of the training set.
            others: The fields that are not per row and have no default.
        """
        rows = {
            name: torch.full((slots,), each.fill, dtype=each.dtype)
            for name, each in _per_row(cls).items()
            if name not in others
        }
        return cls(**rows, **others)

    def grown(self, slots: int) -> Self:
        """The same state with places for the slots that a stream has added at the end."""
        longer: dict[str, Tensor] = {}
        for name, each in _per_row(type(self)).items():
            old = getattr(self, name)
            longer[name] = torch.cat([old, old.new_full((slots - old.shape[-1],), each.fill)])
        return dataclasses.replace(self, **longer)

    @property
    def slots(self) -> int:
        """The number of slots that it has places for.

        Raises:
            TypeError: It has no field of one number per slot.
        """
        for name in _per_row(type(self)):
            return getattr(self, name).shape[-1]
        raise TypeError(f"{type(self).__name__} has no field marked as PerRow, so the number of its slots is not known")

    def tensors(self) -> dict[str, Tensor]:
        """The fields as named tensors; integers become 0-dimensional int64 tensors."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in values.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        kinds = {each.name: each.type for each in fields(cls)}
        return cls(**{k: int(v) if kinds[k] in ("int", int) else v for k, v in tensors.items()})


@functools.cache
def _per_row(cls: type[State]) -> dict[str, PerRow]:
    """The fields of one number per slot, by name."""
    hints = get_type_hints(cls, include_extras=True)
    marks = {each.name: getattr(hints[each.name], "__metadata__", ()) for each in fields(cls)}
    return {name: mark for name, found in marks.items() for mark in found if isinstance(mark, PerRow)}


S = TypeVar("S", bound=State)


# the scheduler --------------------------------------------------------------------------------------------------


class Scheduler(Generic[S]):
    """Base of every scheduler: options live in it, everything that changes lives in its `State`.

    Weights have mean 1 over the rows of the training set where the method says so. Weight 1 leaves a row as the trainer
    would have treated it. All tensors are on the CPU.

    A subclass gives ``name``, ``state_type`` and `weights`, and overrides what else it wants to decide.
    """

    name: ClassVar[str]
    """The name in the catalogue, in metrics and in errors."""

    state_type: ClassVar[type[State]]
    """The class of its state."""

    takes_prior: ClassVar[bool] = False
    """Whether `with_prior` takes a probability for every row."""

    # what it asks for -------------------------------------------------------------------------------------------

    needs: ClassVar[tuple[Need, ...]] = ()
    """What has to be measured of rows: see `safe_sched.needs`."""

    def needs_now(self, state: S) -> tuple[Need, ...]:
        """`needs` as of now: a calibration may have shown that another option has to be measured, or nothing more."""
        return self.needs

    def due(self, state: S, need: str, slots: Tensor) -> Tensor:
        """Rows that should be measured when they come by: bool (rows,). Default: all."""
        return torch.ones(slots.numel(), dtype=torch.bool)

    def unknown(self, state: S, need: str, slots: Tensor) -> Tensor:
        """Rows of which no value is known yet: bool (rows,). Default: those that are `due`."""
        return self.due(state, need, slots)

    def doubtful(self, state: S, need: str, slots: Tensor) -> Tensor:
        """Rows whose value was taken in a time of noise and should be taken again: bool (rows,). Default: none."""
        return torch.zeros(slots.numel(), dtype=torch.bool)

    def revisit(self, state: S, slots: Tensor) -> Tensor:
        """Rows that must come by whatever their weight is, where weights decide what is sampled: bool (rows,)."""
        return torch.zeros(slots.numel(), dtype=torch.bool)

    # what it is told --------------------------------------------------------------------------------------------

    def calibrate(self, state: S, need: str, known: Mapping[str, Tensor]) -> dict[str, float]:
        """Take in what was measured of rows whose nature is known, in place; returns numbers to log.

        Args:
            state: Changed in place.
            need: The name of the need.
            known: float (rows,) each, by names that the need defines.
        """
        return {}

    def learn(self, state: S, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        """Take in values of some rows as soon as they are measured, in place; returns numbers to log.

        Args:
            state: Changed in place.
            need: The name of the need.
            slots: int64 (rows,).
            values: float32 (rows,), finite.

        Raises:
            OptionError: The scheduler takes no such values.
        """
        takes = ", ".join(repr(one.name) for one in self.needs) or "nothing"
        raise OptionError(f"{self.name!r} takes no values of {need!r}; what it has measured: {takes}")

    def with_prior(self, state: S, prior: RowPrior) -> S:
        """The state with what is believed of every row before the run; see `safe_sched.estimators.prior`.

        Raises:
            OptionError: The scheduler takes no prior.
        """
        raise OptionError(f"{self.name!r} takes no prior; use BDS, NeuralBDS or Fixed, or leave prior out")

    # what it decides --------------------------------------------------------------------------------------------

    def init(self, index: RowIndex) -> S:
        """The state before the first step, with a place for every slot of ``index``."""
        return self.state_type.fresh(index.slots)  # pyright: ignore[reportReturnType]

    def grow(self, state: S, index: RowIndex) -> S:
        """The same state with places for the slots that a stream has added at the end of ``index``."""
        return state.grown(index.slots)

    def weights(self, state: S, batch: Observation) -> Tensor:
        """Factors for the rows of one micro-batch: float32 (rows,), finite and >= 0."""
        raise NotImplementedError(f"{type(self).__name__} has no method weights(state, batch)")

    def update(self, state: S, step: Observation) -> dict[str, float]:
        """Learn from one optimiser step, in place; returns numbers to log."""
        return {}

    def slot_weights(self, state: S, slots: Any = slice(None)) -> Tensor:
        """The weight of every slot now, or of some, by number: float32 (slots,). Default: `weights` without values."""
        numbers = torch.arange(state.slots)[slots]
        return self.weights(state, Observation(numbers, torch.ones_like(numbers)))

    # what it shows ----------------------------------------------------------------------------------------------

    def columns(self, state: S) -> dict[str, Tensor]:
        """Named tensors of (slots,) for the table of a run, beside the weight."""
        return {}

    def log_odds(self, state: S, slots: Any) -> Tensor | None:
        """Evidence that rows are harmful, without a prior, for `safe_sched.combine`: float32 (rows,), nats; 0 unknown.

        None, the default: the scheduler cannot be combined.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The name and the options as plain JSON values, for the manifest and the check at a resume."""
        return {"name": self.name} | {name: getattr(self, name) for name in _option_names(type(self))}


def _option_names(cls: type) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [each.name for each in fields(cls) if each.repr]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.kind not in variadic]


# options --------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def require_options(cls: type, options: Mapping[str, Any], kind: str | None = None) -> None:
    """Check the names of options before a class is built with them, whatever kind of class it is.

    Args:
        cls: A dataclass or any other class.
        options: By name.
        kind: What they are options of, for the message; None: the class.

    Raises:
        OptionError: Naming the option that is not known, and the one that may be meant.

    Example:
        >>> class Mine:
        ...     def __init__(self, keep=0.8): ...
        >>> require_options(Mine, {"kepe": 0.5})
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: unknown option of Mine 'kepe' (did you mean 'keep'?); allowed: 'keep'
    """
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            raise unknown_name(kind or f"option of {cls.__name__}", name, parameters)


@dataclass_transform(frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Turn a class into a frozen dataclass that pydantic checks, with our errors instead of pydantic's.

    A scheduler keeps what changes in its `State`, so its options are frozen; see `checked` for other classes.

    Example:
        >>> from safe_sched import BDS
        >>> BDS(prior_shar=0.01)
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: unknown option of BDS 'prior_shar' (did you mean 'prior_share'?); ...
        >>> BDS(prior_share=-1)
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: BDS(prior_share=-1): Input should be greater than 0
    """
    return _checked(cls, frozen=True)


@dataclass_transform()
def checked(cls: type[T]) -> type[T]:
    """`options` for a class whose objects change after they are made, such as a part of the loop."""
    return _checked(cls, frozen=False)


def _checked(cls: type[T], *, frozen: bool) -> type[T]:
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    made: Any = pydantic.dataclasses.dataclass(frozen=frozen, config=config)(cls)
    build = made.__init__

    @functools.wraps(build)
    def init(self: T, *args: Any, **kwargs: Any) -> None:
        require_options(made, kwargs)
        try:
            build(self, *args, **kwargs)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(ours := first.get("ctx", {}).get("error"), OptionError):
                raise ours from None
            where = ".".join(map(str, first["loc"])) or "options"
            raise OptionError(f"{cls.__name__}({where}={first['input']!r}): {first['msg']}") from None

    made.__init__ = init
    return made
