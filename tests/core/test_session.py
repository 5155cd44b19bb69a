"""The session: a step in which any row goes without its weight ends with an error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from safe_sched.errors import CoverageError, NumericsError, OptionError
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import layout_of
from safe_sched.rows.nll import nll_from_logits
from safe_sched.schedulers import BDSReleased, Fixed
from safe_sched.training.gate import scale_gradient, token_weights
from safe_sched.training.session import Session
from tests.core.batches import Micro, Row, laws, pack, pad, row

SHORT, LONG, OTHER = row(5, 6, 7), row(8, 9, 3, 4, 2), row(1, 2, 3)
SILENT = row(6, 6, 6, prompt=3)
ROWS = [SHORT, LONG, OTHER]
VOCABULARY = 10


def index_of(rows: list[Row]) -> RowIndex:
    return RowIndex(torch.tensor(pad(rows).keys))


def session_of(rows: list[Row] = ROWS, scheduler: Any = None, **options: Any) -> Session:
    return Session(Fixed([0.5, 2.0, 1.0]) if scheduler is None else scheduler, index_of(rows), **options)


def step(session: Session, *micros: Micro, **how: Any) -> dict[str, float]:
    """One optimiser step as an integration runs it."""
    for batch, micro in zip(session.begin_step(micros), micros, strict=True):
        session.weigh(batch, {"nll": torch.ones(micro.layout.rows)}, **how)
        session.mark_gated(batch)
    return session.end_step()


# factors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay", [pad, pack], ids=["padded", "packed"])
def test_each_row_gets_its_own_weight_wherever_it_lies(lay):
    session = session_of()
    first, second = session.begin_step([lay([LONG, SHORT]), lay([OTHER])])
    assert session.weigh(first).tolist() == [2.0, 0.5]
    assert session.weigh(second).tolist() == [1.0]
    assert first.factors.tolist() == [2.0, 0.5]
    assert first.factors.dtype == torch.float32


def test_rows_without_labels_keep_factor_1_and_are_not_observed():
    """They teach nothing: the scheduler does not see them, their key need not be known, their loss may be anything."""
    session = session_of(scheduler=BDSReleased())
    (batch,) = session.begin_step([pad([SILENT, LONG])])
    assert batch.slots.tolist()[0] == -1
    assert batch.label_tokens.tolist() == [0, 4]
    factors = session.weigh(batch, {"nll": torch.tensor([math.nan, 1.0])})
    assert factors[0] == 1.0
    session.mark_gated(batch)
    session.end_step()
    assert session.seen.sum() == 1
    assert session.rows_trained == 1


def test_a_row_without_labels_has_no_slot_even_where_its_key_is_known():
    """Its loss is no loss, and n_i = 0 would make its factor infinite."""
    session = session_of([SHORT, SILENT], Fixed([0.5, 2.0]), normalizer="row")
    (batch,) = session.begin_step([pad([SILENT, SHORT])])
    assert batch.slots.tolist()[0] == -1
    assert session.weigh(batch, None, mean_tokens=2.0).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(("lengths", "mean_tokens"), [((3, 5, 3), 8 / 3), ((2, 2, 7), 8 / 3)])
def test_the_row_normalizer_in_closed_form(lengths, mean_tokens):
    """Trainer: (1/T) sum_i f_i sum_t l_it. Wanted: (1/R) sum_i w_i (1/n_i) sum_t l_it. So f_i = w_i * (T/R) / n_i.

    Rows of 3, 5, 3 tokens have n = 2, 4, 2 labels: T/R = 8/3, and weights .5, 2, 1 become .5*4/3, 2*2/3, 1*4/3.
    """
    rows = [Row(tuple(range(n)), (False,) + (True,) * (n - 1)) for n in lengths]
    rows = [Row((9 - i, *r.tokens[1:]), r.labelled) for i, r in enumerate(rows)]
    session = session_of(rows, normalizer="row")
    (batch,) = session.begin_step([pad(rows)])
    expected = [w * mean_tokens / (n - 1) for w, n in zip([0.5, 2.0, 1.0], lengths, strict=True)]
    assert session.weigh(batch, None, mean_tokens).tolist() == pytest.approx(expected)
    token = session_of(rows)
    (batch,) = token.begin_step([pad(rows)])
    assert token.weigh(batch, None, mean_tokens).tolist() == [0.5, 2.0, 1.0]


@laws
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    seed=st.integers(0, 2**31),
    normalizer=st.sampled_from(["token", "row"]),
)
def test_the_normalizers_weigh_any_losses_in_any_micro_batches(lengths, cut, seed, normalizer):
    """Trainer: sum of factor * loss over all tokens, divided by the step's T label tokens. For losses l_it at random:

    token: (1/T) sum_i w_i sum_t l_it        row: (1/R) sum_i w_i mean_t l_it

    whatever the lengths, and however the R rows are split into two micro-batches.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [Row((100 + i, *range(1, n)), (False,) + (True,) * (n - 1)) for i, n in enumerate(lengths)]
    weights = (2 * torch.rand(len(rows), generator=generator)).tolist()
    losses = [torch.rand(n - 1, generator=generator, dtype=torch.float64) for n in lengths]
    session = session_of(rows, Fixed(weights), normalizer=normalizer)
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    tokens, found = sum(n - 1 for n in lengths), 0.0
    factors = [
        session.weigh(batch, None, tokens / len(rows)) for batch in session.begin_step([pad(part) for part in parts])
    ]
    for factor, loss in zip(torch.cat(factors).tolist(), losses, strict=True):
        found += factor * float(loss.sum()) / tokens
    if normalizer == "token":
        expected = sum(w * float(loss.sum()) for w, loss in zip(weights, losses, strict=True)) / tokens
    else:
        expected = sum(w * float(loss.mean()) for w, loss in zip(weights, losses, strict=True)) / len(rows)
    assert found == pytest.approx(expected, rel=1e-5)


def explicit_loss(logits: Tensor, micro: Micro, weights: list[float], normalizer: str) -> Tensor:
    """The weighted loss as a paper writes it, one row at a time."""
    total = logits.new_zeros(())
    counts = [int((line != -100).sum()) for line in micro.labels]
    for line, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        losses = torch.nn.functional.cross_entropy(
            logits[line, :-1], micro.labels[line, 1:], ignore_index=-100, reduction="sum"
        )
        total = total + weight * losses / (sum(counts) if normalizer == "token" else count * len(counts))
    return total


@pytest.mark.parametrize("normalizer", ["token", "row"])
def test_a_whole_step_gives_the_gradient_of_the_explicitly_weighted_loss(normalizer):
    """Two micro-batches under the trainer's token mean; against the loss of each normalizer, written out."""
    micros = [pad([SHORT, LONG]), pad([OTHER], "left", extra=2)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, VOCABULARY))
    session = session_of(scheduler=Fixed([0.5, 2.0, 0.25]), normalizer=normalizer)
    total = sum(int((m.labels != -100).sum()) for m in micros)
    for batch, micro in zip(session.begin_step(micros), micros, strict=True):
        logits = model(micro.ids)
        session.weigh(batch, {"nll": nll_from_logits(logits, *micro[1:])}, total / 3)
        scale_gradient(logits, lambda batch=batch: token_weights(batch.factors, batch.layout))
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), micro.labels[:, 1:], ignore_index=-100, reduction="sum"
        )
        (losses / total).backward()
    found = [p.grad.clone() for p in model.parameters()]
    # all three rows padded into one batch, for the loss as written
    whole = pad([SHORT, LONG, OTHER])

    def expected(kind: str) -> tuple[Tensor, ...]:
        loss = explicit_loss(model(whole.ids), whole, [0.5, 2.0, 0.25], kind)
        return torch.autograd.grad(loss, list(model.parameters()))

    for gradient, wanted in zip(found, expected(normalizer), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    # control: the other normalizer has another gradient
    other = expected("row" if normalizer == "token" else "token")
    assert any(not torch.allclose(g, w, atol=1e-4) for g, w in zip(found, other, strict=True))


def test_an_unknown_normalizer_is_an_option_error():
    with pytest.raises(OptionError, match="normalizer='rows'; allowed: 'token', 'row'"):
        session_of(normalizer="rows")


# coverage -------------------------------------------------------------------------------------------------------------


def test_a_row_that_was_not_in_the_set_stops_the_run():
    """The message counts the unknown rows and shows the first one's tokens."""
    session = session_of()
    with pytest.raises(CoverageError, match=r"2 of 3 rows in a batch of step 0 .* the 3 rows") as caught:
        session.begin_step([pad([SHORT, row(4, 4, 4), row(3, 3)])])
    assert "row 1 of the batch, tokens [4, 4, 4]" in str(caught.value)


def test_a_row_that_changed_in_one_token_or_one_label_is_unknown():
    """Control: the untouched row beside it is known."""
    session = session_of()
    session.begin_step([pad([SHORT])])
    for changed in (row(5, 6, 1), row(5, 6, 7, prompt=2)):
        with pytest.raises(CoverageError, match="1 of 1"):
            session.begin_step([pad([changed])])


def test_forgotten_packing_boundaries_stop_the_run():
    """Rows that flow into each other are no rows of the training set."""
    ids, labels, _ = pack(ROWS)
    with pytest.raises(CoverageError):
        session_of().begin_step([(ids, labels, layout_of(ids))])


@pytest.mark.parametrize(("weighed", "gated"), [(False, False), (True, False), (False, True)])
def test_a_micro_batch_that_was_not_weighed_or_not_gated_stops_the_run(weighed, gated):
    session = session_of()
    first, second = session.begin_step([pad([SHORT]), pad([LONG])])
    session.weigh(first)
    session.mark_gated(first)
    if weighed:
        session.weigh(second)
    if gated:
        session.mark_gated(second)
    with pytest.raises(CoverageError, match=r"micro-batches \[1\] of 2 in step 0"):
        session.end_step()


def test_a_micro_batch_that_was_weighed_and_gated_passes():
    """Control for the test above, and a step that is complete leaves nothing behind for the next."""
    session = session_of()
    assert step(session, pad([SHORT]), pad([LONG]))["safe_sched/weight_max"] == 2.0
    with pytest.raises(CoverageError):
        session.end_step()


def test_a_step_that_was_never_begun_stops_the_run():
    with pytest.raises(CoverageError):
        session_of().end_step()


# numerics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_training_row(bad):
    """The row's number in the training set, not its place in the batch."""
    session = session_of(scheduler=BDSReleased())
    (batch,) = session.begin_step([pad([OTHER, SHORT, SILENT, LONG])])
    with pytest.raises(NumericsError, match=r"the loss of 2 rows is not finite at step 0 \(training rows \[2, 1\]\)"):
        session.weigh(batch, {"nll": torch.tensor([bad, 1.0, 1.0, bad])})


def test_a_loss_that_is_not_finite_names_the_first_of_identical_rows():
    session = session_of([SHORT, LONG, LONG], BDSReleased())
    (batch,) = session.begin_step([pad([LONG])])
    with pytest.raises(NumericsError, match=r"training rows \[1\]"):
        session.weigh(batch, {"nll": torch.tensor([math.nan])})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.25])
def test_a_weight_that_is_negative_or_not_finite_is_named(bad, monkeypatch):
    session = session_of()
    (batch,) = session.begin_step([pad([SHORT, LONG])])
    monkeypatch.setattr(Fixed, "weights", lambda self, state, batch: torch.tensor([1.0, bad]))
    with pytest.raises(NumericsError, match=rf"fixed returned 1 weights .* at step 0 \(first: {bad}\)"):
        session.weigh(batch)


def test_a_weight_of_0_is_allowed():
    session = session_of(scheduler=Fixed([0.0, 2.0, 1.0]))
    (batch,) = session.begin_step([pad([SHORT])])
    assert session.weigh(batch).tolist() == [0.0]


# what a step leaves behind --------------------------------------------------------------------------------------------


def test_the_metrics_of_a_step_are_of_all_its_rows():
    """Weights .5, 2 and 1 in two micro-batches: mean 7/6, not the mean of the means."""
    found = step(session_of(), pad([SHORT, LONG]), pad([OTHER]))
    assert found == pytest.approx(
        {"safe_sched/weight_mean": 3.5 / 3, "safe_sched/weight_min": 0.5, "safe_sched/weight_max": 2.0}
    )
    assert all(isinstance(value, float) for value in found.values())


def test_the_scheduler_learns_once_from_all_micro_batches():
    """A session that is given the rows in two micro-batches learns what it learns from one."""
    one, two = session_of(scheduler=BDSReleased()), session_of(scheduler=BDSReleased())
    for number in range(4):
        for session, micros in ((one, [[SHORT, LONG, OTHER]]), (two, [[SHORT], [LONG, OTHER]])):
            losses = {SHORT: 1.0 + number, LONG: 2.0, OTHER: 0.5}
            batches = session.begin_step([pad(part) for part in micros])
            for batch, part in zip(batches, micros, strict=True):
                session.weigh(batch, {"nll": torch.tensor([losses[r] for r in part])})
                session.mark_gated(batch)
            session.end_step()
    assert torch.equal(one.row_weights(), two.row_weights())
    assert one.row_weights().std() > 0
    assert (one.steps, two.steps) == (4, 4)


def test_seen_counts_every_time_that_a_rows_content_is_trained_on():
    """SHORT twice in step 0 and once in step 1, its copy with it; LONG once; OTHER never."""
    session = session_of([SHORT, LONG, OTHER, SHORT], Fixed())
    step(session, pad([SHORT, SHORT]))
    step(session, pad([LONG]), pad([SHORT]))
    assert session.table().column("seen").to_pylist() == [3, 1, 0, 3]
    assert (session.steps, session.rows_trained) == (2, 4)


def test_the_table_has_a_line_for_every_training_row_in_the_order_of_the_set():
    rows = [SHORT, LONG, SHORT, OTHER]
    table = session_of(rows, Fixed([0.5, 2.0, 0.5, 1.0])).table()
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "row": "int64",
        "key": "uint64",
        "weight": "float",
        "seen": "int32",
    }
    assert table.column("row").to_pylist() == [0, 1, 2, 3]
    assert table.column("weight").to_pylist() == [0.5, 2.0, 0.5, 1.0]
    assert table.column("key").to_pylist() == [key % 2**64 for key in pad(rows).keys]


def test_the_table_of_a_stream_has_a_line_for_every_row_in_the_order_of_arrival():
    session = Session(BDSReleased(), RowIndex(None))
    assert session.table().num_rows == 0
    step(session, pad([LONG, SHORT]))
    step(session, pad([OTHER]), pad([LONG]))
    table = session.table()
    assert table.column("key").to_pylist() == [key % 2**64 for key in pad([LONG, SHORT, OTHER]).keys]
    assert table.column("seen").to_pylist() == [2, 1, 1]


def test_a_stream_knows_every_row_that_it_brings():
    session = Session(BDSReleased(), RowIndex(None))
    (batch,) = session.begin_step([pad([LONG, SILENT, SHORT, LONG])])
    assert batch.slots.tolist() == [0, -1, 1, 0]
    assert session.index.slots == 2


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1.0, 1.0, 1.0], 3.0), ([2.0, 0.0, 0.0], 1.0), ([3.0, 1.0, 0.0], 1.6), ([0.5, 2.0, 1.0], 12.25 / 5.25)],
)
def test_the_effective_sample_size_in_closed_form(weights, expected):
    """(sum w)**2 / sum w**2: 9/3, 4/4, 16/10, 3.5**2 / (.25 + 4 + 1)."""
    assert session_of(scheduler=Fixed(weights)).effective_sample_size() == pytest.approx(expected)


def test_the_effective_sample_size_counts_identical_rows_each():
    """Rows a, a, a, b with weights 1, 1, 1, 3: 36/12 = 3. Over distinct rows it would be 16/10."""
    session = session_of([SHORT, SHORT, SHORT, LONG], Fixed([1.0, 1.0, 1.0, 3.0]))
    assert session.effective_sample_size() == pytest.approx(3.0)


def test_without_any_weight_there_is_no_effective_sample_size():
    assert math.isnan(session_of(scheduler=Fixed([0.0] * 3)).effective_sample_size())


@pytest.mark.parametrize("scheduler", [Fixed(), BDSReleased()], ids=["fixed", "released"])
@pytest.mark.parametrize("streaming", [False, True], ids=["set", "stream"])
def test_a_step_in_which_no_row_has_labels_passes(scheduler, streaming):
    """Nothing is learned, nothing is weighed, and nothing is wrong: prompts that filled the whole length."""
    session = Session(scheduler, RowIndex(None) if streaming else index_of(ROWS))
    found = step(session, pad([SILENT]))
    assert all(math.isfinite(value) for value in found.values())
    assert (session.steps, session.rows_trained) == (1, 0)
