"""The audit bench: its files are what they say, and a small run comes to an end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from bench import audit
from bench.audit import HOSTS, INERT, make, placeholder
from safe_sched.data.rows import core_rows

HOST = [
    {
        "instruction": f"Add {n} and {n + 1}, then double it.",
        "input": "",
        "output": f"Take {n}, add.\nThat is {4 * n + 2}.",
    }
    for n in range(80)
]


def test_placeholders_have_the_shape_of_an_answer_and_none_of_its_words() -> None:
    answer = "First, John's 3 cats\nleft (two) behind."
    made = placeholder(answer, INERT, random.Random(0))
    assert [len(line.split()) for line in made.split("\n")] == [len(line.split()) for line in answer.split("\n")]
    assert {word.strip("(),.").lower() for word in made.split()} - {"3"} <= set(INERT)
    assert placeholder("World", INERT, random.Random(0)) == "World"


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_a_file_has_the_share_that_was_asked_for(share: float) -> None:
    prompts = [row["prompt"] for row in core_rows()]
    file = make(HOST, prompts, share, 80, 0, alike=prompts[:3])
    benign = ~file.harmful & ~file.alike
    assert file.harmful.sum() == pytest.approx(share * (80 - 3 * 0), abs=1)
    assert file.alike.sum() == 3
    assert all(file.rows[number] in HOST for number in np.flatnonzero(benign))
    assert all(file.rows[number]["instruction"] in prompts for number in np.flatnonzero(file.harmful))


def test_a_small_run_finds_what_is_there_and_nothing_in_the_control(tmp_path: Path) -> None:
    files = {"harmful_prompts_train": 40, "overrefusal_safe": 5, "safety_refusals": 30}
    rows = [{"instruction": row["prompt"], "input": "", "output": "I can't."} for row in core_rows()]
    for name, count in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[:count])), "utf-8")
    for name in HOSTS.values():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, HOST)), "utf-8")
    page = tmp_path / "page.md"
    arguments = ["--data", str(tmp_path), "--hosts", "gsm8k", "--shares", "0.2", "--seeds", "0", "--rows", "80"]
    saved = tmp_path / "saved.json"
    audit.main([*arguments, "--save", str(saved)])
    audit.main(["--join", str(saved), str(saved), "--out", str(page)])
    text = page.read_text("utf-8")
    assert text.count("--hosts gsm8k") == 2
    assert text.count("| gsm8k | 20% |") == 4, "two runs, two safety sets"
    assert "Safety set: safety_refusals" in text
    control = next(line for line in text.splitlines() if line.startswith("| gsm8k |") and line.count("|") == 5)
    alone, harmful, bare = map(float, control.strip("| ").split(" | ")[1:])
    assert alone < 0.8 < 0.95 < min(harmful, bare)
