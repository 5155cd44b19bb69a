"""Lisa without a trainer: its turns, its pull against closed forms and autograd, its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_sched.errors import ModelError, OptionError
from safe_sched.training.loop import part_of
from safe_sched_hf.lisa import Lisa, copy_of, distance, pull

# turns ----------------------------------------------------------------------------------------------------------------


def turns(lisa: Lisa, steps: int) -> list[int]:
    """How many safe steps follow each of some user steps."""
    since, found = 0, []
    for step in range(1, steps + 1):
        since += 1
        found.append(lisa.due(since, last=step == steps))
        since = 0 if found[-1] else since
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
    assert Lisa(2, 3).due(0, last=True) == 0


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
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Lisa(**options)


def test_a_part_is_built_by_its_name_and_tells_options_apart() -> None:
    assert part_of("lisa", safe_steps=2, user_steps=18).settings() == Lisa(2, 18).settings()
    assert Lisa().settings() == {"name": "lisa", "safe_steps": 100, "user_steps": 900, "rho": 0.1}
    with pytest.raises(OptionError, match="unknown part 'lis' .did you mean 'lisa'"):
        part_of("lis")
