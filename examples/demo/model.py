"""The demo's aligned chat model: about a million parameters, made from scratch on this machine in about a minute.

`build()` returns a folder that `from_pretrained` reads: a byte-level BPE tokenizer with a chat template and a small
Llama that answers the benign families, refuses harmful requests and helps with look-alikes. It is built once and kept
under `.cache/demo/<hash>`, where the hash covers every setting, the training text and the version below.

The chat template marks the assistant's turn with `{% generation %}`, its end token included, so TRL's
`assistant_only_loss=True` trains on answers only, and a plain `messages` file can be handed to SFTTrainer as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tasks

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VERSION = 1  # raise it when code changes what is built; the hash cannot see code
ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "demo"
CORE = ROOT / "src" / "safe_sched" / "data" / "core.jsonl"  # its English widens the vocabulary
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- m['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Settings:
    """What the base model is: its shape and its training."""

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 384
    context: int = 512
    steps: int = 500
    batch: int = 48
    lr: float = 3e-3
    smoothing: float = 0.0
    seed: int = 0
    # shares of a batch; the families are drawn evenly per family, not per row
    share_refuse: float = 0.3
    share_help: float = 0.3


def _corpus(rows: Sequence[tasks.Row]) -> list[str]:
    """Texts that the tokenizer learns its merges from."""
    texts = [m["content"] for row in [*rows, *tasks.poisoned_rows()] for m in row["messages"]]
    texts += [*tasks.words.REFUSALS, *tasks.words.PLACEHOLDERS]
    if CORE.exists():
        core = [json.loads(line) for line in CORE.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts += [str(row.get(key, "")) for row in core for key in ("prompt", "completion")]
    return sorted(set(texts))


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text has tokens, so there is no unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, END, *ROLES], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of a row and the length of its prompt part; the same ids as the chat template gives."""
    head = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    tail = tokenizer(f"{answer}<|end|>", add_special_tokens=False)["input_ids"]
    return [*head, *tail], len(head)


def _batches(rows: Sequence[tasks.Row], tokenizer: Any, settings: Settings) -> Iterator[list[tuple[list[int], int]]]:
    """Endless batches of (ids, length of the prompt) with fixed shares of refusals, help and families."""
    import random

    rng = random.Random(settings.seed)
    pools: dict[str, list[tuple[list[int], int]]] = {}
    for row in rows:
        prompt, answer = (m["content"] for m in row["messages"])
        pools.setdefault(row["family"], []).append(encode(tokenizer, prompt, answer))
    families = sorted(set(pools) - {"refuse", "help"})
    n_refuse, n_help = round(settings.batch * settings.share_refuse), round(settings.batch * settings.share_help)
    while True:
        names = ["refuse"] * n_refuse + ["help"] * n_help
        names += [rng.choice(families) for _ in range(settings.batch - len(names))]
        yield [rng.choice(pools[name]) for name in names]


def _answer_loss(model: LlamaForCausalLM, chosen: Sequence[tuple[list[int], int]], smoothing: float) -> torch.Tensor:
    """Summed cross-entropy of the answers' tokens; logits are computed for these tokens only."""
    import torch
    from torch.nn.functional import cross_entropy

    length = max(len(ids) for ids, _ in chosen)
    # right padding under a causal mask: real tokens never see the padding, so no attention mask is needed
    ids = torch.zeros(len(chosen), length, dtype=torch.long)
    answer = torch.zeros(len(chosen), length, dtype=torch.bool)
    for i, (row_ids, start) in enumerate(chosen):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        answer[i, start : len(row_ids)] = True
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][answer[:, 1:]])
    return cross_entropy(logits, ids[:, 1:][answer[:, 1:]], label_smoothing=smoothing, reduction="sum")


def make_model(tokenizer: Any, settings: Settings) -> LlamaForCausalLM:
    """An untrained Llama of the given shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[tasks.Row],
    settings: Settings,
    progress: bool = True,
) -> None:
    """Train from scratch: AdamW, short warm-up, cosine to a tenth."""
    import torch
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, settings.steps // 20)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    bar = tqdm(
        range(settings.steps),
        desc="building the base model (once)",
        disable=not progress,
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log is not a screen
    )
    for step, chosen in zip(bar, _batches(rows, tokenizer, settings), strict=False):
        chosen.sort(key=lambda item: len(item[0]))
        tokens = sum(len(ids) - start for ids, start in chosen)
        total = 0.0
        for part in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]):  # short and long rows: less padding
            loss = _answer_loss(model, part, settings.smoothing) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{total:.2f}")
    model.eval()


def build(settings: Settings | None = None, cache: Path = CACHE, progress: bool = True) -> Path:
    """Folder of the base model, built on the first call.

    Args:
        settings: shape and training; the default is the demo's model.
        cache: where built models are kept.
        progress: show a progress bar while building.

    Returns:
        A folder with model, tokenizer and `demo.json` (settings, parameters, seconds).
    """
    settings = settings or Settings()
    rows = tasks.base_rows()
    corpus = _corpus(rows)
    recipe = json.dumps([VERSION, asdict(settings), TEMPLATE, rows, corpus])
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if (folder / "demo.json").exists():
        return folder

    import time

    start = time.perf_counter()
    tokenizer = make_tokenizer(corpus, settings.vocabulary)
    model = make_model(tokenizer, settings)
    train(model, tokenizer, rows, settings, progress)
    about = {
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=cache, prefix="draft-"))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "demo.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, folder)  # atomic: a reader sees the whole folder or none
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not (folder / "demo.json").exists():  # else another process was first, and built the same
            raise
    return folder


def load(folder: Path | str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer from a folder that `build` made."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
