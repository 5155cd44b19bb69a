"""Axolotl runs of a tiny model in this process, as ``axolotl train`` does them, and the plain trainers beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import GradientProbe, make_model, make_tokenizer, parameters_of, text_rows, uneven_weights

PLUGIN = "safe_sched_axolotl.SafeSchedPlugin"
SAFETY = [
    {"instruction": "w1 w2 w3", "input": "", "output": "w50 w51"},
    {"instruction": "w4 w5", "input": "", "output": "w50 w52 w51"},
    {"instruction": "w6 w7 w8 w9", "input": "", "output": "w53 w50"},
]


def alpaca_rows(count: int = 16, seed: int = 0) -> list[dict[str, str]]:
    """Rows of words that the tiny tokenizer knows."""
    rows = text_rows(count, seed)
    return [{"instruction": row["prompt"], "input": "", "output": row["completion"].strip()} for row in rows]


def weighted_rows() -> list[dict[str, Any]]:
    """The rows of `alpaca_rows`, each with a weight of its own."""
    rows = alpaca_rows()
    return [{**row, "weight": weight} for row, weight in zip(rows, uneven_weights(len(rows)), strict=True)]


def weights_by_tokens(run: Run) -> dict[tuple[int, ...], float]:
    """The weight that the file has for each row that Axolotl trains on, by its answer."""
    tokenizer, by_answer = make_tokenizer(), {row["output"]: row["weight"] for row in weighted_rows()}
    assert len(by_answer) == 16
    found = {}
    for row in run.trainer.train_dataset:
        answer = tokenizer.decode([label for label in row["labels"] if label >= 0], skip_special_tokens=True)
        found[tuple(row["input_ids"])] = by_answer[answer]
    assert len(found) == 16
    return found


def chats(count: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """The same rows as conversations."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in alpaca_rows(count, seed)
    ]


def page_config() -> dict[str, Any]:
    """The whole configuration in docs/axolotl.md."""
    page = Path(__file__).resolve().parents[2] / "docs" / "axolotl.md"
    _, found, rest = page.read_text(encoding="utf-8").partition("```yaml\n# train.yaml\n")
    assert found
    return yaml.safe_load(rest.partition("```")[0])


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_model(folder: Path) -> str:
    """The tiny model and its tokenizer, as files."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration that trains the tiny model for four steps; None takes a key out.

    Everything of one test lies in ``folder``; the model, the rows and the tokens are written once and used again.
    """
    base, rows = folder / "base", folder / "train.jsonl"
    if not base.exists():
        write_model(base)
    if not rows.exists():
        write_rows(rows, weighted_rows())
    if not (folder / "safety.jsonl").exists():
        write_rows(folder / "safety.jsonl", SAFETY)
    settings: dict[str, Any] = {
        "base_model": str(base),
        "datasets": [{"path": str(rows), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / "out"),
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "eager",
        "val_set_size": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 3,
    }
    return {name: value for name, value in (settings | changes).items() if value is not None}


def defended(**block: Any) -> dict[str, Any]:
    """The two things that the plugin takes in a YAML."""
    return {"plugins": [PLUGIN], "safe_sched": block}


LORA: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
    # Axolotl patches the model's class for these, for all later runs of the process
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_mlp_kernel": False,
}
PACKED: dict[str, Any] = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 2}


@dataclass
class Run:
    """What a run of Axolotl has left.

    Attributes:
        cfg: The configuration, checked.
        trainer: Axolotl's.
        first: The parameters before the first step.
        parameters: Of the trained model.
        callback: Ours, or None.
        batches: What the model was given in training steps, where that was asked for.
        gradients: Of every optimiser step, where that was asked for.
    """

    cfg: Any
    trainer: Any
    first: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    callback: Any
    batches: list[dict[str, torch.Tensor]]
    gradients: list[dict[str, torch.Tensor]]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.trainer.state.log_history if "loss" in record]


class Watch(GradientProbe):
    """Keeps the parameters before training, the gradients of each step, and the trainer's own forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, torch.Tensor] = {}
        self.batches: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = parameters_of(kwargs["model"])

        def keep(_: Any, args: Any, kwargs: Any) -> None:
            self.batches.append({name: value.clone() for name, value in kwargs.items() if torch.is_tensor(value)})

        self.hook = kwargs["model"].register_forward_pre_hook(keep, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()


def train(settings: dict[str, Any]) -> Run:
    """What ``axolotl train`` does, after its launcher."""
    from axolotl import train as axolotl
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    from safe_sched_hf import SafeSchedCallback

    torch.manual_seed(0)  # adapters are drawn before the trainer sets its seed
    watch, execute = Watch(), axolotl.execute_training

    def watched(cfg: Any, trainer: Any, resume_from_checkpoint: str | None) -> None:
        trainer.add_callback(watch)
        execute(cfg, trainer, resume_from_checkpoint)

    cfg = load_cfg(DictDefault(settings))
    if cfg.get("plugins"):
        assert PluginManager.get_instance().load_datasets(cfg, preprocess=False) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axolotl, "execute_training", watched)
        model, _, trainer = axolotl.train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    ours = [c for c in trainer.callback_handler.callbacks if isinstance(c, SafeSchedCallback)]
    assert len(ours) <= 1
    callback = ours[0] if ours else None
    return Run(cfg, trainer, watch.first, parameters_of(model), callback, watch.batches, watch.gradients)
