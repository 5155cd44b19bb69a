"""Listening to a training forward: what it shows of each row, and where the gate is set.

Hooks only look. When the forward is over, the gate is set on the first tensor of this list that exists, all of which
the loss of a row flows through:

1. ``output.log_probs`` beside ``output.label_mask``: a head that is fused with the loss (TRL);
2. what the output embedding returned: the loss is computed from logits, by the model or by the trainer;
3. ``output.logits`` of a model that has no output embedding;
4. the last hidden state, for a loss that is fused with the head and never shows logits. Exact for everything before the
   head; a trainable head is refused.

Where the head is frozen, as LoRA leaves it, the gate of 2. and 3. moves to the last hidden state as well: the same
gradients for all that is trained, and no second tensor of the size of the logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safe_sched.errors import ModelError
from safe_sched.rows.nll import label_log_probs, nll_from_log_probs
from safe_sched.training.gate import scale_gradient, token_weights
from safe_sched.training.session import Batch

_UNFUSE = (
    "Switch the fused loss off: loss_type='nll' in SFTConfig, use_liger_kernel=False, or "
    "fused_linear_cross_entropy=False in liger_kernel_config"
)


class Forward:
    """What the training forward of one micro-batch shows. Losses are computed when they are first asked for.

    Args:
        batch: The micro-batch.
        asker: The scheduler's name, for errors.
        model: The model that ran.
        output: What it returned.
        logits: What its output embedding returned, or None.
        hidden: (batch, sequence, width), its last hidden state, or None.

    Attributes:
        hidden: As given.
        nll_is_free: Whether the losses were computed by the forward itself.

    Raises:
        ModelError: The loss of a row cannot be told from what the model returned.
    """

    def __init__(
        self, batch: Batch, asker: str, model: nn.Module, output: Any, logits: Tensor | None, hidden: Tensor | None
    ) -> None:
        fields = output if isinstance(output, Mapping) else {}
        self._batch, self._asker = batch, asker
        self._head = output_embedding(model)
        self.hidden = hidden
        self._logits = fields.get("logits") if logits is None else logits
        self._log_probs: Tensor | None = fields.get("log_probs") if fields.get("label_mask") is not None else None
        labels = batch.labels
        length = labels.shape[1]
        if self._log_probs is not None:
            gated, length = self._log_probs, length - 1
        elif self._logits is not None:
            gated = self._logits
            if hidden is not None and self._head is not None and not _is_trained(self._head):
                gated = hidden if gated.shape[:2] == labels.shape else gated
        elif hidden is not None and fields.get("loss") is not None:
            gated = hidden
            self._refuse_trained_head()
        else:
            returned = sorted(output) if isinstance(output, Mapping) else type(output).__name__
            raise ModelError(
                f"{type(model).__name__} returned {returned}, from which the loss of a row cannot be "
                "told. Needed: log_probs with label_mask, logits, or a loss computed from the last hidden state."
            )
        if gated.shape[:2] != (labels.shape[0], length):
            raise ModelError(
                f"the model computes its loss from a tensor of shape {tuple(gated.shape)} for a batch of shape "
                f"{tuple(labels.shape)}; expected {(labels.shape[0], length)} first. Prompt tuning, logits_to_keep and "
                "sequence or context parallelism change it; switch them off."
            )
        if not gated.requires_grad:
            raise ModelError("the loss has no gradient: no parameter of the model is trainable")
        self.gated = gated
        self.nll_is_free = self._log_probs is not None

    @functools.cached_property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the label tokens: float32 (batch, sequence - 1), without gradient.

        Raises:
            ModelError: The loss is fused with the head and shows only its mean.
        """
        if self._log_probs is not None:
            return self._log_probs.detach()
        if self._logits is None:
            raise ModelError(
                "the model's loss is fused with its output embedding (TRL's chunked loss, Liger, cut cross-entropy), "
                f"so the loss of a single row is never computed, and {self._asker!r} needs it. {_UNFUSE}."
            )
        return label_log_probs(self._logits, self._batch.labels.to(self._logits.device), self._batch.layout)

    @functools.cached_property
    def nll(self) -> Tensor:
        """Mean loss of each row's label tokens: float32 (rows,), nats per token."""
        return nll_from_log_probs(self.log_probs, self._batch.labels, self._batch.layout)

    def logits_at(self, lines: Tensor, columns: Tensor) -> Tensor:
        """Logits at some places, from the last hidden state where the forward shows none.

        Args:
            lines: int64 (places,).
            columns: int64 (places,).

        Returns:
            (places, vocabulary), without gradient.

        Raises:
            ModelError: The forward shows neither.
        """
        if self._logits is not None:
            return self._logits[lines.to(self._logits.device), columns.to(self._logits.device)].detach()
        if self.hidden is None or self._head is None:
            raise ModelError(
                'refusal_cost="first_token" reads logits or the last hidden state of the training forward, and this '
                'model shows neither; use refusal_cost="shared_prefix"'
            )
        with torch.no_grad():
            return self._head(self.hidden[lines.to(self.hidden.device), columns.to(self.hidden.device)])

    def bind(self, weighed: Callable[[], None]) -> None:
        """Set the gate: the backward multiplies each row's gradient by the row's factor.

        Args:
            weighed: Called when the gradient passes.
        """
        batch = self._batch

        def factors() -> Tensor:
            weighed()
            return token_weights(batch.factors, batch.layout)

        scale_gradient(self.gated, factors)

    def _refuse_trained_head(self) -> None:
        if self._head is not None and _is_trained(self._head):
            raise ModelError(
                "the model's loss is fused with its output embedding (TRL's chunked loss, Liger, cut cross-entropy), "
                "and that embedding is being trained: the weights could not reach its gradient. "
                f"{_UNFUSE}; or freeze the embedding, as LoRA does."
            )


@contextlib.contextmanager
def listening(model: nn.Module, batch: Batch, asker: str, heard: Callable[[Forward], None]) -> Iterator[None]:
    """While this lasts, a training forward of the model is a forward of this micro-batch.

    Args:
        model: Any causal language model that returns logits, or a loss with its last hidden state.
        batch: The micro-batch.
        asker: The scheduler's name, for errors.
        heard: Called with what the forward shows, before its output is returned.
    """
    head, inner = output_embedding(model), decoder(model)
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
            if isinstance(output, Tensor) and output.requires_grad:
                seen[name] = output

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        logits, hidden = seen.pop("logits", None), seen.pop("hidden", None)
        # a forward without gradient teaches nothing: metrics, generation in a callback
        if torch.is_grad_enabled() and module.training:
            heard(Forward(batch, asker, model, output, logits, hidden))

    handles = [model.register_forward_hook(after)]
    if head is not None:
        handles.append(head.register_forward_hook(remember("logits")))
    if inner is not None and inner is not model:
        handles.append(inner.register_forward_hook(remember("hidden")))
    try:
        yield
    finally:
        seen.clear()
        for handle in handles:
            handle.remove()


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, or None."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def decoder(model: nn.Module) -> nn.Module | None:
    """The module whose output is the last hidden state, or None."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
    found = getattr(base, getattr(base, "base_model_prefix", ""), None)
    return found if isinstance(found, nn.Module) else None


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
