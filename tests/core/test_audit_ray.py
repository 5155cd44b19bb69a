"""Ray scores shards elsewhere, and the audit is the same."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from typer.testing import CliRunner

from safe_sched.audit.engines.ray import AHEAD, RayEngine
from safe_sched.audit.engines.shard import LocalEngine, Shard, score_shard
from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.audit.run import audit
from safe_sched.audit.signals import Evidence
from safe_sched.cli import app
from safe_sched.data import RowWriter
from safe_sched.errors import DataError, OptionError, PluginError

ROWS: list[dict[str, Any]] = [{"prompt": f"Question {n}?", "completion": "Yes. " * (n % 7)} for n in range(230)]
ROWS[17] = {"prompt": 1, "completion": "no row"}


class Length:
    """The length of the answer against the mean length of all."""

    name: ClassVar[str] = "length"
    about: ClassVar[str] = "long answers"
    kind: ClassVar[Literal["harm", "quality"]] = "harm"

    def __init__(self, fails: bool = False) -> None:
        self.total = self.rows = 0
        self.fails = fails

    def observe(self, rows: Sequence[AuditRow]) -> None:
        self.total += sum(len(row.answer) for row in rows)
        self.rows += len(rows)

    def ready(self) -> None:
        pass

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        if self.fails and any(row.number == 120 for row in rows):
            raise DataError("row 120 cannot be scored; remove it")
        mean = self.total / self.rows
        value = np.array([len(row.answer) / mean if row.answer else math.nan for row in rows], np.float32)
        return Evidence(value, [f"{len(row.answer)} characters" for row in rows], [None] * len(rows))

    def settings(self) -> dict[str, object]:
        return {}


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"pip install 'safe-sched\[ray\]'"):
        RayEngine()


def test_the_command_without_ray_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    found = CliRunner().invoke(app, ["audit", str(tmp_path / "t.jsonl"), "--engine", "ray"])
    assert found.exit_code == 2
    assert "pip install 'safe-sched[ray]'" in found.stderr


@pytest.mark.parametrize("options", [{"workers": 0}, {"gpus": -1}, {"gpus": math.nan}])
def test_an_option_out_of_range_is_an_error(options: Any) -> None:
    with pytest.raises(OptionError, match="allowed"):
        RayEngine(**options)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield found
    found.shutdown()


def shards(size: int = 20) -> list[Shard]:
    rows = [audit_row(row, number) for number, row in enumerate(ROWS) if number != 17]
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [Shard(number, part, np.full(len(part), np.nan, np.float32)) for number, part in enumerate(parts)]


def fitted(**options: Any) -> Length:
    length = Length(**options)
    length.observe([entry for shard in shards() for entry in shard.entries if isinstance(entry, AuditRow)])
    return length


@pytest.mark.slow
@pytest.mark.timeout(120)
class TestWithRay:
    @pytest.mark.slow_sample
    def test_the_audit_is_the_same_in_one_process_and_with_ray(self, ray: Any) -> None:
        one = audit(ROWS, detectors=[Length()], shard_rows=20)
        other = audit(ROWS, detectors=[Length()], shard_rows=20, engine=RayEngine(workers=2))
        assert other.table.equals(one.table)
        plain = [{**found.as_json(), "seconds": None} for found in (one.summary, other.summary)]
        assert plain[0] == plain[1]
        assert one.table.num_rows == len(ROWS)

    def test_the_command_writes_the_same_rows(self, ray: Any, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        with RowWriter(path) as out:
            for row in ROWS:
                out.write(row)
        for engine in ("local", "ray"):
            found = CliRunner().invoke(app, ["audit", str(path), "--engine", engine, "--out", str(tmp_path / engine)])
            assert found.exit_code == 3, found.stderr  # row 17 is none
        assert (tmp_path / "ray/rows.jsonl").read_bytes() == (tmp_path / "local/rows.jsonl").read_bytes()

    def test_every_shard_comes_back_once_with_the_scores_of_one_process(self, ray: Any) -> None:
        expected = {shard.number: table for shard, table in LocalEngine().run([fitted()], shards())}
        found = [(shard.number, table) for shard, table in RayEngine(workers=2).run([fitted()], shards())]
        assert sorted(number for number, _ in found) == sorted(expected)
        for number, table in found:
            assert table.equals(expected[number])
        assert not expected[0].equals(score_shard([fitted()], shards()[1]))  # control: shards do differ

    def test_no_more_shards_are_taken_than_are_under_way(self, ray: Any) -> None:
        taken = 0

        def counted() -> Iterator[Shard]:
            nonlocal taken
            for shard in shards(size=10):
                taken += 1
                yield shard

        for done, _ in enumerate(RayEngine(workers=2).run([fitted()], counted()), start=1):
            assert taken <= done + 2 * AHEAD

    def test_what_a_detector_raises_is_raised_here(self, ray: Any) -> None:
        with pytest.raises(DataError, match="row 120 cannot be scored; remove it"):
            list(RayEngine(workers=2).run([fitted(fails=True)], shards()))

    def test_what_reading_raises_is_raised_and_workers_end(self, ray: Any) -> None:
        def broken() -> Iterator[Shard]:
            yield shards()[0]
            raise DataError("damaged")

        with pytest.raises(DataError, match="damaged"):
            list(RayEngine(workers=2).run([fitted()], broken()))
        assert len(list(RayEngine(workers=2).run([fitted()], shards()))) == len(shards())  # the CPUs are free again

    def test_a_detector_that_cannot_be_sent_is_an_error(self, ray: Any) -> None:
        length = fitted()
        length.lock = __import__("threading").Lock()  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(PluginError, match="cannot be sent to other processes"):
            list(RayEngine(workers=2).run([length], shards()))
