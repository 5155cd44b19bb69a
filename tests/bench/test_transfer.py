"""The transfer bench goes through all of its code; its quick numbers mean nothing. Its sets keep their promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.transfer import UNSEEN, make_sets, unseen_phrases
from examples.demo import tasks

ROOT = Path(__file__).parents[2]


def test_no_prompt_is_trained_on_and_scored_and_unseen_areas_are_unseen() -> None:
    sets = make_sets(600, 150)
    trained = {tasks.prompt_of(row) for row in [*sets.train, *sets.safety]}
    assert not any(phrase in prompt for prompt in trained for phrase in unseen_phrases())
    assert len(unseen_phrases()) == 4 * sum(len(tasks.words.HARMFUL[area][1]) for area in UNSEEN)
    for name, rows in sets.groups.items():
        assert len(rows) == 150
        prompts = {tasks.prompt_of(row) for row in rows}
        assert not prompts & trained
        assert all(row["harmful"] == name.startswith("harmful") for row in rows)
        unseen = [any(phrase in prompt for phrase in unseen_phrases()) for prompt in prompts]
        assert all(unseen) if name in ("harmful, unseen areas", "refusals of the same prompts") else not any(unseen)
    wordings = {row["messages"][1]["content"] for row in sets.train if row["harmful"]}
    scored = {row["messages"][1]["content"] for row in sets.groups["harmful, other prompts and wordings"]}
    assert not wordings & scored


@pytest.mark.slow
def test_the_bench_measures_every_arm_and_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "transfer.md"
    command = [sys.executable, "bench/transfer.py", "--quick", "--out", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, capture_output=True)
    text = page.read_text(encoding="utf-8")
    for part in ("## AUROC", "## Mean P(harmful)", "| hidden states |", "control: random features", "cannot tell"):
        assert part in text
    assert "the numbers mean nothing" in text
