"""Laws that hold for every method of the catalogue, and each method against its paper."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.errors import DataError, OptionError
from safe_sched.index import RowIndex
from safe_sched.schedulers import BDS, CATALOG, Fixed, bds, build
from safe_sched.session import Session
from safe_sched.types import Observation, Scheduler, State
from tests.core.batches import laws, pad, row

DISTINCT = [40, 10, 30, 20, 60, 50]
DUPLICATED = [40, 10, 40, 20, 10, 40, 50]
GIVEN = {40: 0.5, 10: 2.0, 30: 0.0, 20: 1.0, 60: 3.0, 50: 0.25}

# every way of building each method that is to obey the laws
CASES: dict[str, list[dict[str, Any]]] = {
    "bds": [
        {},
        {"learning_rate": 0.2, "betas": (0.5, 0.9)},
        {"transform": "sigmoid", "initial_logit": 0.0, "learning_rate": 0.1},
        {"transform": "identity", "initial_logit": 1.0, "learning_rate": 0.1},
    ],
    "fixed": [{}, {"values": list(GIVEN.values()), "keys": list(GIVEN)}],
}
EVERY = [
    pytest.param(name, options, id=f"{name}{i}") for name, cases in CASES.items() for i, options in enumerate(cases)
]
over_the_catalogue = pytest.mark.parametrize(("name", "options"), EVERY)
over_duplicates = pytest.mark.parametrize("keys", [DISTINCT, DUPLICATED], ids=["distinct", "duplicated"])


def observe(index: RowIndex, keys: Sequence[int], step: int, generator: torch.Generator) -> Observation:
    slots = index.lookup(torch.tensor(keys))
    assert (slots >= 0).all()
    nll = 3 * torch.rand(len(keys), generator=generator)
    return Observation(slots, nll, torch.randint(1, 9, (len(keys),), generator=generator), step)


def steps_of(index: RowIndex, keys: Sequence[int], count: int, size: int = 3, seed: int = 0) -> list[Observation]:
    """Steps on random rows, the same row sometimes twice in one step."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(keys), (count, size), generator=generator).tolist()
    return [observe(index, [keys[i] for i in pick], step, generator) for step, pick in enumerate(picks)]


def run(scheduler: Scheduler, index: RowIndex, steps: list[Observation]) -> State:
    state = scheduler.init(index)
    for step in steps:
        scheduler.update(state, step)
    return state


def same(a: State, b: State) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# laws over the catalogue ----------------------------------------------------------------------------------------------


def test_every_method_of_the_catalogue_is_put_to_the_laws():
    assert CASES.keys() == CATALOG.keys()
    for name, cls in CATALOG.items():
        assert cls.name == name
        assert isinstance(build(name), Scheduler)


@over_the_catalogue
@over_duplicates
def test_weights_are_float32_on_the_cpu_finite_and_not_negative(name, options, keys):
    scheduler, index = build(name, **options), RowIndex(torch.tensor(keys))
    state = scheduler.init(index)
    for step in steps_of(index, keys, 5):
        for weights, size in (
            (scheduler.weights(state, step), step.slots.numel()),
            (scheduler.slot_weights(state), index.slots),
        ):
            assert weights.shape == (size,)
            assert weights.dtype == torch.float32
            assert weights.device.type == "cpu"
            assert not weights.requires_grad
            assert torch.isfinite(weights).all()
            assert (weights >= 0).all()
        metrics = scheduler.update(state, step)
        assert all(isinstance(v, float) and math.isfinite(v) for v in metrics.values())


@over_the_catalogue
@over_duplicates
def test_the_weight_of_a_row_is_the_weight_of_its_slot(name, options, keys):
    scheduler, index = build(name, **options), RowIndex(torch.tensor(keys))
    steps = steps_of(index, keys, 4)
    state = run(scheduler, index, steps)
    assert torch.equal(scheduler.weights(state, steps[0]), scheduler.slot_weights(state)[steps[0].slots])


@over_the_catalogue
def test_asking_for_weights_changes_nothing(name, options):
    scheduler, index = build(name, **options), RowIndex(torch.tensor(DUPLICATED))
    steps = steps_of(index, DUPLICATED, 4)
    state, untouched = run(scheduler, index, steps), run(scheduler, index, steps)
    scheduler.weights(state, steps[0])
    scheduler.slot_weights(state)
    assert same(state, untouched)


@over_the_catalogue
@over_duplicates
def test_the_same_run_twice_gives_the_same_state(name, options, keys):
    index = RowIndex(torch.tensor(keys))
    steps = steps_of(index, keys, 6)
    assert same(run(build(name, **options), index, steps), run(build(name, **options), index, steps))


@over_the_catalogue
def test_another_run_gives_another_state(name, options):
    """Control for the law above: a method that learns anything tells two runs apart."""
    index = RowIndex(torch.tensor(DISTINCT))
    first = run(build(name, **options), index, steps_of(index, DISTINCT, 6, seed=0))
    second = run(build(name, **options), index, steps_of(index, DISTINCT, 6, seed=1))
    assert same(first, second) == (name == "fixed")


@over_the_catalogue
@over_duplicates
def test_a_step_in_micro_batches_is_the_step_in_one(name, options, keys):
    """Rows of a step, cut at any place: the same weight for each row, and the same update from the parts as one."""
    index = RowIndex(torch.tensor(keys))
    whole_scheduler, parts_scheduler = build(name, **options), build(name, **options)
    whole, parts = whole_scheduler.init(index), parts_scheduler.init(index)
    for number, step in enumerate(steps_of(index, keys, 6, size=5)):
        cut = number % 6
        pieces = [
            Observation(step.slots[p], None if step.nll is None else step.nll[p], step.label_tokens[p], step.step)
            for p in (slice(0, cut), slice(cut, None))
        ]
        weights = torch.cat([parts_scheduler.weights(parts, piece) for piece in pieces])
        assert torch.equal(weights, whole_scheduler.weights(whole, step))
        together = Observation.concatenate(pieces)
        for field in dataclasses.fields(Observation):
            assert torch.equal(
                torch.as_tensor(getattr(together, field.name)), torch.as_tensor(getattr(step, field.name))
            )
        parts_scheduler.update(parts, together)
        whole_scheduler.update(whole, step)
    assert same(whole, parts)


def test_an_update_per_micro_batch_would_be_noticed():
    """Control: two updates of half a step are not one update of the step."""
    index = RowIndex(torch.tensor(DISTINCT))
    (step,) = steps_of(index, DISTINCT, 1, size=4)
    halves = [Observation(step.slots[p], step.nll[p], step.label_tokens[p], 0) for p in (slice(0, 2), slice(2, 4))]
    assert not same(run(BDS(compat="released"), index, halves), run(BDS(compat="released"), index, [step]))


@over_the_catalogue
def test_the_order_of_rows_within_a_step_does_not_matter(name, options):
    index = RowIndex(torch.tensor(DUPLICATED))
    steps = steps_of(index, DUPLICATED, 6, size=5)
    turned = [Observation(s.slots.flip(0), s.nll.flip(0), s.label_tokens.flip(0), s.step) for s in steps]
    first, second = run(build(name, **options), index, steps), run(build(name, **options), index, turned)
    for field, tensor in first.tensors().items():
        torch.testing.assert_close(second.tensors()[field], tensor, rtol=1e-5, atol=1e-6)


@over_the_catalogue
def test_the_order_of_the_training_set_does_not_matter(name, options):
    """A shuffled copy of the set has the same slots, so a row keeps its weight."""
    first, second = RowIndex(torch.tensor(DUPLICATED)), RowIndex(torch.tensor(DUPLICATED[::-1]))
    states = [run(build(name, **options), index, steps_of(index, DUPLICATED, 4)) for index in (first, second)]
    assert same(*states)


@over_the_catalogue
@over_duplicates
def test_a_state_survives_the_way_through_tensors(name, options, keys):
    scheduler, index = build(name, **options), RowIndex(torch.tensor(keys))
    state = run(scheduler, index, steps_of(index, keys, 3))
    tensors = state.tensors()
    assert tensors.keys() == {field.name for field in dataclasses.fields(state)}
    assert all(isinstance(t, Tensor) for t in tensors.values())
    back = scheduler.state_type.from_tensors(tensors)
    assert type(back) is type(state)
    for field in dataclasses.fields(state):
        assert type(getattr(back, field.name)) is type(getattr(state, field.name))
    assert same(back, state)


@over_the_catalogue
@pytest.mark.parametrize("stop", range(5))
def test_a_run_that_stops_and_resumes_is_the_run_that_does_not(name, options, stop, tmp_path):
    """Save after `stop` of 5 steps, load into a new session, go on: the same state, weights, counts, bit for bit."""
    keys = torch.tensor(DUPLICATED)
    through, before, after = (Session(build(name, **options), RowIndex(keys)) for _ in range(3))
    steps = steps_of(through.index, DUPLICATED, 5)

    def go(session: Session, part: list[Observation]) -> None:
        for step in part:
            session.scheduler.update(session.state, step)
            session.seen.index_add_(0, step.slots, torch.ones(3, dtype=torch.int32))
            session.steps += 1
            session.rows_trained += 3

    go(through, steps)
    go(before, steps[:stop])
    before.save(tmp_path / "state")
    after.load(tmp_path / "state", steps=stop)
    go(after, steps[stop:])
    assert same(after.state, through.state)
    assert torch.equal(after.row_weights(), through.row_weights())
    assert torch.equal(after.seen, through.seen)
    assert (after.steps, after.rows_trained) == (through.steps, through.rows_trained) == (5, 15)


@over_the_catalogue
def test_training_on_after_a_load_does_not_write_into_the_file(name, options, tmp_path):
    path = tmp_path / "state"
    session = Session(build(name, **options), RowIndex(torch.tensor(DISTINCT)))
    session.save(path)
    content = path.read_bytes()
    session.load(path)
    for step in steps_of(session.index, DISTINCT, 2):
        session.scheduler.update(session.state, step)
    assert path.read_bytes() == content


@over_the_catalogue
def test_settings_are_json_and_say_which_method_it_is(name, options):
    settings = build(name, **options).settings()
    assert settings["name"] == name
    assert json.loads(json.dumps(settings)).keys() == settings.keys()


# mean weight ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.2}])
@over_duplicates
def test_softmax_weights_have_mean_1_over_the_rows(options, keys):
    """Sum of N * softmax over the N rows is N, a row that occurs three times counting three times."""
    session = Session(BDS(compat="released", **options), RowIndex(torch.tensor(keys)))
    for step in steps_of(session.index, keys, 30):
        assert session.row_weights().double().mean().item() == pytest.approx(1, abs=1e-6)
        session.scheduler.update(session.state, step)
    assert session.row_weights().std() > 0.02


def test_a_mean_over_slots_would_be_noticed():
    """Control: over distinct rows the mean is not 1 where rows are duplicated; nor is that of other transforms."""
    session = Session(BDS(compat="released", learning_rate=0.2), RowIndex(torch.tensor(DUPLICATED)))
    for step in steps_of(session.index, DUPLICATED, 10):
        session.scheduler.update(session.state, step)
    assert abs(session.scheduler.slot_weights(session.state).mean().item() - 1) > 0.01
    other = Session(BDS(compat="released", transform="sigmoid", learning_rate=0.2), RowIndex(torch.tensor(DISTINCT)))
    for step in steps_of(other.index, DISTINCT, 10):
        other.scheduler.update(other.state, step)
    assert abs(other.row_weights().mean().item() - 1) > 0.01


@over_duplicates
def test_weights_before_the_first_step_are_the_transform_of_the_first_logit(keys):
    """softmax of equal logits: 1; 2 * sigmoid(0) = 1; identity: the logit. Fixed without weights: exactly 1."""
    index = RowIndex(torch.tensor(keys))

    def first(scheduler: Any) -> list[float]:
        return scheduler.slot_weights(scheduler.init(index)).tolist()

    assert first(BDS(compat="released")) == pytest.approx([1.0] * index.slots, abs=1e-6)
    assert first(BDS(compat="released", transform="sigmoid", initial_logit=0.0)) == [1.0] * index.slots
    assert first(BDS(compat="released", transform="identity", initial_logit=0.75)) == [0.75] * index.slots
    assert first(BDS(compat="released", transform="identity", initial_logit=-0.75)) == [0.0] * index.slots
    assert first(Fixed()) == [1.0] * index.slots


# BDS against the paper ------------------------------------------------------------------------------------------------


class SlowBDS:
    """The paper's loss of the logits, its gradient by autograd, its step by torch's own AdamW, in double precision.

    ``z`` holds one logit per slot; a row reads the logit of its slot, so the softmax runs over all N rows::

        w = N * softmax(z[slot_of_row]),   L_z = (1/|U|) * sum_{i in U} w_i * nll_i,   AdamW without decay on z
    """

    def __init__(self, slot_of_row: Tensor, scheduler: BDS) -> None:
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
        assert step.nll is not None
        weight_of_slot = {int(s): w for s, w in zip(self.slot_of_row, self.row_weights(), strict=True)}
        terms = [weight_of_slot[int(s)] * float(n) for s, n in zip(step.slots, step.nll, strict=True)]
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
    BDS(compat="released"),
    BDS(compat="released", learning_rate=0.05, betas=(0.8, 0.9), eps=1e-6, initial_logit=-1.0),
    BDS(compat="released", transform="sigmoid", learning_rate=0.05),
    BDS(compat="released", transform="identity", learning_rate=0.02, initial_logit=0.3),
]


def after_50_steps(scheduler: BDS, keys: list[int]) -> tuple[Tensor, Tensor]:
    """Weights of every slot, ours and the slow loop's."""
    index = RowIndex(torch.tensor(keys))
    assert index.row_slots is not None
    slow, state = SlowBDS(index.row_slots, scheduler), scheduler.init(index)
    for step in steps_of(index, keys, 50, size=4):
        scheduler.update(state, step)
        slow.update(step)
    torch.testing.assert_close(state.logits.double(), slow.logits.detach(), rtol=1e-4, atol=5e-5)
    return scheduler.slot_weights(state).double(), slow.slot_weights()


@pytest.mark.parametrize("scheduler", TRANSFORMS, ids=lambda s: f"{s.transform}-{s.learning_rate}")
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicated"])
def test_bds_is_autograd_and_adamw_on_the_loss_of_the_paper(scheduler, duplicates):
    found, expected = after_50_steps(scheduler, random_keys(24, duplicates))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)
    # the weights did move: 50 steps at this rate, or the reference would prove nothing
    assert expected.std() > 0.02


def without_counts(self: BDS, state: Any, slots: Tensor, loss: Tensor) -> tuple[Tensor, float]:
    pi = torch.exp(state.logits[slots].double() - state.log_total)
    total = float((pi * loss).sum())
    return state.rows * pi * (loss - total), -state.rows * total


def without_the_other_rows(self: BDS, state: Any, slots: Tensor, loss: Tensor) -> tuple[Tensor, float]:
    gradient, _ = BDS_GRADIENT(self, state, slots, loss)
    return gradient, 0.0


def sum_over_the_batch(self: BDS, state: Any, slots: Tensor, loss: Tensor) -> tuple[Tensor, float]:
    """Twice the gradient in all: AdamW forgives a factor, but not at this eps."""
    gradient, spread = BDS_GRADIENT(self, state, slots, loss)
    return 2 * gradient, 2 * spread


BDS_GRADIENT = BDS._batch_gradient


@pytest.mark.parametrize(
    ("wrong", "duplicates"), [(without_counts, True), (without_the_other_rows, False), (sum_over_the_batch, False)]
)
def test_a_wrong_gradient_of_bds_would_be_noticed(wrong, duplicates, monkeypatch):
    """Control: counts forgotten, rows outside the step left still, and the mean over the step taken as a sum."""
    scheduler = BDS(compat="released", learning_rate=0.05, eps=1e-2)
    after_50_steps(scheduler, random_keys(24, duplicates))
    monkeypatch.setattr(BDS, "_batch_gradient", wrong)
    with pytest.raises(AssertionError):
        after_50_steps(scheduler, random_keys(24, duplicates))


def test_the_first_step_of_bds_moves_every_logit_by_the_learning_rate():
    """By hand. N = 4, U = {0, 1}, nll = (2, 1), z equal, so pi = 1/4 and dz_j = (4/4/2) * (1[j in U] nll_j - 3/4):
    +0.625, +0.125, -0.375, -0.375. AdamW's first step is -lr * sign(dz): -lr, -lr, +lr, +lr.
    """
    scheduler = BDS(compat="released", learning_rate=0.01)
    state = scheduler.init(RowIndex(torch.tensor([1, 2, 3, 4])))
    scheduler.update(state, Observation(torch.tensor([0, 1]), torch.tensor([2.0, 1.0]), torch.tensor([3, 3]), 0))
    torch.testing.assert_close(state.logits, torch.tensor([0.09, 0.09, 0.11, 0.11]))
    torch.testing.assert_close(state.mean, 0.1 * torch.tensor([0.625, 0.125, -0.375, -0.375]))
    torch.testing.assert_close(state.square, 0.05 * torch.tensor([0.625, 0.125, -0.375, -0.375]) ** 2)


def test_the_gradient_of_a_duplicated_row_in_closed_form():
    """By hand. Rows a, a, b: N = 3, z equal, pi = 1/3. U = {a, a}, nll = (2, 1), so per slot (1/|U|) sum nll = 3/2 and
    sum_U pi nll / |U| = 1/2. dz_a = 3 * 1/3 * (3/2 - 2 * 1/2) = 1/2, dz_b = -3 * 1/3 * 1/2 = -1/2.
    """
    scheduler = BDS(compat="released")
    state = scheduler.init(RowIndex(torch.tensor([7, 7, 9])))
    scheduler.update(state, Observation(torch.tensor([0, 0]), torch.tensor([2.0, 1.0]), torch.tensor([3, 3]), 0))
    torch.testing.assert_close(state.mean, 0.1 * torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicated"])
@pytest.mark.parametrize("scheduler", TRANSFORMS[:3], ids=lambda s: f"{s.transform}-{s.learning_rate}")
def test_rows_in_many_chunks_are_rows_in_one(chunk, duplicates, scheduler, monkeypatch):
    keys = random_keys(24, duplicates)
    index = RowIndex(torch.tensor(keys))
    steps = steps_of(index, keys, 20, size=4)
    whole = run(scheduler, index, steps)
    monkeypatch.setattr(bds, "_CHUNK", chunk)
    parts = run(scheduler, index, steps)
    for field, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[field], tensor, rtol=1e-5, atol=1e-7)
    found, expected = after_50_steps(scheduler, keys)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


def test_a_chunk_that_is_left_out_would_be_noticed(monkeypatch):
    """Control: an update that reaches only the first chunk differs from the slow loop."""
    monkeypatch.setattr(bds, "_CHUNK", 10)
    reached = BDS._adam

    def first_chunk_only(self: BDS, state: Any, gradient: Tensor, logits: Tensor, *moments: Tensor) -> None:
        if logits.storage_offset() == 0:
            reached(self, state, gradient, logits, *moments)

    monkeypatch.setattr(BDS, "_adam", first_chunk_only)
    with pytest.raises(AssertionError):
        after_50_steps(BDS(compat="released", learning_rate=0.05), random_keys(24, False))


def test_the_higher_loss_loses_weight():
    """The released rule's direction: of two rows that are always seen together, the harder one falls."""
    session = Session(BDS(compat="released", learning_rate=0.05), RowIndex(torch.tensor([1, 2])))
    for step in range(20):
        seen = Observation(torch.tensor([0, 1]), torch.tensor([2.0, 0.5]), torch.tensor([3, 3]), step)
        session.scheduler.update(session.state, seen)
    hard, easy = session.row_weights().tolist()
    assert hard < 0.9 < 1.1 < easy


@pytest.mark.parametrize("transform", ["softmax", "sigmoid", "identity"])
def test_a_step_without_rows_only_lets_the_moments_fade(transform):
    """All rows of a step without labels: gradient 0 for everyone, as AdamW sees a gradient of zeros."""
    scheduler = BDS(compat="released", transform=transform)
    index = RowIndex(torch.tensor(DISTINCT))
    state = run(scheduler, index, steps_of(index, DISTINCT, 2))
    mean, square = state.tensors()["mean"].clone(), state.tensors()["square"].clone()
    nothing = Observation(torch.empty(0).long(), torch.empty(0), torch.empty(0).long(), 2)
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
        scheduler.update(session.state, step)
        slow.update(step)
    assert session.index.slots > 15


def test_growth_that_forgot_the_softmax_would_be_noticed(monkeypatch):
    """Control: the sum that the softmax divides by left as it was, the mean weight drifts away from 1."""
    scheduler = BDS(compat="released")
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
    scheduler = BDS(compat="released")
    state = scheduler.init(stream)
    stream.add(torch.tensor(sorted(DISTINCT)))
    state = scheduler.grow(state, stream)
    for step in steps_of(known, DISTINCT, 5):
        scheduler.update(state, step)
    assert torch.equal(
        scheduler.slot_weights(state), scheduler.slot_weights(run(scheduler, known, steps_of(known, DISTINCT, 5)))
    )


def test_a_stream_may_begin_with_a_step_without_rows():
    scheduler = BDS(compat="released")
    state = scheduler.init(RowIndex(None))
    scheduler.update(state, Observation(torch.empty(0).long(), torch.empty(0), torch.empty(0).long(), 0))
    assert scheduler.slot_weights(state).tolist() == []


def test_fixed_weights_by_key_fit_a_stream():
    scheduler, index = Fixed([0.5, 2.0, 3.0], keys=[20, 10, 30]), RowIndex(None)
    state = scheduler.init(index)
    index.add(torch.tensor([30, 10]))
    state = scheduler.grow(state, index)
    assert scheduler.slot_weights(state).tolist() == [3.0, 2.0]
    index.add(torch.tensor([99]))
    with pytest.raises(DataError, match="no weight for 1 of 3"):
        scheduler.grow(state, index)


# fixed weights --------------------------------------------------------------------------------------------------------


def fixed_rows(values: Any, keys: list[int], names: Any = None) -> list[float]:
    return Session(Fixed(values, keys=names), RowIndex(torch.tensor(keys))).row_weights().tolist()


@laws
@given(st.lists(st.sampled_from(list(GIVEN)), min_size=1, max_size=8))
def test_fixed_weights_by_row_stay_with_their_rows(keys):
    assert fixed_rows([GIVEN[k] for k in keys], keys) == [GIVEN[k] for k in keys]


@laws
@given(st.lists(st.sampled_from(list(GIVEN)), min_size=1, max_size=8), st.permutations(list(GIVEN)))
def test_fixed_weights_by_key_stay_with_their_rows_in_any_order(keys, names):
    """Keys of rows that are not in the set may be named as well."""
    assert fixed_rows([GIVEN[k] for k in names], keys, names) == [GIVEN[k] for k in keys]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array], ids=lambda k: k.__name__)
def test_fixed_takes_lists_tensors_and_arrays(kind):
    assert fixed_rows(kind([1.0, 0.5]), [9, 4], kind([4, 9])) == [0.5, 1.0]


# the top bit set and not set: as int64 the first is negative, as uint64 it is above 2**63
SPREAD = [-5, 7, 9, -(2**63)]


@pytest.mark.parametrize("form", ["arrow", "numpy", "list"])
def test_the_keys_of_an_exported_table_name_its_rows(form):
    """`Session.table` lists keys as uint64, half of them above 2**63; its weights and keys go back in as they are."""
    table = Session(Fixed([1.0, 2.0, 3.0, 4.0]), RowIndex(torch.tensor(SPREAD))).table()
    values, names = table.column("weight"), table.column("key")
    if form == "numpy":
        values, names = values.to_numpy(), names.to_numpy()
    if form == "list":
        values, names = values.to_pylist(), names.to_pylist()
    torch.set_warn_always(True)  # torch warns of an array that it may not write to once in a process
    try:
        assert fixed_rows(values, SPREAD, names) == [1.0, 2.0, 3.0, 4.0]
    finally:
        torch.set_warn_always(False)


def test_signed_and_unsigned_keys_name_the_same_rows():
    unsigned = np.array(SPREAD, dtype=np.int64).view(np.uint64)
    for names in (SPREAD, torch.tensor(SPREAD), np.array(SPREAD), unsigned):
        assert fixed_rows([1.0, 2.0, 3.0, 4.0], SPREAD, names) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf, -math.inf])
def test_a_fixed_weight_that_is_negative_or_not_finite_is_named(bad):
    with pytest.raises(OptionError, match=f"weight number 2 is {bad}; allowed: finite numbers >= 0"):
        Fixed([1.0, 0.0, bad])


def test_fixed_keys_without_weights_are_an_option_error():
    with pytest.raises(OptionError, match="gives no weights"):
        Fixed(keys=[1, 2])


def test_fixed_keys_and_weights_of_different_number_are_an_option_error():
    with pytest.raises(OptionError, match="3 keys for 2 weights"):
        Fixed([1.0, 2.0], keys=[1, 2, 3])


def test_an_option_error_of_fixed_does_not_print_all_the_weights():
    with pytest.raises(OptionError) as caught:
        Fixed([1.0] * 1000 + [-1.0])
    assert str(caught.value).startswith("Fixed: weight number 1000 is -1.0")


@pytest.mark.parametrize("count", [0, 2, 4])
def test_fixed_weights_of_another_number_than_rows_are_a_data_error(count):
    with pytest.raises(DataError, match=f"{count} weights for a training set of 3 rows"):
        fixed_rows([1.0] * count, [1, 2, 3])


def test_different_fixed_weights_for_identical_rows_are_a_data_error():
    with pytest.raises(DataError, match=r"rows 1 and 3 have the same content but weights 0\.25 and 4\.0"):
        fixed_rows([1.0, 0.25, 1.0, 4.0], [9, 5, 7, 5])
    assert fixed_rows([1.0, 0.25, 1.0, 0.25], [9, 5, 7, 5]) == [1.0, 0.25, 1.0, 0.25]


def test_a_row_without_a_fixed_weight_is_a_data_error():
    with pytest.raises(DataError, match="no weight for 2 of 3 distinct training rows"):
        fixed_rows([1.0, 2.0], [5, 6, 7, 7], [6, 9])


def test_two_fixed_weights_for_one_key_are_an_error():
    with pytest.raises((DataError, OptionError), match="weights"):
        fixed_rows([1.0, 2.0, 3.0], [5, 6], [5, 6, 5])


def test_no_fixed_weights_at_all_leave_every_row_without_one():
    with pytest.raises(DataError, match="no weight for 2 of 2"):
        fixed_rows([], [5, 6], [])


def test_fixed_weights_by_row_do_not_fit_a_stream():
    with pytest.raises(DataError, match="stream"):
        Session(Fixed([1.0]), RowIndex(None))


def test_equal_fixed_weights_fit_any_set_and_any_stream():
    assert fixed_rows(None, [3, 3, 4]) == [1.0, 1.0, 1.0]
    micro = pad([row(5, 6, 7), row(8, 9)])
    session = Session(Fixed(), RowIndex(None))
    (batch,) = session.begin_step([micro])
    assert session.weigh(batch, None).tolist() == [1.0, 1.0]


# options --------------------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_named_with_the_nearest_known_one():
    with pytest.raises(OptionError, match=r"unknown scheduler 'bsd' \(did you mean 'bds'\?\); allowed: 'bds', 'fixed'"):
        build("bsd")


def test_a_built_scheduler_is_given_back():
    scheduler = BDS(compat="released")
    assert build(scheduler) is scheduler


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0},
        {"learning_rate": -1e-3},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"learning_rate": "fast"},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9,)},
        {"eps": 0},
        {"eps": math.inf},
        {"transform": "softmx"},
        {"compat": "paper"},
        {"initial_logit": math.nan},
        {"initial_logit": math.inf},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_an_option_error_that_names_it(options):
    (name,) = options
    with pytest.raises(OptionError, match=rf"BDS\({name}.*="):
        BDS(compat="released", **options)


@pytest.mark.parametrize("cls", CATALOG.values(), ids=CATALOG)
def test_an_unknown_option_is_an_option_error_that_lists_the_known(cls):
    with pytest.raises(OptionError, match=f"unknown option of {cls.__name__} 'lerning_rate'.*allowed: ") as caught:
        cls(lerning_rate=1)
    assert all(repr(field.name) in str(caught.value) for field in dataclasses.fields(cls))


@pytest.mark.parametrize("scheduler", [BDS(compat="released"), Fixed([1.0])], ids=["bds", "fixed"])
def test_options_cannot_be_changed_after_the_start(scheduler):
    field = dataclasses.fields(scheduler)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(scheduler, field, None)
