"""Per-row losses, read from what the training forward computed anyway.

The loss of row *i* is the mean cross-entropy of its label tokens, in nats per token::

    nll_i = -(1/n_i) * sum_{t in labels of i} log p(x_t | x_<t)

The first token of a row is not counted (nothing predicts it), so a packed row has the loss it has alone. A row
without label tokens has loss 0 and ``n_i = 0``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_sched.rows.keys import Layout, label_positions, sum_by_row


def label_counts(labels: Tensor, layout: Layout) -> Tensor:
    """Label tokens of every row.

    Args:
        labels: int64 (batch, sequence), -100 where ignored.
        layout: Where the rows lie.

    Returns:
        int64 (rows,).
    """
    return sum_by_row(label_positions(labels, layout), layout)


@torch.no_grad()
def nll_from_log_probs(log_probs: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """Mean loss of every row from the log-probability of every label.

    Args:
        log_probs: (batch, sequence - 1), entry t belongs to label t + 1.
        labels: int64 (batch, sequence).
        layout: Where the rows lie.

    Returns:
        float32 (rows,), nats per token.

    Example:
        >>> import torch
        >>> from safe_sched.rows.keys import layout_of
        >>> ids = torch.tensor([[3, 4, 5]])
        >>> nll_from_log_probs(torch.tensor([[-1.0, -2.0]]), ids, layout_of(ids))
        tensor([1.5000])
    """
    counted = label_positions(labels, layout)
    loss = torch.zeros(labels.shape, dtype=torch.float64, device=log_probs.device)
    # where, not a product: a masked -inf or nan must not reach the sum
    loss[:, 1:] = torch.where(counted[:, 1:], -log_probs.double(), 0.0)
    return (sum_by_row(loss, layout) / sum_by_row(counted, layout).clamp(min=1)).float()


@torch.no_grad()
def label_log_probs(logits: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """Log-probability of every label token, one line of the batch at a time to bound the extra memory.

    Args:
        logits: (batch, sequence, vocabulary); entry t predicts token t + 1.
        labels: int64 (batch, sequence).
        layout: Where the rows lie.

    Returns:
        float32 (batch, sequence - 1), entry t belongs to label t + 1; 0 where that is none.
    """
    counted = label_positions(labels, layout)
    log_probs = torch.zeros(labels.shape[0], labels.shape[1] - 1, dtype=torch.float32, device=logits.device)
    for line in range(labels.shape[0]):
        at = counted[line, 1:].nonzero().flatten()
        log_probs[line, at] = -torch.nn.functional.cross_entropy(
            logits[line, at].float(), labels[line, at + 1].long(), reduction="none"
        )
    return log_probs


def nll_from_logits(logits: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """Mean loss of every row from the logits; see `label_log_probs`.

    Returns:
        float32 (rows,), nats per token.
    """
    return nll_from_log_probs(label_log_probs(logits, labels, layout), labels, layout)
