"""Langevin noise on the parameters of the model: an optimiser's run becomes a chain of SGLD samples.

The trainer's loss is a mean over rows, so the energy of the posterior over the model is N times that loss. An
optimiser that moves a parameter by ``-lr G grad`` (G is 1 for SGD, ``1 / (sqrt(v) + eps)`` for Adam) so takes steps of
``lr G / N`` along the energy, to which preconditioned SGLD (Li et al., 2016) adds::

    theta  <-  theta + sqrt(2 (lr G / N) T) xi,      xi ~ N(0, 1)

Cost: one pass over the trainable parameters. The numbers are a function of (seed, step, parameter), so a resume draws
them again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from safe_sched.rows.keys import mix64
from safe_sched.training.loop import Part


class ParameterNoise(Part):
    """Langevin noise on the parameters after every optimiser step.

    Args:
        temperature: T, > 0; 1 makes the run a chain of samples of the posterior over the model.
    """

    name = "parameter_noise"

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.unsharded = f"model_temperature={temperature}"

    def settings(self) -> dict[str, Any]:
        """See `Part.settings`."""
        return {"name": self.name, "temperature": self.temperature}

    def after_optimizer(self) -> None:
        """See `Part.after_optimizer`."""
        rows = self.run.session.index.rows
        add_noise(self.run.optimizer, self.temperature, rows, seed=self.run.seed, step=self.run.step)


@torch.no_grad()
def add_noise(optimizer: Any, temperature: float, rows: int, *, seed: int, step: int) -> None:
    """Add the noise of one optimiser step, in place.

    Args:
        optimizer: A torch optimiser, or accelerate's wrapper of one.
        temperature: T, > 0.
        rows: N, the rows of the training set.
        seed: Of the run.
        step: Optimiser steps done.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    number = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number += 1
            if parameter.grad is None:
                continue
            word = mix64(mix64(torch.tensor(seed)) + (step << 24) + number)
            generator = torch.Generator(parameter.device).manual_seed(int(word) & 0x7FFF_FFFF_FFFF_FFFF)
            xi = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
            scale = 2 * group["lr"] * temperature / max(rows, 1)
            xi.mul_(_root_of_preconditioner(optimizer.state.get(parameter, {}), group)).mul_(math.sqrt(scale))
            parameter.add_(xi.to(parameter.dtype))


def _root_of_preconditioner(state: dict[str, Any], group: dict[str, Any]) -> Tensor | float:
    """sqrt(G), from what Adam keeps of a parameter; 1 for an optimiser that keeps nothing."""
    square = state.get("exp_avg_sq")
    if square is None:
        return 1.0
    beta = group["betas"][1]
    corrected = square.float() / (1 - beta ** float(state["step"]))
    return (corrected.sqrt() + group["eps"]).rsqrt()
