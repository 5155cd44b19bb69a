"""Several schedulers as one: the product of experts by hand, each with its say, and a run that keeps all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.errors import CoverageError, OptionError, StateError
from safe_sched.estimators.calibration import LIMIT
from safe_sched.needs import NLL
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, Scheduler
from safe_sched.schedulers import BDS, Antibody, BDSReleased, Fixed, NeuralBDS, combine
from safe_sched.schedulers.combined import CLEARS, Combined
from safe_sched.training.session import Session
from tests.core.batches import laws, pad, row
from tests.core.runs import same

KEYS = torch.tensor([10, 20, 30])
ROWS = [row(5, 6, 7), row(8, 9, 3), row(1, 2)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def told(bds: Sequence[float], antibody: Sequence[float], scheduler: Combined | None = None) -> tuple[Combined, Any]:
    """A combination whose experts say this of every row, in nats; nan of Antibody: it was not asked."""
    scheduler = combine(BDS(), Antibody()) if scheduler is None else scheduler
    state = scheduler.init(RowIndex(torch.arange(len(bds)) + 1))
    first, second = state.parts
    first.log_odds[:] = torch.tensor(list(bds)).half()
    second.ratio[:] = -torch.tensor(list(antibody))  # threshold 0, slope 1
    return scheduler, state


def asked(slots: Sequence[int], step: int = 0) -> Observation:
    return Observation(torch.tensor(slots), torch.full((len(slots),), 3), step, {"nll": torch.ones(len(slots))})


# the product of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bds", "antibody", "share", "weight"),
    [
        (0.0, 0.0, 0.1, 1.0),
        (math.log(9), 0.0, 0.1, 0.5 / 0.9),  # 1 to 9 before, 1 to 1 now
        (math.log(3), math.log(3), 0.1, 0.5 / 0.9),  # the same from both together
        (math.log(3), -math.log(3), 0.1, 1.0),  # one against the other
        (math.log(81), 0.0, 0.1, 0.1 / 0.9),
        (math.log(3), math.log(2), 0.5, 2 / 7),  # (1/7) / (1/2)
        (-1.0, -2.0, 0.1, 1.0),  # never above 1
        (6.0, 6.0, 0.01, sigmoid(math.log(99) - 12) / 0.99),
    ],
)
def test_the_weight_of_a_row_by_hand(bds, antibody, share, weight):
    """P(harmless) after the evidence, by P(harmless) before it."""
    scheduler, state = told([bds], [antibody], combine(BDS(), Antibody(), prior_share=share))
    assert scheduler.weights(state, asked([0])).item() == pytest.approx(weight, rel=3e-3)  # BDS keeps 16 bits
    assert scheduler.columns(state)["p_harmful"].item() == pytest.approx(
        sigmoid(math.log(share / (1 - share)) + bds + antibody), rel=3e-3
    )


nats = st.floats(-30, 30, width=16)
BAYES = BDS()


@laws
@given(said=st.lists(st.tuples(nats, nats), min_size=1, max_size=8), share=st.floats(0.001, 0.999))
def test_the_product_of_experts_as_a_slow_loop(said, share):
    scheduler, state = told([a for a, _ in said], [b for _, b in said], combine(BAYES, Antibody(), prior_share=share))
    expected = []
    for evidence in said:
        odds = share / (1 - share)
        for one in evidence:
            odds *= math.exp(min(max(one, -CLEARS), LIMIT))
        expected.append(min(1 / (1 + odds) / (1 - share), 1.0))
    found = scheduler.weights(state, asked(range(len(said))))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(found, scheduler.slot_weights(state))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("rows", [1, 3, 8, 33])
def test_rows_that_nothing_is_known_of_have_weight_1_bit_for_bit(share, rows):
    scheduler = combine(BDS(), Antibody(), prior_share=share)
    state = scheduler.init(RowIndex(torch.arange(rows) + 1))
    assert scheduler.slot_weights(state).tolist() == [1.0] * rows
    # those for which the experts cancel out as well
    scheduler, state = told([1.5] * rows, [-1.5] * rows, scheduler)
    assert scheduler.weights(state, asked(range(rows))).tolist() == [1.0] * rows
    # control: a little evidence is seen
    scheduler, state = told([1.5] * rows, [-1.25] * rows, scheduler)
    assert scheduler.weights(state, asked(range(rows))).max() < 1


def test_evidence_against_a_row_outweighs_what_clears_it():
    """However sure one is of a row, the other's word for it is worth 2 nats; its word against it 6."""
    scheduler, state = told([600.0, 18.0, -18.0, LIMIT, 600.0], [-LIMIT, -CLEARS, LIMIT, -1.0, LIMIT])
    p = scheduler.columns(state)["p_harmful"].tolist()
    prior = math.log(1 / 9)
    assert p[:3] == [pytest.approx(sigmoid(prior + LIMIT - CLEARS))] * 3
    assert p[3:] == [pytest.approx(sigmoid(prior + LIMIT - 1)), pytest.approx(sigmoid(prior + 2 * LIMIT))]
    # the same with the roles changed: what Antibody says against a row is held by its own clip
    scheduler, state = told([-LIMIT, LIMIT], [50.0, -50.0])
    assert scheduler.columns(state)["p_harmful"].tolist() == [pytest.approx(sigmoid(prior + LIMIT - CLEARS))] * 2


class Says(Scheduler[Any]):
    """A scheduler of somebody else's, with an opinion of its own."""

    name: ClassVar[str] = "says"
    state_type = Antibody.state_type
    needs = (NLL(),)

    def init(self, index: RowIndex) -> Any:
        return Antibody().init(index)

    def weights(self, state: Any, batch: Observation) -> Tensor:
        return torch.full((batch.slots.numel(),), 0.3)

    def update(self, state: Any, step: Observation) -> dict[str, float]:
        return {"steps": float(step.step)}

    def log_odds(self, state: Any, slots: Any) -> Tensor:
        return torch.full_like(state.ratio, -40.0)[slots]


def test_a_third_expert_has_the_same_say():
    """4 + 3 - CLEARS = 5 nats: each is held for itself."""
    scheduler = combine(BDS(), Antibody(), Says())
    state = scheduler.init(RowIndex(torch.tensor([1, 2])))
    first, second, _ = state.parts
    first.log_odds[:], second.ratio[:] = 4.0, -3.0
    expected = sigmoid(math.log(9) - 7 + CLEARS) / 0.9
    assert scheduler.weights(state, asked([1])).tolist() == [pytest.approx(expected)]
    assert scheduler.update(state, asked([0], step=3))["says_steps"] == 3.0
    # a plugin without columns still has its weight in the table
    assert [name for name in scheduler.columns(state) if name.startswith("says")] == ["says_weight"]
    assert [need.name for need in scheduler.needs] == ["probe", "refusal_odds", "nll"]


# what each part says --------------------------------------------------------------------------------------------------


def session_of(scheduler: Any = None, streaming: bool = False) -> Session:
    scheduler = combine(BDS(), Antibody()) if scheduler is None else scheduler
    return Session(scheduler, RowIndex(None if streaming else torch.tensor(pad(ROWS).keys)))


def states(session: Session) -> tuple[Any, Any]:
    """The states of BDS and Antibody."""
    state: Any = session.state
    first, second = state.parts
    return first, second


def test_the_table_shows_every_part():
    session = session_of()
    (batch,) = session.begin_step([pad(ROWS)])
    session.learn("probe", batch.slots[:2], torch.tensor([0.0, 1.0]))
    session.learn("refusal_odds", batch.slots, torch.tensor([8.0, -1.0, -2.0]))
    table, own = session.table(), states(session)
    added = ["p_harmful", "bds_weight", "bds_p_harmful", "bds_p_harmful_low", "bds_p_harmful_high", "bds_log_odds"]
    added += ["bds_scored", "antibody_weight", "antibody_p_harmful", "antibody_ratio"]
    assert table.column_names == ["row", "key", "weight", "seen", *added]
    found = {name: table.column(name).to_pylist() for name in added}
    assert found["antibody_ratio"] == [8.0, -1.0, -2.0]
    assert found["bds_scored"] == [1, 1, 0]
    slots = batch.slots
    assert found["bds_weight"] == BDS().slot_weights(own[0])[slots].tolist()
    assert found["antibody_weight"] == Antibody().slot_weights(own[1])[slots].tolist()
    assert found["antibody_p_harmful"] == pytest.approx([sigmoid(-LIMIT), sigmoid(1), sigmoid(2)])
    for i in range(3):
        said = found["bds_log_odds"][i], -found["antibody_ratio"][i]
        evidence = sum(min(max(one, -CLEARS), LIMIT) for one in said)
        assert found["p_harmful"][i] == pytest.approx(sigmoid(math.log(1 / 9) + evidence), rel=1e-4)
        assert table.column("weight").to_pylist()[i] == pytest.approx(min((1 - found["p_harmful"][i]) / 0.9, 1))


def test_scores_go_to_the_expert_that_they_are_for():
    """A probe says nothing of ratios, and a ratio nothing of scores."""
    session = session_of()
    bds, antibody = states(session)
    session.learn("probe", torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))
    assert bds.scored.tolist() == [1, 1, 0]
    assert torch.isnan(antibody.ratio).all()
    before = bds.log_odds.clone()
    session.learn("refusal_odds", torch.tensor([2, -1]), torch.tensor([4.0, 9.0]))
    assert antibody.ratio[2] == 4
    assert torch.isnan(antibody.ratio[:2]).all()
    assert torch.equal(bds.log_odds, before)
    assert bds.scored.tolist() == [1, 1, 0]
    assert list(session.needs()) == ["probe", "refusal_odds"]


def test_scores_that_no_expert_takes_are_an_option_error():
    with pytest.raises(OptionError, match="'combined' takes no values of 'covariance'"):
        session_of().learn("covariance", torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(OptionError, match="'bds' takes no values of 'refusal_odds'"):
        session_of(BDS()).learn("refusal_odds", torch.tensor([0]), torch.tensor([1.0]))


def test_a_row_that_an_expert_was_not_asked_about_stops_the_run():
    scheduler, state = told([0.0, 0.0], [1.0, math.nan])
    scheduler.weights(state, asked([0]))
    with pytest.raises(CoverageError, match="rows of step 6 were not compared with a refusal"):
        scheduler.weights(state, asked([0, 1], step=6))


def test_where_antibody_abstains_bds_decides_alone():
    scheduler = combine(BDS(), Antibody(on_inversion="fallback"))
    state = scheduler.init(RowIndex(KEYS))
    state.parts[0].log_odds[0] = math.log(9)
    known = dict.fromkeys(("refusing", "complying", "others"), torch.empty(0)) | {"refused": torch.tensor([-1.0])}
    with pytest.warns(UserWarning, match="falls back"):
        scheduler.calibrate(state, "refusal_odds", known)
    assert scheduler.weights(state, asked([0, 1])).tolist() == pytest.approx([0.5 / 0.9, 1.0], rel=1e-3)


def test_every_expert_is_updated_and_names_its_numbers():
    reference = BDS(evidence="reference", reference="adapter:agnostic")
    scheduler = combine(reference, Antibody())
    assert [need.name for need in scheduler.needs] == ["nll", "reference_loss", "refusal_odds"]
    state, alone = scheduler.init(RowIndex(KEYS)), reference.init(RowIndex(KEYS))
    bds, antibody = state.parts
    for own in (bds, alone):
        own.reference[:] = 1.0
    logged: dict[str, float] = {}
    for number in range(4):
        nll, tokens = torch.tensor([1.0 + number, 2.0]), torch.tensor([3, 3])
        seen = Observation(torch.tensor([0, 1]), tokens, number, {"nll": nll})
        logged = scheduler.update(state, seen)
        expected = reference.update(alone, seen)
        assert logged == {f"bds_{name}": value for name, value in expected.items()}
    assert "bds_score_variance" in logged
    assert same(bds, alone)
    assert antibody.steps == 4


# what a run keeps -----------------------------------------------------------------------------------------------------


def train(session: Session, steps: int = 2) -> None:
    for number in range(steps):
        (batch,) = session.begin_step([pad(ROWS)])
        session.learn("probe", batch.slots, torch.tensor([1.0, 0.1, 0.3 * number]))
        if not number:
            session.learn("refusal_odds", batch.slots, torch.tensor([-3.0, 5.0, 0.5]))
        session.weigh(batch)
        session.mark_gated(batch)
        session.end_step()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_session_goes_on_from_what_it_saved(streaming, tmp_path):
    first, second = session_of(streaming=streaming), session_of(streaming=streaming)
    train(first)
    first.save(tmp_path / "s")
    second.load(tmp_path / "s", steps=2)
    assert same(second.state, first.state)
    assert states(second)[1].steps == 2
    for ours, theirs in zip(states(second), states(first), strict=True):
        assert type(ours) is type(theirs)
    for session in (first, second):
        train(session, 1)
    assert same(second.state, first.state)
    assert second.table().equals(first.table())


def test_a_state_of_another_combination_is_not_resumed(tmp_path):
    session_of().save(tmp_path / "s")
    for other in (
        combine(Antibody(), BDS()),
        combine(BDS(), Antibody(), prior_share=0.2),
        combine(BDS(max_probes=2), Antibody()),
        BDS(),
    ):
        with pytest.raises(StateError, match="scheduler"):
            session_of(other).load(tmp_path / "s")


def test_the_tensors_of_a_state_are_named_after_the_experts():
    scheduler, state = told([1.0, 2.0], [3.0, 4.0])
    tensors = state.tensors()
    assert {name.split(".")[0] for name in tensors} == {"bds", "antibody"}
    assert torch.equal(tensors["antibody.ratio"], torch.tensor([-3.0, -4.0]))
    assert same(scheduler.state_type.from_tensors(tensors), state)
    assert scheduler.state_type.sized_later == frozenset()


def test_new_rows_of_a_stream_are_new_to_every_expert():
    index = RowIndex(None)
    scheduler = combine(BDS(), Antibody())
    state = scheduler.init(index)
    index.add(KEYS[:2])
    state = scheduler.grow(state, index)
    bds, antibody = state.parts
    bds.log_odds[:], antibody.ratio[:] = 2.0, -1.0
    index.add(KEYS)
    state = scheduler.grow(state, index)
    assert scheduler.slot_weights(state).tolist() == [pytest.approx(sigmoid(math.log(9) - 3) / 0.9)] * 2 + [1.0]
    assert scheduler.columns(state)["antibody_ratio"].isnan().tolist() == [False, False, True]


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [Fixed(), BDSReleased(), NeuralBDS()], ids=["fixed", "released", "neural"])
def test_a_scheduler_without_log_odds_is_refused(other):
    for parts in ((other, Antibody()), (Antibody(), other)):
        with pytest.raises(OptionError, match=f"'{other.name}' cannot be combined: it gives no log-odds; use BDS and"):
            combine(*parts)


@pytest.mark.parametrize(
    "parts", [(), (BDS(),), (BDS(), BDS(max_probes=2)), (Antibody(), BDS(), Antibody(tau=2.0))], ids=len
)
def test_fewer_than_two_names_or_one_twice_are_an_option_error(parts):
    with pytest.raises(OptionError, match="give two or more schedulers of different names"):
        combine(*parts)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_a_share_out_of_range_is_an_option_error(share):
    with pytest.raises(OptionError, match=r"combine\(prior_share=.*allowed: a number in \(0, 1\)"):
        combine(BDS(), Antibody(), prior_share=share)


def test_settings_are_json_and_hold_those_of_every_part():
    scheduler = combine(BDS(max_probes=2), Antibody(tau=2.0), prior_share=0.25)
    settings = json.loads(json.dumps(scheduler.settings()))
    assert (settings["name"], settings["prior_share"]) == ("combined", 0.25)
    assert [part["name"] for part in settings["parts"]] == ["bds", "antibody"]
    assert (settings["parts"][0]["max_probes"], settings["parts"][1]["tau"]) == (2, 2.0)
    assert isinstance(scheduler, Scheduler)
