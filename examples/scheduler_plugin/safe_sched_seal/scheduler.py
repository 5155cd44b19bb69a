"""Train on the rows that a safety-tuned adapter finds easiest, after the idea of SEAL (arXiv 2410.07471).

SEAL ranks rows by how well they go with a model that was fine-tuned on safety data, and trains on the best. Here
the score of a row is its loss under a second, safety-tuned LoRA adapter, and the best of the rows seen so far teach::

    w_i = 1 where s_i is among the lowest  keep * 100 %  of the rows seen so far, else 0

Kept rows have weight 1, so they train as without the plug-in.
SEAL itself learns the ranking, by bilevel optimisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.needs import Need
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, PerRow, Scheduler, State, options


@dataclass(frozen=True)
class SafeAdapterLoss(Need):
    """A row's loss under a second adapter of the model.

    Args:
        adapter: The name of a PEFT adapter of the model, or a folder with one.
    """

    name: ClassVar[str] = "safe_adapter_loss"

    adapter: str


@dataclass
class SealState(State):
    """What is known of the rows.

    Attributes:
        loss: float32 (slots,), loss under the safe adapter, nan where it was not measured yet.
        limit: float32 (), the loss up to which rows are kept.
    """

    loss: Annotated[Tensor, PerRow(math.nan)]
    limit: Tensor


@options
class Seal(Scheduler[SealState]):
    """Keeps the rows with the lowest losses under a safety-tuned adapter.

    Args:
        keep: Share of the rows seen so far that is kept, in (0, 1].
        adapter: The name of a PEFT adapter of the model, or a folder with one.
    """

    name: ClassVar[str] = "seal"
    state_type = SealState

    keep: Annotated[float, Field(gt=0, le=1)] = 0.8
    adapter: str = "safe"

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One measurement, of each row once."""
        return (SafeAdapterLoss(self.adapter),)

    def init(self, index: RowIndex) -> SealState:
        """Nothing is known, and all rows are kept."""
        return SealState.fresh(index.slots, limit=torch.tensor(math.inf))

    def due(self, state: SealState, need: str, slots: Tensor) -> Tensor:
        """Rows without a loss. Neither the base model nor the safe adapter is trained, so one look is enough."""
        return state.loss[slots].isnan()

    def learn(self, state: SealState, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        """Losses as they are measured, before the rows are weighed."""
        if need != SafeAdapterLoss.name:
            return super().learn(state, need, slots, values)  # refuses it
        state.loss[slots] = values
        return {}

    def weights(self, state: SealState, batch: Observation) -> Tensor:
        """1 for a row that is kept or was not measured yet, 0 for the others."""
        return (~(state.loss[batch.slots] > state.limit)).float()

    def update(self, state: SealState, step: Observation) -> dict[str, float]:
        """Set the limit at the end of a step, so that a step's weights do not depend on its micro-batches."""
        seen = state.loss[~state.loss.isnan()]
        if not seen.numel():
            return {}
        state.limit = seen.kthvalue(math.ceil(self.keep * seen.numel())).values
        return {"seal_limit": float(state.limit)}

    def columns(self, state: SealState) -> dict[str, Tensor]:
        """The losses, for the table of a run."""
        return {"safe_adapter_loss": state.loss}
