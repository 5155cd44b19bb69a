"""A weight column in the training set: every row gets its own number, however the trainer moves the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from torch.utils.data import IterableDataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from safe_sched import Fixed
from safe_sched.errors import DataError, OptionError, StateError
from safe_sched.rows.keys import keys_of_flat
from safe_sched_hf import Lisa, SafeSchedCallback
from tests.support import (
    COMMON,
    GradientProbe,
    largest_difference,
    make_hf,
    make_model,
    make_sft,
    make_tokenizer,
    single_thread,
    text_rows,
    token_rows,
    uneven_weights,
)

COUNT = 16
WEIGHTS = uneven_weights(COUNT)
TOKENS = [{**row, "weight": weight} for row, weight in zip(token_rows(COUNT, seed=1), WEIGHTS, strict=True)]
TEXTS = [{**row, "weight": weight} for row, weight in zip(text_rows(COUNT, seed=2), WEIGHTS, strict=True)]
PACKED: dict[str, Any] = {"packing": True, "max_length": 24}
BY_COLUMN = Fixed(column="weight")


def key_of(row: dict[str, Any], cut: slice = slice(None)) -> int:
    ids, labels = torch.tensor(row["input_ids"][cut]), torch.tensor(row["labels"][cut])
    return int(keys_of_flat(ids, labels, torch.tensor([ids.numel()]))[0]) % 2**64


def tokens_of(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt and a completion as TRL makes tokens of them, written out."""
    tokenizer = make_tokenizer()
    prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :], "weight": row["weight"]}


def factors(callback: SafeSchedCallback) -> dict[int, float]:
    table = callback.table()
    return dict(zip(table["key"].to_pylist(), table["weight"].to_pylist(), strict=True))


def expected(rows: list[dict[str, Any]], cut: slice = slice(None)) -> dict[int, Any]:
    return {key_of(row, cut): pytest.approx(row["weight"]) for row in rows}


class Seen(SafeSchedCallback):
    """Keeps the factor with which each row of each step was trained on."""

    used: dict[int, float]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.used = getattr(self, "used", {})
        for batch in self.session._batches:
            teaches = batch.slots >= 0
            keys = self.session.index.keys[batch.slots[teaches]].tolist()
            self.used |= {k % 2**64: factor for k, factor in zip(keys, batch.factors[teaches].tolist(), strict=True)}
        super().on_step_end(args, state, control, **kwargs)


def trained(make: Any, folder: Path, rows: Any, scheduler: Any = BY_COLUMN, given: Any = None, **options: Any) -> Seen:
    callback = Seen(scheduler, rows=given, report="none")
    trainer = make(
        folder,
        rows,
        callbacks=[callback],
        **{"num_train_epochs": 1, "max_steps": 4 if make in (stream_hf, stream_sft) else -1} | options,
    )
    with single_thread():
        trainer.train()
    return callback


def streaming(make: Any, folder: Path, rows: Any, **options: Any) -> Any:
    """A trainer on a stream of ``rows``, or on an iterable set that is given as it is."""
    rows = Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=5) if isinstance(rows, list) else rows
    callbacks = options.pop("callbacks")
    settings: dict[str, Any] = COMMON | {"output_dir": str(folder)} | options
    tokenizer = make_tokenizer()
    if make is make_sft:
        args = SFTConfig(**{"bf16": False, "max_length": 64, "loss_type": "nll"} | settings)
        return SFTTrainer(make_model(), args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
    args = TrainingArguments(**settings)
    collator = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(make_model(), args, collator, train_dataset=rows, callbacks=callbacks)


def stream_sft(*args: Any, **options: Any) -> Any:
    return streaming(make_sft, *args, **options)


def stream_hf(*args: Any, **options: Any) -> Any:
    return streaming(make_hf, *args, **options)


# every row gets its own number ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"shuffle_dataset": True}, {"padding_free": True, "max_length": None}], ids=str
)
def test_every_row_of_a_set_is_trained_on_with_the_number_beside_it(options: dict[str, Any], tmp_path: Path) -> None:
    callback = trained(make_sft, tmp_path, TEXTS, **options)
    assert callback.used == factors(callback) == expected([tokens_of(row) for row in TEXTS])


@pytest.mark.parametrize("collator", [None, DataCollatorWithFlattening()], ids=["padded", "flattened"])
def test_so_is_every_row_of_tokens(collator: Any, tmp_path: Path) -> None:
    callback = trained(make_hf, tmp_path, TOKENS, data_collator=collator)
    rows = TOKENS
    if collator is not None:  # which masks the first label of every row
        rows = [{**row, "labels": [-100, *row["labels"][1:]]} for row in TOKENS]
    assert callback.used == factors(callback) == expected(rows)


@pytest.mark.parametrize("more", [{}, {"shuffle_dataset": True}], ids=["as given", "shuffled"])
@pytest.mark.parametrize(("rows", "labels"), [(TEXTS, tokens_of), (TOKENS, dict)], ids=["texts", "tokens"])
def test_so_is_every_packed_row_once_the_rows_are_handed_over(
    rows: Any, labels: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    callback = trained(make_sft, tmp_path, rows, given=Dataset.from_list(rows), **PACKED, **more)
    assert callback.used == factors(callback) == expected([labels(row) for row in rows])


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_so_is_what_packing_leaves_of_a_row_that_is_too_long(strategy: str, tmp_path: Path) -> None:
    callback = trained(make_sft, tmp_path, TOKENS, given=TOKENS, packing=True, max_length=7, packing_strategy=strategy)
    pieces = [slice(0, 7)] if strategy == "bfd" else [slice(0, 7), slice(7, 14)]
    wanted: dict[int, Any] = {}
    for cut in pieces:
        wanted |= expected([row for row in TOKENS if any(label >= 0 for label in row["labels"][cut][1:])], cut)
    assert callback.used == factors(callback) == wanted


@pytest.mark.parametrize(("make", "rows", "labels"), [(stream_sft, TEXTS, tokens_of), (stream_hf, TOKENS, dict)])
def test_so_is_every_row_of_a_stream(make: Any, rows: Any, labels: Any, tmp_path: Path) -> None:
    callback = trained(make, tmp_path, rows)
    assert callback.used == factors(callback) == expected([labels(row) for row in rows])


def test_so_is_every_row_of_a_packed_stream_once_the_rows_are_handed_over(tmp_path: Path) -> None:
    callback = trained(stream_sft, tmp_path, TEXTS, given=TEXTS, **PACKED, per_device_train_batch_size=1)
    wanted = expected([tokens_of(row) for row in TEXTS])
    assert len(callback.used) > 4
    assert all(wanted[key] == factor for key, factor in callback.used.items())


class Ordered(IterableDataset):
    """A stream of torch, in the order of the rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_so_is_every_row_of_a_stream_of_torch(tmp_path: Path) -> None:
    assert trained(stream_hf, tmp_path, Ordered(TOKENS)).used == expected(TOKENS)


def test_the_weights_reach_the_gradients(tmp_path: Path) -> None:
    """The step of a packed set with a weight column is that of the same rows, padded, with weights by key."""
    keys = [key_of(tokens_of(row)) for row in TEXTS]
    gradients = []
    for name, scheduler, given, options in (
        ("packed", BY_COLUMN, TEXTS, {**PACKED, "shuffle_dataset": True}),
        ("padded", Fixed(WEIGHTS, keys=keys), None, {}),
        ("equal", Fixed(), None, {}),
    ):
        probe = GradientProbe()
        callbacks = [SafeSchedCallback(scheduler, rows=given), probe]
        options = {"per_device_train_batch_size": COUNT, "max_grad_norm": 0} | options
        trainer = make_sft(tmp_path / name, TEXTS, callbacks=callbacks, **options)
        with single_thread():
            trainer.train()
        gradients.append(probe.gradients[0])
    assert largest_difference(gradients[0], gradients[1]) < 1e-5
    assert largest_difference(gradients[2], gradients[1]) > 1e-2  # control


def test_the_weight_of_a_hosted_services_file_is_read_from_its_rows(tmp_path: Path) -> None:
    """One JSON object a line, ``messages`` and ``weight`` at the root."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": "w1 " + row["prompt"]},
            ]
        }
        | {"weight": weight}
        for row, weight in zip(TEXTS, [1, 0.5] * 8, strict=True)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    callback = trained(make_sft, tmp_path, list(rows), assistant_only_loss=True, shuffle_dataset=True)
    assert sorted(callback.used.values()) == [0.5] * 8 + [1.0] * 8
    prepared: Any = make_sft(tmp_path, list(rows), assistant_only_loss=True).train_dataset
    assert callback.used == expected(prepared)


def test_a_column_is_read_in_the_user_steps_of_lisa(tmp_path: Path) -> None:
    callback = SafeSchedCallback(BY_COLUMN, parts=[Lisa(0, 4, 0.0)], safety_data=text_rows(4, seed=9))
    trainer = make_sft(tmp_path, TEXTS, callbacks=[callback], optim="sgd")
    trainer.train()
    assert factors(callback) == expected([tokens_of(row) for row in TEXTS])


# resume ---------------------------------------------------------------------------------------------------------------

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("make", [make_hf, stream_hf])
def test_a_resumed_run_gives_every_row_its_number(make: Any, tmp_path: Path) -> None:
    whole = trained(make, tmp_path, TOKENS, **SAVED)
    callback = SafeSchedCallback(BY_COLUMN)
    make(tmp_path, TOKENS, callbacks=[callback], **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert factors(callback) == factors(whole) == expected(TOKENS)


def test_a_resumed_run_with_other_numbers_is_refused(tmp_path: Path) -> None:
    trained(make_hf, tmp_path, TOKENS, **SAVED)
    other = [{**row, "weight": row["weight"] + 1} for row in TOKENS]
    trainer = make_hf(tmp_path, other, callbacks=[SafeSchedCallback(BY_COLUMN)], **SAVED)
    with pytest.raises(StateError, match="columns"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# what cannot be proven is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (PACKED, "packing cuts the rows and moves them"),
        ({"shuffle_dataset": True}, "shuffle_dataset=True moves the rows"),
        ({"max_length": 5}, "16 weights for a training set of .* The trainer may have dropped some"),
    ],
    ids=str,
)
def test_weights_by_position_are_refused_where_rows_move(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match + r".*Fixed\(column=\"weight\"\)"):
        trained(make_sft, tmp_path, TEXTS, Fixed(WEIGHTS), **options)


def test_weights_by_position_are_allowed_where_rows_stay(tmp_path: Path) -> None:
    """The negative control of the law above."""
    assert trained(make_sft, tmp_path / "a", TEXTS, Fixed(WEIGHTS)).used == expected([tokens_of(r) for r in TEXTS])
    assert trained(make_hf, tmp_path / "b", TOKENS, Fixed(WEIGHTS)).used == expected(TOKENS)


def test_weights_by_position_are_refused_where_a_set_was_packed_before(tmp_path: Path) -> None:
    lines: Any = make_sft(tmp_path, TEXTS, **PACKED).train_dataset
    with pytest.raises(DataError, match="packing cuts the rows"):
        trained(make_sft, tmp_path, list(lines), Fixed([1.0] * COUNT), dataset_kwargs={"skip_prepare_dataset": True})


def without(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "weight"} for row in rows]


OTHER = [{**row, "weight": 1.0} for row in text_rows(COUNT, seed=77)]


@pytest.mark.parametrize(
    ("make", "rows", "options", "match"),
    [
        (
            make_sft,
            TEXTS,
            PACKED,
            r"packing dropped the column 'weight'.*SafeSchedCallback\(\.\.\., rows=train_dataset\)",
        ),
        (
            make_sft,
            TEXTS,
            PACKED | {"given": without(TEXTS)},
            "have the columns 'prompt', 'completion', but not 'weight'",
        ),
        (make_sft, TEXTS, PACKED | {"given": OTHER}, "no weight for 16 of 16 .*not those that the trainer trains on"),
        (make_sft, TEXTS, PACKED | {"given": TEXTS, "packing_strategy": "wrapped"}, "'wrapped' cuts rows anywhere"),
        (make_hf, without(TOKENS), {}, "the rows that the trainer holds have no column 'weight': hand over"),
        (stream_hf, without(TOKENS), {}, "the rows that the trainer holds have no column 'weight': hand over"),
        (stream_hf, TOKENS, {"dataloader_num_workers": 1}, "in one process only, with dataloader_num_workers=0"),
    ],
)
def test_a_column_that_is_gone_is_an_error_with_a_remedy(
    make: Any, rows: Any, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=match):
        trained(make, tmp_path, rows, **options)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "row 3 of the training set has no number in the column 'weight'"),
        (-0.5, "row 3 of the training set has -0.5 in"),
        (float("nan"), "row 3 of the training set has (nan|no number) in"),
        (float("inf"), "row 3 of the training set has inf in"),
    ],
)
@pytest.mark.parametrize("way", ["set", "packed", "stream"])
def test_a_row_without_a_weight_is_named(way: str, value: Any, match: str, tmp_path: Path) -> None:
    make = stream_hf if way == "stream" else make_sft
    rows = [{**row, "weight": value if i == 3 else row["weight"]} for i, row in enumerate(TOKENS)]
    options: dict[str, Any] = PACKED | {"given": rows} if way == "packed" else {}
    with pytest.raises(DataError, match=match.replace("training set", "stream") if way == "stream" else match):
        trained(make, tmp_path, Ordered(rows) if way == "stream" else rows, **options)


@pytest.mark.parametrize("value", ["1.0", True, [1.0]], ids=repr)
def test_weights_that_are_no_numbers_are_named(value: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 0 of the training set has .* allowed: a number >= 0"):
        trained(make_hf, tmp_path, [{**row, "weight": value} for row in TOKENS])


@pytest.mark.parametrize("way", ["set", "stream"])
def test_different_weights_for_identical_rows_are_an_error(way: str, tmp_path: Path) -> None:
    rows = [*TOKENS, {**TOKENS[2], "weight": 9.0}]
    make, given = (make_hf, rows) if way == "set" else (stream_hf, Ordered(rows))
    with pytest.raises(DataError, match=r"rows 2 and 16 .*have the same content but weights .* and 9\.0"):
        trained(make, tmp_path, given, max_steps=5)


@pytest.mark.parametrize("options", [{"values": [1.0]}, {"keys": [1]}])
def test_a_column_stands_alone(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="leave values and keys out"):
        Fixed(column="weight", **options)
