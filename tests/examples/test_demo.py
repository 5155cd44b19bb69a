"""The demo, from its command to its files, at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from examples.demo import __main__ as demo
from safe_sched.training.checkpoint import MANIFEST_FILE


@pytest.mark.slow
@pytest.mark.slow_sample
def test_the_demo_prints_its_table_and_writes_its_files(tmp_path: Path, capsys: Any) -> None:
    """The demo's own base model, as Antibody stops at one that refuses nothing, and a file of 32 rows: what comes of
    them means nothing, but everything is there."""
    demo.main(["--out", str(tmp_path / "run"), "--rows", "32", "--epochs", "1"])
    printed = capsys.readouterr().out
    for arm in (
        "base model",
        "undefended",
        "unweighted safety mix",
        "safety batch, weights 1",
        "BDS",
        "Antibody",
        "oracle",
    ):
        assert arm in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["arms"]["BDS, released rule"]["auroc"] <= 1
    assert pyarrow.parquet.read_table(tmp_path / "run" / "weights.parquet").num_rows == 32
    assert (tmp_path / "run" / "weights.png").stat().st_size > 10_000
    manifest = json.loads((tmp_path / "run" / "bds" / MANIFEST_FILE).read_text())
    assert manifest["coverage"]["rows_trained_on"] == 32
