"""Where the session meets a running trainer, and how it leaves again.

Three methods are wrapped on the trainer *instance* for the time of one ``train()``, and nothing else is replaced:

=======================  ==========================================================================================
``get_batch_samples``    shows every micro-batch of the optimiser step before its first forward: row keys are known,
                         and counts are exact under gradient accumulation
``training_step``        the span in which forward hooks listen on the model; they are gone when it returns or raises,
                         so no exception can leave one behind
``log``                  adds our numbers to the trainer's own record, so they reach its history and its trackers
=======================  ==========================================================================================

Before the training forward, rows that are due are measured (`measure.probe`). In it, hooks only look. When it is
over, the gate is set on the first tensor of this list that exists, all of which the row's loss flows through:

1. ``output.log_probs`` beside ``output.label_mask``: TRL's fused head;
2. what the output embedding returned: the loss is computed from logits, by the model or by the trainer;
3. ``output.logits`` of a model that has no output embedding;
4. the last hidden state, for a loss that is fused with the head and never shows logits. Exact for everything before
   the head; a trainable head is refused.

Where the head is frozen, as LoRA leaves it, the gate of 2. and 3. moves to the last hidden state as well: the same
gradients for all that is trained, and no second tensor of the size of the logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from safe_sched.errors import ModelError
from safe_sched.estimators.probe import row_scores
from safe_sched.rows.keys import IGNORE_INDEX
from safe_sched.rows.nll import label_log_probs, nll_from_log_probs
from safe_sched.scheduler import evidential, experts_of
from safe_sched.training.gate import scale_gradient, token_weights
from safe_sched.training.session import Batch, Session
from safe_sched_hf.distributed import telling
from safe_sched_hf.measure.features import RowFeatures
from safe_sched_hf.measure.probe import Probe, adapter_active, lines_log_probs
from safe_sched_hf.measure.refusals import Refusals
from safe_sched_hf.rows import batch_fields
from safe_sched_hf.sampling import Sampling
from safe_sched_hf.wrapping import Wrapping

_PAST = 64  # micro-batches whose tokens are kept


class Attachment(Wrapping):
    """A session bound to one ``train()`` of one trainer. Use `attach` and `detach`."""

    def __init__(
        self,
        trainer: Trainer,
        session: Session,
        probe: Probe | None = None,
        refusals: Refusals | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(trainer, {"get_batch_samples": self._get_batch_samples, "training_step": self._training_step})
        self.session = session
        self.probe = probe
        self.refusals = refusals
        self.sampling = sampling
        self.features = RowFeatures.wanted_by(session.scheduler, trainer.processing_class, trainer.args.device)
        self._sharded = bool(trainer.is_fsdp_enabled)  # every forward then takes all ranks
        self._queue: list[tuple[Batch, float] | None] = []  # None: an idle micro-batch
        self._seen: dict[str, Tensor] = {}
        self._moved: tuple[Tensor, Tensor | None] | None = None
        # micro-batches of the last steps, for a second look at rows that were measured in a time of noise
        self._past: deque[tuple[dict[str, Any], Batch]] = deque(maxlen=_PAST)

    # the wrapped methods ----------------------------------------------------------------------------------------

    def _get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        samples, num_items = original(*args, **kwargs)
        with telling(self.session.exchange):
            return samples, self._begin_step(samples, num_items)

    def _begin_step(self, samples: list[Any], num_items: Any) -> Any:
        ranks = self.session.exchange.ranks
        if samples or ranks > 1:
            turn = None if self.sampling is None else self.sampling.take(len(samples))
            idle = [False] * len(samples) if turn is None else turn.idle
            present = [inputs for inputs, nothing in zip(samples, idle, strict=True) if not nothing]
            if num_items is not None and len(present) < len(samples):
                num_items = self.trainer._get_num_items_in_batch(present, self.trainer.args.device)
            fields = [batch_fields(inputs) for inputs in present]
            stand_ins = [] if turn is None else [s for s, i in zip(turn.stand_ins, idle, strict=True) if not i]
            batches = self.session.begin_step(fields, stand_ins)
            rows = self.session.step_rows
            if self.sampling is not None and turn is not None:
                rows = turn.rows
                mean = "row" if self.session.normalizer == "row" else "batch" if num_items is None else "step"
                self.sampling.scale(turn, batches, mean, 0 if num_items is None else int(num_items))
                self.note({"safe_sched/rows_kept": turn.kept})
            # the mean that the trainer's loss takes: over the step, or over each micro-batch and then over those
            counts = [int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels, _ in fields]
            totals = [len(samples) * n for n in counts] if num_items is None else [int(num_items)] * len(counts)
            if num_items is None or not self.trainer.args.average_tokens_across_devices:
                totals = [ranks * total for total in totals]  # of one rank's tokens, and then over ranks
            queue = iter([(batch, total / max(rows, 1)) for batch, total in zip(batches, totals, strict=True)])
            self._queue = [None if nothing else next(queue) for nothing in idle]
        return num_items

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
        exchange = self.session.exchange
        try:
            self._moved = self._measure(batch, *args, **kwargs)
            with self._listening(batch, mean_tokens):
                return original(*args, **kwargs)
        except BaseException as error:
            if batch.observed is None and isinstance(error, Exception):
                exchange.fail(error)  # after their weights are known the others wait in the backward
            self.detach()  # nobody tells a callback that training has failed
            raise

    def attach(self) -> None:
        """Wrap the methods, and the batch sampler where rows are sampled."""
        super().attach()
        if self.sampling is not None:
            self.sampling.attach()

    def detach(self) -> None:
        """Give the trainer its own again; harmless when called twice."""
        super().detach()
        if self.sampling is not None:
            self.sampling.detach()

    def forget(self) -> None:
        """At a checkpoint, let go of what is not in it: this run and one that is resumed from it go on alike."""
        self._past.clear()
        if self.probe is not None:
            self.probe.forget()

    def aim(self) -> None:
        """Before an optimiser step, while gradients are empty: make ready to measure the rows that are due in it."""
        batches = [entry[0] for entry in self._queue if entry is not None]
        if self.refusals is not None:
            self.refusals.before_step(batches)
        if self.probe is not None:
            due = self._anything_doubtful() or any(bool(self._due(batch.slots_of_all).any()) for batch in batches)
            self.probe.aim(self.session.steps, due, batches)

    def _asked(self, slots: Tensor, question: str) -> Tensor:
        """A probed scheduler's answer for some slots: bool (any,), False for negative ones."""
        answer = torch.zeros_like(slots, dtype=torch.bool)
        teaches = slots >= 0
        for scheduler, state in evidential(self.session.scheduler, self.session.state, "probe"):
            answer[teaches] |= getattr(scheduler, question)(state, slots[teaches])
        return answer

    def _due(self, slots: Tensor) -> Tensor:
        return self._asked(slots, "due")

    def _anything_doubtful(self) -> bool:
        """Whether a past micro-batch is worth a second look; one question for all, as it is asked every step."""
        if not self._past:
            return False
        slots = torch.cat([batch.slots_of_all for _, batch in self._past])
        return bool(self._asked(slots, "doubtful").any())

    def _measure(
        self, batch: Batch, wrapped: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None] | None:
        """Run what the evidence needs of a micro-batch before its training forward.

        Whether anything is run, and so exchanged, is decided by the rows of all ranks; what is run, by one's own.
        """
        session, trainer = self.session, self.trainer
        model = trainer.model
        assert isinstance(model, nn.Module)
        named = [getattr(scheduler, "adapter", None) for scheduler, _ in experts_of(session.scheduler, session.state)]
        for reference in filter(None, named):
            if not bool(session.lack_reference(batch.slots_of_all).any()):
                continue
            lacking, nll = session.lacking_reference(batch), torch.zeros(batch.slots.numel())
            if self._sharded or bool(lacking.any()):
                with adapter_active(model, reference):
                    inputs = trainer._prepare_inputs(inputs)
                    found = lines_log_probs(model, trainer, inputs, batch, lacking, whole=self._sharded, train=False)
                nll = nll_from_log_probs(found, batch.labels.to(found.device), batch.layout)
            session.set_reference(batch, lacking, nll)
        if self.probe is None:
            return None
        self._look_again(model)
        if not bool(self._due(batch.slots_of_all).any()):
            return None
        due = self._due(batch.slots)
        self._past.append(({k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}, batch))
        runs = self._sharded or bool(due.any())
        return due, self.probe(trainer._prepare_inputs(inputs), batch, due) if runs else None

    def _look_again(self, model: nn.Module) -> None:
        """Measure the doubtful rows of one past micro-batch, both forwards now."""
        if not self._anything_doubtful():
            return
        assert self.probe is not None
        for inputs, batch in self._past:
            if bool(self._asked(batch.slots_of_all, "doubtful").any()):
                doubtful, scores = self._asked(batch.slots, "doubtful"), torch.zeros(batch.slots.numel())
                if self._sharded or bool(doubtful.any()):
                    inputs = self.trainer._prepare_inputs(inputs)
                    before = lines_log_probs(model, self.trainer, inputs, batch, doubtful, whole=self.probe.draws)
                    after = self.probe(inputs, batch, doubtful)
                    scores = row_scores(before, after, batch.labels, batch.layout).cpu()
                self.session.learn(batch.slots[doubtful], scores[doubtful], "probe")
                return

    # one forward ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _listening(self, batch: Batch, mean_tokens: float) -> Iterator[None]:
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        head, decoder = _output_embedding(model), _decoder(model)

        def remember(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                output = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
                if isinstance(output, Tensor) and output.requires_grad:
                    self._seen[name] = output

            return hook

        def after(module: nn.Module, args: Any, output: Any) -> None:
            seen, self._seen = self._seen, {}
            # a forward without gradient teaches nothing: metrics, generation in a callback
            if torch.is_grad_enabled() and module.training:
                self._set_gate(batch, mean_tokens, output, seen, head)

        handles = [model.register_forward_hook(after)]
        if head is not None:
            handles.append(head.register_forward_hook(remember("logits")))
        if decoder is not None and decoder is not model:
            handles.append(decoder.register_forward_hook(remember("hidden")))
        try:
            yield
        finally:
            self._seen = {}
            for handle in handles:
                handle.remove()

    def _set_gate(
        self, batch: Batch, mean_tokens: float, output: Any, seen: dict[str, Tensor], head: nn.Module | None
    ) -> None:
        session, labels, layout = self.session, batch.labels, batch.layout
        moved, self._moved = self._moved, None
        pending = None if self.refusals is None else self.refusals.pending(batch)
        needs_nll = session.scheduler.needs_nll or moved is not None or (pending is not None and pending.needs_nll)
        get: Callable[[str], Any] = lambda name: output.get(name) if isinstance(output, Mapping) else None  # noqa: E731
        log_probs, logits, per_token = get("log_probs"), seen.get("logits", get("logits")), None
        if log_probs is not None and get("label_mask") is not None:
            gated, length = log_probs, labels.shape[1] - 1
            if log_probs.shape == (labels.shape[0], length):
                per_token = log_probs.detach()  # a few numbers: worth looking for losses that are not finite
        elif logits is not None:
            gated, length = logits, labels.shape[1]
            if logits.shape[:2] == labels.shape:
                if needs_nll:
                    per_token = label_log_probs(logits, labels.to(logits.device), layout)
                if "hidden" in seen and head is not None and not _is_trained(head):
                    gated = seen["hidden"]
        elif "hidden" in seen and get("loss") is not None:
            gated, length = seen["hidden"], labels.shape[1]
            _refuse_fused(session.scheduler.name, needs_nll, head)
        else:
            returned = sorted(output) if isinstance(output, Mapping) else type(output).__name__
            raise ModelError(
                f"{type(self.trainer.model).__name__} returned {returned}, from which the loss of a row cannot be "
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
        nll = None if per_token is None else nll_from_log_probs(per_token, labels, layout)
        if moved is not None and per_token is not None:
            due, after = moved
            scores = torch.zeros(batch.slots.numel())
            if after is not None:
                scores = row_scores(per_token, after.to(per_token.device), labels, layout).cpu()
            session.learn(batch.slots[due], scores[due], "probe")
        if self.refusals is not None and pending is not None:
            logits_at = functools.partial(_logits_at, logits, seen.get("hidden"), head)
            self.refusals.after_forward(batch, nll, logits_at)
        features = None
        if self.features is not None:
            features = self.features(seen.get("hidden"), batch.input_ids, labels, layout, batch.slots)
        session.weigh(batch, nll, mean_tokens, features)

        def factors() -> Tensor:
            session.mark_gated(batch)
            return token_weights(batch.factors, layout)

        scale_gradient(gated, factors)


def _logits_at(
    logits: Tensor | None, hidden: Tensor | None, head: nn.Module | None, lines: Tensor, columns: Tensor
) -> Tensor:
    """Logits of a training forward at some places, from its last hidden state where it shows none."""
    if logits is not None:
        return logits[lines.to(logits.device), columns.to(logits.device)]
    if hidden is None or head is None:
        raise ModelError(
            'refusal_cost="first_token" reads logits or the last hidden state of the training forward, and this model '
            'shows neither; use refusal_cost="shared_prefix"'
        )
    with torch.no_grad():
        return head(hidden[lines.to(hidden.device), columns.to(hidden.device)])


_UNFUSE = (
    "Switch the fused loss off: loss_type='nll' in SFTConfig, use_liger_kernel=False, or "
    "fused_linear_cross_entropy=False in liger_kernel_config"
)


def _refuse_fused(scheduler: str, needs_nll: bool, head: nn.Module | None) -> None:
    if head is not None and _is_trained(head):
        raise ModelError(
            "the model's loss is fused with its output embedding (TRL's chunked loss, Liger, cut cross-entropy), and "
            "that embedding is being trained: the weights could not reach its gradient. "
            f"{_UNFUSE}; or freeze the embedding, as LoRA does."
        )
    if needs_nll:
        raise ModelError(
            "the model's loss is fused with its output embedding (TRL's chunked loss, Liger, cut cross-entropy), so "
            f"the loss of a single row is never computed, and {scheduler!r} needs it. {_UNFUSE}."
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _decoder(model: nn.Module) -> nn.Module | None:
    base = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
    decoder = getattr(base, getattr(base, "base_model_prefix", ""), None)
    return decoder if isinstance(decoder, nn.Module) else None
