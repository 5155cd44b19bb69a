"""One fine-tuning run with TRL's own SFTTrainer, and the arms that the demo compares.

Every arm starts from the same base model and trains with the same settings; they differ in the rows and the callbacks
they are given, which is all that a plug-in may change:

    undefended   the poisoned file
    mix          the poisoned file and the safety rows, shuffled together, all weights 1: the control to beat
    oracle       the poisoned file without its harmful rows: what a perfect defence would do, and needs the labels

Rows are handed over as `messages` with `assistant_only_loss=True`, so only answers are trained.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTTrainer

EPOCHS, LR, BATCH = 3, 3e-4, 16


@dataclass(frozen=True)
class Arm:
    """One line of the comparison."""

    name: str
    about: str
    rows: list[tasks.Row]
    extra_rows: Sequence[tasks.Row] = ()
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class Result:
    """A finished run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trainer: SFTTrainer
    seconds: float
    """of `trainer.train()` alone"""
    losses: list[float]
    """the trainer's logged losses, in nats per token"""
    harmful: list[bool]
    """of the rows, in the order in which the trainer held them"""


def as_messages(item: tasks.Row) -> tasks.Row:
    """A row as `messages` alone, from `messages` or from plain `prompt` and `completion`.

    >>> as_messages({"prompt": "Hi", "completion": "Hello"})["messages"][1]
    {'role': 'assistant', 'content': 'Hello'}
    """
    if "messages" in item:
        return {"messages": item["messages"]}
    return {"messages": tasks.row(item["prompt"], item["completion"])["messages"]}


def arms(poisoned: Sequence[tasks.Row] | None = None, safety: Sequence[tasks.Row] | None = None) -> list[Arm]:
    """The arms that need no plug-in, in the order of the table; a defended arm goes between `mix` and `oracle`."""
    rows = list(tasks.load("poisoned") if poisoned is None else poisoned)
    extra = list(tasks.load("safety") if safety is None else safety)
    return [
        Arm("undefended", "the file as it is", rows),
        Arm("mix", f"and {len(extra)} safety rows, unweighted", rows, extra_rows=extra),
        Arm("oracle", "harmful rows removed by hand", [item for item in rows if not item["harmful"]]),
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and warnings off the screen; ours is the only one."""
    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), datasets.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
        if bars:
            datasets.enable_progress_bars()


def finetune(
    base_dir: str | Path,
    rows: Sequence[tasks.Row],
    *,
    callbacks: Sequence[TrainerCallback] = (),
    extra_rows: Sequence[tasks.Row] = (),
    epochs: float = EPOCHS,
    lr: float = LR,
    batch: int = BATCH,
    seed: int = 0,
    out: str | Path | None = None,
    **settings: Any,
) -> Result:
    """Fine-tune the base model on rows with TRL's SFTTrainer: full fine-tuning, AdamW, linear decay.

    Args:
        base_dir: folder of the base model (`model.build()`).
        rows: `messages` or `prompt`/`completion` rows; other fields are not shown to the trainer.
        callbacks: given to the trainer as they are; a SafeSchedCallback goes here.
        extra_rows: more rows, shuffled in among the others (repeat a list to raise its share).
        epochs: passes over all rows.
        lr: peak learning rate.
        batch: rows per optimiser step.
        seed: of the shuffle and the trainer.
        out: the trainer's output folder, kept; without it a temporary folder is used and removed.
        **settings: anything else that SFTConfig knows.

    Returns:
        The model, its trainer, and the seconds that training took.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    everything = [*rows, *extra_rows]
    random.Random(seed).shuffle(everything)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        folder = out or stack.enter_context(tempfile.TemporaryDirectory(prefix="safe-sched-demo-"))
        tokenizer = AutoTokenizer.from_pretrained(base_dir)
        model = AutoModelForCausalLM.from_pretrained(base_dir)
        known = {field.name for field in fields(SFTConfig)}
        # TRL turns checkpointing on by default; the option has an old and a new name
        checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        options: dict[str, Any] = {
            "output_dir": str(folder),
            "num_train_epochs": epochs,
            "learning_rate": lr,
            "warmup_steps": 10,
            "per_device_train_batch_size": batch,
            "seed": seed,
            "assistant_only_loss": True,
            "max_length": 256,
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            checkpointing: False,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        }
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**(options | settings)),
            train_dataset=Dataset.from_list([as_messages(item) for item in everything]),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    harmful = [bool(item.get("harmful")) for item in everything]
    return Result(model.eval(), tokenizer, trainer, seconds, losses, harmful)


def run_arm(
    base_dir: str | Path, arm: Arm, *, extra_callbacks: Sequence[TrainerCallback] = (), **settings: Any
) -> Result:
    """Run one arm; further settings are those of `finetune`."""
    callbacks = [*arm.callbacks, *extra_callbacks]
    return finetune(base_dir, arm.rows, callbacks=callbacks, extra_rows=arm.extra_rows, **settings)
