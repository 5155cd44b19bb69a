"""Laws that hold for every method of the catalogue; fixed weights; options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.errors import DataError, OptionError
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, Scheduler
from safe_sched.schedulers import BDS, CATALOG, Antibody, BDSReleased, Fixed, build
from safe_sched.training.session import Session
from tests.core.batches import laws, pad, row
from tests.core.runs import DISTINCT, DUPLICATED, over_duplicates, run, same, steps_of

GIVEN = {40: 0.5, 10: 2.0, 30: 0.0, 20: 1.0, 60: 3.0, 50: 0.25}

# every way of building each method that is to obey the laws
CASES: dict[str, list[dict[str, Any]]] = {
    "bds": [
        {},
        {"temperature": 0.0},
        {"draws": 4, "prior_share": 0.3, "seed": 7},
        {"evidence": None},
        {"evidence": "reference", "reference": "adapter:agnostic"},
    ],
    "bds_released": [
        {},
        {"learning_rate": 0.2, "betas": (0.5, 0.9)},
        {"transform": "sigmoid", "initial_logit": 0.0, "learning_rate": 0.1},
        {"transform": "identity", "initial_logit": 1.0, "learning_rate": 0.1},
    ],
    "neural_bds": [
        {},
        {"head": "mlp", "probe_share": 0.5},
        {"temperature": 0.0, "chains": 4},
    ],
    "antibody": [{}, {"gate": "softmax", "ratio": "token_mean"}, {"tau": 0.5}, {"anchor": False}],
    "fixed": [{}, {"values": list(GIVEN.values()), "keys": list(GIVEN)}],
}
EVERY = [
    pytest.param(name, options, id=f"{name}{i}") for name, cases in CASES.items() for i, options in enumerate(cases)
]
over_the_catalogue = pytest.mark.parametrize(("name", "options"), EVERY)


# laws over the catalogue ----------------------------------------------------------------------------------------------


def test_every_method_of_the_catalogue_is_put_to_the_laws():
    assert CASES.keys() == CATALOG.keys()
    for name, cls in CATALOG.items():
        assert cls.name == name
        assert isinstance(build(name), Scheduler)


@over_the_catalogue
@over_duplicates
def test_the_weight_of_a_row_is_the_weight_of_its_slot(name, options, keys):
    scheduler, index = build(name, **options), RowIndex(torch.tensor(keys))
    steps = steps_of(index, keys, 4)
    state = run(scheduler, index, steps)
    found, expected = scheduler.weights(state, steps[0]), scheduler.slot_weights(state)[steps[0].slots]
    if options.get("gate") == "softmax":  # relative to the rows of a step: the same up to a factor
        found, expected = found / found.sum(), expected / expected.sum()
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


@over_the_catalogue
def test_another_run_gives_another_state(name, options):
    """Control for `safe_sched.testing`: a method that learns anything tells two runs apart."""
    index = RowIndex(torch.tensor(DISTINCT))
    first = run(build(name, **options), index, steps_of(index, DISTINCT, 6, seed=0))
    second = run(build(name, **options), index, steps_of(index, DISTINCT, 6, seed=1))
    learns_nothing = name == "fixed" or options.get("evidence", "probe") is None
    if options.get("evidence") == "reference":  # whose losses nobody has measured here
        learns_nothing = True
    assert same(first, second) == learns_nothing


def part_of(step: Observation, rows: Any) -> Observation:
    """Some rows of a step."""
    measured = {name: values[rows] for name, values in step.measured.items()}
    return dataclasses.replace(step, slots=step.slots[rows], label_tokens=step.label_tokens[rows], measured=measured)


@over_the_catalogue
def test_the_order_of_rows_within_a_step_does_not_matter(name, options):
    index = RowIndex(torch.tensor(DUPLICATED))
    steps = steps_of(index, DUPLICATED, 6, size=5)
    turned = [part_of(step, torch.arange(5).flip(0)) for step in steps]
    first, second = run(build(name, **options), index, steps), run(build(name, **options), index, turned)
    for field, tensor in first.tensors().items():
        torch.testing.assert_close(second.tensors()[field], tensor, rtol=1e-5, atol=1e-6, equal_nan=True)


@over_the_catalogue
def test_the_order_of_the_training_set_does_not_matter(name, options):
    """A shuffled copy of the set has the same slots, so a row keeps its weight."""
    first, second = RowIndex(torch.tensor(DUPLICATED)), RowIndex(torch.tensor(DUPLICATED[::-1]))
    states = [run(build(name, **options), index, steps_of(index, DUPLICATED, 4)) for index in (first, second)]
    assert same(*states)


@over_the_catalogue
@over_duplicates
def test_a_state_survives_the_way_through_tensors(name, options, keys):
    scheduler, index = build(name, **options), RowIndex(torch.tensor(keys))
    state = run(scheduler, index, steps_of(index, keys, 3))
    tensors = state.tensors()
    assert tensors.keys() == {field.name for field in dataclasses.fields(state)}
    assert all(isinstance(t, Tensor) for t in tensors.values())
    back = scheduler.state_type.from_tensors(tensors)
    assert type(back) is type(state)
    for field in dataclasses.fields(state):
        assert type(getattr(back, field.name)) is type(getattr(state, field.name))
    assert same(back, state)


# streams --------------------------------------------------------------------------------------------------------------


def test_fixed_weights_by_key_fit_a_stream():
    scheduler, index = Fixed([0.5, 2.0, 3.0], keys=[20, 10, 30]), RowIndex(None)
    state = scheduler.init(index)
    index.add(torch.tensor([30, 10]))
    state = scheduler.grow(state, index)
    assert scheduler.slot_weights(state).tolist() == [3.0, 2.0]
    index.add(torch.tensor([99]))
    with pytest.raises(DataError, match="no weight for 1 of 3"):
        scheduler.grow(state, index)


# fixed weights --------------------------------------------------------------------------------------------------------


def fixed_rows(values: Any, keys: list[int], names: Any = None) -> list[float]:
    return Session(Fixed(values, keys=names), RowIndex(torch.tensor(keys))).row_weights().tolist()


@laws
@given(st.lists(st.sampled_from(list(GIVEN)), min_size=1, max_size=8))
def test_fixed_weights_by_row_stay_with_their_rows(keys):
    assert fixed_rows([GIVEN[k] for k in keys], keys) == [GIVEN[k] for k in keys]


@laws
@given(st.lists(st.sampled_from(list(GIVEN)), min_size=1, max_size=8), st.permutations(list(GIVEN)))
def test_fixed_weights_by_key_stay_with_their_rows_in_any_order(keys, names):
    """Keys of rows that are not in the set may be named as well."""
    assert fixed_rows([GIVEN[k] for k in names], keys, names) == [GIVEN[k] for k in keys]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array], ids=lambda k: k.__name__)
def test_fixed_takes_lists_tensors_and_arrays(kind):
    assert fixed_rows(kind([1.0, 0.5]), [9, 4], kind([4, 9])) == [0.5, 1.0]


# the top bit set and not set: as int64 the first is negative, as uint64 it is above 2**63
SPREAD = [-5, 7, 9, -(2**63)]


@pytest.mark.parametrize("form", ["arrow", "numpy", "list"])
def test_the_keys_of_an_exported_table_name_its_rows(form):
    """`Session.table` lists keys as uint64, half of them above 2**63; its weights and keys go back in as they are."""
    table = Session(Fixed([1.0, 2.0, 3.0, 4.0]), RowIndex(torch.tensor(SPREAD))).table()
    values, names = table.column("weight"), table.column("key")
    if form == "numpy":
        values, names = values.to_numpy(), names.to_numpy()
    if form == "list":
        values, names = values.to_pylist(), names.to_pylist()
    torch.set_warn_always(True)  # torch warns of an array that it may not write to once in a process
    try:
        assert fixed_rows(values, SPREAD, names) == [1.0, 2.0, 3.0, 4.0]
    finally:
        torch.set_warn_always(False)


def test_signed_and_unsigned_keys_name_the_same_rows():
    unsigned = np.array(SPREAD, dtype=np.int64).view(np.uint64)
    for names in (SPREAD, torch.tensor(SPREAD), np.array(SPREAD), unsigned):
        assert fixed_rows([1.0, 2.0, 3.0, 4.0], SPREAD, names) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf, -math.inf])
def test_a_fixed_weight_that_is_negative_or_not_finite_is_named(bad):
    with pytest.raises(OptionError, match=f"weight number 2 is {bad}; allowed: finite numbers >= 0"):
        Fixed([1.0, 0.0, bad])


def test_fixed_keys_without_weights_are_an_option_error():
    with pytest.raises(OptionError, match="gives no weights"):
        Fixed(keys=[1, 2])


def test_fixed_keys_and_weights_of_different_number_are_an_option_error():
    with pytest.raises(OptionError, match="3 keys for 2 weights"):
        Fixed([1.0, 2.0], keys=[1, 2, 3])


def test_an_option_error_of_fixed_does_not_print_all_the_weights():
    with pytest.raises(OptionError) as caught:
        Fixed([1.0] * 1000 + [-1.0])
    assert str(caught.value).startswith("Fixed: weight number 1000 is -1.0")


@pytest.mark.parametrize("count", [0, 2, 4])
def test_fixed_weights_of_another_number_than_rows_are_a_data_error(count):
    with pytest.raises(DataError, match=f"{count} weights for a training set of 3 rows"):
        fixed_rows([1.0] * count, [1, 2, 3])


def test_different_fixed_weights_for_identical_rows_are_a_data_error():
    with pytest.raises(DataError, match=r"rows 1 and 3 have the same content but weights 0\.25 and 4\.0"):
        fixed_rows([1.0, 0.25, 1.0, 4.0], [9, 5, 7, 5])
    assert fixed_rows([1.0, 0.25, 1.0, 0.25], [9, 5, 7, 5]) == [1.0, 0.25, 1.0, 0.25]


def test_a_row_without_a_fixed_weight_is_a_data_error():
    with pytest.raises(DataError, match="no weight for 2 of 3 distinct training rows"):
        fixed_rows([1.0, 2.0], [5, 6, 7, 7], [6, 9])


def test_two_fixed_weights_for_one_key_are_an_error():
    with pytest.raises((DataError, OptionError), match="weights"):
        fixed_rows([1.0, 2.0, 3.0], [5, 6], [5, 6, 5])


def test_no_fixed_weights_at_all_leave_every_row_without_one():
    with pytest.raises(DataError, match="no weight for 2 of 2"):
        fixed_rows([], [5, 6], [])


def test_fixed_weights_by_row_do_not_fit_a_stream():
    with pytest.raises(DataError, match="stream"):
        Session(Fixed([1.0]), RowIndex(None))


def test_fixed_weights_by_row_are_refused_where_rows_are_moved():
    index = RowIndex(torch.tensor([1, 2]))
    assert Session(Fixed([1.0, 0.5]), index).row_weights().tolist() == [1.0, 0.5]
    index.moved = "packing moves the rows"
    with pytest.raises(DataError, match=r"by position, but packing moves the rows; .*Fixed\(column=\"weight\"\)"):
        Session(Fixed([1.0, 0.5]), index)


def test_a_column_is_read_once_for_every_row_of_a_set_and_of_a_stream():
    index, read = RowIndex(None), []
    index.columns = lambda name: lambda keys: (read.append((name, keys.tolist())), keys.float() / 10)[1]
    scheduler = Fixed(column="weight")
    state = scheduler.init(index)
    for keys, expected in (([30, 10], [3.0, 1.0]), ([10, 20], [3.0, 1.0, 2.0])):
        index.add(torch.tensor(keys))
        state = scheduler.grow(state, index)
        assert scheduler.slot_weights(state).tolist() == expected
    assert read == [("weight", []), ("weight", [30, 10]), ("weight", [20])]


def test_a_column_that_nothing_reads_is_a_data_error():
    with pytest.raises(DataError, match="nothing reads columns of the training set here; use SafeSchedCallback"):
        Session(Fixed(column="weight"), RowIndex(torch.tensor([1, 2])))


def test_equal_fixed_weights_fit_any_set_and_any_stream():
    assert fixed_rows(None, [3, 3, 4]) == [1.0, 1.0, 1.0]
    micro = pad([row(5, 6, 7), row(8, 9)])
    session = Session(Fixed(), RowIndex(None))
    (batch,) = session.begin_step([micro])
    assert session.weigh(batch).tolist() == [1.0, 1.0]


# options --------------------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_named_with_the_nearest_known_one():
    with pytest.raises(OptionError, match=r"unknown scheduler 'bsd' \(did you mean 'bds'\?\); allowed: ") as caught:
        build("bsd")
    assert str(caught.value).endswith("allowed: 'antibody', 'bds', 'bds_released', 'fixed', 'neural_bds'")


def test_a_built_scheduler_is_given_back():
    scheduler = BDSReleased()
    assert build(scheduler) is scheduler


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0},
        {"learning_rate": -1e-3},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"learning_rate": "fast"},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9,)},
        {"eps": 0},
        {"eps": math.inf},
        {"transform": "softmx"},
        {"initial_logit": math.nan},
        {"initial_logit": math.inf},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_an_option_error_that_names_it(options):
    (name,) = options
    with pytest.raises(OptionError, match=rf"BDSReleased\({name}.*="):
        BDSReleased(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"evidence": "proof"},
        {"prior_share": 0},
        {"prior_share": 1},
        {"prior_rows": 0},
        {"prior_rows": math.inf},
        {"temperature": -1},
        {"temperature": math.nan},
        {"draws": 3},
        {"max_probes": 0},
        {"max_probes": 256},
        {"seed": "x"},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_an_option_of_the_posterior_out_of_range_is_an_option_error_that_names_it(options):
    (name,) = options
    with pytest.raises(OptionError, match=rf"BDS\({name}.*="):
        BDS(**options)


@pytest.mark.parametrize("cls", CATALOG.values(), ids=CATALOG)
def test_an_unknown_option_is_an_option_error_that_lists_the_known(cls):
    with pytest.raises(OptionError, match=f"unknown option of {cls.__name__} 'lerning_rate'.*allowed: ") as caught:
        cls(lerning_rate=1)
    assert all(repr(field.name) in str(caught.value) for field in dataclasses.fields(cls))


@pytest.mark.parametrize("scheduler", [BDSReleased(), Antibody(), Fixed([1.0])], ids=lambda s: s.name)
def test_options_cannot_be_changed_after_the_start(scheduler):
    field = dataclasses.fields(scheduler)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(scheduler, field, None)
