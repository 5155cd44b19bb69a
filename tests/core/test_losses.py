"""The loss of a row is the mean over its own label tokens, wherever the row lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.rows.nll import label_counts, nll_from_log_probs, nll_from_logits
from tests.core.batches import Micro, Row, any_rows, laws, pack, pad, row

VOCABULARY = 6


def small(rows: list[Row]) -> list[Row]:
    return [Row(tuple(t % VOCABULARY for t in r.tokens), r.labelled) for r in rows]


def logits_for(micro: Micro, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(micro.ids.numel())
    return (3 * torch.randn(*micro.ids.shape, VOCABULARY, generator=generator)).to(dtype)


def slow_nll(logits: Tensor, micro: Micro) -> list[float]:
    """The definition, token by token: log-softmax in double precision, a token predicted by the one before it."""
    losses: list[list[float]] = [[] for _ in range(micro.layout.rows)]
    batch, length = micro.ids.shape
    for line in range(batch):
        for t in range(1, length):
            here, before = int(micro.layout.row[line, t]), int(micro.layout.row[line, t - 1])
            label = int(micro.labels[line, t])
            if here < 0 or here != before or label == -100:
                continue
            losses[here].append(-float(torch.log_softmax(logits[line, t - 1].double(), dim=0)[label]))
    return [sum(x) / len(x) if x else 0.0 for x in losses]


def gathered(logits: Tensor, micro: Micro) -> Tensor:
    """Log-probability of every next label, as a fused head returns it: (batch, sequence - 1)."""
    log_probs = torch.log_softmax(logits.float()[:, :-1], dim=-1)
    return log_probs.gather(2, micro.labels[:, 1:, None].clamp(min=0))[..., 0]


layouts = st.sampled_from(["left", "right", "packed"])


def lay(rows: list[Row], how: str) -> Micro:
    return pack(rows) if how == "packed" else pad(rows, how, extra=1)


@laws
@given(any_rows(), layouts)
def test_row_losses_are_those_of_a_slow_loop(rows, how):
    micro = lay(small(rows), how)
    logits = logits_for(micro)
    expected = torch.tensor(slow_nll(logits, micro))
    torch.testing.assert_close(nll_from_logits(logits, *micro[1:]), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(nll_from_log_probs(gathered(logits, micro), *micro[1:]), expected, rtol=2e-6, atol=1e-6)


def test_a_shift_by_one_would_be_noticed():
    """Control: logits that are read one place too late give other losses."""
    micro = pad([row(1, 2, 3, 4), row(4, 3, 2, 1)])
    logits = logits_for(micro)
    shifted = nll_from_logits(logits.roll(1, dims=1), *micro[1:])
    assert not torch.allclose(shifted, torch.tensor(slow_nll(logits, micro)), atol=0.1)


@laws
@given(any_rows(), st.data())
def test_a_row_has_the_loss_that_it_has_alone(rows, data):
    """Packed beside others, a row's own logits give its own loss; padding and neighbours add nothing."""
    rows = small(rows)
    micro = pack(rows)
    logits = logits_for(micro)
    together = nll_from_logits(logits, *micro[1:])
    start = 0
    for i, r in enumerate(rows):
        alone = pad([r])
        part = logits[:, start : start + len(r.tokens)]
        torch.testing.assert_close(nll_from_logits(part, *alone[1:])[0], together[i])
        start += len(r.tokens)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    """Closed form: every label has probability 1/V, so every token costs log V."""
    micro = pad([row(1, 2, 3), row(4, 5)], "left")
    found = nll_from_logits(torch.zeros(2, 3, VOCABULARY), *micro[1:])
    torch.testing.assert_close(found, torch.full((2,), VOCABULARY).float().log())


def test_a_loss_is_the_mean_over_labels_not_the_sum():
    """Log-probs -1, -2, -4 on labels at places 1, 2, 3: mean 7/3; with the first masked, mean 3."""
    ids = pad([row(1, 2, 3, 4), row(1, 2, 3, 4, prompt=2)])
    log_probs = torch.tensor([[-1.0, -2.0, -4.0]] * 2)
    assert nll_from_log_probs(log_probs, *ids[1:]).tolist() == pytest.approx([7 / 3, 3.0])


@pytest.mark.parametrize("how", ["left", "right", "packed"])
def test_rows_without_labels_have_loss_0_and_count_0(how):
    """A prompt only, a lone first token, and a row with one label."""
    micro = lay([row(1, 2, 3, prompt=3), row(4, prompt=0), row(5, 2)], how)
    logits = logits_for(micro)
    assert label_counts(*micro[1:]).tolist() == [0, 0, 1]
    found = nll_from_logits(logits, *micro[1:])
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2] > 0


@pytest.mark.parametrize("bad", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("how", ["left", "right", "packed"])
def test_numbers_in_masked_places_do_not_leak(how, bad):
    """Every place that predicts no label of a row is overwritten; the losses stay the same to the last bit."""
    micro = lay([row(1, 2, 3, 4, prompt=2), row(4, 3, 2)], how)
    logits = logits_for(micro)
    log_probs = gathered(logits, micro)
    where = micro.layout
    used = (micro.labels != -100) & (where.row >= 0) & (where.position > 0)
    spoiled = logits.clone()
    spoiled[:, :-1][~used[:, 1:]] = bad
    spoiled[:, -1] = bad
    assert torch.equal(nll_from_logits(spoiled, *micro[1:]), nll_from_logits(logits, *micro[1:]))
    masked = torch.where(used[:, 1:], log_probs, bad)
    assert torch.equal(nll_from_log_probs(masked, *micro[1:]), nll_from_log_probs(log_probs, *micro[1:]))
    # control: masking by a product would leak
    assert not torch.isfinite((masked * used[:, 1:]).sum())


def test_a_bad_number_in_a_place_that_counts_is_not_hidden():
    """Control for the test above: the same number where a label is predicted reaches that row, and only that row."""
    micro = pad([row(1, 2, 3), row(4, 3, 2)])
    log_probs = gathered(logits_for(micro), micro)
    log_probs[0, 1] = -torch.inf
    found = nll_from_log_probs(log_probs, *micro[1:])
    assert found[0] == torch.inf
    assert torch.isfinite(found[1])


def test_tokens_ruled_out_by_the_model_do_not_harm_a_loss():
    """Logits of -inf on tokens that are not the label: a softmax over the rest."""
    micro = pad([row(1, 2)])
    logits = torch.full((1, 2, VOCABULARY), -torch.inf)
    logits[..., 2], logits[..., 3] = 0.0, 0.0
    assert nll_from_logits(logits, *micro[1:]).item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("how", ["left", "right", "packed"])
def test_bfloat16_logits_are_taken_as_they_are_and_summed_in_float32(how):
    """The slow loop reads the same rounded logits, so only its own rounding may differ; bf16 sums would be 1e-2 off."""
    micro = lay([row(1, 2, 3, 4), row(4, 3, 2)], how)
    logits = logits_for(micro, torch.bfloat16)
    found = nll_from_logits(logits, *micro[1:])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(slow_nll(logits, micro)), rtol=2e-6, atol=1e-6)


def test_many_equal_losses_do_not_drift():
    """100,000 labels at -0.1 each: a running sum in float32 is off in the fifth digit, the double one is not."""
    length = 100_001
    micro = pack([Row((1,) * length, (True,) * length)])
    log_probs = torch.full((1, length - 1), -0.1)
    assert nll_from_log_probs(log_probs, *micro[1:]).item() == pytest.approx(0.1, rel=1e-7)


def test_labels_of_32_bits_give_the_same_losses():
    micro = pad([row(1, 2, 3), row(4, 3, 2)])
    logits = logits_for(micro)
    narrow = nll_from_logits(logits, micro.labels.int(), micro.layout)
    assert torch.equal(narrow, nll_from_logits(logits, *micro[1:]))


def test_losses_carry_no_gradient():
    micro = pad([row(1, 2, 3)])
    logits = logits_for(micro).requires_grad_()
    assert not nll_from_logits(logits, *micro[1:]).requires_grad
    assert not nll_from_log_probs(gathered(logits, micro), *micro[1:]).requires_grad
