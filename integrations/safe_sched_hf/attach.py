"""Where the session meets a running trainer, and how it leaves again.

A callback has no event between the last backward of an optimiser step and clipping, and none in which the trainer's log
record can be added to. So three methods are wrapped on the trainer *instance* for the time of one ``train()``, and
nothing else is replaced:

=======================  ==========================================================================================
``get_batch_samples``    shows every micro-batch of the optimiser step before its first forward: row keys are known,
                         and counts are exact under gradient accumulation
``training_step``        the span in which forward hooks listen on the model (`safe_sched.training.forward`); they are
                         gone when it returns or raises, so no exception can leave one behind
``log``                  adds our numbers to the trainer's own record, so they reach its history and its trackers
=======================  ==========================================================================================

A wrapper sleeps as soon as the trainer has begun another ``train()``, for nobody tells a callback that one failed;
`Wrapping.detach` gives the trainer its own methods back. Everything else is an event of `safe_sched.training.loop`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import Trainer

from safe_sched.errors import ModelError
from safe_sched.rows.keys import IGNORE_INDEX, batch_fields
from safe_sched.training.forward import Forward, listening
from safe_sched.training.loop import Company, Part, Run
from safe_sched.training.session import Batch
from safe_sched_hf.distributed import telling

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


def refuse_sharded(parts: Iterable[Part]) -> None:
    """Refuse what needs the whole model on every rank, where FSDP shards it.

    Args:
        parts: All that would take part in the run.

    Raises:
        ModelError: Naming what to use instead.
    """
    for part in parts:
        if part.unsharded:
            raise ModelError(
                f"SafeSchedCallback does not support {part.unsharded}, where FSDP shards the model. Use DDP, or BDS() "
                "or NeuralBDS() without it."
            )


def _is_fsdp2(trainer: Trainer) -> bool:
    return trainer.is_fsdp_enabled and bool(getattr(trainer.accelerator, "is_fsdp2", False))


def _is_ddp(trainer: Trainer) -> bool:
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    return kind.startswith("MULTI_")


class Attachment(Wrapping):
    """A run bound to one ``train()`` of one trainer. Use `attach` and `detach`.

    Args:
        trainer: In the ``train()`` that this is to last for.
        run: The run.
        company: All that take part in it, after their `begin`.
    """

    def __init__(self, trainer: Trainer, run: Run, company: Company) -> None:
        super().__init__(trainer, {"get_batch_samples": self._get_batch_samples, "training_step": self._training_step})
        self.run, self.company, self.session = run, company, run.session
        self._queue: list[tuple[Batch, float] | None] = []  # None: an idle micro-batch

    def attach(self) -> None:
        """Wrap the methods, and let everyone who takes part do as much."""
        super().attach()
        self.company.each("attach")

    def detach(self) -> None:
        """Give the trainer its own again; harmless when called twice."""
        super().detach()
        self.company.each("end")

    def before_step(self) -> None:
        """Before an optimiser step, while gradients are empty."""
        self.company.each("before_step", [entry[0] for entry in self._queue if entry is not None])

    # the wrapped methods ----------------------------------------------------------------------------------------

    def _get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        samples, num_items = original(*args, **kwargs)
        with telling(self.session.exchange):
            return samples, self._begin_step(samples, num_items)

    def _begin_step(self, samples: list[Any], num_items: Any) -> Any:
        ranks = self.session.exchange.ranks
        if samples or ranks > 1:
            chosen = self.company.choose(len(samples))
            idle = [False] * len(samples) if chosen is None else chosen[1].idle
            present = [inputs for inputs, nothing in zip(samples, idle, strict=True) if not nothing]
            if num_items is not None and len(present) < len(samples):
                num_items = self.trainer._get_num_items_in_batch(present, self.trainer.args.device)
            fields = [batch_fields(inputs) for inputs in present]
            rows, batches = self._identify(fields, num_items, chosen, idle)
            # the mean that the trainer's loss takes: over the step, or over each micro-batch and then over those
            counts = [int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels, _ in fields]
            totals = [len(samples) * n for n in counts] if num_items is None else [int(num_items)] * len(counts)
            if num_items is None or not self.trainer.args.average_tokens_across_devices:
                totals = [ranks * total for total in totals]  # of one rank's tokens, and then over ranks
            queue = iter([(batch, total / max(rows, 1)) for batch, total in zip(batches, totals, strict=True)])
            self._queue = [None if nothing else next(queue) for nothing in idle]
        return num_items

    def _identify(self, fields: list[Any], num_items: Any, chosen: Any, idle: list[bool]) -> tuple[int, list[Batch]]:
        """How many rows of the step teach, and its micro-batches with what their rows are scaled by."""
        if chosen is None:
            batches = self.session.begin_step(fields)
            return self.session.step_rows, batches
        part, choice = chosen
        stand_ins = [stands_in for stands_in, nothing in zip(choice.stand_ins, idle, strict=True) if not nothing]
        batches = self.session.begin_step(fields, stand_ins)
        mean = "row" if self.session.normalizer == "row" else "batch" if num_items is None else "step"
        part.scale(choice, batches, mean, 0 if num_items is None else int(num_items))
        self.note({"safe_sched/rows_kept": choice.kept})
        return choice.rows, batches

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._queue:
            raise ModelError(
                f"{type(self.trainer).__name__} runs a training step on a batch that did not come through "
                "get_batch_samples, so its rows are not known. Trainers that make their own batches are not supported."
            )
        entry = self._queue.pop(0)
        if entry is None:
            return torch.zeros((), device=self.trainer.args.device)
        batch, mean_tokens = entry

        def heard(forward: Forward) -> None:
            self.company.after_forward(batch, forward, mean_tokens)

        try:
            self._before_forward(batch, *args, **kwargs)
            with listening(self.run.model, batch, self.session.scheduler.name, heard):
                return original(*args, **kwargs)
        except BaseException as error:
            if batch.observed is None and isinstance(error, Exception):
                self.session.exchange.fail(error)  # after their weights are known the others wait in the backward
            self.detach()  # nobody tells a callback that training has failed
            raise

    def _before_forward(self, batch: Batch, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.company.each("before_forward", batch, inputs)
