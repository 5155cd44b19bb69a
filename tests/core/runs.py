"""Rows and steps without a trainer, for tests of schedulers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from safe_sched.index import RowIndex
from safe_sched.types import Evidential, Observation, Scheduler, State

DISTINCT = [40, 10, 30, 20, 60, 50]
DUPLICATED = [40, 10, 40, 20, 10, 40, 50]

over_duplicates = pytest.mark.parametrize("keys", [DISTINCT, DUPLICATED], ids=["distinct", "duplicated"])


def observe(index: RowIndex, keys: Sequence[int], step: int, generator: torch.Generator) -> Observation:
    slots = index.lookup(torch.tensor(keys))
    assert (slots >= 0).all()
    nll = 3 * torch.rand(len(keys), generator=generator)
    tokens = torch.randint(1, 9, (len(keys),), generator=generator)
    return Observation(slots, nll, tokens, step, safety_loss=float(torch.rand((), generator=generator)))


def steps_of(index: RowIndex, keys: Sequence[int], count: int, size: int = 3, seed: int = 0) -> list[Observation]:
    """Steps on random rows, the same row sometimes twice in one step."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(keys), (count, size), generator=generator).tolist()
    return [observe(index, [keys[i] for i in pick], step, generator) for step, pick in enumerate(picks)]


def advance(scheduler: Scheduler, state: State, step: Observation) -> dict[str, float]:
    """One step as an integration does it: scores, here from the losses, then the update."""
    learned: dict[str, float] = {}
    if isinstance(scheduler, Evidential) and scheduler.evidence == "probe":
        assert step.nll is not None
        learned = scheduler.learn(state, step.slots, step.nll / 3)
    return learned | scheduler.update(state, step)


def run(scheduler: Scheduler, index: RowIndex, steps: list[Observation]) -> State:
    state = scheduler.init(index)
    for step in steps:
        advance(scheduler, state, step)
    return state


def same(a: State, b: State) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
