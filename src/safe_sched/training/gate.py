"""The gate: identity going forward, a factor per token going back.

A row's weight multiplies its loss, so it multiplies that row's gradient wherever the row's loss flows through::

    L = sum_i w_i sum_{t in i} l_t,    dL/dz_t = w_{row(t)} * dl_t/dz_t     for z_t = log-prob, logits or hidden state

The loss itself is never touched, and neither is the tensor: the gate is a gradient hook on it. Where every
factor is exactly 1 the gradients are those of the run without it, bit for bit.

Token ``t`` of the sequence predicts token ``t + 1``: what is computed at ``t`` gets the weight of the row that
token ``t + 1`` belongs to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from safe_sched.rows.keys import Layout


def token_weights(row_weights: Tensor, layout: Layout) -> Tensor:
    """Spread the weights of rows over the predictions of a micro-batch.

    Args:
        row_weights: float (rows,).
        layout: Where the rows lie.

    Returns:
        float (batch, sequence - 1); entry t holds the weight of the row of token t + 1, and 1 where that token
        is padding.

    Example:
        >>> import torch
        >>> from safe_sched.rows.keys import layout_of
        >>> packed = layout_of(torch.zeros(1, 5).long(), position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
        >>> token_weights(torch.tensor([2.0, 0.5]), packed)
        tensor([[2.0000, 2.0000, 0.5000, 0.5000]])
    """
    # row -1 is padding and reads the appended 1
    return torch.cat([row_weights, row_weights.new_ones(1)])[layout.row[:, 1:]]


def scale_gradient(tensor: Tensor, factors: Callable[[], Tensor]) -> None:
    """Multiply the gradient that will reach ``tensor`` by a factor per token.

    Args:
        tensor: (batch, sequence - 1), (batch, sequence) or (batch, sequence, features), part of a graph.
            A sequence that is one longer than the factors keeps the gradient of its last entry: it predicts nothing.
        factors: Called once, when the gradient arrives; gives float32 (batch, sequence - 1). Called late, so the
            weights may depend on everything that the forward computed.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2, requires_grad=True) * 1
        >>> z.retain_grad(); scale_gradient(z, lambda: torch.tensor([[2.0, 0.5]])); z.sum().backward()
        >>> z.grad
        tensor([[2.0000, 0.5000]])
    """

    def hook(gradient: Tensor) -> Tensor:
        factor = factors()
        if factor.shape[1] + 1 == gradient.shape[1]:
            factor = torch.cat([factor, factor.new_ones(factor.shape[0], 1)], dim=1)
        if gradient.dim() == 3:
            factor = factor[:, :, None]
        # out= keeps the gradient's dtype while the product is taken in float32
        return torch.mul(gradient, factor.to(gradient.device), out=torch.empty_like(gradient))

    tensor.register_hook(hook)
