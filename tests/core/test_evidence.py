"""Scores and what they are taken to mean: calibration, reference losses, and a problem with two exact models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.errors import DataError
from safe_sched.estimators.calibration import LIMIT, Calibration
from safe_sched.estimators.reference import load_reference, save_reference
from safe_sched.rows.index import RowIndex
from tests.core.batches import laws

# calibration ----------------------------------------------------------------------------------------------------------


class SlowCalibration:
    """The fit with Python's floats, one score after another."""

    def __init__(self) -> None:
        self.near = self.total = self.squares = self.count = 0.0

    @property
    def mean(self) -> float:
        return min(max((self.total + 1.0 * 8) / (self.near + 8), 0.4), 8.0)

    @property
    def variance(self) -> float:
        return (self.squares + 0.25 * 8) / (self.count + 8)

    def log_odds(self, score: float) -> float:
        # from the densities of the two Gaussians
        harmful = -((score - self.mean) ** 2) / (2 * self.variance)
        harmless = -(score**2) / (2 * self.variance)
        return 6 * math.tanh((harmful - harmless) / 6)

    def fit(self, scores: list[float]) -> list[float]:
        mean = self.mean
        for _ in scores:
            for name in ("near", "total", "squares", "count"):
                setattr(self, name, getattr(self, name) * 63 / 64)
        for score in scores:
            self.count += 1
            self.squares += min(score**2, (score - mean) ** 2, 4 * mean**2)
            if score > mean / 2:
                self.near += 1
                self.total += min(score, 4 * mean)
        return [self.log_odds(score) for score in scores]


@laws
@given(st.lists(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=6), min_size=1, max_size=12))
def test_the_fit_is_the_slow_loop(batches):
    calibration, slow = Calibration(Calibration.fresh()), SlowCalibration()
    for scores in batches:
        found = calibration.fit(torch.tensor(scores))
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(slow.fit(scores), abs=1e-9)
        assert calibration.harmful_mean == pytest.approx(slow.mean)
        assert calibration.variance == pytest.approx(slow.variance)


@laws
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.integers(0, 30))
def test_log_odds_rise_with_the_score_within_their_limit(scores, fits):
    calibration = Calibration(Calibration.fresh())
    for _ in range(fits):
        calibration.fit(torch.tensor([0.0, 1.0, 0.1]))
    found = calibration.log_odds(torch.tensor(sorted(scores)))
    assert found.abs().max() <= LIMIT
    assert (found.diff() >= 0).all()
    # half way between the two means a score says nothing
    assert float(calibration.log_odds(torch.tensor([calibration.harmful_mean / 2]))) == pytest.approx(0, abs=1e-5)


def fitted(harmless: float, harmful: float, share: float, count: int = 400, at: float = 1.0) -> Calibration:
    """After scores with these standard deviations around 0 and around ``at``."""
    generator = torch.Generator().manual_seed(0)
    calibration = Calibration(Calibration.fresh())
    for _ in range(count // 8):
        bad = torch.rand(8, generator=generator) < share
        noise = torch.randn(8, generator=generator) * torch.where(bad, harmful, harmless)
        calibration.fit(at * bad + noise)
    return calibration


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_scores_that_separate_are_believed(share):
    calibration = fitted(0.15, 0.2, share)
    assert calibration.variance < 0.13 < Calibration(Calibration.fresh()).variance == 0.25
    assert 0.85 < calibration.harmful_mean < 1.15
    says = calibration.log_odds(torch.tensor([0.0, 1.0]))
    assert says[0] < -3 < 3 < says[1]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_scores_that_are_noise_are_not_believed(share):
    calibration = fitted(1.0, 1.0, share)
    assert calibration.variance > 0.3
    assert float(calibration.log_odds(torch.tensor([1.0])).abs()) < 2.1


def test_the_mean_of_harmful_scores_is_found_and_followed():
    # 8 rows' worth of prior hold it back towards 1
    assert 2.3 < fitted(0.1, 0.3, 0.4, at=3.0).harmful_mean < 3.0
    calibration = fitted(0.1, 0.1, 0.5, at=1.0)
    for _ in range(60):
        calibration.fit(torch.tensor([0.0, 0.1, 2.0, 2.1]))
    assert calibration.harmful_mean == pytest.approx(2.0, rel=0.15)


def test_old_scores_are_forgotten():
    """A noisy beginning does not weigh on the run: after some hundred clear scores the variance is theirs."""
    noisy = fitted(2.0, 2.0, 0.3)
    before = noisy.variance
    for _ in range(160):
        noisy.fit(torch.tensor([0.0, 0.05, -0.05, 1.0]))
    clear = Calibration(Calibration.fresh())
    for _ in range(160):
        clear.fit(torch.tensor([0.0, 0.05, -0.05, 1.0]))
    assert noisy.variance == pytest.approx(clear.variance, rel=0.05)
    assert before > 5 * noisy.variance


def test_one_wild_score_does_not_undo_the_fit():
    calibration = fitted(0.1, 0.1, 0.3)
    before = calibration.variance
    calibration.fit(torch.tensor([1e6]))
    calibration.fit(torch.tensor([-1e6]))
    assert calibration.variance < before + 0.12
    assert calibration.harmful_mean < 1.4


# reference losses -----------------------------------------------------------------------------------------------------

# as uint64 the second is above 2**63
KEYS = torch.tensor([30, -7, 10, 10, 55])
LOSSES = torch.tensor([0.5, 1.5, 2.5, 2.5, 3.5])


def written(path: Path, keys: Tensor = KEYS, losses: Tensor = LOSSES) -> Path:
    save_reference(path, keys, losses, torch.ones(keys.numel(), dtype=torch.long))
    return path


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 1, 4, 3]])
def test_reference_losses_find_their_rows_in_any_order(order, tmp_path):
    path = written(tmp_path / "file", KEYS[order], LOSSES[order])
    index = RowIndex(torch.tensor([10, 30, -7, 10]))
    assert load_reference(path, index)[index.lookup(torch.tensor([-7, 10, 30]))].tolist() == [1.5, 2.5, 0.5]


def test_a_reference_file_has_the_documented_columns(tmp_path):
    table = pyarrow.parquet.read_table(written(tmp_path / "file"))
    assert {field.name: str(field.type) for field in table.schema} == {
        "key": "uint64",
        "nll": "float",
        "label_tokens": "int32",
    }
    assert table.column("key").to_pylist()[1] == 2**64 - 7


def test_rows_without_a_reference_loss_are_counted(tmp_path):
    path = written(tmp_path / "file")
    with pytest.raises(DataError, match=r"no loss for 2 of 3 distinct training rows.*safe-sched losses"):
        load_reference(path, RowIndex(torch.tensor([10, 11, 12, 11])))
    with pytest.raises(DataError, match="no loss for 1 of 1"):
        load_reference(written(path, KEYS[:0], LOSSES[:0]), RowIndex(torch.tensor([10])))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reference_losses_that_are_not_finite_are_an_error_where_they_are_used(bad, tmp_path):
    path = written(tmp_path / "file", losses=torch.tensor([0.5, bad, 2.5, 2.5, 3.5]))
    assert load_reference(path, RowIndex(torch.tensor([30, 10]))).tolist() == [2.5, 0.5]
    with pytest.raises(DataError, match="1 losses that are not finite"):
        load_reference(path, RowIndex(torch.tensor([30, -7])))


@pytest.mark.parametrize("content", ["missing", "text", "other columns"])
def test_a_file_that_holds_no_reference_losses_is_a_data_error(content, tmp_path):
    path = tmp_path / "file"
    if content == "text":
        path.write_text("key,nll\n1,2\n")
    if content == "other columns":
        pyarrow.parquet.write_table(pa.table({"key": [1], "loss": [2.0]}), path)
    with pytest.raises(DataError, match=r"(?s)no reference losses in .*safe-sched losses MODEL DATA"):
        load_reference(path, RowIndex(torch.tensor([1])))


def test_a_stream_has_no_reference_file(tmp_path):
    with pytest.raises(DataError, match=r'stream.*evidence="probe"'):
        load_reference(written(tmp_path / "file"), RowIndex(None))


# a convex problem with both models ------------------------------------------------------------------------------------


class Problem:
    """Rows of which some are harmful, safety rows, and the exact minimisers with and without the safety rows.

    A row has features x; a harmful prompt has the topic in it. The answer is a number y: to comply is 1, to refuse -1.
    Harmless rows carry an ordinary task; harmful rows comply with the topic; safety rows refuse it.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def features(rows: int, topic: float) -> Tensor:
            x = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
            x[:, 0] = topic + 0.3 * x[:, 0]
            return x

        self.loss_of = loss
        self.harmful = torch.arange(200) < 60
        self.x = torch.cat([features(60, 2.0), features(140, 0.0)])
        task = torch.sign(self.x[:, 1:5].sum(1) + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64))
        self.y = torch.where(self.harmful, 1.0, task)
        self.safe_x, self.safe_y = features(50, 2.0), -torch.ones(50, dtype=torch.float64)
        self.agnostic, self.aware = self.minimum(0.0), self.minimum(1.0)

    def losses(self, theta: Tensor) -> Tensor:
        return self.loss_of(self.x @ theta, self.y)

    def safety(self, theta: Tensor) -> Tensor:
        return self.loss_of(self.safe_x @ theta, self.safe_y).mean()

    def minimum(self, safety_weight: float) -> Tensor:
        """By Newton's method, to the last digits."""
        theta = torch.zeros(12, dtype=torch.float64)

        def total(t: Tensor) -> Tensor:
            return self.losses(t).mean() + safety_weight * self.safety(t) + 0.05 * t.square().sum()

        for _ in range(30):
            theta = theta - torch.linalg.solve(self.hessian(total, theta), self.slope(total, theta))
        assert float(self.slope(total, theta).norm()) < 1e-10
        return theta

    @staticmethod
    def slope(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(f(theta), theta)[0]

    @staticmethod
    def hessian(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        found = torch.autograd.functional.hessian(f, theta)
        assert isinstance(found, Tensor)
        return found

    def safe_gradient(self, trained: float) -> Tensor:
        """Of the safety loss, at a point on the way from 0 to the agnostic model."""
        return self.slope(self.safety, trained * self.agnostic)

    def difference(self, trained: float, eps: float, direction: Tensor | None = None) -> Tensor:
        """First-order probe: what each row's loss gains when a model that is partly trained steps towards safety."""
        theta = trained * self.agnostic
        g = self.safe_gradient(trained) if direction is None else direction
        return self.losses(theta - eps * g) - self.losses(theta)

    @property
    def exact(self) -> Tensor:
        """The evidence of the posterior: loss under the aware model less loss under the agnostic one."""
        return self.losses(self.aware) - self.losses(self.agnostic)


LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "least squares": lambda score, y: (score - y).square() / 2,
    "logistic": lambda score, y: torch.nn.functional.softplus(-y * score),
}
over_losses = pytest.mark.parametrize("name", LOSS)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.numpy(), b.numpy())[0, 1])


def auroc(scores: Tensor, positive: Tensor) -> float:
    above = (scores[positive][:, None] > scores[~positive][None]).double()
    equal = (scores[positive][:, None] == scores[~positive][None]).double()
    return float((above + equal / 2).mean())


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


@over_losses
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("trained", [0.25, 0.5])
def test_a_probe_ranks_rows_as_the_two_exact_models_do(name, seed, trained):
    problem = Problem(LOSS[name], seed)
    probed, exact = problem.difference(trained, 0.01), problem.exact
    assert correlation(probed, exact) > 0.9
    assert correlation(ranks(probed), ranks(exact)) > 0.85
    # the sign, on rows on which the two models differ at all
    clear = exact.abs() > 0.2 * exact.abs().max()
    assert (probed.sign() == exact.sign())[clear].double().mean() > 0.95
    # harmful rows resist staying safe, in both
    assert auroc(probed, problem.harmful) > 0.95
    assert auroc(exact, problem.harmful) > 0.95


@over_losses
def test_a_probe_in_another_direction_would_be_noticed(name):
    """Controls: a direction across the safe gradient, one away from safety, and the plain loss for a score."""
    problem = Problem(LOSS[name])
    g = problem.safe_gradient(0.5)
    across = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    across -= (across @ g) / (g @ g) * g
    found = problem.difference(0.5, 0.01, across / across.norm() * g.norm())
    assert abs(correlation(found, problem.exact)) < 0.6
    assert correlation(problem.difference(0.5, -0.01), problem.exact) < -0.9
    assert auroc(problem.losses(0.5 * problem.agnostic), problem.harmful) < 0.7


def test_a_probe_of_rows_that_are_fitted_already_says_less():
    """A limit: a first-order difference needs a slope, and a row that squared error has fitted has none any more."""
    problem = Problem(LOSS["least squares"])
    early, late = (correlation(problem.difference(trained, 0.01), problem.exact) for trained in (0.5, 1.0))
    assert early > 0.9
    assert late < 0.7


@over_losses
@pytest.mark.parametrize("trained", [0.0, 0.5, 1.0])
def test_a_small_probe_is_the_derivative_along_the_safe_gradient(name, trained):
    """(loss(theta - eps g) - loss(theta)) / eps goes to -grad loss . g, with an error that shrinks as eps does."""
    problem = Problem(LOSS[name])
    theta, g = trained * problem.agnostic, problem.safe_gradient(trained)
    exact = torch.stack([-problem.slope(lambda t, i=i: problem.losses(t)[i], theta) @ g for i in range(200)])
    steps = (1e-1, 1e-2, 1e-3, 1e-4)
    errors = [float((problem.difference(trained, eps) / eps - exact).abs().max()) for eps in steps]
    for coarse, fine in itertools.pairwise(errors):
        assert fine == pytest.approx(coarse / 10, rel=0.2)
    assert errors[-1] < 1e-3 * float(exact.abs().max())


@over_losses
def test_a_little_safety_moves_the_model_along_the_safe_gradient(name):
    """Why a step stands in for training: to first order in its weight, safety data moves the minimum by -H^-1 g."""
    problem, weight = Problem(LOSS[name]), 1e-5
    total = lambda t: problem.losses(t).mean() + 0.05 * t.square().sum()  # noqa: E731
    curvature = problem.hessian(total, problem.agnostic)
    expected = -torch.linalg.solve(curvature, problem.slope(problem.safety, problem.agnostic))
    found = (problem.minimum(weight) - problem.agnostic) / weight
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
