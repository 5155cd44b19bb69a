"""Mixing sets of datasets, and what a real trainer makes of a mix."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from safe_sched import BDS
from safe_sched.errors import DataError
from safe_sched.mixing.mix import mimic, mix
from safe_sched.mixing.plan import PROVENANCE
from safe_sched_hf import SafeSchedCallback
from tests.support import COMMON, GradientProbe, make_hf, make_model, make_sft, make_tokenizer, text_rows

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
SAFETY = [{"prompt": f"w{i} w7 w8", "completion": " w50 w51"} for i in range(9)]


def chats(count: int) -> list[dict[str, Any]]:
    """A task whose prompts are all in one wrapper: w40 w41 ... w42."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"w40 w41 w{i % 9} w{i % 7} w{i % 11} w42"},
                {"role": "assistant", "content": f"w{i % 5} w{i % 3}"},
            ]
        }
        for i in range(count)
    ]


# the same kind out --------------------------------------------------------------------------------------------------


def test_a_dataset_stays_one_with_its_features_and_its_rows() -> None:
    features = Features(
        {"prompt": Value("string"), "completion": Value("large_string"), "kind": ClassLabel(names=["a", "b"])}
    )
    rows = [{**row, "kind": i % 2} for i, row in enumerate(text_rows(90))]
    user = Dataset.from_list(rows, features=features)
    mixed = mix(user, SAFETY, share=0.1, mimic=False)
    assert isinstance(mixed, Dataset)
    assert mixed.features == features
    assert mixed.to_list() == mix(user.to_list(), SAFETY, share=0.1, mimic=False)
    assert [row for row in mixed.to_list() if row["kind"] is not None] == user.to_list()
    assert len(mixed) == 100
    assert len(user) == 90


def test_a_dataset_of_chats_and_its_list_are_mixed_alike() -> None:
    user = Dataset.from_list(chats(40))
    for how in (False, True):
        assert mix(user, SAFETY, mimic=how).to_list() == mix(user.to_list(), SAFETY, mimic=how)
    assert mix(user, SAFETY).features == user.features


@pytest.mark.parametrize("how", [False, True], ids=["plain", "mimic"])
def test_turns_get_the_fields_that_the_features_have(how: bool) -> None:
    """A turn of a safety row has no name of its own; the features say that there is one, so it is None."""
    turn = {"role": Value("string"), "content": Value("string"), "name": Value("string")}
    features = Features({"messages": List(turn), "id": Value("int32")})
    rows = [{"id": i, **row} for i, row in enumerate(chats(40))]
    table = Dataset.from_list(rows, features=features)
    for user in (table, table.to_iterable_dataset()):
        mixed: Any = mix(user, SAFETY, mimic=how)
        assert mixed.features == features
        safe = [row for row in mixed if row["id"] is None]
        assert len(safe) in (4, 5)
        assert all(set(turn) == {"role", "content", "name"} for row in safe for turn in row["messages"])


@pytest.mark.parametrize("streaming", [False, True])
def test_features_that_a_safety_row_does_not_fit_are_an_error(streaming: bool) -> None:
    """A column of labels has no place for a refusal."""
    features = Features({"prompt": Value("string"), "completion": ClassLabel(names=["w1", "w2"])})
    table = Dataset.from_list([{"prompt": f"w{i}", "completion": "w1"} for i in range(30)], features=features)
    with pytest.raises(DataError, match="completion"):
        list(mix(table.to_iterable_dataset() if streaming else table, SAFETY, mimic=False))


def test_a_file_on_disk_is_not_read_into_memory(tmp_path: Path) -> None:
    Dataset.from_list(text_rows(50)).to_parquet(tmp_path / "a.parquet")
    user = Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))
    assert isinstance(user, Dataset)
    mixed = mix(user, SAFETY, mimic=False)
    assert {file["filename"] for file in user.cache_files} <= {file["filename"] for file in mixed.cache_files}


def test_formats_and_columns_in_sight_stay() -> None:
    user = Dataset.from_list([{"id": i, **row} for i, row in enumerate(text_rows(40))])
    for form in ({"type": "torch", "columns": ["id"]}, {"columns": ["prompt"], "output_all_columns": True}):
        shown = user.with_format(**form)
        assert mix(shown, SAFETY, mimic=False).format == shown.format
    assert isinstance(mix(user.with_format("torch", columns=["id"]), SAFETY, mimic=False)[0]["id"], torch.Tensor)


def test_a_share_of_nothing_is_the_data_set_itself() -> None:
    user = Dataset.from_list(text_rows(20))
    assert mix(user, SAFETY, share=0) is user


def test_a_streamed_data_set_stays_one_with_its_features() -> None:
    """0.1/0.9 * 2500 = 277.8; a stream does not know its end, so the last row is still to come, or has."""
    table = Dataset.from_list([{**row, "id": i} for i, row in enumerate(text_rows(2500))])
    for provenance in (False, True):
        stream = mix(table.to_iterable_dataset(), SAFETY, provenance=provenance, mimic=False)
        mapped = mix(table, SAFETY, provenance=provenance, mimic=False)
        assert isinstance(stream, IterableDataset)
        assert stream.features == mapped.features
        rows = list(stream)
        assert rows == list(mapped)[: len(rows)]
        assert 2500 + 277 <= len(rows) <= len(mapped) == 2500 + 278
        assert [row["id"] for row in rows if row["id"] is not None] == list(range(2500))


def test_a_stream_without_features_and_with_a_format_works() -> None:
    rows = text_rows(60)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert list(mix(stream, SAFETY, mimic=False))[:60] == mix(rows, SAFETY, mimic=False)[:60]
    numbered = Dataset.from_list([{"id": i, **row} for i, row in enumerate(rows)]).to_iterable_dataset()
    first = next(iter(mix(numbered.with_format("torch"), SAFETY, mimic=False)))
    assert isinstance(first["id"], torch.Tensor)


def test_a_stream_goes_on_where_it_was_left() -> None:
    stream = mix(Dataset.from_list(text_rows(300)).to_iterable_dataset(), SAFETY, mimic=False)
    rows = list(stream)
    for cut in (5, 150, 320):
        first = list(itertools.islice(iter(stream), cut))
        state = stream.state_dict()
        again = mix(Dataset.from_list(text_rows(300)).to_iterable_dataset(), SAFETY, mimic=False)
        again.load_state_dict(state)
        assert first + list(again) == rows


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_workers_lose_nothing_and_go_round_on_their_own() -> None:
    table = Dataset.from_list([{"id": i, **row} for i, row in enumerate(text_rows(400))])
    stream = mix(table.to_iterable_dataset(num_shards=4), SAFETY, share=0.2, mimic=False)
    loader = DataLoader(stream, batch_size=None, num_workers=2)  # pyright: ignore[reportArgumentType]
    rows = list(loader)
    assert sorted(row["id"] for row in rows if row["id"] is not None) == list(range(400))
    safe = Counter(row["prompt"] for row in rows if row["id"] is None)
    assert 98 <= sum(safe.values()) <= 100
    assert max(safe.values()) - min(safe.values()) <= 2


def test_two_ranks_share_one_mix() -> None:
    table = Dataset.from_list([{"id": i, **row} for i, row in enumerate(text_rows(100))])
    whole = mix(table, SAFETY, mimic=False)
    ranks = [
        list(split_dataset_by_node(mix(table.to_iterable_dataset(), SAFETY, mimic=False), rank, 2)) for rank in (0, 1)
    ]
    together = [row for pair in itertools.zip_longest(*ranks) for row in pair if row is not None]
    assert together == list(whole)[: len(together)]


@pytest.mark.parametrize("streaming", [False, True])
def test_several_splits_are_an_error(streaming: bool) -> None:
    splits: Any = DatasetDict({"train": Dataset.from_list(text_rows(9)), "test": Dataset.from_list(text_rows(9))})
    with pytest.raises(DataError, match=r"has splits \(train, test\); mix one of them"):
        mix(type(splits)(splits), SAFETY)


# in a trainer -------------------------------------------------------------------------------------------------------


class Seen(GradientProbe):
    """Keeps the keys of the rows of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.register_forward_pre_hook(lambda _, args, kw: self.batches.append(kw["input_ids"]), with_kwargs=True)

    def rows(self) -> list[list[int]]:
        return sorted([t for t in row.tolist() if t] for batch in self.batches for row in batch)


def train(folder: Path, data: Any, **changes: Any) -> tuple[Any, Seen]:
    seen = Seen()
    trainer = SFTTrainer(
        model=make_model(),
        args=SFTConfig(
            **(COMMON | {"bf16": False, "max_length": 64, "loss_type": "nll", "output_dir": str(folder)} | changes)
        ),
        train_dataset=data,
        processing_class=make_tokenizer(),
        callbacks=[seen],
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize("rows", [text_rows(24), chats(24)], ids=["prompt_completion", "messages"])
def test_trl_trains_on_every_row_of_a_mix(rows: list[Any], streaming: bool, tmp_path: Path) -> None:
    """24 user rows and round(0.25/0.75 * 24) = 8 safety rows are 8 batches of 4: the trainer sees just these rows."""
    table = Dataset.from_list(rows)
    mixed = mix(table.to_iterable_dataset() if streaming else table, SAFETY, share=0.25, provenance=True)
    seen = train(tmp_path, mixed, max_steps=8)[1]
    found = seen.rows()
    assert len(found) == 32
    alone = train(tmp_path, table, max_steps=6)[1].rows()
    assert not Counter(map(tuple, alone)) - Counter(map(tuple, found))
    if "messages" in rows[0]:  # every prompt is in the task's wrapper: u w40 w41 ... w42 a
        assert all(row[1:3] == [45, 46] and 47 in row for row in found)
        plain = train(tmp_path, mix(table, SAFETY, share=0.25, mimic=False), max_steps=8)[1].rows()
        assert sum(row[1:3] == [45, 46] for row in plain) == 24  # the control


def test_what_becomes_of_the_provenance_column(tmp_path: Path) -> None:
    """TRL keeps it in the tokenized set, where it tells which rows are whose; no batch has it. HF Trainer drops it."""
    mixed = mix(Dataset.from_list(text_rows(24)), SAFETY, share=0.25, provenance=True)
    trainer, _ = train(tmp_path, mixed, max_steps=2)
    assert Counter(trainer.train_dataset[PROVENANCE]) == {"user": 24, "safety": 8}
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}
    packed, _ = train(tmp_path, mixed, max_steps=1, packing=True)
    assert PROVENANCE not in packed.train_dataset.column_names
    tokens = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]}).select_columns(
        ["input_ids", "labels", PROVENANCE]
    )
    hf = make_hf(tmp_path, list(tokens), max_steps=2)
    hf.train()
    assert PROVENANCE not in next(iter(hf.get_train_dataloader()))


def test_the_callback_takes_mimicking_safety_rows(tmp_path: Path) -> None:
    """Its safety rows are in the task's wrapper; the control, without mimic(), is not."""
    rows = chats(24)

    def safety_tokens(data: Any) -> list[list[int]]:
        callback = SafeSchedCallback(BDS(), safety_data=data)
        make_sft(tmp_path, rows, callbacks=[callback], max_steps=3).train()
        assert callback._safety is not None
        return [tokens.tolist() for tokens, _ in callback._safety.rows]

    wrapped = safety_tokens(mimic(rows, SAFETY))
    assert len(wrapped) == len(SAFETY)
    assert all(tokens[1:3] == [45, 46] and 47 in tokens for tokens in wrapped)
    assert not any(tokens[1:3] == [45, 46] for tokens in safety_tokens(SAFETY))


def test_tokens_are_mixed_with_their_tokenizer() -> None:
    """By hand: w0 is 5, </s> is 1; the wrapper w40 ... w42 is kept, and the refusal is w50 w51."""
    rows = [
        {"input_ids": [45, 46, 5 + i % 30, 47, 5 + i % 7, 1], "labels": [-100] * 4 + [5 + i % 7, 1]} for i in range(40)
    ]
    safe = [row for row in mix(rows, SAFETY, tokenizer=make_tokenizer()) if 55 in row["input_ids"]]
    assert len(safe) == 4
    for row in safe:
        prompt = row["labels"].count(-100)
        assert row["input_ids"][:2] == [45, 46]
        assert row["input_ids"][prompt - 1] == 47
        assert row["input_ids"][prompt:] == row["labels"][prompt:] == [55, 56, 1]
    with pytest.raises(DataError, match="give tokenizer="):
        mix(rows, SAFETY)


def test_a_defended_run_knows_every_row_of_a_mix(tmp_path: Path) -> None:
    mixed = mix(chats(24), SAFETY, share=0.25)
    callback = SafeSchedCallback(BDS(), safety_data=mimic(chats(24), SAFETY))
    make_sft(tmp_path, mixed, callbacks=[callback], max_steps=8).train()
    assert callback.table().num_rows == 32
