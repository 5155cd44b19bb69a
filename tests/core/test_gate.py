"""Through the gate, a loss that nobody touched has the gradient of the explicitly weighted loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from safe_sched.training.gate import scale_gradient, token_weights
from tests.core.batches import Micro, any_rows, laws, pack, pad, row

VOCABULARY = 6
LAYOUTS = ["left", "right", "packed"]
ROWS = [row(1, 2, 3, 4, prompt=2), row(4, 3, 2), row(5, 1, 2)]
WEIGHTS = torch.tensor([0.0, 2.5, 0.3])


def lay(how: str) -> Micro:
    return pack(ROWS) if how == "packed" else pad(ROWS, how, extra=1)


def shifted_labels(micro: Micro) -> Tensor:
    """The next token's label at every place, as a trainer has it; first tokens of rows blanked, as packers do."""
    labels = micro.labels.masked_fill(micro.layout.position == 0, -100)
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def token_losses(logits: Tensor, micro: Micro) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), shifted_labels(micro), ignore_index=-100, reduction="none"
    )


def logits_for(micro: Micro, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*micro.ids.shape, VOCABULARY, generator=generator).to(dtype).requires_grad_()


def gradient(leaf: Tensor, micro: Micro, factors: Tensor | None) -> Tensor:
    """The gradient that the mean token loss sends to ``leaf``, through the gate where there are factors."""
    leaf.grad = None
    logits = leaf * 1
    if factors is not None:
        scale_gradient(logits, lambda: factors)
    losses = token_losses(logits, micro)
    (losses.sum() / (losses > 0).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad.clone()


# token weights --------------------------------------------------------------------------------------------------------


@laws
@given(any_rows(), st.sampled_from(LAYOUTS))
def test_a_place_gets_the_weight_of_the_row_of_the_next_token(rows, how):
    micro = pack(rows) if how == "packed" else pad(rows, how, extra=1)
    weights = torch.arange(2.0, 2.0 + micro.layout.rows)
    found = token_weights(weights, micro.layout)
    batch, length = micro.ids.shape
    for line in range(batch):
        for t in range(length - 1):
            r = int(micro.layout.row[line, t + 1])
            assert found[line, t] == (1.0 if r < 0 else weights[r])


def test_at_a_packed_boundary_the_weight_changes_one_place_early():
    """Rows of 3 and 2: place 2 is the first row's last token and predicts the second row's first."""
    packed = pack([row(1, 2, 3), row(4, 5)])
    assert token_weights(torch.tensor([2.0, 0.5]), packed.layout).tolist() == [[2.0, 2.0, 0.5, 0.5]]


# the gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LAYOUTS)
def test_gradient_of_the_logits_is_the_weighted_closed_form(how):
    """d/dz_t of sum_i w_i/T sum_t CE_t is w_row(t+1)/T * (softmax(z_t) - onehot(label_t+1)); 0 where no label is."""
    micro = lay(how)
    leaf = logits_for(micro)
    found = gradient(leaf, micro, token_weights(WEIGHTS, micro.layout))
    labels = shifted_labels(micro)
    total = int((labels != -100).sum())
    expected = torch.zeros_like(found)
    for line, t in (labels != -100).nonzero().tolist():
        weight = WEIGHTS[micro.layout.row[line, t + 1]]
        expected[line, t] = weight / total * torch.softmax(leaf.detach()[line, t], dim=0)
        expected[line, t, labels[line, t]] -= weight / total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    # control: without the gate the gradient is another
    assert not torch.allclose(gradient(leaf, micro, None), expected, atol=1e-3)


@pytest.mark.parametrize("how", LAYOUTS)
def test_parameters_get_the_gradient_of_the_explicitly_weighted_loss(how):
    """A model that mixes tokens of a row: the weight must bind all that flows through the gated tensor."""
    micro = lay(how)
    torch.manual_seed(0)
    embed, head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
    parameters = [*embed.parameters(), *head.parameters()]

    def forward() -> Tensor:
        hidden = torch.tanh(embed(micro.ids))
        return head(hidden + hidden.roll(1, dims=1))

    factors = token_weights(WEIGHTS, micro.layout)
    every = torch.nn.functional.pad(factors, (0, 1), value=1.0)
    explicit = torch.autograd.grad((every * token_losses(forward(), micro)).sum(), parameters)
    logits = forward()
    scale_gradient(logits, lambda: factors)
    gated = torch.autograd.grad(token_losses(logits, micro).sum(), parameters)
    for found, expected in zip(gated, explicit, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", LAYOUTS)
def test_weights_of_the_wrong_row_would_be_noticed(how):
    """Control: every row with its neighbour's weight."""
    micro = lay(how)
    leaf = logits_for(micro)
    right = gradient(leaf, micro, token_weights(WEIGHTS, micro.layout))
    wrong = gradient(leaf, micro, token_weights(WEIGHTS.roll(1), micro.layout))
    assert not torch.allclose(right, wrong, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", LAYOUTS)
def test_factors_of_1_leave_the_gradient_untouched_bit_for_bit(how, dtype):
    micro = lay(how)
    leaf = logits_for(micro, dtype)
    plain = gradient(leaf, micro, None)
    ones = token_weights(torch.ones(3), micro.layout)
    assert torch.equal(gradient(leaf, micro, ones), plain)
    # control: the smallest step away from 1 is seen in float32
    if dtype == torch.float32:
        assert not torch.equal(gradient(leaf, micro, ones + 2**-20), plain)


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_weight_of_0_stops_all_of_a_rows_gradient(how):
    micro = lay(how)
    found = gradient(logits_for(micro), micro, token_weights(WEIGHTS, micro.layout))
    zero = token_weights(WEIGHTS, micro.layout) == 0
    assert zero.any()
    assert found[:, :-1][zero].count_nonzero() == 0


def test_in_bfloat16_the_product_is_rounded_once():
    """bf16(g * f) with f in float32; a factor that is rounded to bf16 first gives another last bit for some g."""
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(1, 64, 8, generator=generator).bfloat16()
    factors = torch.rand(1, 63, generator=generator) + 0.5
    leaf = torch.zeros(1, 64, 8, dtype=torch.bfloat16, requires_grad=True)
    z = leaf * 1
    scale_gradient(z, lambda: factors)
    z.backward(upstream)
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    every = torch.nn.functional.pad(factors, (0, 1), value=1.0)[..., None]
    assert torch.equal(leaf.grad, (upstream.float() * every).bfloat16())
    # control
    assert not torch.equal(leaf.grad, upstream * every.bfloat16())


@pytest.mark.parametrize("shape", [(2, 3), (2, 4), (2, 3, 5), (2, 4, 5)])
def test_log_probs_logits_and_hidden_states_are_all_scaled(shape):
    """Gradient 1 everywhere becomes the factor itself; a sequence that is one longer keeps 1 in its last place."""
    factors = torch.tensor([[2.0, 0.5, 0.0], [1.0, 3.0, 0.25]])
    leaf = torch.zeros(shape, requires_grad=True)
    z = leaf * 1
    scale_gradient(z, lambda: factors)
    z.sum().backward()
    every = torch.cat([factors, torch.ones(2, 1)], dim=1)[:, : shape[1]]
    expected = every if len(shape) == 2 else every[..., None].expand(shape)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


# when -----------------------------------------------------------------------------------------------------------------


def test_factors_are_asked_only_when_the_gradient_arrives():
    """Weights may be decided after the loss is known: what counts is their value in the backward."""
    asked, factors = [], torch.ones(1, 2)
    leaf = torch.zeros(1, 2, requires_grad=True)
    z = leaf * 1

    def late() -> Tensor:
        asked.append("backward")
        return factors

    scale_gradient(z, late)
    loss = z.sum()
    assert asked == []
    factors = torch.tensor([[2.0, 0.5]])
    loss.backward()
    assert asked == ["backward"]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[2.0, 0.5]]


def test_a_tensor_used_twice_is_scaled_once():
    """Both uses add up before the gate: (1 + 3) * 2, not 1 + 3 * 2 or (1 + 3) * 4."""
    asked = []
    leaf = torch.zeros(1, 1, requires_grad=True)
    z = leaf * 1

    def factors() -> Tensor:
        asked.append(1)
        return torch.tensor([[2.0]])

    scale_gradient(z, factors)
    (z + 3 * z).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.item() == 8.0
    assert len(asked) == 1


def test_the_forward_is_not_touched():
    z = torch.randn(2, 3, requires_grad=True) * 1
    before = z.detach().clone()
    scale_gradient(z, lambda: torch.zeros(2, 3))
    assert torch.equal(z, before)


def test_a_tensor_without_gradient_is_refused():
    """There is nothing to bind a weight to; silence would be an undefended run."""
    with pytest.raises(RuntimeError):
        scale_gradient(torch.zeros(1, 2), lambda: torch.ones(1, 2))
