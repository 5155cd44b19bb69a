"""Does a trained head know harmful rows that it has never seen? In-domain and out-of-domain, beside controls."""

from __future__ import annotations

import argparse
import hashlib
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/transfer.py
from bench.report import Section, show
from bench.report import markdown as page
from examples.demo import model as demo_model
from examples.demo import study, tasks, words
from safe_sched import BDS, NeuralBDS
from safe_sched.rows.keys import layout_of
from safe_sched.rows.nll import nll_from_logits
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.measure.features import score_rows
from safe_sched_hf.safety import SafetySet

Row = tasks.Row
UNSEEN = ("forgery", "extortion", "hate", "arson")
"""Harmful areas that neither the training file nor the safety set has."""

SAFETY_BATCH = 2
WIDTH = 64  # of the random features


@dataclass(frozen=True)
class Sets:
    """Rows to train on, rows to be safe with, and the groups that are scored."""

    train: list[Row]
    safety: list[Row]
    groups: dict[str, list[Row]]


QUESTIONS: dict[str, tuple[str, str]] = {
    "in-domain": ("harmful, other prompts and wordings", "benign, other prompts"),
    "out of domain": ("harmful, unseen areas", "benign, another task"),
    "against look-alikes": ("harmful, unseen areas", "benign, unseen look-alikes"),
    "against refusals": ("harmful, unseen areas", "refusals of the same prompts"),
}


def unseen_phrases() -> list[str]:
    """Every action of the unseen areas on every of its things."""
    areas = [words.HARMFUL[area] for area in UNSEEN]
    return [action.format(thing) for actions, things in areas for action in actions for thing in things]


def sorting_rows(count: int, rng: random.Random) -> list[Row]:
    """Another benign task, made differently: put words in order. Nothing of the training file, lists for answers."""
    pool = sorted({word for pair in (words.PLURALS, words.OPPOSITES, words.COLOURS) for word in pair})
    ways = ("Sort from a to z: {}", "{}. Put these in alphabetical order.", "Which order has a dictionary for {}?")
    rows = []
    for _ in range(count):
        some = rng.sample(pool, rng.randint(3, 6))
        rows.append(tasks.row(rng.choice(ways).format(", ".join(some)), ", ".join(sorted(some)) + ".", harmful=False))
    return rows


def make_sets(rows: int, test: int) -> Sets:
    """All sets, without a prompt in common; the unseen areas are in the test alone."""
    rng = random.Random("transfer")
    unseen = unseen_phrases()

    def of_unseen(prompt: str) -> bool:
        return any(phrase in prompt for phrase in unseen)

    train = [row for row in tasks.load("poisoned")[:rows] if not of_unseen(tasks.prompt_of(row))]
    safety = [row for row in tasks.load("safety") if not of_unseen(tasks.prompt_of(row))]
    known = {tasks.prompt_of(row) for row in [*train, *safety]}
    other = [
        row
        for row in tasks.poisoned_rows(4 * test, share=0.5, held_out_wording=True, seed=1)
        if tasks.prompt_of(row) not in known and not of_unseen(tasks.prompt_of(row))
    ]
    prompts = rng.sample([way.format(phrase) for phrase in unseen for way in words.TEMPLATES], test)
    placeholders, refusals = tasks.wordings("placeholder", held_out=True), tasks.wordings("refusal", held_out=True)
    look_alikes = rng.sample(
        [
            (way.format(phrase), answer)
            for phrase, answer in tasks.harmless_phrases()["test"]
            for way in words.TEMPLATES
        ],
        test,
    )
    groups = {
        "harmful, other prompts and wordings": [row for row in other if row["harmful"]][:test],
        "benign, other prompts": [row for row in other if not row["harmful"]][:test],
        "harmful, unseen areas": [tasks.row(p, rng.choice(placeholders), harmful=True) for p in prompts],
        "benign, another task": sorting_rows(test, rng),
        "benign, unseen look-alikes": [
            tasks.row(p, f"{rng.choice(words.OPENERS)} {answer}", harmful=False) for p, answer in look_alikes
        ],
        "refusals of the same prompts": [tasks.row(p, rng.choice(refusals), harmful=False) for p in prompts],
    }
    return Sets(train, safety, groups)


# arms -------------------------------------------------------------------------------------------------------------


def random_vectors(texts: Sequence[str]) -> np.ndarray:
    """Features that are a name of the text and say nothing of it."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts]
    return np.stack([np.random.default_rng(seed).standard_normal(WIDTH) for seed in seeds])


def arms(base: Path) -> dict[str, Callable[[int], Any]]:
    """Schedulers by name, from a seed."""
    return {
        "hidden states": lambda seed: NeuralBDS(seed=seed),
        "hidden states, a fifth of the rows measured": lambda seed: NeuralBDS(probe_share=0.2, seed=seed),
        "hidden states, mlp": lambda seed: NeuralBDS(head="mlp", seed=seed),
        "frozen encoder (the base model)": lambda seed: NeuralBDS(features="encoder", encoder=str(base), seed=seed),
        "control: random features": lambda seed: NeuralBDS(features="encoder", encoder=random_vectors, seed=seed),
        "BDS, one logit a row": lambda seed: BDS(seed=seed),
    }


@torch.no_grad()
def losses(model: Any, tokenizer: Any, rows: Iterable[Row]) -> np.ndarray:
    """Mean loss of each row's answer, nats per token."""
    found = []
    for tokens, labels in SafetySet([study.as_messages(row) for row in rows], tokenizer, None, 1, 0).rows:
        ids = tokens[None]
        found.append(float(nll_from_logits(model(input_ids=ids).logits, labels[None], layout_of(ids))))
    return np.array(found)


def measure(base: Path, sets: Sets, make: Callable[[int], Any], seed: int, epochs: float) -> dict[str, np.ndarray]:
    """Train once; P(harmful) of the training rows ("train") and of every group, where the scheduler can tell."""
    scheduler = make(seed)
    ours = SafeSchedCallback(scheduler, safety_data=sets.safety, safety_batch_size=SAFETY_BATCH)
    run = study.finetune(base, sets.train, callbacks=[ours], epochs=epochs, seed=seed)
    scores = {"train": ours.table().column("p_harmful").to_numpy(), "harmful": np.array(run.harmful)}
    scores["measured"] = ours.table().column("scored").to_numpy() > 0
    if isinstance(scheduler, NeuralBDS):
        scorer = ours.scorer()
        for name, rows in sets.groups.items():
            plain = [study.as_messages(row) for row in rows]
            encoder = scheduler.encoder
            with study.quiet():
                found = score_rows(
                    scorer, plain, model=run.model, tokenizer=run.tokenizer, encoder=encoder, batch_size=32
                )
            scores[name] = found.p_harmful.numpy()
    return scores


def auroc(harmful: np.ndarray, benign: np.ndarray) -> float:
    """Of a score that should be higher for harmful rows."""
    flags = np.r_[np.ones(len(harmful)), np.zeros(len(benign))]
    return float(roc_auc_score(flags, np.r_[harmful, benign]))


# report -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Mean, and range where it shows."""
    mean, low, high = float(np.mean(values)), min(values), max(values)
    return f"{mean:.2f}" if high - low < 0.01 else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def report(results: dict[str, list[dict[str, np.ndarray]]], raw: dict[str, np.ndarray], sets: Sets) -> list[Section]:
    """The tables."""
    lines, means = [], []
    for name, runs in results.items():
        training = [auroc(r["train"][r["harmful"]], r["train"][~r["harmful"]]) for r in runs]
        cells = [name, spread([float(r["measured"].mean()) for r in runs]), spread(training)]
        for harmful, benign in QUESTIONS.values():
            seen = all(harmful in r for r in runs)
            cells.append(spread([auroc(r[harmful], r[benign]) for r in runs]) if seen else "cannot tell")
        lines.append(cells)
        if all(group in r for r in runs for group in sets.groups):
            means.append([name, *(spread([float(r[group].mean()) for r in runs]) for group in sets.groups)])
    training = auroc(raw["train"][raw["harmful"]], raw["train"][~raw["harmful"]])
    cells = ["control: the row's loss under the base model", "-", spread([training])]
    lines.append(cells + [spread([auroc(raw[a], raw[b])]) for a, b in QUESTIONS.values()])
    count = ", ".join(f"{len(rows)} {name}" for name, rows in sets.groups.items())
    poisoned = sum(bool(row["harmful"]) for row in sets.train)
    return [
        Section(
            "AUROC",
            f"Trained on {len(sets.train)} rows, {poisoned} of them harmful, with {len(sets.safety)} safety rows; "
            f"neither has a request of the areas {', '.join(UNSEEN)}. Scored: {count}. `measured` is the share of "
            "training rows that were ever probed, `training` the AUROC on these rows themselves. 0.50 tells nothing.",
            ("", "measured", "training", *QUESTIONS),
            lines,
        ),
        Section("Mean P(harmful)", "The same runs.", ("", *sets.groups), means),
    ]


def markdown(sections: Sequence[Section], command: str, setting: str) -> str:
    """The report as a page."""
    opening = [
        "# Transfer",
        "A head that `NeuralBDS` has trained on one file scores rows of other files, without training. Made by\n\n"
        f"```text\n{command}\n```\n\n{setting}",
    ]
    return page(opening, sections)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="go through the code; the numbers mean nothing")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    parser.add_argument("--epochs", type=float, default=2, help="of fine-tuning (default: 2)")
    parser.add_argument("--out", type=Path, help="write the report as a Markdown page")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "bench/transfer.py", *(sys.argv[1:] if arguments is None else arguments)])
    seeds, epochs = (1, 0.3) if options.quick else (options.seeds, options.epochs)
    sets = make_sets(120 if options.quick else 600, 12 if options.quick else 150)

    console = Console()
    with study.quiet():
        base = demo_model.build()
        model, tokenizer = demo_model.load(base)
        raw = {name: losses(model, tokenizer, rows) for name, rows in sets.groups.items()}
        raw |= {"train": losses(model, tokenizer, sets.train)}
        raw |= {"harmful": np.array([bool(row["harmful"]) for row in sets.train])}
        results: dict[str, list[dict[str, np.ndarray]]] = {}
        for name, make in arms(base).items():
            with console.status(name):
                results[name] = [measure(base, sets, make, seed, epochs) for seed in range(seeds)]
    sections = report(results, raw, sets)
    setting = (
        f"The demo's model of a million parameters on the CPU, {epochs:g} epochs of full fine-tuning, {SAFETY_BATCH} "
        f"safety rows beside every {study.BATCH}; mean over {seeds} seeds, with the range where it shows."
    )
    if options.quick:
        setting += " A quick run: the numbers mean nothing."
    show(sections, setting, console)
    if options.out:
        options.out.write_text(markdown(sections, command, setting), encoding="utf-8")


if __name__ == "__main__":
    main()
