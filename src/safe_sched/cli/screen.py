"""What commands share: where they print, how they show progress, and how an error becomes an exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from safe_sched.data.terminal_text import printable
from safe_sched.errors import NumericsError, SafeSchedError, UnscoredError
from safe_sched.generation import Device, Dtype

USAGE, UNSCORED = 2, 3
"""Exit codes: something that was given cannot be used; not all rows could be scored."""

DeviceOption = Annotated[Device, typer.Option(metavar="DEVICE", help="cpu, cuda, or auto: a GPU if there is one.")]
DtypeOption = Annotated[
    Dtype, typer.Option(metavar="TYPE", help="float32, bfloat16, float16, or auto: as the model is stored.")
]


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Print an error of ours in red, without a traceback, and leave with its exit code."""
    try:
        yield
    except SafeSchedError as error:
        say_error(str(error))
        raise typer.Exit(exit_code_of(error)) from error


def exit_code_of(error: SafeSchedError) -> int:
    """The exit code of an error of ours."""
    return UNSCORED if isinstance(error, UnscoredError | NumericsError) else USAGE


def say_error(text: str) -> None:
    """Print a text in red on standard error, with its control characters shown."""
    # soft_wrap: paths in a message stay in one piece
    Console(stderr=True).print(printable(text), style="red", markup=False, highlight=False, soft_wrap=True)


def name_bad(heading: str, bad: Sequence[object], more: str = "") -> None:
    """Print a heading in red on standard error, and below it what is wrong, line by line."""
    for line in (heading, *(f"  {one}" for one in bad), *([f"  {more}"] if more else [])):
        say_error(line)


def table_of(title: str, lines: Iterable[tuple[str, str]]) -> Table:
    """Names and values; what they say comes from data in part."""
    shown = Table(show_header=False, title=title, title_justify="left")
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in lines:
        shown.add_row(Text(printable(name)), Text(printable(value)))
    return shown


@contextlib.contextmanager
def progress_bar(shown: bool = True) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on standard error, gone when the work is done.

    Yields:
        What to call with the name of a stage, how much of it is done, and of how much (None: unknown).
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None)
        stage = ""

        def show(name: str, done: int, total: int | None) -> None:
            nonlocal stage
            if name != stage:  # a new stage, a new estimate of the time
                bar.reset(task, description=name, total=total)
                stage = name
            bar.update(task, completed=done, total=total)

        yield show
