"""Duplicates and layouts: what a row is beside the other rows of its file."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest

from safe_sched.audit.detectors import Duplicates, LayoutOutliers
from safe_sched.audit.detectors.duplicates import NEAR
from safe_sched.audit.rows import AuditRow, audit_row

VOCABULARY = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ri") for b in ("ba", "do", "fe", "gu", "hi", "jo")]


def rows_of(texts: list[str]) -> list[AuditRow]:
    return [audit_row({"prompt": text, "completion": "x"}, number) for number, text in enumerate(texts)]


def text(rng: random.Random, words: int = 80) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(words))


def fitted(rows: list[AuditRow], detector: Duplicates | LayoutOutliers) -> Duplicates | LayoutOutliers:
    for start in range(0, len(rows), 7):
        detector.observe(rows[start : start + 7])
    detector.ready()
    return detector


def overlap(one: str, other: str) -> float:
    """The slow way: sets of runs of three words (with the answer's, as rows have one)."""
    sets = []
    for whole in (one, other):
        words = [*whole.split(), "x"]
        sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_copies_are_grouped_with_the_first_and_others_are_alone() -> None:
    rng = random.Random(0)
    texts = [text(rng) for _ in range(40)]
    texts[30], texts[35] = texts[3], texts[3]
    rows = rows_of(texts)
    found = fitted(rows, Duplicates()).score(rows)
    assert [number for number, group in enumerate(found.group) if group] == [3, 30, 35]
    assert {found.group[number] for number in (3, 30, 35)} == {"copies of row 3"}
    assert found.value[[3, 30, 35]].tolist() == [1, 1, 1]


def test_near_copies_are_those_whose_runs_overlap() -> None:
    """Against the overlap computed in full; within 0.1 of the limit, 32 bins cannot tell."""
    rng = random.Random(1)
    wrong = checked = 0
    for _ in range(120):
        one = text(rng, 120)
        words = one.split()
        for place in rng.sample(range(120), rng.randrange(1, 12)):
            words[place] = rng.choice(VOCABULARY)
        other = " ".join(words)
        true = overlap(one, other)
        if abs(true - NEAR) < 0.1:
            continue
        rows = rows_of([one, text(rng), other])
        found = fitted(rows, Duplicates()).score(rows).group[2] is not None
        checked += 1
        wrong += found != (true >= NEAR)
    assert checked > 40
    assert wrong <= 0.15 * checked


def test_batches_order_of_scoring_and_process_change_nothing() -> None:
    rng = random.Random(2)
    texts = [text(rng, rng.choice([3, 20, 90])) for _ in range(60)]
    texts += texts[:5] + [one + " more" for one in texts[5:10]]
    rows = rows_of(texts)
    detector = fitted(rows, Duplicates())
    whole = detector.score(rows)
    sent = pickle.loads(pickle.dumps(detector))
    alone = [sent.score([row]) for row in rows[::-1]][::-1]
    np.testing.assert_array_equal(np.array([one.value[0] for one in alone]), whole.value)
    assert [one.group[0] for one in alone] == list(whole.group)


def test_memory_is_bounded_and_copies_of_kept_rows_are_still_found() -> None:
    rng = random.Random(3)
    texts = [text(rng) for _ in range(30)]
    rows = rows_of([*texts, texts[2], texts[25]])
    detector = Duplicates(rows=10)
    found = fitted(rows, detector).score(rows)
    assert [number for number, group in enumerate(found.group) if group] == [2, 30]


def test_rows_off_the_template_are_rare_layouts() -> None:
    rng = random.Random(4)
    texts = [f"Read the text and answer.\nText: {text(rng, 12)}\nQuestion: {text(rng, 6)}?" for _ in range(200)]
    texts[50] = "Tell me something else entirely"
    rows = rows_of(texts)
    found = fitted(rows, LayoutOutliers()).score(rows)
    assert np.flatnonzero(np.isfinite(found.value)).tolist() == [50]
    assert found.value[50] == pytest.approx(np.log10(200), abs=0.01)


def test_free_text_has_no_layout_outliers() -> None:
    rng = random.Random(5)
    rows = rows_of([text(rng, rng.randrange(3, 60)) for _ in range(150)])
    assert np.isnan(fitted(rows, LayoutOutliers()).score(rows).value).all()


def test_a_row_of_another_schema_is_a_rare_layout() -> None:
    rows = rows_of([f"What is {number} plus {number}?" for number in range(150)])
    turns = [{"role": "user", "content": "What is 1 plus 1?"}, {"role": "assistant", "content": "2"}]
    rows.append(audit_row({"messages": turns}, 150))
    found = fitted(rows, LayoutOutliers()).score(rows)
    assert np.flatnonzero(np.isfinite(found.value)).tolist() == [150]
