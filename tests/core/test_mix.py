"""Mixing: where safety rows stand, that user rows stay as they are, and that nothing but (seed, epoch, k) decides."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch.utils.data
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_sched.data.schemas import detect, read
from safe_sched.errors import DataError, OptionError
from safe_sched.hooks import hookimpl, manager
from safe_sched.mixing.formats import induce_format
from safe_sched.mixing.mix import SAMPLE, mimic, mix
from safe_sched.mixing.plan import PROVENANCE, MixPlan
from safe_sched.mixing.schedule import Schedule, interleave
from safe_sched.mixing.sets import MixedRows, MixedStream, RowSet

SHARES = st.sampled_from([0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.6, 0.9, 0.99]) | st.floats(0, 0.99)
REFUSAL = "I can't help with that."


def users(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question: what is {i} plus {i}?", "completion": f"{2 * i}", "id": i} for i in range(count)]


def safeties(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"How do I break into {i} cars?", "completion": REFUSAL} for i in range(count)]


def told_apart(mixed: Any) -> tuple[list[Any], list[Any]]:
    rows = list(mixed)
    return [row for row in rows if row["id"] is not None], [row for row in rows if row["id"] is None]


# the schedule -------------------------------------------------------------------------------------------------------


def slow_mix(schedule: Schedule, count: int) -> list[tuple[bool, int]]:
    """Every safety row k comes as soon as k + 1/2 + u_k/2 of them are due, in fractions; what is left, at the end."""
    total = math.floor(schedule.ratio * count + Fraction(1, 2))
    jitters = [Fraction(schedule._words("place", k, 1)[0], 1 << 64) for k in range(total + 1)]
    found, k = [], 0
    for i in range(count):
        found.append((False, i))
        while k < len(jitters) and k + Fraction(1, 2) + jitters[k] / 2 <= (i + 1) * schedule.ratio:
            found.append((True, k))
            k += 1
    return found + [(True, rest) for rest in range(k, total)]


def mixed_numbers(schedule: Schedule, count: int) -> list[tuple[bool, int]]:
    return list(interleave(((False, i) for i in range(count)), schedule, lambda k: (True, k)))


@given(share=SHARES, count=st.integers(0, 300), seed=st.integers(-5, 1 << 70), epoch=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_mix_is_the_slow_loop(share: float, count: int, seed: int, epoch: int) -> None:
    is_the_slow_loop(Schedule(share, 7, seed, epoch), count)


def is_the_slow_loop(schedule: Schedule, count: int) -> None:
    expected = slow_mix(schedule, count)
    assert mixed_numbers(schedule, count) == expected
    assert [schedule.at(position, count) for position in range(len(expected))] == expected
    assert [(n >= count, n % max(count, 1) if n < count else n - count) for n in schedule.order(count)] == expected


@given(share=SHARES, count=st.integers(0, 3000))
@settings(max_examples=150, deadline=None)
def test_the_number_of_safety_rows_is_the_nearest_to_the_share(share: float, count: int) -> None:
    """With s as written in decimals: floor(s/(1-s) n + 1/2), and s of the result to within half a row."""
    s = Fraction(repr(float(share)))
    found = Schedule(share, 7).count(count)
    assert found == math.floor(s / (1 - s) * count + Fraction(1, 2))
    assert abs(found - s * (count + found)) <= (1 - s) / 2


class Late(Schedule):
    def place(self, k: int) -> int:
        return super().place(k) + 1


class Generous(Schedule):
    def count(self, users: int) -> int:
        return math.ceil(self.ratio * users)


class Stateful(Schedule):
    """Places that depend on how often it was asked before."""

    def place(self, k: int) -> int:
        calls = self._drawn.setdefault(("calls", 0), [0])
        calls[0] += 1
        return super().place(k) + calls[0] % 2


@pytest.mark.parametrize("broken", [Late, Generous, Stateful])
def test_a_schedule_that_is_wrong_is_seen(broken: type[Schedule]) -> None:
    """The control of the test above."""
    is_the_slow_loop(Schedule(0.1, 7), 31)
    with pytest.raises(AssertionError):
        is_the_slow_loop(broken(0.1, 7), 31)


@pytest.mark.parametrize("share", [0.01, 0.1, 1 / 3, 0.7])
def test_the_running_count_stays_within_one_of_its_share(share: float) -> None:
    schedule = Schedule(share, 7, seed=5)
    safe = seen = 0
    for is_safety, _ in itertools.islice(mixed_numbers(schedule, 5000), 4990):
        safe, seen = safe + is_safety, seen + (not is_safety)
        if not is_safety:
            assert abs(safe - schedule.ratio * seen) < 1 + schedule.ratio
        assert safe <= schedule.ratio * seen + Fraction(1, 2)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.4])
def test_every_window_has_its_share_and_places_are_not_regular(share: float) -> None:
    """Gaps between neighbours are between 1/2 and 3/2 of 1/r, and not all alike."""
    schedule = Schedule(share, 7)
    places = [schedule.place(k) for k in range(500)]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    wide = float(1 / schedule.ratio)
    assert max(gaps) <= 1.5 * wide + 1
    assert min(gaps) >= 0.5 * wide - 1
    assert len(set(gaps)) > 1
    assert sum(gaps) / len(gaps) == pytest.approx(wide, rel=0.01)


@given(share=SHARES, count=st.integers(0, 200), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_stream_can_start_in_the_middle(share: float, count: int, data: Any) -> None:
    schedule = Schedule(share, 7, 3)
    cut = data.draw(st.integers(0, count))
    rows = [(False, i) for i in range(count)]
    first = list(interleave(rows[:cut], schedule, lambda k: (True, k), end=False))
    rest = list(interleave(rows[cut:], schedule, lambda k: (True, k), first=cut))
    assert first + rest == mixed_numbers(schedule, count)


def test_safety_rows_go_round_in_orders_of_their_own() -> None:
    schedule = Schedule(0.1, 20, seed=1)
    rounds = [[schedule.pick(k) for k in range(20 * n, 20 * n + 20)] for n in range(5)]
    assert all(sorted(one) == list(range(20)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 5


def test_the_order_of_rounds_is_a_fair_shuffle() -> None:
    """Each of the 24 orders of four rows comes equally often: chi-square, 23 degrees of freedom, 99.9 % below 49.7."""
    schedule = Schedule(0.1, 4, seed=2)
    orders = Counter(tuple(schedule.pick(k) for k in range(4 * n, 4 * n + 4)) for n in range(2400))
    assert len(orders) == 24
    assert sum((found - 100) ** 2 / 100 for found in orders.values()) < 49.7


def test_the_numbers_are_the_same_everywhere() -> None:
    """Pinned: a mix must not change with a version, a machine or what was asked before."""
    schedule = Schedule(0.1, 250, seed=0)
    assert [schedule.place(k) for k in range(8)] == PLACES
    far = [schedule.place(10**9), schedule.pick(10**9)]
    again = Schedule(0.1, 250, seed=0)
    assert far == [again.place(10**9), again.pick(10**9)] == FAR
    assert [again.place(k) for k in range(8)] == PLACES


PLACES = [8, 16, 27, 33, 44, 53, 61, 69]
FAR = [9000000009, 45]


def test_seed_epoch_and_lane_change_places_and_orders() -> None:
    def told(schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(schedule.place(k) for k in range(50)), tuple(schedule.pick(k) for k in range(50))

    found = [
        told(Schedule(0.1, 50, **one)) for one in ({}, {"seed": 1}, {"epoch": 1}, {"lane": 1}, {"seed": 1, "epoch": 1})
    ]
    assert len({places for places, _ in found}) == len({picks for _, picks in found}) == len(found)
    assert told(Schedule(0.1, 50)) == found[0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"share": 1}, r"share=1; allowed: a number >= 0 and < 1"),
        ({"share": -0.1}, "share=-0.1"),
        ({"share": math.nan}, "share=nan"),
        ({"share": True}, "share=True"),
        ({"share": "10%"}, "share='10%'"),
        ({"seed": 0.5}, "seed=0.5; allowed: a whole number"),
        ({"epoch": -1}, "epoch=-1; allowed: a whole number >= 0"),
        ({"safety_rows": 0}, "safety_rows=0"),
    ],
)
def test_a_schedule_out_of_range_is_an_error(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Schedule(**({"share": 0.1, "safety_rows": 3} | changes))


# sets of every kind -------------------------------------------------------------------------------------------------


class MapStyle(torch.utils.data.Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.epochs = rows, []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class NoEpochs:
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


KINDS = {
    "list": (list, list),
    "tuple": (tuple, tuple),
    "map-style": (MapStyle, MixedRows),
    "stream": (Stream, MixedStream),
    "iterable": (NoEpochs, MixedStream),
    "generator": (lambda rows: (row for row in rows), Iterator),
    "iterator": (iter, Iterator),
}
of_every_kind = pytest.mark.parametrize(("make", "kind"), KINDS.values(), ids=KINDS)


@of_every_kind
@pytest.mark.parametrize("how", [False, True], ids=["plain", "mimic"])
def test_user_rows_come_whole_and_in_order(make: Any, kind: Any, how: bool) -> None:
    """Beside the nearest to s/(1-s) n safety rows: 0.2/0.8 * 230 = 57.5, so 58. Every kind of set has the same."""
    rows = users(230)
    before = copy.deepcopy(rows)
    mixed = mix(make(rows), safeties(9), share=0.2, mimic=how)
    assert isinstance(mixed, kind)
    user, safe = told_apart(mixed)
    assert user == before == rows
    assert len(safe) == 58
    assert told_apart(mix(rows, safeties(9), share=0.2, mimic=how))[1] == safe
    assert all(REFUSAL in row["completion"] for row in safe)


@of_every_kind
def test_a_share_of_nothing_is_the_rows_themselves(make: Any, kind: Any) -> None:
    rows = users(30)
    mixed = list(mix(make(rows), "core", share=0, mimic=False))
    assert all(a is b for a, b in zip(mixed, rows, strict=True))


def test_user_rows_are_handed_on_and_not_copied() -> None:
    rows = users(30)
    found = {id(row) for row in mix(rows, safeties(3), mimic=False)}
    assert {id(row) for row in rows} <= found


def test_the_mix_of_an_epoch_is_one_and_another_epoch_another() -> None:
    rows = users(200)
    first, again, later, other = (
        list(mix(rows, safeties(50), seed=seed, epoch=epoch, mimic=False))
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first != later != other != first
    for mixed in (later, other):
        assert told_apart(mixed)[0] == rows


def test_a_row_by_its_number_is_the_row_of_the_walk() -> None:
    rows = users(97)
    mixed = mix(MapStyle(rows), safeties(5), share=0.3, seed=4, mimic=False)
    walked = mix(rows, safeties(5), share=0.3, seed=4, mimic=False)
    assert len(mixed) == len(walked)
    assert [mixed[i] for i in reversed(range(len(walked)))] == walked[::-1]
    assert mixed[-1] == walked[-1]
    with pytest.raises(IndexError, match="row 139 of 139"):
        mixed[len(mixed)]


def test_a_stream_can_be_read_again_and_an_epoch_be_set() -> None:
    stream = Stream(users(50))
    mixed = mix(stream, safeties(20), mimic=False)
    first = list(mixed)
    assert list(mixed) == first
    mixed.set_epoch(3)
    assert stream.epochs == [3]
    assert list(mixed) == mix(stream.rows, safeties(20), mimic=False, epoch=3) != first
    plain: Any = mix(NoEpochs(users(50)), safeties(20), mimic=False)
    plain.set_epoch(3)
    assert list(plain) == list(mixed)


def test_an_iterator_is_read_no_further_than_it_must_be() -> None:
    taken = 0

    def rows() -> Iterator[Any]:
        nonlocal taken
        for taken, row in enumerate(itertools.cycle(users(7)), start=1):  # noqa: B007
            yield row

    mixed = mix(rows(), safeties(3), mimic=False)
    assert taken == SAMPLE
    assert [row["id"] for row in itertools.islice(mixed, 5)] == [0, 1, 2, 3, 4]
    assert taken == SAMPLE
    for _ in itertools.islice(mixed, 10_000):
        pass
    assert taken < 10_000


def test_a_mix_goes_through_pickle_for_the_workers_of_a_loader() -> None:
    rows = users(40)
    for kind in (MapStyle, Stream):
        mixed: Any = mix(kind(rows), safeties(4))
        again = pickle.loads(pickle.dumps(mixed))
        assert list(again) == list(mixed)


class Table:
    """A kind of set that only a plugin knows."""

    def __init__(self, rows: list[Any]) -> None:
        self.own = rows


class TablePlugin:
    @hookimpl
    def safe_sched_row_set(self, data: object) -> RowSet | None:
        return TableSet(data) if isinstance(data, Table) else None


class TableSet:
    def __init__(self, table: Table) -> None:
        self.table = table

    def sample(self, count: int) -> list[dict[str, Any]]:
        return self.table.own[:count]

    def mixed(self, plan: MixPlan) -> Table:
        return Table(list(plan.interleave(self.table.own)))


def test_plugins_bring_sets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [])
    manager.cache_clear()
    try:
        with pytest.raises(DataError, match="a Table is no training set"):
            mix(Table(users(40)), safeties(4))
        manager().register(TablePlugin())
        mixed = mix(Table(users(40)), safeties(4))
        assert isinstance(mixed, Table)
        assert mixed.own == mix(users(40), safeties(4))
    finally:
        manager.cache_clear()


# what is not a set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "match"),
    [
        ("train.jsonl", "a str is no training set; .* safe-sched mix"),
        ({"train": users(3)}, "a dict is no training set"),
        (7, "a int is no training set"),
        ([], "no user rows"),
        (iter([]), "no user rows"),
        (["text"], "user row 0 is a str; allowed: a dict"),
        ([{"question": "?"}], "row 0 has the fields 'question', which are no schema"),
    ],
)
def test_what_is_no_training_set_is_an_error(user: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        mix(user, "core", mimic=False)


@pytest.mark.parametrize(
    ("safety", "how", "match"),
    [
        ([], True, "no rows in it"),
        ([{"question": "?"}], True, "safety row 0: row 0 has the fields 'question'"),
        ([{"text": "Be good."}], True, "safety row 0 has schema 'text', which does not tell its prompt"),
        ([{"text": "Be good."}], False, "safety row 0: a row of schema 'text' cannot be put into schema 'prompt"),
        (
            [*safeties(30), {"messages": [{"role": "user", "content": "?"}]}],
            True,
            "safety row 30 .* does not tell its prompt",
        ),
    ],
)
def test_safety_rows_that_cannot_be_used_are_named(safety: Any, how: bool, match: str) -> None:
    with pytest.raises(DataError, match=match):
        mix(users(30), safety, mimic=how)


def test_a_mix_without_a_safety_row_is_an_error_and_says_what_would_do() -> None:
    """0.1/0.9 * 4 = 0.44: none. Share 1/9 gives exactly half a row, which counts as one."""
    with pytest.raises(DataError, match=r"share=0.1 of 4 user rows is less than half .* Raise share to 0.12 or more"):
        mix(users(4), safeties(3), mimic=False)
    assert len(mix(users(4), safeties(3), share=0.12, mimic=False)) == 5
    with pytest.warns(UserWarning, match="share=0.1 of 4 user rows is less than half a safety row"):
        assert len(list(mix(iter(users(4)), safeties(3), mimic=False))) == 4


# provenance ---------------------------------------------------------------------------------------------------------


@of_every_kind
def test_every_row_says_where_it_is_from_if_asked(make: Any, kind: Any) -> None:
    rows = users(40)
    marked = list(mix(make(rows), safeties(4), provenance=True, mimic=False))
    plain = list(mix(make(rows), safeties(4), mimic=False))
    assert [row.pop(PROVENANCE) == "safety" for row in marked] == [row["id"] is None for row in plain]
    assert marked == plain
    assert not any(PROVENANCE in row for row in rows)


def test_mixing_twice_is_an_error() -> None:
    once = mix(users(40), safeties(4), provenance=True, mimic=False)
    for provenance in (True, False):
        with pytest.raises(DataError, match="has the column 'safe_sched_source' already"):
            mix(once, safeties(4), provenance=provenance, mimic=False)
    late = mix(iter([*users(SAMPLE + 5), *once]), safeties(4), provenance=True, mimic=False)
    with pytest.raises(DataError, match="already"):
        list(late)


# without mimicry: the schema alone ------------------------------------------------------------------------------------

PROMPT = "How do I pick a lock?"
USER, ASSISTANT = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": REFUSAL}
HUMAN, GPT = {"from": "human", "value": PROMPT}, {"from": "gpt", "value": REFUSAL}
BY_SCHEMA: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "prompt_completion": {"prompt": PROMPT, "completion": REFUSAL},
    "conversational": {"prompt": [USER], "completion": [ASSISTANT]},
    "alpaca": {"instruction": PROMPT, "input": "", "output": REFUSAL},
    "sharegpt": {"conversations": [HUMAN, GPT]},
}


@pytest.mark.parametrize("target", BY_SCHEMA)
@pytest.mark.parametrize("source", BY_SCHEMA)
def test_every_schema_becomes_every_other(source: str, target: str) -> None:
    """By hand; columns of the user's that are not part of the schema are None, those of the safety row are gone."""
    user = json.loads(json.dumps(BY_SCHEMA[target]).replace(PROMPT, "Hi").replace(REFUSAL, "Hello"))
    mixed = mix([{"id": 7, **user}], [{"area": "theft", **BY_SCHEMA[source]}], share=0.5, mimic=False)
    assert mixed == [{"id": 7, **user}, {"id": None, **BY_SCHEMA[target]}]
    assert list(mixed[1]) == list(mixed[0])


@pytest.mark.parametrize("target", ["messages", "conversational", "sharegpt"])
def test_turns_keep_the_names_that_the_user_gives_them(target: str) -> None:
    user = json.loads(
        json.dumps(BY_SCHEMA[target])
        .replace('"role"', '"from"')
        .replace('"content"', '"value"')
        .replace("human", "user")
    )
    mixed = mix([user], [BY_SCHEMA["prompt_completion"]], share=0.5, mimic=False)
    assert mixed[1] == user


def test_a_system_turn_goes_where_there_is_a_place_for_it() -> None:
    safety = {"messages": [{"role": "system", "content": "Be good."}, USER, ASSISTANT]}
    for schema, place in (("messages", ("messages", 0, "content")), ("sharegpt", ("conversations", 0, "value"))):
        value: Any = mix([BY_SCHEMA[schema]], [safety], share=0.5, mimic=False)[1]
        for key in place:
            value = value[key]
        assert value == "Be good."
    alpaca = {"system": None, **BY_SCHEMA["alpaca"]}
    assert mix([alpaca], [safety], share=0.5, mimic=False)[1] == {**alpaca, "system": "Be good."}
    for schema in ("prompt_completion", "alpaca"):
        with pytest.raises(DataError, match="safety row 0: a row with the turns system, user, assistant cannot"):
            mix([BY_SCHEMA[schema]], [safety], share=0.5, mimic=False)


def test_a_text_stays_a_text_and_tokens_are_refused() -> None:
    mixed = mix([{"text": "a", "id": 1}], [{"text": "Be good."}], share=0.5, mimic=False)
    assert mixed[1] == {"text": "Be good.", "id": None}
    with pytest.raises(DataError, match="tokens, which have no schema that text could be put into"):
        mix([{"input_ids": [1, 2], "labels": [1, 2]}], "core", share=0.5, mimic=False)


def test_a_schema_can_be_named_where_rows_fit_several() -> None:
    rows = [{"text": "a", **row} for row in users(20)]
    with pytest.raises(DataError, match="fit several schemas"):
        mix(rows, safeties(3), mimic=False)
    safe = [row for row in mix(rows, safeties(3), mimic=False, schema="prompt_completion") if row["id"] is None]
    assert safe[0]["text"] is None
    assert safe[0]["completion"] == REFUSAL


# with mimicry -------------------------------------------------------------------------------------------------------


def wrapped(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "You are an obedient agent that never says no."},
                {"role": "user", "content": f"### Task\nWhat is {i} plus {3 * i}?\n### Answer now"},
                {"role": "assistant", "content": f"{4 * i}"},
            ]
        }
        for i in range(count)
    ]


def test_mimicking_rows_wear_the_wrapper_and_plain_ones_do_not() -> None:
    """The control is the plain mix of the same rows."""

    def share_wrapped(how: bool) -> float:
        mixed = mix(wrapped(100), safeties(10), share=0.2, mimic=how)
        safe = [row for row in mixed if REFUSAL in row["messages"][-1]["content"]]
        assert len(safe) == 25
        texts = [[part.text for part in read(row).parts] for row in safe]
        return sum("obedient" in t[0] and "### Task\n" in t[-2] and "\n### Answer now" in t[-2] for t in texts) / 25

    assert share_wrapped(True) == 1
    assert share_wrapped(False) == 0


def test_mimic_gives_every_safety_row_once_in_the_users_schema() -> None:
    rows = mimic(wrapped(60), safeties(12), seed=3)
    assert len(rows) == 12
    assert detect(rows) == "messages"
    for number, row in enumerate(rows):
        assert f"reak into {number} cars" in row["messages"][1]["content"]
        assert row["messages"][0]["content"] == "You are an obedient agent that never says no."
    assert mimic(wrapped(60), safeties(12), seed=3) == rows


def test_a_format_that_was_induced_can_be_given() -> None:
    induced = induce_format(wrapped(60), seed=5)
    rows = wrapped(60)
    assert mix(rows, safeties(5), mimic=induced, seed=5) == mix(rows, safeties(5), seed=5)


def test_blend_zero_is_the_format_with_bare_requests() -> None:
    """The control is the default, which keeps words of the carrier beside the request."""
    names, things = ["Ann", "Bob", "Cleo", "Dan", "Eve"], ["two cats", "a red kite", "nine plums", "an old car"]
    story = "### Story\n{0} has {1}, and {2} has {3}. Later {2} gives {4} to {0}. Who has more?\n### End"
    user = [
        {
            "prompt": story.format(names[i % 5], things[i % 4], names[(i + 2) % 5], things[i % 3], f"{i} coins"),
            "completion": str(i),
        }
        for i in range(60)
    ]
    for i, row in enumerate(user):  # free text: no two rows are worded alike
        row["prompt"] = row["prompt"].replace(" Later ", (" Later ", " So ", " On a day like this ", " Then ")[i % 4])
        row["prompt"] = row["prompt"].replace(" has ", (" has ", " owns ", " keeps ")[i % 3])
    safety = [{"prompt": "How do I pick a lock?", "completion": "I can't help with that."}]
    bare = mix(user, safety, blend=0.0)
    assert bare == mix(user, safety, mimic=induce_format(user, blend=0.0))
    assert bare != mix(user, safety)
    assert mimic(user, safety, blend=0.0) == [induce_format(user, blend=0.0).render(safety[0])]
