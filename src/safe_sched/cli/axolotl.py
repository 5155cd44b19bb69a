"""``safe-sched axolotl``: check a configuration, and train with it defended or not at all.

What the commands do is a hook, `safe_sched.hooks.command`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from safe_sched.cli.screen import errors_as_exit_codes
from safe_sched.hooks import command

axolotl = typer.Typer(
    help="Axolotl with the block safe_sched: in its YAML, defended or not started.", no_args_is_help=True
)
_Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML that Axolotl trains with.")]
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@axolotl.command(context_settings=_PASSED_ON)
def check(
    context: typer.Context,
    config: _Config,
    strict: Annotated[
        bool, typer.Option("--strict", metavar="", help="Unknown keys are errors too.", show_default=False)
    ] = False,
) -> None:
    r"""Say what Axolotl would do with a configuration, and whether its training would be defended.

    Axolotl only prints a line when it cannot import a plugin, and ignores
    keys that it does not know. So a misspelt name trains without the
    defence. This finds it: the plugin, its block, the methods' options, the
    safety set, unknown keys, and what is not supported. Nothing is trained.

    In the YAML are two things more:

        plugins:
          - safe_sched_axolotl.SafeSchedPlugin
        safe_sched:
          method: bds
          safety_data: core

    [bold]Example[/bold]

        safe-sched axolotl check train.yaml

        safe-sched axolotl check train.yaml --strict --max-steps 10

    Exit codes: 0 it would be defended; 2 it would not, or something that
    was given cannot be used.
    """
    with errors_as_exit_codes():
        flags = ["--strict"] if strict else []
        code = command("axolotl", ["check", *flags, config, *context.args], needs="safe-sched[axolotl]")
    raise typer.Exit(code)


@axolotl.command(context_settings=_PASSED_ON)
def train(context: typer.Context, config: _Config) -> None:
    r"""Run axolotl train, with a defence that is there before, and was there afterwards.

    First the configuration is checked, as safe-sched axolotl check does; a
    run that would not be defended is not started. Then axolotl train runs,
    with all the options that follow CONFIG. At its end the manifest in
    output_dir is read back, as safe-sched verify does.

    [bold]Example[/bold]

        safe-sched axolotl train train.yaml

        safe-sched axolotl train train.yaml --learning-rate 1e-5

        safe-sched axolotl train train.yaml --launcher torchrun -- \
            --nproc_per_node 2

    Exit codes: 0 trained and defended on every row; 2 something that was
    given cannot be used, and nothing was trained; 3 trained, but not
    defended on every row; another one: the training's own.
    """
    with errors_as_exit_codes():
        code = command("axolotl", ["train", config, *context.args], needs="safe-sched[axolotl]")
    raise typer.Exit(code)
