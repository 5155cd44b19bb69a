"""Forwards that safe-sched adds for its evidence: the direction of the probe, and losses of rows that are due.

All of them run before a micro-batch's training forward, without hooks on the model, and leave parameters, gradients
and random numbers as they were.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safe_sched.errors import DataError, ModelError
from safe_sched.estimators.probe import Direction, Opening, opening_of, refusal_margin, row_scores
from safe_sched.needs import Probe, ReferenceLoss
from safe_sched.rows.keys import IGNORE_INDEX, Layout, label_positions
from safe_sched.rows.nll import label_log_probs, nll_from_log_probs
from safe_sched.training.forward import Forward
from safe_sched.training.loop import Measurement, Run
from safe_sched.training.session import Batch
from safe_sched_hf.distributed import ShardedDirection, of_all, reshard
from safe_sched_hf.safety import SafetySet, has_fused_head, pad_rows

REFRESH = 12
"""Optimiser steps after which the direction is found again, as parameters move; later, a quarter of all steps."""

_PAST = 64  # micro-batches whose tokens are kept
_ROWS = 32  # safety rows that the direction is a mean over
_AT_ONCE = 16
_REFUSALS = (
    *("I'm sorry.", "I can't.", "Sorry, no.", "No, I won't.", "Unfortunately, no.", "My answer is no."),
    *("That would be harmful.", "This is not something I can do."),
)
_KEPT = 200  # optimiser steps without a row to measure, after which the direction's memory is given back


class ProbeMeasurement(Measurement[Probe]):
    """Measures what rows lose when the model refuses more; see `safe_sched.estimators.probe`."""

    safety = "required"

    def begin(self, run: Run) -> None:
        """See `Part.begin`.

        Raises:
            DataError: The safety rows are whole texts, so there is no prompt before an answer.
        """
        super().begin(run)
        safety = self.safety_rows
        self.rows = safety.rows
        self.tokenizer, self.chat = safety.tokenizer, safety.chat
        self._opening: Opening | None = None
        if any(int(labels[0]) != IGNORE_INDEX for _, labels in self.rows):
            raise DataError(
                'evidence="probe" looks at where a prompt ends and its refusal begins, and a safety row has no prompt '
                "before its labels. Give safety_data as prompt and completion, or as messages; or use "
                'evidence="reference".'
            )
        self.pad = safety.pad
        self._direction: Direction | ShardedDirection | None = None
        self._found_at = 0
        self._used_at = 0
        # of a sharded model every rank runs the same forwards, so none may be left out for want of lines
        self.draws: bool = draws_random_numbers(run.model) or run.sharded
        # micro-batches of the last steps, for a second look at rows that were measured in a time of noise
        self._past: deque[tuple[dict[str, Any], Batch]] = deque(maxlen=_PAST)
        self._moved: tuple[Tensor, Tensor | None] | None = None

    # events -----------------------------------------------------------------------------------------------------

    def before_step(self, batches: Sequence[Batch]) -> None:
        """Find the direction where rows are due, or let it go where none has been for long."""
        step = self.run.step
        if not (self._anything_doubtful() or any(bool(self._due(batch.slots_of_all).any()) for batch in batches)):
            if step - self._used_at > _KEPT:
                self._direction = None
            return
        self._used_at = step
        if self._direction is None or step - self._found_at >= max(REFRESH, step // 4):
            self._direction = None  # its memory first
            if self._opening is None:
                # what of an answer is the chat template's
                mine = [answer for batch in batches for answer in _answers(batch)]
                self._opening = self._find_opening(of_all(self.run.exchange, "answers", mine))
            self._direction = self._find(self._opening)
            self._found_at = step

    def before_forward(self, batch: Batch, inputs: Mapping[str, Any]) -> None:
        """Measure the rows that are due with the parameters moved.

        Whether anything is run, and so exchanged, is decided by the rows of all ranks; what is run, by one's own.
        """
        self._moved = None
        self._look_again()
        if not bool(self._due(batch.slots_of_all).any()):
            return
        due = self._due(batch.slots)
        self._past.append(({k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}, batch))
        runs = self.run.sharded or bool(due.any())
        self._moved = due, self(self.run.prepare(inputs), batch, due) if runs else None

    def after_forward(self, batch: Batch, forward: Forward) -> None:
        """Compare with the training forward itself."""
        moved, self._moved = self._moved, None
        if moved is None:
            return
        due, after = moved
        scores = torch.zeros(batch.slots.numel())
        if after is not None:
            here = forward.log_probs
            scores = row_scores(here, after.to(here.device), batch.labels, batch.layout).cpu()
        self.run.session.learn(self.name, batch.slots[due], scores[due])

    def forget(self) -> None:
        """Find everything anew where it is needed next: a run that is resumed here has nothing else to go by."""
        self._past.clear()
        self._direction = self._opening = None

    def _due(self, slots: Tensor) -> Tensor:
        return self.run.session.due(self.name, slots)

    def _anything_doubtful(self) -> bool:
        """Whether a past micro-batch is worth a second look; one question for all, as it is asked every step."""
        if not self._past:
            return False
        slots = torch.cat([batch.slots_of_all for _, batch in self._past])
        return bool(self.run.session.doubtful(self.name, slots).any())

    def _look_again(self) -> None:
        """Measure the doubtful rows of one past micro-batch, both forwards now."""
        if not self._anything_doubtful():
            return
        run, session = self.run, self.run.session
        for inputs, batch in self._past:
            if bool(session.doubtful(self.name, batch.slots_of_all).any()):
                doubtful, scores = session.doubtful(self.name, batch.slots), torch.zeros(batch.slots.numel())
                if run.sharded or bool(doubtful.any()):
                    prepared = run.prepare(inputs)
                    before = lines_log_probs(run, prepared, batch, doubtful, whole=self.draws)
                    after = self(prepared, batch, doubtful)
                    scores = row_scores(before, after, batch.labels, batch.layout).cpu()
                session.learn(self.name, batch.slots[doubtful], scores[doubtful])
                return

    # the direction ----------------------------------------------------------------------------------------------

    def _find_opening(self, others: list[Tensor]) -> Opening:
        """Where the safety rows begin to refuse, with other ways to open a refusal in English beside theirs.

        A few safety rows do not show all the ways in which the model refuses, and what it says instead of *their*
        openings may be another refusal.
        """
        whole = opening_of(self.rows, others)
        tokens = [whole.tokens]
        if self.tokenizer is not None:
            known = [{"prompt": "Hello", "completion": text} for text in _REFUSALS]
            more = opening_of(SafetySet(known, self.tokenizer, None, 1, 0, self.chat).rows, others).tokens
            # a tokenizer without English writes them all as one unknown token
            tokens.append(more[more != (-1 if self.tokenizer.unk_token_id is None else self.tokenizer.unk_token_id)])
        return Opening(whole.prompts[:: max(1, len(self.rows) // _ROWS)][:_ROWS], torch.unique(torch.cat(tokens)))

    def _find(self, opening: Opening) -> Direction | ShardedDirection:
        model, prompts = self.run.model, opening.prompts
        reshard(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        training = [module for module in model.modules() if module.training]
        model.eval()  # the direction must not depend on dropout
        try:
            for start in range(0, len(prompts), _AT_ONCE):
                part = prompts[start : start + _AT_ONCE]
                ids, mask = (x.to(self.run.device) for x in pad_rows(part, self.pad))
                with self.run.precision():
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                    last = logits[torch.arange(len(part), device=logits.device), mask.sum(1) - 1]
                    margin = refusal_margin(last, opening.tokens).sum() / len(prompts)
                margin.backward()
            gradients = [p.grad for p in parameters]
            if self.run.sharded:
                return ShardedDirection(model, parameters, gradients, self.run.exchange)
            return Direction(parameters, gradients)
        finally:
            for module in training:
                module.training = True
            for p, gradient in zip(parameters, kept, strict=True):
                p.grad = gradient

    def __call__(self, inputs: Mapping[str, Any], batch: Batch, due: Tensor) -> Tensor:
        """Log-probabilities of a micro-batch's label tokens with the parameters moved.

        Args:
            inputs: The micro-batch, prepared.
            batch: What the session knows of it.
            due: bool (rows,), the rows to measure.

        Returns:
            float32 (batch, sequence - 1); NaN on lines that were not run.
        """
        if self._direction is None:
            raise ModelError("a row is due for a probe in a step for which no direction was found; please report this")
        with self._direction.taken():
            return lines_log_probs(self.run, inputs, batch, due, whole=self.draws)


def lines_log_probs(
    run: Run,
    inputs: Mapping[str, Any],
    batch: Batch,
    due: Tensor,
    *,
    whole: bool = False,
    train: bool = True,
) -> Tensor:
    """Log-probabilities of the label tokens on those lines of a micro-batch that hold rows which are due.

    Args:
        run: Whose model is asked, as it is now.
        inputs: The micro-batch, prepared.
        batch: Its labels and layout.
        due: bool (rows,).
        whole: Run all lines: with dropout, so that both forwards of the step draw the same masks.
        train: In the mode in which the model trains, not in that in which it is evaluated.

    Returns:
        float32 (batch, sequence - 1); NaN on lines that were not run.
    """
    labels, layout = batch.labels, batch.layout
    rows = torch.cat([due.to(layout.row.device), due.new_zeros(1, device=layout.row.device)])
    lines = rows[layout.row].any(1).nonzero().flatten()
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if whole or any(value.shape[0] != labels.shape[0] for value in tensors.values()):
        lines = torch.arange(labels.shape[0], device=lines.device)
    if lines.numel() < labels.shape[0]:
        inputs = {name: value[lines.to(value.device)] if name in tensors else value for name, value in inputs.items()}
    part = Layout(layout.row[lines], layout.position[lines], layout.rows, layout.packed)
    model = run.model
    with _in_mode(model, train), torch.no_grad(), _quiet_checkpoints(), same_random_numbers(), run.precision():
        if has_fused_head(model):
            found = model(**{**inputs, "use_cache": False}, fused_lm_head=True).log_probs
        else:
            asked = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
            logits = model(**asked, use_cache=False).logits
            found = label_log_probs(logits, labels[lines].to(logits.device), part)
    result = torch.full((labels.shape[0], labels.shape[1] - 1), torch.nan, device=found.device)
    result[lines.to(found.device)] = found.float()
    return result


class ReferenceLossMeasurement(Measurement[ReferenceLoss]):
    """Measures losses under another adapter of the model, once per row."""

    unsharded = "a reference adapter, which is switched on for some rows"

    def before_forward(self, batch: Batch, inputs: Mapping[str, Any]) -> None:
        """Measure the rows that have no reference loss yet."""
        learn_losses_under(self.need.adapter, self, batch, inputs)


def learn_losses_under(adapter: str, measurement: Measurement[Any], batch: Batch, inputs: Mapping[str, Any]) -> None:
    """Measure the rows that are due under another adapter of the model, and tell the scheduler their losses.

    The forward has no gradient and no dropout, and leaves random numbers, modes and the active adapter as they were. Of
    several ranks each measures its own rows.

    Args:
        adapter: The name of a PEFT adapter of the model.
        measurement: Whose need it is, in its ``before_forward``.
        batch: What the session knows of the micro-batch.
        inputs: The micro-batch.

    Raises:
        ModelError: The model has no such adapter.
    """
    run, need = measurement.run, measurement.name
    session = run.session
    if not bool(session.due(need, batch.slots_of_all).any()):
        return
    due, nll = session.due(need, batch.slots), torch.zeros(batch.slots.numel())
    if run.sharded or bool(due.any()):
        with adapter_active(run.model, adapter):
            found = lines_log_probs(run, run.prepare(inputs), batch, due, whole=run.sharded, train=False)
        nll = nll_from_log_probs(found, batch.labels.to(found.device), batch.layout)
    session.learn(need, batch.slots[due], nll[due.to(nll.device)])


def _answers(batch: Batch) -> list[Tensor]:
    """The labelled tokens of every row of a micro-batch."""
    counted = label_positions(batch.labels, batch.layout)
    rows, tokens = batch.layout.row[counted].cpu(), batch.labels[counted].cpu()
    return [tokens[rows == row] for row in torch.unique(rows)]


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a training forward depends on random numbers, as far as its modules tell."""
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    config = getattr(model, "config", None)
    rates = {} if config is None else vars(config)
    return dropout or any(isinstance(rate, float) and rate > 0 for name, rate in rates.items() if "drop" in name)


@contextlib.contextmanager
def adapter_active(model: nn.Module, name: str) -> Iterator[None]:
    """Have another PEFT adapter in place for a while; what is trainable stays as it was.

    Raises:
        ModelError: The model has no such adapter.
    """
    known = list(getattr(model, "peft_config", {}))
    if name not in known:
        raise ModelError(
            f"the scheduler asks for the adapter {name!r}; the model has {known}. Load it with "
            f'model.load_adapter(FOLDER, adapter_name="{name}") before training.'
        )
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    active: Any = model.active_adapter
    switch: Any = model.set_adapter
    try:
        switch(name)
        yield
    finally:
        switch(active)
        for p, flag in trainable:
            p.requires_grad_(flag)


@contextlib.contextmanager
def _in_mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Have a model in training or in evaluation mode for a while; every module goes back to its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _quiet_checkpoints() -> Iterator[None]:
    """Reentrant gradient checkpointing warns of a forward without gradient, which is what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True", category=UserWarning)
        yield


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave torch's generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield
