"""Sampling rows: the rule against a slow loop, its expectation, counters, regrouping, and saving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_sched.errors import CoverageError, NumericsError, StateError
from safe_sched.rows.index import RowIndex
from safe_sched.schedulers import BDS, Antibody, build
from safe_sched.training.sampling import FLOOR, Draws, Items, uniform
from safe_sched.training.session import Session
from tests.core.runs import over_duplicates, run, steps_of
from tests.core.test_schedulers import over_the_catalogue


def order(sizes: list[int], start: int = 0) -> list[list[int]]:
    """Micro-batches of given sizes over items start, start + 1, ..."""
    batches, place = [], start
    for size in sizes:
        batches.append(list(range(place, place + size)))
        place += size
    return batches


def make(weights: Any, *, tokens: Any = None, starts: Any = None, slots: Any = None, **options: Any) -> Draws:
    weights = torch.as_tensor(weights, dtype=torch.float32)
    slots = torch.arange(weights.numel()) if slots is None else torch.tensor(slots)
    tokens = torch.ones(weights.numel()) if tokens is None else torch.tensor(tokens)
    items = Items(slots, None if starts is None else torch.tensor(starts))
    return Draws(items, tokens, lambda slots: weights[slots], **({"seed": 0} | options))


def walk(draws: Draws, base: Any, epoch: int = 0, skip: int = 0, regroup: bool = True) -> Any:
    draws.begin_epoch(epoch, skip)
    return draws.walk(base, regroup=regroup)


weights_of = st.lists(st.floats(0, 3, width=32), min_size=12, max_size=12)


# the rule -----------------------------------------------------------------------------------------------------------


@given(weights_of, st.integers(1, 4), st.integers(0, 99), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_rows_are_kept_by_the_rule(weights: list[float], size: int, seed: int, epoch: int) -> None:
    """The slow loop: row i is kept where ``u_i < min(max(w_i, floor), 1)``, in order; ``1 / p`` goes with it."""
    accumulation = 12 // size // 2 or 1
    draws = make(weights, seed=seed, accumulation=accumulation)
    base = [list(range(i, min(i + size, 12))) for i in range(0, 12, size)]
    loaded = list(walk(draws, base, epoch))
    assert len(loaded) == len(base)
    for start in range(0, len(base), accumulation):
        group = base[start : start + accumulation]
        step = draws.take(len(group))
        found = [
            (item, float(inverse))
            for batch in step.batches
            if float(batch.inverse.sum())
            for item, inverse in zip(batch.items, batch.inverse, strict=True)
        ]
        expected = []
        for item in [item for batch in group for item in batch]:
            p = min(max(weights[item], FLOOR), 1.0)
            if float(uniform(seed, epoch, torch.tensor([item]))) < float(torch.tensor(p)):
                expected.append((item, 1 / float(torch.tensor(p))))
        assert [item for item, _ in found] == [item for item, _ in expected]
        assert [inverse for _, inverse in found] == pytest.approx([inverse for _, inverse in expected], rel=1e-6)
        assert [batch.items for batch in step.batches] == loaded[start : start + accumulation]


def test_the_expected_gradient_is_that_of_the_weighted_loss() -> None:
    """Closed form: ``E sum 1/p w g = sum w g`` for any g; z-scores of 24 rows over 500 seeds, and of their scale."""
    weights = torch.linspace(0.02, 1.6, 24)
    total = torch.zeros(24, dtype=torch.float64)
    square = torch.zeros(24, dtype=torch.float64)
    runs = 500
    for seed in range(runs):
        draws = make(weights, seed=seed, accumulation=3)
        list(walk(draws, order([8, 8, 8])))
        step = draws.take(3)
        factor = torch.zeros(24, dtype=torch.float64)
        trained = sum(batch.slots.numel() for batch in step.batches if not batch.idle)
        for batch, scale in zip(step.batches, step.scales("step"), strict=True):
            if not batch.idle:
                # the trainer divides by the tokens that it trains on
                factor[batch.slots] = scale * weights[batch.slots].double() / trained
        total += factor
        square += factor.square()
    expected = weights.double() / 24
    mean = total / runs
    deviation = ((square / runs - mean.square()).clamp(min=0) / runs).sqrt()
    z = (mean - expected) / deviation.clamp(min=1e-12)
    random = weights < 1
    assert float(z[random].abs().max()) < 4
    torch.testing.assert_close(mean[~random], expected[~random])
    wrong = (mean * weights.double().clamp(FLOOR, 1) - expected) / deviation.clamp(min=1e-12)  # without 1 / p
    assert float(wrong[random].abs().max()) > 8


def test_the_weight_at_the_step_counts_and_not_that_of_the_draw() -> None:
    """A row that is found out after it was drawn: its factor is the new weight over the old probability."""
    weights = torch.ones(4)
    draws = Draws(Items(torch.arange(4)), torch.ones(4), lambda slots: weights[slots], seed=0)
    batches = walk(draws, order([2, 2]))
    next(batches)
    weights[:] = 0.25
    step = draws.take(1)
    assert step.batches[0].inverse.tolist() == [1.0, 1.0]
    list(batches)  # only now is the second step drawn
    assert draws.take(1).p.tolist() == [0.25, 0.25]


def test_a_step_is_drawn_when_it_is_asked_for() -> None:
    asked: list[list[int]] = []

    def weights(slots: torch.Tensor) -> torch.Tensor:
        asked.append(slots.tolist())
        return torch.ones(slots.numel())

    draws = Draws(Items(torch.arange(8)), torch.ones(8), weights, seed=0, accumulation=2)
    batches = walk(draws, order([2, 2, 2, 2]))
    assert asked == []
    for _ in range(2):
        next(batches)
    assert asked == [[0, 1, 2, 3]]
    next(batches)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]


# numbers ------------------------------------------------------------------------------------------------------------


def test_numbers_are_uniform_and_depend_on_every_counter() -> None:
    """Mean 1/2 and variance 1/12, to four standard errors; no correlation between seeds, epochs or places."""
    places = torch.arange(100_000)
    u = uniform(0, 0, places)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 1e5) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 4 * (1 / 180 / 1e5) ** 0.5
    for other in (uniform(1, 0, places), uniform(0, 1, places), uniform(0, 0, places + 1)):
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 4 / 1e5**0.5
    assert torch.equal(uniform(0, 0, places.flip(0)), u.flip(0))


@given(weights_of, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_all_ranks_draw_the_same(weights: list[float], seed: int) -> None:
    one, other = (make(weights, seed=seed, accumulation=2) for _ in range(2))
    torch.manual_seed(seed)
    first = list(walk(one, order([3, 3, 3, 3])))
    torch.manual_seed(seed + 1)
    assert list(walk(other, order([3, 3, 3, 3]))) == first


# micro-batches --------------------------------------------------------------------------------------------------------


def test_equal_weights_hand_the_micro_batches_on() -> None:
    """Weights of 1: the trainer's own micro-batches, factors of exactly 1, and not one random number more."""
    draws = make(torch.ones(11), tokens=list(range(1, 12)), accumulation=2)
    base = order([3, 3, 3, 2])
    torch.manual_seed(0)
    assert list(walk(draws, base)) == base
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    for _ in range(2):
        step = draws.take(2)
        assert step.kept == 1
        for mean in ("step", "batch", "row"):
            assert all(bool((scale == 1).all()) for scale in step.scales(mean))


def test_kept_rows_fill_the_first_micro_batches() -> None:
    weights = [1.0, 0, 0, 1.0, 0, 1.0, 0, 0, 1.0]
    draws = make(weights, accumulation=3, floor=1e-9)
    assert list(walk(draws, order([3, 3, 3]))) == [[0, 3, 5], [8], [6]]
    step = draws.take(3)
    assert [batch.idle for batch in step.batches] == [False, False, True]
    assert step.kept == pytest.approx(4 / 9)


def test_micro_batches_of_another_kind_stay_apart() -> None:
    weights = [1.0, 0, 0, 1.0, 0, 1.0, 0, 0, 0]
    draws = make(weights, accumulation=3, floor=1e-9)
    assert list(walk(draws, order([3, 3, 3]), regroup=False)) == [[0], [3, 5], [6]]
    assert [batch.idle for batch in draws.take(3).batches] == [False, False, True]


@pytest.mark.parametrize("regroup", [True, False])
def test_a_step_of_which_nothing_is_kept_runs_one_row_for_nothing(regroup: bool) -> None:
    draws = make(torch.zeros(6), accumulation=2, floor=1e-9)
    assert list(walk(draws, order([3, 3]), regroup=regroup)) == [[0], [3]]
    step = draws.take(2)
    assert [batch.idle for batch in step.batches] == [False, True]
    assert step.scales("step")[0].tolist() == [0.0]


def test_the_mean_is_made_that_of_all_rows() -> None:
    """Tokens 1, 2, 3, 4 in two micro-batches, of which the rows with 2 and 3 are kept, and moved into one.

    Over the step: 5 of 10 tokens. Over each micro-batch: 5 trained on, against 3 and 7.
    """
    draws = make([0.0, 1, 1, 0], tokens=[1, 2, 3, 4], accumulation=2, floor=1e-9)
    assert list(walk(draws, order([2, 2]))) == [[1, 2], [2]]
    step = draws.take(2)
    assert step.scales("step")[0].tolist() == [0.5, 0.5]
    assert step.scales("batch")[0].tolist() == pytest.approx([5 / 3, 5 / 7])
    assert step.scales("row")[0].tolist() == [1, 1]
    assert step.rows == 4


# packed items ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
@settings(max_examples=40, deadline=None)
def test_rows_of_packed_items_are_found(sizes: list[int], data: Any) -> None:
    """Against lists of lists."""
    lists = order(sizes)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    items = Items(torch.arange(sum(sizes)) * 10, starts)
    asked = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=6))
    slots, owner = items.rows_of(torch.tensor(asked, dtype=torch.long))
    assert slots.tolist() == [10 * row for item in asked for row in lists[item]]
    assert owner.tolist() == [place for place, item in enumerate(asked) for _ in lists[item]]


def test_a_packed_item_comes_as_often_as_its_best_row() -> None:
    """Items of rows (.2, .7), (0,), one without labels, which teaches nothing and stays, and (2.,)."""
    draws = make([0.2, 0.7, 0.0, 2.0], slots=[0, 1, 2, -1, 3], starts=[0, 2, 3, 4, 5])
    list(walk(draws, [[0, 1, 2, 3]]))
    assert draws.take(1).p.tolist() == pytest.approx([0.7, FLOOR, 1.0, 1.0])


# saving ---------------------------------------------------------------------------------------------------------------


class Learning:
    """Weights that every step changes, as a scheduler's do."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, slots: torch.Tensor) -> torch.Tensor:
        return (((slots * 7 + self.steps * 5) % 11) / 8).float()


def epochs(accumulation: int, ahead: int, save_at: int | None = None, resume: Any = None) -> Any:
    """Two epochs of 11 micro-batches of 2, of which ``ahead`` are fetched before they are needed, as workers do."""
    learning = Learning()
    tokens = torch.arange(22) % 5 + 1
    draws = Draws(Items(torch.arange(22)), tokens, learning, seed=5, accumulation=accumulation)
    per_epoch = -(-11 // accumulation)
    begin = 0
    if resume is not None:
        tensors, begin = resume
        draws.restore({name: value.clone() for name, value in tensors.items()})
        learning.steps = begin
    trained, saved, number = [], None, begin
    for epoch in range(begin // per_epoch, 2):
        skip = begin % per_epoch if epoch == begin // per_epoch else 0
        torch.manual_seed(100 + epoch if resume is None or not skip else 999)  # the trainer's are not there yet

        def base() -> Any:
            yield from torch.randperm(22).view(11, 2).tolist()

        batches = walk(draws, base(), epoch, skip)
        fetched = []
        for _ in range(skip * accumulation):
            next(batches)
        for step in range(skip, per_epoch):
            size = min(accumulation, 11 - step * accumulation)
            while len(fetched) < size + ahead:
                batch = next(batches, None)
                if batch is None:
                    break
                fetched.append(batch)
            mine, fetched = fetched[:size], fetched[size:]
            drawn = draws.take(size)
            assert [batch.items for batch in drawn.batches] == mine
            trained.append((mine, [scale.tolist() for scale in drawn.scales("step")]))
            number += 1
            learning.steps = number
            if number == save_at:
                saved = draws.tensors()
    return trained, saved


@pytest.mark.parametrize("ahead", [0, 1, 7])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(accumulation: int, ahead: int) -> None:
    """Cut after every step, with an order that comes from the global random numbers and weights that change."""
    whole, _ = epochs(accumulation, ahead)
    for step in range(1, len(whole)):
        _, saved = epochs(accumulation, ahead, save_at=step)
        again, _ = epochs(accumulation, ahead, resume=(saved, step))
        assert again == whole[step:]


def test_without_what_was_drawn_ahead_it_would_show() -> None:
    """Negative control."""
    whole, _ = epochs(1, 7)
    _, saved = epochs(1, 7, save_at=3)
    saved |= {"sizes": saved["sizes"][:0], "items": saved["items"][:0], "p": saved["p"][:0]}
    again, _ = epochs(1, 7, resume=(saved, 3))
    assert again != whole[3:]


def test_only_what_was_drawn_ahead_is_saved() -> None:
    """Eight steps of a million rows: the size of what is saved does not depend on the rows."""
    slots = torch.arange(1_000_000, dtype=torch.int32)
    draws = Draws(Items(slots), torch.ones(1_000_000), lambda slots: torch.ones(slots.numel()), seed=0)
    batches = walk(draws, ([i, i + 1] for i in range(0, 1_000_000, 2)))
    for _ in range(8):
        next(batches)
    for _ in range(5):
        draws.take(1)
    saved = draws.tensors()
    assert saved["items"].tolist() == [10, 11, 12, 13, 14, 15]
    assert sum(value.numel() for value in saved.values()) < 6000  # most of it the random numbers' state


def test_steps_that_were_restored_and_not_yet_drawn_are_saved_again() -> None:
    draws = make(torch.full((12,), 0.5))
    list(walk(draws, order([2] * 6)))
    draws.take(1)
    saved = draws.tensors()
    again = make(torch.full((12,), 0.25))
    again.restore(saved)
    batches = walk(again, order([2] * 6), skip=1)
    for _ in range(2):
        next(batches)
    second = again.tensors()
    assert all(torch.equal(saved[name], second[name]) for name in saved)


def test_what_does_not_fit_is_refused() -> None:
    draws = make(torch.full((8,), 0.5))
    list(walk(draws, order([2] * 4)))
    draws.take(1)
    saved = draws.tensors()

    def restored() -> Draws:
        again = make(torch.full((8,), 0.5))
        again.restore(saved)
        return again

    with pytest.raises(StateError, match="in another order than the saved run did"):
        list(walk(restored(), order([2] * 4)[::-1], skip=1))
    with pytest.raises(StateError, match="go on after 1 optimiser steps, and the trainer goes on after 2"):
        restored().begin_epoch(0, 2)
    with pytest.raises(StateError, match="damaged"):
        restored().restore(saved | {"items": saved["items"][:-1]})
    with pytest.raises(StateError, match="damaged"):
        restored().restore({})
    with pytest.raises(CoverageError, match="3 micro-batches for an optimiser step of which 1 were drawn"):
        draws.take(3)
    with pytest.raises(CoverageError, match="of which 0 were drawn"):
        make([1.0]).take(1)


def test_the_next_epoch_is_not_bound_to_the_saved_one() -> None:
    draws = make(torch.full((8,), 0.5))
    list(walk(draws, order([2] * 4)))
    draws.take(1)
    again = make(torch.full((8,), 0.25))
    again.restore(draws.tensors())
    list(walk(again, order([2] * 4)[::-1], epoch=1))
    assert again.take(1).p.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_a_weight_that_is_no_weight_stops_the_draw(bad: float) -> None:
    with pytest.raises(NumericsError, match="1 rows that are to be drawn"):
        list(walk(make([1.0, bad]), [[0, 1]]))


# the schedulers' side -------------------------------------------------------------------------------------------------


@over_the_catalogue
@over_duplicates
def test_weights_of_some_slots_are_those_of_all(name: str, options: dict[str, Any], keys: list[int]) -> None:
    """What the draws ask for is what the table says."""
    scheduler, index = build(name, **options), RowIndex(torch.tensor(keys))
    state = run(scheduler, index, steps_of(index, keys, 4))
    every = scheduler.slot_weights(state)
    for slots in ([0], [2, 0, 2], list(range(index.slots)), []):
        found = scheduler.slot_weights(state, torch.tensor(slots, dtype=torch.long))
        assert found.dtype == torch.float32
        assert torch.equal(found, every[torch.tensor(slots, dtype=torch.long)])


def test_label_tokens_go_with_the_slots() -> None:
    index = RowIndex(torch.tensor([30, 10, 30, 20]), torch.tensor([3, 1, 3, 2]))
    assert index.label_tokens is not None
    assert index.label_tokens.tolist() == [1, 2, 3]
    assert RowIndex(torch.tensor([30])).label_tokens is None


def session_of(scheduler: Any) -> Session:
    return Session(scheduler, RowIndex(torch.arange(4)))


def test_a_row_that_is_to_be_asked_again_comes_by_whatever_its_weight() -> None:
    """Antibody's rows 0 and 1 were asked early on and not cleared, row 2 was asked later, row 3 was cleared."""
    session = session_of(Antibody())
    state: Any = session.state
    state.ratio[:] = torch.tensor([-5.0, -5.0, -5.0, 9.0])
    state.looks[:] = torch.tensor([1, 1, 2, 1])
    weights = session.row_weights()
    assert float(weights[:3].max()) < 0.1
    assert torch.equal(session.chances_of(torch.arange(4)), weights)
    state.steps = 24
    assert session.chances_of(torch.tensor([3, 2, 0, 1])).tolist() == [1.0, float(weights[2]), 1.0, 1.0]


def test_a_row_that_was_measured_in_a_time_of_noise_comes_by_whatever_its_weight() -> None:
    """BDS's row 0 was scored at step 0, row 1 at step 20."""
    session = session_of(BDS())
    state: Any = session.state
    session.learn("probe", torch.tensor([0]), torch.tensor([1.0]))
    state.steps = 20
    session.learn("probe", torch.tensor([1]), torch.tensor([1.0]))
    state.steps = 24
    weights = session.row_weights()
    assert float(weights[:2].max()) < 0.7
    assert session.chances_of(torch.arange(4)).tolist() == [1.0, float(weights[1]), 1.0, 1.0]
