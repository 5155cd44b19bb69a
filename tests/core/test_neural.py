"""The amortised scheduler: its head against slow loops and autograd, and what it makes of rows never measured."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_sched import BDS, NeuralBDS
from safe_sched.errors import DataError, OptionError, StateError
from safe_sched.estimators.head import BIAS, Head, Scorer, expected_sigmoid
from safe_sched.estimators.sgld import normal
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched.schedulers.neural import NeuralState
from safe_sched.training.session import Session

HEADS = ["linear", "mlp"]


def seen(slots: Tensor, features: Tensor | None, step: int = 0) -> Observation:
    measured = {} if features is None else {"hidden_state": features}
    return Observation(slots, torch.ones(slots.numel(), dtype=torch.long), step, measured)


class World:
    """Rows with Gaussian features: harmful ones lie a few standard deviations along one direction."""

    def __init__(
        self, rows: int = 300, share: float = 0.25, width: int = 24, apart: float = 8.0, seed: int = 0
    ) -> None:
        towards = torch.nn.functional.normalize(
            torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0
        )
        self.random = torch.Generator().manual_seed(1000 * seed + rows)
        self.harmful = torch.rand(rows, generator=self.random) < share
        spread = torch.randn(rows, width, generator=self.random) * torch.linspace(0.5, 2, width)
        self.features = 3 + spread + self.harmful[:, None] * apart * towards
        self.index = RowIndex(torch.arange(rows))

    def scores(self, rows: Tensor, wrong: float) -> Tensor:
        """Near 1 for harmful rows and 0 for benign ones, but for a share of wrong ones."""
        flipped = torch.rand(rows.numel(), generator=self.random) < wrong
        return (self.harmful[rows] ^ flipped).float() + 0.1 * torch.randn(rows.numel(), generator=self.random)

    def train(
        self, scheduler: NeuralBDS, steps: int = 60, batch: int = 16, measured: int | None = None, wrong: float = 0.0
    ) -> NeuralState:
        """As an integration does it: learn, weights, update. Rows from ``measured`` on are never measured."""
        state, rows = scheduler.init(self.index), self.index.slots
        for number in range(steps):
            chosen = torch.randperm(rows, generator=self.random)[:batch]
            due = scheduler.due(state, "probe", chosen) & (chosen < (rows if measured is None else measured))
            scheduler.learn(state, "probe", chosen[due], self.scores(chosen[due], wrong))
            step = seen(chosen, self.features[chosen], number)
            scheduler.weights(state, step)
            scheduler.update(state, step)
        return state

    def weights(self, scheduler: NeuralBDS, state: NeuralState) -> Tensor:
        return scheduler.weights(state, seen(torch.arange(self.index.slots), self.features))


def same(a: NeuralState, b: NeuralState) -> bool:
    first, second = a.tensors(), b.tensors()
    return all(torch.equal(first[name], second[name]) for name in first)


# the head -------------------------------------------------------------------------------------------------------------


def slow_logit(head: Head, phi: Tensor, u: Tensor) -> Tensor:
    """One row, one chain, from the equations of `safe_sched.estimators.head`."""
    if head.kind == "linear":
        return head.std * sum(phi[i] * u[i] for i in range(head.width)) + BIAS * phi[-1]
    hidden, inputs = 16, head.inputs
    total = torch.zeros((), dtype=phi.dtype)
    for h in range(hidden):
        inside = phi[hidden * inputs + h] + 2 * sum(phi[h * inputs + i] * u[i] for i in range(inputs))
        total = total + phi[hidden * (inputs + 1) + h] * torch.tanh(inside)
    return head.std * 1.22 * total / math.sqrt(hidden) + BIAS * phi[-1]


def slow_energy(head: Head, phi: Tensor, prior: Tensor, u: Tensor, evidence: Tensor) -> Tensor:
    """U(phi) of one chain, as the module's docstring writes it."""
    total = (phi - prior).square().sum() / 2
    for row, e in zip(u, evidence, strict=True):
        benign = torch.sigmoid(slow_logit(head, phi, row))
        total = total - torch.log(benign + (1 - benign) * e.exp())
    return total


def problem(kind: Any, width: int = 5, rows: int = 7, chains: int = 4) -> tuple[Head, Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    head = Head(kind, width, 2.0)
    phi = torch.randn(head.parameters, chains, generator=random, dtype=torch.float64)
    prior = torch.randn(head.parameters, generator=random, dtype=torch.float64)
    u = torch.randn(rows, width, generator=random, dtype=torch.float64) / math.sqrt(width)
    return head, phi, prior, u, 4 * torch.randn(rows, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("kind", HEADS)
def test_the_gradient_of_the_energy_is_that_of_a_slow_loop_by_autograd(kind: Any) -> None:
    scheduler = NeuralBDS(head=kind)
    head, phi, prior, u, evidence = problem(kind)
    found = scheduler.gradient(head, phi, prior, u, evidence[:, None])
    for chain in range(phi.shape[1]):
        one = phi[:, chain].clone().requires_grad_()
        slow_energy(head, one, prior, u, evidence).backward()
        assert one.grad is not None
        torch.testing.assert_close(found[:, chain], one.grad)
    # control: other evidence has another gradient
    assert (scheduler.gradient(head, phi, prior, u, 1 + evidence[:, None]) - found).abs().max() > 0.1


@pytest.mark.parametrize("kind", HEADS)
def test_the_energy_of_many_rows_is_that_of_the_slow_loop(kind: Any) -> None:
    scheduler = NeuralBDS(head=kind)
    head, phi, prior, u, evidence = problem(kind)
    rows = scheduler.energy_of(head.logits(phi, u), evidence[:, None]).sum(0)
    found = rows + (phi - prior[:, None]).square().sum(0) / 2
    expected = [slow_energy(head, phi[:, c], prior, u, evidence) for c in range(phi.shape[1])]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_an_update_is_the_slow_loop_of_sgld_over_the_remembered_rows(kind: Any, temperature: float) -> None:
    """Each chain by itself, a gradient by autograd, the noise of a pair mirrored; two optimiser steps."""
    scheduler = NeuralBDS(head=kind, temperature=temperature, chains=4, head_steps=3, seed=5)
    world = World(rows=12, width=6)
    state = scheduler.init(world.index)
    scheduler.learn(state, "probe", torch.arange(8), world.scores(torch.arange(8), 0.0))
    first, all_rows = torch.arange(4), torch.arange(12)
    scheduler.update(state, seen(first, world.features[first]))
    phi, done = state.phi.double(), state.trained
    scheduler.update(state, seen(all_rows, world.features))
    assert state.remembered.tolist() == list(range(8))  # 0 to 3 in their old places, and only rows with a score

    x = torch.cat([world.features[:4], world.features]).double()  # all that was seen so far, twice what was seen twice
    mean, variance = x.mean(0), x.var(0, correction=0)
    head = Head(kind, 6, 3.0, 5)
    u = ((world.features[:8].double() - mean) / (variance + 1e-6 * variance.mean()).sqrt()).clamp(-8, 8) / math.sqrt(6)
    evidence = state.log_odds[:8].double()
    bend = [
        sum(float(torch.sigmoid(z) * torch.sigmoid(-z)) for z in (slow_logit(head, phi[:, c], row) for c in range(4)))
        / 4
        for row in u
    ]
    step_of = 0.5 / (1 + head.slope * sum(max(b, 0.02) for b in bend))
    noise = normal(5, torch.arange(head.parameters), torch.full((head.parameters,), 1 + done), 3, 2).double()
    sign = head.mirror().double()
    for chain in range(4):
        one = phi[:, chain].clone()
        for k in range(3):
            at = one.clone().requires_grad_()
            slow_energy(head, at, state.prior.double(), u, evidence).backward()
            assert at.grad is not None
            xi = noise[k, :, chain % 2] * (sign if chain >= 2 else 1)
            one = one - step_of * at.grad + math.sqrt(2 * temperature * step_of) * xi
        torch.testing.assert_close(state.phi[:, chain].double(), one, rtol=1e-4, atol=1e-5)
    assert (state.phi.double() - phi).abs().max() > 0.01  # control: it did move


@pytest.mark.parametrize("kind", HEADS)
def test_the_mirror_image_of_a_head_negates_its_logit(kind: Any) -> None:
    head, phi, _, u, _ = problem(kind)
    bias = BIAS * phi[-1]
    z, mirrored = head.logits(phi, u), head.logits(head.mirror().double()[:, None] * phi, u)
    torch.testing.assert_close(mirrored, -z)
    assert (z - bias).abs().max() > 0.1


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("width", [3, 200])
def test_the_prior_of_a_logit_has_the_variance_that_it_is_said_to_have(kind: Any, width: int) -> None:
    """Var z = s**2 + BIAS**2 = 5 for a row with |u| = 1: exact for the linear head, a fifth off at most for the mlp."""
    head = Head(kind, width, 2.0)
    random = torch.Generator().manual_seed(0)
    features = torch.randn(40, width, generator=random)
    features = features * math.sqrt(width) / features.norm(dim=1, keepdim=True)
    u = head.read(features, torch.zeros(width), torch.ones(width))
    _, variance = head.moments(torch.randn(head.parameters, 4000, generator=random), u)
    assert variance.mean() == pytest.approx(5, rel=0.05 if kind == "linear" else 0.2)


def test_the_expected_sigmoid_is_the_integral() -> None:
    """Against a sum over a fine grid; control: the sigmoid of the mean is something else."""
    at = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.softmax(-at.square() / 2, 0)
    for mean, variance in [(0.0, 5.0), (3.8, 5.0), (-2.0, 0.3), (6.0, 12.0), (1.0, 0.0)]:
        expected = (torch.sigmoid(mean + math.sqrt(variance) * at) * density).sum()
        found = expected_sigmoid(torch.tensor(mean), torch.tensor(variance))
        assert float(found) == pytest.approx(float(expected), abs=1e-3)
    assert (
        float(expected_sigmoid(torch.tensor(3.8), torch.tensor(5.0))) < float(torch.sigmoid(torch.tensor(3.8))) - 0.05
    )


# what it makes of rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_before_anything_is_known_every_weight_is_1_and_p_harmful_the_share_expected(share: float) -> None:
    world, scheduler = World(), NeuralBDS(prior_share=share)
    state = scheduler.init(world.index)
    torch.testing.assert_close(scheduler.slot_weights(state), torch.ones(300), rtol=1e-6, atol=0)
    torch.testing.assert_close(world.weights(scheduler, state), torch.ones(300), rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.columns(state)["p_harmful"], torch.full((300,), share), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_rows_that_were_never_measured_are_told_apart_by_their_features(kind: Any, wrong: float) -> None:
    """A third of the rows is measured. The others: harmful below .1, or .2 where a tenth of the scores is wrong."""
    world, scheduler = World(), NeuralBDS(head=kind)
    state = world.train(scheduler, measured=100, wrong=wrong, steps=100)
    assert int((state.scored > 0).sum()) <= 100
    weight, unmeasured = world.weights(scheduler, state), torch.arange(300) >= 100
    harmful, benign = weight[world.harmful & unmeasured], weight[~world.harmful & unmeasured]
    assert harmful.median() < (0.2 if wrong else 0.1)
    assert harmful.mean() < (0.25 if wrong else 0.15)
    assert 1.0 < benign.mean() < 1.12
    assert harmful.max() < benign.quantile(0.02)


def test_features_that_say_nothing_leave_unmeasured_rows_where_they_were() -> None:
    """Control for the test above: the same scores, features without the direction."""
    world, scheduler = World(), NeuralBDS(max_probes=1)
    world.features = torch.randn(300, 24, generator=world.random)
    state = world.train(scheduler, measured=100)
    weight, unmeasured = world.weights(scheduler, state), torch.arange(300) >= 100
    harmful, benign = weight[world.harmful & unmeasured], weight[~world.harmful & unmeasured]
    assert abs(harmful.mean() - benign.mean()) < 0.1


@pytest.mark.parametrize("kind", HEADS)
def test_a_wholly_benign_set_stays_near_equal(kind: Any) -> None:
    world, scheduler = World(share=0.0), NeuralBDS(head=kind)
    weight = world.weights(scheduler, world.train(scheduler))
    assert weight.min() > 0.5
    assert weight.std() < 0.1


def test_a_wholly_harmful_set_is_turned_away() -> None:
    """Nothing in the weights is relative to other rows."""
    world, scheduler = World(share=1.0), NeuralBDS()
    assert world.weights(scheduler, world.train(scheduler, measured=150)).mean() < 0.15


def test_scores_that_were_noise_at_first_are_outweighed_later() -> None:
    """20 steps in which no score means anything, then good ones: rows unmeasured so far are told apart all the same."""
    world, scheduler = World(rows=600), NeuralBDS(max_probes=1)
    meaning, world.harmful = world.harmful, torch.zeros(600, dtype=torch.bool)
    state = scheduler.init(world.index)
    for number in range(120):
        if number == 20:
            world.harmful = meaning
        chosen = torch.randint(0, 400, (16,), generator=world.random) if number >= 20 else torch.arange(16)
        chosen = torch.unique(chosen)
        due = scheduler.due(state, "probe", chosen)
        scheduler.learn(state, "probe", chosen[due], world.scores(chosen[due], 0.0))
        scheduler.update(state, seen(chosen, world.features[chosen], number))
    weight = world.weights(scheduler, state)[400:]
    assert weight[meaning[400:]].mean() < 0.2
    assert weight[~meaning[400:]].mean() > 0.9


def test_own_evidence_and_the_head_add_up_as_log_odds() -> None:
    """w = E[sigmoid(z - E)] / (1 - share), by the chains: a row that was measured can overrule the head."""
    world, scheduler = World(), NeuralBDS()
    state = world.train(scheduler)
    rows = torch.tensor([int((~world.harmful).nonzero()[0]), int(world.harmful.nonzero()[0])])
    for evidence in (-9.0, 0.0, 9.0):
        state.log_odds[rows] = evidence
        found = scheduler.weights(state, seen(rows, world.features[rows]))
        scorer = scheduler.scorer(state)
        z = scorer.head.logits(state.phi, scorer.head.read(world.features[rows], scorer.mean, scorer.variance))
        expected = torch.sigmoid(z - evidence).mean(1) / 0.9
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03)  # a normal for 16 chains
    state.log_odds[rows] = torch.tensor([12.0, -12.0]).to(state.log_odds)
    overruled = scheduler.weights(state, seen(rows, world.features[rows]))
    assert overruled[0] < 0.1
    assert overruled[1] > 0.9


def test_a_far_away_row_has_a_wide_interval() -> None:
    world, scheduler = World(), NeuralBDS()
    scorer = scheduler.scorer(world.train(scheduler))
    near, far = world.features[~world.harmful][:20], 3 + 20 * torch.randn(20, 24, generator=world.random)
    width = [(scores.high - scores.low).mean() for scores in (scorer.score(near), scorer.score(far))]
    assert width[1] > 4 * width[0]


def test_the_table_has_the_documented_types() -> None:
    table = Session(NeuralBDS(), RowIndex(torch.arange(4))).table()
    names = ("weight", "p_harmful", "p_harmful_low", "p_harmful_high", "log_odds", "head_log_odds")
    assert {name: str(table.schema.field(name).type) for name in names} == dict.fromkeys(names, "float")
    assert str(table.schema.field("scored").type) == "int32"


def test_a_row_costs_9_bytes_more_than_without_a_head() -> None:
    index = RowIndex(torch.arange(5000))

    def per_row(state: Any) -> float:
        return sum(t.numel() * t.element_size() for t in state.tensors().values() if t.shape[-1:] == (5000,)) / 5000

    assert per_row(NeuralBDS().init(index)) == per_row(BDS().init(index)) + 9 == 21


# what is measured -----------------------------------------------------------------------------------------------------


def test_probe_share_picks_that_share_of_rows_and_always_the_same() -> None:
    scheduler = NeuralBDS(probe_share=0.2)
    state = scheduler.init(RowIndex(torch.arange(5000)))
    due = scheduler.due(state, "probe", torch.arange(5000))
    assert due.float().mean() == pytest.approx(0.2, abs=0.02)
    some = torch.tensor([17, 4000, 3])
    assert torch.equal(scheduler.due(state, "probe", some), due[some])
    assert not torch.equal(due, NeuralBDS(probe_share=0.2, seed=1).due(state, "probe", torch.arange(5000)))
    assert (
        scheduler.due(state, "probe", torch.arange(5000)).sum()
        > NeuralBDS(probe_share=0.0).due(state, "probe", torch.arange(5000)).sum()
    )
    assert NeuralBDS().due(state, "probe", torch.arange(5000)).all()


def test_a_row_that_the_head_is_certain_of_is_not_due_but_for_the_audit() -> None:
    world, scheduler = World(rows=600), NeuralBDS()
    state = world.train(scheduler, measured=200, steps=120)
    unmeasured = torch.arange(200, 600)
    p = scheduler.columns(state)["p_harmful"][unmeasured]
    certain = state.known[unmeasured] & ((p < 0.04) | (p > 0.96))
    assert certain.sum() > 100
    due = scheduler.due(state, "probe", unmeasured)
    assert 0 < due[certain].float().mean() < 0.12
    assert due[~state.known[unmeasured]].all()
    undecided = state.known[unmeasured] & (p > 0.3) & (p < 0.7)
    assert due[undecided].all()


def test_no_row_is_measured_more_often_than_max_probes() -> None:
    world, scheduler = World(), NeuralBDS(max_probes=2)
    state = world.train(scheduler, steps=120, wrong=0.4)
    assert int(state.scored.max()) == 2


# state ----------------------------------------------------------------------------------------------------------------


def test_the_same_run_twice_is_the_same_and_another_seed_another() -> None:
    states = [World().train(NeuralBDS(seed=seed), steps=8) for seed in (0, 0, 1)]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_a_step_in_micro_batches_and_in_another_order_is_the_step_in_one() -> None:
    """Weights of the parts are those of the whole; the update is told of the whole, whatever the order of its rows."""
    world, scheduler = World(rows=40), NeuralBDS()
    whole, parts, turned = (scheduler.init(world.index) for _ in range(3))
    for number in range(5):
        rows = torch.randint(0, 40, (9,), generator=world.random)
        scores = world.scores(rows, 0.0)
        step = seen(rows, world.features[rows], number)
        cut = [seen(rows[p], world.features[rows[p]], number) for p in (slice(0, number), slice(number, None))]
        backwards = seen(rows.flip(0), world.features[rows.flip(0)], number)
        for state, x, y in ((whole, rows, scores), (parts, rows, scores), (turned, rows.flip(0), scores.flip(0))):
            scheduler.learn(state, "probe", x, y)
        weights = torch.cat([scheduler.weights(parts, piece) for piece in cut])
        torch.testing.assert_close(weights, scheduler.weights(whole, step), rtol=1e-5, atol=1e-6)
        for state, told in ((whole, step), (parts, Observation.concatenate(cut)), (turned, backwards)):
            scheduler.update(state, told)
    assert same(whole, parts)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(turned.tensors()[name], tensor, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_asking_for_weights_changes_nothing() -> None:
    world, scheduler = World(), NeuralBDS()
    state, untouched = world.train(scheduler, steps=5), World().train(NeuralBDS(), steps=5)
    world.weights(scheduler, state)
    scheduler.slot_weights(state)
    scheduler.columns(state)
    scheduler.scorer(state).score(world.features)
    assert same(state, untouched)


def test_without_features_the_weight_is_that_of_the_last_time() -> None:
    """Rows of the last step, and rows remembered: the head's opinion as of now."""
    world, scheduler = World(rows=100), NeuralBDS()
    state = world.train(scheduler, steps=40, batch=25)
    fresh, kept = world.weights(scheduler, state), scheduler.slot_weights(state)
    assert state.known.all()
    torch.testing.assert_close(kept[state.remembered], fresh[state.remembered], rtol=1e-4, atol=1e-5)
    assert torch.equal(scheduler.weights(state, seen(torch.tensor([3, 5]), None)), kept[[3, 5]])


def test_the_memory_is_bounded_and_holds_the_last_scored_rows_once_each() -> None:
    world, scheduler = World(), NeuralBDS(memory=32, max_probes=1)
    state = scheduler.init(world.index)
    for number in range(12):
        rows = torch.arange(10 * number, 10 * number + 10)
        scheduler.learn(state, "probe", rows[:8], world.scores(rows[:8], 0.0))
        both = torch.cat([rows, rows[:3]])  # rows that come twice in a step
        scheduler.update(state, seen(both, world.features[both], number))
        assert state.memory.shape[0] == state.remembered.numel() <= 32
        assert state.remembered.unique().numel() == state.remembered.numel()
        torch.testing.assert_close(state.memory, world.features[state.remembered])
    last = [10 * n + i for n in range(12) for i in range(8)][-32:]
    assert sorted(state.remembered.tolist()) == last
    again = torch.tensor(last[:5])
    scheduler.update(state, seen(again, world.features[again] + 1, 12))
    assert sorted(state.remembered.tolist()) == last
    assert (state.memory != world.features[state.remembered]).any(1).sum() == 5


def test_more_rows_in_a_step_than_the_memory_holds() -> None:
    world, scheduler = World(), NeuralBDS(memory=7)
    state = scheduler.init(world.index)
    scheduler.learn(state, "probe", torch.arange(20), world.scores(torch.arange(20), 0.0))
    scheduler.update(state, seen(torch.arange(20), world.features[:20]))
    assert sorted(state.remembered.tolist()) == list(range(13, 20))


def test_an_update_recalls_a_bounded_number_of_rows_and_each_stands_for_others() -> None:
    """Over many updates every row is recalled alike, and the mean of the gradients is that of all rows."""
    world, scheduler = World(), NeuralBDS(recall=25)
    state = scheduler.init(world.index)
    scheduler.learn(state, "probe", torch.arange(100), world.scores(torch.arange(100), 0.0))
    scheduler.update(state, seen(torch.arange(100), world.features[:100]))
    head, phi = scheduler._head(state), state.phi
    u, evidence = head.read(state.memory, *scheduler._moments(state)), state.log_odds[state.remembered].float()[:, None]
    times, mean = torch.zeros(100), torch.zeros_like(phi)
    for number in range(800):
        state.trained = 8 * number
        chosen = scheduler.recalled(state)
        assert chosen.unique().numel() == 25
        assert torch.equal(chosen, scheduler.recalled(state))
        times[chosen] += 1
        mean += scheduler.gradient(head, phi, state.prior, u[chosen], evidence[chosen], 4.0) / 800
    assert times.min() > 150
    assert times.max() < 250
    whole = scheduler.gradient(head, phi, state.prior, u, evidence)
    assert (mean - whole).norm() < 0.1 * whole.norm()
    # control: without the factor it would be another
    less = scheduler.gradient(head, phi, state.prior, u[:25], evidence[:25])
    assert (less - whole).norm() > 0.3 * whole.norm()


def test_running_moments_are_those_of_all_rows_seen() -> None:
    world, scheduler = World(), NeuralBDS()
    state = scheduler.init(world.index)
    for start, end in ((0, 1), (1, 30), (30, 100)):
        scheduler.update(state, seen(torch.arange(start, end), world.features[start:end]))
    x = world.features[:100].double()
    torch.testing.assert_close(state.feature_mean, x.mean(0))
    torch.testing.assert_close(state.feature_squares / 100, x.var(0, correction=0))


@pytest.mark.parametrize("stop", [0, 3])
def test_a_run_that_stops_and_resumes_is_the_run_that_does_not(stop: int, tmp_path: Path) -> None:
    """Through a file; the head's sizes are not known to a fresh state, and yet it loads."""
    world = World(rows=40)

    def go(session: Session, first: int, last: int) -> None:
        for number in range(first, last):
            rows = torch.arange(5 * number, 5 * number + 10) % 40
            session.scheduler.learn(session.state, "probe", rows, world.harmful[rows].float())  # pyright: ignore
            session.scheduler.update(session.state, seen(rows, world.features[rows], number))

    through, before, after = (Session(NeuralBDS(), world.index) for _ in range(3))
    go(through, 0, 6)
    go(before, 0, stop)
    before.save(tmp_path / "state")
    after.load(tmp_path / "state")
    go(after, stop, 6)
    assert isinstance(after.state, NeuralState)
    assert isinstance(through.state, NeuralState)
    assert same(after.state, through.state)


def test_a_state_for_other_options_is_refused(tmp_path: Path) -> None:
    session = Session(NeuralBDS(), RowIndex(torch.arange(4)))
    session.save(tmp_path / "state")
    with pytest.raises(StateError, match="prior_std"):
        Session(NeuralBDS(prior_std=2.0), RowIndex(torch.arange(4))).load(tmp_path / "state")


def test_rows_of_a_stream_start_where_all_rows_started() -> None:
    world, scheduler, index = World(rows=60), NeuralBDS(), RowIndex(None)
    state = scheduler.init(index)
    for number in range(6):
        index.add(torch.arange(10 * number, 10 * number + 10))
        state = scheduler.grow(state, index)
        assert scheduler.slot_weights(state)[10 * number :].tolist() == pytest.approx([1.0] * 10)
        rows = torch.arange(10 * number, 10 * number + 10)
        scheduler.learn(state, "probe", rows, world.scores(rows, 0.0))
        scheduler.update(state, seen(rows, world.features[rows], number))
    assert state.known.numel() == state.log_odds.numel() == 60


def test_a_step_without_rows_changes_nothing_of_the_head() -> None:
    world, scheduler = World(), NeuralBDS()
    state, before = world.train(scheduler, steps=3), World().train(NeuralBDS(), steps=3)
    scheduler.update(state, seen(torch.empty(0).long(), torch.empty(0, 24)))
    for name in ("phi", "memory", "remembered", "feature_mean", "logit", "trained", "seen"):
        assert torch.equal(state.tensors()[name], before.tensors()[name])


def test_features_of_another_width_are_an_error_that_says_why() -> None:
    world, scheduler = World(), NeuralBDS()
    state = world.train(scheduler, steps=2)
    wider = seen(torch.arange(3), torch.zeros(3, 25))
    for act in (scheduler.weights, scheduler.update):
        with pytest.raises(DataError, match=r"\(3, 25\) for a head of width 24"):
            act(state, wider)


# scorers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_a_scorer_survives_the_way_through_its_file(kind: Any, tmp_path: Path) -> None:
    world, scheduler = World(), NeuralBDS(head=kind)
    scorer = scheduler.scorer(world.train(scheduler))
    scorer.save(tmp_path / "scorer.safetensors")
    back = Scorer.load(tmp_path / "scorer.safetensors")
    assert back.digest() == scorer.digest()
    for a, b in zip(scorer.score(world.features), back.score(world.features), strict=True):
        assert torch.equal(a, b)
    assert list(tmp_path.iterdir()) == [tmp_path / "scorer.safetensors"]


@pytest.mark.parametrize("kind", HEADS)
def test_a_scorer_tells_rows_of_another_set_apart(kind: Any) -> None:
    """Same direction, other rows; the scores are probabilities within their interval."""
    world, scheduler = World(), NeuralBDS(head=kind)
    scorer, other = scheduler.scorer(world.train(scheduler)), World(rows=200)
    p, low, high = scorer.score(other.features)
    assert p[other.harmful].mean() > 0.9
    assert p[~other.harmful].mean() < 0.05
    assert ((low <= p + 1e-4) & (p <= high + 1e-4)).all()
    # control: another world has another direction
    strange = World(rows=200, seed=3)
    p = scorer.score(strange.features).p_harmful
    assert abs(p[strange.harmful].mean() - p[~strange.harmful].mean()) < 0.5


def test_a_run_that_starts_from_a_saved_head_knows_at_once_what_it_knew(tmp_path: Path) -> None:
    world, first = World(), NeuralBDS()
    scorer = first.scorer(world.train(first))
    scorer.save(tmp_path / "scorer")
    second, other = NeuralBDS(init_from=tmp_path / "scorer"), World(rows=200)
    state = second.init(other.index)
    before = other.weights(second, state)
    assert before[other.harmful].mean() < 0.15
    assert before[~other.harmful].mean() > 0.9
    after = other.weights(second, other.train(second, steps=20))
    assert after[other.harmful].mean() < 0.15
    assert after[~other.harmful].mean() > 0.9
    assert second.settings()["init_from"] == scorer.digest()


def test_a_head_that_was_never_trained_gives_no_scorer() -> None:
    scheduler = NeuralBDS()
    with pytest.raises(StateError, match="has not been trained yet"):
        scheduler.scorer(scheduler.init(RowIndex(torch.arange(3))))


def test_a_damaged_or_strange_file_is_a_state_error(tmp_path: Path) -> None:
    world, scheduler = World(), NeuralBDS()
    path = tmp_path / "scorer"
    with pytest.raises(StateError, match="no scorer at"):
        Scorer.load(path)
    scorer = scheduler.scorer(world.train(scheduler, steps=2))
    scorer.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StateError, match="damaged"):
        Scorer.load(path)
    Session(NeuralBDS(), world.index).save(path)
    with pytest.raises(StateError, match="not a scorer"):
        Scorer.load(path)
    dataclasses.replace(scorer, phi=scorer.phi[:-1]).save(path)
    with pytest.raises(StateError, match="sizes"):
        Scorer.load(path)


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"features": "encoder"}, "go together"),
        ({"encoder": "folder"}, "go together"),
        ({"features": "encoder", "encoder": 7}, "a callable from texts"),
        ({"chains": 5}, "multiple of 2"),
        ({"probe_share": 1.5}, "less than or equal to 1"),
        ({"head": "deep"}, "'linear' or 'mlp'"),
        ({"evidence": "reference"}, "go together"),
        ({"prior_stdd": 1.0}, "did you mean 'prior_std'"),
    ],
)
def test_options_that_do_not_fit_are_an_error(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        NeuralBDS(**options)


def test_a_head_of_another_kind_is_no_start(tmp_path: Path) -> None:
    world, scheduler = World(), NeuralBDS()
    scheduler.scorer(world.train(scheduler, steps=2)).save(tmp_path / "scorer")
    with pytest.raises(OptionError, match='head="linear"; use the same'):
        NeuralBDS(head="mlp", init_from=tmp_path / "scorer")
    with pytest.raises(StateError, match="no scorer"):
        NeuralBDS(init_from=tmp_path / "nothing")


def test_settings_name_a_callable_encoder_and_are_json() -> None:
    import json

    settings = NeuralBDS(features="encoder", encoder=make_vectors).settings()
    assert settings["encoder"] == "make_vectors"
    assert json.loads(json.dumps(settings)) == settings
    assert NeuralBDS(features="encoder", encoder="some/name").settings()["encoder"] == "some/name"


def make_vectors(texts: list[str]) -> Any:
    return [[float(len(text))] for text in texts]
