"""What ``safe-sched mix`` says of a mix: the numbers, the next line to type, and lines that were no rows."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from safe_sched.cli.screen import name_bad, table_of
from safe_sched.data import RowFile
from safe_sched.data.kinds import STDIO, form_of
from safe_sched.data.terminal_text import printable
from safe_sched.mixing.formats import TaskFormat


@dataclass(frozen=True)
class Written:
    """How many rows have been written."""

    user: int
    safety: int


def summary(written: Written, found: TaskFormat | None, out: str, seconds: float) -> Table:
    """What has been done."""
    rows = written.user + written.safety
    return table_of(
        "Mixed",
        [
            ("user rows", f"{written.user:,}"),
            ("safety rows added", f"{written.safety:,} ({written.safety / rows:.2%} of {rows:,})"),
            ("format", _formats(found)),
            ("seconds", f"{seconds:.1f}"),
            ("written to", "standard output" if out == STDIO else out),
        ],
    )


def say_next(console: Console, context: typer.Context, out: str | None, written: bool) -> None:
    """What to do now, with the line to do it with."""
    if not written:
        heading, line = "Next, to write the mix:", _same_again(context, out)
    elif out is None or out == STDIO:
        return
    else:
        heading = "Next, in the training script:"
        line = f'load_dataset("{_LOADERS[form_of(Path(out)).kind]}", data_files={out!r}, split="train")'
    console.print(heading)
    console.print(f"  {printable(line)}", style="bold", markup=False, highlight=False, soft_wrap=True)


_LOADERS = {"jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow"}


def _same_again(context: typer.Context, out: str | None) -> str:
    """The line that was typed, to be typed for good."""
    words = ["safe-sched", str(context.info_name)]
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        source = context.get_parameter_source(name)
        if name in ("explain", "dry_run", "out") or source is None or source.name != "COMMANDLINE":
            continue
        if isinstance(value, bool):
            words.append(option.opts[0] if value else option.secondary_opts[0])
        else:
            flag = option.opts[:1] if option.param_type_name == "option" else []
            words += [*flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(map(shlex.quote, [*words, "--out", out or "mixed.jsonl"]))


def _formats(found: TaskFormat | None) -> str:
    if found is None:
        return "the schema only"
    shares = [f"{cluster.share:.1%}" for cluster in found.clusters]
    told = f"{len(shares)} found: {', '.join(shares[:5])}{', ...' if len(shares) > 5 else ''} of the rows"
    return told if found.learned else "no constant template: free text"


def name_unread(file: RowFile) -> None:
    """The lines that were no rows, on standard error: the first ones by name, all by number."""
    lines = "1 line" if file.bad_rows == 1 else f"{file.bad_rows:,} lines"
    more = file.bad_rows - len(file.bad)
    name_bad(f"{lines} could not be read; not in the mix:", file.bad, f"and {more:,} more" if more else "")
