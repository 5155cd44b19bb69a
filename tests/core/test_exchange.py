"""Sessions on several ranks, here threads, are one session on all of their rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.errors import CoverageError, DataError
from safe_sched.rows.index import RowIndex
from safe_sched.schedulers import BDS, BDSReleased, Fixed, NeuralBDS
from safe_sched.testing import InProcess, on_ranks
from safe_sched.training.sampling import Draws, Items
from safe_sched.training.session import Session
from tests.core.batches import pad, row

laws = settings(max_examples=10, deadline=None)  # each starts threads
ROWS = [row(*range(i, i + 3 + i % 3)) for i in range(1, 13)]
KEYS = torch.tensor(pad(ROWS).keys)


Plan = list[list[list[int]]]  # micro-batches, ranks, rows


def loss_of(rows: Sequence[int], step: int) -> Tensor:
    return torch.tensor([1.0 + 0.3 * ((7 * number + step) % 5) for number in rows])


def train(session: Session, plan: Plan, rank: int | None, steps: int = 3) -> dict[str, Tensor]:
    """Some steps of one rank, or of one process that has the rows of all."""
    for step in range(steps):
        mine = [[number for part in micro for number in part] if rank is None else micro[rank] for micro in plan]
        micros = [pad([ROWS[number] for number in rows] or [row(9, prompt=1)]) for rows in mine]
        for batch, rows in zip(session.begin_step(micros), mine, strict=True):
            nll = loss_of(rows, step) if rows else torch.zeros(1)
            if "probe" in session.needs():
                session.learn("probe", batch.slots, nll / 3)
            features = torch.stack([nll, nll.square()], 1)
            expected = session.weigh(batch, {"nll": nll, "hidden_state": features}, mean_tokens=3.0)
            assert torch.equal(expected, batch.factors)
            session.mark_gated(batch)
        session.end_step()
    return session.state.tensors() | {"seen": session.seen, "keys": session.index.keys}


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "fixed": lambda: Fixed([0.1 * i for i in range(len(ROWS))]),
    "released": lambda: BDSReleased(learning_rate=0.1),
    "probe": lambda: BDS(draws=4),
    "neural": NeuralBDS,
}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Up to three micro-batches for two or three ranks, some of which have no rows."""
    ranks, count = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    part = st.lists(st.integers(0, len(ROWS) - 1), max_size=3)
    return draw(st.lists(st.lists(part, min_size=ranks, max_size=ranks), min_size=count, max_size=count))


def both(name: str, plan: Plan, *, stream: bool = False, deaf: bool = False) -> tuple[list[Any], Any]:
    def made(exchange: InProcess | None) -> Session:
        index = RowIndex(None if stream else KEYS)
        return Session(SCHEDULERS[name](), index, exchange=exchange)

    ranks = on_ranks(len(plan[0]), lambda exchange: train(made(exchange), plan, exchange.rank), deaf=deaf)
    return ranks, train(made(None), plan, None)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(torch.nan_to_num(found[k]), torch.nan_to_num(expected[k])) for k in expected
    )


@pytest.mark.parametrize("name", SCHEDULERS)
@laws
@given(plan=plans())
def test_several_ranks_are_one_with_all_their_rows(name: str, plan: Plan) -> None:
    """Bit for bit: the arithmetic is the same, in the same order."""
    if not any(part for micro in plan for part in micro):
        return
    ranks, one = both(name, plan)
    assert all(same(found, one) for found in ranks)


@laws
@given(plan=plans())
def test_the_rows_of_a_stream_are_numbered_alike_on_all_ranks(plan: Plan) -> None:
    if not any(part for micro in plan for part in micro):
        return
    ranks, one = both("released", plan, stream=True)
    assert all(same(found, one) for found in ranks)


PLAN: Plan = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_without_the_exchange_the_ranks_part() -> None:
    ranks, one = both("released", PLAN, deaf=True)
    assert not same(ranks[0], ranks[1])
    assert not same(ranks[0], one)


def test_each_rank_weighs_its_own_rows() -> None:
    weights = [0.1 * i for i in range(len(ROWS))]

    def work(exchange: InProcess) -> list[float]:
        session = Session(Fixed(weights), RowIndex(KEYS), exchange=exchange)
        mine = [[3, 0], [7]][exchange.rank]
        (batch,) = session.begin_step([pad([ROWS[number] for number in mine])])
        session.weigh(batch, None)
        session.mark_gated(batch)
        logged = session.end_step()
        assert logged["safe_sched/weight_max"] == pytest.approx(0.7)
        assert session.step_rows == 3
        return batch.factors.tolist()

    first, second = on_ranks(2, work)
    assert first == pytest.approx([0.3, 0.0])
    assert second == pytest.approx([0.7])


def test_a_stand_in_teaches_nothing() -> None:
    def work(exchange: InProcess) -> tuple[list[float], int]:
        session = Session(Fixed(), RowIndex(KEYS), exchange=exchange)
        (batch,) = session.begin_step([pad([ROWS[exchange.rank]])], [exchange.rank == 1])
        session.weigh(batch, None)
        session.mark_gated(batch)
        session.end_step()
        return batch.factors.tolist(), int(session.seen.sum())

    assert on_ranks(2, work) == [([1.0], 1), ([0.0], 1)]


def test_ranks_with_different_numbers_of_micro_batches_stop() -> None:
    def work(exchange: InProcess) -> str:
        session = Session(Fixed(), RowIndex(KEYS), exchange=exchange)
        with pytest.raises(CoverageError) as raised:
            session.begin_step([pad([ROWS[0]])] * (1 + exchange.rank))
        return str(raised.value)

    assert all("the ranks have 1, 2 micro-batches in step 0" in text for text in on_ranks(2, work))


@pytest.mark.parametrize(
    ("rows", "match"),
    [(KEYS[:-1], "rank 1 does not have the options or rows"), (KEYS.flip(0), "rank 1 does not have the order of rows")],
)
def test_ranks_with_other_rows_stop(rows: Tensor, match: str) -> None:
    def work(exchange: InProcess) -> None:
        session = Session(Fixed(), RowIndex(rows if exchange.rank else KEYS), exchange=exchange)
        with pytest.raises(DataError, match=match):
            session.require_same()

    on_ranks(2, work)


def test_ranks_with_other_saved_states_stop() -> None:
    def work(exchange: InProcess) -> None:
        session = Session(Fixed(), RowIndex(KEYS), exchange=exchange)
        session.seen[3] += exchange.rank
        with pytest.raises(DataError, match="rank 1 does not have the saved state of rank 0"):
            session.require_same()

    on_ranks(2, work)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_draw_what_one_process_draws(ranks: int) -> None:
    """Kept rows, their factors, and what a saved state remembers of steps that were drawn ahead."""
    weight = torch.linspace(0, 1, 24)
    base = [list(range(start, start + 2)) for start in range(0, 24, 2)]

    def drawn(exchange: Any, batches: list[list[int]]) -> tuple[dict[int, float], dict[str, Tensor]]:
        tokens = torch.ones(24, dtype=torch.int32)
        draws = Draws(Items(torch.arange(24)), tokens, lambda s: weight[s], seed=5, accumulation=2, exchange=exchange)
        draws.begin_epoch(1)
        list(draws.walk(batches, regroup=False))
        saved = draws.tensors()
        kept: dict[int, float] = {}
        for _ in range(len(batches) // 2):
            step = draws.take(2)
            for batch in step.batches:
                kept |= {s: v for s, v in zip(batch.slots.tolist(), batch.inverse.tolist(), strict=True) if v}
        return kept, saved

    found = on_ranks(ranks, lambda exchange: drawn(exchange, base[exchange.rank :: ranks]))
    merged = [[*itertools.chain(*base[i : i + ranks])] for i in range(0, len(base), ranks)]
    kept, saved = drawn(None, merged)
    assert {k: v for part, _ in found for k, v in part.items()} == kept
    for _, tensors in found:
        assert all(torch.equal(tensors[name], saved[name]) for name in ("sizes", "items", "p"))
