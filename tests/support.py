"""Tiny models, tokenizers, data sets and trainers, made here and now, offline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

VOCABULARY = 64
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'u ' + m['content'] + ' ' }}"
    "{% else %}{{ 'a ' }}{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)


def make_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Words w0...w58 and a few special tokens, split at spaces."""
    names = ["<pad>", "</s>", "<unk>", "u", "a"] + [f"w{i}" for i in range(VOCABULARY - 5)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side=padding_side
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    *, tied: bool = False, seed: int = 0, cls: type[LlamaForCausalLM] = LlamaForCausalLM, **changes: Any
) -> LlamaForCausalLM:
    """A Llama of two small layers with a spread of weights that gives losses worth weighing."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return cls(LlamaConfig(**(settings | changes)))


def token_rows(count: int = 16, seed: int = 0, shortest: int = 4, longest: int = 12) -> list[dict[str, list[int]]]:
    """Rows of different lengths whose first third is a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def text_rows(count: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Prompt and completion as plain text."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(0, VOCABULARY - 5, (size,), generator=generator).tolist())

    return [{"prompt": words(2, 6), "completion": " " + words(2, 6)} for _ in range(count)]


def uneven_weights(count: int) -> list[float]:
    """A different factor for every row, 0 and a number above 1 among them."""
    return [round(0.37 * i % 2.3, 3) for i in range(count)]


COMMON: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 3,
}


def make_sft(
    folder: Path, rows: Sequence[Any], *, model: Any = None, callbacks: Sequence[TrainerCallback] = (), **changes: Any
) -> SFTTrainer:
    """A real TRL trainer on the CPU."""
    peft = changes.pop("peft_config", None)
    evaluated = Dataset.from_list(changes.pop("eval_rows")) if "eval_rows" in changes else None
    tokenizer = changes.pop("processing_class", None) or make_tokenizer()
    # "nll" is named because TRL before its fused head has another default, which the gate refuses
    settings = COMMON | {"bf16": False, "max_length": 64, "loss_type": "nll", "output_dir": str(folder)} | changes
    return SFTTrainer(
        model=make_model() if model is None else model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(list(rows)),
        eval_dataset=evaluated,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=peft,
    )


def make_hf(
    folder: Path, rows: Sequence[Any], *, model: Any = None, callbacks: Sequence[TrainerCallback] = (), **changes: Any
) -> Trainer:
    """A real HF Trainer on the CPU; rows are token rows."""
    tokenizer = changes.pop("processing_class", None) or make_tokenizer()
    evaluated = Dataset.from_list(changes.pop("eval_rows")) if "eval_rows" in changes else None
    collator = changes.pop("data_collator", None) or DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(**(COMMON | {"output_dir": str(folder)} | changes)),
        train_dataset=Dataset.from_list(list(rows)),
        eval_dataset=evaluated,
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=list(callbacks),
    )


class GradientProbe(TrainerCallback):
    """Keeps the gradients that the optimiser was about to use, and the batches they came from."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(
            {
                name: parameter.grad.detach().clone()
                for name, parameter in kwargs["model"].named_parameters()
                if parameter.grad is not None
            }
        )


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest over the tensors of |found - expected| / |expected|, in Euclidean norm."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        difference = float((found[name].double() - tensor.double()).norm())
        worst = max(worst, difference / max(float(tensor.double().norm()), 1e-12))
    return worst


def hooks_on(model: torch.nn.Module) -> int:
    """How many hooks of ours sit on a model: forward, before it, or backward."""
    tables = (t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))
    return sum(hook.__module__.startswith("safe_sched") for table in tables for hook in table.values())


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Run on one thread: sums in another order would differ in their last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
