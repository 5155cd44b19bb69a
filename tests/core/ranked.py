"""What `test_audit_ranks` runs in two processes: audits and failures, one after the other in one group.

python -m tests.core.ranked FOLDER          writes FOLDER/found.json and FOLDER/found.parquet in the first process
python -m tests.core.ranked FOLDER killed   an audit in whose course the second process is killed
python -m tests.core.ranked FOLDER held     an audit with a row that cannot be sent
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from safe_sched.audit import AuditRow, Evidence, ranks
from safe_sched.audit.run import audit
from safe_sched.errors import DataError, PluginError
from tests.core.audited import Counts, some_rows

ROWS: list[dict[str, Any]] = [*some_rows(130), {"prompt": 1, "completion": "no row"}, *some_rows(70, seed=1)]
SHARD = 20
ROOT = Path(__file__).resolve().parents[2]

Done = subprocess.CompletedProcess[str]


class Told(Counts):
    """Says of every row which process scored it; may fail at row 120."""

    fails: str = ""
    lock: Any = None

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        rank = os.environ.get("RANK", "none")
        if any(row.number == 121 for row in rows):  # in the share of the second process
            if self.fails == "data":
                raise DataError("row 121 cannot be scored; remove it")
            if self.fails == "bug":
                _ = 1 / 0
            if self.fails == "killed" and rank == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        found = super().score(rows)
        return Evidence(found.value, [f"process {rank}"] * len(rows), found.group)


def told(fails: str = "", *, stuck: bool = False) -> Told:
    found = Told()
    found.fails, found.lock = fails, threading.Lock() if stuck else None
    return found


def several(folder: Path) -> None:
    with ranks() as engine:
        if engine is None:
            return
        found: dict[str, Any] = {"size": engine.size}
        for name, detector in (("data", told("data")), ("bug", told("bug")), ("stuck", told(stuck=True))):
            try:
                audit(ROWS, detectors=[detector], shard_rows=SHARD, engine=engine)
            except (DataError, PluginError) as error:
                found[name] = [type(error).__name__, str(error)]
        findings = audit(ROWS, detectors=[told()], shard_rows=SHARD, engine=engine)
        found["share"] = findings.summary.as_json()["expected_share"]
        few = audit(ROWS[:1] * 3, detectors=[told()], shard_rows=1, engine=engine)  # shares of no rows
        found["few"] = few.table["reason"].to_pylist()
        found["nan"] = bool(np.isnan(findings.table["p_harmful"].to_numpy()).any())
    pq.write_table(findings.table, folder / "found.parquet")
    (folder / "found.json").write_text(json.dumps(found))


def killed(folder: Path) -> None:
    with ranks() as engine:
        if engine is not None:
            audit(ROWS, detectors=[told("killed")], shard_rows=SHARD, engine=engine, out=folder / "out")


def held(folder: Path) -> None:
    rows = [*ROWS[:50], {**ROWS[0], "made by": lambda: 1}]
    with ranks() as engine:
        if engine is not None:
            audit(rows, detectors=[told()], shard_rows=SHARD, engine=engine)


def together(*words: str, size: int = 2, wait: float = 120) -> list[Done]:
    """A module in several processes, started as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "integrations")))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(size)
    ]
    try:
        texts = [one.communicate(timeout=wait) for one in started]
    finally:
        for one in started:
            one.kill()
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *text) for one, text in zip(started, texts, strict=True)
    ]


def alone(*words: str, wait: float = 120) -> Done:
    """A module in a process of its own: no launcher has started it, or it is one."""
    return together(*words, size=1, wait=wait)[0]


if __name__ == "__main__":
    # the classes under the name by which the other process knows them
    from tests.core import ranked

    {"killed": ranked.killed, "held": ranked.held}.get(sys.argv[-1], ranked.several)(Path(sys.argv[1]))
