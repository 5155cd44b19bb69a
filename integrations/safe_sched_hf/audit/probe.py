"""The direction in which a model refuses more, for the probe of an audit; see `safe_sched.estimators.probe`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safe_sched.errors import ModelError
from safe_sched.estimators.probe import Direction, refusal_margin
from safe_sched_hf.measure.forward import Forwards, out_of_memory
from safe_sched_hf.safety import pad_rows

_AT_ONCE = (16, 4, 1)  # prompts of a backward, the next where memory is short


def towards_refusing(
    forwards: Forwards, openings: Sequence[tuple[int, ...]], prompts: Sequence[Tensor]
) -> Direction | None:
    """The gradient of the refusal margin after some prompts, as a step; None, with a warning, where there is none.

    Args:
        forwards: Of the model.
        openings: Of its refusals.
        prompts: int64 (tokens,) each.
    """
    first = torch.tensor(sorted({opening[0] for opening in openings}))
    reason = "out of memory; use bfloat16, or a device with room for a gradient of every parameter"
    for at_once in _AT_ONCE:
        try:
            return _direction(forwards, first, prompts, at_once)
        except ModelError as error:
            reason = str(error)
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
    warnings.warn(f"no probe in this audit: {reason}", stacklevel=2)
    return None


def _direction(forwards: Forwards, first: Tensor, prompts: Sequence[Tensor], at_once: int) -> Direction:
    model: nn.Module = forwards.model
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    try:
        for p in parameters:
            p.requires_grad_(True)
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            ids, mask = (x.to(forwards.device) for x in pad_rows(part, forwards.pad))
            with forwards.precision():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            last = logits[torch.arange(len(part), device=logits.device), mask.sum(1) - 1]
            (refusal_margin(last, first).sum() / len(prompts)).backward()
        return Direction(parameters, [p.grad for p in parameters])
    finally:
        for p in parameters:
            p.grad = None
            p.requires_grad_(False)
