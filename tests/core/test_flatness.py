"""Flat alignment in plain torch: against the equations, against a solver, and without a trace in the parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

import safe_sched.training.flat_alignment as flatness
from safe_sched.errors import ModelError, NumericsError, OptionError
from safe_sched.estimators import moves
from safe_sched.estimators.moves import moved, scale_to_gain
from safe_sched.training.flat_alignment import EMA, Flatness, Products, attack_scale, flatten

VECTORS = st.integers(0, 10_000).map(lambda seed: np.random.default_rng(seed).standard_normal((2, 6)))


# lambda -----------------------------------------------------------------------------------------------------------


def products_of(align: np.ndarray, sharp: np.ndarray) -> Products:
    return Products(float(align @ align), float(align @ sharp), float(sharp @ sharp))


def nearest(align: np.ndarray, sharp: np.ndarray, a: float) -> np.ndarray:
    """min over d of 1/2 |d - align|^2 subject to <d, sharp> >= a, by a solver that knows nothing of the closed form."""
    found = minimize(
        lambda d: 0.5 * float((d - align) @ (d - align)),
        np.zeros_like(align),
        jac=lambda d: d - align,
        constraints=[{"type": "ineq", "fun": lambda d: float(d @ sharp) - a, "jac": lambda d: sharp}],
        method="SLSQP",
        options={"ftol": 1e-10, "maxiter": 200},
    )
    assert found.success
    return found.x


@settings(max_examples=60, deadline=None)
@given(VECTORS, st.floats(0, 8))
def test_the_theorem_gives_the_nearest_update_that_flattens_enough(vectors: np.ndarray, xi: float) -> None:
    align, sharp = vectors
    strength, _ = Flatness(xi=xi).strength_of(products_of(align, sharp), None)
    wanted = nearest(align, sharp, xi * float(sharp @ sharp))
    assert np.allclose(align + strength * sharp, wanted, atol=1e-4)


def test_another_lambda_is_not_nearest() -> None:
    """Control: the solver's answer tells a lambda that is a tenth off, and the wrong sign of the product."""
    align, sharp = np.random.default_rng(0).standard_normal((2, 6))
    seen = products_of(align, sharp)
    wanted = nearest(align, sharp, 2.0 * float(sharp @ sharp))
    strength, _ = Flatness(xi=2.0).strength_of(seen, None)
    flipped, _ = Flatness(xi=2.0).strength_of(Products(seen.align_align, -seen.align_sharp, seen.sharp_sharp), None)
    for wrong in (1.1 * strength, flipped):
        assert not np.allclose(align + wrong * sharp, wanted, atol=1e-3)


@given(VECTORS, st.floats(0, 8))
def test_the_update_is_bounded_and_meets_the_constraint(vectors: np.ndarray, xi: float) -> None:
    """<d, g_sharp> >= xi |g_sharp|^2, with equality where lambda > 0; lambda |g_sharp| <= xi |g_sharp| + |g_align|."""
    align, sharp = vectors
    strength, _ = Flatness(xi=xi).strength_of(products_of(align, sharp), None)
    slack = float((align + strength * sharp) @ sharp) - xi * float(sharp @ sharp)
    assert slack > -1e-9
    assert strength == 0 or abs(slack) < 1e-9
    length = float(np.linalg.norm(sharp))
    assert strength * length <= xi * length + float(np.linalg.norm(align)) + 1e-9


@given(VECTORS)
def test_the_cosine_rule_and_its_average_are_the_slow_loop(vectors: np.ndarray) -> None:
    rule, average, slow = Flatness(rule="cosine", eta=0.5), None, None
    for turn in range(5):
        align, sharp = np.roll(vectors[0], turn), vectors[1]
        found, average = rule.strength_of(products_of(align, sharp), average)
        cosine = float(align @ sharp) / float(np.linalg.norm(align) * np.linalg.norm(sharp))
        now = max(0.0, 0.5 - cosine)
        slow = now if slow is None else 0.99 * slow + 0.01 * now
        assert found == pytest.approx(slow, rel=1e-12)
    assert EMA == 0.99


@given(VECTORS)
def test_the_cosine_rule_stays_within_one_of_eta(vectors: np.ndarray) -> None:
    found, _ = Flatness(rule="cosine").strength_of(products_of(*vectors), None)
    assert 4 <= found <= 6


@pytest.mark.parametrize("rule", flatness.RULES)
def test_where_nothing_is_sharp_nothing_is_flattened(rule: str) -> None:
    assert Flatness(rule=rule).strength_of(Products(1.0, 0.0, 0.0), None) == (0.0, None)
    assert Flatness(rule=rule).strength_of(Products(1.0, 0.0, 0.0), 4.5) == (0.0, 4.5)


def test_no_alignment_gradient_is_no_division_by_zero() -> None:
    assert Flatness(rule="cosine").strength_of(Products(0.0, 0.0, 2.0), None)[0] == 5.0
    assert Flatness(xi=0.7).strength_of(Products(0.0, 0.0, 2.0), None)[0] == 0.7


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "cosin"}, "unknown rule of flat alignment 'cosin' .did you mean 'cosine'"),
        ({"rho": 0}, "rho=0.*greater than 0"),
        ({"xi": -1}, "xi=-1"),
        ({"eta": math.inf}, "eta=inf"),
        ({"roh": 0.1}, "unknown option of Flatness 'roh' .did you mean 'rho'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Flatness(**options)


# one step ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, a bias that only the refusals use, and a frozen scale."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.first, self.second = nn.Parameter(draw(5, 7)), nn.Parameter(draw(7, 4))
        self.only_refusals = nn.Parameter(draw(4))
        self.frozen = nn.Parameter(draw(4), requires_grad=False)

    def losses(self) -> dict[str, Callable[[], Tensor]]:
        generator = torch.Generator().manual_seed(4)
        inputs = {
            name: torch.randn(6, 5, generator=generator, dtype=torch.float64).to(self.first.dtype)
            for name in ("align", "harm", "refuse")
        }

        def loss(name: str) -> Callable[[], Tensor]:
            def compute() -> Tensor:
                out = (inputs[name] @ self.first).tanh() @ self.second * self.frozen
                if name == "refuse":
                    out = out + self.only_refusals
                return (out.logsumexp(-1) - out[:, {"align": 0, "harm": 1, "refuse": 2}[name]]).mean()

            return compute

        return {name: loss(name) for name in inputs}


def trainable(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def gradient(net: Net, name: str) -> list[Tensor]:
    found = torch.autograd.grad(net.losses()[name](), trainable(net), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trainable(net), found, strict=True)]


def slow_update(net: Net, options: Flatness, average: float | None = None) -> tuple[list[Tensor], dict[str, float]]:
    """The equations, one after the other, on a copy of the model."""
    align, harm = gradient(net, "align"), gradient(net, "harm")
    length = math.sqrt(sum(float((g * g).sum()) for g in harm))
    attacked = copy.deepcopy(net)
    for p, g in zip(trainable(attacked), harm, strict=True):
        p.data = p.data - options.rho * g / length
    sharp = [a - b for a, b in zip(harm, gradient(attacked, "harm"), strict=True)]
    refuse = gradient(attacked, "refuse")
    dot = sum(float((a * s).sum()) for a, s in zip(align, sharp, strict=True))
    aa, ss = (sum(float((g * g).sum()) for g in gs) for gs in (align, sharp))
    if options.rule == "theorem":
        strength = max(0.0, (options.xi * ss - dot) / ss)
    elif options.rule == "cosine":
        now = max(0.0, options.eta - dot / math.sqrt(aa * ss))
        strength = now if average is None else 0.99 * average + 0.01 * now
    else:
        strength = options.strength
    update = [a + strength * s + options.lambda_refusal * r for a, s, r in zip(align, sharp, refuse, strict=True)]
    with torch.no_grad():
        before, after = float(net.losses()["harm"]()), float(attacked.losses()["harm"]())
        refused = float(attacked.losses()["refuse"]())
    return update, {"strength": strength, "sharpness": before - after, "harmful_loss": before, "refusal_loss": refused}


def aligned(net: Net) -> dict[str, Callable[[], Tensor]]:
    net.zero_grad(set_to_none=True)
    losses = net.losses()
    losses["align"]().backward()
    return losses


def distance(net: nn.Module, wanted: list[Tensor]) -> float:
    off = [
        (p.grad if p.grad is not None else torch.zeros_like(p)) - w for p, w in zip(trainable(net), wanted, strict=True)
    ]
    return math.sqrt(sum(float(g.square().sum()) for g in off) / sum(float(w.square().sum()) for w in wanted))


OPTIONS = {
    "theorem": Flatness(xi=5.0),
    "theorem, large": Flatness(xi=100.0, rho=0.5),
    "cosine": Flatness(rule="cosine"),
    "constant": Flatness(rule="constant"),
    "Booster": Flatness(rule="constant", lambda_refusal=0.0),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_update_is_that_of_the_equations(name: str) -> None:
    net, options = Net(), OPTIONS[name]
    wanted, about = slow_update(net, options, average=4.2)
    losses = aligned(net)
    seen = flatten(trainable(net), losses["harm"], losses["refuse"], options, average=4.2)
    assert distance(net, wanted) < 1e-12
    assert seen.strength > 0.1
    assert seen.strength == pytest.approx(about["strength"], rel=1e-9)
    assert seen.sharpness == pytest.approx(about["sharpness"], rel=1e-9)
    assert seen.harmful_loss == pytest.approx(about["harmful_loss"])
    assert seen.refusal_loss == (pytest.approx(about["refusal_loss"]) if options.lambda_refusal else None)


def test_the_sharpness_gradient_is_that_of_finite_differences() -> None:
    """With phi held at the same distance, lambda g_sharp is the derivative of L_harm(theta) - L_harm(theta + d)."""
    net, options = Net(), Flatness(rule="constant", strength=1.0, lambda_refusal=0.0)
    harm = gradient(net, "harm")
    length = math.sqrt(sum(float((g * g).sum()) for g in harm))
    net.zero_grad(set_to_none=True)
    flatten(trainable(net), net.losses()["harm"], None, options)

    def sharpness(parameter: nn.Parameter, where: tuple[int, int], by: float) -> float:
        loss = net.losses()["harm"]
        parameter.data[where] += by
        with torch.no_grad():
            before = float(loss())
            with moved(list(zip(trainable(net), harm, strict=True)), -options.rho / length):
                after = float(loss())
        parameter.data[where] -= by
        return before - after

    for parameter in (net.first, net.second):
        for where in ((0, 1), (3, 2), (4, 0)):
            numeric = (sharpness(parameter, where, 1e-5) - sharpness(parameter, where, -1e-5)) / 2e-5
            assert parameter.grad is not None
            assert float(parameter.grad[where]) == pytest.approx(numeric, abs=1e-7)


@pytest.mark.parametrize("broken", ["sign", "not moved", "not restored"])
def test_a_wrong_step_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the sign of g_sharp, a phi that is theta, and a move that stays all miss the slow update by far."""
    net = Net()
    wanted, _ = slow_update(net, OPTIONS["theorem"])
    before = [p.detach().clone() for p in net.parameters()]
    if broken == "sign":
        combine = flatness._combine
        monkeypatch.setattr(flatness, "_combine", lambda p, a, strength: combine(p, a, -strength))
    elif broken == "not moved":
        monkeypatch.setattr(flatness, "attack_scale", lambda parts, rho: -1e-12)
    else:
        monkeypatch.setattr(flatness, "moved", stays)
    losses = aligned(net)
    flatten(trainable(net), losses["harm"], losses["refuse"], OPTIONS["theorem"])
    if broken == "not restored":
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    else:
        assert distance(net, wanted) > 1e-2


class stays:
    """`moved`, but for giving the parameters back."""

    def __init__(self, parts: Any, scale: float) -> None:
        moves._move(parts, scale)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ["raises", "is not finite"])
def test_parameters_come_back_when_a_pass_fails(at: int, kind: str) -> None:
    """The first, the second harmful pass and the refusals; as the same storage, and gradients of the trainer too."""
    net, calls = Net(), 0
    losses = aligned(net)
    before = [(p.data_ptr(), p.detach().clone()) for p in net.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in trainable(net)]

    def failing(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == at and kind == "raises":
                raise KeyboardInterrupt
            return loss() * (math.nan if calls == at else 1.0)

        return compute

    with pytest.raises(KeyboardInterrupt if kind == "raises" else NumericsError):
        flatten(trainable(net), failing(losses["harm"]), failing(losses["refuse"]), Flatness())
    assert all(
        p.data_ptr() == place and torch.equal(p, was) for p, (place, was) in zip(net.parameters(), before, strict=True)
    )
    if at < 3:  # before they are combined, they are the trainer's own
        assert all(g is None or torch.equal(p.grad, g) for p, g in zip(trainable(net), gradients, strict=True))


def test_nothing_is_added_where_both_weights_are_zero() -> None:
    """Bit for bit, and a gradient that was None stays None: the optimiser must not see a zero there."""
    net = Net()
    losses = aligned(net)
    before = [None if p.grad is None else p.grad.clone() for p in trainable(net)]
    options = Flatness(rule="constant", strength=0.0, lambda_refusal=0.0)
    seen = flatten(trainable(net), losses["harm"], losses["refuse"], options)
    assert seen.sharpness > 0
    assert net.only_refusals.grad is None
    assert all((g is None) == (p.grad is None) for p, g in zip(trainable(net), before, strict=True))
    assert all(g is None or torch.equal(p.grad, g) for p, g in zip(trainable(net), before, strict=True))


def test_a_harmful_loss_without_slope_leaves_the_update_alone() -> None:
    """g_harm = 0: phi is theta, g_sharp is 0, lambda is 0; refusals are taught at theta."""
    net = Net()
    wanted = [a + 0.05 * r for a, r in zip(gradient(net, "align"), gradient(net, "refuse"), strict=True)]
    losses = aligned(net)
    seen = flatten(trainable(net), lambda: (losses["harm"]() * 0.0) + 1.0, losses["refuse"], Flatness())
    assert (seen.strength, seen.sharpness) == (0.0, 0.0)
    assert distance(net, wanted) < 1e-12


def test_what_is_not_finite_or_not_reached_stops() -> None:
    net = Net()
    losses = aligned(net)
    net.first.grad = torch.full_like(net.first, math.inf)
    with pytest.raises(NumericsError, match="the alignment gradient is inf. Lower the learning rate"):
        flatten(trainable(net), losses["harm"], None, Flatness())
    losses = aligned(net)
    with pytest.raises(NumericsError, match="gradient of the harmful loss is nan"):
        # sqrt(0) has a finite value and no finite slope
        flatten(trainable(net), lambda: (losses["harm"]() * 0).sqrt(), None, Flatness())
    with pytest.raises(ModelError, match="no gradient in any trainable parameter"):
        flatten([net.only_refusals], losses["harm"], None, Flatness())


# moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moved_parameters_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(9, 5, generator=generator).to(dtype)) for _ in range(3)]
    directions = [torch.randn(9, 5, generator=generator).to(dtype) for _ in range(3)]
    before = [(p.data_ptr(), p.detach().clone()) for p in parameters]

    def fails_while_moved() -> None:
        with moved(list(zip(parameters, directions, strict=True)), 0.3):
            assert all(not torch.equal(p, was) for p, (_, was) in zip(parameters, before, strict=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails_while_moved()
    assert all(
        p.data_ptr() == place and torch.equal(p, was) for p, (place, was) in zip(parameters, before, strict=True)
    )


@pytest.mark.parametrize("size", [0.02, 0.3, 2.0])
def test_an_attack_on_coarse_floats_goes_as_far_as_it_should(size: float) -> None:
    """<phi - theta, -g / |g|> is rho to a quarter, where a plain move in bfloat16 falls short of it at size 2."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter((torch.randn(80, 80, generator=generator) * size).bfloat16())
    g = torch.randn(80, 80, generator=generator).bfloat16()
    length = float(g.double().norm())

    def gone(scale: float) -> float:
        with moved([(p, g)], scale):
            after = p.detach().double()
        return -float(((after - p.detach().double()) * g.double()).sum()) / length

    assert 0.8 * 0.1 <= gone(attack_scale([(p, g)], 0.1)) <= 1.25 * 0.1
    if size == 2.0:
        assert gone(-0.1 / length) < 0.8 * 0.1  # control


def test_an_attack_that_cannot_be_made_is_an_error() -> None:
    p, g = nn.Parameter(torch.full((4, 4), 1e4).bfloat16()), torch.eye(4).bfloat16()
    with pytest.raises(ModelError, match="rho=1e-06 comes out as .*stored too coarsely"):
        attack_scale([(p, g)], 1e-6)
    scale, gained = scale_to_gain([(p, g)], -1e-6, -1e-6)
    assert scale < -1e-6
    assert not 0.8e-6 <= -gained <= 1.25e-6
