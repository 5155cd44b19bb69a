"""Weights in files: every row comes out once, with the weight that it was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from safe_sched import Fixed
from safe_sched.cli import app
from safe_sched.data import export, open_rows
from safe_sched.data.export import Exported
from safe_sched.data.export import export as write_weights
from safe_sched.data.rows import read_rows
from safe_sched.errors import DataError, OptionError
from safe_sched.mixing import SCHEMAS, detect
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import keys_of, layout_of
from safe_sched.training.session import Session
from tests.core.batches import laws
from tests.core.test_schemas import ROWS as EVERY_SCHEMA

ROWS = [{"prompt": f"p{i}", "completion": "c", "meta": {"n": i}} for i in range(5)]
WEIGHTS = [0.1, 1.7, 0.0, 0.25, 1.0]


def load(path: Path) -> list[dict[str, Any]]:
    return list(open_rows(path))


def table(weights: Any = WEIGHTS, **columns: Any) -> pa.Table:
    """As `Session.table` makes it."""
    count = len(weights)
    own = {"row": pa.array(range(count), pa.int64()), "key": pa.array(range(count), pa.uint64())}
    return pa.table(own | {"weight": pa.array(weights, pa.float32())} | columns)


# every row with its weight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz"])
def test_a_row_keeps_what_it_has_and_its_weight_comes_behind(ending, tmp_path):
    found = write_weights(ROWS, tmp_path / f"out{ending}", weights=WEIGHTS)
    assert json.dumps(load(tmp_path / f"out{ending}")) == json.dumps(
        [{**row, "weight": weight} for row, weight in zip(ROWS, WEIGHTS, strict=True)]
    )
    assert found == Exported(rows=5, kept=5, removed=0, mean=pytest.approx(3.05 / 5))


@pytest.mark.parametrize("schema", list(SCHEMAS))
def test_rows_of_every_schema_stay_in_it(schema, tmp_path):
    rows = [row for name, row, _, _ in EVERY_SCHEMA if name == schema]
    write_weights(rows, tmp_path / "out.jsonl", weights=[0.5] * len(rows))
    written = load(tmp_path / "out.jsonl")
    assert detect(written) == schema
    assert json.dumps(written) == json.dumps([{**row, "weight": 0.5} for row in rows])


@pytest.mark.parametrize(
    "given_weights",
    [
        WEIGHTS,
        tuple(WEIGHTS),
        np.array(WEIGHTS),
        np.array(WEIGHTS, dtype=np.float32),
        torch.tensor(WEIGHTS),
        torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True),
        pa.array(WEIGHTS),
        pa.chunked_array([pa.array(WEIGHTS[:2], pa.float32()), pa.array(WEIGHTS[2:], pa.float32())]),
    ],
    ids=["list", "tuple", "double", "single", "tensor", "tensor of doubles", "arrow", "chunks"],
)
def test_weights_may_be_any_array_and_single_precision_is_written_in_short(given_weights, tmp_path):
    """0.1 in single precision is 0.10000000149 in double: the number is written that names the single one."""
    write_weights(ROWS, tmp_path / "out.jsonl", weights=given_weights)
    assert [row["weight"] for row in load(tmp_path / "out.jsonl")] == WEIGHTS


@laws
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8))
def test_a_weight_that_is_written_reads_back_as_the_very_number(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("out") / "out.jsonl"
    write_weights([{"text": "a"}] * len(weights), path, weights=torch.tensor(weights))
    again = torch.tensor([row["weight"] for row in load(path)], dtype=torch.float32)
    assert torch.equal(again, torch.tensor(weights, dtype=torch.float32))


def test_an_exported_file_gives_its_weights_to_a_run(tmp_path):
    """A session's table, to a file, to `Fixed`: the same weights for the same rows."""
    ids = torch.arange(15).reshape(5, 3) + 5
    index = RowIndex(keys_of(ids, ids, layout_of(ids)))
    session = Session(Fixed(WEIGHTS), index)
    write_weights(ROWS, tmp_path / "out.parquet", table=session.table())
    again = Session(Fixed(values=[row["weight"] for row in read_rows(tmp_path / "out.parquet")]), index)
    assert torch.equal(again.row_weights(), session.row_weights())
    assert not torch.equal(session.row_weights(), Session(Fixed(WEIGHTS[::-1]), index).row_weights())  # control


def test_a_table_may_be_in_any_order_and_its_rows_say_which_is_which(tmp_path):
    shuffled = table().take(pa.array([3, 1, 4, 0, 2]))
    write_weights(ROWS, tmp_path / "out.jsonl", table=shuffled)
    assert [row["weight"] for row in load(tmp_path / "out.jsonl")] == WEIGHTS


def test_a_probability_of_being_harmful_is_what_the_weight_lacks_to_one(tmp_path):
    write_weights(ROWS[:3], tmp_path / "out.jsonl", p_harmful=[0.0, 0.25, 1.0])
    assert [row["weight"] for row in load(tmp_path / "out.jsonl")] == [1.0, 0.75, 0.0]


# rows under a threshold -----------------------------------------------------------------------------------------------


@laws
@given(weights=st.lists(st.floats(0, 2), max_size=12), threshold=st.floats(0, 2))
def test_kept_and_removed_rows_together_are_all_rows_in_their_order(weights, threshold, tmp_path_factory):
    """Derived by going through the rows one by one; a weight at the threshold is kept."""
    folder = tmp_path_factory.mktemp("out")
    rows = [{"text": f"row {i}"} for i in range(len(weights))]
    found = write_weights(
        rows, folder / "kept.jsonl", weights=weights, threshold=threshold, removed=folder / "removed.jsonl"
    )
    kept, removed = load(folder / "kept.jsonl"), load(folder / "removed.jsonl")
    weighed = [{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)]
    assert kept == [row for row in weighed if row["weight"] >= threshold]
    assert [{n: v for n, v in row.items() if n != "reason"} for row in removed] == [r for r in weighed if r not in kept]
    assert (found.rows, found.kept, found.removed) == (len(rows), len(kept), len(removed))


def test_the_reason_says_what_is_known_of_a_row(tmp_path):
    chances = {
        f"p_harmful{end}": pa.array([v] * 5, pa.float32()) for end, v in (("", 0.9), ("_low", 0.8), ("_high", 0.95))
    }
    for columns, told in (
        ({}, "weight 0.1 is under the threshold 0.2"),
        (chances, "weight 0.1 is under the threshold 0.2; harmful with probability 0.9 (90 % interval 0.8 to 0.95)"),
    ):
        write_weights(
            ROWS, tmp_path / "k.jsonl", table=table(**columns), threshold=0.2, removed=tmp_path / "r.jsonl",
            reasons=[None, None, "asks for a weapon", None, None],
        )  # fmt: skip
        first, second = load(tmp_path / "r.jsonl")
        assert first["reason"] == told
        assert second["reason"].startswith("asks for a weapon; weight 0 is under")


def test_columns_of_a_parquet_file_keep_their_types(tmp_path):
    source = pa.table({"text": ["a", "b"], "n": pa.array([1, 2], pa.int32())})
    pq.write_table(source, tmp_path / "in.parquet")
    for name in ("kept", "removed"):
        write_weights(
            tmp_path / "in.parquet", tmp_path / "kept.parquet", weights=[1, 0], threshold=0.5,
            removed=tmp_path / "removed.parquet",
        )  # fmt: skip
        schema = pq.read_schema(tmp_path / f"{name}.parquet")
        assert [schema.field(column).type for column in ("n", "weight")] == [pa.int32(), pa.float64()]


# weights that rows have -----------------------------------------------------------------------------------------------


def test_a_row_with_a_weight_is_an_error_until_the_two_are_multiplied(tmp_path):
    rows = [
        {"text": "a", "weight": 0.5, "id": 1},
        {"text": "b"},
        {"text": "c", "weight": None},
        {"text": "d", "weight": "2"},
    ]
    with pytest.raises(DataError, match="row 0 has a column 'weight' already; multiply=True multiplies the two"):
        write_weights(rows, tmp_path / "out.jsonl", weights=[0.5] * 4)
    write_weights(rows, tmp_path / "out.jsonl", weights=[0.5] * 4, multiply=True)
    written = load(tmp_path / "out.jsonl")
    assert [row["weight"] for row in written] == [0.25, 0.5, 0.5, 1.0]
    assert list(written[0]) == ["text", "weight", "id"]


@pytest.mark.parametrize("own", ["heavy", float("nan"), -1, [1], 1e308])
def test_a_weight_of_its_own_that_is_none_is_an_error(own, tmp_path):
    with pytest.raises(DataError, match=r"row 0 has the weight .*; allowed: a finite number >= 0, or None for 1"):
        write_weights([{"text": "a", "weight": own}], tmp_path / "out.jsonl", weights=[1e10], multiply=True)


def test_whole_numbers_as_weights_in_a_parquet_file_become_products(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "weight": [1]}), tmp_path / "in.parquet")
    write_weights(tmp_path / "in.parquet", tmp_path / "out.parquet", weights=[0.5], multiply=True)
    assert load(tmp_path / "out.parquet") == [{"text": "a", "weight": 0.5}]


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": WEIGHTS[:4]}, "there are more rows than the 4 weights; give one weight per row"),
        ({"weights": [*WEIGHTS, 1.0]}, "there are 6 weights for 5 rows"),
        ({"weights": [1, 1, float("nan"), 1, 1]}, r"weight number 2 is nan \(1 such in all\); allowed: a finite"),
        ({"weights": [1, -0.5, 1, 1, -1]}, r"weight number 1 is -0.5 \(2 such in all\)"),
        ({"weights": pa.array([1, None, 1, 1, 1])}, "weight number 1 is nan"),
        ({"weights": ["a"] * 5}, "weights are no numbers"),
        ({"weights": [WEIGHTS]}, r"weights has the shape \(1, 5\)"),
        ({"weights": 1.0}, r"weights has the shape \(\)"),
        ({"p_harmful": [0, 0, 0, 0, 1.1]}, "probability number 4 is 1.1 .*allowed: a number from 0 to 1"),
        ({"table": table().drop_columns("weight")}, "the table has the columns row, key, but not weight"),
        ({"table": table().set_column(0, "row", [[0, 1, 2, 3, 3]])}, "the table's rows are not 0 to 4, each once"),
        ({"table": table(WEIGHTS[:4])}, "there are more rows than the 4 weights"),
        ({"weights": WEIGHTS, "reasons": ["x"]}, "1 reasons for 5 weights"),
    ],
)
def test_weights_that_do_not_fit_the_rows_are_an_error_and_nothing_is_written(options, match, tmp_path):
    with pytest.raises(DataError, match=match):
        write_weights(ROWS, tmp_path / "k.jsonl", threshold=0.2, removed=tmp_path / "r.jsonl", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "was given no weights; give one of weights, table, p_harmful"),
        ({"weights": WEIGHTS, "p_harmful": WEIGHTS}, "was given weights and p_harmful; give one of"),
        ({"weights": WEIGHTS, "threshold": 0.5}, "say where they go with removed="),
        ({"weights": WEIGHTS, "removed": "r.jsonl"}, "give threshold="),
        ({"weights": WEIGHTS, "removed": "r.jsonl", "threshold": float("nan")}, "threshold=nan; allowed"),
        ({"weights": WEIGHTS, "removed": "r.jsonl", "threshold": -1}, "threshold=-1; allowed"),
        ({"weights": WEIGHTS, "removed": "./k.jsonl", "threshold": 1}, "would both go to k.jsonl"),
    ],
)
def test_options_that_do_not_go_together_are_an_error(options, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=match):
        write_weights(ROWS, "k.jsonl", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_has_a_reason_cannot_be_given_another(tmp_path):
    rows = [{"text": "a", "reason": "mine"}, {"text": "b", "reason": "mine"}]
    with pytest.raises(DataError, match="row 1 has a column 'reason' already; rename it"):
        write_weights(rows, tmp_path / "k.jsonl", weights=[1, 0], threshold=0.5, removed=tmp_path / "r.jsonl")
    assert list(tmp_path.iterdir()) == []
    write_weights(rows, tmp_path / "k.jsonl", weights=[1, 0])  # nothing to be removed, nothing in the way


def test_a_bad_line_stops_the_export_since_the_weights_behind_it_would_be_those_of_other_rows(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\nbroken\n{"text": "c"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        write_weights(tmp_path / "in.jsonl", tmp_path / "k.jsonl", weights=[1, 1])
    with pytest.raises(DataError, match="row 1 is a str"):
        write_weights([{"text": "a"}, "b"], tmp_path / "k.jsonl", weights=[1, 1])  # pyright: ignore[reportArgumentType]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_training_file_is_not_written_over(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    for name in ("out", "removed"):
        paths = {"out": tmp_path / "out.jsonl", "removed": tmp_path / "r.jsonl"} | {name: tmp_path / "in.jsonl"}
        with pytest.raises(OptionError, match="is what the rows are read from"):
            write_weights(tmp_path / "in.jsonl", paths["out"], weights=[1], threshold=0.5, removed=paths["removed"])
    assert (tmp_path / "in.jsonl").read_text() == '{"text": "a"}\n'


def test_a_lost_row_would_be_noticed(tmp_path, monkeypatch):
    """Negative control: a writer that counts no removed rows."""
    monkeypatch.setattr(export, "RowWriter", Forgetful := type("Forgetful", (export.RowWriter,), {}))
    Forgetful.rows = property(lambda self: 0, lambda self, value: None)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Exception, match="0 rows kept and 0 removed of 5"):
        write_weights(ROWS, tmp_path / "k.jsonl", weights=WEIGHTS)
    assert list(tmp_path.iterdir()) == []


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_function_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(table(), "w.parquet")
    command = ["export", "in.jsonl", "w.parquet", "--out", "k.jsonl", "--threshold", "0.2", "--removed", "r.jsonl"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0
    assert "3, in k.jsonl" in found.stderr
    assert "2, in r.jsonl" in found.stderr
    assert found.stdout == ""
    assert [row["prompt"] for row in load(Path("k.jsonl"))] == ["p1", "p3", "p4"]
    assert [row["prompt"] for row in load(Path("r.jsonl"))] == ["p0", "p2"]


def test_the_command_says_what_is_wrong_and_leaves_with_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(table(), "w.parquet")
    for command, match in (
        (["in.jsonl", "w.parquet", "--out", "k.jsonl"], "there are 5 weights for 1 rows"),
        (["in.jsonl", "in.jsonl", "--out", "k.jsonl"], "no weights in in.jsonl"),
        (["none.jsonl", "w.parquet", "--out", "k.jsonl"], "no file or folder none.jsonl"),
    ):
        found = CliRunner().invoke(app, ["export", *command])
        assert found.exit_code == 2
        assert match in found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "w.parquet"]


# findings of an audit -------------------------------------------------------------------------------------------------


def findings(p: list[float | None]) -> pa.Table:
    """As `safe_sched.audit` makes them: null where a row could not be scored."""
    return pa.table(
        {
            "row": pa.array(range(len(p)), pa.int64()),
            "where": [f"t.jsonl, line {i + 1}" for i in range(len(p))],
            "p_harmful": pa.array(p, pa.float32()),
            "p_low": pa.array(p, pa.float32()),
            "p_high": pa.array(p, pa.float32()),
            "weight": pa.array([None if one is None else 1 - one for one in p], pa.float32()),
            "reason": [None if one is not None and one < 0.5 else "looks bad" if one else "not scored: x" for one in p],
        }
    )


FOUND = findings([0.1, None, 0.9, 0.2, None])


def test_rows_without_a_score_are_named_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError, match=r"2 of 5 rows have no weight.*\(t.jsonl, line 2, t.jsonl, line 5\).*unscored="):
        write_weights(ROWS, tmp_path / "out.jsonl", table=FOUND)
    assert list(tmp_path.iterdir()) == []


def test_rows_without_a_score_are_kept_where_that_is_asked_for(tmp_path):
    """With the weight 1, also under a threshold that is higher."""
    kept, gone = tmp_path / "kept.jsonl", tmp_path / "gone.jsonl"
    write_weights(ROWS, kept, table=FOUND, unscored="keep")
    assert [row["weight"] for row in load(kept)] == [0.9, 1.0, 0.1, 0.8, 1.0]
    write_weights(ROWS, kept, table=FOUND, unscored="keep", threshold=1.2, removed=gone)
    assert [row["prompt"] for row in load(kept)] == ["p1", "p4"]


@pytest.mark.parametrize(("threshold", "removed"), [(None, ["p1", "p4"]), (0.5, ["p1", "p2", "p4"])])
def test_rows_without_a_score_are_removed_with_their_reason(threshold, removed, tmp_path):
    kept, gone = tmp_path / "kept.jsonl", tmp_path / "gone.jsonl"
    write_weights(ROWS, kept, table=FOUND, unscored="remove", threshold=threshold, removed=gone)
    assert [row["prompt"] for row in load(gone)] == removed
    assert len(load(kept)) == 5 - len(removed)
    reasons = {row["prompt"]: row["reason"] for row in load(gone)}
    assert reasons["p1"] == "not scored: x"
    if threshold:
        told = "looks bad; weight 0.1 is under the threshold 0.5; harmful with probability 0.9"
        assert reasons["p2"] == f"{told} (90 % interval 0.9 to 0.9)"


def test_a_weight_that_is_no_number_is_not_taken_for_one_without_a_score(tmp_path):
    with pytest.raises(DataError, match="weight number 0 is nan"):
        write_weights(ROWS, tmp_path / "out.jsonl", table=table([float("nan"), *WEIGHTS[1:]]), unscored="keep")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unscored": "remove"}, r"say where they go with removed="),
        ({"unscored": "drop"}, "unknown choice for unscored rows 'drop'"),
    ],
)
def test_choices_for_rows_without_a_score_that_say_too_little(options, match, tmp_path):
    with pytest.raises(OptionError, match=match):
        write_weights(ROWS, tmp_path / "out.jsonl", table=FOUND, **options)


def test_the_command_takes_the_findings_of_an_audit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(FOUND, "findings.parquet")
    asked = ["export", "t.jsonl", "findings.parquet", "--out", "kept.jsonl"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 2
    assert "t.jsonl, line 2" in found.stderr
    assert CliRunner().invoke(app, [*asked, "--unscored", "remove", "--removed", "gone.jsonl"]).exit_code == 0
    assert [row["prompt"] for row in load(Path("gone.jsonl"))] == ["p1", "p4"]
