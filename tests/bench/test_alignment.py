"""The alignment bench goes through all of its code; its quick numbers mean nothing. Its sets keep their promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.alignment import ATTACKS, QUICK, Sizes, arms, held, make_sets, verdict
from examples.demo import tasks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_in_two_of_alignment_attack_and_test(seed: int) -> None:
    sets, sizes = make_sets(Sizes(), seed), Sizes()
    assert (len(sets.align), len(sets.harmful), len(sets.attack)) == (
        sizes.align_rows,
        sizes.harmful_rows,
        sizes.attack_rows,
    )
    aligned = {tasks.prompt_of(row) for row in [*sets.align, *sets.harmful]}
    attacked = {tasks.prompt_of(row) for row in sets.attack}
    tested = {prompt for cases in sets.cases.values() for prompt, _ in cases}
    assert not aligned & attacked
    assert not (aligned | attacked) & tested
    wordings = [{row["messages"][1]["content"] for row in rows} for rows in (sets.harmful, sets.attack)]
    assert not wordings[0] & wordings[1]
    known = {*tasks.wordings("placeholder"), *tasks.wordings("placeholder", held_out=True)}
    assert wordings[0] | wordings[1] <= known  # inert, all of them


def test_seeds_differ_in_their_rows_and_not_in_their_test() -> None:
    one, other = make_sets(QUICK, 0), make_sets(QUICK, 1)
    assert one.align != other.align
    assert one.attack != other.attack
    assert one.cases == other.cases


def runs(*steps: int | None) -> list[dict[str, Any]]:
    return [{"attacks": {"AdamW": {"half": n}}} for n in steps]


def test_a_model_that_never_fell_is_not_given_a_number() -> None:
    assert held(runs(8, 12), "AdamW", 20) == ["8, 12", "10"]
    assert held(runs(8, None), "AdamW", 20) == ["8, > 20", "> 14"]
    assert verdict(runs(8, None, 4), runs(12, 12, 4), "AdamW", 20) == "1 longer, 1 shorter; +1"


@pytest.mark.slow
def test_the_bench_runs_every_arm_and_writes_its_page(tmp_path: Path) -> None:
    page, lines = tmp_path / "alignment.md", tmp_path / "runs.jsonl"
    command = [sys.executable, "bench/alignment.py", "--quick", "--json", str(lines), "--out", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, capture_output=True)
    text = page.read_text(encoding="utf-8")
    for part in ("## Resistance", "## Against SFT alone", "## Usefulness", *(f"| {name} |" for name in arms())):
        assert part in text
    assert "the numbers mean nothing" in text
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [record["arm"] for record in records] == list(arms())
    assert all(record["attacks"].keys() == ATTACKS.keys() for record in records)
    again = tmp_path / "again.md"
    report = [sys.executable, "bench/alignment.py", "--report", str(lines), "--out", str(again)]
    subprocess.run(report, cwd=ROOT, check=True, timeout=100, capture_output=True)
    assert again.read_text(encoding="utf-8") == text
