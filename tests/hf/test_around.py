"""What trainers do around a run: stop early, load the best model, search, train again; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from safe_sched import BDS, Antibody, Fixed, NeuralBDS
from safe_sched.errors import ModelError
from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE
from safe_sched.training.loop import measurements_for
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.attach import refuse_sharded, refuse_unsupported
from safe_sched_hf.lisa import Lisa
from safe_sched_hf.noise import ParameterNoise
from tests.support import hooks_on, make_hf, make_model, make_sft, parameters_of, single_thread, text_rows, token_rows

ROWS = token_rows(16, seed=2)
TEXTS, SAFE = text_rows(16), text_rows(5, seed=3)
EVERY_STEP: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_FILE).read_text())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_hf, marks=pytest.mark.compat("early stopping, `load_best_model_at_end`", "hf")),
        pytest.param(make_sft, marks=pytest.mark.compat("early stopping, `load_best_model_at_end`", "sft")),
    ],
    ids=["hf", "sft"],
)
def test_a_run_that_is_stopped_early_keeps_its_best_model_and_what_it_has_learned(make: Any, tmp_path: Path) -> None:
    ours = SafeSchedCallback(BDS(), safety_data=SAFE)
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    rows, seen = (TEXTS, TEXTS[:4]) if make is make_sft else (ROWS, ROWS[:4])
    # steps this long make the loss worse at once
    trainer = make(
        tmp_path, rows, callbacks=[ours, stop], eval_rows=seen, max_steps=20, learning_rate=1.0, **EVERY_STEP
    )
    with single_thread():
        trainer.train()
    steps = trainer.state.global_step
    assert 0 < steps < 20
    assert manifest(tmp_path)["coverage"]["steps"] == steps == ours.session.steps
    assert int(ours.session.seen.sum()) == 4 * steps
    best = load_file(Path(str(trainer.state.best_model_checkpoint)) / "model.safetensors")
    found = parameters_of(trainer.model)
    assert all(torch.equal(found[name], best[name]) for name in best)
    assert hooks_on(trainer.model) == 0


@pytest.mark.compat("hyper-parameter search", "hf")
def test_a_trial_of_a_search_keeps_its_state_with_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `Trainer.hyperparameter_search` runs a trial, without the search."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})  # asks for optuna's own class
    ours = SafeSchedCallback(Fixed())
    trainer = make_hf(tmp_path, ROWS, callbacks=[ours], max_steps=2, save_strategy="steps", save_steps=2)
    trainer.model_init, trainer.hp_name = lambda: make_model(), None
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {"learning_rate": trial.rate}
    for number, rate in enumerate((1e-3, 1e-2)):
        trainer.train(trial=SimpleNamespace(number=number, params={}, rate=rate))  # pyright: ignore[reportArgumentType]
        assert trainer.args.learning_rate == rate
        assert (tmp_path / f"run-{number}" / "checkpoint-2" / STATE_FILE).exists()
        assert manifest(tmp_path / f"run-{number}")["coverage"]["steps"] == 2
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.compat("two trainers in one process", "hf")
def test_two_trainers_in_one_process_do_not_know_of_each_other(tmp_path: Path) -> None:
    """One trains while the other is in the middle of its own run; each is what it is by itself."""

    def made(name: str, weights: list[float], callbacks: Any = ()) -> tuple[Any, SafeSchedCallback]:
        ours = SafeSchedCallback(Fixed(weights))
        return make_hf(tmp_path / name, ROWS, callbacks=[ours, *callbacks], max_steps=3), ours

    first, second = [0.1 * i for i in range(16)], [0.1 * (16 - i) for i in range(16)]
    alone = []
    for weights in (first, second):
        trainer, _ = made("alone", weights)
        with single_thread():
            trainer.train()
        alone.append(parameters_of(trainer.model))

    inner, inner_ours = made("inner", second)

    class Nested(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.random.fork_rng(devices=[]):
                    inner.train()

    outer, outer_ours = made("outer", first, [Nested()])
    with single_thread():
        outer.train()
    for trainer, ours, expected in ((outer, outer_ours, alone[0]), (inner, inner_ours, alone[1])):
        found = parameters_of(trainer.model)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert ours.session.steps == 3


# what is refused ------------------------------------------------------------------------------------------------------


def trainer_like(**changes: Any) -> Any:
    """What `refuse_unsupported` looks at, of trainers that cannot be made on this machine."""
    args = {"n_gpu": 1, "world_size": 1, "torch_compile": False, "auto_find_batch_size": False}
    args |= {"dataloader_drop_last": False}
    kinds = {"even_batches": True, "parallelism_config": None, "distributed_type": "NO", "is_fsdp2": False}
    trainer = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False}
    parts: list[dict[str, Any]] = [args, kinds, trainer]
    for part in parts:
        part |= {name: value for name, value in changes.items() if name in part}
    return SimpleNamespace(args=SimpleNamespace(**args), accelerator=SimpleNamespace(**kinds), **trainer)


SEVERAL = {"world_size": 2, "distributed_type": "MULTI_GPU"}


def refused(what: str, reason: str, changes: dict[str, Any], match: str | None = None) -> Any:
    return pytest.param(changes, match or what, marks=pytest.mark.compat(what, "refused", reason=reason))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        refused("several GPUs in one process", "`nn.DataParallel` splits a batch behind the trainer", {"n_gpu": 2}),
        refused(
            "auto_find_batch_size=True",
            "a restart goes on with the parameters, and rows trained on before it would not be counted",
            {"auto_find_batch_size": True},
        ),
        refused("torch_compile=True", "not every backend of it takes our hooks", {"torch_compile": True}),
        refused(
            "TPUs",
            "not built",
            {"world_size": 2, "distributed_type": "XLA"},
            "several processes",
        ),
        refused(
            "DeepSpeed",
            "its backward steps the optimiser, and keeps gradients to itself",
            {"world_size": 2, "is_deepspeed_enabled": True},
        ),
        refused(
            "FSDP of the first version",
            "parameters are flattened; FSDP2 is supported",
            {"world_size": 2, "is_fsdp_enabled": True},
        ),
        refused(
            "tensor, context or sequence parallelism",
            "ranks share rows, or have parts of them",
            SEVERAL | {"parallelism_config": SimpleNamespace(total_size=2)},
        ),
        refused(
            "even_batches=False",
            "a rank may have batches left when another has none",
            SEVERAL | {"even_batches": False},
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], match: str) -> None:
    refuse_unsupported(trainer_like(), object(), ranks=True)
    with pytest.raises(ModelError, match=match):
        refuse_unsupported(trainer_like(**changes), object(), ranks=True)


@pytest.mark.parametrize(
    "changes",
    [
        SEVERAL,
        SEVERAL | {"even_batches": False, "dataloader_drop_last": True},
        {"is_fsdp_enabled": True, "is_fsdp2": True},
    ],
)
def test_ddp_and_fsdp2_are_taken_by_those_who_can(changes: dict[str, Any]) -> None:
    trainer = trainer_like(**({"world_size": 2, "distributed_type": "FSDP"} | changes))
    refuse_unsupported(trainer, object(), ranks=True)
    with pytest.raises(ModelError, match="several processes|FSDP"):
        refuse_unsupported(trainer, object())


@pytest.mark.parametrize(
    ("scheduler", "part", "match"),
    [
        (Fixed(), Lisa(2, 3, 0.1), "Lisa"),
        (Antibody(), None, "Antibody"),
        (BDS(evidence="reference", reference="adapter:plain"), None, "a reference adapter"),
        (BDS(), ParameterNoise(1.0), "model_temperature=1.0"),
    ],
)
def test_what_needs_the_whole_model_is_refused_where_it_is_sharded(scheduler: Any, part: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        refuse_sharded([*measurements_for(scheduler), *([part] if part else [])])
    for fine in (BDS(), NeuralBDS(), Fixed()):
        refuse_sharded(measurements_for(fine))


def test_a_batch_size_that_is_searched_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="auto_find_batch_size=True"):
        make_hf(tmp_path, ROWS, callbacks=[SafeSchedCallback(Fixed())], auto_find_batch_size=True)
