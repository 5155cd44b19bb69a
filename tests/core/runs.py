"""Rows and steps without a trainer, for tests of schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, Scheduler, State

DISTINCT = [40, 10, 30, 20, 60, 50]
DUPLICATED = [40, 10, 40, 20, 10, 40, 50]

over_duplicates = pytest.mark.parametrize("keys", [DISTINCT, DUPLICATED], ids=["distinct", "duplicated"])


def observe(index: RowIndex, keys: Sequence[int], step: int, generator: torch.Generator) -> Observation:
    slots = index.lookup(torch.tensor(keys))
    assert (slots >= 0).all()
    nll = 3 * torch.rand(len(keys), generator=generator)
    tokens = torch.randint(1, 9, (len(keys),), generator=generator)
    return Observation(slots, tokens, step, {"nll": nll}, (slots, tokens))


def steps_of(index: RowIndex, keys: Sequence[int], count: int, size: int = 3, seed: int = 0) -> list[Observation]:
    """Steps on random rows, the same row sometimes twice in one step."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(keys), (count, size), generator=generator).tolist()
    return [observe(index, [keys[i] for i in pick], step, generator) for step, pick in enumerate(picks)]


def ratios_of(slots: torch.Tensor, step: int) -> torch.Tensor:
    """What a model might say of some rows: a row's ratio is the same wherever it lies, and another one later."""
    return 4 * torch.sin(2.0 * slots + 0.1 * step + 1)


def needs_of(scheduler: Scheduler[Any]) -> set[str]:
    return {need.name for need in scheduler.needs}


def prepare(scheduler: Scheduler[Any], state: Any, *batches: Observation) -> None:
    """What an integration does before it asks for weights: it says which rows are due, then takes their ratios."""
    if "refusal_odds" in needs_of(scheduler):
        due = [scheduler.due(state, "refusal_odds", batch.slots) for batch in batches]
        for batch, rows in zip(batches, due, strict=True):
            scheduler.learn(state, "refusal_odds", batch.slots[rows], ratios_of(batch.slots[rows], batch.step))


def advance(scheduler: Scheduler[Any], state: Any, step: Observation) -> dict[str, float]:
    """One step as an integration does it: scores, here from the losses, then the update."""
    prepare(scheduler, state, step)
    learned: dict[str, float] = {}
    if "probe" in needs_of(scheduler):
        learned = scheduler.learn(state, "probe", step.slots, step["nll"] / 3)
    return learned | scheduler.update(state, step)


def run(scheduler: Scheduler[Any], index: RowIndex, steps: list[Observation]) -> Any:
    state = scheduler.init(index)
    for step in steps:
        advance(scheduler, state, step)
    return state


def same(a: State, b: State) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, where nan, which stands for "not known", is itself."""
    unknown = torch.isnan(a)
    return a.dtype == b.dtype and torch.equal(unknown, torch.isnan(b)) and torch.equal(a[~unknown], b[~unknown])
