"""What goes wrong in a run: an error that says so, nothing that vouches for the run, and a resume that works."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from safe_sched import BDS, Antibody, NeuralBDS, combine
from safe_sched.data.writing import replacing
from safe_sched.errors import DataError, NumericsError, SafeSchedError, StateError
from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE
from safe_sched.training.manifest import read_manifest, verify
from safe_sched.training.record import TABLE_FILE
from safe_sched_hf import Lisa, SafeSchedCallback
from tests.support import hooks_on, make_model, make_sft, parameters_of, single_thread, text_rows, token_rows

ROWS = token_rows(20, seed=4)
SAFETY = text_rows(6, seed=8)
STEPS, SAVED, FAILS = 6, 2, 3
"""Optimiser steps, a checkpoint after every second one, and the number of the step in which something goes wrong."""


class Scheduler(BDS):
    """One of a plug-in, which does what the others do until it is told to fail."""

    fails: Any = None

    def update(self, state: Any, step: Any) -> dict[str, float]:
        if type(self).fails is not None and step.step == FAILS:
            raise type(self).fails
        return super().update(state, step)


def run(folder: Path, *more: TrainerCallback, resume: Path | None = None, **changes: Any) -> Any:
    options: dict[str, Any] = {"safety_data": SAFETY, "safety_batch_size": 3, "rows": ROWS} | changes
    rows, scheduler = options.pop("rows"), options.pop("scheduler", None)
    trainers = {name: options.pop(name) for name in ("packing", "max_length", "peft_config") if name in options}
    ours = SafeSchedCallback(scheduler or Scheduler(), **options)
    trainer = make_sft(
        folder,
        rows,
        model=make_model(attention_dropout=0.1),
        callbacks=[ours, *more],
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVED,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **trainers,
    )
    with single_thread():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, torch.Tensor]:
    return parameters_of(run(tmp_path_factory.mktemp("whole")).model)


class At(TrainerCallback):
    """Does something to the model, or to us, before a step."""

    def __init__(self, do: Callable[[torch.nn.Module], Any], step: int = FAILS) -> None:
        self.do, self.step = do, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.do(kwargs["model"])


def out_of_memory(lines: int, grad: bool) -> Callable[[torch.nn.Module], None]:
    """The model's next forward of so many lines, with or without gradient, finds no memory."""

    def arm(model: torch.nn.Module) -> None:
        def fail(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids.shape[0] == lines and torch.is_grad_enabled() == grad:
                handle.remove()
                raise torch.OutOfMemoryError("out of memory, tried to allocate 2.00 GiB")

        handle = model.register_forward_pre_hook(fail, with_kwargs=True)

    return arm


def turn_nan(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))


FAULTS: dict[str, tuple[type[BaseException], str, Any]] = {
    "out of memory in the safety batch": (torch.OutOfMemoryError, "tried to allocate", out_of_memory(3, True)),
    "out of memory in the probe": (torch.OutOfMemoryError, "tried to allocate", out_of_memory(2, False)),
    "parameters that are no numbers": (NumericsError, "the safety loss is nan at step 3", turn_nan),
    "a plug-in that raises": (ZeroDivisionError, "in a plug-in", ZeroDivisionError("in a plug-in")),
    "Ctrl-C": (KeyboardInterrupt, "^$", KeyboardInterrupt()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_run_and_a_resume_ends_where_it_would_have(
    fault: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, words, cause = FAULTS[fault]
    kept: list[Any] = []
    callbacks: list[TrainerCallback] = [At(kept.append, 1)]
    with monkeypatch.context() as patch:
        if isinstance(cause, BaseException):
            patch.setattr(Scheduler, "fails", cause)
        else:
            callbacks.append(At(cause))
        with pytest.raises(kind, match=words):
            run(tmp_path, *callbacks)
    assert hooks_on(kept[0]) == 0
    assert [check.name for check in verify(tmp_path).checks if check.ok is False] == ["finished"]
    assert not list(tmp_path.rglob("*.part"))
    again = run(tmp_path, resume=tmp_path / f"checkpoint-{SAVED}")
    assert all(torch.equal(one, whole[name]) for name, one in parameters_of(again.model).items())
    assert verify(tmp_path).defended


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "NeuralBDS": lambda: {"scheduler": NeuralBDS()},
    "a combination": lambda: {"scheduler": combine(BDS(), Antibody(on_inversion="ignore"))},
    "Lisa": lambda: {"scheduler": BDS(), "parts": [Lisa(safe_steps=1, user_steps=2)]},
    "noise on the model": lambda: {"model_temperature": 1e-4},
    "sample": lambda: {"act": "sample"},
    "packed": lambda: {"packing": True, "max_length": 24},
    "LoRA": lambda: {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")},  # pyright: ignore
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_goes_on_from_the_middle_of_its_measuring(kind: str, tmp_path: Path) -> None:
    """Half of the rows are still to be measured at the checkpoint; parameters and table bit for bit."""
    torch.manual_seed(0)
    expected = parameters_of(run(tmp_path / "whole", **KINDS[kind]()).model)
    torch.manual_seed(0)
    again = run(tmp_path / "again", resume=tmp_path / "whole" / f"checkpoint-{SAVED}", **KINDS[kind]())
    assert all(torch.equal(one, expected[name]) for name, one in parameters_of(again.model).items())
    tables = [pyarrow.parquet.read_table(tmp_path / name / TABLE_FILE) for name in ("whole", "again")]
    assert tables[0].equals(tables[1])


def test_what_outlives_a_checkpoint_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: where a run keeps the probe's direction over a save, a resumed run ends elsewhere."""
    monkeypatch.setattr("safe_sched_hf.measure.probe.ProbeMeasurement.forget", lambda self: None)
    kept = parameters_of(run(tmp_path / "whole").model)
    again = parameters_of(run(tmp_path / "again", resume=tmp_path / "whole" / f"checkpoint-{SAVED}").model)
    assert any(not torch.equal(again[name], one) for name, one in kept.items())


def test_a_full_disk_leaves_no_half_state(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the second checkpoint cannot be written: the run stops, the first one is as it was."""
    import safe_sched.training.checkpoint

    @contextlib.contextmanager
    def full(path: Path) -> Iterator[Any]:
        with replacing(path) as file:
            if f"checkpoint-{2 * SAVED}" in str(path):
                file.write(b"half")
                raise OSError(28, "No space left on device")
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(safe_sched.training.checkpoint, "replacing", full)
        with pytest.raises((OSError, StateError), match="No space left on device"):
            run(tmp_path)
    assert (tmp_path / f"checkpoint-{2 * SAVED}").is_dir()  # what the trainer has written of it
    assert not list(tmp_path.rglob("*.part"))
    assert not verify(tmp_path).defended
    with pytest.raises(StateError, match="Resume from a checkpoint that has one"):
        run(tmp_path, resume=tmp_path / f"checkpoint-{2 * SAVED}")
    again = run(tmp_path, resume=tmp_path / f"checkpoint-{SAVED}")
    assert all(torch.equal(one, whole[name]) for name, one in parameters_of(again.model).items())
    assert verify(tmp_path).defended


def test_a_full_disk_at_the_end_is_not_a_defended_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise StateError("the manifest cannot be written (No space left on device)")

    monkeypatch.setattr("safe_sched.training.record.RunRecord.finish", full)
    with pytest.raises(StateError, match="No space left"):
        run(tmp_path)
    assert read_manifest(tmp_path).status == "running"


def test_what_cannot_start_overwrites_nothing(tmp_path: Path) -> None:
    """A missing safety file, another data set, other options, a damaged state: an error, and every file as it was."""

    def files() -> dict[str, str]:
        paths = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def refused(kind: type[SafeSchedError], words: str, **changes: Any) -> None:
        before = files()
        with pytest.raises(kind, match=words):
            run(tmp_path, **changes)
        assert files() == before

    run(tmp_path)
    assert verify(tmp_path).defended
    last = tmp_path / f"checkpoint-{2 * SAVED}"
    refused(DataError, "no file", safety_data=str(tmp_path / "gone.jsonl"))
    refused(StateError, "data: saved", rows=token_rows(20, seed=5), resume=last)
    refused(StateError, "safety: saved", safety_batch_size=2, resume=last)
    assert verify(tmp_path).defended
    state = last / STATE_FILE
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    refused(StateError, "damaged", resume=last)
    state.write_bytes(whole)
    (last / "trainer_state.json").write_text((last / "trainer_state.json").read_text() + " ")
    refused(StateError, "another run has written to this checkpoint since", resume=last)


def test_a_later_run_without_a_defence_is_seen(tmp_path: Path) -> None:
    """The same folder, no callback: the older manifest does not vouch for it."""
    run(tmp_path)
    undefended = make_sft(tmp_path, ROWS, max_steps=2, save_strategy="steps", save_steps=2)
    undefended.train()
    found = [check.words for check in verify(tmp_path).checks if check.ok is False]
    assert found
    assert "checkpoint-2" in found[0]


SCRIPT = """
import pathlib, sys, time
from transformers import TrainerCallback
from tests.hf.test_faults import run
class Slow(TrainerCallback):
    def on_substep_end(self, *args, **kwargs): time.sleep(0.05)
    def on_step_end(self, *args, **kwargs): time.sleep(0.05)
run(pathlib.Path(sys.argv[1]), Slow())
"""


@pytest.mark.slow
@pytest.mark.slow_sample
def test_a_killed_run_goes_on_where_it_was(whole: Any, tmp_path: Path) -> None:
    """kill -9 at a random time after the first checkpoint; then the resume that the messages ask for."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, stdout=subprocess.DEVNULL)
    wait = random.uniform(0, 0.6)
    until = time.monotonic() + 200
    while not (tmp_path / f"checkpoint-{SAVED}" / STATE_FILE).is_file():
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode == -signal.SIGKILL:
        assert not verify(tmp_path).defended, f"killed {wait:.3f} s after the first checkpoint"
        assert (tmp_path / MANIFEST_FILE).is_file()
    with_state = [path for path in tmp_path.glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    last = max(with_state, key=lambda path: int(path.name.rpartition("-")[2]))
    again = run(tmp_path, resume=last)
    assert all(torch.equal(one, whole[name]) for name, one in parameters_of(again.model).items()), f"after {wait:.3f} s"
    assert verify(tmp_path).defended
