"""Sampling a posterior by preconditioned stochastic gradient Langevin dynamics (SGLD; Welling and Teh, 2011).

For an energy ``U(z) = -log p(z)`` up to a constant, a fixed positive preconditioner G and a temperature T::

    z  <-  z - eps G dU/dz + sqrt(2 eps G T) xi,     xi ~ N(0, 1),     eps = step_size

For small steps the draws after ``burn_in`` have the density ``exp(-U / T)``; T = 0 is gradient descent to its
maximum. Every number ``xi`` is a function of (seed, coordinate, visit, draw, chain) and of nothing else, so chains do
not depend on the order in which coordinates are visited, nor on how they are spread over processes.

Cost: ``burn_in + draws`` gradients of the coordinates given, all chains at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_sched.rows.keys import mix64

Energy = Callable[[Tensor], Tensor]
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 / golden ratio, as splitmix64 counts


@dataclass(frozen=True)
class Langevin:
    """How to sample.

    Attributes:
        temperature: T; 1 samples the posterior, 0 finds its mode.
        step_size: eps, >= 0, in units of the preconditioner.
        burn_in: Draws thrown away at the start.
        draws: Draws kept, of every chain.
        chains: Independent chains.
    """

    temperature: float = 1.0
    step_size: float = 0.25
    burn_in: int = 16
    draws: int = 32
    chains: int = 8


def normal(seed: int, coordinates: Tensor, visits: Tensor, draws: int, chains: int) -> Tensor:
    """Standard normal numbers, each a function of (seed, coordinate, visit, draw, chain) alone.

    Args:
        seed: Of the run.
        coordinates: int64 (n,).
        visits: int64 (n,), how often each coordinate was visited before.
        draws: How many draws.
        chains: How many numbers per draw and coordinate.

    Returns:
        float32 (draws, n, chains).

    Example:
        >>> import torch
        >>> rows, visits = torch.tensor([7, 3]), torch.tensor([0, 0])
        >>> one = normal(1, rows, visits, 5, 2)
        >>> bool((one.flip(1) == normal(1, rows.flip(0), visits, 5, 2)).all())
        True
    """
    word = mix64(coordinates + mix64(torch.tensor(seed) + _STRIDE))
    word = mix64(word + _STRIDE * (visits + 1))
    # a draw keeps its numbers when more draws or chains are asked for
    draw = mix64(torch.arange(1, draws + 1))[:, None, None]
    chain = torch.arange(1, chains + 1)
    word = mix64(mix64(word[:, None] + draw) + _STRIDE * chain)
    # Box and Muller on the two halves; + 0.5 keeps the logarithm finite
    high, low = (word >> 32) & 0xFFFFFFFF, word & 0xFFFFFFFF
    radius = torch.sqrt(-2 * torch.log((high.float() + 0.5) / 2**32))
    return radius * torch.cos(low.float() * (2 * math.pi / 2**32))


def step(
    z: Tensor, gradient: Tensor, precondition: Tensor | float, size: float, temperature: float, xi: Tensor
) -> Tensor:
    """One step of the equation above; all arguments broadcast against ``z``."""
    scaled = size * torch.as_tensor(precondition)
    return z - scaled * gradient + torch.sqrt(2 * temperature * scaled) * xi


def sample(
    gradient: Energy,
    start: Tensor,
    coordinates: Tensor,
    visits: Tensor,
    settings: Langevin,
    *,
    seed: int = 0,
    precondition: Tensor | float = 1.0,
) -> Tensor:
    """Draws of all chains.

    Args:
        gradient: dU/dz, from (n, chains) to (n, chains).
        start: float32 (n,), where every chain starts.
        coordinates: int64 (n,), the numbers of the coordinates, for the noise.
        visits: int64 (n,), how often each was sampled before.
        settings: Schedule, temperature and lengths.
        seed: Of the noise.
        precondition: G, broadcast against (n, chains), > 0, the same for a whole visit.

    Returns:
        float32 (draws, n, chains).

    Example:
        A Gaussian with standard deviation 2.

        >>> import torch
        >>> many = Langevin(draws=400, chains=64, burn_in=100)
        >>> one = torch.zeros(1, dtype=torch.long)
        >>> draws = sample(lambda z: z / 4, torch.zeros(1), one, one, many, precondition=4.0)
        >>> abs(float(draws.std()) - 2) < 0.2
        True
    """
    z = start[:, None].expand(-1, settings.chains).clone()
    kept = []
    steps = settings.burn_in + settings.draws
    # `step`, with all that does not depend on z done at once for all steps
    scaled = settings.step_size * torch.as_tensor(precondition)
    noise = torch.zeros(steps)
    if settings.temperature:
        noise = normal(seed, coordinates, visits, steps, settings.chains)
        noise = noise.mul_(torch.sqrt(2 * settings.temperature * scaled))
    for k, kick in enumerate(noise.unbind()):
        z = torch.addcmul(z + kick, scaled, gradient(z), value=-1)
        if k >= settings.burn_in:
            kept.append(z)
    return torch.stack(kept)


# what the draws say of themselves ---------------------------------------------------------------------------------


def rhat(draws: Tensor) -> Tensor:
    """Split R-hat (Gelman et al., 2013): near 1 where the halves of all chains agree, above 1.05 where they do not.

    Args:
        draws: (draws, n, chains), at least 4 draws.

    Returns:
        float64 (n,); 1 where nothing varies.
    """
    within, between, length = _variances(draws)
    total = (length - 1) / length * within + between
    return torch.where(within > 0, torch.sqrt(total / within.clamp(min=1e-300)), torch.ones_like(within))


def effective_draws(draws: Tensor) -> Tensor:
    """How many independent draws the chains are worth, from the spread of their halves' means: (n,), at most all.

    The estimate ``draws * var / (length * var of the means)`` is rough with few chains; it is meant for averages over
    rows.

    Args:
        draws: (draws, n, chains), at least 4 draws.
    """
    within, between, length = _variances(draws)
    total = (length - 1) / length * within + between
    count = float(draws.shape[0] // 2 * 2 * draws.shape[2])
    estimate = count * total / (length * between).clamp(min=1e-300)
    return torch.where(total > 0, estimate.clamp(max=count), torch.full_like(total, count))


def _variances(draws: Tensor) -> tuple[Tensor, Tensor, int]:
    """Within and between the half chains: the mean variance of a half, and the variance of their means."""
    length = draws.shape[0] // 2
    halves = torch.cat([draws[:length], draws[length : 2 * length]], dim=2).double()
    means = halves.mean(0)
    return (halves - means).square().sum(0).mean(1) / (length - 1), means.var(1), length


def acceptance(
    energy: Energy,
    gradient: Energy,
    z: Tensor,
    xi: Tensor,
    settings: Langevin,
    precondition: Tensor | float = 1.0,
) -> Tensor:
    """How often a Metropolis test would accept a step: near 1 where the step is small enough for the draws to be exact.

    Args:
        energy: U, from (n, chains) to (n, chains).
        gradient: dU/dz.
        z: (n, chains), draws to step from.
        xi: (n, chains), standard normal.
        settings: For the first step size and the temperature, which must not be 0.
        precondition: G.

    Returns:
        (n, chains), probabilities.
    """
    size, heat = settings.step_size, settings.temperature
    spread = 2 * heat * size * torch.as_tensor(precondition)
    there = step(z, gradient(z), precondition, size, heat, xi)
    back = there - size * precondition * gradient(there)
    log_ratio = (energy(z) - energy(there)) / heat + xi.square() / 2 - (z - back).square() / (2 * spread)
    return log_ratio.clamp(max=0).exp()
