"""An audit that is killed goes on: no row is lost, none is scored twice, and nothing half written counts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from safe_sched.audit import Findings, audit
from safe_sched.audit.shards import Shards
from safe_sched.data.writing import write_file
from safe_sched.errors import OptionError, StateError
from tests.core.audited import Counts, Long, some_rows

ROWS = some_rows(200)
SIZE = 16


def run(out: Path | None, rows: Any = ROWS, **options: Any) -> Findings:
    return audit(rows, **({"detectors": [Counts(), Long()], "out": out, "shard_rows": SIZE} | options))


class Remembers(Counts):
    """Which rows it has scored; stops the audit after some."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.scored: list[int] = []
        self._most = most

    def score(self, rows: Any) -> Any:
        if self._most is not None and len(self.scored) >= self._most:
            raise KeyboardInterrupt
        self.scored += [row.number for row in rows]
        return super().score(rows)


# going on -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, SIZE, 5 * SIZE, 200])
def test_what_was_scored_is_not_scored_again(most: int, tmp_path: Path) -> None:
    whole = audit(ROWS, detectors=[Counts()]).table
    first = Remembers(most)
    if most < 200:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, detectors=[first])
    else:
        run(tmp_path, detectors=[first])
    second = Remembers()
    findings = run(tmp_path, detectors=[second], resume=True)
    assert findings.table.equals(whole)
    assert sorted(first.scored + second.scored) == list(range(200))


def test_a_resume_of_nothing_is_a_new_audit(tmp_path: Path) -> None:
    assert run(tmp_path / "new", resume=True).table.equals(run(None).table)


def _damage(path: Path, how: str) -> None:
    if how == "remove":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        path.write_bytes(data[: len(data) // 2] if how == "cut" else bytes(data[:-9] + b"x" + data[-8:]))


@pytest.mark.parametrize("how", ["remove", "cut", "change"])
@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_a_shard_that_is_not_whole_counts_as_absent(how: str, ending: str, tmp_path: Path) -> None:
    whole = run(tmp_path).table
    _damage(tmp_path / "shards" / f"00003.{ending}", how)
    again = Remembers()
    assert run(tmp_path, detectors=[again, Long()], resume=True).table.equals(whole)
    assert again.scored == list(range(3 * SIZE, 4 * SIZE))


@pytest.mark.parametrize("resume", [True, False])
def test_files_that_are_no_audits_are_neither_trusted_nor_touched(resume: bool, tmp_path: Path) -> None:
    """A data set may well stand in a folder of that name, beside which its audit is to be written."""
    run(tmp_path / "this")
    (tmp_path / "this" / "audit.json").rename(tmp_path / "gone.json")
    before = {file: file.read_bytes() for file in (tmp_path / "this" / "shards").iterdir()}
    assert before
    with pytest.raises(OptionError, match=r"shards/.* belongs to no audit, for .* holds no audit\.json"):
        run(tmp_path / "this", resume=resume)
    assert {file: file.read_bytes() for file in (tmp_path / "this" / "shards").iterdir()} == before
    assert not (tmp_path / "this" / "audit.json").exists()


# what shards belong to ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rows": [*ROWS[:40], {**ROWS[40], "prompt": "x"}, *ROWS[41:]]}, "made from other rows: shard 2 differs"),
        ({"rows": ROWS[:-1]}, "made from other rows: shard 12 differs"),
        ({"rows": ROWS[:-SIZE]}, "made from other rows: shard 11 differs|13 shards, now 12"),
        ({"rows": list(reversed(ROWS))}, "made from other rows: shard 0 differs"),
        ({"detectors": [Counts(word="other"), Long()]}, "was made with detectors=.*now it is"),
        ({"detectors": [Counts()]}, "was made with detectors="),
        ({"limit": 100}, "was made with limit=null, now it is 100"),
        ({"shard_rows": 20}, "was made with shard_rows=16, now it is 20"),
        ({"labels": [None, 1] + [0] * 198}, "made from other rows: shard 0 differs"),
    ],
)
def test_shards_of_another_input_or_other_settings_are_not_gone_on_with(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    run(tmp_path)
    with pytest.raises(StateError, match=match):
        run(tmp_path, resume=True, **options)


def test_the_same_rows_of_another_file_are_another_input(tmp_path: Path) -> None:
    """Findings name the place of every row."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(tmp_path / "out", tmp_path / "a.jsonl")
    with pytest.raises(StateError, match="made from other rows: shard 0 differs"):
        run(tmp_path / "out", tmp_path / "b.jsonl", resume=True)


def test_a_folder_with_an_audit_is_not_written_over(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(OptionError, match="holds an audit already; go on with it \\(--resume\\), or name another"):
        run(tmp_path)
    with pytest.raises(OptionError, match="resume=True goes on with an audit in a folder; name it"):
        run(None, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        run(tmp_path / "file")
    for damaged in ("{", '{"settings": [1], "digests": []}', "[" * 100_000):
        (tmp_path / "audit.json").write_text(damaged)
        with pytest.raises(StateError, match="audit.json is damaged"):
            run(tmp_path, resume=True)


def test_a_missing_shard_is_an_error_and_no_gap(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    shards.begin({}, ["a", "b"])
    shards.put(0, pa.table({"row": [1]}))
    with pytest.raises(StateError, match="00001.parquet is missing or damaged; resume"):
        list(shards.tables())


# a real kill --------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
sys.path[:0] = {path!r}
from safe_sched.audit import audit
from safe_sched.audit import shards
from tests.core.audited import Counts, Long, some_rows

slow = float(sys.argv[2])
whole = shards.write_file
def slowly(path, data):  # so that a kill falls between any two writes
    part = path.with_name("." + path.name + ".part")
    part.write_bytes(data[: len(data) // 2])
    time.sleep(slow)
    whole(path, data)
    time.sleep(slow)
shards.write_file = slowly
print("begun", flush=True)
audit(some_rows(200), detectors=[Counts(), Long()], out=sys.argv[1], shard_rows=16, resume=True)
print("done", flush=True)
"""


def _start(out: Path, slow: float) -> subprocess.Popen[str]:
    code = CHILD.format(path=[path for path in sys.path if path])
    child = subprocess.Popen([sys.executable, "-c", code, str(out), str(slow)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    return child


@pytest.mark.slow
@pytest.mark.slow_sample
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_random_places_it_ends_with_the_same_table(tmp_path: Path) -> None:
    """Killed again and again while it writes, until it is through: the result is that of a run nobody touched."""
    whole = run(None).table
    rng, counts = random.Random(0), []
    for attempt in range(12):
        child = _start(tmp_path, 0.02)
        if attempt % 3:  # within the writing, and every third time after a further shard, however slow the machine is
            pattern = "*" if attempt % 3 == 1 else "shards/?????.json"
            before = set(tmp_path.rglob(pattern))
            while child.poll() is None and set(tmp_path.rglob(pattern)) == before:
                time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        said = child.communicate()[0]
        counts.append(len(list(tmp_path.glob("shards/?????.json"))))
        if "done" in said:
            break
    assert counts == sorted(counts)  # nothing that was written is lost
    assert any(0 < count < 13 for count in counts), counts  # control: some kills fell within the work
    again = Remembers()
    assert run(tmp_path, detectors=[again, Long()], resume=True).table.equals(whole)
    assert len(again.scored) <= 200 - SIZE * (counts[-1] - 1)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a.json", b"old")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OptionError, match="a.json cannot be written: No space"):
        write_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    with pytest.raises(OptionError, match="cannot be written: No space left"):
        run(tmp_path / "out")


def test_the_manifest_says_what_the_shards_belong_to(tmp_path: Path) -> None:
    run(tmp_path, rows=ROWS[:20])
    told = json.loads((tmp_path / "audit.json").read_text())
    assert told["settings"]["detectors"] == {"word": {"word": "zork"}, "long": {"word": "zork"}}
    assert told["settings"]["shard_rows"] == SIZE
    assert len(told["digests"]) == 2
