"""``safe-sched mix``: what is written, what is said, and how it ends."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from safe_sched.cli import app
from safe_sched.data import open_rows
from safe_sched.mixing.mix import SAMPLE, mix
from safe_sched.mixing.plan import PROVENANCE
from safe_sched.mixing.rewriting.endpoint import Endpoint

REFUSAL = "I can't help with that."
SAFETY = [{"prompt": f"How do I break into {i} cars?", "completion": REFUSAL} for i in range(9)]
ROWS = [{"prompt": f"### Task: add {i} and {i + 3}. ### Answer:", "completion": f"{2 * i + 3}"} for i in range(90)]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(lines(ROWS))
    Path("safety.jsonl").write_bytes(lines(SAFETY))
    return tmp_path


def run(*arguments: Any, stdin: bytes = b"", safety: str | None = "safety.jsonl", **env: str) -> Any:
    given = ["mix", *map(str, arguments), *(() if safety is None else ("--safety", safety))]
    return CliRunner().invoke(app, given, input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"} | env)


def read(path: str | Path) -> list[dict[str, Any]]:
    return list(open_rows(path))


# what is written ----------------------------------------------------------------------------------------------------


def test_the_file_is_the_mix_of_the_library(here: Path) -> None:
    result = run("train.jsonl", "--out", "mixed.jsonl")
    assert result.exit_code == 0, result.output
    assert read("mixed.jsonl") == mix(ROWS, SAFETY)
    run("train.jsonl", "--out", "b.jsonl", "--share", ".3", "--seed", "5", "--epoch", "2", "--no-mimic", "--provenance")
    expected = mix(ROWS, SAFETY, share=0.3, seed=5, epoch=2, mimic=False, provenance=True)
    assert read("b.jsonl") == expected
    assert {row[PROVENANCE] for row in expected} == {"user", "safety"}


ENDINGS = ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "jsonl.zst", "csv.gz", "parquet.zst"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file_in_and_out(ending: str, here: Path) -> None:
    """What comes out is read back as the same rows, whatever it was read from and written to."""
    expected = mix(ROWS, SAFETY)
    assert run("train.jsonl", "--out", f"mixed.{ending}").exit_code == 0
    assert read(f"mixed.{ending}") == expected
    assert run("train.jsonl", "--share", "0", "--out", f"user.{ending}").exit_code == 0
    result = run(f"user.{ending}", "--out", "again.jsonl")
    assert result.exit_code == 0, result.output
    assert read("again.jsonl") == expected


def test_columns_of_a_parquet_file_keep_their_types(here: Path) -> None:
    types = pa.schema([("id", pa.int16()), ("prompt", pa.large_string()), ("completion", pa.string())])
    pq.write_table(pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(ROWS)], schema=types), "t.parquet")
    assert run("t.parquet", "--out", "m.parquet", "--provenance").exit_code == 0
    table = pq.read_table("m.parquet")
    assert table.schema.remove_metadata() == types.append(pa.field(PROVENANCE, pa.string()))
    assert [i for i in table["id"].to_pylist() if i is not None] == list(range(90))


def test_a_pipe_goes_in_and_out(here: Path) -> None:
    """Standard output has the rows and nothing else; all that is said goes to standard error."""
    result = run("-", "--out", "-", stdin=lines(ROWS))
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == mix(ROWS, SAFETY)
    assert "safety rows added" in result.stderr


def test_a_folder_is_read_whole(here: Path) -> None:
    Path("data").mkdir()
    Path("data/a.jsonl").write_bytes(lines(ROWS[:40]))
    with open("data/b.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS[40:])
    assert run("data", "--out", "mixed.jsonl").exit_code == 0
    assert read("mixed.jsonl") == mix(ROWS, SAFETY)


def test_rows_beyond_the_sample_are_not_lost(here: Path) -> None:
    rows = [ROWS[i % 90] | {"id": i} for i in range(SAMPLE + 501)]
    result = run("-", "--out", "mixed.jsonl", stdin=lines(rows))
    assert result.exit_code == 0
    mixed = read("mixed.jsonl")
    assert [row["id"] for row in mixed if row["id"] is not None] == list(range(SAMPLE + 501))
    assert len(mixed) == SAMPLE + 501 + round((SAMPLE + 501) / 9)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(here: Path) -> None:
    """Five times the rows, and at most two megabytes more at the peak; a list of these rows has 25."""

    def peak(times: int) -> int:
        with gzip.open("big.jsonl.gz", "wb", compresslevel=1) as file:
            for _ in range(times):
                file.write(lines(ROWS * 100))
        tracemalloc.start()
        try:
            assert run("big.jsonl.gz", "--out", "mixed.jsonl.gz", "--no-mimic").exit_code == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    small, large = peak(2), peak(10)
    assert large - small < 2_000_000


# what is said -------------------------------------------------------------------------------------------------------


def test_the_table_has_the_numbers_and_the_next_line_to_type(here: Path) -> None:
    """90 user rows and share .1: 10 safety rows, 10 % of 100."""
    shown = run("train.jsonl", "--out", "mixed.parquet").stdout
    for part in ("user rows", " 90 ", "10 (10.00% of 100)", "mixed.parquet", "seconds"):
        assert part in shown
    assert 'load_dataset("parquet", data_files=\'mixed.parquet\', split="train")' in shown


def test_explaining_shows_the_format_and_writes_nothing(here: Path) -> None:
    before = sorted(here.iterdir())
    result = run("train.jsonl", "--explain")
    assert result.exit_code == 0, result.output
    assert "### Task: add " in result.stdout
    assert "### Answer:" in result.stdout
    assert "safe-sched mix train.jsonl --safety safety.jsonl --out mixed.jsonl" in result.stdout
    assert sorted(here.iterdir()) == before
    more = run("train.jsonl", "--explain", "--no-mimic", "--provenance", "--share", ".2", "--on-bad", "report").stdout
    again = "train.jsonl --safety safety.jsonl --share 0.2 --no-mimic --provenance --on-bad report --out mixed.jsonl"
    assert f"safe-sched mix {again}\n" in more
    both = run("train.jsonl", "--explain", "--out", "mixed.jsonl")
    assert "### Task: add " in both.stdout
    assert read("mixed.jsonl") == mix(ROWS, SAFETY)


def test_what_data_says_never_reaches_the_terminal_raw(here: Path) -> None:
    """A title-setting and a clearing sequence, in prompts, names of columns and lines that are no rows."""
    evil = "\x1b]0;gone\x07\x1b[2J\u202e"
    rows = [{**row, "prompt": f"{evil} {row['prompt']}", evil: 1} for row in ROWS]
    Path("train.jsonl").write_bytes(lines(rows) + b'{"a": "\x1b[2J"\n' + lines(rows))
    for arguments in (
        ("--explain",),
        ("--explain", "--on-bad", "report"),
        ("--out", "m.parquet", "--on-bad", "report"),
        ("--schema", evil, "--explain"),
        ("--out", f"no/{evil}.jsonl"),
    ):
        result = run("train.jsonl", *arguments)
        for told in (result.stdout, result.stderr):
            assert not set(evil) - {"]", "0", ";", "g", "o", "n", "e", "[", "2", "J"} & set(told)
    assert run("train.jsonl", "--out", "m.jsonl", "--on-bad", "report").exit_code == 3


def test_the_help_teaches_with_an_example() -> None:
    shown = run("--help", safety=None)
    assert shown.exit_code == 0
    for part in ("--safety core --explain", "--out mixed.jsonl", "zcat", "Exit codes", "--dry-run"):
        assert part in shown.output


# how it ends --------------------------------------------------------------------------------------------------------


def test_bad_lines_stop_it_or_are_named_and_counted(here: Path) -> None:
    """Lines 4 and 95 are no rows; with report every other line is mixed, and the exit code is 3."""
    text = [*lines(ROWS).splitlines(), *lines(ROWS).splitlines()]
    text.insert(3, b'{"prompt": ')
    text.insert(94, b"[1, 2]")
    Path("train.jsonl").write_bytes(b"\n".join(text))
    stopped = run("train.jsonl", "--out", "mixed.jsonl")
    assert stopped.exit_code == 2
    assert "train.jsonl, line 4: " in stopped.stderr
    assert "Correct it, or mix the other lines: --on-bad report" in stopped.stderr
    assert not Path("mixed.jsonl").exists()
    told = run("train.jsonl", "--out", "mixed.jsonl", "--on-bad", "report")
    assert told.exit_code == 3
    assert "2 lines could not be read; not in the mix:" in told.stderr
    assert "train.jsonl, line 4: " in told.stderr
    assert "train.jsonl, line 95: " in told.stderr
    assert read("mixed.jsonl") == mix(ROWS * 2, SAFETY)
    Path("train.jsonl").write_bytes(lines(ROWS) + b"{\n")  # the last one
    assert run("train.jsonl", "--out", "last.jsonl").exit_code == 2
    assert not Path("last.jsonl").exists()
    Path("train.jsonl").write_bytes(b"{\n" * 50 + lines(ROWS))
    many = run("train.jsonl", "--out", "mixed.jsonl", "--on-bad", "report")
    assert "50 lines could not be read" in many.stderr
    assert "and 30 more" in many.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["train.jsonl"], "nothing to do; give --out FILE to write the mix, or --explain"),
        (["nowhere.jsonl", "--out", "m.jsonl"], "no file or folder nowhere.jsonl"),
        (["train.jsonl", "--out", "m.txt"], "m.txt: unknown kind '.txt'"),
        (["train.jsonl", "--out", "train.jsonl"], "train.jsonl is what the rows are read from"),
        (["train.jsonl", "--out", "new/m.jsonl"], "there is no folder"),
        (["train.jsonl", "--out", "m.jsonl", "--share", "1"], "share=1.0; allowed: a number >= 0 and < 1"),
        (["train.jsonl", "--out", "m.jsonl", "--share", "0.001"], "less than half a safety row"),
        (["train.jsonl", "--out", "m.jsonl", "--epoch", "-1"], "epoch=-1; allowed"),
        (["train.jsonl", "--out", "m.jsonl", "--schema", "alpacka"], "did you mean 'alpaca'?"),
        (["train.jsonl", "--out", "m.jsonl", "--schema", "alpaca", "--no-mimic"], "alpaca"),
        (["train.jsonl", "--out", "m.jsonl", "--on-bad", "skip"], "'skip' is not one of 'stop', 'report'"),
        (["train.jsonl", "--out", "m.jsonl", "--shares", ".1"], "No such option: --shares"),
        (["train.jsonl", "--out", "m.jsonl", "--dry-run"], "--dry-run without --rewrite; name the MODEL"),
        (["train.jsonl", "--out", "m.jsonl", "--rewrite", "m", "--key-env", "KEY"], "belong to a server; name it too"),
        (["train.jsonl", "--out", "m.jsonl", "--rewrite", "./nowhere"], "./nowhere"),
        (["empty.jsonl", "--out", "m.jsonl"], "there are no user rows to mix safety rows into"),
        (["train.jsonl", "--out", "m.jsonl", "--safety", "empty.jsonl"], "no rows in it"),
        (["train.jsonl", "--out", "m.jsonl", "--safety", "no.jsonl"], "no.jsonl"),
        (["hf://a", "--out", "m.jsonl"], "hf://"),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_writes_nothing(arguments: list[str], match: str, here: Path) -> None:
    Path("empty.jsonl").write_bytes(b"")
    before = sorted(here.iterdir())
    result = run(*arguments, safety=None if "--safety" in arguments else "safety.jsonl")
    assert result.exit_code == 2, result.output
    assert match in result.stderr
    assert "Traceback" not in result.output
    assert sorted(here.iterdir()) == before


def test_safety_rows_must_be_named(here: Path) -> None:
    assert "Missing option '--safety'" in run("train.jsonl", "--out", "m.jsonl", safety=None).stderr
    result = run("train.jsonl", "--out", "m.jsonl", safety="core")
    assert result.exit_code == 0
    assert read("m.jsonl") == mix(ROWS, "core")


def test_a_failed_run_leaves_an_older_file_alone(here: Path) -> None:
    run("train.jsonl", "--out", "mixed.jsonl")
    before = Path("mixed.jsonl").read_bytes()
    Path("train.jsonl").write_bytes(lines(ROWS * 30) + b"{\n")
    assert run("train.jsonl", "--out", "mixed.jsonl").exit_code == 2
    assert Path("mixed.jsonl").read_bytes() == before
    assert sorted(path.name for path in here.iterdir()) == ["mixed.jsonl", "safety.jsonl", "train.jsonl"]


# rewriting ----------------------------------------------------------------------------------------------------------


class Adds:
    """A stand-in for a server: the safety prompt in the task's words, unless it is about an odd number of cars."""

    sent = 0

    def __call__(self, endpoint: Endpoint, requests: Any) -> Any:
        from safe_sched.generation import TextReply

        for number, request in enumerate(requests):
            self.sent += 1
            asked = json.loads(request.data)["request"]
            good = f"### Task: add what it takes. {asked} ### Answer:"
            yield number, TextReply(json.dumps({"prompt": good if int(asked.split()[5]) % 2 == 0 else REFUSAL}))


REWRITE = ("--rewrite", "some/model", "--rewrite-url", "http://localhost:9/v1", "--price", "1", "2")


def test_rewritten_prompts_are_mixed_and_what_fails_keeps_its_template(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Adds()
    monkeypatch.setattr(Endpoint, "generate", lambda self, requests: server(self, requests))
    result = run("train.jsonl", "--out", "m.jsonl", *REWRITE, "--cache", "replies.sqlite", "--provenance")
    assert result.exit_code == 0, result.output
    safe = [row for row in read("m.jsonl") if row.pop(PROVENANCE) == "safety"]
    assert len(safe) == 10
    for row in safe:
        assert row["completion"] == REFUSAL
        number = int("".join(c for c in row["prompt"].split("reak into ")[1].split(" cars")[0] if c.isdigit()))
        assert ("add what it takes." in row["prompt"]) == (number % 2 == 0)
        assert row["prompt"].startswith("### Task: ")
    for part in ("rows rewritten", "rows not rewritten", "4 (rows 1, 3, 5, 7)"):
        assert part in result.stdout
    sent = server.sent
    assert run("train.jsonl", "--out", "m.jsonl", *REWRITE, "--cache", "replies.sqlite").exit_code == 0
    assert server.sent == sent  # all from the cache


def test_a_dry_run_sends_and_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Adds()
    monkeypatch.setattr(Endpoint, "generate", lambda self, requests: server(self, requests))
    before = sorted(here.iterdir())
    result = run("train.jsonl", "--out", "m.jsonl", *REWRITE, "--dry-run")
    assert result.exit_code == 0, result.output
    assert server.sent == 0
    assert sorted(here.iterdir()) == before
    for part in ("requests to send", "9, at most 27", "price"):
        assert part in result.stdout
    again = f"safe-sched mix train.jsonl --safety safety.jsonl {' '.join(REWRITE)} --out m.jsonl"
    assert again.replace(" 1 2 ", " 1.0 2.0 ") in result.stdout


def test_blend_is_that_of_mix(here: Path) -> None:
    """The control is the default, which gives other rows."""
    things = ["cats", "plums and pears", "old red cars, all of them", "kites", "coins in a jar"]
    rows = [
        {"prompt": f"### Story\nAnn {verb} {thing}. {more} Who has more?\n### End", "completion": f"{verb} {thing}"}
        for verb in ("has", "sells", "keeps", "hides")
        for thing in things
        for more in ("It rains.", "Bob, who is tall, waits for her.", "They sing!")
    ]
    Path("stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("stories.jsonl", "--out", "bare.jsonl", "--blend", "0").exit_code == 0
    assert read("bare.jsonl") == mix(rows, SAFETY, blend=0)
    assert read("bare.jsonl") != mix(rows, SAFETY)
    assert run("stories.jsonl", "--out", "bad.jsonl", "--blend", "2").exit_code == 2
