"""The command line: what it hands over, what it prints, and how it ends; a stand-in measures the losses."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import safe_sched
from safe_sched.cli import app
from safe_sched.errors import DataError, ModelError, NumericsError
from safe_sched.estimators.reference import load_reference
from safe_sched.hooks import RowLosses, RowLossesRequest, hookimpl, manager
from safe_sched.rows.index import RowIndex

ROWS = [{"text": "a b"}, {"text": "c d"}, {"text": "e f"}]
KEYS = torch.tensor([7, -3, 12])
NLL = torch.tensor([0.5, 2.0, 1.25])


class StandIn:
    """A plugin that notes what it was asked and gives the answer it was made with."""

    def __init__(self) -> None:
        self.asked: list[RowLossesRequest] = []
        self.answer: Any = RowLosses(KEYS, NLL.clone(), torch.tensor([4, 5, 1000]))

    @hookimpl
    def safe_sched_row_losses(self, request: RowLossesRequest) -> RowLosses | None:
        self.asked.append(request)
        request.progress("loading", 0, None)
        request.progress("running", 3, 3)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    plugin = StandIn()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [])
    manager.cache_clear()
    manager().register(plugin)
    yield plugin
    manager.cache_clear()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def run(*arguments: Any) -> Any:
    # a wide screen: tables and messages stay on one line
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_version_and_help() -> None:
    assert run("--version").output == f"safe-sched {safe_sched.__version__}\n"
    assert "losses" in run("--help").output
    shown = run("losses", "--help")
    assert shown.exit_code == 0
    for part in (
        "--assistant-only-loss --out plain.parquet",
        'BDS(evidence="reference", ',
        "SafeSchedCallback",
        "Exit",
    ):
        assert part in shown.output


def test_what_is_written_is_what_bds_reads(stand_in: StandIn, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "losses.parquet"
    result = run("losses", "some/model", data, "--out", out)
    assert result.exit_code == 0, result.output
    table = pq.read_table(out)
    assert table.column_names == ["key", "nll", "label_tokens"]
    assert table.column("label_tokens").to_pylist() == [4, 5, 1000]
    assert load_reference(out, RowIndex(KEYS)).tolist() == [2.0, 0.5, 1.25]  # by key: -3, 7, 12


def test_the_summary_shows_the_numbers_and_the_next_step(stand_in: StandIn, data: Path, tmp_path: Path) -> None:
    """Mean of 0.5, 2 and 1.25: 1.25."""
    shown = run("losses", "some/model", data, "--out", tmp_path / "a.parquet").stdout
    for part in ("rows", " 3 ", "1,009", "1.2500", "0.5000, 2.0000", "seconds", str(tmp_path / "a.parquet")):
        assert part in shown
    assert f'BDS(evidence="reference", reference="{tmp_path / "a.parquet"}")' in shown


def test_options_reach_the_plugin(stand_in: StandIn, data: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "a.parquet")
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    run("losses", "some/model", data, *out)
    every = "--adapter ad --max-length 0 --assistant-only-loss --completion-only-loss no --batch-size 3 --device cpu"
    run("losses", "m", data, *out, *every.split(), "--dtype", "bfloat16", "--chat-template", tmp_path / "t.jinja")
    run("losses", "m", data, *out, "--completion-only-loss", "yes", "--max-length", "77")
    plain, full, last = stand_in.asked
    assert plain == RowLossesRequest("some/model", ROWS, progress=plain.progress)
    assert full == RowLossesRequest(
        "m",
        ROWS,
        adapter="ad",
        max_length=None,
        assistant_only_loss=True,
        completion_only_loss=False,
        chat_template="{{ messages }}",
        batch_size=3,
        device="cpu",
        dtype="bfloat16",
        progress=full.progress,
    )
    assert (last.completion_only_loss, last.max_length) == (True, 77)


@pytest.mark.parametrize(
    ("answer", "code", "match"),
    [
        (
            RowLosses(KEYS, torch.tensor([0.5, torch.nan, 1.0]), torch.ones(3).long()),
            3,
            "1 of 3 rows is not finite (rows 1,",
        ),
        (RowLosses(KEYS, NLL, torch.tensor([0, 2, 0])), 3, "2 of 3 rows have no label token"),
        (NumericsError("not a number"), 3, "not a number"),
        (ModelError("no such model [bold]"), 2, "no such model [bold]"),
        (DataError("row 2 is odd"), 2, "row 2 is odd"),
        (None, 2, "pip install 'safe-sched[trl]'"),
    ],
)
def test_errors_end_with_their_code_and_write_nothing(
    answer: Any, code: int, match: str, stand_in: StandIn, data: Path, tmp_path: Path
) -> None:
    stand_in.answer = answer
    result = run("losses", "some/model", data, "--out", tmp_path / "a.parquet")
    assert result.exit_code == code
    assert match in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not (tmp_path / "a.parquet").exists()


def test_an_error_is_red_on_a_terminal(stand_in: StandIn, data: Path, tmp_path: Path) -> None:
    stand_in.answer = ModelError("no such model")
    arguments = ["losses", "m", str(data), "--out", str(tmp_path / "a.parquet")]
    shown = CliRunner().invoke(app, arguments, env={"FORCE_COLOR": "1", "NO_COLOR": "", "TERM": "xterm"})
    assert "\x1b[31mno such model" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["m", "nowhere.jsonl", "--out", "OUT/a.parquet"], "no file nowhere.jsonl; give a path to a .jsonl"),
        (["m", "DATA", "--out", "OUT/a.csv"], "the losses are a Parquet file; name it"),
        (["m", "DATA", "--out", "DATA/a.parquet"], "cannot be written"),
        (["m", "DATA", "--out", "OUT/a.parquet", "--batch-size", "0"], "batch_size=0; allowed"),
        (
            ["m", "DATA", "--out", "OUT/a.parquet", "--chat-template", "no.jinja"],
            "--chat-template no.jinja cannot be read",
        ),
        (["m", "DATA"], "Missing option '--out'"),
        (["m", "DATA", "--out", "OUT/a.parquet", "--packing"], "No such option: --packing"),
        (["m", "DATA", "--out", "OUT/a.parquet", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
    ],
)
def test_usage_errors_come_before_any_work(
    arguments: list[str], match: str, stand_in: StandIn, data: Path, tmp_path: Path
) -> None:
    where = {"DATA": str(data), "OUT": str(tmp_path)}
    for name, path in where.items():
        arguments = [a.replace(name, path) for a in arguments]
    result = run("losses", *arguments)
    assert result.exit_code == 2, result.output
    assert match in result.output
    assert not stand_in.asked
    assert not (tmp_path / "a.parquet").exists()


def test_a_failed_run_leaves_an_older_file_alone(stand_in: StandIn, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    run("losses", "m", data, "--out", out)
    before = out.read_bytes()
    stand_in.answer = ModelError("no")
    assert run("losses", "m", data, "--out", out).exit_code == 2
    assert out.read_bytes() == before


def test_the_console_script_is_this_app() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="safe-sched")
    assert script.load() is safe_sched.cli.main
