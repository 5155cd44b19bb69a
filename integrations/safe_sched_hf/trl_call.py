"""Reading what a command line of ``safe-sched trl`` and its YAML ask for: our block, TRL's part, and accelerate's."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_sched.data.trainer_files import read_yaml
from safe_sched.errors import OptionError
from safe_sched_hf.config import Settings, read_settings

BLOCK = "safe_sched"
"""The block's key in the YAML; on the command line, ``--safe_sched.KEY VALUE``."""


@dataclass
class Call:
    """What a command line and its YAML ask for.

    Attributes:
        settings: The block.
        arguments: TRL's, without the block and without what is accelerate's.
        parsed: TRL's dataclasses, as its script takes them.
        launch: What is accelerate's, as command-line arguments.
        first_machine: Whether this machine is the one that writes the manifest.
    """

    settings: Settings
    arguments: list[str]
    parsed: tuple[Any, ...]
    launch: list[str] = field(default_factory=list)
    first_machine: bool = True

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.parsed[1].output_dir)


def read_call(arguments: Sequence[str], *, launched: bool = False) -> Call:
    """Read a command line and the YAML that it names.

    Args:
        arguments: What follows ``safe-sched trl sft``.
        launched: Whether this process was started by accelerate, so that its options count no more.

    Raises:
        OptionError: There is no block, or a key is unknown to all.
        DataError: The YAML cannot be read.
    """
    from trl.scripts import sft

    rest, path, overrides = _split(arguments)
    config = {} if path is None else dict(read_yaml(Path(path)))
    where = "the command line" if path is None else path
    if BLOCK not in config and not overrides:
        raise OptionError(
            f"{where} has no block {BLOCK}:, so nothing would be defended. Add one, at least\n\n  {BLOCK}:\n    "
            "safety_data: core\n\nor, to train without a defence, use trl sft"
        )
    settings = read_settings(_merged(config.pop(BLOCK, {}), overrides), where=BLOCK)
    settings.callback()  # options that do not go together, before a model is loaded
    parser = sft.make_parser(prog="safe-sched trl sft")
    known = {action.dest for action in parser._actions} - {"help", "config"}  # other spellings TRL drops without a word
    ours, theirs = _accelerates(config, known) if not launched else (_only(config, known), [])
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "config.yaml"
        clean.write_text(_yaml(ours), encoding="utf-8")
        *parsed, _, remaining = parser.parse_args_and_config(
            ["--config", str(clean), *rest], return_remaining_strings=True, separate_remaining_strings=True
        )
    if launched and remaining:
        raise OptionError(f"TRL does not know {' '.join(remaining)}")
    return Call(settings, _without(arguments, remaining), tuple(parsed), _resolved([*theirs, *remaining]))


def _split(arguments: Sequence[str]) -> tuple[list[str], str | None, dict[str, str]]:
    """TRL's arguments, the YAML's path, and what the command line says of the block, by dotted key."""
    rest: list[str] = []
    path: str | None = None
    overrides: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, is_, value = word.partition("=")
        plain = name.replace("-", "_")
        if name != "--config" and not plain.startswith(f"__{BLOCK}"):
            rest.append(word)
            continue
        if not is_:
            value = next(words, "")
        if not value:
            raise OptionError(f"{name} needs a value")
        if name == "--config":
            path = value
        elif plain.startswith(f"__{BLOCK}."):
            overrides[plain.removeprefix(f"__{BLOCK}.")] = value
        else:
            raise OptionError(f"{name}; allowed: --{BLOCK}.KEY VALUE, for example --{BLOCK}.safety_data core")
    return rest, path, overrides


def _merged(block: Any, overrides: Mapping[str, str]) -> Any:
    """The block with what the command line says of it; values are read as YAML."""
    import yaml

    if not overrides or not isinstance(block, Mapping):
        return block
    merged: dict[str, Any] = dict(block)
    for dotted, text in overrides.items():
        *parents, last = dotted.split(".")
        at = merged
        for parent in parents:
            inner = at.get(parent)
            if parent == "method" and isinstance(inner, str):
                inner = {"name": inner}
            at[parent] = dict(inner) if isinstance(inner, Mapping) else {}
            at = at[parent]
        try:
            at[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise OptionError(f"--{BLOCK}.{dotted} {text!r}: {' '.join(str(error).split())}") from error
    return merged


def _accelerates(config: Mapping[Any, Any], known: set[str]) -> tuple[dict[str, Any], list[str]]:
    """A YAML's keys that are TRL's, and those that are accelerate's as arguments.

    Raises:
        OptionError: A key is neither's.
    """
    mine = {str(key): value for key, value in config.items() if key in known or key == "env"}
    others = {str(key): value for key, value in config.items() if str(key) not in mine}
    if not others:
        return mine, []
    from accelerate.commands.launch import launch_command_parser

    options = [option for action in launch_command_parser()._actions for option in action.option_strings]
    allowed = {option.lstrip("-").replace("-", "_") for option in options if option.startswith("--")}
    arguments: list[str] = []
    for key, value in others.items():
        if key != "accelerate_config" and key.replace("-", "_") not in allowed:
            near = difflib.get_close_matches(key, [*known, *allowed, BLOCK], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise OptionError(
                f"unknown key {key!r}{hint}; allowed: the options of trl sft and of accelerate launch, and {BLOCK}"
            )
        flag = isinstance(value, bool)
        arguments += [f"--{key}"] if flag and value else [] if flag else [f"--{key}", str(value)]
    return mine, arguments


def _only(config: Mapping[Any, Any], known: set[str]) -> dict[str, Any]:
    return {str(key): value for key, value in config.items() if key in known or key == "env"}


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False)


def _resolved(launch: list[str]) -> list[str]:
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        return resolve_accelerate_config_argument(launch)
    except ValueError as error:
        raise OptionError(str(error)) from error


def _without(arguments: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Arguments without a run of them that stands in order among them."""
    left, kept = list(taken), []
    for word in arguments:
        if word in left and left[0] == word:
            left.pop(0)
        else:
            kept.append(word)
    return kept
