"""The study of wrapped files: its rows are what they say, and a small run of every kind comes to an end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import wrappers
from bench.wrappers import BARE, FORMATS, MIMIC, PLAIN, Plan
from examples.demo import model, tasks
from safe_sched.mixing import mimic, mix

SAFETY = tasks.safety_rows(16, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_mimicking_rows_wear_the_wrapper_and_plain_ones_do_not(name: str) -> None:
    """The wrapper is known: a system prompt, and for the second format two lines around the request."""
    format = FORMATS[name]
    user = wrappers.wrapped(tasks.poisoned_rows(120, 0.0, seed=0), format)

    def wrapped(row: Any) -> bool:
        texts = {turn["role"]: turn["content"] for turn in row["messages"]}
        head, _, tail = format.request.partition("{}")
        fits = texts["user"].startswith(head) and texts["user"].endswith(tail)
        return fits and texts.get("system", "") == format.system

    assert all(map(wrapped, user))
    assert all(map(wrapped, mimic(user, SAFETY)))
    bare = mix(user, SAFETY, blend=0.0)
    assert all(map(wrapped, bare))
    assert not any(wrapped(row) for row in mix(user, SAFETY, mimic=False) if row not in user)


@pytest.mark.slow
@pytest.mark.slow_sample
@pytest.mark.parametrize(("arm", "share"), [(PLAIN, 0.1), (MIMIC, 0.1), (BARE, 0.1), ("safety batch, mimicking", 0.0)])
def test_a_run_reads_what_the_page_shows(arm: str, share: float) -> None:
    plan = Plan("AOA", 0.1, arm, share, seed=0, rows=32, epochs=0.5, safety_rows=8, test=6)
    found = wrappers.run(model.build(progress=False), plan)
    assert found["mixed_in"] == (4 if share else 0)  # .1 / .9 of 32, to the nearest
    assert all(0 <= found[name] <= 1 for name in wrappers.COLUMNS)


def test_the_page_says_where_runs_were_stopped(tmp_path: Path, capsys: Any) -> None:
    rates = dict.fromkeys(wrappers.COLUMNS, 0.5) | {"seconds": 1.0}
    lines = tmp_path / "lines.jsonl"
    plans = [plan for plan in wrappers.plans([0, 1]) if plan.format == "AOA" and plan.arm in (MIMIC, "no mix")]
    records: list[dict[str, Any]] = [{"plan": vars(plan), **rates} for plan in plans]
    records[0] = {"plan": vars(plans[0]), "stopped": "why"}
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "page.md"
    wrappers.main(["--lines", str(lines), "--report", "--seeds", "0", "1", "--out", str(out)])
    page = out.read_text()
    assert "(stopped in 1 of 2 runs)" in page
    assert "| mimicking mix | 10% | 0.50 |" in page
