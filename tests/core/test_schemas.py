"""Schemas: what is read is written back as it was, and every text is found with its role."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_sched.data import schemas
from safe_sched.data.schemas import LOOKED_AT
from safe_sched.data.schemas.texts import Place
from safe_sched.errors import DataError, OptionError
from safe_sched.mixing import SCHEMAS, detect, read, write
from tests.core.batches import laws


class Letters:
    """A tokenizer of one token per character; ``merge`` makes one that a text does not give its tokens back to."""

    def __init__(self, merge: bool = False) -> None:
        self.merge = merge

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in (text.replace("ab", "\u0100") if self.merge else text)]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        text = "".join(map(chr, token_ids))
        return text.replace("\u0100", "ab") if self.merge else text


LETTERS = Letters()
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}

# one row of each schema, the schema, and what is in it, counted by hand
ROWS: list[tuple[str, dict[str, Any], list[tuple[str, str, str]], int | None]] = [
    (
        "messages",
        {"id": 1, "messages": [{"role": "system", "content": "Be brief."}, *HI]},
        [
            ("system", "Be brief.", "messages.0.content"),
            ("user", "Hi", "messages.1.content"),
            ("assistant", "Hello", "messages.2.content"),
        ],
        2,
    ),
    (
        "messages",
        {"messages": [HI[0], CALL, {"role": "tool", "content": "3", "tool_call_id": "x"}, HI[1]], "tools": ["f"]},
        [
            ("user", "Hi", "messages.0.content"),
            ("tool", "3", "messages.2.content"),
            ("assistant", "Hello", "messages.3.content"),
        ],
        2,
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "url": "a"}, {"type": "text", "text": "What?"}, "Well?"]}
            ]
        },
        [("user", "What?", "messages.0.content.1.text"), ("user", "Well?", "messages.0.content.2")],
        None,
    ),
    ("messages", {"messages": []}, [], None),
    (
        "prompt_completion",
        {"completion": "Hello", "area": None, "prompt": "Hi"},
        [("user", "Hi", "prompt"), ("assistant", "Hello", "completion")],
        1,
    ),
    (
        "conversational",
        {"prompt": HI[:1], "completion": HI[1:]},
        [("user", "Hi", "prompt.0.content"), ("assistant", "Hello", "completion.0.content")],
        1,
    ),
    (
        "alpaca",
        {"instruction": "Add.", "input": "", "output": "3", "history": [["a", "b"]], "system": "Be brief."},
        [
            ("system", "Be brief.", "system"),
            ("user", "Add.", "instruction"),
            ("user", "", "input"),
            ("assistant", "3", "output"),
        ],
        3,
    ),
    (
        "alpaca",
        {"instruction": "Greet.", "input": None, "output": "Hi"},
        [("user", "Greet.", "instruction"), ("assistant", "Hi", "output")],
        1,
    ),
    (
        "sharegpt",
        {"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "n": 2},
        [
            ("system", "S", "system"),
            ("user", "Hi", "conversations.0.value"),
            ("assistant", "Yo", "conversations.1.value"),
        ],
        2,
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "observation", "value": "3"}, {"from": "function_call", "value": "{}"}]},
        [("observation", "3", "conversations.0.value"), ("function_call", "{}", "conversations.1.value")],
        None,
    ),
    ("text", {"text": "Hi", "meta": {"a": [1]}}, [("text", "Hi", "text")], None),
    (
        "tokens",
        {"input_ids": [72, 105, 33], "labels": [-100, -100, 33]},
        [("user", "Hi", "input_ids[0:2]"), ("assistant", "!", "input_ids[2:3]")],
        1,
    ),
]
CASES = pytest.mark.parametrize(
    ("schema", "row", "parts", "answer"), ROWS, ids=[f"{r[0]}-{i}" for i, r in enumerate(ROWS)]
)


def tokenizer_for(schema: str) -> Any:
    return LETTERS if schema == "tokens" else None


def told(row: Any) -> str:
    """With the order of the keys, which == does not look at."""
    return json.dumps(row)


# what is read ---------------------------------------------------------------------------------------------------------


@CASES
def test_every_text_is_a_part_with_its_role_and_its_place(schema, row, parts, answer):
    example = read(row, tokenizer=tokenizer_for(schema))
    assert example.schema == schema
    assert [(part.role, part.text, part.field) for part in example.parts] == parts
    assert example.answer == answer
    assert read(row, schema, tokenizer=tokenizer_for(schema)) == example


def test_there_is_a_case_for_every_schema():
    assert {row[0] for row in ROWS} == set(SCHEMAS)


@CASES
def test_what_is_read_is_written_back_as_it_was(schema, row, parts, answer):
    before = copy.deepcopy(row)
    assert told(write(read(row, tokenizer=tokenizer_for(schema)))) == told(before)
    assert told(row) == told(before)


@CASES
def test_other_texts_stand_where_the_old_ones_stood_and_nothing_else_changes(schema, row, parts, answer):
    """Checked by replacing, in the JSON text of the row, each text by another; tokens have a test of their own."""
    if schema == "tokens":
        return
    before = copy.deepcopy(row)
    example = read(row)
    texts = [f"new {number}" for number in range(len(parts))]
    changed = example.with_texts(texts)
    written = write(changed)
    again = read(written, schema)
    assert [part.text for part in again.parts] == texts
    assert [(part.role, part.field) for part in again.parts] == [(role, field) for role, _, field in parts]
    back = write(again.with_texts([text for _, text, _ in parts]))
    assert told(back) == told(before)
    assert told(row) == told(before)  # the row that was read is not touched


def test_without_extras_columns_of_no_schema_become_none_and_keep_their_place():
    row = {"id": 1, "instruction": "Add.", "text": "x", "output": "3", "input": "1, 2"}
    written = write(read(row, "alpaca"), extras=False)
    assert told(written) == told({"id": None, "instruction": "Add.", "text": None, "output": "3", "input": "1, 2"})


def test_values_that_are_no_texts_are_the_very_same_objects():
    row = {"prompt": "Hi", "completion": "Hello", "x": np.arange(3), "y": pa.scalar(2.5), "z": object()}
    written = write(read(row).with_texts(["a", "b"]))
    assert list(written) == list(row)
    assert all(written[name] is row[name] for name in "xyz")


@pytest.mark.parametrize("texts", [["one"], ["a", "b", "c"], ["a", None], ["a", 3]])
def test_other_texts_must_be_texts_and_as_many(texts):
    with pytest.raises(DataError, match="give one str per part"):
        read({"prompt": "Hi", "completion": "Hello"}).with_texts(texts)


# values of numpy and Arrow --------------------------------------------------------------------------------------------


def test_rows_of_numpy_and_arrow_are_read_like_those_of_python():
    plain = {"messages": HI, "n": 1}
    arrays = {"messages": np.array(HI, dtype=object), "n": np.int64(1)}
    table = pa.Table.from_pylist([plain])
    scalars = {name: table.column(name)[0] for name in table.column_names}
    for row in (arrays, scalars, {"messages": tuple(HI), "n": 1}):
        example = read(row)
        assert example.parts == read(plain).parts
        unchanged, changed = write(example), write(example.with_texts(["a", "b"]))
        assert all(unchanged[name] is row[name] for name in row)
        assert [turn["content"] for turn in changed["messages"]] == ["a", "b"]
        assert [turn["content"] for turn in read(row).row["messages"]] != ["a", "b"]
    assert read({"prompt": np.str_("Hi"), "completion": pa.scalar("Hello")}).parts[1].text == "Hello"


# round trips ----------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**60) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
OWN = {column for schema in SCHEMAS.values() for column in schema.columns}
extras = st.dictionaries(texts.filter(lambda name: name not in OWN), values, max_size=3)
contents = (
    texts
    | st.none()
    | st.lists(texts.map(lambda t: {"type": "text", "text": t}) | st.just({"type": "image"}), max_size=2)
)


def turns(who: str, what: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.fixed_dictionaries(
        {who: st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt"]), what: contents},
        optional={"name": texts, "tool_calls": st.none(), "weight": st.integers(0, 1)},
    )
    return st.lists(one, max_size=4)


chat = turns("role", "content")
optional = {"input": texts | st.none(), "system": texts | st.none()}
BASES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "messages": st.fixed_dictionaries({"messages": chat}),
    "prompt_completion": st.fixed_dictionaries({"prompt": texts, "completion": texts | st.none()}),
    "conversational": st.fixed_dictionaries({"prompt": chat, "completion": chat}),
    "alpaca": st.fixed_dictionaries({"instruction": texts, "output": texts | st.none()}, optional=optional),
    "sharegpt": st.fixed_dictionaries({"conversations": turns("from", "value")}, optional={"system": texts}),
    "text": st.fixed_dictionaries({"text": texts}),
    "tokens": st.lists(st.tuples(st.integers(32, 500), st.booleans()), max_size=6).map(
        lambda row: {"input_ids": [t for t, _ in row], "labels": [t if on else -100 for t, on in row]}
    ),
}


@st.composite
def any_row(draw: st.DrawFn, schema: str) -> dict[str, Any]:
    items = draw(st.permutations(list((draw(BASES[schema]) | draw(extras)).items())))
    return dict(items)


@pytest.mark.parametrize("schema", list(SCHEMAS))
@laws
@given(st.data())
def test_any_row_comes_back(schema, data):
    row = data.draw(any_row(schema))
    before = told(row)
    example = read(row, tokenizer=tokenizer_for(schema))
    assert example.schema == schema
    assert told(write(example)) == before
    assert told(row) == before


@pytest.mark.parametrize("schema", [name for name in SCHEMAS if name != "tokens"])
@laws
@given(st.data())
def test_any_texts_come_back_and_the_old_ones_restore_the_row(schema, data):
    row = data.draw(any_row(schema))
    example = read(row)
    new = data.draw(st.lists(texts, min_size=len(example.parts), max_size=len(example.parts)))
    again = read(write(example.with_texts(new)), schema)
    assert [part.text for part in again.parts] == new
    assert told(write(again.with_texts([part.text for part in example.parts]))) == told(row)


def test_the_round_trip_sees_a_writer_that_loses_something(monkeypatch):
    """Negative control: a writer that forgets what stands beside a text in its turn."""
    row = {"messages": [{"role": "user", "name": "ada", "content": "Hi"}]}
    new = read(row).with_texts(["Ho"])
    assert write(new)["messages"][0] == {"role": "user", "name": "ada", "content": "Ho"}

    def forgetful(value: Any, place: Place, text: str) -> Any:
        return [{"role": "user", "content": text}]

    monkeypatch.setattr(schemas, "put", forgetful)
    assert told(write(read(write(new)).with_texts(["Hi"]))) != told(row)


# detection ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_file_may_lack_what_is_optional():
    assert detect([{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "c", "output": "b"}]) == "alpaca"
    assert detect([{"messages": HI}, {"messages": [{"role": "system", "content": "S"}, *HI, *HI]}]) == "messages"


def test_columns_that_are_none_are_taken_for_absent():
    """As Parquet files have them, where several files were put together."""
    assert detect([{"messages": HI, "prompt": None, "completion": None, "text": None}]) == "messages"


def test_detection_takes_no_more_rows_than_it_looks_at():
    rows = iter([{"text": "a"}] * (LOOKED_AT + 5))
    assert detect(rows) == "text"
    assert len(list(rows)) == 5


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HI, "prompt": "Hi", "completion": "Hello"},
        {"instruction": "a", "output": "b", "text": "c"},
        {"text": "c", "input_ids": [1], "labels": [1]},
        {"messages": HI, "conversations": HI},
    ],
)
def test_a_row_that_fits_several_schemas_is_an_error_until_one_is_named(row):
    with pytest.raises(
        DataError, match=r"fit several schemas: .* or .*Name the one that is trained on, such as schema='"
    ):
        read(row)
    with pytest.raises(DataError, match="fit several schemas"):
        detect([row])
    name = "messages" if "messages" in row else "text"
    assert read(row, name).schema == name


def test_a_later_row_decides_between_schemas_that_the_first_fits():
    assert detect([{"text": "a", "messages": HI}, {"text": "a", "messages": None}]) == "text"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": "Hi"},
        {"question": "a", "answer": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"text": None},
        {"prompt": 3, "completion": "b"},
    ],
)
def test_a_row_of_no_schema_is_an_error_that_names_its_fields_and_what_is_allowed(row):
    with pytest.raises(
        DataError, match=r"row 0 has the fields .*no schema that is known.*alpaca: instruction and output"
    ):
        read(row)
    with pytest.raises(DataError, match=r"row 1 has the "):
        detect([{"text": "a"}, row])


def test_a_file_of_two_schemas_is_an_error_that_names_the_row():
    with pytest.raises(DataError, match=r"row 2 has the schema 'messages', the rows before it 'text'"):
        detect([{"text": "a"}, {"text": "b"}, {"messages": HI}])


def test_no_rows_have_no_schema():
    with pytest.raises(DataError, match="no rows to detect"):
        detect([])


def test_names_of_fields_reach_the_screen_harmless():
    with pytest.raises(DataError) as caught:
        read({"\x1b[31mred": 1})
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "row", "reason"),
    [
        ("messages", {"messages": "Hi"}, "messages is a str; needed: a list of turns"),
        ("messages", {"messages": ["Hi"]}, "messages.0 is a str; needed: a turn"),
        ("messages", {"messages": [{"content": "Hi"}]}, "messages.0 has the fields .*needed: role and content"),
        ("messages", {"messages": [{"role": "user"}]}, "messages.0 has the fields .* but no 'content'"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content is a int"),
        ("messages", {"messages": [{"role": "user", "content": [3]}]}, "messages.0.content.0 is a int"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text is a NoneType",
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": 3}, "completion is a int; needed: a text"),
        ("conversational", {"prompt": HI, "completion": "Hello"}, "completion is a str; needed: a list of turns"),
        ("alpaca", {"instruction": "a", "input": ["b"], "output": "c"}, "input is a list; needed: a text"),
        ("text", {"text": 3}, "text is a int; needed: a text"),
        ("text", {"prompt": "a"}, "the fields 'prompt'; schema 'text' needs text"),
        ("sharegpt", {"conversations": [{"from": "human", "value": 1}]}, "conversations.0.value is a int"),
    ],
)
def test_a_row_that_does_not_fit_its_schema_is_an_error_that_names_the_place(schema, row, reason):
    with pytest.raises(DataError, match=reason):
        read(row, schema)


def test_an_unknown_schema_is_an_error_that_lists_the_known():
    with pytest.raises(OptionError, match="unknown schema 'mesages' \\(did you mean 'messages'\\?\\)"):
        read({"messages": HI}, "mesages")
    with pytest.raises(DataError, match="a row is a list"):
        read([1])  # pyright: ignore[reportArgumentType]


# tokens ---------------------------------------------------------------------------------------------------------------


def row_of(*spans: tuple[str, bool]) -> dict[str, list[int]]:
    ids = [[ord(c) for c in text] for text, _ in spans]
    labels = [span if on else [-100] * len(span) for span, (_, on) in zip(ids, spans, strict=True)]
    return {"input_ids": list(itertools.chain(*ids)), "labels": list(itertools.chain(*labels))}


def test_tokens_are_written_as_the_texts_say_and_labels_stay_where_the_answers_are():
    row = row_of(("Hi ", False), ("Yo", True), (" so?", False), ("No.", True))
    example = read(row, tokenizer=LETTERS)
    assert [(p.role, p.text) for p in example.parts] == [
        ("user", "Hi "), ("assistant", "Yo"), ("user", " so?"), ("assistant", "No."),
    ]  # fmt: skip
    assert example.answer == 3
    changed = write(example.with_texts(["Oh, hello ", "Yo", "", "I can't."]))
    assert changed == row_of(("Oh, hello ", False), ("Yo", True), ("I can't.", True))


def test_an_attention_mask_is_as_long_as_the_new_tokens():
    row = row_of(("Hi", False), ("Yo", True)) | {"attention_mask": [1] * 4, "id": 9}
    example = read(row, tokenizer=LETTERS)
    assert write(example) == row
    assert write(example.with_texts(["Hi", "Hello"]))["attention_mask"] == [1] * 7
    with pytest.raises(DataError, match="attention_mask with zeros"):
        write(read(row | {"attention_mask": [1, 1, 1, 0]}, tokenizer=LETTERS).with_texts(["a", "b"]))


def test_other_columns_with_an_entry_per_token_are_an_error_where_tokens_change():
    row = row_of(("Hi", False), ("Yo", True)) | {"position_ids": [0, 1, 2, 3]}
    example = read(row, tokenizer=LETTERS)
    assert write(example) == row
    with pytest.raises(DataError, match="'position_ids' have one entry per token"):
        write(example.with_texts(["Hi", "Hello"]))
    assert write(example.with_texts(["Hi", "Hello"]), extras=False)["position_ids"] is None


def test_a_row_that_is_all_labels_is_one_text_whose_answer_nobody_knows():
    example = read(row_of(("all of it", True)), tokenizer=LETTERS)
    assert [(p.role, p.text) for p in example.parts] == [("text", "all of it")]
    assert example.answer is None


def test_without_a_tokenizer_tokens_are_detected_and_not_read():
    row = row_of(("Hi", False), ("Yo", True))
    assert detect([row]) == "tokens"
    with pytest.raises(DataError, match="give tokenizer="):
        read(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [72], "labels": [72, 73]}, "1 input_ids and 2 labels"),
        ({"input_ids": [72, 73], "labels": [73, -100]}, "label 0 of a row is 73, its token 72.*must not be shifted"),
        ({"input_ids": [72]}, "labels is a NoneType"),
        ({"input_ids": [True], "labels": [1]}, "input_ids is a list; needed: a list of whole numbers"),
        ({"input_ids": "abc", "labels": "abc"}, "input_ids is a str"),
    ],
)
def test_tokens_and_labels_must_fit_together(row, reason):
    with pytest.raises(DataError, match=reason):
        read(row, "tokens", tokenizer=LETTERS)


def test_a_text_that_does_not_give_its_tokens_back_is_refused():
    """ "a" and "b" apart are two tokens; this tokenizer makes one of "ab". Control: the other one makes two."""
    row = row_of(("ab", False), ("c", True))
    assert len(read(row, tokenizer=LETTERS).parts) == 2
    with pytest.raises(DataError, match="tokens 0 to 1 of a row are 'ab', but that text has other tokens"):
        read(row, tokenizer=Letters(merge=True))


def test_arrays_of_tokens_are_tokens():
    row = {name: np.array(ids) for name, ids in row_of(("Hi", False), ("Yo", True)).items()}
    example = read(row, tokenizer=LETTERS)
    assert [part.text for part in example.parts] == ["Hi", "Yo"]
    assert write(example)["input_ids"] is row["input_ids"]
