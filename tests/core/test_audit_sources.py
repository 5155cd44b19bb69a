"""What a trainer's own file names is what is audited: those rows and texts; nothing else is fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from safe_sched import hooks
from safe_sched.audit.rows import audit_row
from safe_sched.data import KINDS, BadRow, RowWriter, open_rows
from safe_sched.data.named_sources import sources_of
from safe_sched.data.schemas import renamed
from safe_sched.data.sources import DataSource
from safe_sched.data.trainer_files import MAX_BYTES, MAX_KEYS
from safe_sched.data.trainer_files.axolotl import TYPES
from safe_sched.errors import DataError, OptionError, SafeSchedError
from tests.core.batches import laws

yaml = pytest.importorskip("yaml")


def lines(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(keys))
    return path


def texts(sources: list[DataSource]) -> list[tuple[str, str, str]]:
    """System, prompt and answer of every row, as the audit takes them."""
    found = []
    for source in sources:
        for entry in source.rows():
            assert not isinstance(entry, BadRow)
            row = audit_row(source.laid_out(entry[1]), schema=source.schema)
            found.append((row.system, row.prompt, row.answer))
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for."""
    calls: list[str] = []

    def answer(source: str) -> Any:
        calls.append(source)
        return [{"instruction": "I", "output": "O"}]

    monkeypatch.setattr(hooks, "open_source", answer)
    return calls


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# places -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("ending", list(KINDS))
def test_every_row_is_named_by_where_it_stands(ending: str, packed: str, here: Path) -> None:
    """Text files: the line that an editor shows. Columnar files: the number of the row, counted from 1."""
    name = f"r{ending}{packed}"
    with RowWriter(here / name) as out:
        for number in range(600):  # more than one batch
            out.write({"text": f"row {number}"})
    (source,) = sources_of([name])
    first = {"jsonl": "line 1", "csv": "line 2", "tsv": "line 2", "json": "line 2"}.get(KINDS[ending], "row 1")
    unit, offset = first.split()
    found = [(where, row["text"]) for where, row in source.rows()]  # pyright: ignore[reportGeneralTypeIssues]
    assert found == [(f"{name}, {unit} {int(offset) + number}", f"row {number}") for number in range(600)]


def test_blank_and_bad_lines_count_as_lines_and_bad_ones_are_given_in_their_place(here: Path) -> None:
    (here / "r.jsonl").write_text('{"text": "a"}\n\nnonsense\n{"text": "b"}\n')
    (source,) = sources_of(["r.jsonl"])
    one, bad, two = source.rows()
    assert (one, two) == (("r.jsonl, line 1", {"text": "a"}), ("r.jsonl, line 4", {"text": "b"}))
    assert isinstance(bad, BadRow)
    assert bad.line == 3
    (here / "r.csv").write_text('text,n\n"two\nlines",1\nb\nc,2\n')
    (source,) = sources_of(["r.csv"])
    assert [found.line if isinstance(found, BadRow) else found[0] for found in source.rows()] == [
        "r.csv, line 2",
        4,
        "r.csv, line 5",
    ]


def test_all_bad_lines_are_given_however_many(here: Path) -> None:
    (here / "r.jsonl").write_text("x\n" * 500 + '{"text": "a"}\n')
    (source,) = sources_of(["r.jsonl"])
    for _ in range(2):  # anew at every call
        assert [isinstance(found, BadRow) for found in source.rows()] == [True] * 500 + [False]


def test_what_is_not_there_is_an_error_before_anything_is_read(here: Path) -> None:
    lines(here / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="no file or folder b.jsonl"):
        sources_of(["a.jsonl", "b.jsonl"])
    with pytest.raises(DataError, match="nothing to audit"):
        sources_of([])
    with pytest.raises(DataError, match="named twice"):
        sources_of(["-", "-"])


# Axolotl ------------------------------------------------------------------------------------------------------------

CHAT = [("", "Hi\n\nHello\n\nBye?", "See you")]
CHAT_ROW = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye?"), ("assistant", "See you")]


def chat(who: str = "role", what: str = "content", **names: str) -> list[dict[str, str]]:
    return [{who: names.get(role, role), what: text} for role, text in CHAT_ROW]


@pytest.mark.parametrize(
    ("entry", "row", "expected"),
    [
        ({"type": "alpaca"}, {"instruction": "I", "input": "in", "output": "O"}, ("", "I\n\nin", "O")),
        ({"type": "alpaca:chat"}, {"instruction": "I", "output": "O"}, ("", "I", "O")),
        # Axolotl's alpaca does not look at a system column, alpaca_w_system does
        ({"type": "alpaca"}, {"instruction": "I", "output": "O", "system": "S"}, ("", "I", "O")),
        ({"type": "alpaca_w_system.load_chat"}, {"instruction": "I", "output": "O", "system": "S"}, ("S", "I", "O")),
        (
            {"type": "alpaca_w_system.load_open_orca"},
            {"system_prompt": "S", "question": "Q", "response": "A"},
            ("S", "Q", "A"),
        ),
        ({"type": "alpaca_chat.load_qa"}, {"question": "Q", "answer": "A"}, ("", "Q", "A")),
        ({"type": "gpteacher"}, {"instruction": "I", "input": "in", "response": "R"}, ("", "I\n\nin", "R")),
        ({"type": "oasst"}, {"INSTRUCTION": "I", "RESPONSE": "R"}, ("", "I", "R")),
        ({"type": "summarizetldr"}, {"article": "A", "summary": "S"}, ("", "A", "S")),
        ({"type": "context_qa"}, {"article": "A", "question": "Q", "answer": "R"}, ("", "A\n\nQ", "R")),
        ({"type": "completion"}, {"text": "T", "body": "B"}, ("", "T", "")),
        ({"type": "completion", "field": "body"}, {"text": "T", "body": "B"}, ("", "B", "")),
        (
            {"type": "input_output"},
            {"segments": [{"label": False, "text": "<s>Q"}, {"label": True, "text": "A</s>"}]},
            ("", "<s>Q", "A</s>"),
        ),
        ({"type": "chat_template"}, {"messages": chat()}, CHAT[0]),
        ({"type": "chat_template"}, {"messages": json.dumps(chat())}, CHAT[0]),
        (
            {
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
            {"conversations": chat("from", "value", user="human", assistant="gpt"), "messages": [{"not": "read"}]},
            CHAT[0],
        ),
        (
            {"type": "chat_template", "message_field_role": "who", "message_field_content": "says"},
            {"messages": chat("who", "says"), "system": "S"},
            ("S", *CHAT[0][1:]),
        ),
        (
            {"type": "chat_template", "roles": {"assistant": ["bot"], "user": ["me", "user"]}},
            {"messages": chat(user="me", assistant="bot")},
            CHAT[0],
        ),
        (
            {"type": "chat_template"},
            {"messages": [{"role": "system", "content": "first"}, *chat()], "system": "not read"},
            ("first", *CHAT[0][1:]),
        ),
        (
            {"type": "chat_template", "drop_system_message": True},
            {"messages": [{"role": "system", "content": "first"}, *chat()], "system": "S"},
            CHAT[0],
        ),
        ({"type": "sharegpt"}, {"conversations": chat("from", "value", user="human", assistant="gpt")}, CHAT[0]),
        (
            {"type": "sharegpt", "field_model": "bot"},
            {"conversations": chat("from", "value", assistant="bot")},
            CHAT[0],
        ),
        (
            {"type": {"field_instruction": "q", "field_output": "a", "field_system": "s", "format": "[{instruction}]"}},
            {"q": "Q", "a": "A", "s": "S", "instruction": "not read"},
            ("S", "Q", "A"),
        ),
        (
            {"type": {"field_instruction": "q", "field_output": "a", "system_prompt": "constant"}},
            {"q": "Q", "a": "A"},
            ("constant", "Q", "A"),
        ),
        ({}, {"prompt": "P", "completion": "C"}, ("", "P", "C")),  # no type: the schema of the rows themselves
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) and ("type" in value or not value) else "",
)
def test_the_texts_of_an_axolotl_data_set_are_those_that_axolotl_reads(
    entry: Any, row: Any, expected: Any, here: Path
) -> None:
    """Expected values: Axolotl 0.19's prompt strategies, read."""
    lines(here / "a.jsonl", row)
    assert texts(sources_of([config(here / "c.yml", datasets=[{"path": "a.jsonl", **entry}])])) == [expected]


def test_the_row_itself_is_given_too_with_all_its_columns(here: Path) -> None:
    row = {"q": "Q", "a": "A", "id": 7, "safe": None}
    lines(here / "a.jsonl", row)
    entry = {"path": "a.jsonl", "type": {"field_instruction": "q", "field_output": "a"}}
    (source,) = sources_of([config(here / "c.yaml", datasets=[entry])])
    assert list(source.rows()) == [("a.jsonl, line 1", row)]


def test_every_data_set_is_read_in_order_and_test_sets_only_where_asked(here: Path) -> None:
    for name in ("a", "b", "t"):
        lines(here / "data" / f"{name}.jsonl", {"instruction": name, "output": "O"})
    lines(here / "p.jsonl", {"body": "p"})
    path = config(
        here / "c.yml",
        base_model="m",
        datasets=[{"path": "data/a.jsonl", "type": "alpaca"}, {"path": "data/b.jsonl", "type": "alpaca"}],
        pretraining_dataset=[{"path": "p.jsonl", "text_column": "body"}],
        test_datasets=[{"path": "data/t.jsonl", "type": "alpaca", "split": "train"}],
    )
    assert [prompt for _, prompt, _ in texts(sources_of([path]))] == ["a", "b", "p"]
    assert [prompt for _, prompt, _ in texts(sources_of([path], test=True))] == ["a", "b", "p", "t"]
    assert sources_of([path])[0].name == f"{path}, datasets.0 (data/a.jsonl)"


def test_names_begin_in_the_working_folder_or_else_beside_the_yaml(here: Path) -> None:
    (here / "configs").mkdir()
    path = config(here / "configs" / "c.yml", datasets=[{"path": "a.jsonl", "type": "completion"}])
    lines(here / "configs" / "a.jsonl", {"text": "beside"})
    assert texts(sources_of([path]))[0][1] == "beside"
    lines(here / "a.jsonl", {"text": "here"})
    assert texts(sources_of([path]))[0][1] == "here"


def test_a_file_called_json_may_be_one_list_or_one_object_a_line(here: Path) -> None:
    """The loader that both trainers use reads either."""
    rows = [{"text": "a"}, {"text": "b"}]
    lines(here / "lines.json", *rows)
    (here / "list.json").write_text("\ufeff " + json.dumps(rows, indent=1), encoding="utf-8")
    lines(here / "odd.data", *rows)
    for entry in ({"path": "lines.json"}, {"path": "list.json"}, {"path": "odd.data", "ds_type": "json"}):
        path = config(here / "c.yml", datasets=[entry | {"type": "completion"}])
        assert [prompt for _, prompt, _ in texts(sources_of([path]))] == ["a", "b"]


def test_data_files_may_be_patterns_and_splits_are_told_by_names(here: Path) -> None:
    for name in ("train-0", "train-1", "test"):
        lines(here / "d" / f"{name}.jsonl", {"text": name})

    def found(**entry: Any) -> list[str]:
        path = config(here / "c.yml", datasets=[entry | {"type": "completion"}])
        return [prompt for _, prompt, _ in texts(sources_of([path]))]

    assert found(path="d") == ["test", "train-0", "train-1"]
    assert found(path="d", split="train") == ["train-0", "train-1"]
    assert found(path="d", split="test") == ["test"]
    assert found(path="json", data_files="d/train-*.jsonl") == ["train-0", "train-1"]
    assert found(path="d", ds_type="json", data_files=["test.jsonl", "d/train-0.jsonl"]) == ["test", "train-0"]


def test_a_hub_data_set_that_the_yaml_names_is_asked_for_with_config_and_split(here: Path, asked: list[str]) -> None:
    entry = {"path": "owner/set", "name": ["one", "two"], "split": "train_sft", "type": "alpaca"}
    assert texts(sources_of([config(here / "c.yml", datasets=[entry])])) == [("", "I", "O")] * 2
    assert asked == ["hf://owner/set/one:train_sft", "hf://owner/set/two:train_sft"]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"datasets": [{"path": "a.jsonl", "type": "alpacca"}]}, r"datasets\.0: unknown type 'alpacca' .*'alpaca'"),
        ({"datasets": [{"path": "a.jsonl", "type": "my.own.module"}]}, "unknown type 'my.own.module'; allowed"),
        (
            {"datasets": [{"path": "a.jsonl", "type": "chat_template", "field_mesages": "x"}]},
            "did you mean 'field_mess",
        ),
        ({"datasets": [{"path": "a.jsonl", "type": {"field_instuction": "x"}}]}, "did you mean 'field_instruction'"),
        ({"datasets": [{"path": "a.jsonl", "type": 3}]}, "type is a int"),
        ({"datasets": [{"path": "b.jsonl", "type": "alpaca"}]}, "no file or folder b.jsonl"),
        ({"datasets": [{"path": "dir/b.jsonl", "type": "alpaca"}]}, "no file or folder dir/b.jsonl"),  # no hub id
        ({"datasets": [{"path": "s3://bucket/a.jsonl", "type": "alpaca"}]}, "s3://bucket/a.jsonl cannot be read"),
        ({"datasets": [{"path": "https://x/a.jsonl", "type": "alpaca"}]}, "https://x/a.jsonl cannot be read"),
        ({"datasets": [{"path": "a.jsonl", "type": "alpaca", "split": "train[:5%]"}]}, "takes a part of the rows"),
        ({"datasets": [{"path": "a.jsonl", "type": "alpaca", "split": "test"}]}, "one file, which has no split 'test'"),
        ({"datasets": [{"path": "a.jsonl", "type": "alpaca", "shards": 4}]}, "shards picks"),
        ({"datasets": [{"path": "a/b", "type": "alpaca", "revision": "main"}]}, "revision picks"),
        ({"datasets": [{"path": "a/b", "type": "alpaca", "data_files": "x.jsonl"}]}, "data_files of the hub"),
        ({"datasets": [{"path": "json", "type": "alpaca", "data_files": "*.none"}]}, r"no file \*\.none"),
        ({"datasets": [{"path": "a.jsonl", "ds_type": "text", "type": "completion"}]}, "unknown ds_type 'text'"),
        ({"datasets": [{"path": ["a.jsonl"], "type": "alpaca"}]}, "path is a list"),
        ({"datasets": [{"type": "alpaca"}]}, "it has no path"),
        ({"datasets": ["a.jsonl"]}, "datasets.0 is a str"),
        ({"datasets": "a.jsonl"}, "datasets is a str; needed: a list"),
        ({"datasets": [{"path": "a.jsonl", "type": "chat_template", "roles": ["x"]}]}, "roles is a list"),
        (
            {
                "datasets": [
                    {
                        "path": "a.jsonl",
                        "type": "chat_template",
                        "message_field_role": "a",
                        "message_property_mappings": {"role": "b"},
                    }
                ]
            },
            "differ",
        ),
        ({"rl": "dpo", "datasets": [{"path": "a.jsonl", "type": "chatml.intel"}]}, "preference data is not audited"),
        ({"base_model": "m"}, "it names no data sets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_followed_is_an_error_and_nothing_is_fetched(
    keys: Any, match: str, here: Path, asked: list[str]
) -> None:
    lines(here / "a.jsonl", {"instruction": "I", "output": "O"})
    with pytest.raises(DataError, match=match):
        sources_of([config(here / "c.yml", **keys)])
    assert asked == []


def test_a_row_with_tokens_beside_its_texts_is_refused(here: Path) -> None:
    """Axolotl would train on the tokens, whatever the texts say. Control: without one of the columns it would not."""
    row = {"instruction": "I", "output": "O", "input_ids": [1], "labels": [1], "attention_mask": [1]}
    lines(here / "a.jsonl", row)
    (source,) = sources_of([config(here / "c.yml", datasets=[{"path": "a.jsonl", "type": "alpaca"}])])
    with pytest.raises(DataError, match="are trained on in the place of its texts"):
        source.laid_out(row)
    assert source.laid_out(row | {"labels": None}) == {"instruction": "I", "output": "O"}


# YAML ---------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}\n"
for _level in range(1, 12):
    BOMB += f"a{_level}: &a{_level} {{<<: [{', '.join([f'*a{_level - 1}'] * 10)}]}}\n"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"!!python/object/apply:os.system ['touch ran']", "no readable YAML"),
        (b"!!python/name:os.system", "no readable YAML"),
        (b"datasets: !!int ''", "no readable YAML"),
        (b"datasets: 2001-99-99", "no readable YAML"),
        (b"datasets: [", "no readable YAML"),
        (b"[" * 5000, "nested too deep|no readable YAML"),
        (b"\xff\xfe\xfa", "no readable YAML"),
        (b"datasets: \x00", "no readable YAML"),
        (b"- a\n- b", "is a list; needed"),
        (b"", "is a NoneType; needed"),
        (BOMB.encode(), f"more than {MAX_KEYS:,} keys"),
        (b"x" * (MAX_BYTES + 1), "has more than 4 MiB"),
    ],
    ids=["call", "name", "int", "date", "open", "deep", "bytes", "nul", "list", "empty", "bomb", "large"],
)
def test_a_hostile_yaml_is_an_error_and_runs_nothing(content: bytes, match: str, here: Path) -> None:
    (here / "c.yml").write_bytes(content)
    with pytest.raises(DataError, match=match):
        sources_of(["c.yml"])
    assert not (here / "ran").exists()


def test_a_yaml_is_an_error_where_pyyaml_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (here / "c.yml").write_text("datasets: []")
    with pytest.raises(OptionError, match=r"pip install 'safe-sched\[audit\]'"):
        sources_of(["c.yml"])


# LlamaFactory -------------------------------------------------------------------------------------------------------


def info(folder: Path, **entries: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder / "dataset_info.json"


TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


@pytest.mark.parametrize(
    ("entry", "row", "expected"),
    [
        ({}, {"instruction": "I", "input": "in", "output": "O", "system": "not read"}, ("", "I\n\nin", "O")),
        (
            {"columns": {"prompt": "q", "response": "a", "system": "s"}},
            {"q": "Q", "a": "A", "s": "S", "input": "not read"},
            ("S", "Q", "A"),
        ),
        (
            {"columns": {"prompt": "q", "query": "x", "response": "a", "history": "h"}},
            {"q": "Q", "x": "X", "a": "A", "h": [["q0", "a0"]]},
            ("", "q0\n\na0\n\nQ\n\nX", "A"),
        ),
        ({"columns": {"prompt": "text"}}, {"text": "T"}, ("", "T", "")),
        (
            {"formatting": "sharegpt"},
            {"conversations": chat("from", "value", user="human", assistant="gpt")},
            CHAT[0],
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages", "system": "s"}, "tags": TAGS},
            {"messages": chat(), "s": "S"},
            ("S", *CHAT[0][1:]),
        ),
        (
            {"formatting": "sharegpt"},
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "function_call", "value": "call"},
                    {"from": "observation", "value": "seen"},
                    {"from": "gpt", "value": "A"},
                ]
            },
            ("", "Q\n\ncall\n\nseen", "A"),
        ),
    ],
)
def test_the_texts_of_a_llamafactory_data_set_are_those_that_it_reads(
    entry: Any, row: Any, expected: Any, here: Path
) -> None:
    """Expected values: LlamaFactory's description of the format."""
    path = info(here / "data", mine={"file_name": "mine.json", **entry})
    (here / "data" / "mine.json").write_text(json.dumps([row]))
    assert texts(sources_of([path])) == texts(sources_of([f"{path}:mine"])) == [expected]


def test_some_of_the_data_sets_can_be_named_and_only_these_are_read(here: Path, asked: list[str]) -> None:
    for name in ("a", "b"):
        lines(here / "data" / f"{name}.jsonl", {"instruction": name, "output": "O"})
    path = info(
        here / "data",
        a={"file_name": "a.jsonl"},
        b={"file_name": "b.jsonl"},
        far={"hf_hub_url": "owner/set", "subset": "en", "split": "test", "file_name": "a.jsonl"},
    )
    assert [prompt for _, prompt, _ in texts(sources_of([f"{path}:b"]))] == ["b"]
    assert [prompt for _, prompt, _ in texts(sources_of([f"{path}:b, a"]))] == ["b", "a"]
    with pytest.raises(DataError, match="far is on the Hugging Face hub. Name the data sets that are trained on"):
        sources_of([path])
    assert asked == []
    assert texts(sources_of([f"{path}:far"])) == [("", "I", "O")]
    assert asked == ["hf://owner/set/en:test"]
    with pytest.raises(OptionError, match=r"unknown data set of .*'fra' \(did you mean 'far'\?\)"):
        sources_of([f"{path}:fra"])


def test_a_llamafactory_yaml_names_data_sets_of_its_folder(here: Path) -> None:
    for name in ("a", "b", "c"):
        lines(here / "lists" / f"{name}.jsonl", {"instruction": name, "output": "O"})
    info(here / "lists", **{name: {"file_name": f"{name}.jsonl"} for name in "abc"})
    path = config(here / "sft.yaml", stage="sft", dataset="b, a", dataset_dir="lists", eval_dataset="c")
    assert [prompt for _, prompt, _ in texts(sources_of([path]))] == ["b", "a"]
    assert [prompt for _, prompt, _ in texts(sources_of([path], test=True))] == ["b", "a", "c"]
    for keys, match in (
        ({"dataset": "a"}, "no dataset_info.json in dataset_dir='data'"),
        ({"dataset": [1], "dataset_dir": "lists"}, "dataset is no list of names"),
        ({"dataset": "", "dataset_dir": "lists"}, "names nothing"),
        ({"dataset": "a", "dataset_dir": ["lists"]}, "dataset_dir is a list"),
    ):
        with pytest.raises(DataError, match=match):
            sources_of([config(here / "bad.yaml", **keys)])


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"file_name": "a.jsonl", "ranking": True}, "preference data is not audited"),
        ({"file_name": "a.jsonl", "columns": {"kto_tag": "ok"}}, "preference data is not audited"),
        ({"script_url": "run_me"}, "is made by a script, which is not run"),
        ({"ms_hub_url": "o/n"}, "is on another hub"),
        ({"cloud_file_name": "s3://b/f"}, "is in a cloud storage"),
        ({"file_name": "none.jsonl"}, "no file or folder"),
        ({"file_name": "owner/name"}, "no file or folder"),  # not looked for on the hub
        ({"file_name": 3}, "file_name is a int"),
        ({}, "neither file_name nor hf_hub_url"),
        ({"file_name": "a.jsonl", "columns": {"response": "a"}}, "columns has no prompt"),
        ({"file_name": "a.jsonl", "columns": {"prompt": "a", "query": "b"}}, "columns has no response"),
        ({"file_name": "a.jsonl", "formatting": "sharegpt", "columns": {"system": "s"}}, "columns has no messages"),
        ({"file_name": "a.jsonl", "columns": ["prompt"]}, "columns is a list"),
        ("a.jsonl", "mine is a str; needed: an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_description_that_cannot_be_followed_is_an_error(
    entry: Any, match: str, here: Path, asked: list[str]
) -> None:
    lines(here / "a.jsonl", {"instruction": "I", "output": "O"})
    with pytest.raises(SafeSchedError, match=match):
        sources_of([info(here, mine=entry)])
    assert asked == []


def test_an_unknown_formatting_is_an_error_with_the_allowed_ones(here: Path) -> None:
    lines(here / "a.jsonl", {})
    with pytest.raises(OptionError, match=r"unknown formatting .*'sharegtp' \(did you mean 'sharegpt'"):
        sources_of([info(here, mine={"file_name": "a.jsonl", "formatting": "sharegtp"})])


@pytest.mark.parametrize("content", [b"[]", b"{", b"", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_a_damaged_list_of_data_sets_is_an_error(content: bytes, here: Path) -> None:
    (here / "dataset_info.json").write_bytes(content)
    with pytest.raises(DataError, match="dataset_info.json"):
        sources_of(["dataset_info.json"])


# any values ---------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["path", "type", "field_messages", "roles", "data_files", "split", "name", "message_property_mappings", "system"]
KEYS += ["columns", "tags", "file_name", "formatting", "messages", "conversations", "segments", "history", "from"]
KEYS += ["role", "content", "value", "label", "text", "instruction", "output", "prompt", "response", "ranking"]
near_values = st.recursive(
    json_values | st.sampled_from(["a.jsonl", "alpaca", "chat_template", "sharegpt", "user", "[]", '[{"role": 1}]']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)


NUL = {"path": "a\0b", "data_files": "*\0", "file_name": "a\0", "type": "alpaca"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(value=NUL)
@example(value={"path": "json", "data_files": "*\0*", "type": "alpaca"})
@example(value={"path": "json", "data_files": "/*", "type": "alpaca"})
@example(value={"path": "x" * 300, "file_name": "x" * 300})
@example(value={"path": ".", "file_name": ".", "split": "["})
@given(value=near_values)
def test_whatever_a_configuration_says_it_is_sources_or_an_error_of_ours(value: Any, here: Path, asked: Any) -> None:
    lines(here / "a.jsonl", {"instruction": "I", "output": "O"})
    config(here / "c.yml", datasets=[value])
    info(here, mine=value)
    (here / "top.yml").write_text(yaml.safe_dump(value if isinstance(value, dict) else {"datasets": value}))
    for path in ("c.yml", "dataset_info.json", "dataset_info.json:mine", "top.yml"):
        with contextlib.suppress(SafeSchedError):
            for source in sources_of([path]):
                list(source.rows())


ALL = [
    *TYPES.values(),
    renamed.RenamedTurns("conversations", ("from", "role"), ("value", "content"), system="system"),
    renamed.RenamedTurns("messages", drop_system=True, system="system"),
    renamed.PromptHistory("instruction", "input", "output", "history", "system"),
    renamed.Untokenised(renamed.RenamedColumns("text", {"text": "text"})),
]


@laws
@given(row=st.dictionaries(st.sampled_from([*KEYS, "input", "input_ids", "question"]), near_values, max_size=5))
def test_whatever_a_row_holds_it_is_read_or_an_error_of_ours(row: dict[str, Any]) -> None:
    for layout in ALL:
        before = json.dumps(row)
        with contextlib.suppress(DataError):
            audit_row(layout.row(row), schema=layout.schema)
        assert json.dumps(row) == before


def test_layouts_are_plain_data() -> None:
    """They go to other processes, and into the fingerprint of saved shards."""
    for layout in ALL:
        assert pickle.loads(pickle.dumps(layout)) == layout
        json.dumps(dataclasses.asdict(layout))


def test_a_folder_with_notes_of_llamafactory_is_still_a_folder_of_rows(here: Path) -> None:
    info(here / "d", x={"file_name": "a.jsonl"})
    lines(here / "d" / "a.jsonl", {"text": "T"})
    assert list(open_rows("d")) == [{"text": "T"}]
    assert texts(sources_of(["d"])) == [("", "T", "")]
