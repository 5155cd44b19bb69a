"""The probe in real trainers: what it measures, and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Trainer
from trl import SFTTrainer

from safe_sched import BDS, Fixed
from safe_sched.errors import DataError, ModelError, OptionError
from safe_sched.estimators.probe import GAIN, Direction
from safe_sched.training.session import Session
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.measure.probe import ProbeMeasurement
from safe_sched_hf.noise import add_noise
from tests.hf.test_gradients import lora
from tests.hf.test_untouched import HF, ROWS, SFT, assert_same_run, train
from tests.support import (
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    parameters_of,
    single_thread,
    text_rows,
    token_rows,
)

SAFETY = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{20 + i % 3} w{30 + i}"} for i in range(8)]


class Silent(BDS):
    """Measures like BDS and learns nothing, so every weight stays 1."""

    def learn(self, state: Any, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        return {}


def callback(scheduler: Any, **options: Any) -> SafeSchedCallback:
    return SafeSchedCallback(scheduler, **({"safety_data": SAFETY, "safety_batch_size": 2} | options))


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The (slots, scores) of every call to learn."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = Session.learn

    def learn(self: Session, need: str, slots: Tensor, values: Tensor) -> None:
        seen.append((slots.clone(), values.clone()))
        original(self, need, slots, values)

    monkeypatch.setattr(Session, "learn", learn)
    return seen


@pytest.mark.parametrize("name", sorted(SFT.keys() - {"label smoothing", "workers"}))
def test_measuring_leaves_no_trace_in_sft(name: str, tmp_path: Path, scores: Any) -> None:
    """Parameters, gradients and random numbers come back bit for bit: the run with a probe is the run without."""
    options = SFT[name] | {"max_steps": 6}
    plain = train(make_sft, SFTTrainer, tmp_path / "a", [callback(Fixed())], dict(options))
    probed = train(make_sft, SFTTrainer, tmp_path / "b", [callback(Silent())], dict(options))
    assert scores
    assert_same_run(plain, probed)


@pytest.mark.parametrize("name", sorted(HF.keys() - {"fused in-model loss, head frozen"}))
def test_measuring_leaves_no_trace_in_hf_trainer(name: str, tmp_path: Path, scores: Any) -> None:
    options = HF[name] | {"max_steps": 6}
    plain = train(make_hf, Trainer, tmp_path / "a", [callback(Fixed())], dict(options))
    probed = train(make_hf, Trainer, tmp_path / "b", [callback(Silent())], dict(options))
    assert scores
    assert_same_run(plain, probed)


# the slow way -----------------------------------------------------------------------------------------------------


def log_probs_of(model: nn.Module, ids: list[int], labels: list[int], **parameters: Any) -> list[float]:
    """Log-probability of every label token of one row alone, with other parameters where they are given."""
    output: Any = functional_call(model, parameters, kwargs={"input_ids": torch.tensor([ids])})
    logits = output.logits[0].log_softmax(-1)
    return [float(logits[t - 1, ids[t]].detach()) for t in range(1, len(ids)) if labels[t] != -100]


def slow_scores(
    model: Any, rows: list[dict[str, list[int]]], prompts: list[list[int]], refusing: list[int]
) -> list[float]:
    """The score of every row from the parameters before and after the move, one row at a time."""
    training = model.training
    model.eval()
    margins = []
    for prompt in prompts:
        p = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        yes = p[refusing].sum()
        margins.append(torch.log(yes) - torch.log(1 - yes))
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(torch.stack(margins).mean(), parameters, allow_unused=True)
    square = sum(float((g * g).sum()) for g in gradients if g is not None)
    moved = {
        name: p.detach() if g is None else p.detach() + g * (GAIN / square)
        for name, p, g in zip(names, parameters, gradients, strict=True)
    }
    result = []
    for row in rows:
        before = log_probs_of(model, row["input_ids"], row["labels"])
        after = log_probs_of(model, row["input_ids"], row["labels"], **moved)
        result.append(max((b - a) / GAIN for b, a in zip(before, after, strict=True)))
    model.train(training)
    return result


def safety_by_hand() -> tuple[list[list[int]], list[int]]:
    """Prompts and first answer tokens of SAFETY, from the vocabulary of tests/support.py: wN is token 5 + N."""
    prompts = [[5 + int(word[1:]) for word in row["prompt"].split()] for row in SAFETY]
    return prompts, sorted({5 + int(row["completion"].split()[0][1:]) for row in SAFETY})


ORACLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (make_sft, {}),
    "hf": (make_hf, {}),
    "hf, padding left": (make_hf, {"processing_class": make_tokenizer("left")}),
    "LoRA": (make_sft, {"peft_config": lora()}),
    "packing": (make_sft, {"packing": True, "max_length": 24}),
    "padding-free": (make_sft, {"padding_free": True, "max_length": None}),
    "accumulation": (make_sft, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("name", ORACLES)
def test_scores_against_two_explicit_models(name: str, tmp_path: Path, scores: Any) -> None:
    make, options = ORACLES[name]
    ours = callback(Silent())
    trainer = make(tmp_path, ROWS, model=make_model(), callbacks=[ours], max_steps=1, **options)
    if name == "LoRA":  # at the start B is 0 and so is the gradient of A; use a later point
        torch.manual_seed(5)
        for parameter_name, parameter in trainer.model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    with single_thread():
        expected = slow_scores(trainer.model, ROWS, *safety_by_hand())
        trainer.train()
    index = ours.session.index
    assert index.row_slots is not None
    by_slot = {}
    if name != "packing":  # packing cuts and orders rows: compare the set of scores
        by_slot = dict(zip(index.row_slots.tolist(), expected, strict=True))
    slots, values = (torch.cat(column) for column in zip(*scores, strict=True))
    assert slots.numel() >= 4
    for slot, value in zip(slots.tolist(), values.tolist(), strict=True):
        close = [abs(value - x) < 2e-3 * (1 + abs(x)) for x in ([by_slot[slot]] if by_slot else expected)]
        assert any(close), (slot, value, by_slot.get(slot))
    # control: the scores of other rows are not close, and neither are those along the opposite direction
    assert values.unique().numel() > 2


def test_the_opposite_direction_is_seen(tmp_path: Path, scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the sign of the move wrong, the scores are far from the slow ones."""
    original = Direction.__init__

    def wrong(self: Direction, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.scale = -self.scale

    monkeypatch.setattr(Direction, "__init__", wrong)
    ours = callback(Silent())
    trainer = make_hf(tmp_path, ROWS, model=make_model(), callbacks=[ours], max_steps=1)
    expected = slow_scores(trainer.model, ROWS, *safety_by_hand())
    trainer.train()
    slots, values = scores[0]
    row_slots = ours.session.index.row_slots
    assert row_slots is not None
    by_slot = dict(zip(row_slots.tolist(), expected, strict=True))
    assert max(abs(v - by_slot[s]) for s, v in zip(slots.tolist(), values.tolist(), strict=True)) > 0.05


# when, how often, and what stops it -------------------------------------------------------------------------------


def test_a_row_is_measured_a_few_times_in_all(tmp_path: Path) -> None:
    ours = callback(BDS(max_probes=2))
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours], max_steps=40)
    trainer.train()
    scored = ours.table().column("scored").to_pylist()
    assert min(scored) >= 1
    assert max(scored) <= 2
    assert ours.session.steps == 40


def test_doubtful_rows_are_measured_again_before_they_come_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's second score comes in a step that does not train on it, from both forwards at that time."""
    trained: list[set[int]] = []
    again: list[tuple[int, set[int]]] = []
    original, begins = ProbeMeasurement._look_again, ProbeMeasurement.before_step
    coming: list[Any] = []

    def before_step(self: Any, batches: Any) -> None:
        coming[:] = batches
        begins(self, batches)

    def look(self: Any) -> None:
        session = self.run.session
        before = session.state.scored.clone()
        original(self)
        changed = (session.state.scored != before).nonzero().flatten().tolist()
        if changed:
            again.append((session.steps, set(changed)))
            trained.append({int(s) for batch in coming for s in batch.slots})

    monkeypatch.setattr(ProbeMeasurement, "before_step", before_step)
    monkeypatch.setattr(ProbeMeasurement, "_look_again", look)
    rows = token_rows(160, seed=6)
    ours = callback(BDS())
    make_sft(tmp_path, rows, callbacks=[ours], max_steps=40, num_train_epochs=1).train()
    assert again
    assert min(step for step, _ in again) >= 24
    assert all(not (now & rows_) for now, (_, rows_) in zip(trained, again, strict=True))


def test_parameters_come_back_when_a_probe_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("safe_sched_hf.measure.probe.lines_log_probs", broken)
    trainer = make_sft(tmp_path, ROWS, callbacks=[callback(BDS())])
    assert isinstance(trainer.model, nn.Module)
    before = parameters_of(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    after = parameters_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "training_step" not in vars(trainer)


def test_safety_rows_without_a_prompt_are_refused(tmp_path: Path) -> None:
    trainer = make_sft(tmp_path, ROWS, callbacks=[callback(BDS(), safety_data=[{"text": "w1 w2 w3"}])])
    with pytest.raises(DataError, match="no prompt before its labels"):
        trainer.train()


def test_the_probe_needs_safety_rows() -> None:
    with pytest.raises(OptionError, match='give safety_data, for example safety_data="core"'):
        SafeSchedCallback(BDS())


def test_a_chat_template_is_not_taken_for_a_decision(tmp_path: Path) -> None:
    """All answers begin with w9, those of the training rows too: the refusal opens with the token after it."""
    safety = [{"prompt": f"w{i}", "completion": f" w9 w{20 + i}"} for i in range(4)]
    rows = [{"prompt": f"w{30 + i}", "completion": f" w9 w{40 + i}"} for i in range(8)]
    ours = callback(BDS(), safety_data=safety)
    make_sft(tmp_path, rows, callbacks=[ours], completion_only_loss=True).train()
    other = callback(BDS(), safety_data=safety)
    make_sft(tmp_path, text_rows(8), callbacks=[other], completion_only_loss=True).train()
    # the attachment is gone after training; the opening is asked for through the function that made it
    from safe_sched.estimators.probe import opening_of
    from safe_sched_hf.safety import SafetySet

    token_safety = SafetySet(safety, make_tokenizer(), None, 2, 0).rows
    assert opening_of(token_safety, [torch.tensor([14, 45])]).tokens.tolist() == [25, 26, 27, 28]
    assert opening_of(token_safety, [torch.tensor([17, 45])]).tokens.tolist() == [14]
    assert opening_of(token_safety).tokens.tolist() == [14]


# directions in 16 bits --------------------------------------------------------------------------------------------


def parameters_in(dtype: torch.dtype, size: float) -> tuple[list[nn.Parameter], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(64, 64, generator=generator) * size for _ in range(3)]
    gradients = [torch.randn(64, 64, generator=generator) for _ in range(3)]
    return [nn.Parameter(v.to(dtype)) for v in values], [g.to(dtype) for g in gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_move_gains_what_it_should_in_every_float(dtype: torch.dtype) -> None:
    parameters, gradients = parameters_in(dtype, 0.02)
    before = [p.detach().clone() for p in parameters]
    direction = Direction(parameters, gradients)
    with direction.taken():
        gained = sum(
            float(((p.detach().double() - b.double()) * g.double()).sum())
            for p, b, g in zip(parameters, before, gradients, strict=True)
        )
    assert 0.75 * GAIN <= gained <= 1.3 * GAIN
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_rounding_away_is_not_silent() -> None:
    """Control: a plain move in bfloat16 gains far too little, and a move that cannot be made is an error."""
    parameters, gradients = parameters_in(torch.bfloat16, 100.0)
    square = sum(float(g.double().square().sum()) for g in gradients)
    plain = sum(
        float(((p + g * (GAIN / square)).double() - p.double()).mul(g.double()).sum().detach())
        for p, g in zip(parameters, gradients, strict=True)
    )
    assert plain < 0.1 * GAIN
    with pytest.raises(ModelError, match="gradient of the refusal margin is 0"):
        Direction(parameters, [torch.zeros_like(g) for g in gradients])


# resuming ---------------------------------------------------------------------------------------------------------


def resumable(folder: Path, resume: Path | None = None, **options: Any) -> Any:
    ours = callback(BDS())
    settings = {"max_steps": 48, "save_strategy": "steps", "save_steps": 4} | options
    trainer = make_sft(folder, ROWS, model=make_model(), callbacks=[ours], **settings)
    with single_thread():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, ours


def test_a_run_resumed_in_between_goes_on_measuring(tmp_path: Path) -> None:
    resumable(tmp_path / "whole", max_steps=4)
    _, ours = resumable(tmp_path / "again", tmp_path / "whole" / "checkpoint-4")
    assert min(ours.table().column("scored").to_pylist()) >= 1


# a second adapter, and noise on the parameters --------------------------------------------------------------------


def test_a_second_adapter_gives_the_reference(tmp_path: Path) -> None:
    """Losses under the other adapter, once per row; what is trainable and active stays as it was."""
    plain = make_sft(tmp_path / "plain", ROWS, model=make_model(), peft_config=lora(), max_steps=20)
    plain.train()
    plain.model.save_pretrained(tmp_path / "adapter")  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    ours = callback(BDS(evidence="reference", reference="adapter:plain"))
    trainer = make_sft(tmp_path / "aware", ROWS, model=make_model(), peft_config=lora(), callbacks=[ours], max_steps=12)
    model: Any = trainer.model
    model.load_adapter(tmp_path / "adapter", adapter_name="plain")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.active_adapter == "default"
    state: Any = ours.session.state
    row_slots = ours.session.index.row_slots
    assert row_slots is not None
    model.set_adapter("plain")
    model.eval()
    for row, slot in zip(ROWS, row_slots.tolist(), strict=True):
        log_probs = log_probs_of(model, row["input_ids"], row["labels"])
        assert float(state.reference[slot]) == pytest.approx(-sum(log_probs) / len(log_probs), rel=1e-4)
    assert min(ours.table().column("scored").to_pylist()) >= 1


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path) -> None:
    ours = callback(BDS(evidence="reference", reference="adapter:plain"))
    trainer = make_sft(tmp_path, ROWS, model=make_model(), peft_config=lora(), callbacks=[ours])
    with pytest.raises(ModelError, match=r"asks for the adapter 'plain'; the model has \['default'\]"):
        trainer.train()


def test_no_temperature_no_noise(tmp_path: Path) -> None:
    plain = train(make_sft, SFTTrainer, tmp_path / "a", [callback(Fixed())], {})
    cold = train(make_sft, SFTTrainer, tmp_path / "b", [callback(Fixed(), model_temperature=0.0)], {})
    warm = train(make_sft, SFTTrainer, tmp_path / "c", [callback(Fixed(), model_temperature=1.0)], {})
    assert_same_run(plain, cold)
    with pytest.raises(AssertionError):
        assert_same_run(plain, warm)


def test_noise_makes_a_chain_of_the_posterior() -> None:
    """SGD on N rows of a linear model with unit noise: the parameter's spread is that of its Gaussian posterior."""
    rows = 50
    target = torch.linspace(-1, 1, rows)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    draws = []
    for step in range(6000):
        optimizer.zero_grad()
        (0.5 * (parameter - target).square().mean()).backward()
        optimizer.step()
        add_noise(optimizer, 1.0, rows, seed=0, step=step)
        draws.append(float(parameter.detach()))
    kept = torch.tensor(draws[200:])
    assert float(kept.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(kept.var()) == pytest.approx(1 / rows, rel=0.2)  # closed form: N rows of unit precision
    assert add_noise(optimizer, 1.0, rows, seed=0, step=0) is None
