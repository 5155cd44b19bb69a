"""What does an audit's prior change in training? BDS with and without it, on the demo's file, over its first epoch.

Read from a run:

    harmful, benign    the mean weight with which rows were trained on, each once
    AUROC              of the weights at the end, harmful against benign rows; .5 is chance
    audit              the same of the audit's own `p_harmful`

Controls: the same numbers given to the wrong rows (`shuffled`), which is a prior that knows nothing and is sure of it;
and `Fixed`, which takes the audit's word for it. One safety row stands beside every 16 rows.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/prior.py
from bench.report import Section, markdown, show
from examples.demo import model, study, tasks
from safe_sched import BDS, Fixed, audit
from safe_sched_hf import SafeSchedCallback

COLUMN = "p_harmful"
ARMS = ("BDS", "BDS, prior", "BDS, prior shuffled", "Fixed, prior")


def chances(rows: Sequence[tasks.Row]) -> list[float]:
    """``p_harmful`` of some rows, without a model."""
    found = audit([{"messages": row["messages"]} for row in rows])
    return found.table["p_harmful"].to_pylist()


def run(base: Path, rows: Sequence[tasks.Row], p: Sequence[float], safety: Sequence[Any], arm: str, seed: int) -> Any:
    """Train for an epoch; the weights with which harmful and benign rows were trained on, and the AUROC at the end."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    given = list(p)
    if arm.endswith("shuffled"):
        random.Random(seed).shuffle(given)
    prior = COLUMN if "prior" in arm else None
    ours = SafeSchedCallback(
        Fixed() if arm.startswith("Fixed") else BDS(), safety_data=list(safety), safety_batch_size=1, prior=prior
    )
    trained: list[tuple[Any, Any]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            session, weigh = ours.session, ours.session.weigh

            def watched(batch: Any, *more: Any, **options: Any) -> Any:
                found = weigh(batch, *more, **options)
                trained.append((batch.slots.clone(), found.detach().cpu().clone()))
                return found

            session.weigh = watched

    lines = [{"messages": row["messages"], COLUMN: one} for row, one in zip(rows, given, strict=True)]
    with study.quiet(), tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base),
            processing_class=AutoTokenizer.from_pretrained(base),
            train_dataset=Dataset.from_list(lines),
            args=SFTConfig(
                output_dir=out,
                num_train_epochs=1,
                learning_rate=study.LR,
                per_device_train_batch_size=study.BATCH,
                assistant_only_loss=True,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                seed=seed,
                disable_tqdm=True,
            ),
            callbacks=[ours, Watch()],
        )
        trainer.train()
    harmful = np.array([row["harmful"] for row in rows])
    slots = ours.session.index.row_slots
    assert slots is not None
    bad = torch.zeros(ours.session.index.slots, dtype=torch.bool)
    bad[slots.long()] = torch.from_numpy(harmful)
    which, weights = (torch.cat(part) for part in zip(*trained, strict=True))
    return {
        "harmful": float(weights[bad[which]].mean()),
        "benign": float(weights[~bad[which]].mean()),
        "auroc": float(roc_auc_score(harmful, -ours.table()["weight"].to_numpy())),
        "audit": float(roc_auc_score(harmful, given)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and show it."""
    parser = argparse.ArgumentParser(description="What an audit's prior changes in training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--safety-rows", type=int, default=20, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    base, found = model.build(), {arm: [] for arm in ARMS}
    for seed in options.seeds:
        rows = tasks.load("poisoned")
        random.Random(seed).shuffle(rows)
        p, safety = chances(rows), tasks.safety_rows(options.safety_rows, seed)
        for arm in ARMS:
            found[arm].append(run(base, rows, p, safety, arm, seed))
    heads = ["arm", "harmful", "benign", "AUROC", "audit"]
    lines = [
        [arm, *(" ".join(f"{one[name]:.3f}" for one in runs) for name in ("harmful", "benign", "auroc", "audit"))]
        for arm, runs in found.items()
    ]
    title = f"Weights in the first epoch, a seed each ({', '.join(map(str, options.seeds))})"
    note = "`harmful`, `benign`: mean weight with which rows were trained on. `audit`: AUROC of the prior itself."
    sections = [Section(title, note, heads, lines)]
    command = shlex.join(["python", "bench/prior.py", *given])
    show(sections, command, Console())
    if options.out is not None:
        options.out.write_text(markdown([f"`{command}`"], sections), encoding="utf-8")


if __name__ == "__main__":
    main()
