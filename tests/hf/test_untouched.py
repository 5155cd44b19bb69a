"""Equal weights change nothing, and nothing of ours outlives a training run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from safe_sched import Fixed
from safe_sched_hf import SafeSchedCallback
from tests.hf.test_gradients import CHECKPOINTED, EPSILON, FusedLossLlama, InModelSFT, lora
from tests.support import (
    hooks_on,
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    single_thread,
    token_rows,
)

ROWS = token_rows(24, seed=2)
SFT: dict[str, dict[str, Any]] = {
    "fused head": {},
    "tied": {"tied": True},
    "LoRA": {"peft_config": lora(lora_dropout=0.1)},
    "dropout": {"attention_dropout": 0.1},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "checkpointing": CHECKPOINTED,
    "label smoothing": {"label_smoothing_factor": EPSILON},
    "dft": {"loss_type": "dft"},
    "packing": {"packing": True, "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
    "bf16": {"bf16": True},
    "in-model loss": {"cls": InModelSFT},
    "in-model loss, bf16": {"cls": InModelSFT, "bf16": True},
    "workers": {"dataloader_num_workers": 1},
    "neftune": {"neftune_noise_alpha": 5.0},
}
HF: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "label smoothing": {"label_smoothing_factor": EPSILON},
    "padding left": {"processing_class": make_tokenizer("left")},
    "bf16": {"bf16": True},
    "fused in-model loss, head frozen": {"model_cls": FusedLossLlama, "freeze_head": True},
}


def train(make: Any, cls: type, folder: Any, callbacks: list[Any], options: dict[str, Any]) -> Any:
    options = {"max_steps": 20, "learning_rate": 3e-3} | options
    cls = options.pop("cls", cls)
    model = make_model(
        tied=options.pop("tied", False),
        attention_dropout=options.pop("attention_dropout", 0.0),
        **({"cls": options.pop("model_cls")} if "model_cls" in options else {}),
    )
    if options.pop("freeze_head", False):
        model.lm_head.weight.requires_grad_(False)
    trainer = make(folder, ROWS, model=model, callbacks=callbacks, **options)
    trainer.__class__ = cls
    torch.manual_seed(11)
    with single_thread():
        trainer.train()
    return trainer


def assert_same_run(one: Any, other: Any) -> None:
    a, b = parameters_of(one.model), parameters_of(other.model)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [
        {k: v for k, v in run.state.log_history[-2].items() if not k.startswith("safe_sched/")} for run in (one, other)
    ]
    assert logs[0] == logs[1]


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", SFT)
def test_equal_weights_leave_sft_training_untouched(case: str, tmp_path: Any) -> None:
    """Parameters after 20 steps, the trainer's numbers and its state are those of the run without us, bit for bit."""
    ours = train(make_sft, SFTTrainer, tmp_path, [SafeSchedCallback(Fixed())], SFT[case])
    assert_same_run(ours, train(make_sft, SFTTrainer, tmp_path, [], SFT[case]))


@pytest.mark.parametrize("case", HF)
def test_equal_weights_leave_hf_training_untouched(case: str, tmp_path: Any) -> None:
    ours = train(make_hf, Trainer, tmp_path, [SafeSchedCallback(Fixed())], HF[case])
    assert_same_run(ours, train(make_hf, Trainer, tmp_path, [], HF[case]))


def test_the_comparison_can_fail(tmp_path: Any) -> None:
    """Negative control: one weight of 24 that is off by 2**-10 shows."""
    ours = train(make_sft, SFTTrainer, tmp_path, [SafeSchedCallback(Fixed([1 + 2**-10] + [1.0] * 23))], {})
    with pytest.raises(AssertionError):
        assert_same_run(ours, train(make_sft, SFTTrainer, tmp_path, [], {}))


def test_a_random_collator_draws_the_same_numbers(tmp_path: Any) -> None:
    """Identifying the rows runs the collator on some of them; training must draw what it would have drawn."""
    from transformers import DataCollatorForSeq2Seq

    class Drawing(DataCollatorForSeq2Seq):
        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            torch.rand(3)
            return super().__call__(features, return_tensors)

    def options() -> dict[str, Any]:
        return {"data_collator": Drawing(make_tokenizer()), "attention_dropout": 0.2}

    ours = train(make_hf, Trainer, tmp_path, [SafeSchedCallback(Fixed())], options())
    assert_same_run(ours, train(make_hf, Trainer, tmp_path, [], options()))


@pytest.mark.parametrize("make", [make_sft, make_hf])
def test_evaluation_is_untouched(make: Any, tmp_path: Any) -> None:
    """Evaluation during and after training gives the plain run's numbers; none of ours are in its records."""

    def run(callbacks: list[Any]) -> Any:
        trainer = make(
            tmp_path, ROWS, callbacks=callbacks, max_steps=6, eval_strategy="steps", eval_steps=2, eval_rows=ROWS[:8]
        )
        with single_thread():
            trainer.train()
            return trainer, trainer.evaluate()

    (ours, last), (plain, expected) = run([SafeSchedCallback(Fixed())]), run([])
    drop = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens", "epoch"}
    pick = lambda logs: [{k: v for k, v in log.items() if k not in drop} for log in logs if "eval_loss" in log]  # noqa: E731
    assert pick(ours.state.log_history) == pick(plain.state.log_history)
    assert len(pick(ours.state.log_history)) == 4
    assert pick([last]) == pick([expected])


class Breaks(TrainerCallback):
    """Raises at one event of step 2."""

    def __init__(self, event: str, error: type[BaseException]) -> None:
        def raises(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 2:
                raise error("on purpose")

        setattr(self, event, raises)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log", "on_epoch_end"]
)
@pytest.mark.parametrize("first", [True, False])
def test_no_hook_is_left_when_an_event_raises(event: str, error: type, first: bool, tmp_path: Any) -> None:
    broken, ours = Breaks(event, error), SafeSchedCallback(Fixed())
    model = make_model()
    trainer = make_sft(
        tmp_path,
        ROWS,
        model=model,
        callbacks=[broken, ours] if first else [ours, broken],
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(error, match="on purpose"):
        trainer.train()
    assert hooks_on(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "head", "backward"])
def test_no_hook_is_left_when_the_step_raises(place: str, error: type, tmp_path: Any) -> None:
    """In the middle of a layer, after the gate was set, or while gradients flow; and the trainer is its own again."""
    model = make_model()
    calls = 0

    def maybe(*args: Any) -> None:
        nonlocal calls
        calls += 1
        assert hooks_on(model) > 0  # negative control: here there is something to leave behind
        if calls == 3:
            raise error("on purpose")

    module = model.model.layers[0] if place == "forward" else model.model.norm
    if place == "backward":
        module.register_full_backward_hook(maybe)
    else:
        module.register_forward_hook(maybe)
    trainer = make_sft(tmp_path, ROWS, model=model, callbacks=[SafeSchedCallback(Fixed())], max_steps=8)
    with pytest.raises(error, match="on purpose"):
        trainer.train()
    assert hooks_on(model) == 0
    assert not {"training_step", "log", "get_batch_samples"} & vars(trainer).keys()


def test_the_trainer_is_its_own_again_after_training(tmp_path: Any) -> None:
    model = make_model()
    ours = SafeSchedCallback(Fixed())
    trainer = make_sft(tmp_path, ROWS, model=model, callbacks=[ours], max_steps=3)
    trainer.train()
    assert hooks_on(model) == 0
    assert not {"training_step", "log", "get_batch_samples"} & vars(trainer).keys()


def test_a_second_train_after_a_crash_is_defended(tmp_path: Any) -> None:
    ours, broken = SafeSchedCallback(Fixed()), Breaks("on_log", RuntimeError)
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours, broken], max_steps=4)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    trainer.remove_callback(broken)
    trainer.train()
    assert ours.session.steps == 4
    assert not {"training_step", "log", "get_batch_samples"} & vars(trainer).keys()


def test_a_crashed_attachment_sleeps_when_the_callback_is_taken_out(tmp_path: Any) -> None:
    """After a crash the user may go on without us: the next train() is the plain one."""
    ours, broken = SafeSchedCallback(Fixed([0.0] * 24)), Breaks("on_log", RuntimeError)
    model = make_model()
    trainer = make_sft(tmp_path, ROWS, model=model, callbacks=[ours, broken], max_steps=4)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    trainer.remove_callback(broken)
    trainer.remove_callback(ours)
    before = parameters_of(model)
    trainer.train()
    after = parameters_of(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # weights of 0 would have taught nothing
