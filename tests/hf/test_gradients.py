"""The gate binds the weights exactly: its gradients are those of a loss with the weights written into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import SFTTrainer

import safe_sched.training.gate
from safe_sched import Fixed
from safe_sched.rows.keys import keys_of_flat
from safe_sched_hf import SafeSchedCallback
from tests.support import (
    GradientProbe,
    largest_difference,
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    single_thread,
    token_rows,
)

ROWS = token_rows(16, seed=1)
EPSILON = 0.1  # label smoothing
# plain gradient descent: Adam would blow a rounding error in a tiny gradient up to a full step
STEPS: dict[str, Any] = {"max_grad_norm": 0, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-3}


def weight_of(tokens: list[int]) -> float:
    """A weight that anybody can read off a row: between 0 and 2.4, 0 for some rows."""
    return max(0.0, (sum(tokens) % 26 - 2) / 10)


def fixed_weights() -> Fixed:
    lengths = torch.tensor([len(row["input_ids"]) for row in ROWS])
    flat = [torch.tensor([token for row in ROWS for token in row[name]]) for name in ("input_ids", "labels")]
    keys, _ = keys_of_flat(flat[0], flat[1], lengths)
    return Fixed([weight_of(row["input_ids"]) for row in ROWS], keys=keys)


def explicit_loss(model: Any, inputs: dict[str, Any], num_items: Any, kind: str) -> torch.Tensor:
    """The weighted loss as one would write it: a loop over rows and tokens, weights multiplied in.

    Rows of a packed line begin where position_ids are 0; padding is where the attention mask is 0.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    rest = {k: v for k, v in inputs.items() if k not in ("labels", "use_cache")}
    log_probs = log_softmax(model(**rest, use_cache=False).logits.float(), dim=-1)
    total, tokens = torch.zeros(()), 0
    for line in range(ids.shape[0]):
        mask = inputs.get("attention_mask")
        real = [t for t in range(ids.shape[1]) if mask is None or mask[line, t]]
        rows: list[list[int]] = []
        for t in real:
            starts = t == real[0] or ("position_ids" in inputs and inputs["position_ids"][line, t] == 0)
            rows.append([t]) if starts else rows[-1].append(t)
        for row in rows:
            weight = weight_of([int(ids[line, t]) for t in row])
            for t in row[1:]:
                if labels[line, t] == -100:
                    continue
                tokens += 1
                log_prob = log_probs[line, t - 1]
                loss = -log_prob[labels[line, t]]
                if kind == "smooth":
                    loss = (1 - EPSILON) * loss - EPSILON * log_prob.mean()
                if kind == "dft":
                    loss = loss * (-loss).exp().detach()
                total = total + weight * loss
    return total / (tokens if num_items is None else num_items)


class ExplicitSFT(SFTTrainer):
    kind = "nll"

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return explicit_loss(model, inputs, num_items_in_batch, self.kind)


class ExplicitHF(Trainer):
    kind = "nll"

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return explicit_loss(model, inputs, num_items_in_batch, self.kind)


class InModelSFT(SFTTrainer):
    """TRL before its fused head: the model is given the labels and computes the loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["use_cache"] = False
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class FusedLossLlama(LlamaForCausalLM):
    """A loss fused with the output embedding, as Liger and cut cross-entropy do it: logits are never shown."""

    def forward(self, input_ids: Any = None, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = torch.nn.functional.linear(hidden, self.lm_head.weight)[:, :-1]
        total = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum")
        return CausalLMOutputWithPast(loss=total / (num_items_in_batch or (labels[:, 1:] != -100).sum()))


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**(settings | {"init_lora_weights": False} | changes))


def gradients(make: Any, cls: type, folder: Any, callbacks: list[Any], **options: Any) -> list[dict[str, torch.Tensor]]:
    """The gradients of two optimiser steps, before clipping can hide anything."""
    probe = GradientProbe()
    options = dict(options)
    model = make_model(tied=options.pop("tied", False), cls=options.pop("model_cls", LlamaForCausalLM))
    if options.pop("freeze_head", False):
        model.lm_head.weight.requires_grad_(False)
    rows = ROWS[: options.pop("rows", 16)]
    torch.manual_seed(5)
    trainer = make(folder, rows, model=model, callbacks=[*callbacks, probe], **(STEPS | options))
    trainer.__class__ = cls
    with single_thread():
        trainer.train()
    return probe.gradients


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
SFT: dict[str, dict[str, Any]] = {
    "fused head": {},
    "fused head, tied": {"tied": True},
    "fused head, LoRA": {"peft_config": lora()},
    "fused head, LoRA, tied": {"peft_config": lora(), "tied": True},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "micro-batches of one row": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "last step smaller": {"rows": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": CHECKPOINTED,
    "checkpointing, LoRA": {**CHECKPOINTED, "peft_config": lora()},
    "label smoothing": {"label_smoothing_factor": EPSILON, "kind": "smooth"},  # logits, then a forward for metrics
    "dft": {"loss_type": "dft", "kind": "dft"},
    "packing": {"packing": True, "max_length": 24},
    "packing, tied, accumulation": {
        "packing": True,
        "max_length": 24,
        "tied": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    },
    "packing, wrapped off boundary": {"packing": True, "max_length": 40, "packing_strategy": "bfd"},
    "padding-free": {"padding_free": True, "max_length": None},
    "padded to a multiple": {"pad_to_multiple_of": 8},
    "in-model loss": {"cls": InModelSFT},
    "in-model loss, tied": {"cls": InModelSFT, "tied": True},
    "in-model loss, LoRA": {"cls": InModelSFT, "peft_config": lora()},
    "in-model loss, accumulation": {
        "cls": InModelSFT,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 1,
    },
    "in-model loss, packing": {"cls": InModelSFT, "packing": True, "max_length": 24},
    "in-model loss, LoRA on the head": {"cls": InModelSFT, "peft_config": lora(modules_to_save=["lm_head"])},
}
HF: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "checkpointing": CHECKPOINTED,
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "label smoothing": {"label_smoothing_factor": EPSILON, "kind": "smooth"},
    "padding left": {"processing_class": make_tokenizer("left")},
    "padding left, accumulation": {"processing_class": make_tokenizer("left"), "gradient_accumulation_steps": 2},
    "fused in-model loss, head frozen": {"model_cls": FusedLossLlama, "freeze_head": True},
}


def difference(make: Any, explicit: type, plain: type, folder: Any, options: dict[str, Any]) -> float:
    options = dict(options)
    cls, kind = options.pop("cls", plain), options.pop("kind", "nll")
    found = gradients(make, cls, folder, [SafeSchedCallback(fixed_weights())], **options)
    oracle = type("Oracle", (explicit,), {"kind": kind})
    wanted = gradients(make, oracle, folder, [], **options)
    assert len(found) == len(wanted) == 2
    return max(largest_difference(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", SFT)
def test_sft_gradients_are_those_of_the_weighted_loss(case: str, tmp_path: Any) -> None:
    assert difference(make_sft, ExplicitSFT, SFTTrainer, tmp_path, SFT[case]) < 1e-6


@pytest.mark.parametrize("case", HF)
def test_hf_gradients_are_those_of_the_weighted_loss(case: str, tmp_path: Any) -> None:
    assert difference(make_hf, ExplicitHF, Trainer, tmp_path, HF[case]) < 1e-6


@pytest.mark.parametrize("make", [make_sft, make_hf])
def test_bf16_gradients_are_those_of_the_weighted_loss_to_its_precision(make: Any, tmp_path: Any) -> None:
    """bfloat16 has 8 bits: two ways of rounding the same sum differ by a few times 2**-8 of the largest entry."""
    explicit, plain = (ExplicitSFT, SFTTrainer) if make is make_sft else (ExplicitHF, Trainer)
    assert difference(make, explicit, plain, tmp_path, {"bf16": True}) < 4 * 2**-8


@pytest.mark.parametrize("case", ["fused head", "packing", "in-model loss"])
def test_a_gate_one_token_off_is_caught(case: str, tmp_path: Any, monkeypatch: Any) -> None:
    """Negative control: weights shifted by one token, or weights of 1, miss the oracle by far."""
    right = safe_sched.training.gate.token_weights

    def shifted(row_weights: Any, layout: Any) -> Any:
        return right(row_weights, layout).roll(-1, dims=1)

    monkeypatch.setattr("safe_sched.training.forward.token_weights", shifted)
    if case == "packing":  # without packing a shift stays inside its row
        assert difference(make_sft, ExplicitSFT, SFTTrainer, tmp_path, SFT[case]) > 1e-2
    monkeypatch.setattr(
        "safe_sched.training.forward.token_weights", lambda w, layout: torch.ones_like(right(w, layout))
    )
    assert difference(make_sft, ExplicitSFT, SFTTrainer, tmp_path, SFT[case]) > 1e-2


def test_the_row_normalizer_gives_the_mean_over_rows_of_row_means(tmp_path: Any) -> None:
    """L = (1/B) sum_i w_i nll_i over the B rows of the optimiser step, whatever the answers' lengths."""

    class RowMean(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = torch.zeros(())
            for line in range(inputs["input_ids"].shape[0]):
                alone = {
                    k: v[line : line + 1] for k, v in inputs.items() if k in ("input_ids", "labels", "attention_mask")
                }
                tokens = alone["input_ids"][alone["attention_mask"] > 0].tolist()
                count = int((alone["labels"][:, 1:] != -100).sum())
                unweighted = explicit_loss(model, alone, count, "nll") / max(weight_of(tokens), 1e-9)
                loss = loss + weight_of(tokens) * unweighted
            return loss / 4  # four rows in every step

    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    found = gradients(make_sft, SFTTrainer, tmp_path, [SafeSchedCallback(fixed_weights(), normalizer="row")], **options)
    wanted = gradients(make_sft, RowMean, tmp_path, [], **options)
    assert max(largest_difference(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-6
    by_token = gradients(make_sft, SFTTrainer, tmp_path, [SafeSchedCallback(fixed_weights())], **options)
    assert max(largest_difference(a, b) for a, b in zip(by_token, wanted, strict=True)) > 1e-2
