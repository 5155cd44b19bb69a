"""The overhead bench goes through all of its code; its quick numbers mean nothing. Its arms do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig

from bench import overhead, turns
from safe_sched.estimators.refusal_odds import branches_of, openings_of

ROOT = Path(__file__).parents[2]
SMALL = turns.Sizes(hidden=32, layers=1, vocabulary=200, sequence=16, batch=4)


@pytest.mark.slow
@pytest.mark.slow_sample
def test_the_bench_measures_every_section_and_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "overhead.md"
    command = [sys.executable, "bench/overhead.py", "--quick", "--out", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, capture_output=True)
    text = page.read_text(encoding="utf-8")
    sections = ("Training time", "Peak memory", "The probe", "Antibody", "The scheduler's update")
    for section in (*sections, "The start of training"):
        assert f"## {section}" in text
    for number in turns.ANTIBODY:
        arm = turns.ARMS[number]
        assert f"\n| {arm.name} | 2 | " in text
        assert f"\n- {arm.name}: {arm.what}." in text
    assert "the numbers mean nothing" in text


def test_a_section_can_be_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    page = tmp_path / "overhead.md"
    overhead.main(["--quick", "--only", "start", "--out", str(page)])
    headings = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert headings == ["## The start of training"]


class Forwards(TrainerCallback):
    """Counts the forwards of every step: without gradient, and with."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([0, 0])

    def count(self, *_: Any) -> None:
        self.steps[-1][torch.is_grad_enabled()] += 1


def train(arm: turns.Arm, folder: Path, steps: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Forwards of every step, and the parameters afterwards."""
    counter = Forwards()
    trainer = arm.trainer(
        model=turns.build_model(SMALL),
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            max_length=2 * SMALL.sequence,
            per_device_train_batch_size=SMALL.batch,
            max_steps=steps,
            learning_rate=1e-3,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=turns.token_table(
            2 * SMALL.batch if arm.few else steps * SMALL.batch, SMALL.sequence, SMALL.vocabulary, prompt=8
        ),
        processing_class=turns.word_tokenizer(SMALL.vocabulary),
        callbacks=[counter, *([arm.callback(SMALL)] if arm.callback else [])],
    )
    model: Any = trainer.model
    model.model.register_forward_hook(counter.count)
    trainer.train()
    return counter.steps, [parameter.detach().clone() for parameter in model.parameters()]


EXPECTED = {
    "plain, rows with prompts": ([0, 1], [0, 1]),
    "released step": ([2, 1], [2, 1]),
    "published rule": ([1, 1], [1, 1]),
    "every row read": ([1, 1], [1, 1]),
    "first token": ([0, 1], [0, 1]),
    "all rows read": ([1, 1], [0, 1]),
}
"""Forwards without gradient and with, in the second and the third step: of the small set, the second epoch's first."""


@pytest.mark.parametrize("number", turns.ANTIBODY)
def test_every_arm_of_antibody_takes_its_forwards(number: int, tmp_path: Path) -> None:
    arm = turns.ARMS[number]
    steps, _ = train(arm, tmp_path, 3)
    assert tuple(steps[1:]) == EXPECTED[arm.name]


def test_the_released_step_and_the_published_rule_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one refusal for all rows both have the same weights, and so the same gradients; plain has others."""
    one = turns.refusal_tokens(SMALL.vocabulary)[:1]
    monkeypatch.setattr(turns, "refusal_tokens", lambda _: one)
    plain, released, published = (train(turns.ARMS[number], tmp_path, 6)[1] for number in turns.ANTIBODY[:3])
    for mine, theirs in zip(published, released, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    apart = max(float((a - b).abs().max()) for a, b in zip(plain, released, strict=True))
    assert apart > 1e-4


def test_refusals_open_in_sixteen_ways_as_the_tokenizer_reads_them() -> None:
    tokens = turns.refusal_tokens(SMALL.vocabulary)
    openings = openings_of(tokens)
    assert len(openings) == 16
    assert branches_of(openings).tokens.numel() == 21
    tokenizer: Any = turns.word_tokenizer(SMALL.vocabulary)
    text = "Hello" + "".join(f" w{token}" for token in tokens[0][:-1]) + tokenizer.eos_token
    assert tokenizer(text)["input_ids"][1:] == tokens[0]
