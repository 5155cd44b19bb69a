"""A prior in a column of the training set: it goes with its rows, through a trainer and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from safe_sched import BDS, Antibody, Fixed
from safe_sched.errors import DataError, OptionError, StateError
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.columns import read_prior
from tests.support import make_hf, make_sft, parameters_of, single_thread, text_rows, token_rows

COLUMN = "safe_sched.p_harmful"
P = [round(0.05 + 0.07 * i, 2) for i in range(12)]
ROWS = [{**row, COLUMN: p} for row, p in zip(text_rows(12), P, strict=True)]


def trained(folder: Path, rows: Any = ROWS, scheduler: Any = None, prior: Any = COLUMN, make: Any = make_sft, **o: Any):
    safety = None if scheduler is None else text_rows(6, seed=8)
    callback = SafeSchedCallback(scheduler or Fixed(), prior=prior, safety_data=safety)
    resume = o.pop("resume", None)
    trainer = make(folder, rows, callbacks=[callback], **{"max_steps": 3} | o)
    with single_thread():
        trainer.train(resume_from_checkpoint=resume)
    return callback, parameters_of(trainer.model)


def by_key(callback: SafeSchedCallback) -> dict[int, float]:
    table = callback.table()
    return dict(zip(table["key"].to_pylist(), table["weight"].to_pylist(), strict=True))


def test_every_row_has_the_number_that_stands_beside_it(tmp_path: Path) -> None:
    """In whatever order the trainer holds the rows, and where it drops some."""
    plain, _ = trained(tmp_path / "a")
    assert plain.table()["weight"].to_pylist() == pytest.approx([1 - p for p in P])
    shuffled, _ = trained(tmp_path / "b", shuffle_dataset=True)
    assert shuffled.table()["key"].to_pylist() != plain.table()["key"].to_pylist()
    assert by_key(shuffled) == by_key(plain)
    fewer, _ = trained(tmp_path / "c", [row for i, row in enumerate(ROWS) if i % 3])
    assert by_key(fewer).items() < by_key(plain).items()


def test_rows_of_tokens_have_it_as_well(tmp_path: Path) -> None:
    tokens = [{**row, "p": p} for row, p in zip(token_rows(12), P, strict=True)]
    found, _ = trained(tmp_path, tokens, prior="p", make=make_hf)
    assert found.table()["weight"].to_pylist() == pytest.approx([1 - p for p in P])


def test_training_begins_with_it(tmp_path: Path) -> None:
    """Equal numbers train the model that none train, bit for bit; others do not."""
    equal = [{**row, COLUMN: 0.3} for row in ROWS]
    runs = [(equal, None), (equal, COLUMN), (ROWS, COLUMN)]
    plain, same, other = (trained(tmp_path / str(i), rows, BDS(), prior)[1] for i, (rows, prior) in enumerate(runs))
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_resume_with_another_one_stops(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path / "whole", scheduler=BDS(evidence=None), **options)
    saved = str(tmp_path / "whole" / "checkpoint-2")
    other = [{**row, COLUMN: 1 - row[COLUMN]} for row in ROWS]
    for rows, prior in ((ROWS, None), (other, COLUMN)):
        with pytest.raises(StateError, match="prior: saved"):
            trained(tmp_path / "other", rows, BDS(evidence=None), prior, resume=saved)


@pytest.mark.parametrize(
    ("rows", "prior", "options", "match"),
    [
        (ROWS, "p_harmfull", {}, r"has the columns .*'safe_sched.p_harmful'.*but not 'p_harmfull'"),
        (ROWS, COLUMN, {"packing": True, "max_length": 64}, "Packing drops every column but"),
        ([*ROWS[:-1], {**ROWS[-1], COLUMN: None}], COLUMN, {}, r"1 of 12 training rows have no probability.*row 11"),
        ([{**row, COLUMN: str(row[COLUMN])} for row in ROWS], COLUMN, {}, "row 0 of the training set has '0.05'"),
        ([{**row, COLUMN: 7.0} for row in ROWS], COLUMN, {}, "allowed: a number from 0 to 1"),
    ],
)
def test_no_run_begins_without_a_number_for_every_row(rows, prior, options, match, tmp_path) -> None:
    with pytest.raises(DataError, match=match):
        trained(tmp_path, rows, prior=prior, **options)


def test_a_stream_has_no_prior() -> None:
    with pytest.raises(DataError, match="this one is a stream"):
        read_prior(Dataset.from_list(ROWS).to_iterable_dataset(), COLUMN)


@pytest.mark.parametrize(
    ("scheduler", "prior", "match"),
    [
        (Antibody(), COLUMN, "'antibody' takes no prior; use BDS"),
        (BDS(), [0.1, 0.2], "prior is a list; allowed: the name of a column.*add_column"),
    ],
)
def test_what_can_never_be_a_prior_is_refused_at_once(scheduler, prior, match) -> None:
    with pytest.raises(OptionError, match=match):
        SafeSchedCallback(scheduler, safety_data="core", prior=prior)
