"""How soon does a run reach the same benign loss when rows are left out instead of weighed down?

The demo's base model is fine-tuned with TRL's SFTTrainer on a file of which half the rows are harmful (inert
placeholders), with ``act="weight"`` and with ``act="sample"``: the same rows in the same order, the same optimiser
steps. The clock is the process's processor time on one thread, with all that the callback does, identifying the rows at
the start among it, and without the looks at the held-out loss: other load on the machine distorts it little. The
arms of a seed run one after another.

A reference beside them is the file without its harmful rows: whole batches of benign rows, as they come where a sampler
goes on drawing until the batch is full.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/sampling.py
from bench.report import Section, markdown, show
from bench.tasks import tickets
from examples.demo import model as demo_model
from examples.demo import study, tasks
from safe_sched import BDS, Antibody, Fixed
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.callback import Act


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rows: int = 600
    epochs: int = 3
    batch: int = 16
    accumulation: int = 1
    every: int = 4
    """optimiser steps between two looks at the held-out loss"""
    test: int = 96
    safety: int = 20
    lr: float = study.LR


QUICK = Sizes(rows=32, epochs=1, batch=8, every=1, test=4, safety=4)

KNOWN, REMOVED = "known weights", "harmful rows removed"
STARTS = 'Antibody(anchor="start")'
SCHEDULERS = (KNOWN, "BDS()", "Antibody()", STARTS)
PLACES = {"half way": 0.5, "at 80 %": 0.8}
"""Where in the weighted run its loss is taken as the one to reach."""


@dataclass
class Look:
    """The state of a run at one look: ``seconds`` of processor time, ``rows`` and ``tokens`` run through the model."""

    step: int
    seconds: float
    rows: int
    tokens: int
    loss: float


class Watch(TrainerCallback):
    """Looks at the held-out loss every few steps, and stops the clock meanwhile."""

    def __init__(self, loss: Callable[[Any], float], every: int) -> None:
        self.looks: list[Look] = []
        self._loss, self._every = loss, every
        self._rows = self._tokens = 0
        self._spent, self._since = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def count(module: Any, positional: Any, named: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and module.training:
                self._rows += named["input_ids"].shape[0]
                self._tokens += int(named["input_ids"].numel())

        kwargs["model"].register_forward_pre_hook(count, with_kwargs=True)
        self._since = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        self._spent += time.process_time() - self._since
        loss = self._loss(kwargs["model"])
        self.looks.append(Look(state.global_step, self._spent, self._rows, self._tokens, loss))
        self._since = time.process_time()


def held_out_loss(tokenizer: Any, count: int) -> Callable[[Any], float]:
    """The loss of held-out tickets, in nats per answer token."""
    rows = [demo_model.encode(tokenizer, *case) for case in tasks.held_out_cases(task=count)["task"]]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for line, (tokens, start) in enumerate(rows):
        ids[line, : len(tokens)] = torch.tensor(tokens)
        labels[line, start : len(tokens)] = torch.tensor(tokens[start:])

    def loss(model: Any) -> float:
        was, _ = model.training, model.eval()
        with torch.no_grad():
            # right padding under a causal mask: real tokens never see it
            logits = model(input_ids=ids).logits
            found = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        model.train(was)
        return float(found)

    return loss


def callback(name: str, act: Act, shuffled: Sequence[Any], sizes: Sizes) -> SafeSchedCallback:
    """One way to weigh, and to act."""
    safety = tasks.load("safety")[: sizes.safety]
    if name == KNOWN:
        return SafeSchedCallback(Fixed([float(not row["harmful"]) for row in shuffled]), act=act)
    scheduler = {"BDS()": BDS(), "Antibody()": Antibody(), STARTS: Antibody(anchor="start")}[name]
    return SafeSchedCallback(scheduler, safety_data=safety, safety_batch_size=1, act=act)


def run(base: Path, name: str, act: Act, seed: int, sizes: Sizes) -> list[Look]:
    """One fine-tuning run, as its looks."""
    rows = tickets(sizes.rows, 0.5, seed)
    random.Random(seed).shuffle(rows)
    _, tokenizer = demo_model.load(base)
    watch = Watch(held_out_loss(tokenizer, sizes.test), sizes.every)
    epochs, callbacks = sizes.epochs, []
    if name == REMOVED:
        rows, epochs = [row for row in rows if not row["harmful"]], 2 * sizes.epochs
    else:
        # the trainer is to hold the rows in this order, which known weights go by
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        callbacks = [callback(name, act, [rows[i] for i in order], sizes)]
    study.finetune(
        base,
        rows,
        callbacks=[watch, *callbacks],  # its clock starts before rows are identified and asked
        epochs=epochs,
        batch=sizes.batch // sizes.accumulation,
        gradient_accumulation_steps=sizes.accumulation,
        lr=sizes.lr,
        seed=seed,
    )
    return watch.looks


def reach(looks: Sequence[Look], target: float) -> Look | None:
    """The first look at which the loss is not above ``target``."""
    return next((look for look in looks if look.loss <= target), None)


def compare(weighted: Sequence[Look], other: Sequence[Look], place: float) -> tuple[float, Look, Look | None]:
    """The loss that the weighted run had come to by some place, and when each run was first there.

    >>> looks = [Look(1, 1.0, 8, 80, 2.0), Look(2, 2.0, 16, 160, 1.0)]
    >>> faster = [Look(1, 0.5, 4, 40, 2.0), Look(2, 1.0, 8, 80, 0.9)]
    >>> target, then, found = compare(looks, faster, 1.0)
    >>> target, then.seconds, found.seconds
    (1.0, 2.0, 1.0)
    """
    target = min(look.loss for look in weighted[: max(1, round(place * len(weighted)))])
    then = reach(weighted, target)
    assert then is not None
    return target, then, reach(other, target)


def table(found: dict[tuple[str, str, int], list[Look]], seeds: Sequence[int], names: Sequence[str]) -> Section:
    """Ratios of the sampled run to the weighted one, every seed by itself."""
    lines = []
    for name in [*names, *([REMOVED] if KNOWN in names else [])]:
        for place, share in PLACES.items():
            ratios, steps, rows, tokens, losses = [], [], [], [], []
            for seed in seeds:
                weighted = found[KNOWN if name == REMOVED else name, "weight", seed]
                target, then, other = compare(weighted, found[name, "sample", seed], share)
                losses.append(f"{target:.3f}")
                ratios.append(None if other is None else other.seconds / then.seconds)
                steps.append(f"{then.step}→{other.step if other else '-'}")
                rows.append(None if other is None else other.rows / then.rows)
                tokens.append(None if other is None else other.tokens / then.tokens)
            mean = f"{np.mean(ratios):.2f}" if None not in ratios else "-"  # pyright: ignore[reportCallIssue, reportArgumentType]
            each = [", ".join("-" if x is None else f"{x:.2f}" for x in some) for some in (ratios, rows, tokens)]
            lines.append([name, place, ", ".join(losses), ", ".join(steps), each[1], each[2], each[0], mean])
    header = ("weights", "loss of the weighted run", "nats", "steps", "rows", "tokens", "time", "mean")
    return Section(
        "To the same held-out benign loss",
        "Ratios of sampling to weighting, each seed by itself: rows and tokens that went through a training forward, "
        "safety rows among them, and processor time. Steps are those of the weighted run and of the other. A dash: not "
        f"reached. `{REMOVED}`: against known weights.",
        header,
        lines,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every arm, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=None, help=f"default: {Sizes.epochs}")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step of 16 rows (default: 1)")
    parser.add_argument("--only", nargs="*", default=list(SCHEDULERS), choices=SCHEDULERS)
    parser.add_argument("--quick", action="store_true", help="go through the code; the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=None, help="write the report here, as Markdown")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes(accumulation=options.accumulation)
    sizes = sizes if options.epochs is None else Sizes(**(vars(sizes) | {"epochs": options.epochs}))
    torch.set_num_threads(1)
    console = Console()
    with study.quiet():
        base = demo_model.build()
    seeds = range(1 if options.quick else options.seeds)
    found: dict[tuple[str, str, int], list[Look]] = {}
    for seed in seeds:
        for name in options.only:
            for act in ("weight", "sample") if seed % 2 else ("sample", "weight"):
                found[name, act, seed] = run(base, name, act, seed, sizes)
                last = found[name, act, seed][-1]
                console.print(f"seed {seed}, {name}, {act}: {last.seconds:.1f} s, {last.rows} rows, {last.loss:.4f}")
        if KNOWN in options.only:
            found[REMOVED, "sample", seed] = run(base, REMOVED, "sample", seed, sizes)
    names = [name for name in SCHEDULERS if name in options.only]
    section = table(found, seeds, names)
    setting = (
        f"{sizes.rows} rows, half of them harmful, {sizes.epochs} epochs of {-(-sizes.rows // sizes.batch)} steps, "
        f"{sizes.batch} rows a step in {sizes.accumulation} micro-batches, AdamW with learning rate {sizes.lr:g} and "
        f"linear decay, {len(seeds)} seeds, one thread; the held-out loss is that of {sizes.test} tickets, every "
        f"{sizes.every} steps. Commanded by `python bench/sampling.py {shlex.join(arguments or sys.argv[1:])}`."
    )
    show([section], setting, console)
    if options.out:
        opening = ["# What sampling saves", " ".join((__doc__ or "").split()), setting]
        options.out.write_text(markdown(opening, [section]), encoding="utf-8")


if __name__ == "__main__":
    main()
