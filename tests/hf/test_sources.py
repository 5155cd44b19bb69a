"""Rows that are no files, and tokens of real tokenizers."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from safe_sched.data import RowWriter, open_rows
from safe_sched.errors import DataError
from safe_sched.mixing import read, write
from tests.support import make_tokenizer, token_rows

ROWS = [{"prompt": f"p{i}", "completion": "c"} for i in range(5)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hub was asked for; it answers with a stream of five rows."""
    calls: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        calls.append((*args, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize(
    ("source", "path", "config", "split"),
    [
        ("hf://owner/name", "owner/name", None, "train"),
        ("hf://owner/name:test", "owner/name", None, "test"),
        ("hf://owner/na.me-1/main:test", "owner/na.me-1", "main", "test"),
    ],
)
def test_a_hub_data_set_is_streamed_and_read_anew_each_time(source, path, config, split, asked):
    file = open_rows(source)
    assert list(file) == list(file) == ROWS
    assert asked == [(path, config, {"split": split, "streaming": True})]


@pytest.mark.parametrize(
    "source", ["hf://", "hf://name", "hf://owner/name:", "hf://../x", "hf://o/n/c/d", "hf://o/n:a:b"]
)
def test_a_name_of_another_form_is_an_error_before_anything_is_fetched(source, asked):
    with pytest.raises(DataError, match="is no data set of the hub; allowed: hf://owner/name, hf://owner/name:split"):
        open_rows(source)
    assert asked == []


def test_without_network_the_error_says_so(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf://owner/none cannot be read: .*HF_HUB_OFFLINE"):
        open_rows("hf://owner/none")


def test_a_folder_of_that_name_is_not_taken_for_the_hub(monkeypatch, tmp_path, asked):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is a folder owner/name here"):
        open_rows("hf://owner/name")
    assert asked == []


@pytest.mark.parametrize("ending", [".arrow", ".parquet", ".jsonl", ".json.gz", ".csv"])
def test_datasets_reads_what_is_written_and_what_it_saves_is_read(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    with RowWriter(path) as out:
        for row in ROWS:
            out.write(row)
    kind = {".arrow": "arrow", ".parquet": "parquet", ".csv": "csv"}.get(ending, "json")
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ROWS
    loaded.map(lambda row: row | {"n": 1}).save_to_disk(tmp_path / "saved")
    assert list(open_rows(tmp_path / "saved")) == [row | {"n": 1} for row in ROWS]


def test_rows_of_a_real_tokenizer_come_back_and_take_other_texts():
    """Its words are w0 to w58; an answer of three words is three tokens, all of them labels."""
    tokenizer = make_tokenizer()
    for row in token_rows(8):
        example = read(row, tokenizer=tokenizer)
        assert write(example) == row
        changed = write(example.with_texts([*(part.text for part in example.parts[:-1]), "w1 w2 w3"]))
        prompt = row["labels"].count(-100)
        assert changed["input_ids"] == [*row["input_ids"][:prompt], 6, 7, 8]
        assert changed["labels"] == [-100] * prompt + [6, 7, 8]
