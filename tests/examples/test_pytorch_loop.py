"""A plain PyTorch loop is defended as a trainer is: the same gradients, and a resume bit for bit."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.pytorch_loop import aligned_model, micro_batch, row
from safe_sched import BDS, Antibody, Fixed
from safe_sched.scheduler import Scheduler
from safe_sched.training.checkpoint import load_state
from safe_sched.training.loop import TrainingLoop
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.safety import SafetyBatch, SafetySet
from tests.support import GradientProbe, largest_difference, make_hf, make_tokenizer, single_thread

SCRIPT = Path(__file__).parents[2] / "examples" / "pytorch_loop.py"
DRAW = torch.Generator().manual_seed(0)
ROWS = [row(DRAW, harmful=i % 4 == 0) for i in range(16)]
SAFETY = [row(DRAW, harmful=True, refused=True) for _ in range(8)]
STEPS, ACCUMULATION, SIZE, RATE = 3, 2, 2, 1e-3
WEIGHTS = [0.25 * (i % 7) for i in range(len(ROWS))]
SCHEDULERS: dict[str, Any] = {
    "fixed": lambda: Fixed(WEIGHTS),
    "bds": lambda: BDS(prior_share=0.3),
    "antibody": lambda: Antibody(on_inversion="ignore"),
    "antibody, all rows first": lambda: Antibody(on_inversion="ignore", anchor="start"),
}


def safety_set() -> SafetySet:
    return SafetySet(SAFETY, make_tokenizer(), None, batch_size=2, seed=3)


def in_a_trainer(folder: Path, scheduler: Scheduler[Any], normalizer: Any) -> tuple[list[dict[str, Tensor]], Any]:
    """Gradients of three optimiser steps in transformers' Trainer, rows in their order, and the final state."""
    probe = GradientProbe()
    ours = SafeSchedCallback(scheduler, safety_data=SAFETY, safety_batch_size=2, normalizer=normalizer)
    trainer = make_hf(
        folder,
        ROWS,
        model=aligned_model(safety_set()),
        callbacks=[ours, probe],
        optim="sgd",
        learning_rate=RATE,
        max_grad_norm=0,
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    return probe.gradients, ours.session.state.tensors()


def in_a_plain_loop(scheduler: Scheduler[Any], normalizer: Any = "token") -> tuple[list[dict[str, Tensor]], Any]:
    """The same steps with `TrainingLoop`; like the trainer's, the loss is the mean over the label tokens of a step."""
    model = aligned_model(safety_set())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    batches = [micro_batch(ROWS[i : i + SIZE]) for i in range(0, len(ROWS), SIZE)]
    loop = TrainingLoop(
        model,
        scheduler,
        batches,
        optimizer,
        parts=[SafetyBatch()],
        safety=safety_set(),
        mean="step",
        normalizer=normalizer,
        seed=3,
    )
    found = []
    model.train()
    for step in range(STEPS):
        some = batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in some)
        with loop.step(some):
            for batch in some:
                with loop.forward(batch):
                    loss = model(**batch, num_items_in_batch=torch.tensor(tokens)).loss
                loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
    loop.close()
    return found, loop.session.state.tensors()


@pytest.mark.parametrize("normalizer", ["token", "row"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plain_loop_has_the_gradients_of_a_trainer(name: str, normalizer: str, tmp_path: Path) -> None:
    """Control: with weights of 1 they are others."""
    with single_thread():
        wanted, wanted_state = in_a_trainer(tmp_path, SCHEDULERS[name](), normalizer)
        found, state = in_a_plain_loop(SCHEDULERS[name](), normalizer)
        plain, _ = in_a_plain_loop(Fixed(), normalizer)
    assert len(found) == len(wanted) == STEPS
    assert max(largest_difference(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-6
    assert max(largest_difference(a, b) for a, b in zip(plain, wanted, strict=True)) > 1e-3
    assert state.keys() == wanted_state.keys()
    for field, value in state.items():
        torch.testing.assert_close(value, wanted_state[field], rtol=1e-5, atol=1e-6, equal_nan=True)


def example(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pytorch_loop.py", *words])
    with single_thread():
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("method", ["bds", "antibody"])
def test_the_example_finds_harmful_rows_and_resumes_bit_for_bit(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 steps, saved at 5. The other run is saved there too: a save lets go of what is not in it."""
    said = ["--method", method]
    example(monkeypatch, *said, "--steps", "5", "--out", str(tmp_path / "one"))
    example(monkeypatch, *said, "--steps", "10", "--out", str(tmp_path / "one"), "--resume")
    resumed = capsys.readouterr().out.splitlines()
    example(monkeypatch, *said, "--steps", "10", "--save-every", "5", "--out", str(tmp_path / "two"))
    straight = capsys.readouterr().out.splitlines()
    assert [line for line in resumed if line.startswith("step ")] == [
        line for line in straight if line.startswith("step ")
    ]
    one, two = (load_state(tmp_path / run / "safe_sched.safetensors")[0] for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    models = [torch.load(tmp_path / run / "model.pt", weights_only=True)["model"] for run in ("one", "two")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    found = re.fullmatch(r"mean weight of harmful rows (\S+), of the others (\S+)", straight[-1])
    assert found is not None
    assert float(found[1]) < float(found[2]) - 0.2
