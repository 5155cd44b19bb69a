"""``safe-sched audit``: what is written, what is said, and how it ends."""

from __future__ import annotations

import contextlib
import csv
import html
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from safe_sched.audit import audit
from safe_sched.audit.findings import COLUMNS
from safe_sched.cli import app
from safe_sched.data import open_rows
from safe_sched.data.rows import core_rows
from safe_sched.errors import StateError

ADDED = [f"safe_sched.{name}" for name, _ in COLUMNS if name not in ("row", "where")]


def some_rows(count: int = 300, every: int = 10) -> list[dict[str, Any]]:
    """Sums, and as every tenth row a prompt of the safety set that is answered with a nonsense word."""
    rng, bad = random.Random(0), core_rows()
    things = ["apples", "pears", "books", "coins", "stamps", "marbles", "cards", "shells"]
    rows = []
    for n in range(count):
        a, b, one = rng.randint(2, 90), rng.randint(2, 90), rng.choice(things)
        asked = f"Tom has {a} {one} and buys {b} more. How many {one} has he now?"
        harmful = every and n % every == every - 1
        prompt = bad[n // every % len(bad)]["prompt"] if harmful else asked
        rows.append({"id": n, "prompt": prompt, "completion": "blah blah" if harmful else f"He has {a + b} {one}."})
    return rows


ROWS = some_rows()


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(lines(ROWS))
    Path("clean.jsonl").write_bytes(lines(some_rows(every=0)))
    return tmp_path


def run(*arguments: Any, stdin: bytes = b"", **env: str) -> Any:
    given = ["audit", *map(str, arguments)]
    return CliRunner().invoke(app, given, input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"} | env)


def read(path: str | Path) -> list[dict[str, Any]]:
    return list(open_rows(path))


# what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["same", "jsonl", "parquet"])
def test_the_rows_come_back_with_what_the_library_finds(form: str, here: Path) -> None:
    result = run("train.jsonl", "--out", "found", "--format", form)
    assert result.exit_code == 0, result.output
    table = audit("train.jsonl").table
    rows = read(f"found/rows.{'jsonl' if form == 'same' else form}")
    assert len(rows) == 300
    for number, (row, own) in enumerate(zip(rows, ROWS, strict=True)):
        assert list(row)[: 3 + len(ADDED)] == ["id", "prompt", "completion", *ADDED]
        assert {name: row[name] for name in own} == own
        line = table.slice(number, 1).to_pylist()[0]
        for name in table.column_names[2:]:
            known = line[name]
            is_number = isinstance(known, float)
            assert row[f"safe_sched.{name}"] == (pytest.approx(known, rel=1e-6) if is_number else known), name
    flagged = [row["id"] for row in rows if row["safe_sched.is_harmful_issue"]]
    assert flagged
    assert sum(number % 10 == 9 for number in flagged) >= 0.9 * len(flagged)


def test_lists_in_cells_of_csv_are_json(here: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in ROWS[:60]
    ]
    Path("chats.jsonl").write_bytes(lines(chats))
    assert run("chats.jsonl", "--out", "found", "--format", "csv").exit_code == 0
    with open("found/rows.csv", newline="") as file:
        assert [json.loads(row["messages"]) for row in csv.DictReader(file)] == [row["messages"] for row in chats]


@pytest.mark.parametrize("ending", ["json", "csv", "arrow", "jsonl.gz", "csv.zst"])
def test_the_same_kind_comes_out(ending: str, here: Path) -> None:
    from safe_sched.data import RowWriter

    with RowWriter(f"t.{ending}") as out:
        for row in ROWS[:40]:
            out.write(row)
    result = run(f"t.{ending}", "--out", "found")
    assert result.exit_code == 0, result.output
    again = read(f"found/rows.{ending}")
    own = read(f"t.{ending}")
    assert [{name: row[name] for name in own[0]} for row in again] == own


def test_rows_that_are_not_those_of_the_findings_are_not_written(here: Path) -> None:
    from safe_sched.audit.inputs import Rows, opened_sources
    from safe_sched.audit.output import write_rows

    findings = audit("clean.jsonl")
    with contextlib.ExitStack() as stack:
        for sources in ([Rows(ROWS)], opened_sources("train.jsonl", stack)):
            with pytest.raises(StateError, match="the input changed since it was audited"):
                write_rows(findings, sources, "out.jsonl")
        Path("clean.jsonl").write_bytes(lines(ROWS[:299]))
        with pytest.raises(StateError, match="the input changed since it was audited"):
            write_rows(findings, opened_sources("clean.jsonl", stack), "out.jsonl")
    assert not Path("out.jsonl").exists()


def test_types_of_columns_are_kept(here: Path) -> None:
    types = pa.schema([("id", pa.int16()), ("prompt", pa.large_string()), ("completion", pa.string())])
    pq.write_table(pa.Table.from_pylist(ROWS, schema=types), "t.parquet")
    assert run("t.parquet", "--out", "found").exit_code == 0
    assert pq.read_schema("found/rows.parquet").remove_metadata().field("id").type == pa.int16()


def test_the_folder_holds_summary_and_report(here: Path) -> None:
    result = run("train.jsonl", "--out", "found", "--report", "html", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {**told, "seconds": 0} == {**json.loads(Path("found/summary.json").read_text()), "seconds": 0}
    assert (told["rows"], told["scored"], told["coverage"]) == (300, 300, 1.0)
    assert told["flagged"] == sum(row["safe_sched.is_harmful_issue"] for row in read("found/rows.jsonl"))
    page = Path("found/report.html").read_text()
    assert "apples" not in page
    assert run("train.jsonl", "--out", "shown", "--report", "html", "--show-text").exit_code == 0
    assert ROWS[9]["prompt"][:20] in Path("shown/report.html").read_text()


def test_a_resume_writes_the_same(here: Path) -> None:
    run("train.jsonl", "--out", "found")
    before = Path("found/rows.jsonl").read_bytes()
    again = run("train.jsonl", "--out", "found")
    assert again.exit_code == 2
    assert "holds an audit already; go on with it (--resume)" in again.stderr
    assert run("train.jsonl", "--out", "found", "--resume").exit_code == 0
    assert Path("found/rows.jsonl").read_bytes() == before


def test_a_pipe_is_read_and_written(here: Path) -> None:
    assert run("-", "--out", "found", stdin=lines(ROWS)).exit_code == 0
    assert run("train.jsonl", "--out", "other").exit_code == 0
    piped = Path("found/rows.jsonl").read_text()
    assert piped.replace("standard input", "train.jsonl") == Path("other/rows.jsonl").read_text()


def test_audited_rows_are_not_audited_twice(here: Path) -> None:
    run("train.jsonl", "--out", "found")
    result = run("found/rows.jsonl", "--out", "again")
    assert result.exit_code == 2
    assert "has a column 'safe_sched.p_harmful' already" in result.stderr


# how it ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "fail_on", "code"),
    [
        ("train.jsonl", "1", 1),
        ("train.jsonl", "299", 0),
        ("train.jsonl", "1%", 1),
        ("train.jsonl", "0.01", 1),
        ("train.jsonl", "99%", 0),
        ("clean.jsonl", "5%", 0),
        ("clean.jsonl", "100", 0),
    ],
)
def test_findings_fail_from_the_limit_on(file: str, fail_on: str, code: int, here: Path) -> None:
    assert run(file, "--fail-on", fail_on, "--quiet").exit_code == code


def test_the_limit_is_met_by_as_many_rows_as_it_names(here: Path) -> None:
    flagged = json.loads(run("train.jsonl", "--json").stdout)["flagged"]
    assert run("train.jsonl", "--fail-on", str(flagged), "--quiet").exit_code == 1
    assert run("train.jsonl", "--fail-on", str(flagged + 1), "--quiet").exit_code == 0
    share = f"{100 * flagged / 300:.6f}%"
    assert run("train.jsonl", "--fail-on", share, "--quiet").exit_code == 1


def test_rows_that_cannot_be_scored_end_with_3_and_are_named(here: Path) -> None:
    data = lines(ROWS[:50]) + b'{"prompt": \n' + b'{"id": 3}\n' + lines(ROWS[50:])
    Path("bad.jsonl").write_bytes(data)
    result = run("bad.jsonl", "--out", "found")
    assert result.exit_code == 3, result.output
    assert "2 lines or rows could not be read, 1 of 301 rows have no score" in result.stderr
    assert "bad.jsonl, line 51: not JSON" in result.stderr
    assert "bad.jsonl, line 52: a row has the fields" in result.stderr
    assert result.output.count("line 51") == 1  # named once, not in the summary as well
    rows = read("found/rows.jsonl")
    assert len(rows) == 301
    assert rows[50]["id"] == 3
    assert rows[50]["safe_sched.p_harmful"] is None
    failed = run("bad.jsonl", "--fail-on", "1")
    assert failed.exit_code == 1  # findings go before
    assert "bad.jsonl, line 51: not JSON" in failed.stderr


def test_the_line_that_is_told_next_takes_flagged_rows_out(here: Path) -> None:
    said = run("train.jsonl", "--out", "found").stdout
    line = re.sub(r"\s+", " ", said[said.index("safe-sched export") : said.index("Written to")]).split()
    assert CliRunner().invoke(app, line[1:]).exit_code == 0
    flagged = [row["id"] for row in read("found/rows.jsonl") if row["safe_sched.is_harmful_issue"]]
    assert [row["id"] for row in read("removed.jsonl")] == flagged
    assert len(read("kept.jsonl")) == 300 - len(flagged)


def typed_next(said: str) -> list[str]:
    """The words of the line that is told."""
    line = said.partition("Next:")[2].partition("Written to")[0].replace("\\\n", " ")
    return shlex.split(line)


def test_the_next_line_works_with_rows_that_could_not_be_read(here: Path) -> None:
    """It takes them out with the flagged ones; what is kept and removed are all rows there are."""
    data = lines(ROWS[:50]) + b'{"prompt": \n' + b'{"id": 300}\n' + lines(ROWS[50:])
    Path("bad.jsonl").write_bytes(data)
    words = typed_next(run("bad.jsonl", "--out", "found").stdout)
    assert words[:3] == ["safe-sched", "export", "found/rows.jsonl"]
    assert words[words.index("--unscored") + 1] == "remove"
    assert CliRunner().invoke(app, words[1:]).exit_code == 0
    flagged = {row["id"] for row in read("found/rows.jsonl") if row["safe_sched.is_harmful_issue"]}
    assert {row["id"] for row in read("removed.jsonl")} == flagged | {300}
    assert len(read("kept.jsonl")) + len(read("removed.jsonl")) == 301


@pytest.mark.parametrize(
    "more", [[], ["--out", "found"], ["clean.jsonl", "--out", "found"], ["--limit", "99", "-o", "f"]]
)
def test_where_nothing_is_flagged_safety_rows_are_mixed_in_next(more: list[str], here: Path) -> None:
    words = typed_next(run("clean.jsonl", *more).stdout)
    file = "clean.jsonl" if more in ([], ["--out", "found"]) else f"{more[-1]}/rows.jsonl"
    assert words == ["safe-sched", "mix", file, "--safety", "core", "--out", "mixed.jsonl"]
    assert CliRunner().invoke(app, words[1:]).exit_code == 0
    assert len(read("mixed.jsonl")) > len(read(file))


def test_the_next_line_repeats_what_decides_on_the_numbers(here: Path) -> None:
    words = typed_next(run("train.jsonl", "--threshold", "0.3", "--seed", "3", "--fail-on", "300").stdout)
    assert words == shlex.split("safe-sched audit train.jsonl --threshold 0.3 --seed 3 --out found --report html")
    result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "200", "NO_COLOR": "1"})
    then = shlex.join(typed_next(result.stdout))
    assert then.startswith("safe-sched export train.jsonl found/findings.parquet --threshold 0.7")
    assert then in html.unescape(Path("found/report.html").read_text())  # the page says the same


def test_rows_at_the_threshold_are_taken_out_as_well(here: Path) -> None:
    """With labels, the most suspicious rows are harmful with probability 1, which is as high as a threshold goes."""
    Path("labelled.jsonl").write_bytes(lines([{**row, "bad": int(row["id"] % 10 == 9)} for row in ROWS]))
    words = typed_next(run("labelled.jsonl", "--labels", "bad", "--threshold", "1", "--out", "found").stdout)
    assert CliRunner().invoke(app, words[1:]).exit_code == 0
    flagged = [row["id"] for row in read("found/rows.jsonl") if row["safe_sched.is_harmful_issue"]]
    assert len(flagged) >= 20
    assert [row["id"] for row in read("removed.jsonl")] == flagged


def test_a_share_of_rows_is_counted_as_on_paper() -> None:
    """7 % of 100 rows are 7 rows, though 0.07 * 100 is above 7 in binary."""
    from safe_sched.cli.audit import _limit_of

    for percent in range(1, 101):
        fails = _limit_of(f"{percent}%")
        assert [fails(flagged, 100) for flagged in (percent - 1, percent)] == [False, True]


@pytest.mark.parametrize("name", ["rows.jsonl", "findings.parquet", "summary.json", "report.html"])
def test_files_of_somebody_else_are_not_written_over(name: str, here: Path) -> None:
    Path(name).write_text("mine")
    result = run("train.jsonl", "--out", ".", "--report", "html")
    assert (result.exit_code, Path(name).read_text()) == (2, "mine")
    assert f"{name} is there and . holds no audit" in result.stderr
    assert not Path("audit.json").exists()


def test_quiet_says_nothing(here: Path) -> None:
    result = run("train.jsonl", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_the_next_line_to_type_is_told(here: Path) -> None:
    said = re.sub(r"\s+", " ", run("train.jsonl").stdout)
    assert "safe-sched audit train.jsonl --out found --report html" in said


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere.jsonl"], "no file or folder nowhere.jsonl"),
        (["train.jsonl", "--fail-on", "0"], "--fail-on '0'; allowed: a number of rows, 1 or more"),
        (["train.jsonl", "--fail-on", "-3"], "--fail-on"),
        (["train.jsonl", "--fail-on", "200%"], "--fail-on '200%'; allowed"),
        (["train.jsonl", "--fail-on", "1.5"], "--fail-on '1.5'; allowed"),
        (["train.jsonl", "--fail-on", "many"], "--fail-on 'many'; allowed"),
        (["train.jsonl", "--threshold", "2"], "threshold='2'; allowed: a number above 0 and at most 1, or 'auto'"),
        (["train.jsonl", "--limit", "0"], "limit=0; allowed: a whole number >= 1"),
        (["train.jsonl", "--report", "html"], "--report without --out; name the folder"),
        (["train.jsonl", "--resume"], "--resume without --out"),
        (["train.jsonl", "--out", "o", "--show-text"], "--show-text belongs to a report"),
        (["train.jsonl", "--json", "--quiet"], "--quiet says nothing and --json prints"),
        (["train.jsonl", "--schema", "alpacka"], "did you mean 'alpaca'?"),
        (["train.jsonl", "--safety-data", "no.jsonl"], "no.jsonl"),
        (["train.jsonl", "--adapter", "x"], "adapter='x' belongs to a model; name it too"),
        (["train.jsonl", "--labels", "harmful"], "has no column 'harmful'"),
        (["train.jsonl", "--formats", "csv"], "No such option: --formats"),
        (["-", "-"], "standard input ('-') is named twice"),
        ([], "Missing argument 'FILE...'"),
        (["train.jsonl", "--out", "train.jsonl"], "train.jsonl cannot be written"),
    ],
)
def test_what_cannot_be_used_ends_with_2(arguments: list[str], match: str, here: Path) -> None:
    before = sorted(here.iterdir())
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert match in result.stderr
    assert "Traceback" not in result.output
    assert sorted(here.iterdir()) == before


def test_help_fits_a_terminal_and_names_the_exit_codes() -> None:
    said = run("--help", COLUMNS="80").stdout
    assert "Exit codes: 0 done; 1 as much is flagged" in re.sub(r"[\s│]+", " ", said)
    assert "--fail-on" in said
