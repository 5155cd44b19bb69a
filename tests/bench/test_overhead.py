"""The overhead bench goes through all of its code; its quick numbers mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.slow_sample
def test_the_bench_measures_every_section_and_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "overhead.md"
    command = [sys.executable, "bench/overhead.py", "--quick", "--out", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, capture_output=True)
    text = page.read_text(encoding="utf-8")
    for section in ("Training time", "Peak memory", "The scheduler's update", "The start of training"):
        assert f"## {section}" in text
    assert "the numbers mean nothing" in text
