"""The safety batch: which rows, from which schema, and what it adds to the gradient."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from safe_sched import Fixed
from safe_sched.errors import DataError
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.safety import SafetySet, are_chats
from tests.hf.test_gradients import CHECKPOINTED, InModelSFT, lora
from tests.support import (
    GradientProbe,
    largest_difference,
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    single_thread,
    token_rows,
)

TOKENIZER = make_tokenizer()
PROMPT, ANSWER = [6, 7, 8], [9, 10, 1]  # "w1 w2 w3", "w4 w5 </s>"


def set_of(rows: Any, **options: Any) -> SafetySet:
    return SafetySet(rows, TOKENIZER, **({"max_length": None, "batch_size": 2, "seed": 0} | options))


@pytest.mark.parametrize(
    ("row", "tokens", "prompt"),
    [
        ({"prompt": "w1 w2 w3", "completion": " w4 w5"}, PROMPT + ANSWER, 3),
        ({"text": "w1 w4"}, [6, 9, 1], 0),
        ({"input_ids": [6, 7, 1], "labels": [-100, 7, 1]}, [6, 7, 1], 1),
        ({"input_ids": [6, 7, 1]}, [6, 7, 1], 0),
        ({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w4"}]}, [3, 6, 4, 9, 1], 3),
        (
            {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w4"}]},
            [3, 6, 4, 9, 1],
            3,
        ),
        ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w4"}]}, [3, 6, 4, 9, 1], 3),
    ],
)
def test_every_schema_gives_the_tokens_and_trains_on_the_answer(row: Any, tokens: list[int], prompt: int) -> None:
    """By hand from the vocabulary of tests/support.py: w0 is 5, u is 3, a is 4, </s> is 1."""
    ((found, labels),) = set_of([row]).rows
    assert found.tolist() == tokens
    assert labels.tolist() == [-100] * prompt + tokens[prompt:]


def test_sources_of_every_kind_give_the_same_rows(tmp_path: Any) -> None:
    rows = [{"text": f"w{i} w{i + 1} w3"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    expected = set_of(rows).fingerprint()
    for source in (tmp_path / "a.jsonl", str(tmp_path / "a.json"), Dataset.from_list(rows), tuple(rows)):
        assert set_of(source).fingerprint() == expected
    assert set_of(rows[:4]).fingerprint() != expected


def test_the_core_set_is_put_into_the_chat_template() -> None:
    tokens, labels = set_of("core", chat=True).rows[0]
    assert tokens[0] == 3  # the template's user mark
    start = int((labels != -100).nonzero()[0])
    assert tokens[start - 1] == 4  # the answer begins right after the assistant mark
    assert labels[start:].equal(tokens[start:])


PLAIN = {"prompt": "w1", "completion": "w4"}
CHAT = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w4"}]}


def test_plain_rows_become_chats_where_the_training_rows_are_chats() -> None:
    """The template's assistant mark is token 4; a row that holds it is a chat."""
    assert are_chats([[3, 6, 4, 9, 1]], TOKENIZER)
    assert are_chats([[3, 6, 4, 9, 1], [3, 6]], TOKENIZER)
    assert not are_chats([[3, 6, 4, 9, 1], [6, 9, 1], [7, 1]], TOKENIZER)
    assert set_of([PLAIN], chat=True).fingerprint() == set_of([CHAT]).fingerprint()
    assert set_of([PLAIN]).fingerprint() != set_of([CHAT]).fingerprint()
    bare = make_tokenizer()
    bare.chat_template = None
    assert not are_chats([[3, 6, 4, 9, 1]], bare)


@pytest.mark.parametrize("row", [PLAIN, CHAT], ids=["plain", "chat"])
def test_the_callback_looks_at_the_training_rows(row: Any, tmp_path: Any) -> None:
    ours = SafeSchedCallback(Fixed(), safety_data=[PLAIN])
    make_sft(tmp_path, [row] * 4, callbacks=[ours]).train()
    assert ours._safety is not None
    assert (4 in ours._safety.rows[0][0].tolist()) == (row is CHAT)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "no rows in it"),
        ([{"question": "w1"}], r"safety row 0 has the fields \['question'\]; allowed: messages"),
        (
            [{"text": "w1 w2"}, {"messages": [{"role": "user", "content": "w1"}]}],
            "safety row 1 .* without an assistant",
        ),
        ([{"input_ids": [5, 6], "labels": [-100, -100]}], "safety row 0 has no answer token"),
        ([{"input_ids": [5]}], "safety row 0 has no answer token"),
        (["w1"], "row 0 is a str"),
        ("nowhere.jsonl", "no file nowhere.jsonl; give a path"),
    ],
)
def test_a_safety_set_that_teaches_nothing_is_an_error(rows: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        set_of(rows)


def test_an_answer_that_max_length_cuts_off_is_an_error() -> None:
    row = {"input_ids": list(range(5, 15)), "labels": [-100] * 6 + list(range(11, 15))}
    assert set_of([row], max_length=7).rows[0][0].numel() == 7
    with pytest.raises(DataError, match="within max_length=6"):
        set_of([row], max_length=6)


def test_text_rows_without_a_tokenizer_are_an_error() -> None:
    with pytest.raises(DataError, match="no tokenizer: give it processing_class"):
        SafetySet([{"text": "w1 w2"}], None, None, 1, 0)


def test_each_row_is_drawn_once_per_round() -> None:
    """Five rows, two a step: ten draws in five steps are every row twice, and a step is a function of its number."""
    safety = set_of([{"input_ids": [5 + i, 20, 21]} for i in range(5)])
    draws = [safety.batch(step)["input_ids"][:, 0].tolist() for step in range(10)]
    flat = [i for draw in draws for i in draw]
    assert all(sorted(flat[5 * r : 5 * r + 5]) == list(range(5, 10)) for r in range(4))
    assert flat[:5] != flat[5:10] or flat[5:10] != flat[10:15]  # shuffled anew
    assert draws[7] == safety.batch(7)["input_ids"][:, 0].tolist()


ROWS = token_rows(16, seed=1)
SAFE = token_rows(6, seed=7)


def explicit_safety_gradient(make: Any, folder: Any, weight: float, **options: Any) -> list[dict[str, torch.Tensor]]:
    """The plain run's gradient plus that of weight * L_safe, written as a loop over single unpadded rows."""
    callback = SafeSchedCallback(Fixed(), safety_data=SAFE, safety_batch_size=3)

    class Oracle(GradientProbe):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            batch = safety.batch(state.global_step)
            for line in range(3):
                kept = batch["attention_mask"][line].bool()
                ids, labels = batch["input_ids"][line, kept][None], batch["labels"][line, kept][None]
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = cross_entropy(logits[0], labels[0, 1:], ignore_index=-100)
                (weight * loss / 3).backward()
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    oracle = Oracle()
    trainer = make(folder, ROWS, model=make_model(), callbacks=[oracle], **options)
    safety = SafetySet(SAFE, None, None, 3, trainer.args.seed)
    assert callback.safety_batch_size == 3
    with single_thread():
        trainer.train()
    return oracle.gradients


STEPS: dict[str, Any] = {"max_grad_norm": 0, "max_steps": 1, "optim": "sgd", "learning_rate": 1e-3}
CASES: dict[str, Any] = {
    "sft": (make_sft, {}),
    "sft, accumulation": (make_sft, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
    "sft, LoRA": (make_sft, {"peft_config": lora()}),
    "sft, checkpointing": (make_sft, CHECKPOINTED),
    "hf": (make_hf, {}),
    "hf, accumulation": (make_hf, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_safety_batch_adds_the_gradient_of_its_mean_row_loss(case: str, tmp_path: Any) -> None:
    make, options = CASES[case]
    options = STEPS | options
    torch.manual_seed(0)
    wanted = explicit_safety_gradient(make, tmp_path, 0.7, **options)
    probe = GradientProbe()
    ours = SafeSchedCallback(Fixed(), safety_data=SAFE, safety_batch_size=3, safety_weight=0.7)
    torch.manual_seed(0)
    trainer = make(tmp_path, ROWS, model=make_model(), callbacks=[ours, probe], **options)
    with single_thread():
        trainer.train()
    assert largest_difference(probe.gradients[0], wanted[0]) < 1e-6
    # negative control: another factor is another gradient
    other = explicit_safety_gradient(make, tmp_path, 0.71, **options)
    assert largest_difference(probe.gradients[0], other[0]) > 1e-4


def test_the_safety_batch_works_where_the_model_computes_its_loss(tmp_path: Any) -> None:
    ours = SafeSchedCallback(Fixed(), safety_data=SAFE)
    trainer = make_sft(tmp_path, ROWS, callbacks=[ours], max_steps=3)
    trainer.__class__ = InModelSFT
    trainer.train()
    assert all("safe_sched/safety_loss" in log for log in trainer.state.log_history[:3])


def test_the_safety_batch_runs_in_training_mode_after_an_evaluation(tmp_path: Any) -> None:
    """Dropout and checkpointing are on in it, as in the trainer's own forwards; evaluation turns them off."""
    model = make_model()
    modes: list[tuple[int, bool]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: modes.append((len(kwargs["input_ids"]), module.training)), with_kwargs=True
    )
    ours = SafeSchedCallback(Fixed(), safety_data=SAFE, safety_batch_size=3)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_sft(tmp_path, ROWS, model=model, callbacks=[ours], eval_rows=ROWS[:2], **options)
    trainer.train()
    assert (2, False) in modes  # evaluation was there
    assert [mode for rows, mode in modes if rows == 3] == [True, True]
