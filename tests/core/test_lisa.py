"""Lisa without a trainer: its turns, its pull against closed forms and autograd, its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_sched import BDS, Antibody, Fixed, Lisa, NeuralBDS, combine
from safe_sched.errors import ModelError, OptionError, StateError
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, Scheduler, evidential
from safe_sched.schedulers.lisa import LisaState, copy_of, distance, pull
from safe_sched.training.session import Session

INDEX = RowIndex(torch.tensor([40, 10, 30, 20]))


def user_step(count: int = 4) -> Observation:
    return Observation(torch.arange(count), torch.ones(count), torch.ones(count, dtype=torch.long), 0)


# turns ----------------------------------------------------------------------------------------------------------------


def turns(scheduler: Lisa, steps: int) -> list[int]:
    """How many safe steps follow each of some user steps."""
    state, found = scheduler.init(INDEX), []
    for step in range(1, steps + 1):
        scheduler.update(state, user_step())
        due = scheduler.due(state, last=step == steps)
        found.append(due)
        if due:
            state.since = 0
    return found


def test_safe_steps_follow_every_full_user_phase_and_a_share_of_them_the_last() -> None:
    assert turns(Lisa(2, 3), 8) == [0, 0, 2, 0, 0, 2, 0, 2]  # two thirds of a phase: 4/3 steps, rounded up
    assert turns(Lisa(2, 3), 6) == [0, 0, 2, 0, 0, 2]
    assert turns(Lisa(100, 900), 9) == [0] * 8 + [1]
    assert turns(Lisa(0, 3), 6) == [0] * 6


@settings(deadline=None)
@given(safe=st.integers(0, 12), user=st.integers(1, 12), steps=st.integers(1, 40))
def test_the_safe_steps_of_a_run_are_those_of_its_user_steps(safe: int, user: int, steps: int) -> None:
    """safe_steps for every whole phase, ceil(safe_steps * rest / user_steps) for the rest."""
    whole, rest = divmod(steps, user)
    last = 0
    while last * user < safe * rest:
        last += 1
    assert sum(turns(Lisa(safe, user), steps)) == whole * safe + last


def test_nothing_is_owed_twice() -> None:
    scheduler = Lisa(2, 3)
    state = scheduler.init(INDEX)
    assert scheduler.due(state, last=True) == 0


# the pull -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rho=st.floats(0, 4), scale=st.floats(0.5, 1024), seed=st.integers(0, 1000), there=st.booleans())
def test_the_pull_is_the_gradient_of_its_penalty(rho: float, scale: float, seed: int, there: bool) -> None:
    """By autograd, added to a gradient that is there or put where there is none."""
    torch.manual_seed(seed)
    parameters = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    anchor = {name: torch.randn_like(value) for name, value in parameters.items()}
    before = {name: torch.randn_like(value) for name, value in parameters.items()}
    for name, value in parameters.items():
        value.requires_grad_()
        if there:
            value.grad = before[name].clone()
    pull(parameters, anchor, rho, scale)
    penalty = sum((rho / 2 * (parameters[name] - anchor[name]).pow(2).sum() for name in parameters), torch.zeros(()))
    wanted = torch.autograd.grad(scale * penalty, list(parameters.values()))
    for (name, value), gradient in zip(parameters.items(), wanted, strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad, gradient + (before[name] if there else 0.0))


def phase(theta: torch.Tensor, target: torch.Tensor, anchor: torch.Tensor, rho: float) -> torch.Tensor:
    """Gradient descent on |theta - target|^2 / 2 with the pull, to its end."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        pull({"theta": theta}, {"theta": anchor}, rho)
        ((theta - target).pow(2).sum() / 2).backward()
        optimizer.step()
    return theta.detach()


@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0, 2.0])
def test_phases_on_quadratics_end_where_the_proximal_step_does(rho: float) -> None:
    """argmin |t - c|^2 / 2 + rho |t - a|^2 / 2 = (c + rho a) / (1 + rho): three rounds of user and safe phases."""
    torch.manual_seed(0)
    user, safe, theta = torch.randn(3, 5, dtype=torch.float64)
    expected = anchor = theta
    for target in (user, safe) * 3:
        theta = phase(theta, target, anchor, rho)
        expected = (target + rho * expected) / (1 + rho)
        torch.testing.assert_close(theta, expected)
        anchor = theta
    if rho == 1:  # control: an anchor that stays at the start ends elsewhere
        other = phase(theta, safe, torch.zeros(5, dtype=torch.float64), rho)
        assert not torch.allclose(other, expected, atol=1e-2)


def test_the_distance_is_the_norm_of_all_parameters_together() -> None:
    torch.manual_seed(0)
    a, b = ({"x": torch.randn(3, 2), "y": torch.randn(7)} for _ in range(2))
    flat = [torch.cat([values["x"].flatten(), values["y"]]) for values in (a, b)]
    assert distance(a, b) == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-6)
    assert distance(a, copy_of(a)) == 0


def test_parameters_that_were_unfrozen_meanwhile_are_an_error() -> None:
    theta, anchor = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}
    for use in (lambda: pull(theta, anchor, 1.0), lambda: distance(theta, anchor)):
        with pytest.raises(ModelError, match="1 of them were frozen or unfrozen since .first: b.*before training"):
            use()


# a scheduler ----------------------------------------------------------------------------------------------------------


def test_rows_weigh_the_same_or_what_their_scheduler_says() -> None:
    plain, weighed = Lisa(), Lisa(scheduler=Fixed([0.5, 1.0, 2.0, 0.0]))
    states = plain.init(INDEX), weighed.init(INDEX)
    slots = INDEX.lookup(torch.tensor([20, 40]))
    batch = Observation(slots, None, torch.ones(2, dtype=torch.long), 0)
    assert plain.weights(states[0], batch).tolist() == [1, 1]
    assert plain.slot_weights(states[0]).tolist() == [1] * 4
    assert weighed.weights(states[1], batch).tolist() == [0, 0.5]
    assert torch.equal(weighed.slot_weights(states[1])[slots], torch.tensor([0.0, 0.5]))
    assert torch.equal(weighed.slot_weights(states[1], slots), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("inner", [BDS(), combine(BDS(), Antibody())], ids=["bds", "combined"])
def test_scores_reach_the_scheduler_of_the_rows(inner: Any) -> None:
    """Through a session, as an integration does it: the same weights and columns as without Lisa."""
    outcomes = []
    for scheduler in (inner, Lisa(scheduler=inner)):
        assert isinstance(scheduler, Scheduler)
        session = Session(scheduler, INDEX)
        assert len(evidential(scheduler, session.state, "probe")) == 1
        for _ in range(3):
            session.learn(torch.arange(4), torch.tensor([0.0, 0.1, 1.0, 0.2]), "probe")
        outcomes.append(session.table())
    assert str(outcomes[0].to_pylist()) == str(outcomes[1].to_pylist())  # nan is itself
    assert float(outcomes[0].column("weight").to_numpy().min()) < 0.5
    assert not Session(Lisa(), INDEX).table().column("weight").to_numpy().std()


def test_a_stream_grows_both_states() -> None:
    index = RowIndex(None)
    scheduler = Lisa(scheduler=BDS())
    state = scheduler.init(index)
    index.add(torch.tensor([5, 6, 7]))
    state = scheduler.grow(state, index)
    assert scheduler.slot_weights(state).numel() == 3
    plain = Lisa().init(RowIndex(None))
    assert Lisa().slot_weights(Lisa().grow(plain, index)).tolist() == [1] * 3


# its state ------------------------------------------------------------------------------------------------------------


def filled(scheduler: Lisa) -> LisaState:
    state = scheduler.init(INDEX)
    state.since, state.safe_steps = 2, 7
    state.rates = torch.tensor([0.1, 0.3], dtype=torch.float64)
    state.anchor = {"model.a.weight": torch.randn(2, 3), "b": torch.randn(4).bfloat16()}
    return state


@pytest.mark.parametrize("inner", [None, BDS(), combine(BDS(), Antibody())], ids=["plain", "bds", "combined"])
def test_a_saved_state_comes_back(inner: Any, tmp_path: Any) -> None:
    scheduler = Lisa(2, 3, scheduler=inner)
    session, other = Session(scheduler, INDEX), Session(scheduler, INDEX)
    session.state = filled(scheduler)
    session.save(tmp_path / "state")
    with pytest.raises(StateError, match=r"anchor\.b.*missing, unknown"):
        other.load(tmp_path / "state")  # the parameters are not known yet
    other.state = filled(scheduler)
    other.load(tmp_path / "state")
    before, after = session.state.tensors(), other.state.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert other.state.since == 2
    assert other.state.safe_steps == 7
    assert type(other.state) is scheduler.state_type


@pytest.mark.parametrize(
    "other", [Lisa(3, 3), Lisa(2, 4), Lisa(2, 3, 0.5), Lisa(2, 3, scheduler=Fixed())], ids=["safe", "user", "rho", "in"]
)
def test_a_state_of_other_options_is_refused(other: Lisa, tmp_path: Any) -> None:
    session = Session(Lisa(2, 3), INDEX)
    session.save(tmp_path / "state")
    Session(Lisa(2, 3), INDEX).load(tmp_path / "state")
    with pytest.raises(StateError, match="scheduler: saved"):
        Session(other, INDEX).load(tmp_path / "state")


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"user_steps": 0}, r"Lisa\(user_steps=0\): Input should be greater than or equal to 1"),
        ({"safe_steps": -1}, r"Lisa\(safe_steps=-1\)"),
        ({"rho": -0.1}, r"Lisa\(rho=-0.1\)"),
        ({"rho": float("nan")}, r"Lisa\(rho=nan\)"),
        ({"rho": float("inf")}, r"Lisa\(rho=inf\)"),
        ({"user_step": 3}, r"unknown option of Lisa 'user_step' \(did you mean 'user_steps'"),
        ({"scheduler": "bsd"}, "did you mean 'bds'"),
        ({"scheduler": 3}, r"Lisa\(scheduler=3\) cannot weigh the rows"),
        ({"scheduler": Lisa()}, r"Lisa\(scheduler='lisa'\) cannot weigh"),
        ({"scheduler": NeuralBDS()}, r"Lisa\(scheduler='neural_bds'\) cannot weigh .* use BDS, Antibody"),
        ({"scheduler": BDS(evidence="covariance")}, 'in steps of their own; use evidence="probe"'),
        ({"scheduler": combine(BDS(evidence="covariance"), Antibody())}, 'use evidence="probe"'),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Lisa(**options)


def test_a_scheduler_may_be_named() -> None:
    assert Lisa(scheduler="bds").settings() == Lisa(scheduler=BDS()).settings()
    assert Lisa().settings() == {"name": "lisa", "safe_steps": 100, "user_steps": 900, "rho": 0.1, "scheduler": None}


def test_lisa_is_no_expert() -> None:
    with pytest.raises(OptionError, match="'lisa' cannot be combined"):
        combine(Lisa(), BDS())
