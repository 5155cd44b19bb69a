"""Files that somebody made to break the audit: no crash, no code run, nothing fetched, and every bad row named."""

from __future__ import annotations

import contextlib
import csv
import gzip
import html.parser
import json
import os
import re
import socket
import subprocess
import sys
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from safe_sched.audit.run import audit
from safe_sched.cli import app
from safe_sched.data import NAMED, RowWriter, open_rows
from safe_sched.data.kinds import MAX_ROW
from safe_sched.errors import DataError, SafeSchedError
from tests.core.growth import LINEAR

pytest.importorskip("sklearn")

CODES = {0, 2, 3}
GOOD = [{"prompt": f"What is {n} plus {n % 7}?", "completion": f"It is {n + n % 7}."} for n in range(30)]

MARK = "PWNED"
TEXTS = [
    f"<script>{MARK}()</script><img src=x onerror={MARK}()>",
    f"</script><script>{MARK}()</script>",
    f"<!--<script>{MARK}()",
    f"</textarea></title></style><svg/onload={MARK}()>",
    f"javascript:{MARK}() ' onmouseover='{MARK}()' \" onmouseover=\"{MARK}()\"",
    "\x1b[2J\x1b[31mred\x1b]52;c;cm0gLXJm\x07\x1b]8;;http://x\x07link\x9b31m",
    "right\u202eto left\u2066\u200b\u00ad\ufeff\U000e0041",
    '=HYPERLINK("http://x","y")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1+1",
    "{{ 7 * 7 }}{% for x in y %}${7*7}%s%n{0.__class__}#{7*7}",
    "[bold red]markup[/bold red][link=http://x]y[/link][/]",
    "__import__('os').system('touch ran')",
    "!!python/object/apply:os.system ['touch ran']",
    "\ud800 half",
    "nul\x00in it\x85\u2028\u2029\x0b\x0c",
    "e" + "\u0301" * 3000,
    "'; DROP TABLE rows; --",
    "../../../../etc/passwd",
    "",
    " \n\t ",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, in which nothing may be started or fetched."""

    def forbidden(*args: Any, **options: Any) -> Any:
        raise AssertionError(f"not allowed: {args!r}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(subprocess.Popen, "__init__", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    return tmp_path


def run(*args: Any) -> Any:
    """``safe-sched audit``, which may end in errors of its own only."""
    found = CliRunner().invoke(app, ["audit", *map(str, args)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    for text in (found.stdout, found.stderr):
        assert "Traceback" not in text
        assert not {one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs") and one != "\n"}
    assert not Path("ran").exists()
    return found


def lines(name: str, *rows: Any) -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# texts --------------------------------------------------------------------------------------------------------------


def test_hostile_texts_are_scored_and_printed_harmlessly() -> None:
    rows = [{"prompt": text, "completion": other} for text in TEXTS for other in ("Fine.", text)]
    found = run(lines("t.jsonl", *GOOD, *rows), "--out", "found", "--format", "jsonl")
    assert (found.exit_code, found.stderr.strip()) == (0, "")
    assert MARK not in found.stdout + found.stderr
    written = list(open_rows("found/rows.jsonl"))
    assert [{name: row[name] for name in ("prompt", "completion")} for row in written] == [*GOOD, *rows]
    assert all(0 <= row["safe_sched.p_harmful"] <= 1 for row in written)


def test_hostile_names_of_columns_and_files_are_printed_harmlessly() -> None:
    texts = [text for text in TEXTS if not any("\ud800" <= one <= "\udfff" for one in text)]
    for some in (texts[::2], texts[1::2]):  # so few that all of them are named
        rows = [{text: text, "prompt": "a", "completion": "b"} for text in some]
        found = run(lines("c.jsonl", *rows, *({text: text} for text in some)))
        assert found.exit_code == 3
        assert found.stderr.count("the fields") == len(some) < NAMED
    name = "\x1b[31m<script>PWNED()\u202e[red]=1.jsonl"
    found = run(lines(name, *GOOD, {"prompt": 3}))
    assert found.exit_code == 3
    assert r"\x1b[31m" in found.stderr


class _Scripts(html.parser.HTMLParser):
    """Every element and attribute of a page, and what stands in its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("shown", [[], ["--show-text"]], ids=["redacted", "shown"])
def test_the_report_makes_no_element_of_a_text(shown: list[str]) -> None:
    """As many elements of each kind as the report of harmless rows has, and none with a handler."""
    pytest.importorskip("jinja2")

    def page(*rows: Any) -> str:
        name = f"r{len(list(Path().iterdir()))}"
        found = run(lines(f"{name}.jsonl", *rows), "--out", name, "--report", "html", *shown)
        assert found.exit_code == 0
        return Path(name, "report.html").read_text()

    rows = [{"prompt": text, "completion": text} for text in TEXTS]
    text = page(*GOOD, *rows)
    parsed = _Scripts()
    parsed.feed(text)
    assert not [tag for tag, attrs in parsed.tags if any(name.startswith("on") for name in attrs)]
    assert not [tag for tag, attrs in parsed.tags if MARK in json.dumps(attrs) and tag != "meta"]
    assert not re.search(rf"<(script|img|svg)[^>]*>?\s*{MARK}|<img src=x", text)
    assert "\x1b" not in text
    assert (MARK in text) == bool(shown)  # control: the texts are there where they are asked for


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_cells_keep_what_a_spreadsheet_would_run_and_ours_hold_nothing_of_it(form: str) -> None:
    """The rows are for a trainer: a text that is changed would be trained on. Our columns never begin a formula."""
    texts = [text for text in TEXTS if not re.search("[\ud800-\udfff\r]", text)]
    rows = [{"prompt": text, "completion": "=1+1"} for text in texts]
    assert run(lines("t.jsonl", *GOOD, *rows), "--out", "found", "--format", form).exit_code == 0
    path = Path(f"found/rows.{form}")
    if form == "csv":
        with open(path, newline="", encoding="utf-8") as file:
            written = list(csv.DictReader(file))
    else:
        written = pq.read_table(path).to_pylist()
    assert [{name: row[name] for name in ("prompt", "completion")} for row in written] == [*GOOD, *rows]
    ours = [value for row in written for name, value in row.items() if name.startswith("safe_sched.")]
    assert not [value for value in ours if re.match(r"[=+@\t\r]|-(?![\d.])", str(value))]


# rows that are none -------------------------------------------------------------------------------------------------

BAD_LINES = [
    (b"nonsense", "not JSON"),
    (b'{"prompt": "a", "completion": NaN}', "NaN is not JSON"),
    (b'{"prompt": "a", "completion": 1e999}', "too large"),
    (b'{"prompt": "caf\xe9", "completion": "b"}', "not UTF-8"),
    (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate key"),
    (b'{"prompt": "a", "completion": ' + b"[" * 100_000, "nested too deep"),
    (b"[1, 2]", "a list"),
    (b"null", "a NoneType"),
    (b"\xff\xfe{\x00}\x00", "not UTF-8"),
    (b"{}", "no schema"),
    (b'{"prompt": 3, "completion": "b"}', ""),
    (b'{"prompt": null, "completion": "b"}', ""),
    (b'{"prompt": ["a"], "completion": "b"}', ""),
    (b'{"prompt": {"a": 1}, "completion": {"b": 2}}', ""),
    (b'{"messages": [{"role": 1, "content": "x"}]}', ""),
    (b'{"other": "schema"}', ""),
]


def test_every_bad_line_is_named_with_its_reason_and_the_others_are_scored() -> None:
    good = [json.dumps(row).encode() for row in GOOD]
    between = [line for pair in zip(good, [bad for bad, _ in BAD_LINES], strict=False) for line in pair]
    Path("t.jsonl").write_bytes(b"\n".join([*between, *good[len(BAD_LINES) :]]) + b"\n")
    found = run("t.jsonl")
    assert found.exit_code == 3
    told = dict(re.findall(r"t\.jsonl, line (\d+): (.*)", found.stderr))
    assert set(told) == {str(2 * number + 2) for number in range(len(BAD_LINES))}
    for number, (_, reason) in enumerate(BAD_LINES):
        assert reason in told[str(2 * number + 2)]
    summary = json.loads(run("t.jsonl", "--json").stdout)
    assert (summary["scored"], summary["bad_rows"]) == (len(GOOD), len(BAD_LINES))
    assert 0 < summary["coverage"] < 1


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("t.jsonl", b"", 2),
        ("t.jsonl", b"\n\n", 2),
        ("t.jsonl", b"nonsense\n" * 50, 3),
        ("t.json", b"[]", 2),
        ("t.json", b'{"prompt": "a"}', 2),
        ("t.json", b'[{"prompt": "a", "completion": "b"}', 2),
        ("t.csv", b"", 2),
        ("t.csv", b"prompt,completion\n", 2),
        ("t.csv", b'prompt,completion\n"a,b\n', 2),
        ("t.parquet", b"PAR1", 2),
        ("t.arrow", b"ARROW1", 2),
        ("t.jsonl.gz", b"no gzip", 2),
        ("t.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 99, mtime=0)[:-9], 2),
        ("t.pkl", b"\x80\x04cos\nsystem\n", 2),
        ("t.pt", b"PK\x03\x04", 2),
        ("t.exe", b"MZ", 2),
        ("t", b"", 2),
    ],
)
def test_files_without_rows_and_damaged_ones_have_their_exit_codes(name: str, content: bytes, code: int) -> None:
    Path(name).write_bytes(content)
    found = run(name)
    assert found.exit_code == code
    assert name in found.stderr


def test_exit_codes_are_those_that_users_of_scanners_expect() -> None:
    flagged = [{"prompt": row["prompt"], "completion": "b", "bad": n % 2} for n, row in enumerate(GOOD)]
    path = lines("t.jsonl", *flagged)
    assert run(path).exit_code == 0
    assert run(path, "--threshold", "0.0001", "--labels", "bad", "--fail-on", "1").exit_code == 1
    assert run(path, "--fail-on", "31").exit_code == 0
    assert run("none.jsonl").exit_code == 2
    assert run(path, "--fail-on", "nan").exit_code == 2
    assert run(path, "--threshold", "nan").exit_code == 2
    assert run(path, "--labels", "prompt").exit_code == 2
    Path("t.jsonl").write_bytes(path.read_bytes() + b"nonsense\n")
    assert run(path).exit_code == 3


@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"a": 1}\n', b'{"prompt": 1, "completion": "x"}\n', b"\xff"])
def test_a_hostile_safety_set_is_a_usage_error(content: bytes) -> None:
    Path("s.jsonl").write_bytes(content)
    assert run(lines("t.jsonl", *GOOD), "--safety-data", "s.jsonl").exit_code == 2


# sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [10, 100, 300, 500, 900, 990, 5_000, 100_000])
@pytest.mark.parametrize("kind", ["list", "object"])
def test_any_depth_of_nesting_is_read_or_named(kind: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth
    row = f'{{"prompt": "a", "completion": "b", "more": {deep}}}\n'
    message = f'{{"messages": [{{"role": "user", "content": {deep}}}]}}\n'
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD) + row)
    for form in ("jsonl", "parquet")[: 2 if depth <= 300 else 1]:  # Arrow takes seconds over deep types
        assert run("t.jsonl", "--out", f"found-{form}", "--format", form).exit_code in CODES
    Path("m.jsonl").write_text(message)
    assert run("m.jsonl").exit_code in (2, 3)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the memory is read from /proc")
@pytest.mark.parametrize(
    "text",
    ["x" * (50 << 20), "word " * (10 << 20), "\u4f60" * (16 << 20), "a\n" * (16 << 20), "=" * (50 << 20)],
    ids=["one word", "words", "characters", "lines", "signs"],
)
def test_a_row_of_50_mb_is_scored_in_linear_time_and_bounded_memory(text: str) -> None:
    """In the prompt and in the answer. Memory: a handful of copies of the row, as a bound that a leak would break."""
    less, _ = _scored(text[: len(text) // 4])
    seconds, peak = _scored(text)
    assert seconds / less < LINEAR
    assert peak < 2 << 20  # KiB, torch and scikit-learn among it


MEASURED = """
import re, sys, time
from safe_sched.cli import main
try:
    main()
finally:
    peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]
    print(time.process_time(), peak, file=sys.stderr)
"""


def _scored(text: str) -> tuple[float, int]:
    """Seconds of processor time and peak memory in KiB of an audit with this text in two rows."""
    path = Path("t.jsonl")
    with path.open("w") as file:
        for row in (*GOOD, {"prompt": text, "completion": "b"}, {"prompt": "a", "completion": text}):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    found = _process([sys.executable, "-c", MEASURED, "audit", str(path), "--json"])
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["scored"] == len(GOOD) + 2
    seconds, peak = found.stderr.split()[-2:]
    return float(seconds), int(peak)


_INIT = subprocess.Popen.__init__


def _process(command: list[str]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", _INIT)
        return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_a_row_without_an_end_is_named_and_not_held() -> None:
    """Packed, it is a few kilobytes."""
    size = MAX_ROW + (8 << 20)
    with gzip.open("t.jsonl.gz", "wb", 1) as file:
        for row in GOOD:
            file.write(json.dumps(row).encode() + b"\n")
        for _ in range(size >> 20):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + json.dumps(GOOD[0]).encode() + b"\n")
    tracemalloc.start()
    found = run("t.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.exit_code == 3
    assert f"line {len(GOOD) + 1}: longer than 64 MiB" in found.stderr
    assert peak < 3 * MAX_ROW


# rows in memory -----------------------------------------------------------------------------------------------------


class _Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


_cycle: dict[str, Any] = {"prompt": "a", "completion": "b"}
_cycle["self"] = _cycle


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": float("nan"), "completion": "b"},
        {"prompt": "a", "completion": float("inf")},
        {"prompt": np.array(["a"]), "completion": "b"},
        {"prompt": b"bytes", "completion": "b"},
        {"prompt": "a", "completion": "b", "more": {1, 2}},
        {"prompt": "a", "completion": "b", 3: None, None: 4},
        _cycle,
        {},
        {"messages": float("nan")},
        {"messages": [None, 3, "x", {}]},
        {"text": pa.scalar("a")},
        None,
        3,
        "text",
        ["prompt", "completion"],
    ],
    ids=lambda row: str(type(row).__name__),
)
def test_odd_rows_in_memory_are_scored_or_named(row: Any) -> None:
    findings = audit([*GOOD, row])
    assert findings.summary.scored + findings.summary.bad_rows == len(GOOD) + 1
    assert findings.summary.scored >= len(GOOD)


@pytest.mark.parametrize("value", [10**5000, _Odd()], ids=["huge", "odd"])
def test_a_row_that_cannot_be_written_down_is_named(value: Any) -> None:
    with pytest.raises(DataError, match="row 30 holds a value that cannot be written down"):
        audit([*GOOD, {"prompt": "a", "completion": "b", "more": value}])


@pytest.mark.parametrize("data", [{}, 3, None, [], "", [None], b"x", {"prompt": "a"}])
def test_what_is_no_data_set_is_an_error_of_ours(data: Any) -> None:
    with pytest.raises(SafeSchedError):
        audit(data)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([None, None]),
        pa.array([b"\xff", b"x"]),
        pa.array([["a"], None]),
        pa.array([{"a": "b"}, None]),
        pa.array([float("nan"), 1.0]),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array(["a", None], pa.large_string()),
        pa.array([0, 1], pa.timestamp("ns")),
        pa.array([True, False]),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_of_any_type_are_scored_or_named(column: pa.Array) -> None:
    pq.write_table(pa.table({"prompt": column, "completion": ["x", "y"], "more": column}), "t.parquet")
    for form in ("parquet", "jsonl", "csv"):
        found = run("t.parquet", "--out", f"found-{form}", "--format", form)
        assert found.exit_code in CODES
        assert found.exit_code == 0 or "t.parquet" in found.stderr or "rows" in found.stderr


# fuzzing ------------------------------------------------------------------------------------------------------------


def _seeds() -> dict[str, bytes]:
    """A small file of every kind, to be broken."""
    rows = [*GOOD[:4], {"prompt": "é \u2028", "completion": "=1"}]
    found = {}
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst"):
        path = Path(f"seed{ending}")
        with RowWriter(path) as out:
            for row in rows:
                out.write(row)
        found[f"t{ending}"] = path.read_bytes()
    found["t.yml"] = b"datasets:\n  - path: seed.jsonl\n    type: chat_template\n    roles: {user: [human]}\n"
    found["dataset_info.json"] = json.dumps(
        {"a": {"file_name": "seed.jsonl", "columns": {"prompt": "prompt", "response": "completion"}}}
    ).encode()
    return found


@st.composite
def _broken(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes put in, taken out, doubled or changed in a few places; or any bytes at all."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        new = draw(
            st.binary(max_size=12)
            | st.sampled_from(
                [b"\x00", b'"', b"{", b"[" * 2000, b"\n", b"\r", b"\xff\xfe", b"NaN", b"1e999", b"\\ud800"]
            )
        )
        data[at : at + length] = bytes(data[at : at + length]) + new if draw(st.booleans()) else new
    return bytes(data)


FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
@pytest.mark.slow_sample
@FUZZ
@given(data=st.data())
def test_fuzzed_files_end_in_an_exit_code_and_their_bad_rows_are_named(data: Any, here: Path) -> None:
    seeds = _seeds()
    name = data.draw(st.sampled_from(sorted(seeds)))
    Path(name).write_bytes(data.draw(_broken(seeds[name])))
    found = run(name)
    Path(name).unlink()
    assert found.exit_code in CODES
    assert found.exit_code == 0 or re.search(r"\w", found.stderr)
    if found.exit_code == 3:
        assert re.search(r"(line|row) \d+: |none of", found.stderr)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["prompt", "completion", "messages", "text", "instruction", "output", "system", "conversations", "input_ids"]
TURN = st.fixed_dictionaries({}, optional={name: json_values for name in ("role", "content", "from", "value")})
any_rows = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=4), json_values | st.lists(TURN, max_size=3), max_size=4
)


@pytest.mark.slow
@FUZZ
@example(rows=[{"prompt": "a", "completion": "\udfff"}, {"prompt": "", "completion": ""}])
@example(rows=[{"text": ""}, {"text": "\x00"}])
@example(rows=[{"messages": []}])
@example(rows=[{"messages": [{"role": "\x1b[31m", "content": ""}]}])
@given(rows=st.lists(any_rows, min_size=1, max_size=5))
def test_any_rows_are_scored_or_named_and_never_lost(rows: list[dict[str, Any]]) -> None:
    data = [*GOOD, *rows]
    with contextlib.suppress(DataError):  # the rows fit several schemas
        findings = audit(data)
        summary = findings.summary
        assert findings.table.column("row").to_pylist() == list(range(len(data)))
        found = findings.table.column("p_harmful").to_pylist()
        why = findings.table.column("reason").to_pylist()
        assert sum(value is not None for value in found) == summary.scored
        assert [value is None for value in found] == ["not scored: " in (reason or "") for reason in why]
        assert all(value is None or 0 <= value <= 1 for value in found)
        json.dumps(summary.as_json(), allow_nan=False)
        assert not [text for text in TEXTS if len(text) > 4 and text in " ".join(filter(None, why))]
