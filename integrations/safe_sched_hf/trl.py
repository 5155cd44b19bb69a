"""``safe-sched trl sft``: TRL's own command, with one more block in its YAML.

The block ``safe_sched:`` is taken out and checked (`safe_sched_hf.config`), the rest is read by TRL's own parser, and
for the time of TRL's own script ``trl.SFTTrainer`` makes trainers that have our callback. As with ``trl sft``, what
accelerate is to be told goes into the same YAML or onto the same command line; the training then runs in processes that
``accelerate launch`` starts. When it has ended, the manifest is read back: a run that was not defended is an error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from safe_sched.cli.screen import exit_code_of, say_error
from safe_sched.errors import ModelError, SafeSchedError, unknown_name
from safe_sched.training.manifest import verify
from safe_sched.training.record import rows_fingerprint, seal
from safe_sched_hf.config import Settings
from safe_sched_hf.rows import is_stream
from safe_sched_hf.trl_call import Call, read_call

UNDEFENDED = 3
"""The exit code where the manifest does not say that every row was defended."""

_MODULE = "safe_sched_hf.trl"


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


def train(call: Call) -> int:
    """Run TRL's script in this process; returns 0."""
    from trl.scripts import sft

    with defended(call.settings) as trainers:
        sft.main(*call.parsed)
    if not trainers:  # a manifest in the folder is then an older run's
        raise ModelError(
            "TRL's script has made no trainer that safe-sched knows of, so this training was not defended. "
            "Install a release that docs/compatibility.md names, or write a script with SafeSchedCallback."
        )
    for trainer in trainers:
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

    original = trl.SFTTrainer
    trainers: list[Any] = []

    def make(*args: Any, **given: Any) -> Any:
        callback = settings.callback()
        if int(os.environ.get("RANK", "0")) == 0:
            callback.source = _source(given.get("train_dataset"), settings)
        if settings.mix is None and not is_stream(given.get("train_dataset")):
            callback.rows = given["train_dataset"]
        given["train_dataset"] = settings.mixed(given.get("train_dataset"))
        trainer = original(*args, **given, callbacks=[callback])
        _resume_as_told(trainer)
        trainers.append(trainer)
        return trainer

    setattr(trl, "SFTTrainer", make)  # noqa: B010 (trl is typed as having the class)
    try:
        yield trainers
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


# accelerate -----------------------------------------------------------------------------------------------------


def _launches_by_itself() -> bool:
    """Whether ``accelerate launch`` without a word of ours would do other than run one process on one device."""
    import torch
    from accelerate.commands.config import default_config_file

    return os.path.isfile(default_config_file) or torch.cuda.device_count() > 1


def _launched(call: Call) -> int:
    """Run the training in processes that accelerate starts; returns 0 where all ended well."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args([*call.launch, "--module", _MODULE, *call.arguments])
    call.first_machine = not options.machine_rank
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    except ChildFailedError as error:  # of several processes
        return _exit_code(error.get_first_failure()[1].exitcode)
    return 0


def _exit_code(code: int) -> int:
    """Of a process; one that a signal has ended has a negative number."""
    return code if code > 0 else 128 - code


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
