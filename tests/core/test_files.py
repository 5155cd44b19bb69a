"""Files of rows: nothing is lost on the way in or out, at constant memory, and what is no row is named."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safe_sched import hooks
from safe_sched.data import KINDS, NAMED, RowWriter, open_rows
from safe_sched.data import reading as reading_module
from safe_sched.data.columns import AT_ONCE
from safe_sched.data.kinds import CHUNK, MAX_ROW
from safe_sched.data.rows import read_rows
from safe_sched.errors import DataError, OptionError, PluginError, SafeSchedError
from tests.core.batches import laws

ENDINGS = list(KINDS)
PACKED = ["", ".gz", ".zst"]
TEXTS = [
    {"prompt": "What is 2 + 2?", "completion": 'It is 4, "four".'},
    {"prompt": "Wie heißt du?\u2028\u0085", "completion": "Ich heiße Ada: 你好. 🎲"},
    {"prompt": "two\nlines\tand a tab", "completion": ""},
    {"prompt": "007", "completion": "true"},
]


def save(path: Path, rows: Any, **options: Any) -> Path:
    with RowWriter(path, **options) as out:
        for row in rows:
            out.write(row)
    return path


def load(path: Any, **options: Any) -> list[dict[str, Any]]:
    return list(open_rows(path, **options))


def told(rows: Any) -> str:
    """With the order of the keys and the kinds of numbers, which == does not look at."""
    return json.dumps(rows)


# round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("ending", ENDINGS)
def test_texts_come_back_from_every_kind_of_file_packed_or_not(ending, packed, tmp_path):
    path = save(tmp_path / f"rows{ending}{packed}", TEXTS)
    assert told(load(path)) == told(TEXTS)
    assert told(load(path, kind=KINDS[ending])) == told(TEXTS)
    assert list(tmp_path.iterdir()) == [path]  # nothing else is left behind


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
any_rows = st.lists(st.dictionaries(st.text(max_size=6), values, max_size=4), max_size=5)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.zst"])
@laws
@example(rows=[{"a": "\ud800", "b": "\u2028\x85\x00"}, {}, {"\ud83d": 1e308}])
@given(rows=any_rows)
def test_any_json_comes_back_with_its_keys_in_order(ending, rows, tmp_path_factory):
    """Lone surrogates too, which JSON can only escape."""
    path = save(tmp_path_factory.mktemp("rows") / f"rows{ending}", rows)
    assert told(load(path)) == told(rows)


no_surrogates = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".arrow"])
@laws
@given(names=st.lists(no_surrogates.filter(bool), min_size=1, max_size=4, unique=True), data=st.data())
def test_any_texts_come_back_from_columns(ending, names, data, tmp_path_factory):
    cells = st.lists(no_surrogates, min_size=len(names), max_size=len(names))
    rows = [dict(zip(names, row, strict=True)) for row in data.draw(st.lists(cells, min_size=1, max_size=5))]
    path = save(tmp_path_factory.mktemp("rows") / f"rows{ending}", rows)
    assert told(load(path)) == told(rows)


def test_cells_of_csv_are_the_texts_that_they_were_also_on_the_way_to_another_file(tmp_path):
    (tmp_path / "r.csv").write_text('prompt,completion\n007,"1,5"\n"a ""b""",\n')
    rows = [{"prompt": "007", "completion": "1,5"}, {"prompt": 'a "b"', "completion": ""}]
    assert load(save(tmp_path / "r.jsonl", open_rows(tmp_path / "r.csv"))) == rows


def test_columns_keep_their_types_and_nested_values(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}], "n": 1, "x": 0.1, "on": True, "tags": []},
        {"messages": [], "n": None, "x": 2.0, "on": False, "tags": ["a", None]},
    ]
    for ending in (".parquet", ".arrow"):
        assert told(load(save(tmp_path / f"r{ending}", rows))) == told(rows)


def test_a_field_that_is_not_there_is_none_in_columns(tmp_path):
    assert load(save(tmp_path / "r.parquet", [{"a": 1}, {"b": "x"}])) == [{"a": 1, "b": None}, {"a": None, "b": "x"}]
    assert load(save(tmp_path / "r.csv", [{"a": "1", "b": "x"}, {"a": "2"}]))[1] == {"a": "2", "b": ""}


def test_both_formats_of_arrow_are_read(tmp_path):
    """The file format, and the stream that `datasets` keeps its caches in."""
    table = pa.Table.from_pylist(TEXTS)
    for name, make in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        path = tmp_path / f"{name}.arrow"
        with make(path, table.schema) as out:
            out.write_table(table, max_chunksize=1)
        assert load(path) == TEXTS
        assert open_rows(path).arrow_schema() == table.schema


def test_numbers_of_numpy_and_arrow_are_written_as_numbers(tmp_path):
    row = {"a": np.float32(0.5), "b": np.arange(2), "c": pa.scalar("x"), "d": np.int64(3), "e": [pa.scalar(1)]}
    assert load(save(tmp_path / "r.jsonl", [row])) == [{"a": 0.5, "b": [0, 1], "c": "x", "d": 3, "e": [1]}]


def test_an_empty_file_has_no_rows(tmp_path):
    for ending in (".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".json.zst"):
        assert load(save(tmp_path / f"r{ending}", [])) == []
    for name, content in (
        ("e.jsonl", ""),
        ("b.jsonl", "\n \r\n\n"),
        ("e.csv", ""),
        ("h.csv", "a,b\n"),
        ("e.json", "[ ]"),
    ):
        (tmp_path / name).write_text(content)
        assert load(tmp_path / name) == []


# what is no row -------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
BAD_LINES = [
    (b'{"a": ', "not JSON"),
    (b"hello", "not JSON"),
    (b"[1]", "a list; allowed: an object"),
    (b"null", "a NoneType"),
    (b'{"a": 1} {"a": 2}', "not JSON .Extra data"),
    (b'{"a": NaN}', "NaN is not JSON"),
    (b'{"a": [-Infinity]}', "-Infinity is not JSON"),
    (b'{"a": 1e999}', "the number 1e999 is too large for a double"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
    (b'{"x": {"b": 2, "b": 2}}', "duplicate key 'b'"),
    (b'{"a": "caf\xe9"}', "not UTF-8 text"),
    ('{"a": 1}'.encode("utf-16"), "not UTF-8 text .*UTF-16"),
    (b'{"a": ' + DEEP.encode(), "nested too deep"),
    (b'{"a": "tab\there"}', "not JSON"),
    (b'\xef\xbb\xbf{"a": 1}', "not JSON"),  # a mark stands at the beginning of a file only
]


@pytest.mark.parametrize(
    ("line", "reason"), BAD_LINES, ids=[reason + str(i) for i, (_, reason) in enumerate(BAD_LINES)]
)
def test_a_bad_line_stops_the_reading_by_its_number_or_is_collected(line, reason, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line.replace(b"\n", b"") + b'\r\n{"a": 2}')
    with pytest.raises(DataError, match=rf"r\.jsonl, line 3: {reason}"):
        load(path)
    file = open_rows(path, on_bad="collect")
    assert list(file) == [{"a": 1}, {"a": 2}]
    assert (file.rows, file.bad_rows, [bad.line for bad in file.bad]) == (2, 1, [3])
    assert list(file) == [{"a": 1}, {"a": 2}]  # counted anew
    assert (file.rows, file.bad_rows) == (2, 1)


LISTED = [(line, reason) for line, reason in BAD_LINES if reason.startswith(("NaN", "-Inf", "the n"))]
LISTED += [(b'{"a": "caf\xe9"}', "not UTF-8 text"), (b"[1]", "a list: .* is not a list of objects"), (b"12", "a int")]


@pytest.mark.parametrize(("item", "reason"), LISTED, ids=[reason for _, reason in LISTED])
def test_a_bad_item_of_a_list_stops_the_reading_by_its_line_or_is_collected(item, reason, tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b'\xef\xbb\xbf[{"a": 1},\n\n' + item + b' , {"a": 2}]\n')
    with pytest.raises(DataError, match=rf"r\.json, line 3: {reason}"):
        load(path)
    file = open_rows(path, on_bad="collect")
    assert list(file) == [{"a": 1}, {"a": 2}]
    assert [(bad.line) for bad in file.bad] == [3]


@pytest.mark.parametrize("on_bad", ["stop", "collect"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"a": 1},\n{"a": }]', "line 2: not JSON"),
        ('[{"a": 1}\n{"a": 2}]', "line 2: not JSON .Expecting ','"),
        ('[{"a": 1},\n', "line 2: not JSON"),
        ('[{"a": 1}\n', "line 2: not JSON .it breaks off"),
        ('[{"a": 1},]', "line 1: not JSON"),
        ('[{"a": "b', "line 1: not JSON .Unterminated"),
        ("[" + DEEP, "nested too deep"),
        ('[{"a": 1}]\n[]', "line 2: not JSON .there is more behind"),
        ('{"a": 1}\n{"a": 2}', "not a list of objects; for one object per line name it .jsonl"),
        ("3", "not a list of objects"),
        ("", "not a list of objects"),
    ],
)
def test_a_list_that_cannot_be_read_past_a_place_is_an_error_in_any_case(content, reason, on_bad, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"r\.json.*{reason}"):
        load(path, on_bad=on_bad)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_list_is_read_alike_however_it_is_cut_into_pieces(size, monkeypatch, tmp_path):
    """Pieces of a few bytes end within escapes, numbers, words and characters."""
    rows = [{"a": '\\"é🎲\u2028', "n": [-1.5e-7, True, None, False, {}]}, {}, {"b": "[{]},", "c": 120}]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    monkeypatch.setattr("safe_sched.data.strict_json.CHUNK", size)
    assert load(path) == rows
    path.write_text("[1, 22, 333]")
    with pytest.raises(DataError, match="a int"):
        load(path)


def test_an_object_larger_than_a_piece_is_read(tmp_path):
    rows = [{"a": "x" * (3 * CHUNK)}, {"b": 'y"' * CHUNK}]
    for ending in (".json", ".jsonl"):
        assert load(save(tmp_path / f"r{ending}", rows)) == rows


@pytest.mark.parametrize("line", ["3,4,5", "3"], ids=["long", "short"])
def test_a_csv_line_of_another_length_is_named_by_where_it_begins(line, tmp_path):
    (tmp_path / "r.csv").write_text(f'a,b\n1,"two\nlines"\n\n{line}\n5,6\n')
    with pytest.raises(
        DataError, match=rf"r\.csv, line 5: {line.count(',') + 1} cells; the first line names 2 columns"
    ):
        load(tmp_path / "r.csv")
    file = open_rows(tmp_path / "r.csv", on_bad="collect")
    assert list(file) == [{"a": "1", "b": "two\nlines"}, {"a": "5", "b": "6"}]
    assert file.bad_rows == 1


def test_a_csv_cell_that_is_not_utf8_is_a_bad_row(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"a\nx\ncaf\xe9\ny\n")
    with pytest.raises(DataError, match=r"r\.csv, line 3: not UTF-8"):
        load(tmp_path / "r.csv")
    assert load(tmp_path / "r.csv", on_bad="collect") == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize("on_bad", ["stop", "collect"])
@pytest.mark.parametrize("content", ['a,b\n1,"2"3\n4,5\n', 'a,b\n1,"2\n3,4\n'], ids=["behind a quote", "open quote"])
def test_a_csv_file_with_broken_quotes_is_an_error_in_any_case(content, on_bad, tmp_path):
    """From there on nobody knows what is quoted: rows might be read that are none."""
    (tmp_path / "r.csv").write_text(content)
    with pytest.raises(DataError, match="not CSV"):
        load(tmp_path / "r.csv", on_bad=on_bad)


def test_two_columns_of_one_name_are_an_error(tmp_path):
    """One of them would be lost."""
    (tmp_path / "r.csv").write_text("a,b,a\n1,2,3\n")
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "r.parquet")
    for name in ("r.csv", "r.parquet"):
        with pytest.raises(DataError, match="the columns 'a' (stand|are) there twice"):
            load(tmp_path / name)


def test_cells_may_be_longer_than_the_csv_module_takes_and_its_limit_stays(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"a": "x" * (2 * limit), "b": "y"}]
    assert load(save(tmp_path / "r.csv", rows)) == rows
    assert csv.field_size_limit() == limit


def test_line_ends_of_windows_and_of_old_macs_are_line_ends_of_csv(tmp_path):
    for end in ("\r\n", "\r"):
        (tmp_path / "r.csv").write_bytes(end.join(["a,b", "1,2", "3,4", ""]).encode())
        assert load(tmp_path / "r.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_line_that_is_too_long_is_a_bad_row_and_is_not_held(monkeypatch, tmp_path):
    monkeypatch.setattr(reading_module, "MAX_ROW", 4 * CHUNK)
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * (40 * CHUNK) + b'"}\n{"a": 2}\n')
    tracemalloc.start()
    file = open_rows(path, on_bad="collect")
    assert list(file) == [{"a": 1}, {"a": 2}]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [str(bad).partition("line ")[2] for bad in file.bad] == ["2: longer than 64 MiB"]
    assert peak < 16 * CHUNK
    assert MAX_ROW == 64 << 20


def test_only_the_first_bad_rows_are_kept_and_all_are_counted(tmp_path):
    (tmp_path / "r.jsonl").write_text("x\n" * 1000 + '{"a": 1}\n')
    file = open_rows(tmp_path / "r.jsonl", on_bad="collect")
    assert list(file) == [{"a": 1}]
    assert (file.bad_rows, len(file.bad)) == (1000, NAMED)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("on_bad", ["stop", "collect"])
def test_a_packed_file_that_breaks_off_is_an_error_in_any_case(on_bad, packed, tmp_path):
    """Also where it breaks off behind the end of a line. Control: whole, it is read."""
    path = save(tmp_path / f"r.jsonl{packed}", [{"a": os.urandom(40).hex()} for _ in range(3000)])
    assert len(load(path, on_bad=on_bad)) == 3000
    whole = path.read_bytes()
    for kept in (1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"is not a readable .jsonl\.(gz|zst) file"):
            load(path, on_bad=on_bad)


def test_packed_files_put_behind_one_another_are_read_as_one(tmp_path):
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))
    assert load(tmp_path / "r.jsonl.gz") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".parquet.zst"])
def test_a_damaged_file_of_columns_is_a_data_error(ending, tmp_path):
    path = save(tmp_path / f"r{ending}", [{"a": f"row {i} " * 20} for i in range(500)])
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-10], whole[:-60] + b"\xff" * 60):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is not a readable"):
            load(path)


def test_offsets_that_point_elsewhere_are_not_followed(tmp_path):
    """An Arrow file may say anything; this one says that its second text begins at byte 1e9."""
    offsets = pa.py_buffer(np.array([0, 10**9, 2], dtype=np.int32).tobytes())
    wild = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ab")])
    with pa.ipc.new_file(tmp_path / "r.arrow", pa.schema([("a", pa.string())])) as out:
        out.write_batch(pa.record_batch([wild], names=["a"]))
    with pytest.raises(DataError, match="is not a readable .arrow file"):
        load(tmp_path / "r.arrow")


def test_text_of_a_column_that_is_not_utf8_is_a_data_error(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"caf\xe9"]).buffers()[1:]])
    pq.write_table(pa.table({"a": bad}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match="is not a readable .parquet file"):
        load(tmp_path / "r.parquet")


# what is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), [{"x": float("-inf")}], datetime.date(2020, 1, 1), b"bytes", {1, 2}, object()],
    ids=["nan", "inf", "nested", "date", "bytes", "set", "object"],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_what_a_kind_of_file_cannot_hold_is_an_error_that_names_the_row(value, ending, tmp_path):
    with pytest.raises(DataError, match=r"rows\..*, row 1 \(counted from 0\) cannot be written"):
        save(tmp_path / f"rows{ending}", [{"a": "1"}, {"a": value}])
    assert list(tmp_path.iterdir()) == []


def test_a_csv_cell_holds_texts_and_numbers_and_nothing_nested(tmp_path):
    row = {"a": "x", "b": 3, "c": 0.1, "d": True, "e": None, "f": np.float32(0.5)}
    assert load(save(tmp_path / "r.csv", [row])) == [{"a": "x", "b": "3", "c": "0.1", "d": "true", "e": "", "f": "0.5"}]
    for value in ([1], {"b": 1}):
        with pytest.raises(DataError, match="'a' is a (list|dict), which has no place in a cell"):
            save(tmp_path / "n.csv", [{"a": value}])


def mixed(good: Any, bad: Any, at: int) -> Iterator[dict[str, Any]]:
    for i in range(AT_ONCE + 50):
        yield {"a": bad if i == at else good}


@pytest.mark.parametrize("at", [3, AT_ONCE + 7], ids=["among the first", "later"])
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("x", 3),
        (3, "x"),
        (3, 0.5),
        (True, 1),
        ([1], "x"),
        ({"b": 1}, {"b": "x"}),
        ("x", "\ud800"),
        (3, 2**70),
        (None, {"b": {}}),
    ],
    ids=str,
)
def test_a_row_of_another_type_is_an_error_that_names_it_and_no_value_is_changed_to_fit(good, bad, at, tmp_path):
    """Whole numbers and others among the first rows go together: they become numbers with a fraction."""
    path = tmp_path / "r.parquet"
    if at < AT_ONCE and (good, bad) == (3, 0.5):
        assert load(save(path, mixed(good, bad, at)))[3] == {"a": 0.5}
        return
    if at < AT_ONCE and good is None:
        with pytest.raises(DataError, match="cannot be written"):  # Parquet has no struct without fields
            save(path, mixed(good, bad, at))
        return
    with pytest.raises(
        DataError, match=rf"r\.parquet, row {at} \(counted from 0\) cannot be written: .*\.jsonl, which takes"
    ):
        save(path, mixed(good, bad, at))
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_comes_later_is_an_error(tmp_path):
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"a": 1} for _ in range(AT_ONCE))
        yield {"a": 1, "b": 2}

    for ending in (".parquet", ".csv"):
        with pytest.raises(DataError, match=rf"row {AT_ONCE} .*it has the columns 'b', which the first row"):
            save(tmp_path / f"r{ending}", rows())


def test_with_a_schema_columns_have_its_types_and_values_that_would_change_are_refused(tmp_path):
    schema = pa.schema(
        [("a", pa.int32()), ("x", pa.float32()), ("s", pa.struct([("b", pa.string())])), ("t", pa.timestamp("ms"))]
    )
    rows = [{"a": None, "x": 0.5, "s": {"b": "c"}, "t": datetime.datetime(2020, 1, 1)}, {"a": 3}]
    path = save(tmp_path / "r.parquet", rows, arrow_schema=schema)
    assert open_rows(path).arrow_schema() == schema
    assert load(save(tmp_path / "again.parquet", open_rows(path), arrow_schema=schema)) == load(path)
    for bad in ({"x": 0.1}, {"a": 1.0e10}, {"s": {"c": "lost"}}, {"a": True}, {"new": 1}, {"a": "1"}):
        with pytest.raises(DataError, match="row 1 .*cannot be written"):
            save(tmp_path / "bad.parquet", [rows[0], bad], arrow_schema=schema)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("old")

    def rows() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        assert path.read_text() == "old"
        raise KeyError

    with pytest.raises(KeyError):
        save(path, rows())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    save(path, [{"a": 1}])
    assert path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".jsonl.gz", ".csv.zst"])
def test_nothing_is_left_behind_when_writing_stops(ending, tmp_path):
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"a": i} for i in range(AT_ONCE + 5))
        raise KeyError

    with pytest.raises(KeyError):
        save(tmp_path / f"r{ending}", rows())
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_written_over_what_it_is_made_from(tmp_path):
    path = save(tmp_path / "r.jsonl", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(path)
    for out in (path, tmp_path / "link.jsonl", tmp_path / ".." / tmp_path.name / "r.jsonl"):
        for source in (path, str(path), open_rows(path), open_rows(tmp_path)):
            with pytest.raises(OptionError, match="is what the rows are read from"):
                RowWriter(out, sources=[source])
    assert load(path) == TEXTS
    RowWriter(tmp_path / "other.jsonl", sources=[path])


def test_a_link_stays_a_link(tmp_path):
    path = save(tmp_path / "r.jsonl", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(path)
    save(tmp_path / "link.jsonl", TEXTS[:1])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert load(path) == TEXTS[:1]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("r.txt", "unknown kind '.txt'; allowed: .jsonl, .json"),
        ("r", "unknown kind ''"),
        ("none/r.jsonl", "there is no folder"),
        (".", "unknown kind"),
    ],
)
def test_where_nothing_can_be_written_the_error_comes_first(name, match, tmp_path):
    with pytest.raises(SafeSchedError, match=match):
        RowWriter(tmp_path / name)
    with pytest.raises(OptionError, match="no regular file"):
        RowWriter("/dev/null", kind="jsonl")
    with pytest.raises(OptionError, match="within a with block"):
        RowWriter(tmp_path / "r.jsonl").write({})


@pytest.mark.parametrize("row", [[1], "text", None, {1: "a"}])
def test_what_is_no_row_cannot_be_written(row, tmp_path):
    with pytest.raises(DataError, match="row 0: no dict whose names are texts"):
        save(tmp_path / "r.jsonl", [row])


# folders, standard input, the hub -------------------------------------------------------------------------------------


def test_a_folder_is_all_its_data_files_in_order(tmp_path):
    save(tmp_path / "b.jsonl", [{"n": 2}])
    save(tmp_path / "a.parquet", [{"n": 1}])
    (tmp_path / "c").mkdir()
    save(tmp_path / "c" / "d.jsonl.gz", [{"n": 3}])
    for other in ("README.md", "dataset_info.json", ".hidden.jsonl"):
        (tmp_path / other).write_text("no rows")
    file = open_rows(tmp_path)
    assert list(file) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [path.name for path in file.paths] == ["a.parquet", "b.jsonl", "d.jsonl.gz"]
    assert file.arrow_schema() is None
    (tmp_path / "b.jsonl").write_text("x")
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: not JSON"):
        list(file)


def test_what_datasets_leaves_in_a_saved_set_is_no_data(tmp_path):
    save(tmp_path / "data-00000-of-00001.arrow", [{"n": 1}])
    save(tmp_path / "cache-0123.arrow", [{"n": 9}])
    assert load(tmp_path) == [{"n": 9}, {"n": 1}]
    (tmp_path / "state.json").write_text("{}")
    assert load(tmp_path) == [{"n": 1}]


def test_a_folder_without_data_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"has no data file in it; looked for: \.jsonl"):
        open_rows(tmp_path)
    with pytest.raises(DataError, match="no file or folder none.jsonl$"):
        open_rows("none.jsonl")
    with pytest.raises(DataError, match="no file or folder owner/name; a data set of the hub is hf://owner/name"):
        open_rows("owner/name")
    with pytest.raises(OptionError, match="unknown way with bad rows 'skip'; allowed: 'collect', 'stop'"):
        open_rows(tmp_path, on_bad="skip")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="unknown kind of file 'xml'"):
        open_rows(tmp_path, kind="xml")  # pyright: ignore[reportArgumentType]


class Piped(io.BytesIO):
    """Standard input or output, as bytes."""

    @property
    def buffer(self) -> Piped:
        return self


def test_a_dash_is_standard_input_and_output(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Piped(b'{"a": 1}\nx\n{"a": 2}\n'))
    monkeypatch.setattr(sys, "stdout", written := Piped())
    file = open_rows("-", on_bad="collect")
    with RowWriter("-", sources=[file]) as out:
        for row in file:
            out.write(row)
    assert written.getvalue() == b'{"a": 1}\n{"a": 2}\n'
    assert str(file.bad[0]).startswith("-, line 2")
    with pytest.raises(DataError, match="can only be read once"):
        list(file)
    monkeypatch.setattr(sys, "stdin", Piped(b"a,b\n1,2\n"))
    assert load("-", kind="csv") == [{"a": "1", "b": "2"}]
    for kind in ("parquet", "arrow"):
        with pytest.raises(OptionError, match="standard input"):
            open_rows("-", kind=kind)
        with pytest.raises(OptionError, match="standard output"):
            RowWriter("-", kind=kind)


def test_a_hub_name_is_opened_by_a_plugin_and_by_none_it_is_an_error(monkeypatch, tmp_path):
    asked = []

    class Plugin:
        @hooks.hookimpl
        def safe_sched_open_source(self, source: str) -> Any:
            asked.append(source)
            return [{"a": 1}, 3, {"a": 2}] if source.startswith("hf://me/") else None

    class Entry:
        name = value = "mine"
        load = staticmethod(Plugin)

    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [Entry])
    hooks.manager.cache_clear()
    try:
        file = open_rows("hf://me/set:test", on_bad="collect")
        assert list(file) == list(file) == [{"a": 1}, {"a": 2}]
        assert (file.bad_rows, asked) == (1, ["hf://me/set:test"])
        with pytest.raises(DataError, match="hf://me/set, line 2: a int"):
            read_rows("hf://me/set")
        with pytest.raises(PluginError, match=r"nothing that is installed can open 'hf://you/set'.*safe-sched\[trl\]"):
            open_rows("hf://you/set")
    finally:
        hooks.manager.cache_clear()


# memory ---------------------------------------------------------------------------------------------------------------


def peak_of(source: Path, out: Path) -> int:
    tracemalloc.start()
    save(out, open_rows(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".jsonl.gz", ".json.zst"])
def test_memory_does_not_grow_with_the_file(ending, tmp_path):
    """Eight times as many rows, the same peak (bench/convert.py measures whole processes and columns)."""
    row = {"prompt": "x" * 300, "completion": "y" * 700}
    small, large = ((row for _ in range(count)) for count in (2_500, 20_000))
    peaks = [
        peak_of(save(tmp_path / f"{size}{ending}", rows), tmp_path / f"out{ending}")
        for size, rows in (("small", small), ("large", large))
    ]
    assert max(peaks) < 8 * CHUNK
    assert peaks[1] < 1.3 * peaks[0] + 100_000


def test_the_measure_of_memory_sees_a_reader_that_holds_all_rows(tmp_path):
    """Negative control."""
    path = save(tmp_path / "r.jsonl", ({"prompt": "x" * 1000} for _ in range(20_000)))
    tracemalloc.start()
    held = load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == 20_000
    assert peak > 16 * CHUNK
