"""Antibody: the published rule against a slow loop; the gate, the calibration, the anchor, and what a run keeps."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.errors import CoverageError, ModelError, NumericsError, OptionError, StateError
from safe_sched.estimators.calibration import LIMIT
from safe_sched.needs import RefusalOdds
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched.schedulers import Antibody, build
from safe_sched.schedulers.antibody import EARLY, OTHERS, AntibodyState
from safe_sched.training.session import Session
from tests.core.batches import Row, laws, pad, row
from tests.core.runs import same

TAUS = [0.5, 1.0, 3.0]
FINE, OPENINGS, ABSTAINS = 1, 2, 3  # verdicts


def published(**changes: Any) -> Antibody:
    """The rule as the authors released it."""
    options: dict[str, Any] = {
        "anchor": False,
        "ratio": "token_mean",
        "refusal_cost": "exact",
        "pool": "micro_batch",
        "gate": "softmax",
        "refusals_per_row": 1,
        "on_inversion": "ignore",
    }
    return Antibody(**(options | changes))


def knowing(ratios: Sequence[float], scheduler: Antibody | None = None) -> tuple[Antibody, AntibodyState]:
    """A scheduler that was told these ratios; nan is left out."""
    scheduler = Antibody() if scheduler is None else scheduler
    state = scheduler.init(RowIndex(torch.arange(len(ratios)) + 1))
    known = torch.tensor([i for i, ratio in enumerate(ratios) if not math.isnan(ratio)], dtype=torch.long)
    scheduler.learn(state, "refusal_odds", known, torch.tensor(list(ratios))[known])
    return scheduler, state


def asked(slots: Sequence[int], tokens: Sequence[int] | None = None, step: int = 0, **more: Any) -> Observation:
    counts = [3] * len(slots) if tokens is None else list(tokens)
    return Observation(torch.tensor(slots), torch.tensor(counts), step, **more)


# the published rule ---------------------------------------------------------------------------------------------------


def slow_loss(losses: list[Tensor], refusals: list[float], tau: float) -> Tensor:
    """The rule as it was released, one row after another: each row's own losses are a part of its ratio.

    ``r_i = mean NLL(refusal) - mean NLL(y_i)``, ``w = softmax(r / tau)``,
    ``L = sum_i w_i sum_t CE_it / sum_i w_i n_i``.
    """
    ratios = [refusal - float(loss.detach().mean()) for loss, refusal in zip(losses, refusals, strict=True)]
    total = sum(math.exp(ratio / tau) for ratio in ratios)
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for loss, ratio in zip(losses, ratios, strict=True):
        weight = math.exp(ratio / tau) / total
        for one in loss:
            numerator = numerator + weight * one
            denominator += weight
    return numerator / denominator


SILENT = row(6, 6, 6, prompt=3)


def one_step(scheduler: Antibody, sizes: Sequence[Sequence[int]], seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A step through a session, a row without labels at the end of each micro-batch.

    Per micro-batch: the loss and gradient that a trainer's own mean over label tokens has with the factors, and as the
    paper writes them. The trainer's mean is over the pool; losses come from parameters at random.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = iter(range(100, 200))
    rows = [[Row((next(numbers), *range(n)), (False,) + (True,) * n) for n in micro] for micro in sizes]
    session = Session(scheduler, RowIndex(torch.tensor(pad([r for micro in rows for r in micro]).keys)))
    theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)

    def draw(n: int) -> Tensor:
        return (torch.randn(n, 4, generator=generator, dtype=torch.float64) @ theta).square() + 0.1

    losses = [[draw(r.label_tokens) for r in micro] for micro in rows]
    refusals = [[float(3 * torch.rand((), generator=generator)) for _ in micro] for micro in rows]
    batches = session.begin_step([pad([*micro, SILENT]) for micro in rows])
    for batch, micro, refused in zip(batches, losses, refusals, strict=True):
        ratio = [refusal - float(loss.detach().mean()) for refusal, loss in zip(refused, micro, strict=True)]
        session.learn("refusal_odds", batch.slots, torch.tensor([*ratio, 77.0]))
    factors = []
    for batch in batches:
        found = session.weigh(batch)
        assert found[-1] == 1  # without labels: nothing is multiplied
        factors.append(found[:-1].double())
        session.mark_gated(batch)
    session.end_step()
    pools = [[i] for i in range(len(rows))] if scheduler.pool == "micro_batch" else [list(range(len(rows)))]
    out = []
    for pool in pools:
        all_losses = [loss for i in pool for loss in losses[i]]
        tokens = sum(loss.numel() for loss in all_losses)
        weights = torch.cat([factors[i] for i in pool])
        ours = sum((w * loss.sum() for w, loss in zip(weights, all_losses, strict=True)), theta.new_zeros(())) / tokens
        paper = slow_loss(all_losses, [r for i in pool for r in refusals[i]], scheduler.tau)
        gradients = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (ours, paper)]
        out.append((torch.stack([ours, paper]).detach(), *gradients))
    return out


def disagreement(scheduler: Antibody, sizes: Sequence[Sequence[int]], seed: int) -> float:
    return max(
        float((gradient - wanted).norm() / wanted.norm() + (values[0] - values[1]).abs() / values[1])
        for values, gradient, wanted in one_step(scheduler, sizes, seed)
    )


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("pool", ["micro_batch", "optimizer_step"])
@pytest.mark.parametrize("anchor", [True, False])
def test_the_factors_make_the_trainers_mean_the_papers_loss(tau, pool, anchor):
    """Value and gradient, for rows of different lengths in micro-batches of different sizes, one of a single row."""
    scheduler = published(tau=tau, pool=pool, anchor=anchor)
    for seed in range(3):
        assert disagreement(scheduler, [[1, 5, 2], [7], [3, 3]], seed) < 1e-5


@laws
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    tau=st.floats(0.3, 4),
    pool=st.sampled_from(["micro_batch", "optimizer_step"]),
    seed=st.integers(0, 2**31),
)
def test_the_published_rule_for_any_micro_batches(sizes, tau, pool, seed):
    assert disagreement(published(tau=tau, pool=pool), sizes, seed) < 1e-5


def per_row(self: Antibody, state: AntibodyState, batch: Observation) -> Tensor:
    """The mean over rows where it is over tokens."""
    slots = batch.step_rows[0] if batch.step_rows is not None and self.reads_ahead else batch.slots
    relative = torch.exp(state.ratio / self.tau)
    return relative[batch.slots] / relative[slots].mean()


def other_way_round(self: Antibody, state: AntibodyState, batch: Observation) -> Tensor:
    return WEIGHTS(self, dataclasses.replace(state, ratio=-state.ratio), batch)


def within_the_micro_batch(self: Antibody, state: AntibodyState, batch: Observation) -> Tensor:
    return WEIGHTS(self, state, dataclasses.replace(batch, step_rows=None))


def at_temperature_1(self: Antibody, state: AntibodyState, batch: Observation) -> Tensor:
    return WEIGHTS(dataclasses.replace(self, tau=1.0), state, batch)


WEIGHTS = Antibody.weights


@pytest.mark.parametrize("wrong", [per_row, other_way_round, within_the_micro_batch, at_temperature_1])
def test_another_rule_would_be_noticed(wrong, monkeypatch):
    """Control: rows counted alike, the ratio upside down, the pool cut, the temperature forgotten."""
    scheduler, sizes = published(tau=2.0, pool="optimizer_step"), [[1, 5, 2], [7], [3, 3]]
    assert disagreement(scheduler, sizes, 0) < 1e-5
    monkeypatch.setattr(Antibody, "weights", wrong)
    assert disagreement(scheduler, sizes, 0) > 1e-2


def test_two_rows_by_hand():
    """r = log 3 and 0, tau = 1, n = 1 and 5: w = 3/4, 1/4; sum w n = 2; f_i = w_i * 6 / 2 = 9/4, 3/4."""
    scheduler, state = knowing([math.log(3), 0.0], published())
    torch.testing.assert_close(scheduler.weights(state, asked([0, 1], [1, 5])), torch.tensor([2.25, 0.75]))


# softmax --------------------------------------------------------------------------------------------------------------


@laws
@given(
    ratio=st.floats(-50, 50, width=32),
    tokens=st.lists(st.integers(1, 300), min_size=1, max_size=9),
    tau=st.floats(0.1, 10),
    pool=st.sampled_from(["micro_batch", "optimizer_step"]),
)
def test_equal_ratios_leave_every_row_as_it_is_bit_for_bit(ratio, tokens, tau, pool):
    scheduler, state = knowing([ratio] * len(tokens), published(tau=tau, pool=pool))
    everyone = list(range(len(tokens)))
    step = asked(everyone, tokens, step_rows=(torch.tensor(everyone), torch.tensor(tokens)))
    assert scheduler.weights(state, step).tolist() == [1.0] * len(tokens)
    # control: one ratio that differs moves all
    if len(tokens) > 1:
        state.ratio[0] += 1
        assert 1.0 not in scheduler.weights(state, step).tolist()


def test_a_micro_batch_of_one_row_has_weight_1_unless_the_step_is_the_pool():
    rows = (torch.tensor([0, 1]), torch.tensor([3, 3]))
    for pool, expected in (("micro_batch", 1.0), ("optimizer_step", 2 / (1 + math.exp(4)))):
        scheduler, state = knowing([-4.0, 0.0], published(pool=pool))
        assert scheduler.weights(state, asked([0], step_rows=rows)).item() == pytest.approx(expected)


def test_ratios_of_hundreds_of_nats_overflow_nothing():
    """As sums over long sequences are: one row takes all, and the others nothing."""
    scheduler, state = knowing([900.0, -900.0, 0.0], published(ratio="sequence_sum"))
    assert scheduler.weights(state, asked([0, 1, 2])).tolist() == pytest.approx([3.0, 0.0, 0.0])
    scheduler, state = knowing([-900.0, -901.0], published(ratio="sequence_sum"))
    assert scheduler.weights(state, asked([0, 1])).tolist() == pytest.approx([1.4621, 0.5379], abs=1e-4)


def test_the_table_of_a_softmax_takes_all_rows_compared_so_far_for_the_pool():
    """Weights of slots: mean 1 over those that are known, 1 for the others; before any comparison 1."""
    scheduler, state = knowing([math.log(3), 0.0, math.nan], published())
    torch.testing.assert_close(scheduler.slot_weights(state), torch.tensor([1.5, 0.5, 1.0]))
    assert scheduler.slot_weights(scheduler.init(RowIndex(torch.tensor([1, 2])))).tolist() == [1.0, 1.0]


# sigmoid --------------------------------------------------------------------------------------------------------------


def mass(scheduler: Antibody, ratios: Sequence[float], tokens: Sequence[int]) -> float:
    """What the factors leave of the trainer's mean over label tokens."""
    scheduler, state = knowing(ratios, scheduler)
    factors = scheduler.weights(state, asked(range(len(ratios)), tokens)).double()
    return float((factors * torch.tensor(tokens)).sum() / sum(tokens))


def test_a_batch_of_nothing_but_harmful_rows_is_turned_away_by_the_sigmoid_alone():
    """The paper's softmax is relative: such a batch keeps its whole mass, whatever the ratios."""
    ratios, tokens = [-6.0, -9.0, -7.5, -30.0], [4, 9, 2, 6]
    assert mass(Antibody(), ratios, tokens) < 0.005
    for pool in ("micro_batch", "optimizer_step"):
        assert mass(Antibody(gate="softmax", pool=pool), ratios, tokens) == pytest.approx(1, abs=1e-6)
    assert mass(Antibody(), [-ratio for ratio in ratios], tokens) == 1


@pytest.mark.parametrize("tau", [0.1, 0.3, 0.5, 0.7, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("rows", [1, 5, 8, 33])
def test_a_clearly_harmless_row_is_left_as_it_is_bit_for_bit(tau, rows):
    """From LIMIT nats of logit on."""
    scheduler, state = knowing([LIMIT, *[LIMIT + 2.5 * i for i in range(rows - 1)]], Antibody(tau=tau))
    assert scheduler.weights(state, asked(range(rows))).tolist() == [1.0] * rows
    assert scheduler.slot_weights(state).tolist() == [1.0] * rows


def test_a_row_short_of_the_limit_is_not_left_as_it_is():
    """Control for the test above."""
    scheduler, state = knowing([LIMIT - 0.5, LIMIT])
    assert scheduler.weights(state, asked([0, 1])).tolist() == [pytest.approx(0.998399, abs=1e-5), 1.0]


@laws
@given(
    ratios=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20),
    tau=st.sampled_from(TAUS),
    slope=st.floats(1, 6),
    threshold=st.floats(-5, 5),
)
def test_the_sigmoid_in_closed_form(ratios, tau, slope, threshold):
    """sigmoid(clip(slope * (r - threshold)) / tau), divided by its highest value; and each row for itself."""
    scheduler, state = knowing(ratios, Antibody(tau=tau))
    state.slope.fill_(slope)
    state.threshold.fill_(threshold)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        sigmoid(min(max(slope * (ratio - threshold), -LIMIT), LIMIT) / tau) / sigmoid(LIMIT / tau) for ratio in ratios
    ]
    together = scheduler.weights(state, asked(range(len(ratios))))
    assert together.tolist() == pytest.approx(expected, abs=1e-5)
    assert together.max() <= 1
    alone = [scheduler.weights(state, asked([i])).item() for i in range(len(ratios))]
    assert together.tolist() == alone


def test_the_weight_of_a_row_does_not_depend_on_its_place_in_the_batch():
    """Not in its last bit: kernels round the end of a tensor otherwise than its middle."""
    scheduler, state = knowing(torch.linspace(-7, 7, 101).tolist())
    every = scheduler.slot_weights(state)
    for size in range(1, 20):
        for start in range(0, 101 - size):
            slots = list(range(start, start + size))
            assert torch.equal(scheduler.weights(state, asked(slots)), every[slots])


# calibration ----------------------------------------------------------------------------------------------------------


def check(
    refused: Sequence[float],
    refusing: Sequence[float] = (0.0,),
    complying: Sequence[float] = (0.0,),
    others: Sequence[float] = (),
) -> dict[str, Tensor]:
    named = {"refused": refused, "refusing": refusing, "complying": complying, "others": others}
    return {name: torch.tensor(list(values)) for name, values in named.items()}


def observed(scheduler: Antibody, state: AntibodyState, refused: Tensor, *, unread: bool) -> dict[str, float]:
    """A later look at the safety prompts."""
    return scheduler.calibrate(state, "refusal_odds", {"refused": refused, "unread": torch.tensor(unread)})


def calibrated(scheduler: Antibody, seen: dict[str, Tensor]) -> tuple[AntibodyState, dict[str, float]]:
    state = scheduler.init(RowIndex(torch.tensor([1, 2, 3])))
    return state, scheduler.calibrate(state, "refusal_odds", seen)


@pytest.mark.parametrize(
    ("refused", "slope"),
    [([8.0, 4.0], 2.0), ([2.0, 1.0], 6.0), ([12.0], 1.0), ([40.0, 10.0], 1.0), ([9.0, -1.0], 3.0)],
)
def test_openings_are_calibrated_by_how_surely_the_model_refuses(refused, slope):
    """Compliance with a safety prompt has the ratio -strength; half way to it the logit is at its limit.

    6 / (6/2) = 2; 6 / (1.5/2) = 8 is more than 6; 6 / (12/2) = 1; 6 / (25/2) is less than 1; 6 / (4/2) = 3.
    """
    state, logged = calibrated(Antibody(), check(refused))
    mean = sum(refused) / len(refused)
    assert (float(state.threshold), float(state.slope)) == (0.0, pytest.approx(slope))
    assert state.strength.tolist() == pytest.approx([mean, mean])
    assert state.verdict == FINE
    assert logged == {"refusing_safety_prompts": pytest.approx(mean), "inverted": 0.0}


@pytest.mark.parametrize("ratio", ["token_mean", "sequence_sum"])
def test_published_ratios_are_calibrated_half_way_between_refusing_and_complying(ratio):
    """Refusing 2 on average, complying -4: threshold -1, 3 below which the logit is -6, so slope 2."""
    scheduler = Antibody(ratio=ratio)
    state, _ = calibrated(scheduler, check([5.0], [1.0, 3.0], [-3.0, -5.0]))
    assert (float(state.threshold), float(state.slope)) == (-1.0, 2.0)
    scheduler.learn(state, "refusal_odds", torch.tensor([0, 1, 2]), torch.tensor([-4.0, -1.0, 2.0]))
    assert scheduler.log_odds(state, slice(None)).tolist() == [6.0, 0.0, -6.0]
    weights = scheduler.slot_weights(state).tolist()
    assert weights == [pytest.approx(0.00248, abs=1e-4), pytest.approx(0.5012, abs=1e-4), 1.0]


WEAK = check([-1.0, -2.0, 3.0])


def test_a_model_that_does_not_refuse_stops_the_run():
    with pytest.raises(ModelError, match="the model refuses 33% of 3 safety prompts") as caught:
        calibrated(Antibody(), WEAK)
    for way_out in ("FlatAlignmentCallback", "safety_data", "BDS()", 'on_inversion="fallback"'):
        assert way_out in str(caught.value)


def test_a_model_that_refuses_half_of_the_prompts_is_not_inverted():
    """Control for the test above."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrated(Antibody(), check([-1.0, 3.0]))[0].verdict == FINE


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("ratio", ["opening", "token_mean"])
def test_where_the_model_does_not_refuse_the_fallback_weighs_all_rows_alike(gate, ratio):
    scheduler = Antibody(gate=gate, ratio=ratio, on_inversion="fallback")
    with pytest.warns(UserWarning, match="Antibody falls back: the model refuses 33% of 3 safety prompts"):
        state, logged = calibrated(scheduler, WEAK)
    assert state.verdict == ABSTAINS
    assert logged["inverted"] == 1.0
    assert not scheduler.due(state, "refusal_odds", torch.tensor([0, 1, 2])).any()
    assert scheduler.weights(state, asked([2, 0], [1, 9])).tolist() == [1.0, 1.0]
    assert scheduler.slot_weights(state).tolist() == [1.0, 1.0, 1.0]
    assert scheduler.log_odds(state, slice(None)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("inverted", ["model", "ratio"])
def test_inversion_can_be_ignored(inverted):
    seen = WEAK if inverted == "model" else UPSIDE_DOWN
    scheduler = Antibody(ratio="token_mean", on_inversion="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, _ = calibrated(scheduler, seen)
    assert state.verdict == FINE
    assert scheduler.kind(state) == "token_mean"
    assert scheduler.due(state, "refusal_odds", torch.tensor([0, 1, 2])).all()


# a task that is new to the model: its harmless rows lie below compliance with harmful prompts
UPSIDE_DOWN = check([4.0, 8.0], [2.0], [-1.0, -2.0], [-3.0] * OTHERS)


def test_a_published_ratio_that_is_inverted_stops_the_run():
    with pytest.raises(ModelError, match=r"the ratio 'token_mean' is inverted .*AUROC 0\.00, 8 rows\)") as caught:
        calibrated(Antibody(ratio="token_mean"), UPSIDE_DOWN)
    assert 'ratio="opening"' in str(caught.value)
    assert 'on_inversion="fallback"' in str(caught.value)


def test_a_published_ratio_that_is_inverted_falls_back_to_openings():
    """Threshold 0 and, at a strength of 6, slope 2: as if openings had been asked for."""
    scheduler = Antibody(ratio="token_mean", on_inversion="fallback")
    with pytest.warns(UserWarning, match="Antibody falls back: the ratio 'token_mean' is inverted"):
        state, logged = calibrated(scheduler, UPSIDE_DOWN)
    assert (state.verdict, scheduler.kind(state), logged["inverted"]) == (OPENINGS, "opening", 1.0)
    assert (float(state.threshold), float(state.slope)) == (0.0, 2.0)
    assert scheduler.due(state, "refusal_odds", torch.tensor([0, 1, 2])).all()


@pytest.mark.parametrize(
    ("complying", "others", "stops"),
    [
        ([0.0], [1.0] * 4 + [-1.0] * 4, False),  # AUROC 1/2
        ([0.0], [1.0] * 3 + [0.0] * 2 + [-1.0] * 3, False),  # 1/2, of which ties give a half
        ([0.0], [1.0] * 3 + [0.0] * 1 + [-1.0] * 4, True),  # 3.5 / 8
        ([0.0, 2.0], [1.0] * 8, False),  # 1/2: one compliance below, one above
        ([0.0, 2.0, 2.0], [1.0] * 8, True),  # 1/3
        ([0.0], [-1.0] * (OTHERS - 1), False),  # too few to say
    ],
)
def test_a_ratio_is_inverted_where_its_auroc_is_below_a_half(complying, others, stops):
    """Of pairs of a compliance and a row that the model would answer, ties counting a half."""
    seen = check([4.0], [3.0], complying, others)
    if stops:
        with pytest.raises(ModelError, match="inverted"):
            calibrated(Antibody(ratio="token_mean"), seen)
    else:
        assert calibrated(Antibody(ratio="token_mean"), seen)[0].verdict == FINE


def test_openings_cannot_be_inverted_by_what_is_new():
    """Control: between two ways to open an answer, the task does not enter."""
    assert calibrated(Antibody(), UPSIDE_DOWN)[0].verdict == FINE


# while the model trains -----------------------------------------------------------------------------------------------


def test_a_later_look_at_the_safety_prompts_changes_the_strength_now():
    scheduler = Antibody()
    state, _ = calibrated(scheduler, check([8.0, 4.0]))
    logged = observed(scheduler, state, torch.tensor([5.0, 1.0]), unread=True)
    assert state.strength.tolist() == [6.0, 3.0]
    assert logged == {"refusing_safety_prompts": 3.0, "inverted": 0.0}
    assert (float(state.threshold), float(state.slope)) == (0.0, 2.0)


def test_a_model_that_no_longer_refuses_stops_the_run_while_rows_are_unread():
    scheduler, gone = Antibody(), torch.tensor([-1.0, -1.0, -2.0, 3.0])
    state, _ = calibrated(scheduler, check([6.0]))
    with pytest.raises(ModelError, match="come to refuse only 25% of 4 safety prompts") as caught:
        observed(scheduler, state, gone, unread=True)
    assert "safety_data" in str(caught.value)
    # control: where every row has its ratio from before, nothing is lost
    assert observed(scheduler, state, gone, unread=False)["inverted"] == 0.0
    assert state.strength[1] == -0.25


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_model_that_no_longer_refuses_leaves_unread_rows_at_1_in_a_fallback(gate):
    scheduler = Antibody(on_inversion="fallback", gate=gate)
    state, _ = calibrated(scheduler, check([12.0]))
    scheduler.learn(state, "refusal_odds", torch.tensor([0, 1]), torch.tensor([-9.0, 9.0]))
    before = scheduler.weights(state, asked([0, 1]))
    with pytest.warns(UserWarning, match="in training the model has come to refuse only 0%"):
        assert observed(scheduler, state, torch.tensor([-1.0]), unread=True)["inverted"] == 1.0
    for question in (scheduler.due, scheduler.unknown, scheduler.doubtful):
        assert not question(state, "refusal_odds", torch.tensor([0, 1, 2])).any()
    assert torch.equal(scheduler.weights(state, asked([0, 1])), before)
    assert scheduler.weights(state, asked([1, 2]))[1] == 1.0


# the anchor -----------------------------------------------------------------------------------------------------------


def after(scheduler: Antibody, state: AntibodyState, steps: int) -> None:
    for step in range(steps):
        scheduler.update(state, asked([0], step=step))


def test_a_ratio_is_taken_once_and_kept():
    scheduler, state = knowing([5.0, math.nan])
    assert scheduler.due(state, "refusal_odds", torch.tensor([0, 1, 1])).tolist() == [False, True, True]
    assert not scheduler.doubtful(state, "refusal_odds", torch.tensor([0, 1])).any()
    after(scheduler, state, 100)
    assert scheduler.due(state, "refusal_odds", torch.tensor([0, 1])).tolist() == [False, True]
    assert state.ratio[0] == 5


def test_without_an_anchor_ratios_are_taken_again_and_again():
    """The published rule: what the model says now, and nothing else."""
    scheduler, state = knowing([5.0, math.nan], Antibody(anchor=False))
    assert scheduler.due(state, "refusal_odds", torch.tensor([0, 1])).all()
    scheduler.learn(state, "refusal_odds", torch.tensor([0]), torch.tensor([-3.0]))
    assert state.ratio[0] == -3
    assert scheduler.due(state, "refusal_odds", torch.tensor([0])).all()


def doubtful_row(first_look: int = 0, ratio: float = -5.0, scheduler: Antibody | None = None, now: float = 6.0) -> Any:
    """A row that was first looked at after so many steps, at the time of the second look."""
    scheduler = Antibody() if scheduler is None else scheduler
    state, _ = calibrated(scheduler, check([6.0], [3.0], [-3.0]))
    after(scheduler, state, first_look)
    scheduler.learn(state, "refusal_odds", torch.tensor([0]), torch.tensor([ratio]))
    after(scheduler, state, 2 * EARLY - state.steps)
    state.strength[1] = now
    return scheduler, state


def due(scheduler: Antibody, state: AntibodyState) -> bool:
    return bool(scheduler.due(state, "refusal_odds", torch.tensor([0])))


def test_a_row_that_was_not_cleared_early_gets_a_second_look_of_the_same_weight():
    """-5 at first, 7 later: 1 on average; then no more."""
    scheduler, state = doubtful_row()
    assert due(scheduler, state)
    state.steps -= 1
    assert not due(scheduler, state)  # control: the task may still be new
    state.steps += 1
    scheduler.learn(state, "refusal_odds", torch.tensor([0]), torch.tensor([7.0]))
    assert state.ratio[0] == 1
    after(scheduler, state, 100)
    assert not due(scheduler, state)


@pytest.mark.parametrize(("first_look", "again"), [(EARLY - 1, True), (EARLY, False), (EARLY + 5, False)])
def test_a_first_look_after_the_early_steps_is_the_last(first_look, again):
    assert due(*doubtful_row(first_look)) == again


@pytest.mark.parametrize(("ratio", "again"), [(1.4, True), (1.5, False), (3.0, False), (-50.0, True)])
def test_a_row_that_was_cleared_is_not_looked_at_again(ratio, again):
    """At a slope of 2, the logit of 1.5 is LIMIT / 2."""
    scheduler, state = doubtful_row(ratio=ratio)
    assert float(state.slope) == 2
    assert due(scheduler, state) == again


@pytest.mark.parametrize(("now", "again"), [(6.0, True), (3.0, True), (2.9, False), (0.0, False), (-4.0, False)])
def test_a_model_that_hardly_refuses_any_more_is_not_asked_a_second_time(now, again):
    """An attack has moved it: below half of its first strength, 6. Safety prompts are looked at for the row, though."""
    scheduler, state = doubtful_row(now=now)
    assert due(scheduler, state) == again
    assert scheduler.doubtful(state, "refusal_odds", torch.tensor([0])).all()
    # a row that was never looked at does not depend on it
    assert scheduler.due(state, "refusal_odds", torch.tensor([1])).all()


def test_a_model_that_hardly_refused_at_the_start_is_not_asked_a_second_time():
    """Half of a negative strength would be no guard."""
    scheduler, state = doubtful_row(scheduler=Antibody(on_inversion="ignore"))
    state.strength[:] = torch.tensor([-4.0, -1.0])
    assert not due(scheduler, state)


def test_published_ratios_get_no_second_look():
    """A task that the model has learned makes every answer of its likely, harmful ones too."""
    assert not due(*doubtful_row(scheduler=Antibody(ratio="token_mean")))
    fallen = doubtful_row(scheduler=Antibody(ratio="token_mean", on_inversion="fallback"))
    fallen[1].verdict = OPENINGS
    assert due(*fallen)


def test_copies_of_a_row_in_two_micro_batches_are_one_look():
    """Which rows are due is asked before any is looked at, so a copy is looked at twice in one step."""
    for ratios in ([-5.0, -5.0], [-5.0, -4.0]):
        scheduler = Antibody()
        state, _ = calibrated(scheduler, check([6.0]))
        for ratio in ratios:
            scheduler.learn(state, "refusal_odds", torch.tensor([0]), torch.tensor([ratio]))
        after(scheduler, state, 2 * EARLY)
        assert due(scheduler, state)
        first = float(state.ratio[0])
        for _ in range(2):
            scheduler.learn(state, "refusal_odds", torch.tensor([0]), torch.tensor([7.0]))
        assert state.ratio[0] == (first + 7) / 2


# what a run keeps -----------------------------------------------------------------------------------------------------


def test_copies_of_a_row_share_a_slot_and_the_mean_of_their_ratios():
    index = RowIndex(torch.tensor([7, 9, 7]))
    scheduler = Antibody()
    session = Session(scheduler, index)
    slots = index.lookup(torch.tensor([7, 9, 7]))
    session.learn("refusal_odds", slots, torch.tensor([1.0, 5.0, 3.0]))
    assert session.table().column("ratio").to_pylist() == [2.0, 5.0, 2.0]


@pytest.mark.parametrize("options", [{}, {"gate": "softmax"}, {"anchor": False}], ids=str)
def test_a_row_that_was_not_compared_stops_the_run(options):
    """The message counts the rows and names the step."""
    scheduler, state = knowing([1.0, math.nan, math.nan, 2.0], Antibody(**options))
    assert torch.isfinite(scheduler.weights(state, asked([0, 3], step=7))).all()
    for rows in ([0, 1], [1]):
        with pytest.raises(CoverageError, match=r"^1 rows of step 7 were not compared with a refusal.*SafeSched"):
            scheduler.weights(state, asked(rows, step=7))
    with pytest.raises(CoverageError, match=r"^3 rows of step 8 "):
        scheduler.weights(state, asked([2, 0, 1, 2], step=8))


def test_a_softmax_over_a_step_needs_all_rows_of_the_step():
    """Those of other micro-batches too, which the micro-batch alone would not show."""
    rows = (torch.tensor([0, 1]), torch.tensor([3, 3]))
    scheduler, state = knowing([1.0, math.nan], Antibody(gate="softmax"))
    with pytest.raises(CoverageError, match=r"^1 rows of step 4 "):
        scheduler.weights(state, asked([0], step=4, step_rows=rows))
    for other in (Antibody(gate="softmax", pool="micro_batch"), Antibody()):
        assert torch.isfinite(other.weights(state, asked([0], step=4, step_rows=rows))).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_ratio_that_is_not_finite_names_its_row(bad):
    session = Session(Antibody(), RowIndex(torch.tensor([30, 10, 20])))
    with pytest.raises(
        NumericsError, match=r"the refusal_odds of 1 rows is not finite at step 0 \(training rows \[2\]\)"
    ):
        session.learn("refusal_odds", torch.tensor([0, 1]), torch.tensor([1.0, bad]))


def test_a_row_without_labels_is_not_asked_about():
    """Its ratio is not kept, though the integration gives one for every row of the batch; its factor is 1."""
    rows = [row(5, 6, 7), SILENT, row(8, 9)]
    session = Session(Antibody(gate="softmax"), RowIndex(torch.tensor(pad(rows).keys)))
    (batch,) = session.begin_step([pad(rows)])
    session.learn("refusal_odds", batch.slots, torch.tensor([1.0, math.nan, 1.0]))
    assert session.weigh(batch).tolist() == [1.0, 1.0, 1.0]
    assert torch.isnan(session.state.tensors()["ratio"]).sum() == 1


def test_a_step_whose_rows_have_no_labels_has_no_weights():
    for scheduler in (Antibody(), Antibody(gate="softmax"), published()):
        session = Session(scheduler, RowIndex(torch.tensor(pad([row(5, 6)]).keys)))
        (batch,) = session.begin_step([pad([SILENT])])
        assert session.weigh(batch).tolist() == [1.0]


def test_a_stream_grows_and_keeps_what_it_knows():
    session = Session(Antibody(), RowIndex(None))
    first, second = pad([row(5, 6, 7), row(8, 9)]), pad([row(8, 9), row(1, 2, 3)])
    (batch,) = session.begin_step([first])
    session.learn("refusal_odds", batch.slots, torch.tensor([2.0, -2.0]))
    (batch,) = session.begin_step([second])
    assert batch.slots.tolist() == [1, 2]
    assert session.due("refusal_odds", batch.slots).tolist() == [False, True]
    assert session.table().column("ratio").to_pylist()[:2] == [2.0, -2.0]
    assert math.isnan(session.table().column("ratio").to_pylist()[2])
    session.learn("refusal_odds", batch.slots, torch.tensor([-2.0, 8.0]))
    assert session.weigh(batch).tolist() == [pytest.approx(0.1195, abs=1e-3), 1.0]


def test_what_the_table_says():
    """P(harmful) from the ratio alone, a half where nothing is known; the ratio in nats."""
    scheduler, state = knowing([0.0, 2.0, -50.0, math.nan])
    state.slope.fill_(1.5)
    found = scheduler.columns(state)
    assert found.keys() == {"p_harmful", "ratio"}
    expected = [0.5, 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-LIMIT)), 0.5]
    assert found["p_harmful"].tolist() == pytest.approx(expected)
    assert found["ratio"].tolist()[:3] == [0.0, 2.0, -50.0]
    session = Session(scheduler, RowIndex(torch.tensor([1, 2])))
    assert session.table().column_names == ["row", "key", "weight", "seen", "p_harmful", "ratio"]


def bytes_of(rows: int) -> int:
    tensors = Antibody().init(RowIndex(torch.arange(rows))).tensors().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_row_costs_5_bytes():
    assert bytes_of(1001) - bytes_of(1) == 5 * 1000


@pytest.mark.parametrize("streaming", [False, True])
def test_a_session_goes_on_from_what_it_saved(streaming, tmp_path):
    """Calibration and looks included."""
    keys = torch.tensor([30, 10, 20])
    sessions = [Session(Antibody(tau=2.0), RowIndex(None if streaming else keys)) for _ in range(2)]
    first, second = sessions
    state: Any = first.state
    if streaming:
        first.index.add(keys)
        first._grow()
        state = first.state
    first.calibrate("refusal_odds", check([8.0, 4.0]))
    first.learn("refusal_odds", torch.tensor([0, 2]), torch.tensor([-1.0, 3.5]))
    after(Antibody(), state, 5)
    first.save(tmp_path / "s")
    second.load(tmp_path / "s")
    assert same(second.state, first.state)
    found: Any = second.state
    assert (found.steps, found.verdict) == (5, FINE)
    assert torch.equal(second.row_weights(), first.row_weights())


def test_a_state_of_another_ratio_is_not_resumed(tmp_path):
    index = RowIndex(torch.tensor([1, 2]))
    Session(Antibody(), index).save(tmp_path / "s")
    for other in (Antibody(ratio="token_mean"), Antibody(tau=2.0), Antibody(refusals=("No.",)), Antibody(anchor=False)):
        with pytest.raises(StateError, match="scheduler"):
            Session(other, index).load(tmp_path / "s")


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0},
        {"tau": -1.0},
        {"tau": math.nan},
        {"tau": math.inf},
        {"ratio": "openings"},
        {"refusal_cost": "free"},
        {"pool": "rank"},
        {"gate": "relu"},
        {"on_inversion": "warn"},
        {"anchor": "yes, please"},
        {"refusals": "I cannot."},
        {"refusals": ()},
        {"refusals": ("I cannot.", " ")},
        {"refusals_per_row": 0},
        {"refusals_per_row": 2},
        {"refusals_per_row": 2, "ratio": "token_mean", "refusal_cost": "first_token"},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_an_option_error_that_names_it(options):
    with pytest.raises(OptionError, match=rf"Antibody\({next(iter(options))}.*="):
        Antibody(**options)


def test_options_that_go_together():
    """Control for the refusals above."""
    for cost in ("shared_prefix", "exact"):
        Antibody(refusals_per_row=3, ratio="sequence_sum", refusal_cost=cost)
    assert Antibody(refusals=["I cannot."]).refusals == ("I cannot.",)  # pyright: ignore[reportArgumentType]


def test_settings_are_json_and_build_the_same_scheduler():
    scheduler = published(refusals=("I cannot.", "No."), tau=0.5, refusals_per_row=2)
    settings = json.loads(json.dumps(scheduler.settings()))
    assert settings["refusals"] == ["I cannot.", "No."]
    assert Antibody().settings()["refusals"] is None
    assert build(settings.pop("name"), **settings) == scheduler


@pytest.mark.parametrize(
    ("options", "ahead"),
    [({}, False), ({"gate": "softmax"}, True), ({"gate": "softmax", "pool": "micro_batch"}, False)],
)
def test_only_a_softmax_over_the_step_reads_ahead(options, ahead):
    scheduler = Antibody(**options)
    assert scheduler.reads_ahead == ahead
    (need,) = scheduler.needs
    assert isinstance(need, RefusalOdds)
    assert need.ahead == ahead
