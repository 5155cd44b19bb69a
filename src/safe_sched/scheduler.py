"""The shapes that schedulers and integrations agree on, and the loop that they share.

One optimiser step, as an integration runs it (the trainer's own lines are unmarked, ours start with ``>``)::

      batches = the micro-batches of this optimiser step
    > session.begin_step(batches)                     # row keys, label counts; unknown rows stop the run
    > safety batch: backward of safety_weight * L_safe   # on empty gradients, where a safety set is given
      for batch in batches:
    >     a forward without gradient, parameters moved  # where rows of it are due to be measured
          loss = model(batch)                         # the trainer's own forward and loss
    >     session.learn(rows, scores)                 # what was measured, before and after the move
    >     session.weigh(batch, nll)                   # scheduler.weights(...) -> a factor per row
          loss.backward()                             # the gate multiplies each row's gradient by its factor
      clip, optimizer.step(), zero_grad()
    > session.end_step()                              # scheduler.update(...) with what the step saw

A *slot* is the place of a row key among the distinct keys of the training set: identical rows share one slot.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from safe_sched.rows.index import RowIndex


@dataclass(frozen=True)
class Observation:
    """What is known of some rows: of one micro-batch for ``weights``, of the whole step for ``update``.

    Attributes:
        slots: int64 (rows,), the row's place among the distinct rows of the training set.
        nll: float32 (rows,), mean loss of the row's label tokens in nats per token, or None where the scheduler
            does not ask for it.
        label_tokens: int64 (rows,), label tokens of the row, at least 1.
        step: Optimiser steps done before this one.
        features: float32 (rows, width), what the model made of each row, where the scheduler asks for it.
        safety_loss: Loss of the step's safety batch in nats per token, where there is one.
        step_rows: ``slots`` and ``label_tokens`` of all rows of the optimiser step, this micro-batch's among them.
    """

    slots: Tensor
    nll: Tensor | None
    label_tokens: Tensor
    step: int
    features: Tensor | None = None
    safety_loss: float | None = None
    step_rows: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def concatenate(parts: list[Observation]) -> Observation:
        """Several observations of one step as one."""

        def together(values: list[Tensor | None]) -> Tensor | None:
            there = [value for value in values if value is not None]
            return torch.cat(there) if len(there) == len(values) else None

        return Observation(
            slots=torch.cat([part.slots for part in parts]),
            nll=together([part.nll for part in parts]),
            label_tokens=torch.cat([part.label_tokens for part in parts]),
            step=parts[0].step,
            features=together([part.features for part in parts]),
            safety_loss=parts[0].safety_loss,
            step_rows=parts[0].step_rows,
        )


@dataclass
class State:
    """Base of every scheduler's state: a dataclass whose fields are tensors and integers, and nothing else.

    Declared fields are all there is to save, so a resume needs no code in the scheduler.
    """

    sized_later: ClassVar[frozenset[str]] = frozenset()
    """Fields whose sizes are only known once training has begun, such as the width of features."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields as named tensors; integers become 0-dimensional int64 tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in values.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        kinds = {field.name: field.type for field in fields(cls)}
        return cls(**{k: int(v) if kinds[k] in ("int", int) else v for k, v in tensors.items()})


S = TypeVar("S", bound=State)


@runtime_checkable
class Scheduler(Protocol[S]):
    """How much each row may teach. Settings live in the scheduler, everything that changes in its `State`.

    ``weights`` have mean 1 over the rows of the training set wherever the method says so; weight 1 leaves a row as
    the trainer would have treated it.
    """

    name: ClassVar[str]
    """The name in the catalogue."""

    @property
    def state_type(self) -> type[State]:
        """The class of its state, for loading."""
        ...

    @property
    def needs_nll(self) -> bool:
        """Whether ``weights`` or ``update`` read the rows' losses."""
        ...

    def settings(self) -> dict[str, object]:
        """The options as plain JSON values, for the manifest and the check at a resume."""
        ...

    def init(self, index: RowIndex) -> S:
        """The state before the first step, with a place for every slot of ``index``."""
        ...

    def grow(self, state: S, index: RowIndex) -> S:
        """The same state with places for the slots that a stream has added at the end of ``index``."""
        ...

    def weights(self, state: S, batch: Observation) -> Tensor:
        """Factors for the rows of one micro-batch: float32 (rows,), on the CPU."""
        ...

    def update(self, state: S, step: Observation) -> dict[str, float]:
        """Learn from one optimiser step, in place; returns numbers to log."""
        ...

    def slot_weights(self, state: S, slots: Any = slice(None)) -> Tensor:
        """The weight of every slot now, or of some, by number: float32 (slots,)."""
        ...


@runtime_checkable
class Evidential(Protocol):
    """A scheduler that learns from scores (`estimators.calibration`), which an integration may measure for it."""

    @property
    def evidence(self) -> str | None:
        """Where its scores come from: ``"probe"``, ``"reference"``, ``"covariance"``; ``"refusal"`` for the ratios of
        Antibody; or None for none.
        """
        ...

    def due(self, state: Any, slots: Tensor) -> Tensor:
        """Which rows should be measured now: bool (rows,)."""
        ...

    def doubtful(self, state: Any, slots: Tensor) -> Tensor:
        """Which rows were scored in a time of noise and should be measured again before they come by: bool (rows,)."""
        ...

    def learn(self, state: Any, slots: Tensor, scores: Tensor) -> dict[str, float]:
        """Learn from scores, float (rows,), in place; returns numbers to log."""
        ...


@runtime_checkable
class Columns(Protocol):
    """A scheduler that has more to say of every row than its weight."""

    def columns(self, state: Any) -> dict[str, Tensor]:
        """Named tensors of (slots,), for `safe_sched.training.session.Session.table`."""
        ...


def experts_of(scheduler: Scheduler[Any], state: Any) -> list[tuple[Scheduler[Any], Any]]:
    """The schedulers that a scheduler is made of, each with its state; most are made of themselves alone."""
    parts = getattr(scheduler, "experts", None)
    return [(scheduler, state)] if parts is None else parts(state)


def evidential(scheduler: Scheduler[Any], state: Any, evidence: str | None = None) -> list[tuple[Evidential, Any]]:
    """Those among them that learn from scores, of one kind or of any, each with its state."""
    return [
        (part, own)
        for part, own in experts_of(scheduler, state)
        if isinstance(part, Evidential) and (evidence is None or part.evidence == evidence)
    ]
