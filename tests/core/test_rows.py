"""Rows from files: each line is a row or an error that names the line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safe_sched.data.rows import core_rows, read_rows
from safe_sched.errors import DataError
from tests.core.batches import laws

ROWS = [
    {"prompt": "What is 2 + 2?", "completion": 'It is 4, "four".'},
    {"prompt": "Wie heißt du?", "completion": "Ich heiße Ada: 你好."},
    {"prompt": "two\nlines", "completion": ""},
]


def write(folder: Path, kind: str, rows: list[dict[str, str]]) -> Path:
    path = folder / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        quoted = [[cell.replace('"', '""') for cell in r.values()] for r in rows]
        lines = [",".join(rows[0])] + [",".join(f'"{cell}"' for cell in cells) for cells in quoted]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    path = write(tmp_path, kind, ROWS)
    assert read_rows(path) == ROWS
    assert read_rows(str(path)) == ROWS


def test_the_ending_may_be_in_capitals(tmp_path):
    path = write(tmp_path, ".jsonl", ROWS)
    assert read_rows(path.rename(tmp_path / "ROWS.JSONL")) == ROWS


def test_lists_iterators_and_tables_of_mappings_are_rows():
    assert read_rows(ROWS) == ROWS
    assert read_rows(iter(ROWS)) == ROWS
    assert read_rows(dict(r) for r in ROWS) == ROWS
    assert read_rows(pa.Table.from_pylist(ROWS).to_pylist()) == ROWS


def test_the_rows_given_are_not_the_rows_returned():
    """A change of what was read does not reach the caller's rows."""
    given_rows = [dict(ROWS[0])]
    read_rows(given_rows)[0]["prompt"] = "changed"
    assert given_rows == [ROWS[0]]


def test_fields_need_not_be_text(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "n": 3, "on": True, "none": None}]
    (tmp_path / "r.jsonl").write_text(json.dumps(rows[0]))
    assert read_rows(tmp_path / "r.jsonl") == rows


def test_empty_lines_of_a_jsonl_file_are_skipped(tmp_path):
    (tmp_path / "r.jsonl").write_text('\n{"a": 1}\r\n   \n{"a": 2}')
    assert read_rows(tmp_path / "r.jsonl") == [{"a": 1}, {"a": 2}]


@laws
@example(["one\u2028two"])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_text_comes_back_from_a_jsonl_file(tmp_path_factory, texts):
    """Only a line feed ends a line: U+2028, U+0085 and their like may stand unescaped in a JSON string."""
    rows = [{"prompt": text} for text in texts]
    assert read_rows(write(tmp_path_factory.mktemp("rows"), ".jsonl", rows)) == rows


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_an_unusual_line_separator_within_a_text_does_not_end_the_line(separator, tmp_path):
    rows = [{"prompt": f"one{separator}two"}]
    assert read_rows(write(tmp_path, ".jsonl", rows)) == rows


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_byte_order_mark_is_not_text(kind, tmp_path):
    """Editors on Windows write one in front of UTF-8."""
    path = write(tmp_path, kind, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(path) == ROWS


def test_numbers_in_a_csv_file_stay_the_text_that_they_were(tmp_path):
    """An answer "007" is not 7, nor is a column of "true" and "false" one of booleans: cells of a CSV file are text."""
    rows = [{"prompt": "2020-01-01", "completion": "007"}, {"prompt": "2020-01-02", "completion": "010"}]
    assert read_rows(write(tmp_path, ".csv", rows)) == rows


def test_answers_of_several_lines_in_a_large_csv_file(tmp_path):
    """More than one block of the reader (1 MiB), so that a block ends within a quoted cell."""
    rows = [{"prompt": f"row {i} " + "p" * 150, "completion": "one\ntwo\n\nthree"} for i in range(9000)]
    assert read_rows(write(tmp_path, ".csv", rows)) == rows


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"a": ', "not JSON"), ("hello", "not JSON"), ("[1, 2]", "a list"), ('"text"', "a str"), ("7", "a int")],
)
def test_a_bad_line_of_a_jsonl_file_is_named_by_its_number(line, reason, tmp_path):
    """Counted from 1, empty lines included, as an editor counts."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n\n' + line + '\n{"a": 2}\n')
    with pytest.raises(DataError, match=rf"r\.jsonl, line 3: {reason}"):
        read_rows(path)


def test_a_json_file_that_breaks_off_is_named_by_its_line(tmp_path):
    (tmp_path / "r.json").write_text('[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(DataError, match=r"r\.json, line 3: not JSON"):
        read_rows(tmp_path / "r.json")


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", '[{"a": 1}, 2]', "3"])
def test_a_json_file_of_something_else_is_a_data_error(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DataError, match="not a list of objects"):
        read_rows(tmp_path / "r.json")


@pytest.mark.parametrize("line", ["3,4,5", "3"], ids=["long", "short"])
def test_a_bad_line_of_a_csv_file_is_a_data_error(line, tmp_path):
    """Control: without that line the file is read."""
    (tmp_path / "r.csv").write_text(f"a,b\n1,2\n{line}\n")
    with pytest.raises(DataError, match=r"r\.csv"):
        read_rows(tmp_path / "r.csv")
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    assert len(read_rows(tmp_path / "r.csv")) == 1


def test_a_bad_line_of_a_csv_file_is_named_by_its_number(tmp_path):
    (tmp_path / "r.csv").write_text("a,b\n1,2\n3,4,5\n")
    with pytest.raises(DataError, match=r"[Rr]ow #?3|line 3"):
        read_rows(tmp_path / "r.csv")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_text_that_is_not_utf8_is_a_data_error(kind, tmp_path):
    """0xE9 is é in Latin-1 and nothing in UTF-8."""
    path = write(tmp_path, kind, [{"prompt": "caf#"}])
    path.write_bytes(path.read_bytes().replace(b"#", b"\xe9"))
    with pytest.raises(DataError):
        read_rows(path)


@pytest.mark.parametrize("damage", ["empty", "head", "middle", "cut"])
def test_a_damaged_parquet_file_is_a_data_error(damage, tmp_path):
    path = write(tmp_path, ".parquet", [{"prompt": f"row {i} " * 20} for i in range(500)])
    content = bytearray(path.read_bytes())
    if damage == "middle":
        content[10:60] = b"\xff" * 50
    kept = {"empty": b"", "head": content[:100], "middle": content, "cut": content[:-10]}[damage]
    path.write_bytes(kept)
    with pytest.raises(DataError, match="not a readable"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content"), [("r.jsonl", ""), ("r.jsonl", "\n \n"), ("r.json", "[]"), ("r.csv", "a,b\n"), ("r.csv", "")]
)
def test_a_file_without_rows_is_a_data_error(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_rows(tmp_path / name)


def test_no_rows_at_all_is_a_data_error():
    with pytest.raises(DataError, match="the given rows: no rows"):
        read_rows([])


@pytest.mark.parametrize(("rows", "told"), [([{"a": 1}, "text"], "row 1 is a str"), ([None], "row 0 is a NoneType")])
def test_a_row_that_is_no_mapping_is_named_by_its_number(rows, told):
    with pytest.raises(DataError, match=told):
        read_rows(rows)


def test_a_missing_file_and_a_folder_are_data_errors_that_say_what_is_allowed(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path, "cor"):
        with pytest.raises(DataError, match=r"no file .*\.jsonl, \.json, \.csv or \.parquet file, or 'core'"):
            read_rows(path)


def test_an_unknown_kind_of_file_is_a_data_error_that_lists_the_known(tmp_path):
    (tmp_path / "r.txt").write_text("hello")
    with pytest.raises(DataError, match=r"unknown kind '\.txt'; allowed: \.jsonl, \.json, \.csv, \.parquet"):
        read_rows(tmp_path / "r.txt")


# the safety set that comes along --------------------------------------------------------------------------------------


def test_core_is_read_by_its_name():
    assert read_rows("core") == core_rows()


def test_core_has_about_250_rows_in_14_areas():
    rows = core_rows()
    areas = [r["area"] for r in rows]
    assert 230 <= len(rows) <= 270
    assert len(set(areas)) == 14
    assert min(areas.count(area) for area in set(areas)) >= 10


def test_every_row_of_core_has_three_fields_of_text_and_none_is_empty():
    for r in core_rows():
        assert r.keys() == {"prompt", "completion", "area"}
        assert all(isinstance(text, str) and text.strip() == text != "" for text in r.values())


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_no_two_rows_of_core_are_the_same(field):
    """Capitals and spaces aside."""
    texts = [" ".join(r[field].lower().split()) for r in core_rows()]
    assert len(set(texts)) == len(texts)
