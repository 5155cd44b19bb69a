"""The command ``safe-sched``. One command a file; what a command does with a trainer is a hook (`safe_sched.hooks`)."""

from __future__ import annotations

from typing import Annotated

import typer

import safe_sched
from safe_sched.cli.audit import audit
from safe_sched.cli.axolotl import axolotl
from safe_sched.cli.export import export
from safe_sched.cli.losses import losses
from safe_sched.cli.mix import mix
from safe_sched.cli.trl import trl
from safe_sched.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    help="Data scheduling for safe fine-tuning: how much may each training row teach?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # they would print rows of the data
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"safe-sched {safe_sched.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(audit)
app.command()(losses)
app.command()(mix)
app.command()(export)
app.add_typer(axolotl, name="axolotl")
app.add_typer(trl, name="trl")
app.command()(verify)


def main() -> None:
    """The console script."""
    app()
