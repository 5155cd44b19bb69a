"""How many rows a second does an audit without a model take, and how much memory?

    rows per second    of wall time, through all of `audit(path)`: reading twice, fitting, scoring, shards, table
    CPU per row        in microseconds: what counts while others use the machine
    times reading      CPU over that of going through the file once and doing nothing, in the same run
    memory             the most that is held at once, in MiB, without files that are mapped

Files are a host's rows again and again, each with a number behind the answer; so most are near-duplicates, which take
longest. Memory is measured with rows of a few words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/audit_speed.py
from bench.report import Section, markdown, show
from safe_sched.audit.run import audit
from safe_sched.data import open_rows

HOSTS = {"gsm8k": "gsm8k_train", "boolq": "boolq_train", "agnews": "agnews_train", "dolly": "dolly"}


def repeated(source: Path, path: Path, rows: int) -> Path:
    """A file of so many rows, no two of which are the same."""
    lines = [json.loads(line) for line in source.read_text("utf-8").strip().split("\n")]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            row, turn = lines[number % len(lines)], number // len(lines)
            kept = {"instruction": row["instruction"], "input": row["input"], "output": f"{row['output']} {turn}"}
            file.write(json.dumps(kept) + "\n")
    return path


def tiny(path: Path, rows: int) -> Path:
    """A file of short rows, no two of which are the same."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(
                json.dumps({"prompt": f"What is {number} plus {number % 97}?", "completion": str(number)}) + "\n"
            )
    return path


def measure(path: Path, rows: int) -> list[str]:
    """One audit of a file, as cells of the table."""
    used = time.process_time()
    assert sum(1 for _ in open_rows(path)) == rows
    read, used, start = time.process_time() - used, time.process_time(), time.perf_counter()
    found = audit(path)
    wall, used = time.perf_counter() - start, time.process_time() - used
    assert found.summary.rows == rows
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found.summary.seconds.items())
    return [f"{rows / wall:,.0f}", f"{used / rows * 1e6:.0f}", f"{used / read:.0f}", stages]


def speed(options: argparse.Namespace, folder: Path) -> Section:
    """One line per host."""
    lines = []
    for task in options.hosts:
        path = repeated(options.data / f"{HOSTS[task]}.jsonl", folder / f"{task}.jsonl", options.rows)
        lines.append([task, *measure(path, options.rows)])
    header = ("file", "rows per second", "CPU per row, µs", "times reading", "seconds by stage")
    return Section(f"Speed, {options.rows:,} rows", "Wall time depends on what else runs.", header, lines)


def memory(options: argparse.Namespace, folder: Path) -> Section:
    """One line per size."""
    lines = []
    for rows in options.memory_rows:
        path, out = tiny(folder / f"{rows}.jsonl", rows), folder / f"out{rows}"
        for keep in (None, out):
            command = [sys.executable, "-c", _AUDIT, json.dumps([*sys.path]), str(path), str(keep or "")]
            start = time.perf_counter()
            peak = peak_of(subprocess.Popen(command))
            where = "in memory" if keep is None else "in a folder"
            lines.append([f"{rows:,}", where, f"{peak:,.0f}", f"{time.perf_counter() - start:.0f}"])
    header = ("rows", "findings", "most memory, MiB", "seconds")
    return Section("Memory, rows of a few words", "One process, with all that it imports.", header, lines)


_AUDIT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from safe_sched.audit.run import audit
audit(sys.argv[2], out=sys.argv[3] or None)
"""


def peak_of(process: subprocess.Popen[bytes]) -> float:
    """The most memory of a process, in MiB, without files that are mapped; Linux says."""
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it ends meanwhile
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the audit ended with exit code {process.returncode}")
    return peak / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k_train.jsonl and the others")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--rows", type=int, default=50_000, help="of a file")
    parser.add_argument("--memory-rows", nargs="*", type=int, default=[20_000, 200_000, 1_000_000])
    parser.add_argument("--out", type=Path, help="where to write the tables as a page")
    options = parser.parse_args(arguments)
    if min(options.rows, *options.memory_rows) < 1:
        parser.error("numbers of rows are at least 1")
    with tempfile.TemporaryDirectory() as folder:
        sections = [speed(options, Path(folder))]
        if options.memory_rows:
            sections.append(memory(options, Path(folder)))
    setting = shlex.join(["python", "bench/audit_speed.py", *(sys.argv[1:] if arguments is None else arguments)])
    show(sections, setting, Console(width=160))
    if options.out:
        options.out.write_text(markdown(["# Audit: speed", f"Made by `{setting}`."], sections), "utf-8")


if __name__ == "__main__":
    main()
