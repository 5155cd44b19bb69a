"""The sampling bench: its comparison, and all of its code; its quick numbers mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.sampling import KNOWN, REMOVED, Look, compare, table

ROOT = Path(__file__).parents[2]


def looks(seconds: float, *losses: float) -> list[Look]:
    return [Look(n, n * seconds, 8 * n, 80 * n, loss) for n, loss in enumerate(losses, start=1)]


def test_runs_are_compared_at_the_loss_that_the_weighted_one_had() -> None:
    """Half way the weighted run is at 3, which the other reaches a step later, of half the time; 2 it never reaches."""
    weighted, other = looks(2.0, 4, 3, 2.5, 2), looks(1.0, 4, 3.5, 3, 2.4)
    target, then, found = compare(weighted, other, 0.5)
    assert found is not None
    assert (target, then.seconds, found.seconds) == (3, 4.0, 3.0)
    assert compare(weighted, other, 1.0)[2] is None
    runs = {(KNOWN, "weight", 0): weighted, (KNOWN, "sample", 0): other, (REMOVED, "sample", 0): other}
    lines = table(runs, [0], [KNOWN]).lines
    assert [line[-1] for line in lines] == ["0.75", "0.67", "0.75", "0.67"]


@pytest.mark.slow
def test_the_bench_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "sampling.md"
    subprocess.run(
        [sys.executable, "bench/sampling.py", "--quick", "--only", "known weights", "--out", str(page)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert "To the same held-out benign loss" in page.read_text(encoding="utf-8")
