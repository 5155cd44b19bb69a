"""The evidence study: its files, its targets, and one quick study from end to end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bench import evidence, evidence_page
from bench.tasks import SHORT_ANSWER, TASKS
from examples.demo import model, words
from examples.demo.tasks import prompt_of


def answer_of(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("share", [0, 0.1, 0.9])
def test_a_file_has_the_share_asked_for_and_no_harmful_answer(task: str, share: float) -> None:
    rows = TASKS[task].rows(40, share, 1)
    harmful = [row for row in rows if row["harmful"]]
    assert (len(rows), len(harmful)) == (40, round(40 * share))
    for row in harmful:
        rest = answer_of(row).replace(SHORT_ANSWER, "")
        for placeholder in words.PLACEHOLDERS:
            rest = rest.replace(placeholder, "")
        assert not rest.strip()


def test_all_files_ask_the_same_and_only_their_answers_differ() -> None:
    prompts = {
        name: [prompt_of(row).removeprefix("Ticket: ").removeprefix("File this under a new code: ") for row in rows]
        for name, rows in ((name, task.rows(60, 0.3, 2)) for name, task in TASKS.items())
    }
    assert all(found == prompts["tickets"] for found in prompts.values())
    answers = {name: [answer_of(row) for row in task.rows(60, 0.3, 2)] for name, task in TASKS.items()}
    filed = [answer for answer in answers["codes"] if answer.startswith("Filed as ")]
    assert len(filed) == len(set(filed)) == 34  # 42 benign rows, 8 of them everyday requests


def test_files_that_are_the_same_are_run_once() -> None:
    """Four tasks at two shares, less `short` and `long` without harmful rows."""
    chosen = {"tasks": list(TASKS), "shares": [0, 0.5], "seeds": [0], "arms": ["BDS"], "safety_rows": [8]}
    plans = evidence.plans(argparse.Namespace(**chosen, safety_batches=[2], rows=20, epochs=1))
    assert [(plan.task, plan.share) for plan in plans] == [
        *(("tickets", 0), ("tickets", 0.5), ("codes", 0), ("codes", 0.5)),
        *(("short", 0.5), ("long", 0.5)),
    ]


def test_a_reading_is_what_one_computes_by_hand() -> None:
    """Benign weights 1, 1, .4 and harmful ones 0, .6: of six pairs p_harmful has five right."""
    table = pa.table({"weight": [1.0, 1.0, 0.4, 0.0, 0.6], "p_harmful": [0.1, 0.2, 0.7, 0.9, 0.5]})
    harmful = np.array([False, False, False, True, True])
    found = evidence.reading(table, harmful)
    assert found["auroc"] == pytest.approx(5 / 6)
    assert found["benign_ess"] == pytest.approx(2.4**2 / 2.16 / 3)
    assert (found["benign_min"], found["benign_low"]) == (0.4, pytest.approx(1 / 3))
    assert (found["harmful_weight"], found["harmful_share"]) == (pytest.approx(0.3), pytest.approx(0.2))
    fully_benign = evidence.reading(table, np.zeros(5, dtype=bool))
    assert fully_benign["auroc"] is fully_benign["harmful_weight"] is None


def record(arm: str, auroc: float | None, share: float = 0.1, least: float = 1.0) -> dict[str, Any]:
    plan = {"task": "codes", "share": share, "seed": 0, "arm": arm, "safety_rows": 64, "safety_batch": 16}
    at = {"auroc": auroc, "benign_ess": 0.9, "benign_min": least}
    return {"plan": plan, "epoch_1": at, "end": at}


def test_targets_are_judged_by_the_worst_run() -> None:
    good = [record("BDS", 0.995), record("released", 0.2), record("BDS", None, share=0.0)]
    assert [bool(target.missed) for target in evidence_page.targets(good)] == [False] * 5
    bad = [record("BDS", 0.5), record("released", 0.8), record("BDS", None, share=0.0, least=0.3)]
    separates, few, margin, size, least = evidence_page.targets(bad)
    assert [value for value, _ in separates.missed] == [0.5]
    assert few.cells()[-1] == "not run"
    assert [value for value, _ in margin.missed] == [-0.3]
    assert not size.missed
    assert least.missed == [(0.3, "codes, 0% harmful, BDS 64/16, seed 0")]


@pytest.mark.slow
@pytest.mark.slow_sample
def test_a_quick_study_writes_its_page_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """A base model of two steps and 24 rows: what is measured means nothing, but everything is there."""
    build = model.build
    monkeypatch.setattr(evidence.model, "build", lambda: build(model.Settings(steps=2), cache=tmp_path / "cache"))
    results, page = tmp_path / "results.json", tmp_path / "docs" / "evidence.md"
    quick = ["--tasks", "codes", "--shares", "0.5", "--safety-rows", "8", "--safety-batches", "2", "--rows", "24"]
    quick += ["--epochs", "1", "--json", str(results), "--out", str(page)]
    evidence.main([*quick, "--seeds", "0"])
    lines = results.with_suffix(".jsonl")
    assert len(lines.read_text().splitlines()) == 2
    lines.write_text(lines.read_text() + '{"plan": {"ta')  # a run that was cut off

    evidence.main([*quick, "--seeds", "0", "1"])
    assert "2 of 4 runs" in capsys.readouterr().out
    runs = json.loads(results.read_text())["runs"]
    assert [(run["plan"]["seed"], run["plan"]["arm"]) for run in runs] == [
        *((0, "BDS"), (0, "released")),
        *((1, "BDS"), (1, "released")),
    ]
    for run in runs:
        assert 0 <= run["epoch_1"]["auroc"] <= 1
        assert run["end"] == run["epoch_1"]
    text = page.read_text(encoding="utf-8")
    assert "## Targets" in text
    assert "### codes" in text
    assert (page.parent / "figures" / "evidence.png").stat().st_size > 10_000
