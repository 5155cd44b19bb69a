"""BDS with its evidence: the posterior of a row's logit, the priors, what is believed when, and what a step touches."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safe_sched.errors import DataError, OptionError
from safe_sched.estimators.calibration import Calibration
from safe_sched.estimators.reference import save_reference
from safe_sched.needs import NLL, Probe, ReferenceLoss
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched.schedulers import BDS, BDSReleased
from safe_sched.schedulers import bds as bds_module
from safe_sched.schedulers.bds import EARLY, BDSState
from safe_sched.training.session import Session
from tests.core.batches import pad, row
from tests.core.runs import DISTINCT, same
from tests.core.test_posterior import agree

STD = 4.0
"""Standard deviation of a logit under its prior."""
QUICK: dict[str, Any] = {"draws": 4}
"""Hardly any sampling, for tests of what happens around it."""
LONG: dict[str, Any] = {"draws": 360}
"""With `long_chains`: small steps, and many of them."""


def rows(count: int) -> RowIndex:
    return RowIndex(torch.arange(count))


def observation(slots: Tensor, nll: Tensor, step: int = 0) -> Observation:
    return Observation(slots, torch.ones_like(slots), step, {"nll": nll})


@pytest.fixture
def given_log_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are log-odds already: no calibration, which depends on the order in which scores come."""
    monkeypatch.setattr(Calibration, "fit", lambda self, scores: scores.double())


@pytest.fixture
def no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for themselves: nothing is learned of the share of harmful rows."""
    monkeypatch.setattr(BDS, "share_log_odds", lambda self, judged: 0.0)


@pytest.fixture
def long_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bds_module, "_STEP_SIZE", 0.05)
    monkeypatch.setattr(bds_module, "_BURN_IN", 200)


def auroc(weights: Tensor, harmful: Tensor) -> float:
    below = (weights[harmful][:, None] < weights[~harmful][None]).double()
    equal = (weights[harmful][:, None] == weights[~harmful][None]).double()
    return float((below + equal / 2).mean())


def train(
    scheduler: BDS, share: float, harmless: float = 0.15, harmful: float = 0.2, count: int = 400, epochs: int = 2
) -> tuple[BDSState, Tensor]:
    """Epochs of a run whose harmless rows score around 0 and whose harmful ones around 1; rows are scored while due."""
    generator = torch.Generator().manual_seed(0)
    state, bad = scheduler.init(rows(count)), torch.rand(count, generator=generator) < share
    for _ in range(epochs):
        for slots in torch.randperm(count, generator=generator).split(16):
            due = slots[scheduler.due(state, "probe", slots)]
            noise = torch.randn(due.numel(), generator=generator) * torch.where(bad[due], harmful, harmless)
            scheduler.learn(state, "probe", due, bad[due] + noise)
            scheduler.update(state, observation(slots, torch.ones(slots.numel())))
    return state, bad


# the posterior of a logit against numerical integration ---------------------------------------------------------------

EVIDENCE = [-18.0, -6.0, -2.5, -1.0, 0.0, 0.5, 1.5, 4.0, 9.0, 18.0]
REPEATS = 16


class Integrated:
    """The posterior ``exp(-U(z) / T)`` of one logit on a fine grid, written from the equations of the module."""

    def __init__(self, evidence: float, temperature: float) -> None:
        self.z = np.linspace(-14, 14, 40001) * STD * math.sqrt(max(temperature, 1))
        self.w = 1 / (1 + np.exp(-self.z))
        energy = evidence * self.w + self.z**2 / (2 * STD**2)
        self.density = np.exp(-(energy - energy.min()) / temperature)
        self.density /= self.density.sum()

    def mean(self, values: Any) -> float:
        return float((self.density * values).sum())

    def quantile(self, share: float) -> float:
        """Of w, which rises with z."""
        return float(self.w[np.searchsorted(self.density.cumsum(), share)])


def scored(scheduler: BDS) -> BDSState:
    """A state in which row ``REPEATS * i + j`` has the evidence number i."""
    state, evidence = scheduler.init(rows(len(EVIDENCE) * REPEATS)), torch.tensor(EVIDENCE)
    scheduler.learn(state, "probe", torch.arange(len(EVIDENCE) * REPEATS), evidence.repeat_interleave(REPEATS))
    return state


def matches_the_integral(scheduler: BDS, state: BDSState, part: slice, evidence: float) -> None:
    """Rows ``part`` of a state are what this evidence makes of them."""
    columns = scheduler.columns(state)
    exact, prior = (Integrated(e, scheduler.temperature) for e in (evidence, 0.0))
    agree(scheduler.slot_weights(state)[part], exact.mean(exact.w) / prior.mean(prior.w), bias=0.02)
    agree(columns["p_harmful"][part], exact.mean(1 - exact.w), bias=0.01)
    agree(columns["p_harmful_low"][part], 1 - exact.quantile(0.95), bias=0.02)
    agree(columns["p_harmful_high"][part], 1 - exact.quantile(0.05), bias=0.04)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_weights_and_probabilities_are_those_of_numerical_integration(
    temperature, given_log_odds, no_share, long_chains
):
    scheduler = BDS(temperature=temperature, **LONG)
    state = scored(scheduler)
    for i, evidence in enumerate(EVIDENCE):
        matches_the_integral(scheduler, state, slice(REPEATS * i, REPEATS * (i + 1)), evidence)
    columns = scheduler.columns(state)
    assert (columns["p_harmful_low"] <= columns["p_harmful"]).all()
    assert (columns["p_harmful"] <= columns["p_harmful_high"]).all()


def test_other_evidence_another_prior_or_temperature_would_be_noticed(
    given_log_odds, no_share, long_chains, monkeypatch
):
    """Control: the same check on rows whose evidence is 2 and not 1, or whose posterior is another one."""
    right, slots = BDS(**LONG), torch.arange(2 * REPEATS)
    for options, std, evidence in (({}, STD, 1.0), ({}, 0.6 * STD, 2.0), ({"temperature": 0.6}, STD, 2.0)):
        wrong = dataclasses.replace(right, **options)
        with monkeypatch.context() as changed:
            changed.setattr(bds_module, "_STD", std)
            state = wrong.init(rows(2 * REPEATS))
            wrong.learn(state, "probe", slots, torch.full((2 * REPEATS,), evidence))
        with pytest.raises(AssertionError):
            matches_the_integral(right, state, slice(None), 2.0)


def test_the_default_lengths_are_near_the_integral(given_log_odds, no_share):
    """48 steps of 0.25: the bias of the step is below 5 % of a weight, the chance of one row some 6 % more."""
    state = scored(scheduler := BDS())
    found, prior = scheduler.slot_weights(state), Integrated(0.0, 1.0)
    for i, evidence in enumerate(EVIDENCE):
        part, exact = slice(REPEATS * i, REPEATS * (i + 1)), Integrated(evidence, 1.0)
        agree(found[part], exact.mean(exact.w) / prior.mean(prior.w), bias=0.05)
        assert float(found[part].std()) < 0.2


def test_at_temperature_0_a_row_sits_at_the_mode(given_log_odds, no_share, monkeypatch):
    monkeypatch.setattr(bds_module, "_BURN_IN", 400)
    scheduler = BDS(temperature=0.0)
    state = scored(scheduler)
    weights, columns = scheduler.slot_weights(state), scheduler.columns(state)
    harmful, low, high = (columns[f"p_harmful{end}"] for end in ("", "_low", "_high"))
    for i, evidence in enumerate(EVIDENCE):
        at = REPEATS * i
        exact = Integrated(evidence, 1.0)
        mode = exact.density.argmax()
        assert float(weights[at]) == pytest.approx(2 * exact.w[mode], abs=0.01)
        assert float(harmful[at]) == pytest.approx(1 - exact.w[mode], abs=0.01)
        # nothing is drawn: rows with the same evidence are the same, and there is no spread
        assert harmful[at : at + REPEATS].unique().numel() == 1
        assert float(high[at] - low[at]) < 1e-3


def test_the_gradient_is_that_of_the_energy():
    z = torch.linspace(-6.03, 6.03, 40, dtype=torch.float64).requires_grad_()
    evidence = torch.linspace(-4, 9, 40, dtype=torch.float64)
    BDS().energy(z, evidence).sum().backward()
    torch.testing.assert_close(BDS().gradient(z.detach(), evidence), z.grad)


# before and after the first score -------------------------------------------------------------------------------------


def test_rows_without_a_score_weigh_exactly_1(given_log_odds):
    scheduler = BDS()
    state = scheduler.init(rows(6))
    assert scheduler.slot_weights(state).tolist() == [1.0] * 6
    scheduler.learn(state, "probe", torch.tensor([1, 4]), torch.tensor([5.0, -5.0]))
    found = scheduler.slot_weights(state)
    assert found[[0, 2, 3, 5]].tolist() == [1.0] * 4
    assert found[1] < 0.5


@pytest.mark.parametrize("options", [{}, {"prior_share": 0.4}, {"temperature": 0.3}], ids=str)
@pytest.mark.parametrize("others", [15.0, -15.0])
def test_rows_without_a_score_weigh_exactly_1_whatever_share_is_found(options, others, given_log_odds):
    """After 560 others were scored, many of them often; also rows that a stream brings only then."""
    scheduler, index = BDS(**options, **QUICK), RowIndex(None)
    index.add(torch.arange(600))
    state = scheduler.grow(scheduler.init(RowIndex(None)), index)
    before = {name: tensor[560:].clone() for name, tensor in scheduler.columns(state).items()}
    scheduler.learn(state, "probe", torch.arange(20), torch.zeros(20))
    for slots in torch.arange(20, 560).repeat(3).split(45):
        scheduler.learn(state, "probe", slots, torch.full((45,), others))
        scheduler.update(state, observation(slots, torch.ones(45)))
    index.add(torch.arange(600, 640))
    state = scheduler.grow(state, index)
    unscored = torch.arange(560, 640)
    assert scheduler.slot_weights(state)[unscored].tolist() == [1.0] * 80
    assert scheduler.weights(state, observation(unscored, torch.ones(80))).tolist() == [1.0] * 80
    for name, tensor in scheduler.columns(state).items():
        assert torch.equal(tensor[560:600], before[name])
        assert torch.equal(tensor[600:], before[name])
    # control: a row whose score says nothing has been judged, and follows the share
    judged = scheduler.slot_weights(state)[:20].mean()
    assert judged < 0.8 if others > 0 else judged > 1.01


@pytest.mark.parametrize("options", [{}, {"prior_share": 0.6}, {"temperature": 0.4}, {"temperature": 3.0}], ids=str)
def test_a_score_that_says_nothing_leaves_a_row_where_it_was(options, given_log_odds, long_chains):
    """Weight 1 is the mean of the prior; P(harmful) of a row without scores is that of one whose scores say nothing."""
    scheduler, many = BDS(**options, **LONG), torch.arange(60)
    before = scheduler.init(rows(1)).harmful
    share = torch.full((60,), scheduler.share_log_odds(torch.zeros(2)))
    draws, _ = scheduler.sample(share, many, torch.zeros_like(many))
    w = torch.sigmoid(draws).mean((0, 2))
    agree(1 - w, float(before), bias=0.01)
    agree(w / scheduler._prior_mean, 1.0, bias=0.015)


# priors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prior_share", "prior_rows"), [(0.1, 10.0), (0.5, 2.0), (0.02, 200.0)])
def test_the_share_prior_is_the_derivative_of_a_beta_binomial(prior_share, prior_rows):
    """q ~ Beta(a, b) integrated out of q**H (1 - q)**(M - H), differentiated by one row's share of the harmful ones."""
    scheduler = BDS(prior_share=prior_share, prior_rows=prior_rows)
    a, b = prior_rows * prior_share, prior_rows * (1 - prior_share)

    def log_marginal(harmful: Tensor, judged: float) -> Tensor:
        parts = (
            torch.lgamma(a + harmful) + torch.lgamma(b + judged - harmful) - torch.lgamma(torch.tensor(a + b + judged))
        )
        return parts - math.lgamma(a) - math.lgamma(b) + math.lgamma(a + b)

    for judged, harmful in ((0.0, 0.0), (1.0, 0.3), (40.0, 2.5), (40.0, 39.0), (1e5, 3.0)):
        z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        one = 1 - torch.sigmoid(z)  # the row itself, among the judged
        (-log_marginal(harmful - one.detach() + one, judged)).backward()
        w = torch.sigmoid(z.detach())
        found = scheduler.share_log_odds(torch.tensor([judged, harmful]))
        # in U it stands as E w(z)
        assert float(z.grad) == pytest.approx(found * float(w * (1 - w)), rel=1e-6)
    # and it is a share: q**H (1 - q)**(M - H) over the prior, by a sum over q
    q = (np.arange(200_000) + 0.5) / 200_000
    weight = q ** (a - 1 + 2) * (1 - q) ** (b - 1 + 5)
    prior = q ** (a - 1) * (1 - q) ** (b - 1)
    expected = float(log_marginal(torch.tensor(2.0, dtype=torch.float64), 7.0))
    assert math.log(weight.sum() / prior.sum()) == pytest.approx(expected, abs=0.05)


def test_the_share_prior_becomes_the_log_odds_of_the_share():
    scheduler = BDS()
    for share in (0.001, 0.3, 0.9):
        found = scheduler.share_log_odds(torch.tensor([1e6, share * 1e6]))
        assert found == pytest.approx(math.log(share / (1 - share)), abs=0.01)
    assert scheduler.share_log_odds(torch.zeros(2)) < -2  # nothing judged: the prior's own


def test_the_more_harmful_rows_were_found_the_more_harmful_is_a_score(given_log_odds):
    found = []
    for harmful in (0, 20, 100, 180, 200):
        scheduler = BDS()
        state = scheduler.init(rows(240))
        scheduler.learn(state, "probe", torch.arange(200), torch.where(torch.arange(200) < harmful, 15.0, -15.0))
        scheduler.learn(state, "probe", torch.arange(200, 240), torch.full((40,), 1.0))
        found.append(float(scheduler.columns(state)["p_harmful"][200:].mean()))
    assert found == sorted(found)
    assert found[0] < 0.4
    assert found[-1] > 0.75


# what is believed, and when -------------------------------------------------------------------------------------------


def test_a_set_without_harmful_rows_is_left_alone():
    """500 rows whose scores vary by 0.1 around 0: no weight falls to a half, and they are as good as equal."""
    scheduler = BDS()
    state, _ = train(scheduler, 0.0, harmless=0.1, count=500)
    weights = scheduler.slot_weights(state).double()
    assert weights.min() > 0.5
    assert weights.sum() ** 2 / weights.square().sum() > 0.985 * 500
    assert (scheduler.columns(state)["p_harmful"] < 0.5).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_harmful_rows_are_found_whatever_their_share(share):
    """Scores of 1 +- 0.2 against 0 +- 0.15."""
    scheduler = BDS()
    state, harmful = train(scheduler, share)
    weights = scheduler.slot_weights(state).double()
    kept = weights[~harmful]
    assert auroc(weights, harmful) >= 0.99
    assert auroc(-scheduler.columns(state)["p_harmful"], harmful) >= 0.99
    assert kept.sum() ** 2 / kept.square().sum() >= 0.8 * kept.numel()
    assert weights[harmful].mean() < 0.35 * kept.mean()
    # the calibration has seen that they separate
    assert Calibration(state.calibration).variance < 0.13


def test_scores_that_are_noise_turn_hardly_anybody_away():
    state, _ = train(scheduler := BDS(), 0.0, harmless=1.0, count=500)
    weights = scheduler.slot_weights(state).double()
    assert Calibration(state.calibration).variance > 0.25
    assert weights.mean() > 0.75
    assert weights.sum() ** 2 / weights.square().sum() > 0.9 * 500


def test_a_weight_comes_back_when_later_scores_say_otherwise():
    scheduler = BDS()
    state = scheduler.init(rows(16))
    slots, wrong = torch.arange(16), torch.zeros(16)
    wrong[3] = 1.0
    for _ in range(2):
        scheduler.learn(state, "probe", slots, wrong)
    fallen = float(scheduler.slot_weights(state)[3])
    for _ in range(8):
        scheduler.learn(state, "probe", slots, torch.zeros(16))
    assert fallen < 0.4
    assert scheduler.slot_weights(state)[3] > 0.8


def test_a_share_that_is_found_later_changes_rows_that_were_scored_before(given_log_odds):
    """At once and all of them: nothing is sampled again, and no update is needed."""
    scheduler = BDS()
    state = scheduler.init(rows(300))
    early, late = torch.arange(20), torch.arange(20, 300)
    scheduler.learn(state, "probe", early, torch.full((20,), 1.0))
    before, kept = scheduler.columns(state), {name: tensor.clone() for name, tensor in state.tensors().items()}
    scheduler.learn(state, "probe", late, torch.full((280,), 15.0))
    now = scheduler.columns(state)
    assert now["p_harmful"][early].mean() > before["p_harmful"][early].mean() + 0.3
    assert (now["p_harmful"][early] > before["p_harmful"][early]).all()
    assert now["log_odds"][early].tolist() == [1.0] * 20
    assert now["scored"][early].tolist() == [1] * 20
    torch.testing.assert_close(
        scheduler.slot_weights(state)[early], (1 - now["p_harmful"][early]) / scheduler._prior_mean
    )
    for name, tensor in state.tensors().items():
        if tensor.shape[-1:] == (300,):
            assert torch.equal(tensor[..., :20], kept[name][..., :20]), name
    # and with that all has happened
    assert scheduler.update(state, observation(early, torch.ones(20))) == {}
    for name, tensor in scheduler.columns(state).items():
        assert torch.equal(tensor, now[name])


def chance(log_odds: float, temperature: float = 1.0) -> float:
    """P(harmful) by numerical integration, for log-odds with the share in them."""
    exact = Integrated(log_odds, temperature)
    return exact.mean(1 - exact.w)


over_temperatures = pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])


@over_temperatures
def test_the_table_of_probabilities_is_the_integral(temperature, monkeypatch):
    scheduler = BDS(temperature=temperature)
    at = torch.cat([torch.linspace(-59.93, 59.91, 60), torch.linspace(-3.03, 3.07, 40)])
    found = scheduler._curve(at)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([chance(value, temperature) for value in at.tolist()], abs=2e-4)
    # beyond its ends it stays where it was
    far = scheduler._curve(torch.tensor([-1e4, -60.0, 60.0, 1e4]))
    assert float(far[0]) == pytest.approx(float(far[1]), abs=1e-4)
    assert float(far[2]) == pytest.approx(float(far[3]), abs=1e-4)
    assert scheduler._curve_points is scheduler._curve_points  # computed once
    # control: another temperature is another table, and another prior
    assert (BDS(temperature=1.3 * temperature)._curve(at) - found).abs().max() > 4e-3
    monkeypatch.setattr(bds_module, "_STD", 1.3 * STD)
    assert (BDS(temperature=temperature)._curve(at) - found).abs().max() > 4e-3


@over_temperatures
def test_what_was_sampled_follows_the_share_as_the_integral_does(temperature, given_log_odds, long_chains):
    scheduler, exact = BDS(temperature=temperature, **LONG), functools.partial(chance, temperature=temperature)
    state = scored(scheduler)
    sampled, first = state.harmful.float().view(-1, REPEATS), scheduler.columns(state)
    then = [exact(value) for value in state.sampled.tolist()[::REPEATS]]
    for i, belongs in enumerate(then):
        agree(sampled[i], belongs, bias=0.015)
    found_then = state.judged.clone()
    for share in (0.001, 0.2, 0.8, 0.999):
        state.judged = torch.tensor([1e4, share * 1e4], dtype=torch.float64)
        now = scheduler.share_log_odds(state.judged)
        columns, weights = scheduler.columns(state), scheduler.slot_weights(state)
        found = columns["p_harmful"].view(-1, REPEATS)
        for i, evidence in enumerate(EVIDENCE):
            moved = (sampled[i] + exact(evidence + now) - then[i]).clamp(0, 1)
            torch.testing.assert_close(found[i], moved.float(), rtol=0, atol=5e-4)
            agree(found[i], exact(evidence + now), bias=0.015)
        torch.testing.assert_close(weights, (1 - columns["p_harmful"]) / scheduler._prior_mean)
        assert (columns["p_harmful_low"] <= columns["p_harmful"]).all()
        assert (columns["p_harmful"] <= columns["p_harmful_high"]).all()
        # control: what was sampled, left where it was, is not the posterior of now
        left = [abs(float(sampled[i].mean()) - exact(e + now)) for i, e in enumerate(EVIDENCE)]
        assert max(left) > 0.02
    # there and back is where it was, bit for bit
    state.judged = found_then
    for name, tensor in scheduler.columns(state).items():
        assert torch.equal(tensor, first[name])


def test_the_interval_follows_the_share_as_the_integral_does(given_log_odds, long_chains):
    scheduler = BDS(**LONG)
    state = scored(scheduler)
    state.judged = torch.tensor([1e4, 0.8e4], dtype=torch.float64)
    now, columns = scheduler.share_log_odds(state.judged), scheduler.columns(state)
    for i, evidence in enumerate(EVIDENCE):
        exact, part = Integrated(evidence + now, 1.0), slice(REPEATS * i, REPEATS * (i + 1))
        agree(columns["p_harmful_low"][part], 1 - exact.quantile(0.95), bias=0.05)
        agree(columns["p_harmful_high"][part], 1 - exact.quantile(0.05), bias=0.05)


def test_rows_of_one_batch_are_not_taken_for_harmless_while_they_are_judged(given_log_odds):
    """What is known of the share when they come is what was known before them, however many come at once."""
    scheduler = BDS(**QUICK)
    for size in (1, 16, 160):
        state = scheduler.init(rows(200))
        scheduler.learn(state, "probe", torch.arange(size), torch.full((size,), 3.0))
        before = scheduler.share_log_odds(torch.zeros(2))
        assert float(state.sampled[0]) == pytest.approx(3.0 + before, abs=0.2)


# one score of a row, and several --------------------------------------------------------------------------------------

SOURCES: dict[str, dict[str, Any]] = {
    "probe": {},
    "none": {"evidence": None},
    "reference": {"evidence": "reference", "reference": "adapter:agnostic"},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_measurements_of_a_row_add_up_and_an_estimate_carried_on_takes_the_place_of_the_old(
    kind, given_log_odds, no_share, long_chains
):
    scheduler = BDS(**SOURCES[kind], **LONG)
    state, many = scheduler.init(rows(20)), torch.arange(16)
    for score in (2.0, 1.5, -0.5):
        scheduler.learn(state, "probe", many, torch.full((16,), score))
    expected, other = (3.0, -0.5) if kind in ("probe", "none") else (-0.5, 3.0)
    assert state.log_odds.tolist() == [expected] * 16 + [0.0] * 4
    assert state.scored.tolist() == [3] * 16 + [0] * 4
    p = scheduler.columns(state)["p_harmful"][:16]
    agree(p, chance(expected), bias=0.01)
    with pytest.raises(AssertionError):
        agree(p, chance(other), bias=0.01)


def test_a_row_seen_often_says_what_its_last_estimate_says():
    """Through `update` and the calibration: 30 visits are not 30 times the evidence."""
    scheduler, generator = BDS(**SOURCES["reference"], **QUICK), torch.Generator().manual_seed(0)
    state = scheduler.init(rows(6))
    state.reference.fill_(1.0)
    added = torch.zeros(6)
    for number in range(30):
        nll = 1 + torch.linspace(0, 1, 6) + 0.1 * torch.randn(6, generator=generator)
        scheduler.update(state, observation(torch.arange(6), nll, number))
        says = Calibration(state.calibration).log_odds(nll - 1.0).float()
        added += says
        torch.testing.assert_close(state.log_odds.float(), says, rtol=1e-3, atol=2e-3)
        assert state.log_odds.abs().max() <= 6
    # control: added up it would be another number
    assert (added - state.log_odds.float()).abs().max() > 20


def test_measurements_that_are_added_are_each_taken_as_they_were_understood_at_the_time():
    scheduler, generator = BDS(evidence=None, **QUICK), torch.Generator().manual_seed(0)
    state, added = scheduler.init(rows(6)), torch.zeros(6)
    for _ in range(8):
        scores = torch.linspace(-0.2, 1.2, 6) + 0.1 * torch.randn(6, generator=generator)
        scheduler.learn(state, "probe", torch.arange(6), scores)
        added += Calibration(state.calibration).log_odds(scores).float()
    torch.testing.assert_close(state.log_odds.float(), added, rtol=4e-3, atol=4e-3)
    assert added.abs().max() > 12


@pytest.mark.parametrize("kind", SOURCES)
def test_a_low_score_clears_a_row_early_or_the_first_time_only(kind, given_log_odds, no_share):
    """Of a probe: a model that has learned to comply with a row has nothing to lose by it any more."""
    scheduler = BDS(**SOURCES[kind], **QUICK)
    state = scheduler.init(rows(5))

    def after(update: int, *scores: float) -> list[float]:
        """Log-odds of the rows; a score of 0 means none."""
        state.steps = update
        slots = torch.tensor(scores).nonzero()[:, 0]
        scheduler.learn(state, "probe", slots, torch.tensor(scores)[slots])
        return state.log_odds.tolist()

    found = [
        after(0, 2.0, 0.0, 0.0, 0.0, 0.0),
        after(EARLY - 1, -1.0, 2.0, 0.0, 0.0, 0.0),
        after(EARLY, 0.0, 0.0, 2.0, -4.0, 0.0),
        after(256 + 3, -0.5, -0.5, -0.5, -0.5, -0.5),  # the first late score of rows 0, 1 and 4
        after(256 + 4, -0.5, -0.5, -0.5, -0.5, -0.5),
        after(256 + 5, 0.25, 0.25, 0.25, 0.25, 0.25),
    ]
    assert state.scored.tolist() == [5, 4, 4, 4, 3]
    last, before = [2.0, 0.0, 0.0, 0.0, 0.0], [[-1.0, 2.0, 0.0, 0.0, 0.0], [-1.0, 2.0, 2.0, -4.0, 0.0]]
    if kind == "probe":
        before = [[1.0, 2.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, -4.0, 0.0]]
        late = [0.5, 1.5, 2.0, -4.0, -0.5]
        assert found == [last, *before, late, late, [value + 0.25 for value in late]]
    elif kind == "none":  # control: without a probe nothing is held back
        before = [[1.0, 2.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, -4.0, 0.0]]
        late = [0.5, 1.5, 1.5, -4.5, -0.5]
        again = [value - 0.5 for value in late]
        assert found == [last, *before, late, again, [value + 0.25 for value in again]]
    else:
        assert found == [last, *before, [-0.5] * 5, [-0.5] * 5, [0.25] * 5]


@pytest.mark.parametrize(("first", "back"), [(0, True), (EARLY - 1, True), (EARLY, False), (256 + 3, False)])
def test_a_row_found_harmful_is_not_cleared_by_the_model_that_it_has_taught(first, back):
    """The same scores come after; that the row was accused early, when the task was new, makes the difference."""
    scheduler = BDS(max_probes=255)
    state = scheduler.init(rows(16))
    slots, scores = torch.arange(16), torch.zeros(16)
    scores[3] = 1.0
    state.steps = first
    for _ in range(3):
        scheduler.learn(state, "probe", slots, scores)
    assert scheduler.slot_weights(state)[3] < 0.3
    for _ in range(8):  # of the early rows the first of these counts, and they are scored in early updates
        scheduler.learn(state, "probe", slots, torch.zeros(16))
    assert (scheduler.slot_weights(state)[3] > 0.8) == back
    assert scheduler.slot_weights(state)[3] < 0.3 or back


def test_the_sum_of_probabilities_is_that_of_the_judged_rows(given_log_odds):
    """Kept by differences over hundreds of updates, some of them of the same rows: it does not drift."""
    scheduler, generator = BDS(**QUICK), torch.Generator().manual_seed(0)
    state = scheduler.init(rows(200))
    for _ in range(300):
        slots = torch.randint(0, 150, (8,), generator=generator)
        scheduler.learn(state, "probe", slots, torch.randn(8, generator=generator))
        scheduler.update(state, observation(slots, torch.ones(8)))
    judged = state.scored > 0
    assert state.judged.tolist() == pytest.approx([float(judged.sum()), float(state.harmful[judged].double().sum())])


# determinism ----------------------------------------------------------------------------------------------------------


def close(a: BDSState, b: BDSState, tolerance: float = 2e-6) -> bool:
    """The sum over chains depends on the size of a batch in its last digit, and by that the rounding to float16."""

    def alike(name: str, x: Tensor, y: Tensor) -> bool:
        coarse = x.dtype == torch.float16 or name == "judged"
        allowed = max(tolerance, 2.0**-10) if coarse else tolerance
        return torch.allclose(x.double(), y.double(), rtol=allowed, atol=tolerance)

    return all(alike(name, x, b.tensors()[name]) for name, x in a.tensors().items())


def test_for_given_evidence_neither_order_nor_batches_matter(given_log_odds, no_share):
    """With log-odds that do not depend on other rows, a row's draws are a function of its own scores and the seed."""
    scheduler, generator = BDS(), torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 40, generator=generator) * 4
    states = []
    for size in (1, 7, 40):
        state = scheduler.init(rows(50))
        for scores in (first, second):
            for slots in torch.randperm(40, generator=generator).split(size):
                scheduler.learn(state, "probe", slots, scores[slots])
        states.append(state)
    assert close(states[0], states[1])
    assert close(states[0], states[2])


def test_with_a_shared_prior_or_calibration_the_order_matters(given_log_odds, monkeypatch):
    """Control, and the limit of the law above: what is learned of the share so far enters a row's draws."""

    def run(scheduler: BDS, order: Tensor, *, alone: bool = False) -> BDSState:
        state = scheduler.init(rows(40))
        for slots in order.split(8):
            scheduler.learn(state, "probe", slots, torch.linspace(-3, 3, 40)[slots])
            if alone:  # nothing is learned of the share
                state.judged.zero_()
        return state

    forward, backward = torch.arange(40), torch.arange(40).flip(0)
    assert close(run(BDS(), forward, alone=True), run(BDS(), backward, alone=True))
    assert not close(run(BDS(), forward), run(BDS(), backward), 1e-3)
    monkeypatch.undo()
    assert not close(run(BDS(), forward, alone=True), run(BDS(), backward, alone=True), 1e-3)
    # the same order is the same run, bit for bit, and another seed another one
    assert same(run(BDS(), forward), run(BDS(), forward))
    assert not same(run(BDS(), forward), run(BDS(seed=1), forward))


def test_more_draws_keep_the_old_ones():
    """The draws of a chain do not change when more are asked for."""
    slots, evidence = torch.arange(6), torch.linspace(-3, 3, 6)
    found, more = (BDS(draws=n).sample(evidence, slots, torch.zeros_like(slots))[0] for n in (8, 20))
    torch.testing.assert_close(more[:8], found, rtol=0, atol=1e-6)


def test_a_row_twice_in_a_batch_has_one_score_their_mean():
    scheduler = BDS()
    first, second = scheduler.init(rows(5)), scheduler.init(rows(5))
    scheduler.learn(first, "probe", torch.tensor([3, 1, 3, 3]), torch.tensor([0.5, 0.2, 1.0, 0.9]))
    scheduler.learn(second, "probe", torch.tensor([1, 3]), torch.tensor([0.2, 0.8]))
    assert close(first, second)
    assert first.scored.tolist() == [0, 1, 0, 1, 0]


def test_no_scores_change_nothing():
    scheduler = BDS()
    state, untouched = scheduler.init(rows(5)), scheduler.init(rows(5))
    assert scheduler.learn(state, "probe", torch.empty(0).long(), torch.empty(0)) == {}
    assert same(state, untouched)


# which rows are measured ----------------------------------------------------------------------------------------------


def test_rows_are_due_until_they_are_clear_or_were_measured_often_enough(given_log_odds, no_share):
    scheduler, every = BDS(max_probes=3), torch.arange(4)
    state = scheduler.init(rows(4))
    assert scheduler.due(state, "probe", every).tolist() == [True] * 4
    scheduler.learn(state, "probe", every[1:], torch.tensor([3.5, -3.5, 0.5]))
    assert scheduler.due(state, "probe", every).tolist() == [True, False, False, True]
    scheduler.learn(state, "probe", every[3:], torch.tensor([0.5]))
    assert scheduler.due(state, "probe", every).tolist() == [True, False, False, True]
    scheduler.learn(state, "probe", every[3:], torch.tensor([0.5]))
    assert scheduler.due(state, "probe", every).tolist() == [True, False, False, False]


def test_rows_of_the_first_updates_that_were_not_cleared_are_measured_again(given_log_odds, no_share):
    """A harmless row may look harmful while the task is new; only those that are thought harmless are left in peace."""
    scheduler, every = BDS(max_probes=2), torch.arange(5)
    state = scheduler.init(rows(6))
    scheduler.learn(state, "probe", every[:4], torch.tensor([9.0, -9.0, 0.5, 9.0]))
    scheduler.learn(state, "probe", every[3:4], torch.tensor([9.0]))
    asked = []
    for _ in range(2 * EARLY + 1):
        asked.append(scheduler.doubtful(state, "probe", every).tolist())
        assert scheduler.due(state, "probe", every).tolist() == [asked[-1][0], False, True, False, True]
        scheduler.update(state, observation(torch.tensor([5]), torch.ones(1)))
    # not before as many updates more were made; not the harmless row, the one measured often enough, the unknown one
    assert asked == [[False] * 5] * (2 * EARLY) + [[True, False, True, False, False]]
    # a row that was scored later is not doubted
    scheduler.learn(state, "probe", every[:1], torch.tensor([0.1]))
    assert not scheduler.doubtful(state, "probe", every[:1]).any()


def test_the_share_counts_towards_being_clear(given_log_odds):
    scheduler, slots = BDS(), torch.arange(100, 101)
    state = scheduler.init(rows(101))
    scheduler.learn(state, "probe", slots, torch.tensor([2.0]))
    assert scheduler.due(state, "probe", slots).all()
    scheduler.learn(state, "probe", torch.arange(100), torch.full((100,), 15.0))
    assert not scheduler.due(state, "probe", slots).any()


@pytest.mark.parametrize(
    "options",
    [{"evidence": None}, {"evidence": "reference", "reference": "adapter:x"}],
    ids=lambda o: str(o["evidence"]),
)
def test_only_the_probe_asks_for_measurements(options):
    scheduler = BDS(**options)
    state: Any = scheduler.init(rows(3))
    assert not scheduler.due(state, "probe", torch.arange(3)).any()
    state.scored[:], state.steps = 1, 3 * EARLY
    assert not scheduler.doubtful(state, "probe", torch.arange(3)).any()
    losses = [NLL(), ReferenceLoss("x")]
    assert list(scheduler.needs) == (losses if options["evidence"] else [])
    assert list(BDS().needs) == [Probe()]


def test_scores_are_counted_to_255(given_log_odds, no_share):
    scheduler = BDS(max_probes=255, **QUICK)
    state = scheduler.init(rows(1))
    for _ in range(260):
        scheduler.learn(state, "probe", torch.tensor([0]), torch.tensor([0.0]))
    assert state.scored.tolist() == [255]
    assert not scheduler.due(state, "probe", torch.tensor([0])).any()


# evidence that needs no probe -----------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[float]]]:
    """The slots and scores that a scheduler has given to itself."""
    heard: list[tuple[list[int], list[float]]] = []

    def take(self: BDS, state: Any, slots: Tensor, scores: Tensor) -> dict[str, float]:
        heard.append((slots.tolist(), scores.tolist()))
        return {}

    monkeypatch.setattr(BDS, "_take", take)
    return heard


def reference_file(folder: Path, index: RowIndex, nll: Tensor) -> str:
    save_reference(folder / "reference", index.keys, nll, torch.ones(index.slots, dtype=torch.long))
    return str(folder / "reference")


def test_the_score_of_a_reference_is_the_difference_of_losses(told, tmp_path):
    index = RowIndex(torch.tensor(DISTINCT))
    path = reference_file(tmp_path, index, torch.arange(6) / 10)
    scheduler = BDS(evidence="reference", reference=path)
    scheduler.update(scheduler.init(index), observation(torch.tensor([5, 0, 5]), torch.tensor([1.0, 2.0, 3.0])))
    ((slots, scores),) = told
    assert slots == [5, 0, 5]
    assert scores == pytest.approx([0.5, 2.0, 2.5])


def test_a_reference_file_that_lacks_a_row_stops_the_run_at_its_start(tmp_path):
    path = reference_file(tmp_path, RowIndex(torch.tensor(DISTINCT[:5])), torch.ones(5))
    with pytest.raises(DataError, match="no loss for 1 of 6"):
        Session(BDS(evidence="reference", reference=path), RowIndex(torch.tensor(DISTINCT)))


def test_rows_that_an_adapter_has_not_read_yet_have_no_score(told):
    scheduler = BDS(evidence="reference", reference="adapter:agnostic")
    assert scheduler.adapter == "agnostic"
    state = scheduler.init(rows(3))
    state.reference[1] = 0.25
    scheduler.update(state, observation(torch.arange(3), torch.ones(3)))
    assert told == [([1], [0.75])]


# saving, loading, growing ---------------------------------------------------------------------------------------------

FIRST, THEN = [row(5, 6, 7), row(8, 9, 3, 4)], [row(1, 2, 3), row(5, 6, 7), row(4, 4, 4)]


def steps(session: Session, *batches: list[Any]) -> None:
    """Optimiser steps as an integration runs them, with scores where they are asked for."""
    for content in batches:
        (batch,) = session.begin_step([pad(content)])
        spread = torch.linspace(0, 1, batch.slots.numel())
        for need in session.needs():
            due = session.due(need, batch.slots)
            if need != "nll" and bool(due.any()):
                session.learn(need, batch.slots[due], spread[due])
        session.weigh(batch, {"nll": 1 + spread + 0.1 * session.steps})
        session.mark_gated(batch)
        session.end_step()


KINDS: dict[str, dict[str, Any]] = {
    "probe": {},
    "none": {"evidence": None},
    "adapter": {"evidence": "reference", "reference": "adapter:agnostic"},
    "file": {"evidence": "reference"},
}


@pytest.mark.parametrize("streaming", [False, True], ids=["set", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_saved_and_loaded_goes_on_as_if_nothing_had_happened(kind, streaming, tmp_path):
    """Also of a stream, whose rows come while it runs."""
    options, keys = KINDS[kind], torch.tensor(pad(FIRST + THEN).keys)
    if kind == "file":
        if streaming:
            pytest.skip("a stream has no reference file")
        options = options | {"reference": reference_file(tmp_path, RowIndex(keys), torch.ones(4))}

    def fresh() -> Session:
        return Session(BDS(**options), RowIndex(None if streaming else keys))

    through, before, after = fresh(), fresh(), fresh()
    steps(through, FIRST, THEN, FIRST, THEN)
    steps(before, FIRST, THEN)
    before.save(tmp_path / "state")
    after.load(tmp_path / "state", steps=2)
    assert same(before.state, after.state)
    steps(after, FIRST, THEN)
    assert same(through.state, after.state)
    assert torch.equal(through.row_weights(), after.row_weights())
    assert through.table() == after.table()
    if kind != "none":
        assert (after.state.tensors()["scored"] > 0).any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "file"])
def test_rows_that_a_stream_brings_start_as_all_rows_do(kind):
    scheduler, index = BDS(**KINDS[kind]), RowIndex(None)
    state = scheduler.init(index)
    for size in (3, 4, 9):
        index.add(torch.arange(size))
        state = scheduler.grow(state, index)
        fresh = scheduler.init(rows(size)).tensors()
        for name, tensor in state.tensors().items():
            assert tensor.shape == fresh[name].shape
            assert tensor.dtype == fresh[name].dtype
        new = slice(state.slots - 1, None)
        for name in ("log_odds", "harmful", "low", "high", "sampled", "scored", "since"):
            assert torch.equal(getattr(state, name)[new], fresh[name][new])
        scheduler.learn(state, "probe", torch.arange(size - 1), torch.ones(size - 1))
    assert state.scored.tolist() == [3, 3, 2, 1, 1, 1, 1, 1, 0]


def test_the_table_says_what_is_known_of_every_row():
    session = Session(BDS(), RowIndex(torch.tensor(pad(FIRST + THEN).keys)))
    steps(session, FIRST)
    columns = session.table()
    table = columns.to_pydict()
    known = {"p_harmful", "p_harmful_low", "p_harmful_high", "log_odds"}
    assert table.keys() == {"row", "key", "weight", "seen", "scored"} | known
    assert {str(columns.schema.field(name).type) for name in ("weight", *known)} == {"float"}
    assert str(columns.schema.field("scored").type) == "int32"
    assert table["scored"] == [1, 1, 0, 1, 0]  # the first row again in the fourth
    assert table["p_harmful"][0] == table["p_harmful"][3]
    assert table["p_harmful_low"][2:3] + table["p_harmful_high"][2:3] == [0.0, 1.0]
    for low, middle, high in zip(*(table[f"p_harmful{end}"] for end in ("_low", "", "_high")), strict=True):
        assert low <= middle <= high


# what a step touches --------------------------------------------------------------------------------------------------

N = 50_000
INTO = ("index", "index_put", "index_put_", "_index_put_impl_", "select", "slice", "alias", "detach", "item")
"""Operations that look into a tensor of all rows, or write into it, at the places asked for."""


class Watch(TorchDispatchMode):
    """Notes every operation that reads or makes as many numbers as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        made = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in given}
        new = [x for x in made if x.untyped_storage().data_ptr() not in storages]
        name = func.overloadpacket.__name__
        if any(x.numel() >= N for x in new) or (name not in INTO and any(x.numel() >= N for x in given)):
            self.large.append(name)
        return result


@pytest.mark.parametrize("kind", ["probe", "adapter"])
def test_learning_looks_at_no_row_outside_the_batch(kind):
    """No pass over all rows, and of all tensors with a place for every row the other places stay bit for bit."""
    scheduler, slots = BDS(**KINDS[kind]), torch.tensor([7, 40_000, 123, 7])
    scheduler._curve_points  # noqa: B018  # a table, made once; it has more places than the set has rows
    state = scheduler.init(rows(N))
    if state.reference.numel():
        state.reference.fill_(0.5)
    for name, tensor in state.tensors().items():
        if tensor.shape[-1:] == (N,) and tensor.is_floating_point() and name != "reference":
            tensor.uniform_(0.1, 0.9, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with Watch() as watch:
        for number in range(3):
            seen = observation(slots, torch.tensor([1.0, 2.0, 3.0, 4.0]) + number)
            if scheduler.due(state, "probe", slots).any():
                scheduler.learn(state, "probe", slots, torch.tensor([0.1, 1.0, 0.4, 0.2]))
            scheduler.weights(state, seen)
            scheduler.update(state, seen)
    assert watch.large == []
    others = torch.ones(N, dtype=torch.bool)
    others[slots] = False
    changed = set()
    for name, tensor in state.tensors().items():
        if tensor.shape[-1:] == (N,):
            assert torch.equal(tensor[..., others], before[name][..., others])
            changed |= {name} if not torch.equal(tensor, before[name]) else set()
    assert {"log_odds", "harmful", "low", "high", "sampled", "scored", "since"} <= changed


def test_a_pass_over_all_rows_would_be_noticed():
    relative, state = BDSReleased(), BDSReleased().init(rows(N))
    scheduler = BDS()
    own = scheduler.init(rows(N))
    scheduler._curve_points  # noqa: B018
    for work in (
        lambda: relative.slot_weights(state),
        lambda: state.logits.sum(),
        lambda: scheduler.slot_weights(own),
        lambda: scheduler.columns(own),
        lambda: own.harmful.sum(),
        lambda: own.log_odds.mul_(1.0),
        lambda: own.scored.count_nonzero(),
        lambda: torch.zeros(N),
        lambda: BDS()._curve_points,
    ):
        with Watch() as watch:
            work()
        assert watch.large
    with Watch() as watch:  # and what looks at some rows is not
        own.harmful[torch.tensor([3, 5])].sum()
    assert watch.large == []


def per_row(state: BDSState) -> int:
    return sum(t[..., :1].numel() * t.element_size() for t in state.tensors().values() if t.shape[-1:] == (N,))


def test_bytes_per_row_are_those_that_the_documentation_names():
    assert per_row(BDS().init(rows(N))) == 12
    assert "12 bytes per row" in " ".join((bds_module.__doc__ or "").split())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("probe", 12), ("none", 12), ("adapter", 16)],  # a float32 for a reference loss
)
def test_a_row_costs_what_its_options_need_and_learning_does_not_add_to_it(kind, expected):
    scheduler = BDS(**KINDS[kind], **QUICK)
    state = scheduler.init(rows(N))
    types = {name: tensor.dtype for name, tensor in state.tensors().items()}
    assert per_row(state) == expected
    for number in range(2):
        scheduler.learn(state, "probe", torch.arange(20), torch.linspace(0, 1, 20))
        scheduler.update(state, observation(torch.arange(20), torch.ones(20), number))
    assert per_row(state) == expected
    assert {name: tensor.dtype for name, tensor in state.tensors().items()} == types
    # beside them there is nothing that grows
    assert sum(tensor.numel() for tensor in state.tensors().values() if tensor.shape[-1:] != (N,)) < 20


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "help"),
    [
        ({"evidence": "reference"}, "safe-sched losses"),
        ({"reference": "file"}, 'evidence="reference" and reference=... .*go together'),
        ({"evidence": None, "reference": "adapter:x"}, "go together"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_an_error_that_helps(options, help):
    with pytest.raises(OptionError, match=help):
        BDS(**options)
