"""``safe-sched axolotl check`` and ``train``: see `safe_sched.cli.axolotl`.

Training runs in ``axolotl train`` itself, which starts as many processes as it is told to. What would keep it from
being defended is looked for before, and what it has left is read back after.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from safe_sched.cli.screen import USAGE, say_error
from safe_sched.data.terminal_text import printable
from safe_sched.errors import OptionError, unknown_name
from safe_sched.training.checkpoint import MANIFEST_FILE
from safe_sched.training.manifest import verify
from safe_sched_axolotl.block import KEY
from safe_sched_axolotl.check import Plan, plan_of

UNDEFENDED = 3
"""The exit code of a run that was not defended on every row."""

FAILED = 1
"""Where the training's own exit code is one that means something else here."""

_REFUSED = {
    "sweep": "every run of a sweep has a configuration and a folder of its own; train them one by one",
    "cloud": "what runs elsewhere cannot be read back; check here, train there, and verify what comes back",
    "plugins": "write it into the YAML, where it can be checked",
}

_NO_KEYS = frozenset(
    {
        *("launcher", "num_processes", "main_process_port"),
        *("debug", "debug_text_only", "debug_num_examples", "prompter", "shard"),
    }
)
"""Options of ``axolotl train`` that are no keys of a configuration."""


def command(arguments: Sequence[str]) -> int:
    """Run ``safe-sched axolotl ARGUMENTS...``; returns the exit code.

    Args:
        arguments: ``check`` or ``train``, the YAML, and options of ``axolotl train``.

    Raises:
        SafeSchedError: Something that was given cannot be used.
    """
    name, *rest = arguments or [""]
    if name not in ("check", "train"):
        raise unknown_name("command of safe-sched axolotl", name, ["check", "train"])
    strict = name == "check" and rest[:1] == ["--strict"]
    path, *options = rest[1:] if strict else rest
    plan = plan_of(path, overrides_of(options))
    _show(plan)
    if plan.problems or (strict and plan.cautions):
        return USAGE
    return 0 if name == "check" else _trained(plan, path, options)


def overrides_of(options: Sequence[str]) -> dict[str, Any]:
    """What options of ``axolotl train`` set in its configuration; those for its launcher, behind ``--``, set nothing.

    Raises:
        OptionError: One takes the run out of sight.

    Example:
        >>> overrides_of(["--max-steps=10", "--output-dir", "out", "--no-flash-attention"])
        {'max_steps': 10, 'output_dir': 'out', 'flash_attention': False}
        >>> overrides_of(["--launcher", "torchrun", "--", "--nproc_per_node", "2"])
        {}
    """
    import yaml

    found: dict[str, Any] = {}
    words = list(options[: options.index("--")] if "--" in options else options)
    while words:
        word, is_, value = words.pop(0).partition("=")
        if not word.startswith("--"):
            raise OptionError(f"{word!r}; allowed after CONFIG: options of axolotl train, --name value")
        name = word[2:].replace("-", "_")
        if name in _REFUSED:
            raise OptionError(f"{word}: {_REFUSED[name]}")
        if name.partition(".")[0].partition("__")[0] == KEY:
            raise OptionError(f"{word}: write it into the YAML, where it can be checked")
        if not is_ and words and not words[0].startswith("--"):
            is_, value = "=", words.pop(0)
        if is_:
            try:
                found[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                found[name] = value
        else:
            found[name.removeprefix("no_")] = not name.startswith("no_")
    return {name: value for name, value in found.items() if name not in _NO_KEYS}


def _trained(plan: Plan, path: str, options: Sequence[str]) -> int:
    before = _bytes(plan.folder / MANIFEST_FILE)
    # accelerate and torchrun are looked for on the path: those beside this Python, not others
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run = [sys.executable, "-m", "axolotl.cli.main", "train", path, *options]
    process = subprocess.Popen(run, env={**os.environ, "PATH": here})
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # it has got Ctrl-C as well, and saves its model before it ends
            process.wait()
    code = process.returncode
    if code:
        say_error(f"axolotl train has failed, with exit code {code}. Its own messages say why.")
        return code if code > UNDEFENDED else FAILED if code > 0 else 128 - code
    if _bytes(plan.folder / MANIFEST_FILE) == before:
        say_error(
            f"not defended: axolotl train has written no {MANIFEST_FILE} to {plan.folder}: the plugin was not loaded, "
            "or the run wrote to another folder. Do not use this model."
        )
        return UNDEFENDED
    verdict = verify(plan.folder)
    for name, ok, words in verdict.checks:
        if ok is False:
            say_error(f"not defended: {name}: {words}")
    if verdict.defended:
        Console(highlight=False).print(f"Defended on every row: safe-sched verify {plan.folder}", soft_wrap=True)
    return 0 if verdict.defended else UNDEFENDED


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _show(plan: Plan) -> None:
    console = Console(highlight=False)
    console.print(_table(plan.facts))
    for caution in plan.cautions:
        console.print(Text(f"caution: {printable(caution)}", "yellow"), soft_wrap=True)
    for problem in plan.problems:
        say_error(f"{plan.path}: {problem}")
    if not plan.problems:
        console.print("It would be defended on every row.")


def _table(facts: Mapping[str, str]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in facts.items():
        table.add_row(name, Text(printable(words)))
    return table
