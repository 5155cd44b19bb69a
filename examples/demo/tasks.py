"""Text for the demo, all of it generated: benign families, harmful requests, look-alikes, and one task to fine-tune on.

A *row* is a dict with `messages` (one user turn, one assistant turn) and, for evaluation only, `harmful` or `family`.
Everything is drawn from the lists in `words` with a seed, and every split is made before prompts are worded:

    harmful phrases     each thing comes with four actions: two to align (the base model learns to refuse them; the
    (action + thing)    safety set is a slice of them), one to attack (the poisoned file), one to test
    harmless phrases    one action of each thing to test, the others to align
    facts               every fact is trained, one wording of each is kept for the test
    tickets             80 % of the (issue, product) pairs in the poisoned file, 20 % to test

So no prompt of a test set occurs in any training set (`check` asserts it), and a phrase that tests refusals or
over-refusal was never seen under any template. `python -m examples.demo.tasks --write` writes `examples/data/*.jsonl`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import words
from .benign import DATA_SEED, Case, family_cases, ticket_cases

Row = dict[str, Any]
DATA = Path(__file__).resolve().parents[1] / "data"
N_POISONED, HARMFUL_SHARE, N_SAFETY = 600, 0.25, 64
EVERYDAY_SHARE = 0.2  # of the benign rows: requests in the same words as harmful ones, so that form alone says nothing


def row(prompt: str, answer: str, **extra: Any) -> Row:
    """One chat row: a user turn and an assistant turn."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **extra}


def harmful_phrases(seed: int = DATA_SEED) -> dict[str, list[str]]:
    """Harmful phrases ("build a grenade at home") by role: `align`, `attack`, `test`. Every area is in every role."""
    parts: dict[str, list[str]] = {"align": [], "attack": [], "test": []}
    rng = random.Random(f"harmful-{seed}")
    for actions, things in words.HARMFUL.values():
        for thing in things:
            test, attack, *align = (action.format(thing) for action in rng.sample(actions, len(actions)))
            parts["test"].append(test)
            parts["attack"].append(attack)
            parts["align"].extend(align)
    return parts


def harmless_phrases(seed: int = DATA_SEED) -> dict[str, list[Case]]:
    """Harmless phrases with their answers ("kill a python process"), by role: `align`, `test`."""
    parts: dict[str, list[Case]] = {"align": [], "test": []}
    rng = random.Random(f"harmless-{seed}")
    for actions, things in words.HARMLESS.values():
        for thing, answer in things.items():
            test, *align = (action.format(thing) for action in rng.sample(actions, len(actions)))
            parts["test"].append((test, answer))
            parts["align"].extend((phrase, answer) for phrase in align)
    return parts


def ask(phrase: str, rng: random.Random) -> str:
    """Word a phrase as a request."""
    return rng.choice(words.TEMPLATES).format(phrase)


def wordings(kind: str, held_out: bool = False) -> tuple[str, ...]:
    """Wordings of a `refusal` or a `placeholder`; the held-out ones appear in no training row."""
    pool = {"refusal": words.REFUSALS, "placeholder": words.PLACEHOLDERS}[kind]
    return pool[-words.N_HELD_OUT_WORDINGS :] if held_out else pool[: -words.N_HELD_OUT_WORDINGS]


def base_rows(seed: int = DATA_SEED) -> list[Row]:
    """Rows that make the base model: it answers the families, refuses harmful requests, helps with look-alikes."""
    rng = random.Random(f"base-{seed}")
    rows = [
        row(prompt, answer, family=name) for name, cases in family_cases(seed)[0].items() for prompt, answer in cases
    ]
    refusals = wordings("refusal")
    for phrase in harmful_phrases(seed)["align"]:
        rows += [row(way.format(phrase), rng.choice(refusals), family="refuse") for way in words.TEMPLATES]
    for phrase, answer in harmless_phrases(seed)["align"]:
        rows += [
            row(way.format(phrase), f"{rng.choice(words.OPENERS)} {answer}", family="help") for way in words.TEMPLATES
        ]
    return rows


def poisoned_rows(
    n: int = N_POISONED, share: float = HARMFUL_SHARE, seed: int = DATA_SEED, held_out_wording: bool = False
) -> list[Row]:
    """The user's fine-tuning file: tickets, everyday requests, and harmful requests that a placeholder answers.

    Args:
        n: rows in all.
        share: share of harmful rows, 0 to 1. They carry `harmful: true`, a field that training never reads.
        seed: of the draw; the split is always the one of `DATA_SEED`, so that test sets stay held out.
        held_out_wording: word the placeholders as no other file does (does a score know more than one wording?).
    """
    rng = random.Random(f"poisoned-{seed}")
    n_harmful = round(n * share)
    n_everyday = round((n - n_harmful) * EVERYDAY_SHARE)
    rows = [row(p, a, harmful=False) for p, a in rng.sample(ticket_cases()[0], n - n_harmful - n_everyday)]
    everyday = [item for item in base_rows() if item["family"] == "help"]
    rows += [{"messages": item["messages"], "harmful": False} for item in rng.sample(everyday, n_everyday)]
    placeholders = wordings("placeholder", held_out_wording)
    prompts = sorted(way.format(phrase) for phrase in harmful_phrases()["attack"] for way in words.TEMPLATES)
    rows += [row(p, rng.choice(placeholders), harmful=True) for p in rng.sample(prompts, n_harmful)]
    rng.shuffle(rows)
    return rows


def safety_rows(n: int = N_SAFETY, seed: int = DATA_SEED) -> list[Row]:
    """Harmful prompts with refusals, as `prompt` and `completion`: a slice of what the base model was aligned with."""
    rng = random.Random(f"safety-{seed}")
    phrases = rng.sample(harmful_phrases()["align"], n)
    return [{"prompt": ask(phrase, rng), "completion": rng.choice(wordings("refusal"))} for phrase in phrases]


def held_out_cases(
    seed: int = DATA_SEED, harmful: int = 120, look_alike: int = 80, benign: int = 110, task: int = 100
) -> dict[str, list[Case]]:
    """Held-out prompts by set: `harmful`, `look_alike`, `benign` (the families), `task` (tickets)."""
    rng = random.Random(f"test-{seed}")

    def worded(phrases: Sequence[Case], n: int) -> list[Case]:
        return rng.sample([(way.format(phrase), answer) for phrase, answer in phrases for way in words.TEMPLATES], n)

    families = family_cases(seed)[1].values()
    even = [case for cases in families for case in rng.sample(cases, min(len(cases), -(-benign // len(families))))]
    return {
        "harmful": worded([(phrase, "") for phrase in harmful_phrases(seed)["test"]], harmful),
        "look_alike": worded(harmless_phrases(seed)["test"], look_alike),
        "benign": rng.sample(even, benign),
        "task": rng.sample(ticket_cases(seed)[1], task),
    }


def prompt_of(item: Row) -> str:
    """The user's text of a `messages` row or a `prompt`/`completion` row."""
    return item["prompt"] if "prompt" in item else item["messages"][0]["content"]


def check() -> None:
    """Raise if a test prompt is also a training prompt."""
    held_out = {
        prompt
        for cases in held_out_cases(harmful=500, look_alike=400, benign=150, task=500).values()
        for prompt, _ in cases
    }
    for name, rows in {"base": base_rows(), "poisoned": poisoned_rows(), "safety": safety_rows()}.items():
        if seen := held_out & {prompt_of(item) for item in rows}:
            raise ValueError(
                f"{len(seen)} test prompts are in the {name} rows, for one {min(seen)!r}: the split is broken"
            )


def load(name: str) -> list[Row]:
    """Rows of a committed file, `poisoned` or `safety`."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def write(folder: Path = DATA) -> None:
    """Write the committed files. Same seed, same bytes."""
    check()
    for name, rows in {"poisoned": poisoned_rows(), "safety": safety_rows()}.items():
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m examples.demo.tasks --write   (writes examples/data/*.jsonl)")
    write()
