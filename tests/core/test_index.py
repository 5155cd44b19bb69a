"""Slots are the distinct keys; the fingerprint names the multiset of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safe_sched.errors import DataError
from safe_sched.rows.index import RowIndex
from tests.core.batches import laws

# few different keys, of both signs, extremes among them
some_keys = st.lists(st.sampled_from([-(2**63), -7, 0, 3, 4, 2**63 - 1]), min_size=1, max_size=12)


@laws
@given(some_keys)
def test_every_row_finds_its_own_key(keys):
    index = RowIndex(torch.tensor(keys))
    assert index.rows == len(keys)
    assert index.slots == len(set(keys))
    assert index.row_slots is not None
    assert index.keys[index.row_slots.long()].tolist() == keys
    assert index.keys[index.lookup(torch.tensor(keys))].tolist() == keys


@laws
@given(some_keys)
def test_a_key_that_is_not_in_the_set_is_minus_one(keys):
    """Below, between and above the keys of the set."""
    index = RowIndex(torch.tensor(keys))
    probes = [-(2**63), -(2**63) + 1, -8, -7, 0, 1, 3, 4, 5, 2**63 - 2, 2**63 - 1]
    ordered = sorted(set(keys))
    expected = [ordered.index(k) if k in keys else -1 for k in probes]
    assert index.lookup(torch.tensor(probes)).tolist() == expected


@laws
@given(some_keys)
def test_counts_say_how_many_rows_share_a_slot(keys):
    index = RowIndex(torch.tensor(keys))
    expected = [keys.count(k) for k in sorted(set(keys))]
    if index.counts is None:
        assert expected == [1] * len(keys)
    else:
        assert index.counts.tolist() == expected
        assert len(set(keys)) < len(keys)


@laws
@given(some_keys, st.randoms(use_true_random=False))
def test_slots_and_fingerprint_do_not_depend_on_the_order_of_the_rows(keys, random):
    moved = list(keys)
    random.shuffle(moved)
    first, second = RowIndex(torch.tensor(keys)), RowIndex(torch.tensor(moved))
    assert torch.equal(first.keys, second.keys)
    assert first.fingerprint() == second.fingerprint()


@laws
@given(some_keys, some_keys)
def test_the_fingerprint_tells_different_sets_of_rows_apart(first, second):
    """The same for the same rows with the same multiplicities, and for nothing else."""
    same = RowIndex(torch.tensor(first)).fingerprint() == RowIndex(torch.tensor(second)).fingerprint()
    assert same == (sorted(first) == sorted(second))


def test_the_fingerprint_depends_on_how_often_a_row_occurs():
    """{a, a, b} and {a, b, b} have the same distinct rows and the same number of rows."""
    prints = {RowIndex(torch.tensor(keys)).fingerprint() for keys in ([5, 5, 9], [5, 9, 9], [5, 9], [5, 5, 9, 9])}
    assert len(prints) == 4


def test_sets_of_keys_with_the_same_sum_have_different_fingerprints():
    """Keys are mixed before they are added up: 1 + 4 = 2 + 3."""
    assert RowIndex(torch.tensor([1, 4])).fingerprint() != RowIndex(torch.tensor([2, 3])).fingerprint()


def test_a_fingerprint_of_distinct_keys_only_would_be_noticed(monkeypatch):
    """Control: with the counts forgotten, {a, a, b} and {a, b, b} are one."""
    monkeypatch.setattr(RowIndex, "counts", property(lambda self: None))
    assert RowIndex(torch.tensor([5, 5, 9])).fingerprint() == RowIndex(torch.tensor([5, 9, 9])).fingerprint()


def test_the_fingerprint_is_sixteen_digits_and_the_row_count():
    digits, rows = RowIndex(torch.tensor([5, 5, 9])).fingerprint().split("-")
    assert len(digits) == 16
    assert int(digits, 16) >= 0
    assert rows == "3"


def test_no_rows_is_a_data_error():
    with pytest.raises(DataError, match="no rows"):
        RowIndex(torch.empty(0, dtype=torch.long))


# streams --------------------------------------------------------------------------------------------------------------


def test_a_stream_numbers_slots_in_the_order_of_arrival():
    index = RowIndex(None)
    assert (index.slots, index.rows, index.row_slots, index.counts) == (0, 0, None, None)
    assert index.add(torch.tensor([30, 10, 30])) == 2
    assert index.add(torch.tensor([10, 20])) == 1
    assert index.add(torch.tensor([20, 30])) == 0
    assert index.keys.tolist() == [30, 10, 20]
    assert index.lookup(torch.tensor([20, 99, 30])).tolist() == [2, -1, 0]
    assert index.slots == index.rows == 3


@laws
@given(st.lists(some_keys, max_size=4))
def test_growth_never_moves_a_slot(parts):
    index, seen = RowIndex(None), []
    for part in parts:
        before = index.keys.tolist()
        added = index.add(torch.tensor(part))
        seen += part
        assert index.keys.tolist()[: len(before)] == before
        assert added == index.slots - len(before)
    assert sorted(index.keys.tolist()) == sorted(set(seen))


def test_an_empty_stream_knows_no_key():
    index = RowIndex(None)
    assert index.lookup(torch.tensor([1, 2])).tolist() == [-1, -1]
    assert index.keys.dtype == torch.long


def test_a_streams_fingerprint_does_not_depend_on_the_order_of_arrival():
    first, second = RowIndex(None), RowIndex(None)
    first.add(torch.tensor([1, 2, 3]))
    second.add(torch.tensor([3, 1]))
    assert first.fingerprint() != second.fingerprint()
    second.add(torch.tensor([2]))
    assert first.fingerprint() == second.fingerprint()
