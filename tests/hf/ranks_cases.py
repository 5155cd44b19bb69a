"""Runs for `tests.hf.test_ranks`: as many as are named, each by every process that a launcher has started.

torchrun --nproc-per-node 2 tests/hf/ranks_cases.py FOLDER CASE...
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq

from safe_sched import BDS, Antibody, BDSReleased, Fixed, NeuralBDS
from safe_sched.errors import RankError
from safe_sched.training import session
from safe_sched.training.ranks import Alone
from safe_sched_hf import Lisa, SafeSchedCallback
from safe_sched_hf import callback as callback_module
from safe_sched_hf.distributed import exchange_of
from tests.support import (
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    text_rows,
    token_rows,
    uneven_weights,
)

ROWS = token_rows(24, seed=4, shortest=6)
SAFE = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{20 + i % 3} w{30 + i}"} for i in range(7)]
INFORMED = [{**row, "p": 0.04 * i} for i, row in enumerate(ROWS)]
ALIKE = token_rows(24, seed=4, shortest=8, longest=8)  # accelerate sends streamed batches of one length only
TOKENS = token_rows(7, seed=9)
REFUSALS = (" w50 w51", " w52 w53 w54", " w55 w56 w57 w58", " w50 w53")
BATCH = 2

# a large epsilon: Adam would blow a rounding error in a tiny gradient up to a full step
OPTIONS: dict[str, Any] = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "max_steps": 5, "logging_steps": 1}


def ours(scheduler: Any, **options: Any) -> Callable[[], list[Any]]:
    return lambda: [SafeSchedCallback(scheduler() if isinstance(scheduler, type) else scheduler, **options)]


def antibody(**options: Any) -> Antibody:
    return Antibody(**({"on_inversion": "ignore", "refusals": REFUSALS} | options))


FIXED = Fixed(uneven_weights(len(ROWS)))
ASKED: dict[str, Any] = {"safety_data": SAFE, "safety_weight": 0.0}

CASES: dict[str, tuple[Any, Callable[[], list[Any]], dict[str, Any]]] = {
    "untouched": (make_hf, list, {}),
    "equal": (make_hf, ours(Fixed()), {}),
    "untouched sft": (make_sft, list, {"gradient_accumulation_steps": 2}),
    "equal sft": (make_sft, ours(Fixed()), {"gradient_accumulation_steps": 2}),
    "fixed": (make_hf, ours(FIXED), {}),
    "safety": (make_hf, ours(FIXED, safety_data=TOKENS, safety_batch_size=3), {"gradient_accumulation_steps": 2}),
    "one safety row": (make_sft, ours(FIXED, safety_data=TOKENS, safety_batch_size=1), {}),
    "row": (make_hf, ours(FIXED, normalizer="row"), {"gradient_accumulation_steps": 2}),
    "row, local mean": (
        make_hf,
        ours(FIXED, normalizer="row"),
        {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
    ),
    "probe": (make_sft, ours(BDS(), safety_data=SAFE), {"max_steps": 28, "gradient_accumulation_steps": 2}),
    "prior": (make_hf, ours(BDS(), safety_data=SAFE, prior="p"), {"rows": INFORMED}),
    "released": (make_sft, ours(BDSReleased(), safety_data=TOKENS), {"max_steps": 9}),
    "neural": (make_sft, ours(NeuralBDS(), safety_data=SAFE), {"max_steps": 14}),
    "antibody": (make_sft, ours(antibody(), **ASKED), {"max_steps": 14}),
    "antibody, step": (
        make_hf,
        ours(antibody(gate="softmax", ratio="token_mean"), **ASKED),
        {"gradient_accumulation_steps": 2},
    ),
    "antibody, batch": (
        make_hf,
        ours(antibody(gate="softmax", pool="micro_batch", anchor=False, refusal_cost="first_token"), **ASKED),
        {"gradient_accumulation_steps": 2},
    ),
    "antibody, start": (make_hf, ours(antibody(anchor="start"), **ASKED), {}),
    "lisa": (
        make_sft,
        ours(Fixed(), parts=[Lisa(safe_steps=1, user_steps=3, rho=0.3)], safety_data=TOKENS),
        {"max_steps": 8},
    ),
    "lisa, probe": (
        make_hf,
        ours(BDS(), parts=[Lisa(safe_steps=2, user_steps=3)], safety_data=SAFE),
        {"gradient_accumulation_steps": 2, "max_steps": 6},
    ),
    "noise": (make_hf, ours(FIXED, model_temperature=0.01), {}),
    "lora": (make_sft, ours(BDS(), safety_data=SAFE), {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")}),
    "packed": (
        make_sft,
        ours(BDS(), safety_data=SAFE),
        {"packing": True, "max_length": 24, "max_steps": 2, "rows": text_rows(24, seed=5)},
    ),
    "sample": (make_hf, ours(FIXED, act="sample"), {"max_steps": 6}),
    "sample, accumulated": (
        make_hf,
        ours(FIXED, act="sample", safety_data=TOKENS),
        {"gradient_accumulation_steps": 2, "max_steps": 5},
    ),
    "sample, probe": (make_sft, ours(BDS(), act="sample", safety_data=SAFE), {"max_steps": 28}),
    "sample nothing": (make_hf, ours(Fixed([0.0] * len(ROWS)), act="sample"), {"gradient_accumulation_steps": 2}),
    "uneven": (make_sft, ours(BDS(), safety_data=SAFE), {"max_steps": -1, "num_train_epochs": 2, "rows": ROWS[:21]}),
    "stream": (make_sft, ours(BDS(), safety_data=SAFE), {"streamed": True, "rows": ALIKE}),
    "stream, each its own": (
        make_hf,
        ours(BDS(), safety_data=SAFE),
        {"streamed": True, "accelerator_config": {"dispatch_batches": False}},
    ),
    "split": (
        make_hf,
        ours(BDS(), safety_data=SAFE, safety_batch_size=2),
        {"accelerator_config": {"split_batches": True}, "dataloader_num_workers": 1},
    ),
}


def run(name: str, folder: Path, *, batch: int, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    """One run: its parameters, its table and its scheduler's state, as tensors."""
    make, callbacks, options = CASES[name]
    options = OPTIONS | {"per_device_train_batch_size": batch} | options | changes
    rows, streamed = options.pop("rows", ROWS), options.pop("streamed", False)
    made = callbacks()
    # rows of different lengths: what pads differs between the ranks, what is learned does not
    trainer = make(folder, rows, model=make_model(), callbacks=made, **options)
    if streamed:
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    torch.manual_seed(11)
    trainer.train(resume_from_checkpoint=resume)
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) == ("fsdp" in options)
    whole = parameters_of(trainer.accelerator.unwrap_model(trainer.model))
    found = {f"model.{k}": v.full_tensor() if isinstance(v, DTensor) else v for k, v in whole.items()}
    for callback in made:
        table = callback.session.state.tensors()
        found |= {f"state.{k}": v for k, v in table.items()}
        found |= {"weight": callback.session.scheduler.slot_weights(callback.session.state)}
        found |= {"seen": callback.session.seen, "keys": callback.session.index.keys}
    return found


SHARDED = {"fsdp_version": 2, "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@contextlib.contextmanager
def sharding_on_the_cpu() -> Iterator[None]:
    """Accelerate shards on accelerators only, though its FSDP2 runs on the CPU: have it take this one for another."""
    make = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        make(self, *args, **kwargs)

    AcceleratorState._reset_state()
    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = make
        AcceleratorState._reset_state(reset_partial_state=True)


# faults: what goes wrong on rank 1, and what each rank then says -------------------------------------------------


def broken_model(trainer: Any, at: int, fault: Callable[[Any], Any]) -> None:
    """What the output embedding returns in its forward number ``at`` goes through ``fault``."""
    count = itertools.count(1)
    trainer.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: fault(output) if next(count) == at else None
    )


def out_of_memory(output: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


def other_tokens(features: list[Any]) -> Any:
    return DataCollatorForSeq2Seq(make_tokenizer())([{**f, "input_ids": f["input_ids"][::-1]} for f in features])


def doubted(trainer: Any) -> Any:
    return trainer.train_dataset.map(lambda row: {"p": 1 - row["p"]})


def nan(output: Any) -> Any:
    return output * float("nan")


FAULTS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    # forwards of a step with safety rows: theirs, then one per micro-batch
    "loss": (ours(BDSReleased(), safety_data=TOKENS), lambda trainer: broken_model(trainer, 4, nan)),
    "safety loss": (ours(FIXED, safety_data=TOKENS), lambda trainer: broken_model(trainer, 3, nan)),
    "memory": (ours(FIXED, safety_data=TOKENS), lambda trainer: broken_model(trainer, 3, out_of_memory)),
    "score": (ours(BDS(), safety_data=SAFE), lambda trainer: broken_model(trainer, 4, out_of_memory)),
    "batch": (ours(FIXED), lambda trainer: setattr(trainer, "data_collator", Switching())),
    "rows": (ours(Fixed()), lambda trainer: setattr(trainer, "train_dataset", trainer.train_dataset.select(range(23)))),
    "order": (ours(Fixed()), lambda trainer: setattr(trainer, "train_dataset", trainer.train_dataset.shuffle(seed=1))),
    "prior": (ours(Fixed(), prior="p"), lambda trainer: setattr(trainer, "train_dataset", doubted(trainer))),
    "steps": (ours(Fixed()), lambda trainer: None),
    "manifest": (ours(Fixed()), lambda trainer: setattr(trainer.args, "output_dir", str(Path(__file__) / "out"))),
}
ON_FIRST = ("manifest",)
"""Faults on rank 0: it is the one that writes."""


class Switching:
    """A collator that changes rows once training has begun."""

    def __init__(self) -> None:
        self.plain, self.calls = DataCollatorForSeq2Seq(make_tokenizer()), 0

    def __call__(self, features: list[Any]) -> Any:
        self.calls += 1
        return self.plain(features) if self.calls < 6 else other_tokens(features)


def fault(name: str, folder: Path, rank: int) -> dict[str, Any]:
    """A run in which something goes wrong on rank 1: the error of this rank."""
    callbacks, spoil = FAULTS[name]
    try:
        options: dict[str, Any] = {"accelerator_config": {"even_batches": False}} if name == "steps" else {}
        trainer = make_hf(
            folder, INFORMED, callbacks=callbacks(), **(OPTIONS | {"per_device_train_batch_size": BATCH} | options)
        )
        if bool(rank) != (name in ON_FIRST):
            spoil(trainer)
        trainer.train()
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None, "text": ""}


def exchanges(rank: int) -> dict[str, Any]:
    """What the other rank says, whatever its size: less than a block, much more, and nothing."""
    exchange = exchange_of(make_hf(Path("unused"), ROWS))
    wrong = 0
    for count in (0, 1, 3, 5000):
        for width in (1, 400):
            made = [
                (
                    torch.arange(count * (r + 1)),
                    torch.full((count, width), 0.5 + r),
                    torch.tensor(r == 1),
                    torch.tensor([7 + r] * r, dtype=torch.int32),
                )
                for r in (0, 1)
            ]
            for found, expected in zip(exchange("test", *made[rank]), made, strict=True):
                wrong += sum(a.dtype != b.dtype or not torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    text = ""
    try:
        exchange(f"place {rank}")
    except RankError as error:
        text = str(error)
    return {"wrong": wrong, "text": text}


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder, names, rank = Path(sys.argv[1]), sys.argv[2:], int(os.environ["RANK"])
    if rank:
        session.save_state = None  # pyright: ignore[reportAttributeAccessIssue]  # one process writes
    for asked in names:
        name, _, how = asked.partition("; ")
        place = folder / asked
        if name == "fault":
            place.mkdir(parents=True, exist_ok=True)
            (place / f"rank{rank}.json").write_text(json.dumps(fault(how, place / "out", rank)))
            continue
        if name == "exchange":
            place.mkdir(parents=True, exist_ok=True)
            (place / f"rank{rank}.json").write_text(json.dumps(exchanges(rank)))
            continue
        if how == "deaf":  # the ranks do not hear of each other
            told, callback_module.exchange_of = callback_module.exchange_of, lambda trainer: Alone()
            found = run(name, place / "out", batch=BATCH)
            callback_module.exchange_of = told
        else:
            words, options = how.split(), {}
            if "saved" in words:
                options |= {"save_strategy": "steps", "save_steps": 3}
            if "resumed" in words:
                saved = f"{name}; {how.replace('resumed', 'saved')}"
                options |= {"resume": str(folder / saved / "out" / "checkpoint-3")}
            if "sharded" in words:
                options |= {"fsdp": True, "fsdp_config": SHARDED}
            with sharding_on_the_cpu() if "sharded" in words else contextlib.nullcontext():
                found = run(name, place / "out", batch=BATCH, **options)
        save_file({k: v.clone() for k, v in found.items()}, place / f"rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
