"""What the model signals of an audit cost: beside a bare forward over the same rows, and beside a loop row by row.

All arms take turns in one process and on the same rows. The bare forward runs lines of like lengths, with the same
budget of padded tokens a batch, and makes their logits; rows are tokens before its clock starts. The audit's clock
covers everything from texts to numbers: chat template, tokenizer, layout, forward, readings::

    python bench/audit_model.py --rows 600 --turns 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.hooks import AuditRequest
from safe_sched_hf.audit.model import AlignedModel
from safe_sched_hf.measure.forward import bucketed
from safe_sched_hf.safety import pad_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/audit_model.py
from bench.tasks import TASKS
from examples.demo import model as demo
from examples.demo import tasks

BARE_TARGET, LOOP_TARGET = 0.9, 3.0
BLOCK = 1024  # rows scored at once


def rows_of(count: int, data: Path | None) -> list[AuditRow]:
    """The demo's file, or the rows of another one."""
    if data is None:
        found = [{"messages": row["messages"]} for row in TASKS["tickets"].rows(min(count, 1000), 0.1, 0)]
        found = (found * -(-count // len(found)))[:count]
    else:
        lines = data.read_text(encoding="utf-8").splitlines()[:count]
        names = ("instruction", "input", "output")
        found = [{name: json.loads(line)[name] for name in names} for line in lines]
    return [audit_row(row, number) for number, row in enumerate(found)]


def wider(folder: Path, width: int, layers: int) -> Any:
    """The demo's model, or one of another size with random parameters: what is timed does not depend on them."""
    model, _ = demo.load(folder)
    if not width:
        return model
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "head_dim": width // 4}
    settings: dict[str, Any] = model.config.to_dict() | shape
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@torch.no_grad()
def bare(model: Any, lines: Sequence[torch.Tensor], budget: int, pad: int) -> None:
    for batch in bucketed([line.numel() for line in lines], budget):
        ids, mask = pad_rows([lines[i] for i in batch], pad)
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def fresh(model: AlignedModel, rows: Sequence[AuditRow], block: int) -> None:
    for start in range(0, len(rows), block):
        model._last = None
        model.measure(rows[start : start + block])


@torch.no_grad()
def naive(model: AlignedModel, given: Any, rows: Sequence[AuditRow]) -> None:
    """A loop as one would write it: a row's own forward, and one with every refusal behind its prompt."""
    for row in rows:
        (line,) = model.refusals.lines(model.preparation([row]))
        assert line is not None
        given(input_ids=torch.tensor([line.tokens]), use_cache=False).logits.float().log_softmax(-1)
        for branch in line.branch:
            refusals = [torch.tensor([*line.tokens[:branch], *opening]) for opening in model.refusals.openings]
            ids, mask = pad_rows(refusals, model.forwards.pad)
            given(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    folder = demo.build(progress=False)
    given = wider(folder, args.width, args.layers)
    rows = rows_of(args.rows, args.data)
    models = {}
    for probe in (False, True):
        models[probe] = AlignedModel(AuditRequest(model=str(folder), safety_rows=tasks.safety_rows(64)), probe=probe)
        models[probe].load()
        models[probe].prepare()  # with the demo's own parameters, so that openings are those of a model that refuses
        models[probe].forwards.model = given
        models[probe].forwards._head = given.get_output_embeddings()
    if args.width:  # a direction of the same size
        parts = [(p, torch.zeros_like(p)) for p in given.parameters()]
        models[True]._direction.parts = parts  # pyright: ignore[reportOptionalMemberAccess]
    plain = models[False]
    lines = [torch.tensor(row.tokens) for row in plain.preparation(rows)]
    own = sum(line.numel() for line in lines)
    nodes = plain.refusals.branches.tokens.numel()
    few = rows[: args.loop_rows]
    arms: dict[str, Callable[[], None]] = {
        "bare": lambda: bare(given, lines, plain.forwards.budget, plain.forwards.pad),
        "audit": lambda: fresh(plain, rows, BLOCK),
        "audit, probe": lambda: fresh(models[True], rows, BLOCK),
        "audit, some": lambda: fresh(plain, few, BLOCK),
        "audit, one row a batch": lambda: fresh(plain, few, 1),
        "row by row": lambda: naive(plain, given, few),
    }
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.turns):
        for name, arm in arms.items():
            times[name].append(seconds(arm))
    run_tokens = {"bare": own, "audit": own + nodes * len(rows), "audit, probe": 2 * own + nodes * len(rows)}
    rates = {name: np.array([run_tokens[name] / t for t in times[name]]) for name in run_tokens}

    def quartiles(values: Any) -> list[float]:
        return [round(float(x), 3) for x in np.quantile(values, (0.25, 0.5, 0.75))]

    return {
        "rows": len(rows),
        "tokens a row": round(own / len(rows), 1),
        "nodes a row": nodes,
        "parameters": given.num_parameters(),
        "tokens/s": {name: round(float(np.median(rate))) for name, rate in rates.items()},
        "tokens run, audit : bare": quartiles(rates["audit"] / rates["bare"]),
        "tokens run, audit with probe : bare": quartiles(rates["audit, probe"] / rates["bare"]),
        "rows' own tokens, audit : bare": quartiles(np.array(times["bare"]) / np.array(times["audit"])),
        "rows, audit : audit with one row a batch": quartiles(
            np.array(times["audit, one row a batch"]) / np.array(times["audit, some"])
        ),
        "rows, audit : row by row": quartiles(np.array(times["row by row"]) / np.array(times["audit, some"])),
        "targets": {"tokens run": BARE_TARGET, "row by row": LOOP_TARGET},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--loop-rows", type=int, default=150, help="rows of the loop, which is slow")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--data", type=Path, help="a .jsonl file of instruction, input and output, instead of the demo's"
    )
    parser.add_argument("--width", type=int, default=0, help="of a model with random parameters; 0: the demo's model")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    print(json.dumps(measure(args), indent=2))


if __name__ == "__main__":
    main()
