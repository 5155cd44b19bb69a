"""Several processes score, and the audit is the same; what goes wrong in one is told here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from safe_sched.audit import Evidence, Findings, audit
from safe_sched.audit.engines import shard as engine
from safe_sched.audit.engines.shard import LocalEngine
from safe_sched.errors import DataError, OptionError, PluginError
from tests.core.audited import Counts, Long, some_rows

psutil: Any = pytest.importorskip("psutil")

ROWS = some_rows(300)
ROWS[17] = {"id": 17, "prompt": 3, "completion": "no row"}


class Far(Counts):
    """Goes into other processes."""

    travels: ClassVar[bool] = True

    def __init__(self, does: str = "") -> None:
        super().__init__()
        self.does, self.made_in = does, os.getpid()

    def score(self, rows: Any) -> Evidence:
        if any(row.number == 150 for row in rows):
            if self.does == "dies" and os.getpid() != self.made_in:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.does == "refuses":
                raise DataError("row 150 cannot be scored; remove it")
            if self.does == "odd":
                raise Odd("odd", 150)
            if self.does == "prints":
                print("what is printed is no score")
        return super().score(rows)


class Odd(Exception):
    """Cannot be made anew from its arguments, so it cannot be sent."""

    def __init__(self, what: str, row: int) -> None:
        super().__init__(f"{what} in row {row}")


class Where(Long):
    """Stays, and says in which process it is."""

    name = "where_it_is"

    def __init__(self) -> None:
        super().__init__()
        self.made_in = os.getpid()

    def score(self, rows: Any) -> Evidence:
        nothing = [None] * len(rows)
        return Evidence(np.full(len(rows), os.getpid() == self.made_in, np.float32), nothing, nothing)


class Goes(Where):
    travels: ClassVar[bool] = True


def run(detectors: list[Any], processes: int | None = 2, **options: Any) -> Findings:
    return audit(ROWS, detectors=detectors, **({"processes": processes, "shard_rows": 32} | options))


def children() -> list[Any]:
    return [one for one in psutil.Process().children(recursive=True) if "safe_sched" in " ".join(one.cmdline())]


def test_two_processes_give_what_one_gives() -> None:
    """Also where one signal stays here, and rows cannot be read. Nothing is left running."""

    alone, found = (run([Where(), Far("prints"), Long()], processes) for processes in (1, 2))
    assert found.table.equals(alone.table)
    assert found.summary.expected_share == alone.summary.expected_share
    scored = [number for number in range(300) if number != 17]
    assert found.table.column("where_it_is").take(scored).to_pylist() == [1.0] * 299
    assert not children()


@pytest.mark.slow
def test_signals_are_scored_elsewhere() -> None:
    """Control of the test above: one that travels does see other processes."""
    assert run([Goes(), Counts()]).table.column("where_it_is").take([0, 200]).to_pylist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("does", "kind", "match"),
    [
        ("dies", PluginError, r"process \d of 2 \(pid \d+\) was ended by SIGKILL while it scored shard 4.*with resume"),
        pytest.param("refuses", DataError, "row 150 cannot be scored; remove it", marks=pytest.mark.slow),
        pytest.param("odd", RuntimeError, "Odd: odd in row 150", marks=pytest.mark.slow),
    ],
)
def test_what_goes_wrong_in_a_process_is_told_here(does: str, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        run([Far(does)])
    assert not children()


@pytest.mark.slow
def test_an_audit_that_lost_a_process_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="SIGKILL"):
        run([Far("dies")], out=tmp_path)
    kept = len(list(tmp_path.glob("shards/*.json")))
    assert kept < 10
    found = run([Far("dies")], 1, out=tmp_path, resume=True)
    assert found.table.equals(run([Far()], 1).table)


@pytest.mark.slow
@pytest.mark.slow_sample
def test_an_interruption_ends_the_processes() -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "scoring" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Far()], progress=interrupt)
    assert not children()
    with pytest.raises(KeyboardInterrupt):  # also before there is anything to score
        run([Far()], progress=lambda stage, done, total: interrupt("scoring", stage == "fitting", None))
    assert not children()


class Held(Far):
    """Holds what cannot be pickled."""

    def ready(self) -> None:
        super().ready()
        self.held = lambda: 1


def test_a_detector_that_cannot_be_sent_is_named() -> None:
    one = Held()
    with pytest.raises(PluginError, match="a detector cannot be sent to other processes: .*processes=1"):
        run([one])
    assert not children()


def test_rows_that_cannot_be_sent_are_named() -> None:
    rows = [{**row, "made by": (lambda: 1) if number == 40 else None} for number, row in enumerate(ROWS)]
    with pytest.raises(DataError, match="the rows of shard 1 cannot be sent to other processes: .*processes=1"):
        audit(rows, detectors=[Far()], processes=2, shard_rows=32)
    assert not children()
    assert audit(rows, detectors=[Far()], processes=1, shard_rows=32).summary.rows == 300


def test_nothing_of_the_working_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that were fetched from somewhere may stand beside a file with the name of a module."""
    for name in ("json", "pickle", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    assert run([Far()]).summary.rows == 300
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rows", "cores", "started"), [(299, 2, 0), (300, 2, 2), (300, 1, 0), (300, 64, 4)])
def test_processes_are_started_where_that_pays(
    rows: int, cores: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MANY", 300)
    monkeypatch.setattr(engine, "_cores", lambda: cores)
    counts: list[int] = []

    class Pretends(Counts):
        travels = True

    def count(processes: int) -> Any:
        counts.append(processes)
        raise OptionError("stop")

    monkeypatch.setattr("safe_sched.audit.engines.workers.Workers", count)
    with LocalEngine(None) as one:
        one.prepare([Counts()], rows)  # nothing here can be scored elsewhere
        assert not counts
        with contextlib.suppress(OptionError):
            one.prepare([Pretends()], rows)
    assert counts == ([started] if started else [])


def test_the_number_of_processes_is_checked() -> None:
    with pytest.raises(OptionError, match="processes=0; allowed"):
        run([Far()], 0)
    with pytest.raises(OptionError, match="processes=2 is for this machine, and engine= runs the scoring"):
        run([Far()], engine=LocalEngine())


SCRIPT = """
import json, sys
from safe_sched.audit import audit
rows = [json.loads(line) for line in open(sys.argv[1])]
print("ready", flush=True)
found = audit(rows, processes=2, shard_rows=64)
print(found.table.num_rows)
"""


def _script(folder: Path) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some_rows(2000)))
    (folder / "script.py").write_text(SCRIPT)
    return [sys.executable, str(folder / "script.py"), str(folder / "rows.jsonl")]


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    found = subprocess.run(_script(tmp_path), capture_output=True, text=True, timeout=120)
    assert (found.stdout, found.stderr) == ("ready\n2000\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_asked(how: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(_script(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asked:
        seen: list[Any] = []
        _until(lambda: seen.extend(psutil.Process(asked.pid).children(recursive=True)) or len(seen) >= 2)
        asked.send_signal(how)
        _, said = asked.communicate(timeout=60)
    assert asked.returncode != 0
    if how == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt")
    assert not psutil.wait_procs(seen, timeout=30)[1]


def _until(there: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)
