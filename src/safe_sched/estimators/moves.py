"""Moving the parameters of a model for a while, and back bit for bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

Parts = Sequence[tuple[nn.Parameter, Tensor]]


@contextlib.contextmanager
def moved(parts: Parts, scale: float) -> Iterator[None]:
    """Have parameters at ``p + scale * g`` for a while. They come back as the very same storage, so bit for bit.

    Args:
        parts: Parameters, each with the direction in which it goes, of its shape and dtype. A parameter may be listed
            once only.
        scale: How far.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> with moved([(p, torch.tensor([1.0, 0.0]))], scale=-0.5):
        ...     p.tolist()
        [0.5, 2.0]
        >>> p.tolist()
        [1.0, 2.0]
    """
    before = [(p, p.data) for p, _ in parts]
    try:
        _move(parts, scale)
        del parts  # whoever is done with the directions while parameters are moved may have their memory
        yield
    finally:
        for p, data in before:
            p.data = data


def _move(parts: Parts, scale: float) -> None:
    for p, g in parts:
        p.data = torch.add(p.data, g, alpha=scale)


def scale_to_gain(parts: Parts, gain: float, scale: float) -> tuple[float, float]:
    """How far to go along ``g`` so that the floats that parameters are stored in gain ``<move, g> = gain``.

    16-bit parameters swallow small changes: go further until those that remain add up to the gain.

    Args:
        parts: Parameters and directions.
        gain: Wanted, of the sign of ``scale``.
        scale: Where to start: the scale that would do in exact arithmetic.

    Returns:
        The scale, and what it gains; where that is not within 0.8 and 1.25 of ``gain``, no scale was found.
    """
    sign, wanted, gained = math.copysign(1.0, gain), abs(gain), 0.0
    for _ in range(12):
        gained = sign * _gained(parts, scale)
        if 0.8 * wanted <= gained <= 1.25 * wanted:
            break
        scale *= min(max(wanted / max(gained, 1e-30), 0.25), 4.0)
    return scale, sign * gained


def _gained(parts: Parts, scale: float) -> float:
    total = 0.0
    for p, g in parts:
        change = torch.add(p.detach(), g, alpha=scale).sub_(p.detach())
        total += (
            float((change.double() * g.double()).sum())
            if change.numel() < 1 << 20
            else float((change.float() * g).sum())
        )
    return total
