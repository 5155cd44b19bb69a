"""Does converting a file take constant memory, and how fast is it: several sizes, one process each."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/convert.py
from bench.report import Section, show
from safe_sched.data import RowWriter, open_rows

GROWTH = 32.0  # MiB that the largest file may take more than the smallest
PAIRS = (
    (".jsonl", ".jsonl"),
    (".json", ".jsonl"),
    (".csv", ".jsonl"),
    (".jsonl.gz", ".jsonl.gz"),
    (".jsonl.zst", ".jsonl.zst"),
    (".jsonl", ".parquet"),
    (".parquet", ".jsonl"),
    (".jsonl", ".arrow"),
    (".arrow", ".jsonl"),
)


@dataclass(frozen=True)
class Measured:
    """One conversion: rows, seconds, MiB of the source as it lies on the disk, and MiB at the peak of the process."""

    rows: int
    seconds: float
    size: float
    peak: float


def rows_of(mebibytes: float) -> Iterator[dict[str, str]]:
    """Rows of about a kibibyte, no two alike, made as they are asked for."""
    text = " ".join(f"word{i * i % 997}" for i in range(2000))
    for i in range(int(mebibytes * 1024)):
        at = i * 31 % 10_000
        yield {"prompt": f"{i}: {text[at : at + 270]}", "completion": text[at + 270 : at + 970] + '\n"é"'}


def convert(source: Path, out: Path) -> Measured:
    """Convert, and look at this process."""
    start = time.perf_counter()
    with RowWriter(out, sources=[source]) as file:
        for row in open_rows(source):
            file.write(row)
    seconds = time.perf_counter() - start
    return Measured(file.rows, seconds, source.stat().st_size / 2**20, peak_memory())


def peak_memory() -> float:
    """MiB of resident memory at most. Not ru_maxrss: that begins with what the parent had."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def in_a_process(source: Path, out: Path) -> Measured:
    """The same in a new process, whose peak is that of this conversion alone."""
    command = [sys.executable, __file__, "--one", str(source), str(out)]
    # arenas of malloc differ from run to run; what is asked is whether memory grows
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"MALLOC_ARENA_MAX": "2"}
    )
    return Measured(**json.loads(done.stdout))


def measure(sizes: list[float], folder: Path) -> Section:
    """Every pair of kinds at every size."""
    lines = []
    for source_ending, out_ending in PAIRS:
        found = []
        for size in sizes:
            source, out = folder / f"in{source_ending}", folder / f"out{out_ending}"
            with RowWriter(source) as file:
                for row in rows_of(size):
                    file.write(row)
            found.append(in_a_process(source, out))
            if found[-1].rows != int(size * 1024):
                raise SystemExit(f"{found[-1].rows} rows of {int(size * 1024)} were converted")
            source.unlink()
            out.unlink()
        last, growth = found[-1], found[-1].peak - found[0].peak
        lines.append(
            [
                f"{source_ending} to {out_ending}",
                f"{last.rows:,}",
                f"{last.size:.0f}",
                f"{last.rows / last.seconds:,.0f}",
                " / ".join(f"{one.peak:.0f}" for one in found),
                f"{growth:+.0f} {'✓' if growth <= GROWTH else '✗'}",
            ]
        )
    told = " / ".join(f"{size:g}" for size in sizes)
    return Section(
        "Conversion",
        f"Rows of about 1 KiB; {told} MiB of them. Peak: resident memory of the process, Python and Arrow in it.",
        ("conversion", "rows", "MiB on disk", "rows/s", f"peak MiB at {told}", f"growth, target ≤ {GROWTH:.0f}"),
        lines,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=float, nargs="+", default=[10, 50, 200], help="sizes, smallest first")
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    options: Any = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(asdict(convert(*options.one))))
        return
    with tempfile.TemporaryDirectory() as folder:
        section = measure(options.mebibytes, Path(folder))
    setting = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, one of them used"
    show([section], setting, Console())


if __name__ == "__main__":
    main()
