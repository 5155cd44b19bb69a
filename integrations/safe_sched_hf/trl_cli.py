"""``safe-sched trl sft``: TRL's own command, with one more block in its YAML.

The block ``safe_sched:`` is taken out and checked (`safe_sched_hf.settings`), the rest is read by TRL's own parser, and
for the time of TRL's own script ``trl.SFTTrainer`` makes trainers that have our callback. As with ``trl sft``, what
accelerate is to be told goes into the same YAML or onto the same command line; the training then runs in processes that
``accelerate launch`` starts. When it has ended, the manifest is read back: a run that was not defended is an error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_sched.audit.yaml_files import read_yaml
from safe_sched.cli.screen import exit_code_of, say_error
from safe_sched.errors import OptionError, SafeSchedError, unknown_name
from safe_sched.manifest import verify
from safe_sched.record import rows_fingerprint, seal
from safe_sched_hf.settings import Settings, read_settings

BLOCK = "safe_sched"
"""The block's key in the YAML; on the command line, ``--safe_sched.KEY VALUE``."""

UNDEFENDED = 3
"""The exit code where the manifest does not say that every row was defended."""

_MODULE = "safe_sched_hf.trl_cli"


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


def command(arguments: Sequence[str]) -> int:
    """Run ``safe-sched trl ARGUMENTS...``; returns the exit code.

    Args:
        arguments: ``["sft", "--config", "x.yaml", ...]``.

    Raises:
        SafeSchedError: Something that was given cannot be used, or stopped the training.
    """
    if not arguments or arguments[0] != "sft":
        raise unknown_name("command of safe-sched trl", arguments[0] if arguments else "", ["sft"])
    call = read_call(arguments[1:])
    here = not (call.launch or _launches_by_itself())
    code = train(call) if here else _launched(call)
    return code or (_verified(call) if call.first_machine else 0)


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
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
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


def train(call: Call) -> int:
    """Run TRL's script in this process; returns 0."""
    from trl.scripts import sft

    with defended(call.settings) as made:
        sft.main(*call.parsed)
    for trainer in made:
        if trainer.is_world_process_zero():
            seal(trainer.args.output_dir)
    return 0


@contextlib.contextmanager
def defended(settings: Settings) -> Iterator[list[Any]]:
    """For the time of this, ``trl.SFTTrainer`` makes trainers that have the callback, and mixes what is to be mixed.

    Yields:
        The trainers that were made.
    """
    import trl

    original, made = trl.SFTTrainer, []

    def make(*args: Any, **given: Any) -> Any:
        callback = settings.callback()
        if int(os.environ.get("RANK", "0")) == 0:
            callback.source = _source(given.get("train_dataset"), settings)
        given["train_dataset"] = settings.mixed(given.get("train_dataset"))
        trainer = original(*args, **given, callbacks=[callback])
        _resume_as_told(trainer)
        made.append(trainer)
        return trainer

    setattr(trl, "SFTTrainer", make)  # noqa: B010 (trl is typed as having the class)
    try:
        yield made
    finally:
        setattr(trl, "SFTTrainer", original)  # noqa: B010


def _source(rows: Any, settings: Settings) -> dict[str, Any]:
    """The rows before they are mixed and tokenised, for the manifest; of a stream nothing is known yet."""
    import datasets

    told: dict[str, Any] = {"front_end": "safe-sched trl sft"}
    if settings.mix is not None:
        told["mix"] = settings.mix.model_dump(by_alias=True, exclude={"safety_data"})
    if isinstance(rows, datasets.Dataset):
        plain: Any = rows.with_format(None)
        told |= {"columns": sorted(rows.column_names), "fingerprint": rows_fingerprint(plain)}
    return told


def _resume_as_told(trainer: Any) -> None:
    """TRL 1.9's script does not hand ``resume_from_checkpoint`` on, and would start again without a word."""
    train = trainer.train

    def resumed(resume_from_checkpoint: Any = None, **more: Any) -> Any:
        chosen = trainer.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        return train(resume_from_checkpoint=chosen, **more)

    trainer.train = resumed


# the command line -----------------------------------------------------------------------------------------------


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
            raise OptionError(
                str(unknown_name("key", key, {*known, *allowed, BLOCK})).partition("; allowed")[0]
                + f"; allowed: the options of trl sft and of accelerate launch, and {BLOCK}"
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


# accelerate -----------------------------------------------------------------------------------------------------


def _launches_by_itself() -> bool:
    """Whether ``accelerate launch`` without a word of ours would do other than run one process on one device."""
    import torch
    from accelerate.commands.config import default_config_file

    return os.path.isfile(default_config_file) or torch.cuda.device_count() > 1


def _launched(call: Call) -> int:
    """Run the training in processes that accelerate starts; returns 0 where all ended well."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = launch_command_parser().parse_args([*call.launch, "--module", _MODULE, *call.arguments])
    call.first_machine = not options.machine_rank
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    return 0


def _without(arguments: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Arguments without a run of them that stands in order among them."""
    left, kept = list(taken), []
    for word in arguments:
        if word in left and left[0] == word:
            left.pop(0)
        else:
            kept.append(word)
    return kept


def _verified(call: Call) -> int:
    verdict = verify(call.output_dir)
    for check in verdict.checks:
        if check.ok is False:
            say_error(f"not defended: {check.name}: {check.words}")
    return 0 if verdict.defended else UNDEFENDED


def _worker(arguments: Sequence[str]) -> int:
    """In a process that accelerate has started."""
    try:
        return train(read_call(arguments, launched=True))
    except SafeSchedError as error:
        say_error(str(error))
        return exit_code_of(error)


if __name__ == "__main__":
    sys.exit(_worker(sys.argv[1:]))
