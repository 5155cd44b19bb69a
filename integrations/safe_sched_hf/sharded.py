"""The probe's direction in a model whose parameters are sharded over the ranks (FSDP2).

Every rank moves its own shards, in place, and puts a copy back; what FSDP has gathered is let go each time, as it
would be stale. Lengths are those of all shards together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from safe_sched.errors import ModelError
from safe_sched.estimators.probe import GAIN
from safe_sched.schedulers import Lisa
from safe_sched.training.ranks import Exchange


def reshard(model: nn.Module) -> None:
    """Have the shards in place of what was gathered from them; harmless for a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class ShardedDirection:
    """See `safe_sched.estimators.probe.Direction`.

    Args:
        model: Sharded.
        parameters: Its trainable parameters, as shards.
        gradients: Theirs, as shards, or None where they are 0.
        exchange: Joins the ranks, all of which must do this.
        gain: Nats that m is to gain.

    Raises:
        ModelError: The gradient is zero or not finite, or the parameters' floats are too coarse for the move.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor | None],
        exchange: Exchange,
        gain: float = GAIN,
    ) -> None:
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        self.model, self.parts = model, [(_shard(p), _shard(g)) for p, g in pairs]
        square = _total(exchange, sum(float(g.double().square().sum()) for _, g in self.parts))
        if not math.isfinite(square) or square == 0:
            raise ModelError(
                f"the gradient of the refusal margin is {square}: the safety rows do not reach a trainable parameter, "
                "or the model is not finite. Check that safety_data holds prompts with refusals."
            )
        self.scale = gain / square
        moves = ((torch.add(p, g, alpha=self.scale) - p, g) for p, g in self.parts)
        gained = _total(exchange, sum(float((change.double() * g.double()).sum()) for change, g in moves))
        if not 0.8 * gain <= gained <= 1.25 * gain:
            raise ModelError(
                f"moving the parameters along the refusal margin gains {gained:.2g} nats instead of {gain}: they are "
                "stored too coarsely. Load the model in float32 and train with bf16=True."
            )

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Have the parameters moved for a while. They come back bit for bit."""
        kept = [(p, p.clone()) for p, _ in self.parts]
        try:
            for p, g in self.parts:
                p.add_(g, alpha=self.scale)
            reshard(self.model)
            yield
        finally:
            for p, values in kept:
                p.copy_(values)
            reshard(self.model)


def refuse_sharded(scheduler: Any, evidence: set[str], model_temperature: float) -> None:
    """Refuse what needs the whole model on every rank.

    Raises:
        ModelError: Naming what to use instead.
    """
    adapters = [part for part in getattr(scheduler, "parts", (scheduler,)) if getattr(part, "adapter", None)]
    reasons = {
        "Lisa, which keeps a copy of the parameters": isinstance(scheduler, Lisa),
        "Antibody, which asks each rank's model about other rows": "refusal" in evidence,
        "a reference adapter, which is switched on for some rows": bool(adapters),
        f"model_temperature={model_temperature}": bool(model_temperature),
    }
    for what, present in reasons.items():
        if present:
            raise ModelError(
                f"SafeSchedCallback does not support {what}, where FSDP shards the model. Use DDP, or BDS() or "
                "NeuralBDS() without it."
            )


def _shard(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _total(exchange: Exchange, mine: float) -> float:
    return sum(float(theirs) for (theirs,) in exchange("length", torch.tensor(mine, dtype=torch.float64)))
