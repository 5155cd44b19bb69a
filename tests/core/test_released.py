"""The released rule of BDS against a slow loop of the paper's equations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_sched.errors import OptionError, StateError
from safe_sched.needs import NLL
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched.schedulers import BDS, BDSReleased, Fixed
from safe_sched.schedulers import bds_released as released
from safe_sched.training.session import Session
from tests.core.runs import DISTINCT, DUPLICATED, observe, over_duplicates, run, steps_of

# mean weight ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.2}])
@over_duplicates
def test_softmax_weights_have_mean_1_over_the_rows(options, keys):
    """Sum of N * softmax over the N rows is N, a row that occurs three times counting three times."""
    session = Session(BDSReleased(**options), RowIndex(torch.tensor(keys)))
    for step in steps_of(session.index, keys, 30):
        assert session.row_weights().double().mean().item() == pytest.approx(1, abs=1e-6)
        session.scheduler.update(session.state, step)
    assert session.row_weights().std() > 0.02


def test_a_mean_over_slots_would_be_noticed():
    """Control: over distinct rows the mean is not 1 where rows are duplicated; nor is that of other transforms."""
    session = Session(BDSReleased(learning_rate=0.2), RowIndex(torch.tensor(DUPLICATED)))
    for step in steps_of(session.index, DUPLICATED, 10):
        session.scheduler.update(session.state, step)
    assert abs(session.scheduler.slot_weights(session.state).mean().item() - 1) > 0.01
    other = Session(BDSReleased(transform="sigmoid", learning_rate=0.2), RowIndex(torch.tensor(DISTINCT)))
    for step in steps_of(other.index, DISTINCT, 10):
        other.scheduler.update(other.state, step)
    assert abs(other.row_weights().mean().item() - 1) > 0.01


@over_duplicates
def test_weights_before_the_first_step_are_the_transform_of_the_first_logit(keys):
    """softmax of equal logits: 1; 2 * sigmoid(0) = 1; identity: the logit. Fixed without weights: exactly 1."""
    index = RowIndex(torch.tensor(keys))

    def first(scheduler: Any) -> list[float]:
        return scheduler.slot_weights(scheduler.init(index)).tolist()

    assert first(BDSReleased()) == pytest.approx([1.0] * index.slots, abs=1e-6)
    assert first(BDSReleased(transform="sigmoid", initial_logit=0.0)) == [1.0] * index.slots
    assert first(BDSReleased(transform="identity", initial_logit=0.75)) == [0.75] * index.slots
    assert first(BDSReleased(transform="identity", initial_logit=-0.75)) == [0.0] * index.slots
    assert first(Fixed()) == [1.0] * index.slots


# against the paper ----------------------------------------------------------------------------------------------------


class SlowBDS:
    """The paper's loss of the logits, its gradient by autograd, its step by torch's own AdamW, in double precision.

    ``z`` holds one logit per slot; a row reads the logit of its slot, so the softmax runs over all N rows::

        w = N * softmax(z[slot_of_row]),   L_z = (1/|U|) * sum_{i in U} w_i * nll_i,   AdamW without decay on z
    """

    def __init__(self, slot_of_row: Tensor, scheduler: BDSReleased) -> None:
        self.slot_of_row = slot_of_row.long()
        self.transform = scheduler.transform
        self.options = {"lr": scheduler.learning_rate, "betas": scheduler.betas, "eps": scheduler.eps}
        self.first = scheduler.initial_logit
        self.logits = torch.full((int(slot_of_row.max()) + 1,), self.first, dtype=torch.float64, requires_grad=True)
        self.optimizer = self.adamw()

    def adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.logits], **self.options, weight_decay=0.0)

    def row_weights(self) -> Tensor:
        z = self.logits[self.slot_of_row]
        if self.transform == "softmax":
            return len(z) * torch.softmax(z, dim=0)
        return 2 * torch.sigmoid(z) if self.transform == "sigmoid" else torch.relu(z)

    def slot_weights(self) -> Tensor:
        weights = torch.zeros(len(self.logits), dtype=torch.float64)
        return weights.scatter_(0, self.slot_of_row, self.row_weights().detach())

    def update(self, step: Observation) -> None:
        weight_of_slot = {int(s): w for s, w in zip(self.slot_of_row, self.row_weights(), strict=True)}
        terms = [weight_of_slot[int(s)] * float(n) for s, n in zip(step.slots, step["nll"], strict=True)]
        self.optimizer.zero_grad()
        (sum(terms) / len(terms)).backward()
        self.optimizer.step()

    def grow(self, slots: int) -> None:
        """New rows come with the first logit and empty moments; the steps of AdamW go on counting."""
        (moments,) = self.optimizer.state.values()
        new = slots - len(self.logits)
        grown = torch.cat([self.logits.detach(), torch.full((new,), self.first, dtype=torch.float64)])
        self.slot_of_row = torch.arange(slots)
        self.logits = grown.requires_grad_()
        self.optimizer = self.adamw()
        self.optimizer.state[self.logits] = {
            name: value if name == "step" else torch.cat([value, value.new_zeros(new)])
            for name, value in moments.items()
        }


def random_keys(rows: int, duplicates: bool) -> list[int]:
    """Every row its own key, or rows 0, 1, 2 occurring again and again."""
    return [i % 3 if duplicates and i % 2 else i + 5 for i in range(rows)]


TRANSFORMS = [
    BDSReleased(),
    BDSReleased(learning_rate=0.05, betas=(0.8, 0.9), eps=1e-6, initial_logit=-1.0),
    BDSReleased(transform="sigmoid", learning_rate=0.05),
    BDSReleased(transform="identity", learning_rate=0.02, initial_logit=0.3),
]


def after_50_steps(rule: BDSReleased, keys: list[int]) -> tuple[Tensor, Tensor]:
    """Weights of every slot, ours and the slow loop's."""
    index = RowIndex(torch.tensor(keys))
    assert index.row_slots is not None
    slow, scheduler = SlowBDS(index.row_slots, rule), rule
    state = scheduler.init(index)
    for step in steps_of(index, keys, 50, size=4):
        scheduler.update(state, step)
        slow.update(step)
    torch.testing.assert_close(state.logits.double(), slow.logits.detach(), rtol=1e-4, atol=5e-5)
    return scheduler.slot_weights(state).double(), slow.slot_weights()


@pytest.mark.parametrize("scheduler", TRANSFORMS, ids=lambda s: f"{s.transform}-{s.learning_rate}")
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicated"])
def test_the_rule_is_autograd_and_adamw_on_the_loss_of_the_paper(scheduler, duplicates):
    found, expected = after_50_steps(scheduler, random_keys(24, duplicates))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)
    # the weights did move: 50 steps at this rate, or the reference would prove nothing
    assert expected.std() > 0.02


def without_counts(self: BDSReleased, state: Any, slots: Tensor, loss: Tensor) -> tuple[Tensor, float]:
    pi = torch.exp(state.logits[slots].double() - state.log_total)
    total = float((pi * loss).sum())
    return state.rows * pi * (loss - total), -state.rows * total


def without_the_other_rows(self: BDSReleased, state: Any, slots: Tensor, loss: Tensor) -> tuple[Tensor, float]:
    gradient, _ = GRADIENT(self, state, slots, loss)
    return gradient, 0.0


def sum_over_the_batch(self: BDSReleased, state: Any, slots: Tensor, loss: Tensor) -> tuple[Tensor, float]:
    """Twice the gradient in all: AdamW forgives a factor, but not at this eps."""
    gradient, spread = GRADIENT(self, state, slots, loss)
    return 2 * gradient, 2 * spread


GRADIENT = BDSReleased._batch_gradient


@pytest.mark.parametrize(
    ("wrong", "duplicates"), [(without_counts, True), (without_the_other_rows, False), (sum_over_the_batch, False)]
)
def test_a_wrong_gradient_of_bds_would_be_noticed(wrong, duplicates, monkeypatch):
    """Control: counts forgotten, rows outside the step left still, and the mean over the step taken as a sum."""
    scheduler = BDSReleased(learning_rate=0.05, eps=1e-2)
    after_50_steps(scheduler, random_keys(24, duplicates))
    monkeypatch.setattr(BDSReleased, "_batch_gradient", wrong)
    with pytest.raises(AssertionError):
        after_50_steps(scheduler, random_keys(24, duplicates))


def test_the_first_step_of_bds_moves_every_logit_by_the_learning_rate():
    """By hand. N = 4, U = {0, 1}, nll = (2, 1), z equal, so pi = 1/4 and dz_j = (4/4/2) * (1[j in U] nll_j - 3/4):
    +0.625, +0.125, -0.375, -0.375. AdamW's first step is -lr * sign(dz): -lr, -lr, +lr, +lr.
    """
    scheduler = BDSReleased(learning_rate=0.01)
    state = scheduler.init(RowIndex(torch.tensor([1, 2, 3, 4])))
    scheduler.update(
        state, Observation(torch.tensor([0, 1]), torch.tensor([3, 3]), 0, {"nll": torch.tensor([2.0, 1.0])})
    )
    torch.testing.assert_close(state.logits, torch.tensor([0.09, 0.09, 0.11, 0.11]))
    torch.testing.assert_close(state.mean, 0.1 * torch.tensor([0.625, 0.125, -0.375, -0.375]))
    torch.testing.assert_close(state.square, 0.05 * torch.tensor([0.625, 0.125, -0.375, -0.375]) ** 2)


def test_the_gradient_of_a_duplicated_row_in_closed_form():
    """By hand. Rows a, a, b: N = 3, z equal, pi = 1/3. U = {a, a}, nll = (2, 1), so per slot (1/|U|) sum nll = 3/2 and
    sum_U pi nll / |U| = 1/2. dz_a = 3 * 1/3 * (3/2 - 2 * 1/2) = 1/2, dz_b = -3 * 1/3 * 1/2 = -1/2.
    """
    scheduler = BDSReleased()
    state = scheduler.init(RowIndex(torch.tensor([7, 7, 9])))
    scheduler.update(
        state, Observation(torch.tensor([0, 0]), torch.tensor([3, 3]), 0, {"nll": torch.tensor([2.0, 1.0])})
    )
    torch.testing.assert_close(state.mean, 0.1 * torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicated"])
@pytest.mark.parametrize("scheduler", TRANSFORMS[:3], ids=lambda s: f"{s.transform}-{s.learning_rate}")
def test_rows_in_many_chunks_are_rows_in_one(chunk, duplicates, scheduler, monkeypatch):
    keys = random_keys(24, duplicates)
    index = RowIndex(torch.tensor(keys))
    steps = steps_of(index, keys, 20, size=4)
    whole = run(scheduler, index, steps)
    monkeypatch.setattr(released, "_CHUNK", chunk)
    parts = run(scheduler, index, steps)
    for field, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[field], tensor, rtol=1e-5, atol=1e-7)
    found, expected = after_50_steps(scheduler, keys)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


def test_a_chunk_that_is_left_out_would_be_noticed(monkeypatch):
    """Control: an update that reaches only the first chunk differs from the slow loop."""
    monkeypatch.setattr(released, "_CHUNK", 10)
    reached = BDSReleased._adam

    def first_chunk_only(self: BDSReleased, state: Any, gradient: Tensor, logits: Tensor, *moments: Tensor) -> None:
        if logits.storage_offset() == 0:
            reached(self, state, gradient, logits, *moments)

    monkeypatch.setattr(BDSReleased, "_adam", first_chunk_only)
    with pytest.raises(AssertionError):
        after_50_steps(BDSReleased(learning_rate=0.05), random_keys(24, False))


def test_the_higher_loss_loses_weight():
    """The released rule's direction: of two rows that are always seen together, the harder one falls."""
    session = Session(BDSReleased(learning_rate=0.05), RowIndex(torch.tensor([1, 2])))
    for step in range(20):
        seen = Observation(torch.tensor([0, 1]), torch.tensor([3, 3]), step, {"nll": torch.tensor([2.0, 0.5])})
        session.scheduler.update(session.state, seen)
    hard, easy = session.row_weights().tolist()
    assert hard < 0.9 < 1.1 < easy


@pytest.mark.parametrize("transform", ["softmax", "sigmoid", "identity"])
def test_a_step_without_rows_only_lets_the_moments_fade(transform):
    """All rows of a step without labels: gradient 0 for everyone, as AdamW sees a gradient of zeros."""
    scheduler = BDSReleased(transform=transform)
    index = RowIndex(torch.tensor(DISTINCT))
    state = run(scheduler, index, steps_of(index, DISTINCT, 2))
    mean, square = state.tensors()["mean"].clone(), state.tensors()["square"].clone()
    nothing = Observation(torch.empty(0).long(), torch.empty(0).long(), 2, {"nll": torch.empty(0)})
    scheduler.update(state, nothing)
    torch.testing.assert_close(state.tensors()["mean"], 0.9 * mean)
    torch.testing.assert_close(state.tensors()["square"], 0.95 * square)
    assert torch.isfinite(scheduler.slot_weights(state)).all()


# streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", TRANSFORMS, ids=lambda s: f"{s.transform}-{s.learning_rate}")
def test_a_stream_of_bds_is_the_slow_loop_that_grows(scheduler):
    """New rows join with the first logit and no momentum; for softmax N grows with them. Compared after every step."""
    generator = torch.Generator().manual_seed(0)
    session = Session(scheduler, RowIndex(None))
    slow: SlowBDS | None = None
    for number in range(30):
        keys = torch.randint(0, number + 4, (4,), generator=generator)
        if session.index.add(keys):
            session._grow()
            if slow is None:
                slow = SlowBDS(torch.arange(session.index.slots), scheduler)
            else:
                slow.grow(session.index.slots)
        assert slow is not None
        found = session.row_weights().double()
        torch.testing.assert_close(found, slow.slot_weights(), rtol=2e-4, atol=1e-5)
        if scheduler.transform == "softmax":
            assert found.mean().item() == pytest.approx(1, abs=1e-5)
        step = observe(session.index, keys.tolist(), number, generator)
        session.scheduler.update(session.state, step)
        slow.update(step)
    assert session.index.slots > 15


def test_growth_that_forgot_the_softmax_would_be_noticed(monkeypatch):
    """Control: the sum that the softmax divides by left as it was, the mean weight drifts away from 1."""
    scheduler = BDSReleased()
    index = RowIndex(None)
    index.add(torch.tensor([1, 2]))
    state = scheduler.init(index)
    index.add(torch.tensor([3, 4]))
    grown = scheduler.grow(state, index)
    assert scheduler.slot_weights(grown).mean().item() == pytest.approx(1, abs=1e-6)
    forgetful = dataclasses.replace(grown, log_total=state.log_total)
    assert scheduler.slot_weights(forgetful).mean().item() == pytest.approx(2, abs=1e-5)


def test_rows_that_a_stream_brings_at_once_are_rows_known_before():
    """All keys in ascending order in the first step: slots and weights as in a set that was indexed."""
    known, stream = RowIndex(torch.tensor(sorted(DISTINCT))), RowIndex(None)
    scheduler = BDSReleased()
    state = scheduler.init(stream)
    stream.add(torch.tensor(sorted(DISTINCT)))
    state = scheduler.grow(state, stream)
    for step in steps_of(known, DISTINCT, 5):
        scheduler.update(state, step)
    assert torch.equal(
        scheduler.slot_weights(state), scheduler.slot_weights(run(scheduler, known, steps_of(known, DISTINCT, 5)))
    )


def test_a_stream_may_begin_with_a_step_without_rows():
    scheduler = BDSReleased()
    state = scheduler.init(RowIndex(None))
    scheduler.update(state, Observation(torch.empty(0).long(), torch.empty(0).long(), 0, {"nll": torch.empty(0)}))
    assert scheduler.slot_weights(state).tolist() == []


# its public face ------------------------------------------------------------------------------------------------------


def test_the_released_rule_reads_losses_and_takes_no_scores():
    scheduler, slots = BDSReleased(), torch.tensor([0, 1])
    state = scheduler.init(RowIndex(torch.tensor(DISTINCT)))
    assert scheduler.needs == (NLL(),)
    assert scheduler.columns(state) == {}
    assert not scheduler.revisit(state, slots).any()
    assert not scheduler.doubtful(state, "nll", slots).any()
    with pytest.raises(OptionError, match="'bds_released' takes no values of 'probe'; what it has measured: 'nll'"):
        scheduler.learn(state, "probe", slots, torch.ones(2))
    assert dataclasses.replace(scheduler, learning_rate=0.1) == BDSReleased(learning_rate=0.1)


def test_the_state_of_another_rule_is_not_resumed(tmp_path):
    """A run of the released rule does not go on as one of the posterior, nor the other way round."""
    session = Session(BDSReleased(), RowIndex(torch.tensor(DISTINCT)))
    session.save(tmp_path / "state")
    with pytest.raises(StateError, match="scheduler"):
        Session(BDS(), RowIndex(torch.tensor(DISTINCT))).load(tmp_path / "state")
