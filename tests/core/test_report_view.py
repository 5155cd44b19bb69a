"""What a report shows: groups, order, histogram, correlations; each against a slow count."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safe_sched.errors import DataError
from safe_sched.report.charts import histogram_chart, interval_chart, matrix_chart
from safe_sched.report.view import (
    BINS,
    FILL,
    correlations,
    groups,
    histogram,
    separation,
    shown_rows,
    standing,
    view_of,
)
from tests.core.reports import findings_of

CHANCES = st.lists(st.none() | st.floats(0, 1, width=32), min_size=1, max_size=40)


@settings(deadline=None)
@given(CHANCES)
def test_rows_are_in_order_of_flag_then_chance_then_number(p):
    view = view_of(findings_of(p))

    def key(row: int) -> tuple[bool, bool, float, int]:
        one = p[row]
        return one is None or one < 0.5, one is None, 0.0 if one is None else -one, row

    assert view.order.tolist() == sorted(range(len(p)), key=key)


@settings(deadline=None)
@given(CHANCES)
def test_the_histogram_counts_every_scored_row_once(p):
    every, flagged = histogram(view_of(findings_of(p)))
    scored = [one for one in p if one is not None]
    assert (int(every.sum()), int(flagged.sum())) == (len(scored), sum(one >= 0.5 for one in scored))
    assert len(every) == BINS
    assert int(every[0]) == sum(np.float32(one) < 1 / BINS for one in scored)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.none() | st.floats(0, 1, width=32), st.sampled_from([None, "a", "b", "c"])), max_size=30),
    st.integers(0, 3),
)
def test_groups_are_those_that_a_slow_count_finds(rows, seed):
    p = [one for one, _ in rows]
    found = findings_of(
        p,
        groups={i: name for i, (_, name) in enumerate(rows) if name},
        signals={"only": np.random.default_rng(seed).random(len(rows))},
    )
    expected: dict[str, list[int]] = {}
    strongest_is_told = {i: float(found.table["only"][i].as_py()) for i in range(len(rows))}
    for i, (one, name) in enumerate(rows):
        least = strongest_is_told[i] == min(strongest_is_told.values())
        alone = "signal: none alone" if least else "signal: only"
        if name or (one is not None and one >= 0.5):
            expected.setdefault(name or alone, []).append(i)
    shown = groups(view_of(found))
    assert {group.name: group.rows for group in shown} == {name: len(one) for name, one in expected.items()}
    for group in shown:
        chances = [p[i] or 0.0 for i in expected[group.name]]
        assert group.flagged == sum(one >= 0.5 for one in chances)
        assert group.expected == pytest.approx(sum(chances), abs=1e-5)
        assert (p[group.worst] or 0.0) == max(chances)
        assert group.worst in expected[group.name]
    sums = [round(group.expected, 6) for group in shown]
    assert sums == sorted(sums, reverse=True)


def test_areas_are_told_apart_one_by_one():
    """A row of several areas stands with the rows of the one that most have."""
    reasons = [
        "words of fraud",
        "words of fraud, lies",
        "words of lies, fraud",
        "words of crime",
        "words of crime",
        "other; words of crime",
    ]
    found = findings_of([0.9] * 6, reasons=dict(enumerate(reasons)))
    assert {group.name: group.rows for group in groups(view_of(found))} == {"words of fraud": 3, "words of crime": 3}


def test_flagged_rows_of_no_group_stand_together_by_what_they_have_in_common():
    """ "like the safety set" is said of more than half, so it tells nothing apart; numbers do not part rows."""
    reasons = [
        "like the safety set; words of fraud",
        "like the safety set; words of fraud; 3 invisible characters",
        "like the safety set; words of crime",
        "like the safety set",
        "12 invisible characters",
        "like the safety set; words of fraud",
    ]
    found = findings_of([0.9] * 6 + [0.1], reasons=dict(enumerate([*reasons, "words of fraud"])))
    assert {group.name: group.rows for group in groups(view_of(found))} == {
        "words of fraud": 3,
        "words of crime": 1,
        "like the safety set": 1,
        "N invisible characters": 1,
    }


def test_a_flagged_row_without_a_reason_stands_under_the_harm_signal_that_singles_it_out():
    """Row 9 is the most extreme of ten by ``rare`` (of which nothing else has any), row 8 only by ``common``."""
    nan = math.nan
    found = findings_of(
        [0.0] * 8 + [0.9, 0.9],
        signals={"common": [*range(8), 9, 8], "rare": [nan] * 9 + [1.0], "quality": [0.0] * 8 + [9.0, 9.0]},
        kinds={"quality": "quality"},
    )
    view = view_of(found)
    assert standing(view, np.array([8, 9]))["rare"].tolist() == [0.0, 0.9]
    assert {group.name: group.worst for group in groups(view)} == {"signal: common": 8, "signal: rare": 9}


def test_what_is_shown_are_flagged_rows_then_named_ones_then_those_that_came_closest():
    p = [0.9] * 3 + [None] * 5 + [i / 10_000 for i in range(1000)]
    view = view_of(findings_of(p, reasons={5: "not scored: no schema", 8: "has an invisible character"}))
    shown = shown_rows(view, 10_000).tolist()
    assert shown[:3] == [0, 1, 2]
    assert shown[3:FILL] == [1007 - i for i in range(FILL - 3)]
    assert shown[FILL:] == [8, 5]  # said something of, though not among the first
    assert shown_rows(view, 2).tolist() == [0, 1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(3, 30))
def test_correlations_are_spearmans(seed, rows):
    """Of values with ties: the correlation of ranks, computed by scipy. Saying nothing (here 0) is less than all."""
    values = np.random.default_rng(seed).integers(0, 4, (2, rows)).astype(float)
    said = np.where(values == 0, math.nan, values)
    found = correlations(view_of(findings_of([0.1] * rows, signals=dict(zip("ab", said, strict=True)))))
    if any(len(set(one.tolist())) == 1 for one in values):
        assert found[0][1] is None
    else:
        assert found[0][1] == found[1][0] == pytest.approx(stats.spearmanr(*values).statistic)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 20))
def test_separation_is_how_often_a_flagged_row_has_more(seed, rows):
    rng = np.random.default_rng(seed)
    p, values = rng.random(rows), rng.integers(0, 4, rows).astype(float)
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, one in zip(values, p, strict=True)
        for b, other in zip(values, p, strict=True)
        if one >= 0.5 > other
    ]
    values[values == 0] = math.nan  # to say nothing is to say least
    told = separation(view_of(findings_of(p.tolist(), signals={"a": values})), "a")
    assert told == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_findings_that_do_not_belong_together_are_an_error():
    found = findings_of([0.1, 0.2], signals={"a": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"lack the columns 'a'.*give what"):
        view_of(dataclasses.replace(found, table=found.table.drop_columns(["a"])))
    with pytest.raises(DataError, match=r"1 rows, but their summary counts 2"):
        view_of(dataclasses.replace(found, table=found.table.slice(0, 1)))


# charts -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=30))
def test_bars_are_higher_where_there_are_more_rows_and_stay_in_the_chart(counts):
    chart = histogram_chart(np.array(counts), np.array(counts) // 2, 0.5)
    for count, bar in zip(counts, chart.bars, strict=True):
        assert bar.y + bar.height == pytest.approx(chart.base, abs=0.02)
        assert chart.top - 0.01 <= bar.y <= chart.base
        assert (bar.height > 0) == (count > 0)
        assert bar.flagged_height <= bar.height
    heights = [bar.height for _, bar in sorted(zip(counts, chart.bars, strict=True), key=lambda pair: pair[0])]
    assert heights == sorted(heights)


def test_a_matrix_has_every_pair_once_and_one_signal_has_none():
    """ "d" is the same for all rows, and left out."""
    chart = matrix_chart("abcd", [[1, 0.5, None, None], [0.5, 1, -0.25, None], [None, -0.25, 1, None], [None] * 4])
    assert chart.names == ("a", "b", "c")
    assert [(one.label, one.way) for one in chart.squares] == [
        ("b and a: 0.50", "pos"),
        ("c and a: none can be told", "pos"),
        ("c and b: -0.25", "neg"),
    ]
    assert matrix_chart(["a"], [[1.0]]).squares == ()
    assert [one.value for one in matrix_chart("ab", [[1, -0.001], [-0.001, 1]]).squares] == ["0.00"]


@settings(deadline=None)
@given(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_an_interval_stays_on_its_axis(three):
    low, value, high = three
    chart = interval_chart(value, low, high)
    assert chart is not None
    assert 0 <= chart.low <= chart.at <= chart.high <= 240
    assert interval_chart(math.nan, low, high) is None
