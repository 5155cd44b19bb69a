"""Safety rows: from any schema that TRL takes to token rows, and from those to the batch of an optimiser step.

A safety row only defends the format it is written in, so plain prompts and completions are put into the chat template
where the training rows are chats; where they are plain too, they stay as they are.

The loss of a safety row is taken on its answer: on the completion, on the last assistant turn of a conversation, on
the given labels; a plain text is trained on as a whole. The loss of a batch S is the mean over rows of row means::

    L_safe = (1/|S|) sum_{i in S} nll_i
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safe_sched.data.rows import read_rows
from safe_sched.errors import DataError, NumericsError
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import IGNORE_INDEX, keys_of_flat
from safe_sched.training.loop import Part, Run
from safe_sched.training.session import Batch

SafetyData = str | Path | Iterable[Mapping[str, Any]]
_SCHEMAS = "messages; conversations; prompt and completion; text; input_ids (with labels)"
_ROLES = {"human": "user", "gpt": "assistant"}


class SafetySet:
    """Token rows of a safety set, and the batch of every step.

    Args:
        data: The rows, or where they are; see `safe_sched.data.rows.read_rows`.
        tokenizer: The trainer's tokenizer or processor; needed unless the rows are token rows.
        max_length: Rows are cut to this many tokens, as the trainer cuts its own; None to keep them whole.
        batch_size: Rows per optimiser step, on all ranks together.
        seed: Of the order in which rows are drawn: each row once per round, rounds shuffled anew.
        chat: Whether plain prompts and completions become conversations; see `are_chats`.

    Raises:
        DataError: A row has no schema that is known or no answer token, or there are no rows.
    """

    def __init__(
        self,
        data: SafetyData,
        tokenizer: Any,
        max_length: int | None,
        batch_size: int,
        seed: int,
        chat: bool = False,
    ) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer
        rows = read_rows(data)
        if chat:
            rows = [_as_chat(row) for row in rows]
        self.rows: list[tuple[Tensor, Tensor]] = []
        for number, row in enumerate(rows):
            tokens, labels = _tokenize(row, number, tokenizer)
            tokens, labels = tokens[:max_length], labels[:max_length]
            if not any(label != IGNORE_INDEX for label in labels[1:]):
                raise DataError(
                    f"safety row {number} has no answer token to learn from"
                    + (f" within max_length={max_length}" if max_length else "")
                    + f": {str(row)[:120]}. Remove it, or give it an answer that fits."
                )
            self.rows.append((torch.tensor(tokens), torch.tensor(labels)))
        self.pad = getattr(tokenizer, "pad_token_id", None) or 0  # masked, so any id will do
        self.batch_size = batch_size
        self.seed = seed
        self.tokenizer, self.chat = tokenizer, chat

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of one optimiser step, padded on the right: a function of (seed, step), so a resume replays it.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, int64 (batch_size, longest row).
        """
        return self._padded(self._picked(step))

    def share(self, step: int, rank: int, ranks: int) -> tuple[dict[str, Tensor], int]:
        """What one of several ranks takes of `batch`, and how many rows that is.

        Where there are fewer rows than ranks, a rank without any gets one that does not count, so that all ranks run
        the model alike.
        """
        picked = self._picked(step)
        mine = picked[rank::ranks]
        return self._padded(mine or picked[:1]), len(mine)

    def _picked(self, step: int) -> list[tuple[Tensor, Tensor]]:
        first, count = step * self.batch_size, len(self.rows)
        return [self.rows[self._round(i // count)[i % count]] for i in range(first, first + self.batch_size)]

    def _padded(self, picked: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        ids, mask = pad_rows([tokens for tokens, _ in picked], self.pad)
        labels, _ = pad_rows([labels for _, labels in picked], IGNORE_INDEX)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def fingerprint(self) -> str:
        """A name for the rows, whatever their order; see `safe_sched.rows.index.RowIndex.fingerprint`."""
        tokens, labels = (torch.cat(column) for column in zip(*self.rows, strict=True))
        lengths = torch.tensor([row.numel() for row, _ in self.rows])
        return RowIndex(keys_of_flat(tokens, labels, lengths)[0]).fingerprint()

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the saved one, as plain JSON values."""
        return {"fingerprint": self.fingerprint(), "batch_size": self.batch_size, "seed": self.seed}

    def _round(self, number: int) -> list[int]:
        # torch.Generator spreads seeds badly when they differ in few bits: mix round and seed first
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) & 0x7FFF_FFFF_FFFF_FFFF)
        return torch.randperm(len(self.rows), generator=generator).tolist()


def pad_rows(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths side by side, padded on the right.

    Args:
        rows: int64 (tokens,) each.
        pad: What to pad with.

    Returns:
        The rows and their attention mask, int64 (rows, longest).
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
    lengths = torch.tensor([row.numel() for row in rows])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()


def safety_loss(model: nn.Module, batch: dict[str, Tensor], wrapped: nn.Module | None = None) -> Tensor:
    """``L_safe`` of a batch, through TRL's fused head where the model has been given one.

    Args:
        model: The trainer's own model.
        batch: From `SafetySet.batch`, on the model's device.
        wrapped: What to run in its place.

    Returns:
        A scalar with gradient, in nats per token.
    """
    labels = batch["labels"][:, 1:]
    run = model if wrapped is None else wrapped
    if has_fused_head(model):
        per_token = -run(**batch, fused_lm_head=True).log_probs
    else:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = run(**inputs, use_cache=False).logits[:, :-1]
        per_token = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX
        )
    counted = (labels != IGNORE_INDEX).to(per_token.dtype)
    return ((per_token * counted).sum(1) / counted.sum(1)).mean()


def backward_safety_share(run: Run, safety: SafetySet, number: int, when: str, *, reduce: bool = False) -> float:
    """Add the gradient of ``run.safety_weight * L_safe`` to the model's; of several ranks, each its share of it.

    Ranks average their gradients, and each has only its own rows of the batch S, so its mean over them counts
    ``ranks * rows / |S|`` times.

    Args:
        run: Whose model, autocast, gradient scale and device are used.
        safety: Whose batch it is.
        number: Which batch.
        when: In which step, for the message.
        reduce: Whether the ranks are to average their gradients in this backward; otherwise they join the next one that
            does.

    Returns:
        ``L_safe`` of the whole batch, in nats per token.

    Raises:
        NumericsError: The loss is not finite.
    """
    exchange = run.exchange
    batch, rows = safety.share(number, exchange.rank, exchange.ranks)
    counts = exchange.ranks * rows / safety.batch_size
    value = backward_safety_loss(run, batch, run.safety_weight * counts, when, reduce=reduce)
    said = exchange("safety loss", torch.tensor([value * rows], dtype=torch.float64))
    return value if exchange.ranks == 1 else sum(float(total) for (total,) in said) / safety.batch_size


def backward_safety_loss(
    run: Run, batch: dict[str, Tensor], weight: float, when: str, *, reduce: bool = False
) -> float:
    """Add the gradient of ``weight * L_safe`` to the model's, as the trainer runs forwards and backwards.

    Args:
        run: Whose model, autocast, gradient scale and device are used.
        batch: From `SafetySet.batch`.
        weight: Factor of the loss.
        when: In which step, for the message.
        reduce: Whether ranks are to average their gradients in this backward.

    Returns:
        ``L_safe``, in nats per token.

    Raises:
        NumericsError: The loss is not finite.
    """
    model = run.model
    model.train()
    batch = {name: value.to(run.device) for name, value in batch.items()}
    with run.precision():
        loss = safety_loss(model, batch, run.wrapped if reduce else model)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericsError(
            f"the safety loss is {value} {when}. Lower the learning rate or safety_weight, or train in bfloat16 or "
            "float32 instead of float16."
        )
    run.backward(weight * loss)
    return value


class SafetyBatch(Part):
    """Trains on a batch of safety rows in every optimiser step, beside the user's: adds ``safety_weight * L_safe``."""

    name = "safety_batch"

    def before_step(self, batches: Sequence[Batch]) -> None:
        """Gradients are empty now, so those of the user's micro-batches add to these."""
        run, step = self.run, self.run.step
        loss = backward_safety_share(run, run.safety, step, f"at step {step}")
        run.session.note({"safety_loss": loss})


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL has given the model a head that computes log-probabilities without logits."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
    # accelerate keeps what it wrapped for mixed precision
    forward = vars(base).get("_original_forward") or vars(base).get("forward")
    if forward is None:
        return False
    return "fused_lm_head" in inspect.signature(getattr(forward, "__func__", forward), follow_wrapped=False).parameters


def are_chats(rows: Iterable[Sequence[int]], tokenizer: Any) -> bool:
    """Whether token rows were written by the tokenizer's chat template: whether half of them hold its assistant mark.

    Args:
        rows: Some training rows, as token ids.
        tokenizer: The trainer's tokenizer or processor.
    """
    mark = assistant_mark(tokenizer)
    if mark is None:
        return False
    if not mark:
        return True  # a template without a mark to look for: better a chat too many than a format that is not used

    def holds(row: Sequence[int]) -> bool:
        ids = list(row)
        return any(ids[i : i + len(mark)] == mark for i in range(len(ids)))

    found = [holds(row) for row in rows]
    return 2 * sum(found) >= len(found)  # a row that was cut may have lost its mark


def assistant_mark(tokenizer: Any) -> list[int] | None:
    """The tokens with which a chat template opens an assistant's turn.

    Args:
        tokenizer: A tokenizer or a processor.

    Returns:
        Their ids; none where the template has no such mark; None where there is no template.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": "Hello"}]
    without, with_mark = (
        tokenizer.apply_chat_template(turn, add_generation_prompt=asked, return_dict=True)["input_ids"]
        for asked in (False, True)
    )
    return with_mark[len(without) :] if with_mark[: len(without)] == without else []


def _as_chat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("completion"), str):
        return row
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def _tokenize(row: Mapping[str, Any], number: int, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens and labels of one row."""
    if "input_ids" in row:
        tokens = list(row["input_ids"])
        return tokens, list(row.get("labels", tokens))
    if tokenizer is None:
        raise DataError("the safety rows are text, and the trainer has no tokenizer: give it processing_class=...")
    if "text" in row:
        tokens = tokenizer(_with_end(row["text"], tokenizer))["input_ids"]
        return tokens, tokens
    prompt, completion = prompt_and_completion(row, number)
    if isinstance(prompt, str):
        start = tokenizer(prompt)["input_ids"]
        tokens = tokenizer(prompt + _with_end(completion, tokenizer))["input_ids"]
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"safety row {number} is a conversation, and the tokenizer has no chat template; give plain prompt and "
                "completion texts, or set tokenizer.chat_template"
            )
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        tokens = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
    # the answer starts where the two part: tokens may merge across the boundary
    same = next(
        (i for i, (a, b) in enumerate(zip(start, tokens, strict=False)) if a != b), min(len(start), len(tokens))
    )
    return tokens, [IGNORE_INDEX] * same + tokens[same:]


def prompt_and_completion(row: Mapping[str, Any], number: int) -> tuple[Any, Any]:
    """What is asked, and the answer: of a conversation, all before its last assistant turn, and that turn.

    Raises:
        DataError: The row has neither, or no assistant turn.
    """
    if "prompt" in row and "completion" in row:
        return row["prompt"], row["completion"]
    turns = row.get("messages") or row.get("conversations")
    if not turns:
        raise DataError(f"safety row {number} has the fields {sorted(row)}; allowed: {_SCHEMAS}")
    turns = [
        turn if "role" in turn else {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in turns
    ]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise DataError(
            f"safety row {number} is a conversation without an assistant turn, so it has no answer to learn"
        )
    return turns[: answers[-1]], turns[answers[-1] : answers[-1] + 1]


def _with_end(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end
