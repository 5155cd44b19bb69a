"""The audit as a pipeline: every row once, in its place, whatever it is read from and however it is cut."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_sched.audit import Evidence, Findings, audit, audit_row, passes
from safe_sched.audit.findings import COLUMNS
from safe_sched.data import RowWriter, open_rows
from safe_sched.data.export import export
from safe_sched.errors import DataError, OptionError, PluginError, StateError, UnscoredError
from tests.core.audited import WORD, Counts, Long, some_rows

ROWS = some_rows(300)


def run(data: Any, **options: Any) -> Findings:
    return audit(data, **({"detectors": [Counts(), Long()]} | options))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with RowWriter(path) as out:
        for row in rows:
            out.write(row)
    return path


# the table ----------------------------------------------------------------------------------------------------------


def test_every_row_has_its_line_with_the_detectors_own_numbers() -> None:
    """Against a loop over the rows, one by one."""
    findings = run(ROWS, shard_rows=64)
    slow = Counts()
    rows = [audit_row(row, number) for number, row in enumerate(ROWS)]
    slow.observe(rows)
    slow.ready()
    table = findings.table
    assert table.column_names == [name for name, _ in COLUMNS] + ["word", "long"]
    assert table.column("row").to_pylist() == list(range(300))
    assert table.column("where").to_pylist() == [f"row {number}" for number in range(300)]
    np.testing.assert_array_equal(table.column("word").to_numpy(), np.float32([slow.value(row) for row in rows]))
    lengths = [len(row["prompt"].split()) for row in ROWS]
    assert table.column("long").to_pylist() == [float(n) if n >= 10 else None for n in lengths]
    flagged = [WORD in row["prompt"] for row in ROWS]
    assert table.column("is_harmful_issue").to_pylist() == flagged
    assert table.column("group").to_pylist() == ["with the word" if one else None for one in flagged]
    for place, line in enumerate(table.to_pylist()):
        assert line["p_low"] <= line["p_harmful"] <= line["p_high"]
        assert line["weight"] == pytest.approx(1 - line["p_harmful"])
        told = (line["reason"] or "").split("; ")
        assert ("long" in told) == (lengths[place] >= 10)
        assert told[0].startswith("the word is there ") == flagged[place]


def test_the_summary_counts_what_is_in_the_table() -> None:
    findings = run(ROWS)
    summary, chances = findings.summary, findings.table.column("p_harmful").to_numpy()
    assert (summary.rows, summary.scored, summary.bad_rows, summary.coverage) == (300, 300, 0, 1.0)
    assert summary.flagged == 30
    assert summary.expected_share.value == pytest.approx(chances.mean(), abs=1e-6)
    assert summary.expected_share.low <= 0.1 <= summary.expected_share.high + 1e-3
    told = [(signal.name, signal.kind, signal.said) for signal in summary.signals]
    assert told[0] == ("word", "harm", 30)
    assert told[1][:2] == ("long", "quality")
    json.dumps(summary.as_json(), allow_nan=False)


@given(cut=st.integers(1, 90), count=st.integers(1, 80))
@settings(max_examples=20, deadline=None)
def test_how_the_rows_are_cut_into_shards_changes_nothing(cut: int, count: int) -> None:
    whole = run(ROWS[:count]).table
    assert run(ROWS[:count], shard_rows=cut).table.equals(whole)


class Sees(Counts):
    """Its value depends on the rows beside it: what a detector must not do."""

    def score(self, rows: Any) -> Evidence:
        found = super().score(rows)
        return Evidence(found.value + len(rows), found.reasons, found.group)


def test_the_cut_is_seen_where_a_detector_is_not_pure() -> None:
    """Control of the test above."""
    assert not run(ROWS, detectors=[Sees()], shard_rows=64).table.equals(run(ROWS, detectors=[Sees()]).table)


def test_detectors_see_every_row_once_before_they_are_fitted() -> None:
    one = Counts()
    run(ROWS, detectors=[one], shard_rows=7)
    assert one.numbers == list(range(300))


def test_a_limit_is_the_file_cut_there() -> None:
    findings = run(ROWS, limit=50)
    assert findings.table.equals(run(ROWS[:50]).table)
    assert findings.summary.limited == 50


def test_what_stands_behind_a_limit_is_not_looked_at(tmp_path: Path) -> None:
    """Also where the schema is decided by rows from behind it, and where it ends just before a bad line."""
    file = write(tmp_path / "rows.jsonl", ROWS[:20])
    with open(file, "a") as more:
        more.write("no row\n")
    write(tmp_path / "more.jsonl", ROWS[20:40])
    for limit in (5, 20):
        summary = run([file, tmp_path / "more.jsonl"], limit=limit).summary
        assert (summary.rows, summary.bad_rows, summary.coverage) == (limit, 0, 1.0)
    summary = run([file, tmp_path / "more.jsonl"], limit=21).summary  # control: behind it stands a row that is wanted
    assert (summary.rows, summary.bad_rows) == (21, 1)


class Overlaps(Counts):
    """Not all rows with the word stand above all others."""

    def value(self, row: Any) -> float:
        return super().value(row) + 3 * math.sin(row.number)


def test_a_sample_for_the_calibration_does_not_depend_on_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(ROWS, detectors=[Overlaps()]).table
    monkeypatch.setattr(passes, "SAMPLE", 70)
    some = run(ROWS, detectors=[Overlaps()]).table
    assert not some.equals(whole)  # control: it is a sample
    for cut in (7, 64):
        assert run(ROWS, detectors=[Overlaps()], shard_rows=cut).table.equals(some)


def test_all_labels_count_in_a_large_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SAMPLE", 70)
    labels = [int(WORD in row["prompt"]) if number % 2 else None for number, row in enumerate(ROWS)]
    assert run(ROWS, labels=labels).summary.calibration == "isotonic regression on 150 labelled rows"


class Ends:
    """Rows of which fewer are there when they are scored; the first look is whether they can be read twice."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Any:
        self.times += 1
        return iter(ROWS if self.times <= 2 else ROWS[:200])


def test_a_file_that_got_shorter_is_noticed_also_between_two_shards() -> None:
    with pytest.raises(StateError, match="the input changed while it was read"):
        run(Ends(), shard_rows=50)


class Asks(Counts):
    """What a model says: of the first row, that it is harmful; and nothing in words."""

    name = "asks"
    absolute: ClassVar[bool] = True

    def score(self, rows: Any) -> Evidence:
        nothing = [None] * len(rows)
        return Evidence(np.array([9.0 if row.number == 0 else -9.0 for row in rows], np.float32), nothing, nothing)

    def known(self) -> np.ndarray:
        return np.linspace(8, 10, 60, dtype=np.float32)

    def known_harmless(self) -> np.ndarray:
        return np.linspace(-10, -8, 60, dtype=np.float32)


def test_a_row_that_a_model_alone_speaks_against_says_so() -> None:
    """Control: the signal that the row's score owes most to, which its probability does not."""
    found = run(ROWS, detectors=[Counts(), Asks()]).table.slice(0, 1).to_pylist()[0]
    assert (found["is_harmful_issue"], found["reason"]) == (True, "high asks")
    assert not run(ROWS, detectors=[Counts()]).table["is_harmful_issue"][0].as_py()


def test_labels_of_rows_that_cannot_be_read_are_not_missed(tmp_path: Path) -> None:
    rows = [{**row, "harmful": int(WORD in row["prompt"])} for row in ROWS]
    rows[7] = {"id": 7}
    findings = run(write(tmp_path / "rows.jsonl", rows), labels="harmful")
    assert findings.summary.calibration == "isotonic regression on 299 labelled rows"
    assert findings.summary.scored == 299


# what is read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "jsonl.zst"])
def test_every_kind_of_file_gives_the_same_numbers(ending: str, tmp_path: Path) -> None:
    findings = run(write(tmp_path / f"rows.{ending}", ROWS))
    assert findings.table.drop_columns(["where"]).equals(run(ROWS).table.drop_columns(["where"]))
    if ending == "jsonl":
        assert findings.table.column("where")[11].as_py() == f"{tmp_path}/rows.jsonl, line 12"


def test_several_files_are_one_input(tmp_path: Path) -> None:
    parts = [write(tmp_path / "a.jsonl", ROWS[:120]), write(tmp_path / "b.csv", ROWS[120:])]
    findings = run(parts)
    assert findings.table.drop_columns(["where"]).equals(run(ROWS).table.drop_columns(["where"]))
    assert findings.summary.sources == tuple(map(str, parts))


def test_what_can_be_read_once_is_kept_for_the_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(ROWS).table.drop_columns(["where"])
    assert run(iter(ROWS)).table.drop_columns(["where"]).equals(whole)
    data = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS) + b"{\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    findings = run("-")
    assert findings.table.drop_columns(["where"]).equals(whole)
    assert findings.table.column("where")[0].as_py() == "standard input, line 1"
    assert [bad.where for bad in findings.summary.bad] == ["standard input, line 301"]


def test_what_cannot_be_read_is_named_and_the_rest_is_scored(tmp_path: Path) -> None:
    """Lines that are no rows have no place in the table; rows of another schema keep theirs, without numbers."""
    lines = [json.dumps(row) for row in ROWS]
    lines[5:5] = ['{"a": ', '{"id": 7, "question": "what?"}', '{"prompt": 3, "completion": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    findings = run(tmp_path / "rows.jsonl")
    summary = findings.summary
    assert (summary.rows, summary.scored, summary.bad_rows) == (302, 300, 3)
    assert summary.coverage == pytest.approx(300 / 303)
    assert [bad.where.rpartition("/")[2] for bad in summary.bad] == [f"rows.jsonl, line {n}" for n in (6, 7, 8)]
    for place in (5, 6):
        line = findings.table.slice(place, 1).to_pylist()[0]
        assert line["reason"].startswith("not scored: a row has the fields")
        assert {line[name] for name in ("p_harmful", "p_low", "is_harmful_issue", "weight", "word")} == {None}
    rest = findings.table.filter(pa.array([n not in (5, 6) for n in range(302)]))
    assert rest.column("word").equals(run(ROWS).table.column("word"))


def test_rows_of_several_schemas_ask_for_one() -> None:
    rows = [{**row, "text": row["prompt"]} for row in ROWS]
    with pytest.raises(DataError, match="the rows fit several schemas: 'prompt_completion' or 'text'. Name the one"):
        run(rows)
    assert run(rows, schema="prompt_completion").table.equals(run(ROWS).table)


def test_files_without_rows_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty.jsonl: no rows in it"):
        run(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text("{\n[\n")
    with pytest.raises(UnscoredError, match="none of 0 rows could be scored; the first: .*bad.jsonl, line 1"):
        run(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="which are no schema that is known"):
        run([{"a": 1}])


def test_a_file_that_changes_between_the_passes_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)

    class Meddles(Counts):
        def ready(self) -> None:
            super().ready()
            write(path, [*ROWS[:100], {**ROWS[100], "prompt": "another"}, *ROWS[101:]])

    with pytest.raises(StateError, match="the input changed while it was read"):
        run(path, detectors=[Meddles()])


# labels -------------------------------------------------------------------------------------------------------------


def test_with_labels_the_probability_is_the_share_of_labelled_rows_with_that_score() -> None:
    """Every other row with the word is labelled harmless: so a row with the word is harmful with probability 1/2."""
    rows = some_rows(2000)
    harmful = [WORD in row["prompt"] and number % 20 == 9 for number, row in enumerate(rows)]
    findings = run(rows, labels=[bool(one) if number % 3 else None for number, one in enumerate(harmful)])
    chances = findings.table.column("p_harmful").to_numpy()
    word = np.array([WORD in row["prompt"] for row in rows])
    assert chances[~word].max() < 0.01
    assert chances[word].mean() == pytest.approx(0.5, abs=0.05)
    assert findings.summary.calibration == "isotonic regression on 1333 labelled rows"
    columns = [
        {**row, "harmful": str(int(one)) if n % 3 else ""}
        for n, (row, one) in enumerate(zip(rows, harmful, strict=True))
    ]
    again = run(columns, labels="harmful", schema="prompt_completion")
    assert again.table.column("p_harmful").equals(findings.table.column("p_harmful"))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([1] * 10, "there are 10 labels, and more rows"),
        (["maybe"] * 300, "row 0 has the label 'maybe'; allowed: 0, 1, or None"),
        ([2] * 300, "row 0 has the label '2'"),
        ("harmful", "row 0 has no column 'harmful'"),
        ([1] * 5 + [0] * 5 + [None] * 290, "10 rows have a label, 5 of them harmful; needed: at least 20"),
        ([0] * 300, "300 rows have a label, 0 of them harmful"),
        ([None] * 300, "labels= was given, and no row has a label"),
        ([0, 1] * 200, "there are 400 labels for 300 rows"),
    ],
)
def test_labels_that_cannot_be_used(labels: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        run(ROWS, labels=labels)


# options, detectors -------------------------------------------------------------------------------------------------


def test_without_a_signal_of_harm_there_is_nothing_to_say() -> None:
    with pytest.raises(OptionError, match="none of the detectors is of kind 'harm'"):
        run(ROWS, detectors=[Long()])


def test_a_model_beside_detectors_is_not_left_out_in_silence() -> None:
    with pytest.raises(OptionError, match="model='a model' asks a model, and detectors= leaves its signals out"):
        run(ROWS, model="a model")


@pytest.mark.parametrize("threshold", [0, -1, 1.1, math.nan, "high"])
def test_a_threshold_is_a_probability(threshold: Any) -> None:
    with pytest.raises(OptionError, match="allowed: a number above 0 and at most 1, or 'auto'"):
        run(ROWS, threshold=threshold)


def test_rows_are_flagged_from_the_threshold_on() -> None:
    chances = run(ROWS).table.column("p_harmful").to_numpy()
    least = float(np.sort(chances)[-10])
    assert run(ROWS, threshold=least).summary.flagged == np.count_nonzero(chances >= np.float32(least))


class Odd(Counts):
    def __init__(self, value: Any, reasons: int) -> None:
        super().__init__()
        self._value, self._reasons = value, reasons

    def score(self, rows: Any) -> Evidence:
        return Evidence(np.full(len(rows), self._value, np.float32), [None] * self._reasons, [None] * len(rows))


def test_a_detector_that_breaks_its_word_is_named() -> None:
    with pytest.raises(PluginError, match="'word' gave \\(300,\\) values, 2 reasons and 300 groups for 300 rows"):
        run(ROWS, detectors=[Odd(0, 2)])
    with pytest.raises(PluginError, match="'word' gave an infinite value"):
        run(ROWS, detectors=[Odd(math.inf, 300)])
    endless = Counts()
    endless.known = lambda: np.array([1.0, math.inf], np.float32)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PluginError, match="'word' gave known rows of the shape \\(2,\\), or an infinite value"):
        run(ROWS, detectors=[endless])
    with pytest.raises(OptionError, match="two detectors are named 'word'"):
        run(ROWS, detectors=[Counts(), Counts()])
    taken = Counts()
    taken.name = "weight"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PluginError, match="is named 'weight'; allowed"):
        run(ROWS, detectors=[taken])


def test_rows_of_which_no_signal_speaks_are_not_scored() -> None:
    class Shy(Counts):
        def value(self, row: Any) -> float:
            return math.nan if row.number % 2 else super().value(row)

    summary = run(ROWS, detectors=[Shy()]).summary
    assert (summary.rows, summary.scored, summary.coverage) == (300, 150, 0.5)


def test_the_function_is_found_whatever_of_its_package_is_imported_first() -> None:
    """The package is named like the function; in a new process, where nothing is imported yet."""
    script = """
from safe_sched.audit.findings import COLUMNS
from safe_sched.audit import AuditRow, Detector
from safe_sched import audit
import safe_sched
assert audit is safe_sched.audit
assert audit.__module__ == "safe_sched.audit.run"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_findings_can_be_exported(tmp_path: Path) -> None:
    findings = run(ROWS)
    found = export(ROWS, tmp_path / "kept.jsonl", table=findings.table, threshold=0.5, removed=tmp_path / "gone.jsonl")
    assert (found.kept, found.removed) == (270, 30)
    assert all(WORD in row["prompt"] for row in open_rows(tmp_path / "gone.jsonl"))
