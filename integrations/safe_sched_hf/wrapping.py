"""What our callbacks do to a trainer: look it up, refuse what is not supported, wrap methods for one ``train()``.

A callback has no event between the last backward of an optimiser step and clipping, and none in which the trainer's
log record can be added to. So methods are wrapped on the trainer *instance*; its class and other trainers are not
touched, and nothing outlives the run:

- a wrapper sleeps as soon as the trainer has begun another ``train()``, for nobody tells a callback that one failed;
- `Wrapping.detach` gives the trainer its own methods back.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

from safe_sched.errors import ModelError

Wrapper = Callable[..., Any]
"""Called with the trainer's own method first, then with what that was called with."""


class Wrapping:
    """Wrapped methods of one trainer. Use `attach` and `detach`.

    Args:
        trainer: In the ``train()`` that this is to last for.
        wrappers: By the method's name. ``log`` is wrapped besides.
    """

    def __init__(self, trainer: Trainer, wrappers: Mapping[str, Wrapper]) -> None:
        self.trainer = trainer
        self._wrappers = {**wrappers, "log": self._log}
        self._state = trainer.state  # every train() makes a new one
        self._wrapped: dict[str, Any] = {}
        self._metrics: dict[str, list[float]] = {}

    @property
    def active(self) -> bool:
        """Whether the trainer is still in the ``train()`` that this belongs to."""
        return bool(self._wrapped) and self.trainer.state is self._state

    def attach(self) -> None:
        """Wrap the methods."""
        for name, wrapper in self._wrappers.items():
            self._wrap(name, wrapper)

    def _wrap(self, name: str, wrapper: Wrapper) -> None:
        original, previous = getattr(self.trainer, name), vars(self.trainer).get(name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs) if self.active else original(*args, **kwargs)

        setattr(self.trainer, name, wrapped)
        self._wrapped[name] = previous

    def detach(self) -> None:
        """Give the trainer its own methods back; harmless when called twice."""
        while self._wrapped:
            name, previous = self._wrapped.popitem()
            if previous is None:
                delattr(self.trainer, name)
            else:
                setattr(self.trainer, name, previous)

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep numbers for the trainer's next record, which gets their mean since the last one."""
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value)

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs:  # the record of training steps; not evaluation, not the closing summary
            logs.update({name: sum(values) / len(values) for name, values in self._metrics.items()})
            self._metrics.clear()
        return original(logs, *args, **kwargs)


def calling_trainer(callback: object) -> tuple[Trainer, str | None]:
    """The trainer whose event is being handled, and the checkpoint it resumes from.

    A `TrainerCallback` is given the model and the data loader but not the trainer, so it is looked up among the
    callers: the nearest `Trainer` that has ``callback`` in its list.

    Raises:
        ModelError: No trainer called, so there is nothing to defend.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer) and any(c is callback for c in owner.callback_handler.callbacks):
                resume = frame.f_locals.get("resume_from_checkpoint")
                return owner, os.fspath(resume) if isinstance(resume, str | os.PathLike) else None
            frame = frame.f_back
    finally:
        del frame
    raise ModelError(
        f"{type(callback).__name__} was called by something that is not a transformers.Trainer with this callback in "
        "its list. Give it to Trainer(..., callbacks=[...]) or trainer.add_callback(...)."
    )


def trial_of(trainer: Trainer) -> Any:
    """The trial of a hyper-parameter search that a trainer is at, or None; it has a folder of its own."""
    return getattr(trainer, "_trial", None)


def refuse_unsupported(trainer: Trainer, callback: object, *, ranks: bool = False) -> None:
    """Stop before the first step where a training stack is not supported yet, rather than do half of what is meant.

    Args:
        trainer: Newly made, or about to train.
        callback: Which asks.
        ranks: Whether it can work in several processes, each with the whole model (DDP) or a shard of it (FSDP2).

    Raises:
        ModelError: Naming what to switch off.
    """
    args, parallel = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    reasons = {
        "several GPUs in one process (nn.DataParallel)": args.n_gpu > 1,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled and not ranks,
        "FSDP of the first version (set fsdp_version to 2)": trainer.is_fsdp_enabled and not _is_fsdp2(trainer),
        "several processes": args.world_size > 1 and not (ranks and (_is_ddp(trainer) or _is_fsdp2(trainer))),
        "torch_compile=True": bool(args.torch_compile),
        "tensor, context or sequence parallelism (a parallelism_config)": parallel is not None
        and parallel.total_size > 1,
        "auto_find_batch_size=True": bool(args.auto_find_batch_size),
    }
    if args.world_size > 1 and not (trainer.accelerator.even_batches or args.dataloader_drop_last):
        raise ModelError(
            "even_batches=False lets one process have batches left when another has none, and every step needs all of "
            "them. Leave even_batches on, or use dataloader_drop_last=True."
        )
    for what, present in reasons.items():
        if present:
            raise ModelError(
                f"{type(callback).__name__} does not support {what} yet. Run one process on one device without it."
            )


def _is_fsdp2(trainer: Trainer) -> bool:
    return trainer.is_fsdp_enabled and bool(getattr(trainer.accelerator, "is_fsdp2", False))


def _is_ddp(trainer: Trainer) -> bool:
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    return kind.startswith("MULTI_")
