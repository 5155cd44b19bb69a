"""``safe-sched trl sft``: TRL's own command with a defence. What it does is a hook, `safe_sched.hooks.command`."""

from __future__ import annotations

import typer

from safe_sched.cli.screen import errors_as_exit_codes
from safe_sched.hooks import command

trl = typer.Typer(help="TRL's own commands, with the block safe_sched: in their YAML.", no_args_is_help=True)


@trl.callback()
def _options() -> None:
    pass


@trl.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sft(context: typer.Context) -> None:
    r"""Run trl sft with a defence that its YAML describes.

    Everything that trl sft takes, it takes: --config, TRL's options, and
    those of accelerate launch; trl sft --help lists them. In the YAML is
    one block more:

        model_name_or_path: models/chat
        dataset_name: data
        output_dir: out
        safe_sched:
          method: bds
          safety_data: core

    [bold]Example[/bold]

        safe-sched trl sft --config train.yaml --learning_rate 1e-5

        safe-sched trl sft --config train.yaml --safe_sched.method antibody

        safe-sched trl sft --config train.yaml --num_processes 2

    An unknown key stops the run before it starts. At its end the manifest
    in output_dir is read back, as safe-sched verify does.

    Exit codes: 0 trained and defended on every row; 2 something that was
    given cannot be used; 3 not defended, or a loss was not finite; another
    one: the training's own.
    """
    with errors_as_exit_codes():
        code = command("trl", ["sft", *context.args], needs="safe-sched[trl]")
    raise typer.Exit(code)
