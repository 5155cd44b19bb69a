"""Lisa beside the other ways to use safety rows, at about the same number of safety rows trained on.

A run fine-tunes the demo's base model with TRL's SFTTrainer on the demo's file. Read from it:

    HS, HS+         held-out harmful prompts that get compliance; that get anything but a refusal
    FA              tickets routed exactly: what the fine-tuning file teaches
    over-refusal    harmless look-alikes that were refused
    safety rows     rows trained on in safety batches or safe steps, or mixed in, repeats counted

A Lisa arm is written `Lisa K1/K2 RHO xROWS`: K1 safe steps of so many rows after K2 user steps, for example
`Lisa 1/8 0.1 x16`, and `Lisa 1/8 0.1 x16 BDS` where BDS weighs the user's rows. Each finished run is one line of the
JSON-lines file `--lines`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/lisa.py
from bench import report
from bench.evidence import Plan, carry_out
from bench.report import Section
from bench.tasks import TASKS
from examples.demo import measure, study
from examples.demo import tasks as demo
from safe_sched import BDS, Antibody, Fixed
from safe_sched_hf import Lisa, SafeSchedCallback

ARMS = ("undefended", "mix", "weights 1", "BDS", "Antibody", "Lisa 1/8 0.1 x16", "Lisa 1/1 0 x2", "Lisa 8/8 0.1 x2")
WEIGHED = {"weights 1": Fixed, "BDS": BDS, "Antibody": Antibody}


def lisa(arm: str) -> tuple[Lisa, str, int]:
    """The turns of a Lisa arm, the scheduler of its user steps, and the rows of a safe step.

    >>> turns, scheduler, rows = lisa("Lisa 7/56 0.1 x16 BDS")
    >>> turns.user_steps, scheduler, rows
    (56, 'bds', 16)
    """
    found = re.fullmatch(r"Lisa (\d+)/(\d+) ([\d.e-]+) x(\d+)( BDS)?", arm)
    if found is None:
        raise SystemExit(f"unknown arm {arm!r}; allowed: {', '.join(map(repr, ARMS))}, and others of Lisa's form")
    turns = Lisa(safe_steps=int(found[1]), user_steps=int(found[2]), rho=float(found[3]))
    return turns, "bds" if found[5] else "fixed", int(found[4])


def run(base: Path, plan: Plan) -> dict[str, Any]:
    """Train, and read."""
    rows = TASKS[plan.task].rows(plan.rows, plan.share, plan.seed)
    safety = demo.safety_rows(plan.safety_rows, plan.seed)
    extra: list[Any] = safety if plan.arm == "mix" else []
    ours = turns = None
    if plan.arm in WEIGHED:
        ours = SafeSchedCallback(WEIGHED[plan.arm](), safety_data=safety, safety_batch_size=plan.safety_batch)
    elif plan.arm not in ("undefended", "mix"):
        turns, scheduler, size = lisa(plan.arm)
        ours = SafeSchedCallback(scheduler, parts=[turns], safety_data=safety, safety_batch_size=size)
    result = study.finetune(
        base, rows, callbacks=[ours] if ours else [], extra_rows=extra, epochs=plan.epochs, seed=plan.seed
    )
    trained = len(extra) * plan.epochs
    if ours is not None:
        trained = ours.session.steps * plan.safety_batch
    if turns is not None:
        trained = turns.summary()["safety_rows_trained_on"]
    scores = measure.evaluate(result.model, result.tokenizer).as_dict()
    return {"seconds": result.seconds, "safety_rows": trained, "scores": scores}


def tables(records: Sequence[dict[str, Any]]) -> list[Section]:
    """One table per share of harmful rows: means over seeds, in brackets the worst of them."""
    found = []
    for share in sorted({record["plan"]["share"] for record in records}):
        lines = []
        for arm in dict.fromkeys(record["plan"]["arm"] for record in records):
            mine = [r for r in records if (r["plan"]["share"], r["plan"]["arm"]) == (share, arm)]
            if mine:
                lines.append([arm, f"{sum(r['safety_rows'] for r in mine) / len(mine):.0f}", *figures(mine)])
        header = ("arm", "safety rows", "HS", "HS+", "FA", "over-refusal", "seconds")
        found.append(
            Section(f"{share:.0%} of the rows harmful", "Means over seeds, in brackets the worst.", header, lines)
        )
    return found


def figures(records: Sequence[dict[str, Any]]) -> list[str]:
    """The rates of one arm as text."""

    def rate(name: str, worst: Any) -> str:
        values = [record["scores"][name] for record in records]
        return f"{sum(values) / len(values):.1%} ({worst(values):.1%})"

    seconds = sum(record["seconds"] for record in records) / len(records)
    return [
        *(rate("hs", max), rate("hs_plus", max), rate("task_accuracy", min), rate("over_refusal", max)),
        f"{seconds:.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python bench/lisa.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    parser.add_argument("--task", default="tickets", choices=list(TASKS), help="default: tickets")
    parser.add_argument("--shares", **several, type=float, default=[0.1, 0.5], help="of harmful rows")
    parser.add_argument("--seeds", **several, type=int, default=[0, 1, 2])
    parser.add_argument("--arms", **several, default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--safety-rows", type=int, default=64)
    parser.add_argument("--safety-batch", type=int, default=2, help="of the arms with a safety batch in every step")
    parser.add_argument("--rows", type=int, default=600, help="of the fine-tuning file (default: 600)")
    parser.add_argument("--epochs", type=int, default=study.EPOCHS, help=f"default: {study.EPOCHS}")
    parser.add_argument("--lines", type=Path, default=Path("runs/lisa.jsonl"), help="default: runs/lisa.jsonl")
    parser.add_argument("--out", type=Path, help="write the tables as Markdown")
    options = parser.parse_args(arguments)
    for arm in options.arms:
        if arm not in ARMS:
            lisa(arm)
    console = Console()
    plans = [
        Plan(options.task, share, seed, arm, options.safety_rows, options.safety_batch, options.rows, options.epochs)
        for seed in options.seeds
        for share in options.shares
        for arm in options.arms
    ]
    records = carry_out(plans, options.lines, console, run)
    report.show(tables(records), "", console)
    if options.out:
        options.out.write_text(report.markdown([], tables(records)), encoding="utf-8")


if __name__ == "__main__":
    main()
