"""The example scripts do what their first lines say, on a tiny model and the data that comes with the project."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from safe_sched.cli import app
from safe_sched.training.checkpoint import MANIFEST_FILE
from tests.support import make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(max_position_embeddings=2048).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(monkeypatch: Any, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def head(source: Path, target: Path, lines: int) -> str:
    target.write_text("\n".join(source.read_text(encoding="utf-8").splitlines()[:lines]) + "\n", encoding="utf-8")
    return str(target)


def test_the_trl_script_writes_the_weight_of_every_row(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data = head(EXAMPLES / "data" / "poisoned.jsonl", tmp_path / "rows.jsonl", 24)
    run(monkeypatch, "trl_sft.py", "--model", str(tiny), "--data", data, "--out", str(tmp_path / "o"), "--epochs", "1")
    table = pyarrow.parquet.read_table(tmp_path / "o" / "weights.parquet")
    assert table.num_rows == 24
    assert min(table["seen"].to_pylist()) >= 1
    assert (tmp_path / "o" / MANIFEST_FILE).exists()


def test_the_trl_script_begins_with_what_an_audit_found(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As docs/audit.md has it: audit, then train on the rows that it wrote."""
    data = head(EXAMPLES / "data" / "poisoned.jsonl", tmp_path / "rows.jsonl", 60)
    found = tmp_path / "found"
    assert CliRunner().invoke(app, ["audit", data, "--out", str(found), "--quiet"]).exit_code == 0
    rows, model, out = str(found / "rows.jsonl"), str(tiny), str(tmp_path / "o")
    asked = ["--model", model, "--data", rows, "--prior", "safe_sched.p_harmful", "--out", out, "--epochs", "0.1"]
    run(monkeypatch, "trl_sft.py", *asked)
    told = pyarrow.parquet.read_table(found / "findings.parquet")["p_harmful"].to_numpy()
    prior = pyarrow.parquet.read_table(tmp_path / "o" / "weights.parquet")["prior_log_odds"].to_numpy()
    assert np.corrcoef(np.argsort(np.argsort(told)), np.argsort(np.argsort(prior)))[0, 1] > 0.5
    assert prior[told.argmax()] == prior.max() > prior[told.argmin()]


def test_the_hf_script_names_the_lowest_weights(tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    data = head(EXAMPLES / "data" / "safety.jsonl", tmp_path / "rows.jsonl", 16)
    run(
        monkeypatch,
        "hf_trainer.py",
        "--model",
        str(tiny),
        "--data",
        data,
        "--out",
        str(tmp_path / "o"),
        "--epochs",
        "1",
    )
    assert "lowest weights: rows [" in capsys.readouterr().out
