"""``safe-sched audit`` on rows that are tokens: a tokenizer reads them, for the scores and for the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safe_sched.cli import app
from tests.core.test_audit_cli import ROWS
from tests.support import make_tokenizer


def test_rows_of_tokens_are_read_with_the_tokenizer_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report shows the words that the tokens stand for. Control: without the option, no row can be read."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained("tokens")
    ids = [tokenizer(row["prompt"] + " " + row["completion"])["input_ids"] for row in ROWS[:60]]
    rows = [{"input_ids": one, "labels": [-100] * (len(one) - 2) + one[-2:]} for one in ids]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["audit", "t.jsonl", "--quiet", "--report", "html", "--show-text"]
    found = CliRunner().invoke(app, [*asked, "--out", "found", "--tokenizer", "tokens"])
    assert found.exit_code == 0, found.output
    words = str(tokenizer.decode(ids[3], skip_special_tokens=True)).split()
    assert json.dumps(" ".join(words[:3]))[1:-1] in Path("found/report.html").read_text()
    without = CliRunner().invoke(app, [*asked, "--out", "other"])
    assert without.exit_code not in (0, 1)
    assert "tokenizer" in without.stderr
