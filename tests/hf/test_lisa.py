"""Lisa in real trainers: a slow loop written from the paper, the untouched run, resumes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from safe_sched import BDS, BDSReleased, Fixed
from safe_sched.errors import ModelError, NumericsError, OptionError, StateError
from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE
from safe_sched_hf import Lisa, SafeSchedCallback
from safe_sched_hf.safety import SafetySet
from tests.hf.test_gradients import CHECKPOINTED, lora
from tests.support import (
    largest_difference,
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    single_thread,
    text_rows,
    token_rows,
)

ROWS, SAFE = token_rows(20, seed=4), token_rows(7, seed=9)
STEPS, K_SAFE, K_USER, RHO, SAFE_ROWS = 8, 2, 3, 0.3, 3
# a large epsilon: Adam would blow a rounding error in a tiny gradient up to a full step
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-2,
    "per_device_train_batch_size": 4,
}


def ours(lisa: Lisa, scheduler: Any = "fixed", **options: Any) -> SafeSchedCallback:
    given = {"safety_data": SAFE, "safety_batch_size": SAFE_ROWS} | options
    return SafeSchedCallback(scheduler, parts=[lisa], **given)


def turns_of(callback: SafeSchedCallback) -> Any:
    """The Lisa of a callback."""
    return callback.parts[0]


class Watching:
    """Keeps every micro-batch that is trained on, with the step it belongs to."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept = {name: inputs[name].clone() for name in ("input_ids", "labels", "attention_mask")}
        vars(self).setdefault("seen", []).append((self.state.global_step, kept))  # pyright: ignore
        return super().training_step(model, inputs, *args, **kwargs)  # pyright: ignore


class WatchingHF(Watching, Trainer):
    pass


class WatchingSFT(Watching, SFTTrainer):
    pass


def make_trainer(make: Any, folder: Path, callbacks: list[Any], options: dict[str, Any]) -> Any:
    options = OPTIONS | options
    model = make_model(attention_dropout=options.pop("attention_dropout", 0.0))
    trainer = make(folder, ROWS, model=model, callbacks=callbacks, **options)
    trainer.__class__ = WatchingSFT if make is make_sft else WatchingHF
    return trainer


def train(make: Any, folder: Path, callbacks: list[Any], options: dict[str, Any], resume: Path | None = None) -> Any:
    trainer = make_trainer(make, folder, callbacks, options)
    torch.manual_seed(11)
    with single_thread():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def twin_of(trainer: Any, options: dict[str, Any]) -> Any:
    """A model of its own with the same parameters; TRL's patched forward would stay bound to the first one."""
    model = make_model()
    if "peft_config" in options:
        model = get_peft_model(model, options["peft_config"])
    model.load_state_dict(trainer.model.state_dict())
    return model


# the slow loop --------------------------------------------------------------------------------------------------------


def loss_of(model: Any, batches: list[dict[str, torch.Tensor]], *, by_row: bool) -> torch.Tensor:
    """A loop over rows without padding: the mean over all label tokens, or over rows of their means."""
    rows = []
    for batch in batches:
        for line in range(batch["input_ids"].shape[0]):
            real = batch["attention_mask"][line].bool()
            ids, labels = batch["input_ids"][line, real], batch["labels"][line, real][1:]
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            total = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            rows.append((total, int((labels != -100).sum())))
    if by_row:
        return sum(total / count for total, count in rows) / len(rows)  # pyright: ignore[reportReturnType]
    return sum(total for total, _ in rows) / sum(count for _, count in rows)  # pyright: ignore[reportReturnType]


def slow_loop(model: Any, steps: list[list[Any]], options: dict[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    """The method as the paper describes it, in torch alone; ``changes`` break it for the controls."""
    setting = {"safe": K_SAFE, "user": K_USER, "rho": RHO, "stale": False, "closing": True, "rate": "mean"} | changes
    theta = [p for p in model.parameters() if p.requires_grad]
    kind = torch.optim.SGD if options.get("optim") == "sgd" else torch.optim.AdamW
    extra = {} if kind is torch.optim.SGD else {"eps": 1e-2, "weight_decay": 0.0}
    optimizer = kind(theta, lr=1e-2, **extra)
    safety = SafetySet(SAFE, make_tokenizer(), None, SAFE_ROWS, 3)
    anchor = [p.detach().clone() for p in theta]
    safe_done, rates = 0, []

    def step(batches: list[Any], rate: float, *, by_row: bool) -> None:
        optimizer.zero_grad()
        loss = loss_of(model, batches, by_row=by_row)
        for p, a in zip(theta, anchor, strict=True):
            loss = loss + setting["rho"] / 2 * (p - a).pow(2).sum()
        loss.backward()
        if (norm := options.get("max_grad_norm", 1.0)) > 0:
            torch.nn.utils.clip_grad_norm_(theta, norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    model.train()
    for number, batches in enumerate(steps):
        linear = options.get("lr_scheduler_type") == "linear"
        rates.append(1e-2 * (1 - number / len(steps)) if linear else 1e-2)
        step(batches, rates[-1], by_row=False)
        last = number + 1 == len(steps) and setting["closing"]
        if len(rates) < setting["user"] and not last:
            continue
        if not setting["stale"]:
            anchor = [p.detach().clone() for p in theta]
        for _ in range(-(-setting["safe"] * len(rates) // setting["user"])):
            rate = rates[-1] if setting["rate"] == "last" else sum(rates) / len(rates)
            step([safety.batch(safe_done)], rate, by_row=True)
            safe_done += 1
        if not setting["stale"]:
            anchor = [p.detach().clone() for p in theta]
        rates = []
    return parameters_of(model)


CASES: dict[str, Any] = {
    "hf, sgd": (make_hf, {"optim": "sgd"}),
    "hf, adamw": (make_hf, {}),
    "hf, accumulation": (make_hf, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "hf, no clipping": (make_hf, {"max_grad_norm": 0.0}),
    "sft": (make_sft, {"lr_scheduler_type": "linear"}),
    "sft, accumulation": (make_sft, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
    "sft, clipping": (make_sft, {"max_grad_norm": 0.1}),
    "sft, checkpointing": (make_sft, CHECKPOINTED),
    "sft, LoRA": (make_sft, {"peft_config": lora()}),
}


def by_step(trainer: Any) -> list[list[Any]]:
    return [[batch for at, batch in trainer.seen if at == step] for step in range(STEPS)]


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_slow_loop_of_the_paper(case: str, tmp_path: Path) -> None:
    """The user's batches come from a run without us; losses, pull, clipping and turns are written out."""
    make, options = CASES[case]
    plain = train(make, tmp_path, [], options)
    trainer = make_trainer(make, tmp_path, [ours(Lisa(K_SAFE, K_USER, RHO))], options)
    oracles = [twin_of(trainer, options) for _ in range(9)]
    torch.manual_seed(11)
    with single_thread():
        trainer.train()
        wanted = slow_loop(oracles.pop(), by_step(plain), options)
        assert largest_difference(parameters_of(trainer.model), wanted) < 1e-5
        broken = [{"rho": 0.0}, {"rho": 0.33}, {"stale": True}, {"user": 2}, {"safe": 1}, {"closing": False}]
        if "lr_scheduler_type" in options:
            broken.append({"rate": "last"})
        for change in broken if case in ("hf, adamw", "sft") else ():  # controls
            other = slow_loop(oracles.pop(), by_step(plain), options, **change)
            assert largest_difference(parameters_of(trainer.model), other) > 1e-4, change


# the untouched run ----------------------------------------------------------------------------------------------------

UNTOUCHED: dict[str, Any] = {
    "hf": (make_hf, {"attention_dropout": 0.1}),
    "hf, accumulation": (make_hf, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "sft": (make_sft, {"attention_dropout": 0.1}),
    "sft, LoRA": (make_sft, {"peft_config": lora(lora_dropout=0.1)}),
    "sft, checkpointing": (make_sft, CHECKPOINTED),
}


def differs(one: Any, other: Any) -> bool:
    a, b = parameters_of(one.model), parameters_of(other.model)
    assert a.keys() == b.keys()
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", UNTOUCHED)
def test_without_safe_steps_and_pull_nothing_changes(case: str, tmp_path: Path) -> None:
    """Bit for bit; and a pull, or one safe step, does change something."""
    make, options = UNTOUCHED[case]
    plain = train(make, tmp_path, [], options)
    same = train(make, tmp_path, [SafeSchedCallback(Fixed(), parts=[Lisa(0, 3, 0.0)])], options)
    assert not differs(same, plain)
    drop = {k for k in plain.state.log_history[-1] if k.startswith("train_")}
    for a, b in zip(same.state.log_history, plain.state.log_history, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("safe_sched/") and k not in drop} == {
            k: v for k, v in b.items() if k not in drop
        }
    for other in (SafeSchedCallback(Fixed(), parts=[Lisa(0, 3, 0.01)]), ours(Lisa(1, 8, 0.0))):
        assert differs(train(make, tmp_path, [other], options), plain)


@pytest.mark.parametrize("make", [make_hf, make_sft])
def test_no_user_batch_is_lost(make: Any, tmp_path: Path) -> None:
    """The same micro-batches in the same steps, the same learning rates and epochs, as in the run without us."""
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "linear",
        "max_steps": 12,
    }
    plain = train(make, tmp_path, [], options)
    trainer = train(make, tmp_path, [callback := ours(Lisa(2, 3, 0.1))], options)
    assert len(trainer.seen) == len(plain.seen) == 24
    for (step, one), (at, other) in zip(trainer.seen, plain.seen, strict=True):
        assert step == at
        assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("learning_rate", "epoch", "step"):
        assert [log.get(name) for log in trainer.state.log_history] == [
            log.get(name) for log in plain.state.log_history
        ]
    assert callback.session.steps == trainer.state.global_step == 12
    assert turns_of(callback).summary() == {"safe_steps_done": 8, "safety_rows_trained_on": 24}
    rows = sum(batch["input_ids"].shape[0] for _, batch in plain.seen)
    assert sum(callback.table().column("seen").to_pylist()) == rows


def test_rows_of_weight_0_leave_the_safe_steps_alone(tmp_path: Path) -> None:
    """With Fixed weights of 0, no pull and plain gradient descent, only safe steps move the model."""
    options = {"optim": "sgd", "max_steps": 6}
    scheduler = Fixed([0.0] * 20)
    trainer = make_trainer(make_hf, tmp_path, [ours(Lisa(2, 3, 0.0), scheduler)], options)
    alone = twin_of(trainer, {})
    with single_thread():
        trainer.train()
        safety = SafetySet(SAFE, make_tokenizer(), None, SAFE_ROWS, 3)
        optimizer = torch.optim.SGD(alone.parameters(), lr=1e-2)
        alone.train()
        for number in range(4):
            optimizer.zero_grad()
            loss_of(alone, [safety.batch(number)], by_row=True).backward()
            torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
            optimizer.step()
    assert largest_difference(parameters_of(trainer.model), parameters_of(alone)) < 1e-6


@pytest.mark.parametrize("make", [make_hf, make_sft])
def test_bds_weighs_the_rows_of_user_steps(make: Any, tmp_path: Path) -> None:
    callback = ours(Lisa(1, 3, 0.1), BDS(), safety_data=text_rows(7))
    trainer = train(make, tmp_path, [callback], {})
    assert float(callback.session.row_weights().std()) > 0.01
    assert "p_harmful" in callback.table().column_names
    assert trainer.state.log_history[3]["safe_sched/weight_max"] != 1


# resuming -------------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "attention_dropout": 0.1,
    "lr_scheduler_type": "linear",
}


def test_the_anchor_of_a_lora_run_is_its_adapter(tmp_path: Path) -> None:
    options = RESUMED | {"peft_config": lora(lora_dropout=0.1), "max_steps": 6}

    def callback() -> SafeSchedCallback:
        return ours(Lisa(K_SAFE, K_USER, RHO), BDSReleased(learning_rate=0.1))

    trainer = train(make_sft, tmp_path, [callback()], options)
    names = [name for name in load_file(tmp_path / "checkpoint-6" / STATE_FILE) if "anchor" in name]
    assert len(names) == sum(p.requires_grad for p in trainer.model.parameters())
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("make", [make_sft, make_hf], ids=["sft", "hf"])
def test_what_is_saved_matters(make: Any, tmp_path: Path) -> None:
    """Negative controls: another anchor, count, or safety row next, and the resume ends elsewhere."""
    from shutil import copytree

    from safetensors import safe_open

    folder = tmp_path / "whole"
    trainer = train(make, folder, [ours(Lisa(K_SAFE, K_USER, RHO))], RESUMED)
    file = folder / "checkpoint-4" / STATE_FILE
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    for changed, value in (
        ("part.lisa.anchor.model.norm.weight", lambda t: t + 0.5),
        ("part.lisa.since", lambda t: t + 1),
        ("part.lisa.safe_steps_done", lambda t: t + 1),
        ("part.lisa.rates", lambda t: t * 2),
    ):
        copytree(folder / "checkpoint-4", copied := tmp_path / changed / "checkpoint-4")
        tensors = load_file(file)
        tensors[changed] = value(tensors[changed])
        save_file(tensors, copied / STATE_FILE, metadata=header)
        assert differs(train(make, tmp_path, [ours(Lisa(K_SAFE, K_USER, RHO))], RESUMED, copied), trainer), changed


def test_a_resume_that_does_not_fit_stops(tmp_path: Path) -> None:
    train(make_hf, tmp_path, [ours(Lisa(2, 3, 0.1))], RESUMED | {"max_steps": 3})
    checkpoint = tmp_path / "checkpoint-2"
    for callback, match in (
        (ours(Lisa(2, 3, 0.2)), "parts: saved"),
        (SafeSchedCallback(Fixed(), safety_data=SAFE, safety_batch_size=SAFE_ROWS), "parts: saved"),
        (ours(Lisa(2, 3, 0.1), safety_data=token_rows(7, seed=10)), "safety"),
    ):
        with pytest.raises(StateError, match=match):
            train(make_hf, tmp_path, [callback], RESUMED, checkpoint)
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(StateError, match="no scheduler state at"):
        train(make_hf, tmp_path, [ours(Lisa(2, 3, 0.1))], RESUMED, checkpoint)


def test_an_anchor_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """A stream's state is not compared by shape, so the anchor is by itself."""
    callback = ours(Lisa(2, 3, 0.1))
    train(make_hf, tmp_path, [callback], {"max_steps": 3})
    saved = turns_of(callback).save() | {"anchor.model.norm.weight": torch.zeros(3)}
    with pytest.raises(StateError, match=r"no anchor of the shape \(32,\) for model.norm.weight"):
        turns_of(callback).load(saved)


# the end of training --------------------------------------------------------------------------------------------------


class Stops(TrainerCallback):
    """Asks at one event of one step that training end."""

    def __init__(self, event: str, step: int) -> None:
        def stop(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                control.should_training_stop = True

        setattr(self, event, stop)


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_epoch_end", "on_evaluate"])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_stops_early_still_ends_safe(event: str, first: bool, tmp_path: Path) -> None:
    """Five steps an epoch: one safe phase after step 3, and two thirds of one, rounded up, after step 5."""
    callback, stops = ours(Lisa(2, 3, 0.1)), Stops(event, 5)
    order = [stops, callback] if first else [callback, stops]
    trainer = train(make_hf, tmp_path, order, {"max_steps": 30, "eval_strategy": "epoch", "eval_rows": ROWS[:4]})
    assert trainer.state.global_step == 5
    assert turns_of(callback).summary() == {"safe_steps_done": 4, "safety_rows_trained_on": 12}
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    (told,) = [part for part in manifest["parts"] if part["name"] == "lisa"]
    assert told == turns_of(callback).settings() | turns_of(callback).summary()
    assert told["rho"] == 0.1
    assert manifest["coverage"]["rows_trained_on"] == 20


def test_a_best_model_that_is_loaded_at_the_end_stays_as_it_was_saved(tmp_path: Path) -> None:
    options = {
        "max_steps": 30,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "eval_rows": ROWS[:4],
    }
    trainer = train(make_hf, tmp_path, [ours(Lisa(2, 3, 0.1)), Stops("on_evaluate", 4)], options)
    best = load_file(Path(str(trainer.state.best_model_checkpoint)) / "model.safetensors")
    found = parameters_of(trainer.model)
    assert all(torch.equal(found[name], best[name]) for name in best)


def test_a_second_train_starts_anew(tmp_path: Path) -> None:
    callback = ours(Lisa(2, 3, 0.1))
    trainer = train(make_hf, tmp_path, [callback], {"max_steps": 4})
    before = parameters_of(trainer.model)
    anchors: list[dict[str, torch.Tensor]] = []

    class Looks(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            anchors.append({name: value.clone() for name, value in turns_of(callback).save().items()})

    trainer.add_callback(Looks())
    trainer.train()
    assert turns_of(callback).summary() == {"safe_steps_done": 3, "safety_rows_trained_on": 9}
    assert all(torch.equal(anchors[0][f"anchor.{name}"], value) for name, value in before.items())


# logs, and what is refused --------------------------------------------------------------------------------------------


def test_the_log_says_how_far_the_phases_go(tmp_path: Path) -> None:
    """Distances from the parameters at the last switch, which a callback of its own keeps."""
    walked: list[float] = []

    class Walks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = parameters_of(kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = parameters_of(kwargs["model"])
            walked.append(float(torch.cat([(now[k] - self.start[k]).flatten() for k in now]).norm()))

    trainer = train(make_hf, tmp_path, [Walks(), ours(Lisa(2, 3, 0.1))], {})
    logs = trainer.state.log_history
    assert [log["safe_sched/user_distance"] for log in logs[:3]] == pytest.approx(walked[:3], rel=1e-5)
    assert [log["safe_sched/safe_steps"] for log in logs[:8]] == [0, 0, 2, 2, 2, 4, 4, 6]
    assert [("safe_sched/safety_loss" in log) for log in logs[:8]] == [i in (2, 5, 7) for i in range(8)]
    assert all(log["safe_sched/safe_distance"] > 0 for log in (logs[2], logs[5], logs[7]))
    bare = train(make_hf, tmp_path, [other := ours(Lisa(2, 3, 0.0))], {})
    assert "safe_sched/user_distance" not in bare.state.log_history[2]
    assert not any("anchor" in name for name in turns_of(other).save())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_scaled_loss_has_a_scaled_pull(clip: float, tmp_path: Path) -> None:
    """Under a gradient scaler, as fp16 has it: the same run as without one."""
    options = {"max_grad_norm": clip}
    plain = train(make_hf, tmp_path, [ours(Lisa(2, 3, 1.0))], options)
    trainer = make_trainer(make_hf, tmp_path, [ours(Lisa(2, 3, 1.0)), scaled := Scaled()], options)
    torch.manual_seed(11)
    with single_thread():
        trainer.train()
    assert scaled.pulled > 1  # a thousand times what it is without
    assert largest_difference(parameters_of(trainer.model), parameters_of(plain.model)) < 1e-4


class Scaled(TrainerCallback):
    """Puts a gradient scaler where accelerate keeps that of fp16, which is for GPUs only."""

    pulled = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from safe_sched_hf.attach import calling_trainer

        trainer, _ = calling_trainer(self)
        accelerator, optimizer = trainer.accelerator, trainer.optimizer
        accelerator.scaler = optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # pyright: ignore
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        optimizer.__setstate__(optimizer.__dict__)  # pyright: ignore[reportOptionalMemberAccess]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pulled = max(float(p.grad.abs().max()) for p in kwargs["model"].parameters())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from safe_sched_hf.attach import calling_trainer

        calling_trainer(self)[0].accelerator.state._mixed_precision = "no"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"safety_data": None}, r"Lisa\(safe_steps=100\) trains on safety rows in turns: give safety_data"),
        ({"safety_weight": 0.0}, "safety_weight=0 leaves Lisa's safe steps nothing to learn"),
        ({"model_temperature": 1.0}, "samples the posterior of one loss.*use model_temperature=0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], match: str) -> None:
    SafeSchedCallback("fixed", parts=["lisa"], safety_data="core")
    with pytest.raises(OptionError, match=match):
        SafeSchedCallback("fixed", parts=["lisa"], **({"safety_data": "core"} | options))
    with pytest.raises(OptionError, match="'bds' measures 'probe' with safety rows: give safety_data"):
        SafeSchedCallback(BDS(), parts=[Lisa(0, 3)])


def test_a_run_without_a_whole_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"user_steps=900\) in a run of 40 .*Lisa\(safe_steps=1, user_steps=4\)"):
        train(make_hf, tmp_path, [ours(Lisa())], {"max_steps": 40})
    train(make_hf, tmp_path, [ours(Lisa(1, 4))], {"max_steps": 4})


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_an_optimiser_that_steps_within_the_backward_is_refused(optim: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"optim='{optim}' steps within the backward.*optim='adamw_torch'"):
        make_hf(tmp_path, ROWS, callbacks=[ours(Lisa())], optim=optim, optim_target_modules=["mlp"])


def test_a_parameter_that_is_unfrozen_on_the_way_stops_the_run(tmp_path: Path) -> None:
    class Unfreezes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].lm_head.weight.requires_grad_(state.global_step >= 2)

    trainer = make_trainer(make_hf, tmp_path, [Unfreezes(), ours(Lisa(2, 8, 0.1))], {})
    trainer.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="1 of them were frozen or unfrozen since .first: lm_head.weight"):
        trainer.train()


def test_a_safety_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    kwargs["model"].model.norm.weight.fill_(float("nan"))

    with pytest.raises(NumericsError, match="the safety loss is nan in safe step 0"):
        train(make_hf, tmp_path, [Breaks(), ours(Lisa(2, 3, 0.0))], {})
