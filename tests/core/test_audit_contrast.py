"""What a model's signals add to a probability, by what known rows have of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from safe_sched.audit.calibration.calibrate import FileCalibration, calibrate
from safe_sched.audit.calibration.contrast import YIELDS, Contrast

RNG = np.random.default_rng(0)
ROWS, BAD = 1000, 50


def normal(mean: float, size: int, width: float = 1.0) -> np.ndarray:
    """Quantiles of a normal density, in any order: no luck in them."""
    from statistics import NormalDist

    values = np.array([NormalDist(mean, width).inv_cdf((i + 0.5) / size) for i in range(size)])
    return np.random.default_rng(int(abs(mean) * 10) + size).permutation(values)


TEXT = np.concatenate([normal(0, ROWS - BAD), normal(8, BAD)])
KNOWN, HARMLESS = {"text": normal(8, 200)}, {"text": normal(4, 200)}
IS_BAD = np.arange(ROWS) >= ROWS - BAD


def chances(fitted: FileCalibration, values: dict[str, np.ndarray]) -> np.ndarray:
    return fitted.chances(fitted.score(values), fitted.added(values))[0]


def fitted(model: np.ndarray | None, known: Any = None, harmless: Any = None) -> np.ndarray:
    values = {"text": TEXT} if model is None else {"text": TEXT, "model": model}
    known = KNOWN if known is None else {**KNOWN, "model": known}
    harmless = HARMLESS if harmless is None else {**HARMLESS, "model": harmless}
    return chances(calibrate(values, known, harmless, absolute=["model"]), values)


def test_log_odds_are_those_of_a_slow_logistic_regression():
    """Gradient steps on the balanced loss with scikit-learn's own penalty, |a|^2 / 2 beside the weighted sum."""
    one, none = normal(1.0, 60), normal(-0.5, 90, 2.0)
    found = Contrast.of({"x": one}, {"x": none})
    assert found is not None
    middle, spread = (one.mean() + none.mean()) / 2, math.sqrt((one.var() + none.var()) / 2)
    z = (np.concatenate([one, none]) - middle) / spread
    y = np.r_[np.ones(60), np.zeros(90)]
    w = np.where(y == 1, 150 / (2 * 60), 150 / (2 * 90))
    a = b = 0.0
    for _ in range(20_000):
        gap = w * (1 / (1 + np.exp(-(a * z + b))) - y)
        a, b = a - 0.005 * (gap @ z + a), b - 0.005 * gap.sum()
    x = np.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(found.log_odds({"x": x}), a * (x - middle) / spread + b, atol=1e-3)


def test_the_two_are_added_by_bayes():
    contrast = Contrast(("x",), np.zeros(1), np.ones(1), np.full(1, 0.5), 0.0, math.log(64))
    p, x = np.array([0.2, 0.9, 0.5]), np.array([1.0, -2.0, 100.0])
    expected = []
    for chance, value in zip(p, x, strict=True):
        says = max(min(0.5 * value, math.log(64)), -math.log(64))
        odds = chance / (1 - chance) * math.exp(says)
        expected.append(odds / (1 + odds))
    np.testing.assert_allclose(contrast.added(p, contrast.log_odds({"x": x})), expected)


def test_a_model_that_says_nothing_changes_nothing():
    alone = fitted(None)
    nothing = np.full(ROWS, np.nan)
    np.testing.assert_array_equal(fitted(nothing), alone)
    np.testing.assert_array_equal(fitted(nothing, normal(2, 30), normal(-2, 30)), alone)
    some = np.where(IS_BAD, 2.0, np.nan)  # control: what it says does
    assert (fitted(some, normal(2, 30), normal(-2, 30))[~IS_BAD] == alone[~IS_BAD]).all()
    assert (fitted(some, normal(2, 30), normal(-2, 30)) != alone).any()


def test_a_model_to_which_all_prompts_are_alike_moves_no_row_across_the_border():
    alone = fitted(None)
    found = fitted(normal(0, ROWS), normal(0, 40), normal(0.0, 200))
    assert ((found >= 0.5) == (alone >= 0.5)).all()


def test_known_harmful_rows_that_stand_far_above_the_files_do_not_hide_these():
    """An aligned model has often seen the safety prompts: the file's harmful rows get less of its signal than these."""
    model = np.concatenate([normal(0, ROWS - BAD, 0.01), normal(4, BAD, 2.0)])
    known, harmless = normal(12, 32), normal(0.0, 300, 2.0)
    found = fitted(model, known, harmless)
    assert _auroc(found) == 1.0
    values = {"text": TEXT, "model": model}
    both = ({**KNOWN, "model": known}, {**HARMLESS, "model": harmless})
    together = chances(calibrate(values, *both), values)  # control: one score, anchored at known rows
    assert _auroc(together) < 0.98


def _auroc(p: np.ndarray) -> float:
    gaps = p[IS_BAD][:, None] - p[~IS_BAD][None]
    return float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))


def test_a_model_that_is_sure_has_the_last_word():
    """Text takes look-alikes for harmful; the model tells them apart."""
    text = np.concatenate([normal(0, ROWS - 2 * BAD), normal(8, 2 * BAD)])
    model = np.where(IS_BAD, 6.0, -6.0)
    values = {"text": text, "model": model}
    sides = ({**KNOWN, "model": normal(6, 40)}, {**HARMLESS, "model": normal(-6, 40)})
    found = chances(calibrate(values, *sides, absolute=["model"]), values)
    assert ((found >= 0.5) == IS_BAD).all()
    alone = chances(calibrate({"text": text}, KNOWN, HARMLESS), {"text": text})
    assert (alone[ROWS - 2 * BAD : ROWS - BAD] >= 0.5).mean() > 0.9  # control


def test_nobody_is_surer_than_known_rows_allow():
    contrast = Contrast.of({"x": normal(50, 32)}, {"x": normal(-50, 400)})
    assert contrast is not None
    assert contrast.cap == pytest.approx(math.log(64))
    says = contrast.log_odds({"x": np.array([-1e6, 1e6])})
    np.testing.assert_allclose(says, [-contrast.cap, contrast.cap])
    most = 1 / (1 + math.exp(-(1 + YIELDS) * contrast.cap))
    np.testing.assert_allclose(contrast.added(np.array([0.0, 1.0]), says), [1 - most, most])


def test_a_signal_that_runs_backwards_is_left_out():
    harmful, harmless = {"x": normal(2, 50), "y": normal(-3, 50)}, {"x": normal(0, 50), "y": normal(0, 50)}
    contrast = Contrast.of(harmful, harmless)
    assert contrast is not None
    assert contrast.slopes[0] > 0 == contrast.slopes[1]
    assert Contrast.of({"y": harmful["y"]}, {"y": harmless["y"]}) is None


def test_sums_are_those_of_the_rows():
    model = np.where(IS_BAD, 3.0, -1.0)
    values = {"text": TEXT, "model": model}
    sides = ({**KNOWN, "model": normal(3, 40)}, {**HARMLESS, "model": normal(-1, 40)})
    found = calibrate(values, *sides, absolute=["model"])
    score, added = found.score(values), found.added(values)
    sums = found.sums(score, added)
    assert sums[0] == pytest.approx(found.chances(score, added)[0].sum())
    assert sums.shape == (1 + len(found.curves),)


def test_what_became_of_a_models_signals_is_said():
    values = {"text": TEXT, "model": normal(0, ROWS), "other": normal(0, ROWS)}
    sides = ({**KNOWN, "model": normal(3, 40), "other": normal(-3, 40)}, {**HARMLESS})
    sides[1].update(model=normal(0, 40), other=normal(0, 40))
    about = calibrate(values, *sides, absolute=["model", "other"]).about
    assert about.endswith(
        "; then model, by what known rows have of them; without other: known rows are not told apart by it"
    )
    assert calibrate(values, KNOWN, HARMLESS, absolute=["model", "other"]).about.endswith(
        "; without model and other: known rows are not told apart by it"
    )


def test_the_strongest_signal_is_the_one_that_adds_most():
    contrast = Contrast(("x", "y", "z"), np.zeros(3), np.ones(3), np.array([1.0, 0.5, 2.0]), 0.0, 4.0)
    values = {"x": np.array([1.0, 1.0]), "y": np.array([1.5, 4.0]), "z": np.full(2, np.nan)}
    assert [contrast.strongest(values, place) for place in (0, 1)] == ["x", "y"]


def test_with_labels_all_signals_are_in_the_score():
    values = {"text": RNG.normal(size=400), "model": np.where(np.arange(400) % 4 == 0, 2.0, -2.0)}
    labels = np.where(np.arange(400) % 4 == 0, 1.0, 0.0)
    found = calibrate(values, {}, {}, absolute=["model"], labels=labels)
    assert found.contrast is None
    assert set(found.weights) == {"text", "model"}
