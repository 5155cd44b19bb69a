"""The laws of `safe_sched.testing`: whatever we ship obeys them, and each is broken by something that does not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_sched.audit import AuditRow, Evidence
from safe_sched.audit.detectors import default_detectors
from safe_sched.needs import NLL, Need
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, PerRow, Scheduler, State, options
from safe_sched.schedulers import BDS, Antibody, build, combine
from safe_sched.testing import check_detector, check_measurement, check_scheduler
from safe_sched.training.forward import Forward
from safe_sched.training.loop import Inputs, Measurement, NLLMeasurement
from safe_sched.training.session import Batch
from tests.core.audited import Counts, Long, some_rows
from tests.core.test_schedulers import over_the_catalogue

# schedulers -----------------------------------------------------------------------------------------------------------


@over_the_catalogue
def test_a_scheduler_of_the_catalogue_obeys_the_laws(name: str, options: dict[str, Any]) -> None:
    if "keys" in options:
        options = {"values": [1.0, 0.5, 0.25, 2.0, 1.0, 0.0, 3.0, 0.25, 0.25, 0.0]}
    check_scheduler(build(name, **options), mean_1=name == "bds_released" and "transform" not in options)


def test_a_combination_obeys_the_laws() -> None:
    check_scheduler(combine(BDS(), Antibody()))


@dataclass
class MeansState(State):
    loss: Annotated[Tensor, PerRow(1.0)]
    steps: int


@options
class Means(Scheduler[MeansState]):
    """Weighs a row by its last loss."""

    name: ClassVar[str] = "means"
    state_type = MeansState
    needs = (NLL(),)

    scale: float = 1.0

    def init(self, index: RowIndex) -> MeansState:
        return MeansState.fresh(index.slots, steps=0)

    def weights(self, state: MeansState, batch: Observation) -> Tensor:
        return self.scale * state.loss[batch.slots]

    def update(self, state: MeansState, step: Observation) -> dict[str, float]:
        slots, loss = step.mean_by_slot("nll")
        state.loss[slots], state.steps = loss, state.steps + 1
        return {"loss": float(loss.mean())}


def test_a_scheduler_of_a_few_lines_obeys_the_laws() -> None:
    check_scheduler(Means())


class WrongShape(Means):
    def weights(self, state: Any, batch: Observation) -> Tensor:
        return super().weights(state, batch)[:1]


class WrongType(Means):
    def weights(self, state: Any, batch: Observation) -> Tensor:
        return super().weights(state, batch).double()


class Negative(Means):
    def weights(self, state: Any, batch: Observation) -> Tensor:
        return super().weights(state, batch) - 1.5


class InOrder(Means):
    def weights(self, state: Any, batch: Observation) -> Tensor:
        return torch.linspace(0, 1, batch.slots.numel())


class RandomWeights(Means):
    def weights(self, state: Any, batch: Observation) -> Tensor:
        return torch.full((batch.slots.numel(),), random.random())


class Writes(Means):
    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        state.steps += 1
        return super().slot_weights(state, slots)


class OtherTable(Means):
    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        return super().slot_weights(state, slots).square()


class IgnoresSlots(Means):
    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        return super().slot_weights(state)


class Relative(Means):
    """To its micro-batch, and not to anything that all micro-batches share."""

    def weights(self, state: Any, batch: Observation) -> Tensor:
        found = super().weights(state, batch)
        return found / found.mean()

    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        return state.loss[slots]


class LearnsInWeights(Means):
    def weights(self, state: Any, batch: Observation) -> Tensor:
        if "nll" in batch.measured:
            state.steps += 1
        return super().weights(state, batch)


class KeepsOutside(Means):
    """In a dict that is no part of the state."""

    seen: ClassVar[dict[int, int]] = {}

    def init(self, index: RowIndex) -> MeansState:
        state = super().init(index)
        self.seen[id(state.loss)] = 0
        return state

    def update(self, state: Any, step: Observation) -> dict[str, float]:
        self.seen[id(state.loss)] = self.seen.get(id(state.loss), 0) + 1
        found = super().update(state, step)
        state.loss[step.slots] += self.seen[id(state.loss)]
        return found


class ForgetsInTensors(MeansState):
    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"steps": torch.tensor(0)}


class Forgets(Means):
    state_type = ForgetsInTensors

    def init(self, index: RowIndex) -> MeansState:
        return ForgetsInTensors.fresh(index.slots, steps=0)

    def update(self, state: Any, step: Observation) -> dict[str, float]:
        found = super().update(state, step)
        state.loss[step.slots] += state.steps
        return found


class LostInLoad(MeansState):
    @classmethod
    def from_tensors(cls, tensors: Any) -> Any:
        return super().from_tensors(tensors | {"loss": torch.ones_like(tensors["loss"])})


class LosesInLoad(Means):
    state_type = LostInLoad

    def init(self, index: RowIndex) -> MeansState:
        return LostInLoad.fresh(index.slots, steps=0)


class StartsElsewhere(Means):
    def grow(self, state: Any, index: RowIndex) -> MeansState:
        grown = super().grow(state, index)
        grown.loss[state.slots :] = 2.0
        return grown


class GrowsOver(Means):
    def grow(self, state: Any, index: RowIndex) -> MeansState:
        grown = super().grow(state, index)
        grown.loss[:] = 1.0
        return grown


class NoJson(Means):
    def settings(self) -> dict[str, Any]:
        return super().settings() | {"scale": torch.tensor(self.scale)}


class SameSettings(Means):
    def settings(self) -> dict[str, Any]:
        return {"name": self.name}


class Anonymous(Means):
    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale}


class TakesAll(Means):
    def learn(self, state: Any, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        return {}


class Logs(Means):
    def update(self, state: Any, step: Observation) -> dict[str, Any]:
        return super().update(state, step) | {"rows": step.slots.numel()}


class AnyOption(Means):
    def __init__(self, scale: float = 1.0, **others: Any) -> None:
        super().__init__(scale)


class WideColumns(Means):
    def columns(self, state: Any) -> dict[str, Tensor]:
        return {"loss": state.loss[:1]}


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (WrongShape, r"weights are float32 \(rows,\)"),
        (WrongType, r"weights are float32 \(rows,\)"),
        (Negative, "finite and >= 0"),
        (InOrder, "copies of a row in one step have one weight"),
        (RandomWeights, "slot_weights|same weights"),
        (Writes, "leaves the state as it is"),
        (OtherTable, r"slot_weights\(\) are weights\(\)"),
        (IgnoresSlots, r"slot_weights\(slots\) are those of all"),
        (Relative, "how its step is split"),
        (LearnsInWeights, "a step in micro-batches is the step in one"),
        (KeepsOutside, "resumes is the run that does not"),
        (Forgets, "resumes is the run that does not"),
        (LosesInLoad, "comes back as it was"),
        (StartsElsewhere, "start as all rows start"),
        (GrowsOver, "leaves the rows that were there"),
        (NoJson, "plain JSON"),
        (SameSettings, "tell options apart, here 'scale'"),
        (Anonymous, "hold the name 'means'"),
        (TakesAll, "refuses values of a need"),
        (Logs, "what is logged are floats"),
        (AnyOption, "a misspelt option"),
        (WideColumns, "one number per slot"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_broken_scheduler_is_told_which_law_it_breaks(broken: type[Means], law: str) -> None:
    with pytest.raises(AssertionError, match=f"broken law: .*({law})"):
        check_scheduler(broken())


def test_a_mean_weight_that_was_promised_is_checked() -> None:
    with pytest.raises(AssertionError, match="the mean weight of the training set is 1"):
        check_scheduler(Means(), mean_1=True)


def test_ranks_that_learn_of_their_own_rows_alone_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an exchange that hears only itself makes them."""
    from safe_sched import testing

    together = testing.on_ranks
    monkeypatch.setattr(testing, "on_ranks", lambda ranks, work: together(ranks, work, deaf=True))
    with pytest.raises(AssertionError, match="two ranks have the state of one process"):
        check_scheduler(Means())


# measurements ---------------------------------------------------------------------------------------------------------


def test_the_measurement_of_losses_obeys_the_laws() -> None:
    check_measurement(NLLMeasurement(NLL()))


@dataclass(frozen=True)
class Norm(Need):
    name: ClassVar[str] = "norm"


class Sparse(Measurement[Norm]):
    """The norm of a row's hidden states, once per row, and how many steps there were when it was taken."""

    every_row: ClassVar[bool] = False

    def __init__(self, need: Norm) -> None:
        super().__init__(need)
        self.count = 0

    def before_forward(self, batch: Batch, inputs: Inputs) -> None:
        self.count += 1

    def after_forward(self, batch: Batch, forward: Forward) -> Tensor | None:
        due = self.run.session.due("norm", batch.slots)
        assert forward.hidden is not None
        self.run.session.learn("norm", batch.slots[due], forward.hidden.detach().norm(dim=(1, 2))[due] + self.count)
        return None

    def save(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def load(self, tensors: Any) -> None:
        self.count = int(tensors["count"])


def test_a_measurement_of_some_rows_obeys_the_laws() -> None:
    check_measurement(Sparse(Norm()))


class Draws(Sparse):
    def before_forward(self, batch: Batch, inputs: Inputs) -> None:
        super().before_forward(batch, inputs)
        torch.rand(1)


class Trains(Sparse):
    def before_forward(self, batch: Batch, inputs: Inputs) -> None:
        super().before_forward(batch, inputs)
        self.run.model(**inputs)["loss"].backward()


class Moves(Sparse):
    def after_step(self, *, last: bool, log: bool) -> dict[str, float]:
        with torch.no_grad():
            next(self.run.model.parameters()).mul_(1.01)
        return {}


class Evaluates(Sparse):
    def before_forward(self, batch: Batch, inputs: Inputs) -> None:
        super().before_forward(batch, inputs)
        self.run.model.eval()


class SavesNothing(Sparse):
    def save(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Any) -> None:
        pass


class Silent(Sparse):
    def after_forward(self, batch: Batch, forward: Forward) -> Tensor | None:
        return None


class EveryRow(Sparse):
    every_row = True


class NotFinite(NLLMeasurement):
    def after_forward(self, batch: Batch, forward: Forward) -> Tensor | None:
        return forward.nll / 0


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Draws, "parameters|random numbers"),
        (Trains, "parameters|gradients"),
        (Moves, "parameters"),
        (Evaluates, "training mode"),
        (SavesNothing, "a resumed run measures"),
        (Silent, "returns values"),
        (EveryRow, "with every_row"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_broken_measurement_is_told_which_law_it_breaks(broken: type[Sparse], law: str) -> None:
    with pytest.raises(AssertionError, match=f"broken law: .*({law})"):
        check_measurement(broken(Norm()))


# detectors ------------------------------------------------------------------------------------------------------------


SAFETY = [{"prompt": f"How do I break rule {n}?", "completion": "I cannot help with that."} for n in range(12)]
NAMES = [detector.name for detector in default_detectors([])]


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_of_an_audit_obeys_the_laws(name: str) -> None:
    def make() -> Any:
        (found,) = (detector for detector in default_detectors(SAFETY) if detector.name == name)
        return found

    check_detector(make, [*some_rows(40), *some_rows(4)])


@pytest.mark.parametrize("make", [Counts, Long])
def test_a_detector_of_a_few_lines_obeys_the_laws(make: Any) -> None:
    check_detector(make, some_rows(40))


class Fewer(Counts):
    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        found = super().score(rows)
        return Evidence(found.value[1:], found.reasons, found.group)


class Doubles(Counts):
    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        found = super().score(rows)
        return Evidence(found.value.astype(np.float64), found.reasons, found.group)


class Infinite(Counts):
    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        found = super().score(rows)
        return Evidence(np.full_like(found.value, np.inf), found.reasons, found.group)


class Counting(Counts):
    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        self.words += 1
        self.ready()
        return super().score(rows)


class Chance(Counts):
    def ready(self) -> None:
        self.mean = random.random() + 1


class ByPlace(Counts):
    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        found = super().score(rows)
        return Evidence(found.value + np.arange(len(rows), dtype=np.float32), found.reasons, found.group)


class ToTheShard(Counts):
    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        found = super().score(rows)
        return Evidence(found.value - found.value.max(), found.reasons, found.group)


class LastShard(Counts):
    def observe(self, rows: Sequence[AuditRow]) -> None:
        self.rows = self.words = 0
        super().observe(rows)


class Sets(Counts):
    def settings(self) -> dict[str, object]:
        return {"words": {"a"}}


class Named(Counts):
    name: ClassVar[str] = "Word count"


class Kind(Counts):
    kind: ClassVar[Any] = "bad"


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Fewer, "one value, reason and group per row"),
        (Doubles, "values are float32"),
        (Infinite, "values are finite"),
        (Counting, "scoring twice"),
        (Chance, "same values in every run"),
        (ByPlace, "order in which rows are scored"),
        (ToTheShard, "the shard that it is scored in"),
        (LastShard, "seen in several shards"),
        (Sets, "plain JSON"),
        (Named, "its name is lower case"),
        (Kind, "its kind is one of"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_broken_detector_is_told_which_law_it_breaks(broken: type[Counts], law: str) -> None:
    with pytest.raises(AssertionError, match=f"broken law: .*({law})"):
        check_detector(broken, some_rows(20))
