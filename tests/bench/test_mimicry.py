"""The mimicry bench: what it masks, what its classifier can and cannot tell apart, and that all of it runs."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from bench import mimicry
from bench.formats import SYNTHETIC, make
from bench.mimicry import MARK, TASKS, agreement, auroc, halves, prompts_of, reproduction, words_masked
from safe_sched.data.rows import core_rows
from safe_sched.mixing.formats import TaskFormat, induce_format
from safe_sched.mixing.templates import ANYTHING


def test_masked_texts_keep_no_letter_but_those_of_the_shapes() -> None:
    for row in core_rows():
        assert set(re.findall(r"[^\W_]", words_masked(row["prompt"]))) <= set("wW9")


def test_made_up_texts_have_a_flag_for_every_character() -> None:
    for name in SYNTHETIC:
        for made in make(name, 20):
            for text, mask in made.constant:
                assert len(text) == len(mask)


def test_two_halves_of_a_task_cannot_be_told_apart_and_raw_safety_prompts_can() -> None:
    """The classifier at both ends of its scale; rendered prompts lie between, nearer to chance."""
    carriers, others = halves([made.row for made in make("AutoIF", 300)])
    prompts = prompts_of(induce_format(carriers), core_rows()[:150], others)
    again = [row["prompt"] for row in carriers]
    assert abs(auroc([*map(words_masked, again)], [*map(words_masked, prompts["task"])]) - 0.5) < 0.12
    unmimicked, rendered = (
        auroc([*map(words_masked, prompts[kind])], [*map(words_masked, prompts["task"])])
        for kind in ("unmimicked", "rendered")
    )
    assert unmimicked > 0.99
    assert rendered < unmimicked - 0.1


def test_agreement_and_reproduction_see_a_format_that_was_not_found() -> None:
    """The negative control: everything in one slot gives every text back, and no constant."""
    made = make("AutoIF", 60)
    rows = [one.row for one in made]
    found = induce_format(rows)
    assert agreement(found, made) == (1.0, 1.0)
    assert reproduction(found, rows)[0] == 1.0
    saved = json.loads(found.to_json())
    saved["templates"]["prompt"] = [{"constants": ANYTHING.constants, "options": None}]
    saved["clusters"][0] |= {"templates": [0], "main": {"part": 0, "slot": 0, "answer_slot": None}}
    blind = TaskFormat.from_json(json.dumps(saved))
    assert agreement(blind, made)[1] == 0.0
    assert reproduction(blind, rows) == (1.0, 0.0)


@pytest.mark.slow
def test_the_bench_goes_through_and_keeps_the_page_that_it_writes_into(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number, name in enumerate([*TASKS.values(), "safety_refusals"]):
        made = make(list(SYNTHETIC)[number], 60, seed=number)
        rows = [
            {"instruction": "".join(text for text, _ in one.constant), "input": "", "output": rng.choice(["a", "b"])}
            for one in made
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{MARK}\n\nold", "utf-8")
    mimicry.main(["--data", str(tmp_path), "--rows", "30", "--synthetic-rows", "60", "--out", str(page)])
    text = page.read_text("utf-8")
    assert text.startswith(f"# Title\n\n{MARK}\n")
    assert "old" not in text
    for part in ("## Formats", "| gsm8k |", "| multiple choice |", "## Controls", "Targets missed"):
        assert part in text
