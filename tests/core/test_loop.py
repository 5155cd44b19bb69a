"""The driver of a plain PyTorch loop: who is told what and when, which loss is weighed, and how it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from safe_sched import BDS, NLL, Fixed
from safe_sched.errors import CoverageError, OptionError, StateError
from safe_sched.needs import Need
from safe_sched.training.forward import Forward
from safe_sched.training.loop import Choice, Inputs, Part, TrainingLoop
from safe_sched.training.session import Batch

ROWS = [[5, 6, 7, 8], [9, 3, 2, 4], [1, 2, 8], [4, 4]]
WEIGHTS = [2.0, 0.5, 0.0, 1.5]


class Tiny(nn.Module):
    """Logits of the next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 10)

    def forward(self, input_ids: Tensor, **others: Any) -> dict[str, Tensor]:
        return {"logits": self.table(input_ids)}


def batch_of(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, labels, mask = (
        torch.tensor([[*values(row), *[fill] * (longest - len(row))] for row in rows])
        for values, fill in ((list, 0), (list, -100), (lambda row: [1] * len(row), 0))
    )
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def nll_sums(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Summed loss of every row: (rows,)."""
    logits = model(**inputs)["logits"][:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none").sum(1)


def label_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    return (inputs["labels"][:, 1:] != -100).sum(1)


MICRO_BATCHES = [batch_of(ROWS[:3]), batch_of(ROWS[3:])]


def one_step(loop: TrainingLoop, model: nn.Module, mean: str = "micro_batch") -> dict[str, float]:
    """One optimiser step's forwards and backwards, as a user writes them."""
    tokens = sum(int(label_tokens(inputs).sum()) for inputs in MICRO_BATCHES)
    with loop.step(MICRO_BATCHES) as metrics:
        for inputs in MICRO_BATCHES:
            with loop.forward(inputs):
                loss = nll_sums(model, inputs).sum()
            count = len(MICRO_BATCHES) * int(label_tokens(inputs).sum()) if mean == "micro_batch" else tokens
            (loss / count).backward()
    return metrics


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@dataclass
class Told(Part):
    """Writes down what it is told, and keeps a number over a resume."""

    name: ClassVar[str] = "told"

    def __post_init__(self) -> None:
        self.events: list[str] = []
        self.steps = 0

    def ready(self) -> None:
        self.events.append("ready")

    def attach(self) -> None:
        self.events.append("attach")

    def before_step(self, batches: Sequence[Batch]) -> None:
        self.events.append(f"before_step {len(batches)}")

    def before_forward(self, batch: Batch, inputs: Inputs) -> None:
        self.events.append("before_forward")

    def after_forward(self, batch: Batch, forward: Forward) -> None:
        self.events.append(f"after_forward {tuple(forward.nll.shape)}")

    def after_optimizer(self) -> None:
        self.events.append("after_optimizer")

    def after_step(self, *, last: bool, log: bool) -> dict[str, float]:
        self.events.append(f"after_step last={last}")
        self.steps += not last
        return {"told": float(self.steps)}

    def save(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.steps = int(tensors["steps"])

    def forget(self) -> None:
        self.events.append("forget")

    def end(self) -> None:
        self.events.append("end")


def loop_of(model: nn.Module, **options: Any) -> tuple[TrainingLoop, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = options.pop("scheduler", None) or Fixed(WEIGHTS)
    rows = options.pop("rows", MICRO_BATCHES)
    return TrainingLoop(model, scheduler, rows, optimizer, **options), optimizer


def test_events_come_in_the_order_of_the_module_docstring(tmp_path: Path) -> None:
    model, told = Tiny(), Told()
    loop, optimizer = loop_of(model, parts=[told])
    forward = ["before_forward", "after_forward (3,)", "before_forward", "after_forward (1,)"]
    with loop.step(MICRO_BATCHES) as metrics:
        for inputs in MICRO_BATCHES:
            with loop.forward(inputs):
                loss = nll_sums(model, inputs).mean()
            loss.backward()
        optimizer.step()
    step = ["before_step 2", *forward, "after_optimizer", "after_step last=False"]
    assert told.events == ["ready", "attach", *step]
    assert metrics["safe_sched/told"] == 1
    assert metrics["safe_sched/weight_mean"] == 1.0
    told.events.clear()
    one_step(loop, model)
    assert told.events == [event for event in step if event != "after_optimizer"]
    told.events.clear()
    loop.save(tmp_path / "state.safetensors")
    assert loop.close() == {"safe_sched/told": 2.0}
    assert told.events == ["forget", "after_step last=True", "end"]
    optimizer.step()
    assert told.events[-1] == "end"  # its hook on the optimiser is gone


@pytest.mark.parametrize("mean", ["micro_batch", "step"])
@pytest.mark.parametrize("normalizer", ["token", "row"])
def test_gradients_are_those_of_the_weighted_loss(mean: Any, normalizer: Any) -> None:
    """``"token"``: the loop's own mean over tokens, with weights in it; ``"row"``: 1/4 sum_i w_i nll_i.

    Control: the gradients of the loop without weights are others.
    """
    model = Tiny()
    loop, _ = loop_of(model, mean=mean, normalizer=normalizer)
    one_step(loop, model, mean)
    found = model.table.weight.grad
    assert found is not None

    def by_hand(weights: Tensor) -> Tensor:
        other = Tiny()
        total, first = torch.zeros(()), 0
        tokens = [label_tokens(inputs) for inputs in MICRO_BATCHES]
        for inputs, mine in zip(MICRO_BATCHES, tokens, strict=True):
            own = weights[first : first + mine.numel()]
            sums = nll_sums(other, inputs)
            if normalizer == "row":
                total = total + (own * sums / mine).sum() / len(ROWS)
            else:
                count = 2 * mine.sum() if mean == "micro_batch" else torch.cat(tokens).sum()
                total = total + (own * sums).sum() / count
            first += mine.numel()
        (gradient,) = torch.autograd.grad(total, [other.table.weight])
        return gradient

    torch.testing.assert_close(found, by_hand(torch.tensor(WEIGHTS)), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, by_hand(torch.ones(4)), rtol=1e-2)


def test_a_resumed_loop_knows_what_the_saved_one_knew(tmp_path: Path) -> None:
    model, path = Tiny(), tmp_path / "state.safetensors"
    loop, _ = loop_of(model, parts=[Told()])
    one_step(loop, model)
    loop.save(path)
    told = Told()
    resumed, _ = loop_of(model, parts=[told])
    resumed.load(path)
    assert (resumed.session.steps, resumed.session.seen.tolist(), told.steps) == (1, [1] * 4, 1)
    one_step(resumed, model)
    with pytest.raises(OptionError, match="load.. after 2 steps; call it before the first step"):
        resumed.load(path)
    for options, match in (
        ({}, "parts: saved"),
        ({"parts": [Told()], "scheduler": Fixed()}, "scheduler: saved"),
        ({"parts": [Told()], "rows": MICRO_BATCHES[:1], "scheduler": Fixed()}, "data: saved"),
        ({"parts": [Told()], "normalizer": "row"}, "normalizer: saved"),
    ):
        other, _ = loop_of(Tiny(), **options)
        with pytest.raises(StateError, match=match):
            other.load(path)


def test_rows_may_be_known_as_they_come_by() -> None:
    loop, _ = loop_of(model := Tiny(), rows=None, scheduler=Fixed())
    one_step(loop, model)
    assert loop.session.index.slots == 4


@pytest.mark.parametrize("where", ["before the forward", "in the forward", "in the backward", "after it"])
def test_an_exception_leaves_no_hook_behind_and_the_next_step_goes_on(where: str) -> None:
    model = Tiny()
    loop, _ = loop_of(model, parts=[told := Told()])

    def fail(now: str) -> None:
        if where == now:
            raise RuntimeError(where)

    def step() -> None:
        with loop.step(MICRO_BATCHES):
            fail("before the forward")
            with loop.forward(MICRO_BATCHES[0]):
                loss = nll_sums(model, MICRO_BATCHES[0]).mean()
                fail("in the forward")
            loss.register_hook(lambda gradient: fail("in the backward"))
            loss.backward()
            fail("after it")

    with pytest.raises(RuntimeError, match=where):
        step()
    assert hooks_on(model) == 0
    assert loop.session.steps == told.steps == 0
    model.zero_grad()
    one_step(loop, model)
    assert loop.session.steps == told.steps == 1
    assert hooks_on(model) == 0


def step_with(loop: TrainingLoop, model: nn.Module, told: Sequence[Inputs], given: Sequence[Inputs]) -> None:
    with loop.step(told):
        for inputs in given:
            with loop.forward(inputs):
                loss = nll_sums(model, inputs).mean()
            loss.backward()


def test_a_row_without_its_weight_stops_the_run() -> None:
    loop, _ = loop_of(model := Tiny())
    with pytest.raises(CoverageError, match=r"micro-batches \[1\] of 2"):
        step_with(loop, model, MICRO_BATCHES, MICRO_BATCHES[:1])
    with pytest.raises(CoverageError, match="not among the 4 rows"):
        step_with(loop, model, [batch_of([[7, 7, 7]])], [])


def test_a_micro_batch_is_given_once_and_as_it_was_told() -> None:
    loop, _ = loop_of(model := Tiny())
    with pytest.raises(OptionError, match="not among the 2 that step.. still waits for"):
        step_with(loop, model, MICRO_BATCHES, [dict(MICRO_BATCHES[0])])
    with pytest.raises(OptionError, match="not among the 1 that step.. still waits for"):
        step_with(loop, model, MICRO_BATCHES, MICRO_BATCHES[:1] * 2)


def test_one_object_may_come_twice_in_a_step() -> None:
    loop, _ = loop_of(model := Tiny())
    step_with(loop, model, MICRO_BATCHES[:1] * 2, MICRO_BATCHES[:1] * 2)
    assert loop.session.seen.sum() == 6


class Unmeasured(Need):
    name: ClassVar[str] = "colour"


class Choosing(Part):
    name = "choosing"

    def choose(self, count: int) -> Choice | None:
        return None


def test_what_cannot_work_is_refused_at_once() -> None:
    class Asks(Fixed):
        needs = (NLL(), Unmeasured())

    model = Tiny()
    for options, match in (
        ({"scheduler": Asks()}, "'fixed' needs 'colour', which nothing that is installed can measure"),
        ({"scheduler": BDS()}, "'bds' measures 'probe' with safety rows"),
        ({"mean": "epoch"}, "mean='epoch'; allowed: 'micro_batch', 'step'"),
        ({"normalizer": "batch"}, "normalizer='batch'"),
        ({"safety_weight": -1.0}, "safety_weight=-1.0; allowed: a finite number >= 0"),
        ({"parts": [Told(), Told()]}, "'told' takes part twice"),
        ({"parts": [Choosing()]}, "'choosing' chooses which micro-batches are computed"),
        ({"parts": ["lissa"]}, "unknown part 'lissa'"),
    ):
        with pytest.raises(OptionError, match=match):
            loop_of(model, **options)
    assert hooks_on(model) == 0
