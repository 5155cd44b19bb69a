"""``safe-sched verify``: was a run defended on every row?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from safe_sched.cli.screen import errors_as_exit_codes
from safe_sched.data.terminal_text import printable

UNDEFENDED = 3
"""The exit code where something speaks against it."""

_SIGNS = {True: ("yes", "green"), False: ("NO", "bold red"), None: ("-", "dim")}


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run's output folder.")],
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Compare with these training rows too.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.", show_default=False)] = False,
) -> None:
    r"""Say whether a run was defended on every row.

    It reads safe_sched_manifest.json, which a defended run leaves in its
    output folder, and holds it against what else lies there: the final
    table, checkpoints, the trainer's count of steps, the model.

    [bold]Example[/bold]

        safe-sched verify out

        safe-sched verify out --data train.jsonl

    FILE is the training file of a run of safe-sched trl or axolotl; of any
    other run, what safe-sched losses writes of it, with the rows' keys.

    Exit codes: 0 defended; 2 something that was given cannot be used; 3 not
    defended, or nothing there says so.
    """
    with errors_as_exit_codes():
        from safe_sched.training.manifest import verify as check_run

        verdict = check_run(folder, data=data)
    if as_json:
        typer.echo(json.dumps(verdict.to_json(), indent=1))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, ok, words in verdict.checks:
            sign, style = _SIGNS[ok]
            table.add_row(Text(sign, style), Text(name), Text(printable(words)))
        console = Console()
        console.print(table)
        console.print("Defended on every row." if verdict.defended else "Not defended.", highlight=False)
    if not verdict.defended:
        raise typer.Exit(UNDEFENDED)
