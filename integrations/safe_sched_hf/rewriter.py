"""A chat model on this machine as a text generator, for `safe_sched.mixing.rewriting.rewrite`.

The requests of a call run as one batch, padded on the left. Every request has its own random numbers, from its own
seed: with Gumbel noise g, the likeliest token of ``log p + g`` is a sample of p. So a reply does not depend on what it
was batched with (but for rounding), and the random numbers of torch stay as they were.

Code that comes with a model is never run. With the folder of a model the network is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from safe_sched.errors import ModelError, OptionError
from safe_sched.generation import LocalModel, TextReply, TextRequest


class ChatModel:
    """See `safe_sched.generation.TextGenerator`; the model is loaded at the first request.

    Args:
        request: Which model, and how it is sampled.

    Raises:
        OptionError: The folder or the device is not there.
    """

    price_per_million: tuple[float, float] | None = None

    def __init__(self, request: LocalModel) -> None:
        self._asked = request
        folder = Path(request.model).expanduser()
        self._folder = folder if folder.is_dir() else None
        if self._folder is None and (request.model.startswith((".", "/", "~")) or request.model.count("/") > 1):
            raise OptionError(
                f"no folder {request.model}; give the folder of a model, or a hub name such as owner/model"
            )
        if request.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("device='cuda', and torch finds no GPU; use device='cpu', or a torch that has CUDA")
        gpu = request.device == "cuda" or (request.device == "auto" and torch.cuda.is_available())
        self._device = torch.device("cuda" if gpu else "cpu")

    @property
    def identity(self) -> Mapping[str, object]:
        """Of a folder, its small files, and sizes and times of its large ones, wherever it lies."""
        asked = self._asked
        return {"model": self._name, "temperature": asked.temperature, "top_p": asked.top_p, "dtype": asked.dtype}

    @cached_property
    def _name(self) -> str:
        if self._folder is None:
            return self._asked.model
        digest = hashlib.sha256()
        for path in sorted(path for path in self._folder.iterdir() if path.is_file()):
            status = path.stat()
            small = path.suffix in (".json", ".jinja", ".txt") and status.st_size < 1 << 26
            digest.update(f"{path.name}\0{status.st_size}\0{0 if small else status.st_mtime_ns}\0".encode())
            digest.update(path.read_bytes() if small else b"")
        return digest.hexdigest()

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextReply]]:
        """See `safe_sched.generation.TextGenerator.generate`.

        Raises:
            ModelError: The model cannot be loaded or run, or is no chat model.
        """
        model, tokenizer = self._loaded
        longest = getattr(model.config, "max_position_embeddings", None)
        fitting: list[tuple[int, list[int]]] = []
        for number, request in enumerate(requests):
            # the JSON of the data has no "<"; whatever else the template would read as a mark of its own is not sent
            if any(mark in request.data for mark in tokenizer.all_special_tokens):
                yield number, TextReply(None, "it holds a mark of the model's own")
                continue
            ids = self._encode(tokenizer, request)
            if longest is not None and len(ids) + request.max_tokens > longest:
                yield number, TextReply(None, "it is too long for the model", len(ids), 0)
                continue
            fitting.append((number, ids))
        waiting = [fitting]
        while waiting:
            batch = waiting.pop()
            if not batch:
                continue
            try:
                replies = self._run(model, tokenizer, [(requests[number], ids) for number, ids in batch])
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise ModelError(
                        f"out of memory on a prompt of {len(batch[0][1])} tokens: use a smaller model, bfloat16, fewer "
                        "shots, or a smaller max_tokens"
                    ) from error
                middle = len(batch) // 2
                waiting += [batch[middle:], batch[:middle]]
                continue
            yield from zip((number for number, _ in batch), replies, strict=True)

    def _encode(self, tokenizer: Any, request: TextRequest) -> list[int]:
        turns = request.messages
        together = [{"role": "user", "content": "\n\n".join(turn["content"] for turn in turns)}]
        for chat in (turns, together):  # some templates have no system turn
            with contextlib.suppress(jinja2.TemplateError):
                text = tokenizer.apply_chat_template(
                    chat,
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,  # where a template knows it: the reply is short
                )
                if request.data in text:  # and some leave it out
                    return tokenizer(text, add_special_tokens=False)["input_ids"]
        raise ModelError(
            f"{self._asked.model}: its chat template takes neither a system and a user turn nor a user turn alone. "
            "Give another chat model."
        )

    @torch.inference_mode()
    def _run(self, model: Any, tokenizer: Any, batch: list[tuple[TextRequest, list[int]]]) -> list[TextReply]:
        width = max(len(ids) for _, ids in batch)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id will do
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for _, ids in batch], device=self._device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in batch], device=self._device)
        ends = _ends(model, tokenizer)
        sampler = _Sampler([request.seed for request, _ in batch], self._asked, self._device)
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max(request.max_tokens for request, _ in batch),
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=ends or None,
                temperature=1.0,
                top_p=1.0,
                top_k=50,
            ),
            logits_processor=LogitsProcessorList([sampler] if self._asked.temperature else []),
        )
        replies = []
        for (request, prompt), row in zip(batch, made[:, width:].tolist(), strict=True):
            size = next((i for i, token in enumerate(row) if token in ends), len(row))
            ended = size < len(row) and size <= request.max_tokens
            text = tokenizer.decode(row[:size], skip_special_tokens=True)
            problem = None if ended else "the reply is longer than max_tokens"
            replies.append(TextReply(text if ended else None, problem, len(prompt), min(size + 1, request.max_tokens)))
        return replies

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        name = self._asked.model
        source: Any = name if self._folder is None else str(self._folder)
        how: dict[str, Any] = {"trust_remote_code": False, "local_files_only": self._folder is not None}
        dtype = "auto" if self._asked.dtype == "auto" else getattr(torch, self._asked.dtype)
        with _no_bars():
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **how)
                tokenizer: Any = AutoTokenizer.from_pretrained(source, **how)
            except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
                raise ModelError(
                    f"{name} cannot be loaded as a causal language model with a tokenizer: {error}"
                ) from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ModelError(f"{name} lacks {len(missing)} parameters of {type(model).__name__} ({missing[0]}, ...)")
        if not tokenizer.chat_template:
            raise ModelError(f"{name} has no chat template; give a model that was made for chats")
        return model.to(self._device).eval(), tokenizer


class _Sampler(LogitsProcessor):
    """Makes the likeliest token a sample, row by row from the row's own seed."""

    def __init__(self, seeds: Sequence[int], asked: LocalModel, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = asked.temperature, asked.top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float() / self._temperature
        ordered, places = scores.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of all likelier tokens
        ordered = ordered.masked_fill(before >= self._top_p, -torch.inf)
        scores = torch.empty_like(scores).scatter_(-1, places, ordered)
        noise = torch.stack([torch.empty_like(scores[0]).exponential_(generator=g) for g in self._generators])
        return scores - noise.log()


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a reply."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = [given] if isinstance(given, int) else list(given or [])
    return sorted({*ends, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars but ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
