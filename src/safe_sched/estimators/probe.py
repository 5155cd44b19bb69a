"""The probe: which rows become harder to learn when the model refuses more?

Safety rows are harmful prompts with refusals. At the *opening* of an answer the model either goes on with one of the
tokens R that open a refusal, or with another. Their log-odds are the refusal margin::

    m(theta) = mean over safety rows of  log p(R | prompt) - log p(not R | prompt)

The parameters are moved by ``theta' = theta + gain * g / |g|**2`` with ``g = dm/dtheta``, which raises the margin by
``gain`` nats to first order, and the loss of every label token t is read again. A row that answers a harmful prompt
has a token that the move makes less likely, by about the same nats; a harmless row has none. So its score is::

    x_i = max over its label tokens t of  ( nll_t(theta') - nll_t(theta) ) / gain

near 1 for harmful rows and 0 for harmless ones, whatever the learning rate and the share of harmful rows. The gradient
of the plain safety loss in place of ``g`` points, in a model that still refuses, at *which* refusal the rows word; that
is noise for this purpose. The maximum over tokens is taken because a refusal is decided at one token: a mean over a
long answer dilutes it.

The score is about the model's own probability of refusing there, so it fades where the model has learned to comply:
scores are worth most early in a run, and a low one says little later on (`safe_sched.schedulers.bds`).

Everything here is plain torch; an integration runs the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safe_sched.errors import ModelError
from safe_sched.estimators.moves import moved, scale_to_gain
from safe_sched.rows.keys import IGNORE_INDEX, Layout, label_positions

GAIN = 0.5
"""Nats by which a probe raises the refusal margin: small enough to be a derivative, large enough for 16-bit floats."""


@dataclass(frozen=True)
class Opening:
    """Where safety rows begin to refuse, and how.

    Attributes:
        prompts: One int64 (tokens,) per row: everything before that place.
        tokens: int64 (distinct,), the tokens R that open a refusal there.
    """

    prompts: list[Tensor]
    tokens: Tensor


def opening_of(rows: Sequence[tuple[Tensor, Tensor]], others: Sequence[Tensor] = ()) -> Opening:
    """The opening of some safety rows: the first answer token that is not part of a template.

    Args:
        rows: ``(tokens, labels)`` of each, int64 (tokens,), -100 where not an answer.
        others: Labelled tokens of some training rows, int64 (any,) each. What all answers begin with, theirs included,
            is the chat template's and no decision.

    Example:
        All answers begin with 7, which so belongs to the template.

        >>> import torch
        >>> a, b = torch.tensor([1, 2, 7, 8]), torch.tensor([3, 7, 9])
        >>> rows = [(a, torch.tensor([-100, -100, 7, 8])), (b, torch.tensor([-100, 7, 9]))]
        >>> opening = opening_of(rows, others=[torch.tensor([7, 5])])
        >>> opening.tokens.tolist(), [prompt.tolist() for prompt in opening.prompts]
        ([8, 9], [[1, 2, 7], [3, 7]])
    """
    starts = [int((labels[1:] != IGNORE_INDEX).nonzero()[0]) + 1 for _, labels in rows]
    answers = [tokens[start:] for (tokens, _), start in zip(rows, starts, strict=True)]
    everyone = [*answers, *others] if others else []
    shortest = min((answer.numel() for answer in everyone), default=0)
    same = 0
    while same < shortest - 1 and len({int(answer[same]) for answer in everyone}) == 1:
        same += 1
    return Opening(
        [tokens[: start + same] for (tokens, _), start in zip(rows, starts, strict=True)],
        torch.unique(torch.stack([answer[same] for answer in answers])),
    )


def refusal_margin(logits: Tensor, refusing: Tensor) -> Tensor:
    """Log-odds of going on with a refusal.

    Args:
        logits: (rows, vocabulary), at the last token of each prompt.
        refusing: int64 (distinct,), R.

    Returns:
        float32 (rows,), nats.

    Example:
        >>> import torch
        >>> refusal_margin(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.6931])
    """
    logits = logits.float()
    mask = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    mask[refusing.to(logits.device)] = True
    yes = logits.masked_fill(~mask, -math.inf).logsumexp(-1)
    return yes - logits.masked_fill(mask, -math.inf).logsumexp(-1)


class Direction:
    """A direction in the space of the trainable parameters, and how far to go along it.

    Args:
        parameters: The trainable parameters.
        gradients: ``dm/dtheta`` for each, or None where it is 0. Kept, not copied.
        gain: Nats that m is to gain.

    Raises:
        ModelError: The gradient is zero or not finite, or the parameters' floats are too coarse for the move.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], gain: float = GAIN
    ) -> None:
        self.parts = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        self.gain = gain
        square = sum(float(g.double().square().sum()) for _, g in self.parts)
        if not math.isfinite(square) or square == 0:
            raise ModelError(
                f"the gradient of the refusal margin is {square}: the safety rows do not reach a trainable "
                "parameter, or the model is not finite. Check that safety_data holds prompts with refusals, and train "
                "in float32 or bfloat16."
            )
        # 16-bit parameters swallow small changes, and go further
        self.scale, gained = scale_to_gain(self.parts, gain, gain / square)
        if not 0.8 * gain <= gained <= 1.25 * gain:
            raise ModelError(
                f"moving the parameters along the refusal margin gains {gained:.2g} nats instead of {gain}: they are "
                "stored too coarsely. Load the model in float32 (train with bf16=True), or use LoRA with float32 "
                "adapters."
            )

    def taken(self) -> contextlib.AbstractContextManager[None]:
        """Have the parameters moved for a while. They come back as the very same storage, so bit for bit."""
        return moved(self.parts, self.scale)


def row_scores(before: Tensor, after: Tensor, labels: Tensor, layout: Layout, gain: float = GAIN) -> Tensor:
    """The scores x of the rows of a micro-batch.

    Args:
        before: float (batch, sequence - 1), log-probability of every next token under theta.
        after: The same under theta'.
        labels: int64 (batch, sequence).
        layout: Where the rows lie.
        gain: Nats by which the margin was raised.

    Returns:
        float32 (rows,); -inf for a row without label tokens.

    Example:
        >>> import torch
        >>> from safe_sched.rows.keys import layout_of
        >>> ids = torch.tensor([[3, 4, 5]])
        >>> row_scores(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -2.5]]), ids, layout_of(ids), gain=0.5)
        tensor([1.])
    """
    counted = label_positions(labels, layout)[:, 1:]
    rose = (before.float() - after.float()) / gain
    scores = torch.full((layout.rows,), -math.inf, device=rose.device)
    return scores.scatter_reduce_(0, layout.row[:, 1:][counted], rose[counted], "amax")
