"""A prior for every row: what it adds to a scheduler's posterior, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from safe_sched import BDS, Antibody, Fixed, NeuralBDS
from safe_sched.errors import DataError, OptionError
from safe_sched.estimators.prior import RowPrior
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched.schedulers import BDSReleased, bds
from safe_sched.schedulers.combined import combine
from safe_sched.training.session import Session

KEYS = torch.tensor([50, 10, 40, 20, 30])
P = [0.05, 0.9, 0.05, 0.2, 0.3]  # their mean is 0.3
EULER = 0.5772156649015329


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def told(p: list[float] = P) -> list[float]:
    """The log-odds that the rows bring, by hand, within -2 and 6."""
    base = logit(sum(p) / len(p))
    return [min(6.0, max(-2.0, logit(one) - base)) for one in p]


def begun(scheduler: Any, p: list[float] | None = P, keys: torch.Tensor = KEYS) -> Session:
    session = Session(scheduler, RowIndex(keys))
    if p is not None:
        session.take_prior(torch.tensor(p))
    return session


def harmful(total: float, std: float = 4.0) -> float:
    """P(harmful) of BDS: the mean of sigmoid(-z) under exp(-total sigmoid(z) - z^2 / (2 std^2)), by a plain sum."""
    above = below = 0.0
    for i in range(-4000, 4001):
        z = i / 100
        density = math.exp(-total / (1 + math.exp(-z)) - z * z / (2 * std * std))
        above += density / (1 + math.exp(z))
        below += density
    return above / below


def digamma(n: int) -> float:
    return -EULER + sum(1 / k for k in range(1, n))


SHARE = digamma(1) - digamma(9)  # Beta(1, 9) and no row judged yet


def test_a_prior_is_the_odds_of_a_row_over_those_of_all():
    assert begun(BDS()).table()["prior_log_odds"].to_pylist() == pytest.approx(told(), abs=2e-3)


def test_it_is_held_closer_where_it_clears():
    prior = RowPrior.of(torch.tensor([0.0, 1.0, 0.5]), RowIndex(KEYS[:3]))
    assert sorted(prior.log_odds.tolist()) == [-2.0, 0.0, 6.0]


def test_before_any_score_a_row_has_the_weight_of_its_prior():
    table = begun(BDS()).table()
    expected = [(1 - harmful(SHARE + a)) / (1 - harmful(SHARE)) for a in told()]
    assert table["weight"].to_pylist() == pytest.approx(expected, abs=3e-3)
    assert table["p_harmful"].to_pylist() == pytest.approx([harmful(SHARE + a) for a in told()], abs=3e-3)
    assert max(expected) - min(expected) > 0.5  # there was something to tell apart


def test_scores_add_to_it(monkeypatch):
    """The posterior is that of the sum of both. Control: without the prior, the same scores give another."""
    monkeypatch.setattr(BDS, "share_log_odds", lambda self, judged: 0.0)
    monkeypatch.setattr(bds, "_CHAINS", 64)
    monkeypatch.setattr(bds, "_BURN_IN", 200)
    scheduler = BDS(draws=1000)
    found = []
    for p in (P, None):
        session = begun(scheduler, p)
        session.learn("probe", torch.arange(5), torch.tensor([0.1, 1.0, 0.2, 0.9, 0.4]))
        found.append(session.table().to_pydict())
    with_prior, without = found
    assert with_prior["log_odds"] == without["log_odds"]
    for row, a in enumerate(told()):
        said = with_prior["log_odds"][row]
        assert with_prior["p_harmful"][row] == pytest.approx(harmful(said + a), abs=0.03)
        assert without["p_harmful"][row] == pytest.approx(harmful(said), abs=0.03)
    assert np.abs(np.subtract(with_prior["p_harmful"], without["p_harmful"])).max() > 0.1


def test_the_neural_scheduler_adds_it_to_the_heads_log_odds():
    """Before the head knows anything: the mean of sigmoid(z - a) over z, by a plain sum, over that at a = 0."""
    scheduler = NeuralBDS()
    session = begun(scheduler)
    state: Any = session.state
    mean, std = float(state.logit[0]), math.sqrt(float(state.spread[0]))
    z = np.linspace(mean - 12 * std, mean + 12 * std, 20001)
    density = np.exp(-(((z - mean) / std) ** 2) / 2)
    expected = [float((density / (1 + np.exp(a - z))).sum() / density.sum() / 0.9) for a in told()]
    assert session.row_weights().tolist() == pytest.approx(expected, abs=5e-3)


def test_fixed_takes_one_minus_the_probability():
    assert begun(Fixed()).row_weights().tolist() == pytest.approx([1 - p for p in P])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("make", [BDS, NeuralBDS])
def test_where_all_rows_have_the_same_it_changes_nothing(make, p):
    """Bit for bit, through scores and steps. Control: one row with another p does."""

    def after(given: list[float] | None) -> dict[str, torch.Tensor]:
        session = begun(make(), given)
        for step in range(4):
            session.learn("probe", torch.arange(5), torch.tensor([0.1, 1.0, 0.2, 0.9, 0.4]))
            features = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            seen = Observation(torch.arange(5), torch.ones(5, dtype=torch.long), step, {"hidden_state": features})
            session.scheduler.update(session.state, seen)
        found = session.state.tensors() | {"weight": session.row_weights()}
        return {name: value for name, value in found.items() if name != "row_prior"}

    plain, equal, other = after(None), after([p] * 5), after([p] * 4 + [0.5])
    assert all(torch.equal(plain[name], equal[name]) for name in plain)
    assert not torch.equal(plain["weight"], other["weight"])


def test_rows_with_a_prior_are_measured_all_the_same():
    scheduler = BDS()
    session = begun(scheduler, [0.0001, 0.9999, 0.2, 0.2, 0.2])
    assert scheduler.due(session.state, "probe", torch.arange(5)).all()


def test_rows_of_one_content_share_the_mean():
    prior = RowPrior.of(torch.tensor([0.2, 0.1, 0.4]), RowIndex(torch.tensor([7, 3, 7])))
    assert prior.p.tolist() == pytest.approx([0.1, 0.3])


def test_its_name_tells_priors_apart_and_not_orders():
    index = RowIndex(KEYS)
    backwards = RowIndex(KEYS.flip(0))
    one = RowPrior.of(torch.tensor(P), index).fingerprint()
    assert RowPrior.of(torch.tensor(P[::-1]), backwards).fingerprint() == one
    assert RowPrior.of(torch.tensor(P[::-1]), index).fingerprint() != one


@pytest.mark.parametrize(
    ("scheduler", "p", "error", "match"),
    [
        (BDS(), P[:4], DataError, "the prior has 4 numbers for 5 training rows"),
        (BDS(), [*P, 0.5], DataError, "6 numbers for 5 training rows.*without packing"),
        (BDS(), [0.1, math.nan, 0.2, math.nan, 0.3], DataError, r"2 of 5 training rows.*first: row 1, nan.*take them"),
        (BDS(), [0.1, 1.5, 0.2, 0.1, 0.3], DataError, r"row 1, 1\.5\); allowed: a number from 0 to 1"),
        (BDS(), [0.1, -0.1, 0.2, 0.1, 0.3], DataError, "allowed: a number from 0 to 1"),
        (BDSReleased(), P, OptionError, "'bds_released' takes no prior; use BDS"),
        (Fixed([1.0] * 5), P, OptionError, r"use Fixed\(\) with the prior"),
        (Antibody(), P, OptionError, "'antibody' takes no prior; use BDS"),
        (combine(BDS(), Antibody()), P, OptionError, "'combined' takes no prior"),
    ],
)
def test_what_is_no_prior_is_refused(scheduler, p, error, match):
    with pytest.raises(error, match=match):
        begun(scheduler, p)


def test_a_stream_takes_none():
    with pytest.raises(DataError, match="this one is a stream"):
        Session(BDS(), RowIndex(None)).take_prior(torch.tensor(P))
