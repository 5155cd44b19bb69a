"""Flat alignment: what a harmful fine-tuning step would gain is made small before anybody takes it.

The alignment stage of Antibody (arXiv 2603.00498). An aligned model falls fast where the loss of harmful rows is steep:
one step of an attack goes to ``phi``, and what it gains is the sharpness::

    phi            = theta - rho * g / |g|,      g = grad L_harm(theta)
    L_sharp(theta) = L_harm(theta) - L_harm(phi)
    g_sharp        = grad L_harm(theta) - grad L_harm(phi)        (phi is taken as theta plus a constant)

Of all updates that lower the sharpness by at least ``a`` per unit of learning rate, the one nearest to the alignment
gradient is wanted (Theorem 4.1)::

    min over d of  1/2 |d - g_align|**2   subject to  <d, g_sharp> >= a
    d* = g_align + lambda * g_sharp,      lambda = max(0, (a - <g_align, g_sharp>) / |g_sharp|**2)

and refusals of the same prompts are taught at the attacked point, with a small weight of their own::

    update = d* + lambda_refusal * grad L_refusal(phi)

Three rules for lambda:

============  =================================================================  ===================================
``theorem``   ``max(0, xi - <g_align, g_sharp> / |g_sharp|**2)``                 the theorem; less where alignment
                                                                                 flattens already
``cosine``    ``max(0, eta - cos(g_align, g_sharp))``, moving average of .99     the authors' code; within 1 of eta
``constant``  ``strength``                                                       Booster, where lambda_refusal is 0
============  =================================================================  ===================================

The theorem's rule takes ``a = xi |g_sharp|**2``.

Cost per optimiser step: 3 F + 3 B beside the trainer's own (2 F + 2 B without refusals), and memory for two copies of
the trainable parameters, the attacked ones and one gradient.

Limits: ``rho`` is a length in the space of *trainable* parameters, so one value means different things for LoRA and
for full fine-tuning. Where it is so long that ``L_harm(phi) > L_harm(theta)``, a negative sharpness in the record, the
attack has overshot and flattening does harm: the demo's model lost most of its refusals at rho = .5 with lambda at 5. A
harmful row is a harmful prompt with a compliant answer; an inert placeholder is enough.

Everything here is plain torch; an integration runs the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from safe_sched.errors import ModelError, NumericsError, unknown_name
from safe_sched.estimators.moves import Parts, moved, scale_to_gain
from safe_sched.scheduler import options

RULES = ("theorem", "cosine", "constant")
EMA = 0.99
"""Weight of the past in the moving average of the rule ``cosine``."""

_CHUNK = 1 << 20  # elements that are summed in float64 at a time


# how much flatness ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Products:
    """Inner products of the alignment gradient and the sharpness gradient over all trainable parameters."""

    align_align: float
    align_sharp: float
    sharp_sharp: float

    @property
    def cosine(self) -> float:
        """Of the angle between the two; 0 where one of them is 0."""
        lengths = math.sqrt(self.align_align) * math.sqrt(self.sharp_sharp)
        return self.align_sharp / lengths if lengths > 0 else 0.0


@options
class Flatness:
    """The options of flat alignment, and its rule for lambda.

    Args:
        rho: Length of the attack's step, > 0, in the space of the trainable parameters.
        rule: ``"theorem"``, ``"cosine"`` or ``"constant"``.
        xi: Of ``theorem``, >= 0: an update lowers the sharpness at least as fast as ``xi * g_sharp`` alone would. In 60
            steps on the demo's model (one seed) the sharpness went from .93 without to .66 at 1, .64 at 5 and .62 at
            20: more than 1 buys little.
        eta: Of ``cosine``, >= 0.
        strength: Of ``constant``, >= 0: lambda itself.
        lambda_refusal: Weight of the refusals at the attacked point, >= 0; 0 leaves them, and their pass, out.

    Raises:
        OptionError: An option is unknown or out of range.

    Example:
        The update may keep what alignment does for flatness anyway, so lambda falls below ``xi``.

        >>> rule = Flatness(xi=1.0)
        >>> rule.strength_of(Products(1.0, 0.5, 1.0), average=None)
        (0.5, None)
        >>> rule.strength_of(Products(1.0, 2.0, 1.0), average=None)
        (0.0, None)
    """

    rho: Annotated[float, Field(gt=0)] = 0.1
    rule: str = "theorem"
    xi: Annotated[float, Field(ge=0)] = 1.0
    eta: Annotated[float, Field(ge=0)] = 5.0
    strength: Annotated[float, Field(ge=0)] = 5.0
    lambda_refusal: Annotated[float, Field(ge=0)] = 0.05

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown_name("rule of flat alignment", self.rule, RULES)

    def strength_of(self, products: Products, average: float | None) -> tuple[float, float | None]:
        """Lambda of one optimiser step.

        Args:
            products: Of its gradients.
            average: The moving average so far; None before the first step.

        Returns:
            lambda, >= 0, and the new moving average, which only the rule ``cosine`` keeps. A ``g_sharp`` of 0 has
            lambda 0 and leaves the average as it was: there is nothing to flatten.
        """
        if products.sharp_sharp == 0:
            return 0.0, average
        if self.rule == "constant":
            return self.strength, average
        if self.rule == "theorem":
            return max(0.0, self.xi - products.align_sharp / products.sharp_sharp), average
        now = max(0.0, self.eta - products.cosine)
        average = now if average is None else EMA * average + (1 - EMA) * now
        return average, average


# one optimiser step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flattened:
    """What was seen on the way; losses in nats per token."""

    harmful_loss: float
    """L_harm(theta)"""
    sharpness: float
    """L_harm(theta) - L_harm(phi)"""
    strength: float
    """lambda, >= 0"""
    refusal_loss: float | None
    """L_refusal(phi); None where refusals are left out"""
    average: float | None
    """to be given to the next step"""


def flatten(
    parameters: Sequence[nn.Parameter],
    harmful_loss: Callable[[], Tensor],
    refusal_loss: Callable[[], Tensor] | None,
    settings: Flatness,
    average: float | None = None,
) -> Flattened:
    """Add ``lambda * g_sharp + lambda_refusal * grad L_refusal(phi)`` to gradients that hold ``g_align``.

    Parameters are as before when it returns or raises, bit for bit, and where lambda and ``lambda_refusal`` are 0 so
    are the gradients.

    Args:
        parameters: The trainable parameters, each once, with ``g_align`` in ``grad``.
        harmful_loss: Computes ``L_harm``, a scalar with gradient, with the parameters as they are when it is called.
            Called twice; random numbers such as dropout's must be the same in both calls.
        refusal_loss: The same for ``L_refusal``, called once; None leaves refusals out.
        settings: rho and the rule.
        average: What the last step returned as `Flattened.average`; None at the first.

    Raises:
        NumericsError: A loss or gradient is not finite.
        ModelError: The harmful rows reach no trainable parameter, or the parameters' floats are too coarse for rho.

    Example:
        ``L_harm = x**2 / 2`` at x = 1 has the gradient 1, and .9 after a step of rho = .1, so g_sharp is .1. Alignment
        pulls with -1; ``<d, g_sharp> >= xi |g_sharp|**2`` asks for d >= .1.

        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor(1.0))
        >>> x.grad = torch.tensor(-1.0)
        >>> seen = flatten([x], lambda: x.square() / 2, None, Flatness(rho=0.1, xi=1.0))
        >>> round(x.grad.item(), 4), round(seen.strength, 4), round(seen.sharpness, 4), x.item()
        (0.1, 11.0, 0.095, 1.0)
    """
    align = [p.grad for p in parameters]
    combined = False
    try:
        for p in parameters:
            p.grad = None
        at_theta = at_phi = _backward(harmful_loss, "harmful loss")
        parts = [(p, p.grad) for p in parameters if p.grad is not None]
        if not parts:
            raise ModelError(
                "the loss of the harmful rows has no gradient in any trainable parameter, so there is nothing to "
                "flatten. Unfreeze parameters that the model answers with."
            )
        scale = attack_scale(parts, settings.rho)
        with moved(parts, scale) if scale else contextlib.nullcontext():
            products = Products(0.0, 0.0, 0.0)
            if scale:
                # with -g_harm(theta) in grad, this backward leaves -g_sharp there: no third gradient in memory
                torch._foreach_neg_([g for _, g in parts])
                at_phi = _backward(harmful_loss, "harmful loss after the attack's step")
                products = _products(align, [p.grad for p in parameters])
            del parts
            strength, average = settings.strength_of(products, average)
            _combine(parameters, align, strength)
            combined, refused = True, None
            if refusal_loss is not None and settings.lambda_refusal:
                refused = _backward(refusal_loss, "refusal loss after the attack's step", settings.lambda_refusal)
    except BaseException:
        if not combined:
            for p, gradient in zip(parameters, align, strict=True):
                p.grad = gradient
        raise
    return Flattened(at_theta, at_theta - at_phi, strength, refused, average)


def _combine(parameters: Sequence[nn.Parameter], align: Sequence[Tensor | None], strength: float) -> None:
    """Put ``g_align + strength * g_sharp`` into gradients that hold ``-g_sharp``."""
    for p, aligned in zip(parameters, align, strict=True):
        minus_sharp, p.grad = p.grad, aligned
        if strength and minus_sharp is not None:
            p.grad = minus_sharp.mul_(-strength) if aligned is None else aligned.sub_(minus_sharp, alpha=strength)


def attack_scale(parts: Parts, rho: float) -> float:
    """How far along the harmful gradient the attack's step goes: ``-rho / |g|``.

    Args:
        parts: The parameters with their gradients ``g``.
        rho: Length of the step.

    Returns:
        A number < 0; 0 where the gradient is 0. For 16-bit parameters, which swallow small changes, it may be larger
        in size, such that ``<phi - theta, -g / |g|>`` is about rho.

    Raises:
        NumericsError: The gradient is not finite.
        ModelError: The parameters' floats are too coarse for a step of that length.
    """
    square = _inner([(g, g) for _, g in parts])
    if not math.isfinite(square):
        raise _not_finite("gradient of the harmful loss", square)
    length = math.sqrt(square)
    if length == 0:
        return 0.0
    scale = -rho / length
    if all(p.element_size() >= 4 for p, _ in parts):
        return scale
    scale, gained = scale_to_gain(parts, -rho * length, scale)
    if not 0.8 * rho <= -gained / length <= 1.25 * rho:
        raise ModelError(
            f"the attack's step of rho={rho} comes out as {-gained / length:.2g}: the parameters are stored too "
            "coarsely for it. Load the model in float32 (train with bf16=True), use LoRA with float32 adapters, or "
            "raise rho."
        )
    return scale


def _products(align: Sequence[Tensor | None], minus_sharp: Sequence[Tensor | None]) -> Products:
    both = [(a, s) for a, s in zip(align, minus_sharp, strict=True) if a is not None and s is not None]
    found = Products(
        _inner([(a, a) for a in align if a is not None]),
        -_inner(both),
        _inner([(s, s) for s in minus_sharp if s is not None]),
    )
    for what, value in (("alignment", found.align_align), ("sharpness", found.sharp_sharp)):
        if not math.isfinite(value):
            raise _not_finite(f"{what} gradient", value)
    return found


def _inner(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Sum of the products of all elements, in float64 whatever they are stored in."""
    total = 0.0
    for a, b in pairs:
        # in pieces: a float64 copy of a whole embedding would be larger than both gradients
        pieces = zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True)
        total += float(sum((x.double() * y.double()).sum() for x, y in pieces))
    return total


def _backward(loss_of: Callable[[], Tensor], what: str, factor: float = 1.0) -> float:
    loss = loss_of()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _not_finite(what, value)
    (loss if factor == 1 else factor * loss).backward()
    return value


def _not_finite(what: str, value: float) -> NumericsError:
    return NumericsError(
        f"the {what} is {value}. Lower the learning rate, rho or the strength of the rule, or train in bfloat16 or "
        "float32 instead of float16."
    )
