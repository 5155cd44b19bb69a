"""A run that is saved and resumed ends where the uninterrupted one ends, whatever scheduler and parts it has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safe_sched import BDS, Antibody, BDSReleased, Fixed, NeuralBDS, combine
from safe_sched.errors import StateError
from safe_sched.hooks import parts
from safe_sched.schedulers import CATALOG
from safe_sched.training.checkpoint import STATE_FILE
from safe_sched_hf import Lisa, SafeSchedCallback
from tests.hf.test_gradients import lora
from tests.support import (
    make_hf,
    make_model,
    make_sft,
    parameters_of,
    single_thread,
    text_rows,
    token_rows,
    uneven_weights,
)

ROWS = token_rows(20, seed=4)
STEPS = 12
SAFE = text_rows(6, seed=8)


def run(
    make: Any, folder: Path, rows: Any = ROWS, resume: Path | None = None, callback: Any = None, **options: Any
) -> Any:
    ours = callback or SafeSchedCallback(BDSReleased(learning_rate=0.1), safety_data=SAFE, safety_batch_size=2)
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    trainer = make(folder, rows, model=make_model(attention_dropout=0.1), callbacks=[ours], **(defaults | options))
    torch.manual_seed(11)
    with single_thread():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, ours


# one law --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run: what defends it, and how it trains.

    Attributes:
        scheduler: Makes the scheduler; a new one for every run.
        names: Of the scheduler in the catalogue, and of the parts.
        defence: Options of the callback; a callable makes the value anew.
        options: Of the trainer.
        points: Steps after which a run is resumed.
    """

    scheduler: Callable[[], Any]
    names: Sequence[str]
    make: Any = make_sft
    defence: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    points: Sequence[int] = (4, 7)
    rows: Any = field(default_factory=lambda: ROWS)

    def go(self, folder: Path, resume: Path | None = None) -> Any:
        given = {name: value() if callable(value) else value for name, value in self.defence.items()}
        given = {"safety_data": SAFE, "safety_batch_size": 2} | given
        return run(self.make, folder, self.rows, resume, SafeSchedCallback(self.scheduler(), **given), **self.options)


REFUSALS = (" w50 w51", " w52 w53 w54", " w55 w56 w57 w58", " w50 w53")
PROMPTS = token_rows(80, seed=4, shortest=6)
ANYWHERE = (1, 4, 5, 7, 11)  # five steps are an epoch


def released() -> Any:
    return BDSReleased(learning_rate=0.1)


def acting() -> Any:
    return BDSReleased(transform="sigmoid", initial_logit=-1.0, learning_rate=0.3)


def antibody(**options: Any) -> Antibody:
    return Antibody(on_inversion="ignore", refusals=REFUSALS, **options)


def of_antibody(**options: Any) -> Case:
    """Resumed before the second look at the safety prompts (step 12), and between that and the next."""
    how = {"max_steps": 28, "save_steps": 3, "learning_rate": 3e-3}
    return Case(lambda: antibody(**options), ["antibody"], options=how, points=(3, 15), rows=PROMPTS)


def of_sampling(**options: Any) -> Case:
    names = ["bds_released", "safety_batch", "sampling"]
    return Case(acting, names, defence={"act": "sample"}, options=options, points=ANYWHERE)


def of_lisa(make: Any, scheduler: Any = Fixed, points: Sequence[int] = (1, 2, 3, 4, 6, 7), **options: Any) -> Case:
    """Within a phase, and at the ends of phases: 3 and 6."""
    name = scheduler().name
    how = {"max_steps": 8, "learning_rate": 1e-2, "adam_epsilon": 1e-2, "lr_scheduler_type": "linear"} | options
    return Case(scheduler, [name, "lisa"], make, {"parts": lambda: [Lisa(2, 3, 0.3)]}, how, points)


COLUMN = "safe_sched.p_harmful"
WITH_PRIOR = [row | {COLUMN: 0.05 + 0.04 * number} for number, row in enumerate(ROWS)]

CASES = {
    "released, sft": Case(released, ["bds_released", "safety_batch"], points=ANYWHERE),
    "released, hf": Case(released, ["bds_released", "safety_batch"], make_hf, points=ANYWHERE),
    "bds": Case(BDS, ["bds"]),
    "bds with a prior": Case(lambda: BDS(evidence=None), ["bds"], defence={"prior": COLUMN}, rows=WITH_PRIOR),
    "neural": Case(NeuralBDS, ["neural_bds"]),
    "fixed": Case(lambda: Fixed(uneven_weights(20)), ["fixed"]),
    "antibody": of_antibody(),
    "antibody, first token": of_antibody(refusal_cost="first_token"),
    "antibody, drifting": of_antibody(anchor=False),
    "combined": Case(lambda: combine(BDS(), antibody()), ["bds", "antibody"], rows=PROMPTS),
    "sampling": of_sampling(),
    "sampling, workers": of_sampling(dataloader_num_workers=2),
    "sampling, group by length": of_sampling(train_sampling_strategy="group_by_length"),
    "sampling, packing": of_sampling(packing=True, max_length=20),
    "lisa, sft": of_lisa(make_sft),
    "lisa, hf": of_lisa(make_hf),
    "lisa, LoRA": of_lisa(make_sft, released, (4,), peft_config=lora(lora_dropout=0.1)),
    "noise": Case(released, ["bds_released", "parameter_noise"], defence={"model_temperature": 0.5}),
}


def test_the_law_is_put_to_every_scheduler_and_part() -> None:
    assert {name for case in CASES.values() for name in case.names} == CATALOG.keys() | parts().keys()


def same(first: Any, second: Any) -> bool:
    """Bit for bit; nan is itself."""
    return first.keys() == second.keys() and all(
        np.array_equal(np.asarray(first[name]), np.asarray(second[name]), equal_nan=True) for name in first
    )


def table_of(ours: Any) -> dict[str, Any]:
    table = ours.table()
    return {name: table.column(name).to_numpy() for name in table.column_names}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """Parameters, the weights table and the state file, bit for bit."""
    case = CASES[name]
    trainer, ours = case.go(tmp_path / "whole")
    saves = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    last = f"checkpoint-{saves[-1]}"
    expected = load_file(tmp_path / "whole" / last / STATE_FILE)
    for point in case.points:
        again, resumed = case.go(tmp_path / f"from-{point}", tmp_path / "whole" / f"checkpoint-{point}")
        a, b = parameters_of(trainer.model), parameters_of(again.model)
        assert all(torch.equal(a[key], b[key]) for key in a), point
        assert same(load_file(tmp_path / f"from-{point}" / last / STATE_FILE), expected), point
        assert same(table_of(resumed), table_of(ours)), point
    if "fixed" not in case.names:  # there was something to lose: weights, or ratios where no row is turned away
        learned = [values for name, values in table_of(ours).items() if name in ("weight", "ratio")]
        assert max(float(np.nanstd(values)) for values in learned) > 0.01
    kept = [log["safe_sched/rows_kept"] for log in trainer.state.log_history if "safe_sched/rows_kept" in log]
    assert not kept or min(kept) < 0.8


def test_fresh_weights_would_show(tmp_path: Path) -> None:
    """Negative control: the same resume with other weights in the state ends elsewhere."""
    folder = tmp_path / "whole"
    trainer, _ = run(make_sft, folder)
    shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
    state = load_file(folder / "checkpoint-5" / STATE_FILE)
    with safe_open(folder / "checkpoint-5" / STATE_FILE, "pt") as file:
        header = file.metadata()
    state["state.logits"] = state["state.logits"].flip(0)
    save_file(state, tmp_path / "checkpoint-5" / STATE_FILE, metadata=header)
    again, _ = run(make_sft, tmp_path, resume=tmp_path / "checkpoint-5")
    a, b = parameters_of(trainer.model), parameters_of(again.model)
    assert any(not torch.equal(a[name], b[name]) for name in a)


# what a resume finds, and what it refuses -----------------------------------------------------------------------------


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
