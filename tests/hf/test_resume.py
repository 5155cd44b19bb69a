"""Saving and resuming: a run that was interrupted ends where the uninterrupted one ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safe_sched import BDSReleased, Fixed
from safe_sched.errors import StateError
from safe_sched.training.checkpoint import STATE_FILE
from safe_sched_hf import SafeSchedCallback
from tests.support import make_hf, make_model, make_sft, parameters_of, single_thread, text_rows, token_rows

ROWS = token_rows(20, seed=4)
STEPS = 12


def run(
    make: Any, folder: Path, rows: Any = ROWS, resume: Path | None = None, callback: Any = None, **options: Any
) -> Any:
    ours = callback or SafeSchedCallback(
        BDSReleased(learning_rate=0.1), safety_data=text_rows(6, seed=8), safety_batch_size=2
    )
    trainer = make(
        folder,
        rows,
        model=make_model(attention_dropout=0.1),
        callbacks=[ours],
        **(
            {
                "max_steps": STEPS,
                "save_strategy": "steps",
                "save_steps": 1,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 2,
            }
            | options
        ),
    )
    with single_thread():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, ours


@pytest.fixture(scope="module", params=[make_sft, make_hf], ids=["sft", "hf"])
def whole(request: Any, tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    trainer, ours = run(request.param, folder)
    return request.param, folder, trainer, ours


@pytest.mark.parametrize("step", [1, 4, 5, 7, 11])
def test_a_resumed_run_equals_the_uninterrupted_one(whole: Any, step: int, tmp_path: Path) -> None:
    """Five points, before, at and after the end of an epoch (five steps): parameters, state and counts bit for bit."""
    make, folder, trainer, ours = whole
    again, resumed = run(make, tmp_path, resume=folder / f"checkpoint-{step}")
    a, b = parameters_of(trainer.model), parameters_of(again.model)
    assert all(torch.equal(a[name], b[name]) for name in a)
    saved = [load_file(f / f"checkpoint-{STEPS}" / STATE_FILE) for f in (folder, tmp_path)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert resumed.table().equals(ours.table())
    assert float(ours.session.row_weights().std()) > 0.05  # there was something to lose


def test_fresh_weights_would_show(whole: Any, tmp_path: Path) -> None:
    """Negative control: the same resume with the state of another step ends elsewhere."""
    make, folder, trainer, _ = whole
    shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
    state = load_file(folder / "checkpoint-5" / STATE_FILE)
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(folder / "checkpoint-5" / STATE_FILE, "pt") as file:
        header = file.metadata()
    state["state.logits"] = state["state.logits"].flip(0)
    save_file(state, tmp_path / "checkpoint-5" / STATE_FILE, metadata=header)
    again, _ = run(make, tmp_path, resume=tmp_path / "checkpoint-5")
    a, b = parameters_of(trainer.model), parameters_of(again.model)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_resume_by_flag_finds_the_last_checkpoint(tmp_path: Path) -> None:
    run(make_sft, tmp_path, max_steps=4)
    other = SafeSchedCallback(BDSReleased(learning_rate=0.1), safety_data=text_rows(6, seed=8), safety_batch_size=2)
    trainer = make_sft(
        tmp_path, ROWS, callbacks=[other], max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    trainer.train(resume_from_checkpoint=True)
    assert other.session.steps == 6


def test_a_resume_by_path_goes_on_from_that_folder(tmp_path: Path) -> None:
    """A path that is no string, and is not in the output folder."""
    run(make_hf, tmp_path / "first", max_steps=2)
    other = SafeSchedCallback(BDSReleased(learning_rate=0.1), safety_data=text_rows(6, seed=8), safety_batch_size=2)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_hf(tmp_path / "second", ROWS, callbacks=[other], max_steps=3, **options)
    trainer.train(resume_from_checkpoint=tmp_path / "first" / "checkpoint-2")  # pyright: ignore[reportArgumentType]
    assert other.session.steps == 3


def resume_error(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(StateError, match=match):
        run(make_sft, folder, resume=folder / "checkpoint-2", **options)


def test_a_resume_that_does_not_fit_stops(tmp_path: Path) -> None:
    """Without our state, with a damaged one, on other data, with other options: an error, and nothing overwritten."""
    run(make_sft, tmp_path, max_steps=2)
    file = tmp_path / "checkpoint-2" / STATE_FILE
    before = file.read_bytes()
    resume_error(tmp_path, "data: saved .* now", rows=token_rows(20, seed=5))
    resume_error(
        tmp_path,
        "learning_rate",
        callback=SafeSchedCallback(
            BDSReleased(learning_rate=0.2), safety_data=text_rows(6, seed=8), safety_batch_size=2
        ),
    )
    resume_error(tmp_path, "scheduler: saved", callback=SafeSchedCallback(Fixed()))
    assert file.read_bytes() == before
    file.write_bytes(before[: len(before) // 2])
    resume_error(tmp_path, "damaged or not a scheduler state")
    file.unlink()
    resume_error(tmp_path, "no scheduler state at .*Resume from a checkpoint that has one")


def test_a_shuffled_copy_of_the_data_is_the_same_data(tmp_path: Path) -> None:
    run(make_sft, tmp_path, max_steps=2)
    _, ours = run(make_sft, tmp_path, rows=ROWS[::-1], resume=tmp_path / "checkpoint-2", max_steps=3)
    assert ours.session.steps == 3


def test_other_safety_rows_are_another_run(tmp_path: Path) -> None:
    run(make_sft, tmp_path, max_steps=2)
    resume_error(
        tmp_path,
        "safety",
        callback=SafeSchedCallback(
            BDSReleased(learning_rate=0.1), safety_data=text_rows(6, seed=9), safety_batch_size=2
        ),
    )
    resume_error(tmp_path, "safety", callback=SafeSchedCallback(BDSReleased(learning_rate=0.1)))
