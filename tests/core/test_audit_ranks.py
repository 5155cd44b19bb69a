"""The processes of a launcher score together, and the audit is that of one process."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from safe_sched.audit.engines.ranks import joined, share_of
from safe_sched.audit.engines.shard import Shard, score_shard
from safe_sched.audit.rows import audit_row
from safe_sched.audit.run import audit
from safe_sched.cli import app
from safe_sched.errors import OptionError
from tests.core.ranked import ROWS, SHARD, alone, together, told


@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_shares_hold_every_row_once_and_are_put_back_in_order(size: int) -> None:
    rows = [audit_row(row, number) for number, row in enumerate(ROWS[:25])]
    whole = Shard(3, rows, np.arange(25, dtype=np.float32) % 2)
    shares = [share_of(whole, rank, size) for rank in range(size)]
    assert max(len(share.entries) for share in shares) - min(len(share.entries) for share in shares) <= 1
    detector = told()
    detector.observe(rows)
    detector.ready()
    assert joined([score_shard([detector], share) for share in shares]).equals(score_shard([detector], whole))


@pytest.mark.slow
@pytest.mark.slow_sample
@pytest.mark.timeout(180)
def test_two_processes_score_together_what_one_does_and_raise_what_one_would(tmp_path: Path) -> None:
    first, second = together("tests.core.ranked", str(tmp_path))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout + second.stderr == ""
    found = json.loads((tmp_path / "found.json").read_text())
    one = audit(ROWS, detectors=[told()], shard_rows=SHARD)
    other = pq.read_table(tmp_path / "found.parquet")
    assert other.drop_columns("reason").equals(one.table.drop_columns("reason"))
    assert found["share"] == one.summary.as_json()["expected_share"]
    # every other row was scored by the second process
    said = other["reason"].to_pylist()
    assert [text for n, text in enumerate(said) if n != 130] == [
        f"process {n % 20 % 2}" for n in range(201) if n != 130
    ]
    assert set(one.table["reason"].to_pylist()) - {said[130]} == {"process none"}
    # failures of the second process are failures of the audit, and the next audit works
    assert found["data"] == ["DataError", "row 121 cannot be scored; remove it"]
    assert found["bug"][0] == "PluginError"
    assert "process 1 of the launcher has failed" in found["bug"][1]
    assert "ZeroDivisionError" in found["bug"][1]
    assert found["stuck"][0] == "PluginError"
    assert "cannot be sent to other processes: TypeError" in found["stuck"][1]
    assert found["few"] == ["process 0"] * 3


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_row_that_cannot_be_sent_ends_all_processes(tmp_path: Path) -> None:
    """Those that wait for it must not wait for ever; the error is raised once."""
    first, second = together("tests.core.ranked", str(tmp_path), "held")
    assert (first.returncode, second.returncode) == (1, 0)
    assert "PluginError: a detector or a row cannot be sent to other processes" in first.stderr
    assert second.stderr == ""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_process_that_is_killed_stops_the_audit_and_what_is_scored_is_kept(tmp_path: Path) -> None:
    first, second = together("tests.core.ranked", str(tmp_path), "killed")
    assert second.returncode == -9
    assert first.returncode == 1
    assert "PluginError: another process of the launcher is gone" in first.stderr
    assert sorted(path.name for path in (tmp_path / "out/shards").glob("*.json")) == [f"{n:05d}.json" for n in range(6)]
    # the second process said the same as one does, so that one goes on with it
    shards = [(path, path.read_bytes()) for path in (tmp_path / "out/shards").iterdir()]
    resumed = audit(ROWS, detectors=[told()], shard_rows=SHARD, out=tmp_path / "out", resume=True)
    assert all(path.read_bytes() == before for path, before in shards)
    whole = audit(ROWS, detectors=[told()], shard_rows=SHARD)
    assert resumed.table.drop_columns("reason").equals(whole.table.drop_columns("reason"))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_launcher_ends_all_processes_when_one_is_killed(tmp_path: Path) -> None:
    """torchrun, which is what accelerate launch starts."""
    words = ("--standalone", "--nproc-per-node", "2", "-m", "tests.core.ranked", str(tmp_path), "killed")
    found = alone("torch.distributed.run", *words)
    assert found.returncode == 1
    assert "SIGKILL" in found.stderr
    whole = len(list((tmp_path / "out/shards").glob("*.json")))
    assert whole == 6  # shards that were scored before, and nothing that looks like findings
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "shards"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_command_under_a_launcher_prints_and_writes_once(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["audit", str(path), "--json"]
    found = together("safe_sched.cli", *words, "--out", str(tmp_path / "two"))
    assert [one.returncode for one in found] == [3, 0], found[0].stderr + found[1].stderr  # row 130 is none
    assert found[1].stdout + found[1].stderr == ""
    one = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "one")])
    assert one.exit_code == 3
    assert (tmp_path / "two/rows.jsonl").read_bytes() == (tmp_path / "one/rows.jsonl").read_bytes()
    assert plain(json.loads(found[0].stdout)) == plain(json.loads(one.stdout))
    # an error of the first process ends both, and is said once
    found = together("safe_sched.cli", *words, "--limit", "0")
    assert [one.returncode for one in found] == [2, 0]
    assert "limit=0" in found[0].stderr
    assert found[1].stdout + found[1].stderr == ""


def plain(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "seconds"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "the processes of the launcher do not meet .*unset WORLD_SIZE"),
        (["--engine", "ray"], "--engine ray starts processes of its own"),
    ],
)
def test_processes_that_cannot_work_together_are_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: Sequence[str], error: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    found = CliRunner().invoke(app, ["audit", str(tmp_path / "t.jsonl"), *words])
    assert found.exit_code == 2
    assert re.search(error, found.stderr)


def test_several_processes_never_write_one_folder_by_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="several processes"):
        audit(ROWS, detectors=[told()], out=tmp_path)
    assert audit(ROWS, detectors=[told()]).summary.rows == len(ROWS)
