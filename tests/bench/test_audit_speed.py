"""The bench of the audit's speed: files of the right size, and a table of both kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import audit_speed
from safe_sched.data import open_rows

pytest.importorskip("sklearn")


def test_repeated_rows_are_all_different(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "Add.", "input": "", "output": "3", "source": "x"}\n' * 2)
    rows = list(open_rows(audit_speed.repeated(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 7)))
    assert [row["output"] for row in rows] == ["3 0", "3 0", "3 1", "3 1", "3 2", "3 2", "3 3"]
    assert "source" not in rows[0]
    prompts = [row["prompt"] for row in open_rows(audit_speed.tiny(tmp_path / "c.jsonl", 50))]
    assert len(set(prompts)) == 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_small_run_writes_both_tables(tmp_path: Path) -> None:
    rows = [{"instruction": f"What is {n} plus {n}?", "input": "", "output": str(2 * n)} for n in range(40)]
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    arguments = ["--data", str(tmp_path), "--hosts", "gsm8k", "--rows", "90", "--memory-rows", "50"]
    audit_speed.main([*arguments, "--out", str(tmp_path / "page.md")])
    lines = (tmp_path / "page.md").read_text("utf-8").splitlines()
    (speed,) = [line for line in lines if line.startswith("| gsm8k |")]
    assert float(speed.split(" | ")[1].replace(",", "")) > 0
    peaks = [float(line.strip("| ").split(" | ")[2].replace(",", "")) for line in lines if line.startswith("| 50 |")]
    assert len(peaks) == 2
    assert all(20 < peak < 4000 for peak in peaks)
