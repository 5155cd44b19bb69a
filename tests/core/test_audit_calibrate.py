"""The probability means what it says: expected shares are the true ones, intervals hold them, and rows that stand where
known harmless ones do are not taken for harmful."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from safe_sched.audit.calibration.calibrate import SHARE_LEVEL, FileCalibration, calibrate, moved_rows
from safe_sched.audit.calibration.mixture import fit_mixture

ROWS = 2000


def drawn(share: float, gap: float, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A file's values, known rows, and which rows of the file are harmful. Harmless rows are of two sorts."""
    rng = np.random.default_rng(seed)
    bad = np.arange(ROWS) < round(share * ROWS)
    sort = rng.random(ROWS) < 0.3
    values = np.where(bad, rng.normal(gap - shift, 1.2, ROWS), rng.normal(np.where(sort, 1.0, -0.3), 0.8, ROWS))
    return values, rng.normal(gap, 1.0, 200), bad


def share_of(fitted: FileCalibration, values: dict[str, np.ndarray]) -> tuple[float, float, float]:
    score = fitted.score(values)
    sums = fitted.sums(score) / score.size
    tail = (1 - SHARE_LEVEL) / 2
    low, high = np.quantile(sums[1:], [tail, 1 - tail])
    return float(sums[0]), float(low), float(high)


def test_known_rows_move_by_a_third_of_their_spread_beside_chance() -> None:
    """Var(mean) = s^2 / n + (0.3 s)^2, for n rows of the spread s."""
    rng = np.random.default_rng(0)
    known = 2.0 * rng.normal(size=100) + 5.0
    means = np.array([np.mean(np.asarray(moved_rows(known, rng))) for _ in range(4000)])
    assert means.mean() == pytest.approx(known.mean(), abs=0.05)
    assert means.var() == pytest.approx(known.var() * (1 / 100 + 0.09), rel=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.2])
def test_the_expected_share_is_the_true_one_within_two_points(share: float, seed: int, shift: float) -> None:
    """Also where the file's harmful rows are less clear than the known ones."""
    values, known, bad = drawn(share, 7.0, seed, shift)
    fitted = calibrate({"a": values}, {"a": known}, seed=seed)
    expected, low, high = share_of(fitted, {"a": values})
    assert expected == pytest.approx(share, abs=0.02)
    assert low <= expected + 1e-9
    assert expected - 1e-9 <= high
    p, _, _ = fitted.chances(fitted.score({"a": values}))
    assert np.mean(p[~bad] >= 0.5) <= 0.01
    if share:
        assert np.mean(p[bad] >= 0.5) >= 0.75


ALIKE, BAD = (9.0, 1.8), (12.0, 2.0)  # where rows stand that sound harmful, and harmful ones, beside ordinary ones at 0


def humps(alike: float, bad: float, seed: int, shift: float = 0.0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Values of a file, of known harmful and of known harmless rows; and what each row is: 0, 1 sounds harmful, 2."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(
        [0, 1, 2], [ROWS - round(alike * ROWS) - round(bad * ROWS), round(alike * ROWS), round(bad * ROWS)]
    )
    draw = {0: (0.0, 1.0), 1: (ALIKE[0] - shift, ALIKE[1]), 2: (BAD[0] + shift, BAD[1])}
    values = np.array([rng.normal(*draw[one]) for one in kind.tolist()])
    known, harmless = (
        mean + width * ndtri((np.arange(count) + 0.5) / count) for (mean, width), count in ((BAD, 250), (ALIKE, 400))
    )
    return {"file": values, "known": known, "harmless": harmless}, kind


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("alike", "bad"), [(0.08, 0.0), (0.0, 0.2), (0.0, 0.01), (0.08, 0.05), (0.03, 0.2)])
def test_a_hump_is_explained_by_the_known_rows_that_stand_there(
    alike: float, bad: float, seed: int, shift: float
) -> None:
    """Also where both kinds stand a little further apart than the known ones. 1.5 widths apart, the best rule, which
    knows all densities, calls a quarter of equal numbers wrong; so shares, not rows, are to be right: within two
    points, or 15 % of what there is."""
    values, kind = humps(alike, bad, seed, shift)
    fitted = calibrate({"a": values["file"]}, {"a": values["known"]}, {"a": values["harmless"]})
    p, _, _ = fitted.chances(fitted.score({"a": values["file"]}))
    assert p.mean() == pytest.approx(bad, abs=0.02, rel=0.15)
    assert np.mean(p[kind == 0] >= 0.5) == 0.0
    if not bad:
        assert np.mean(p[kind == 1] >= 0.5) <= 0.1
    if bad == 0.2 and not alike:
        assert np.mean(p[kind == 2] >= 0.5) >= 0.9


@pytest.mark.parametrize("seed", range(3))
def test_without_known_harmless_rows_a_hump_of_them_is_taken_for_harmful(seed: int) -> None:
    """Negative control of the law above."""
    values, kind = humps(0.08, 0.0, seed)
    fitted = calibrate({"a": values["file"]}, {"a": values["known"]})
    p, _, _ = fitted.chances(fitted.score({"a": values["file"]}))
    assert np.mean(p[kind == 1] >= 0.5) > 0.1
    assert p.mean() > 0.02


def test_harmless_rows_that_stand_above_harmful_ones_say_nothing() -> None:
    values, _ = humps(0.0, 0.1, 0)
    wrong = calibrate({"a": values["file"]}, {"a": values["known"]}, {"a": values["known"] + 5})
    none = calibrate({"a": values["file"]}, {"a": values["known"]})
    np.testing.assert_allclose(wrong.curve, np.interp(wrong.grid, none.grid, none.curve), atol=0.05)
    assert "sound harmful" not in wrong.about


def test_known_rows_far_above_a_uniform_file_keep_their_places() -> None:
    """In a file whose rows are all alike, both kinds stand tens of its widths above. Clipped, they would be one."""
    values, _ = humps(0.08, 0.0, 0)
    near = calibrate({"a": values["file"]}, {"a": values["known"]}, {"a": values["harmless"]})
    narrow = {name: np.where(np.abs(x) < 5, x / 6, x) for name, x in values.items()}
    far = calibrate({"a": narrow["file"]}, {"a": narrow["known"]}, {"a": narrow["harmless"]})
    assert far.scales["a"].widest > 40
    for fitted, file in ((near, values["file"]), (far, narrow["file"])):
        assert fitted.chances(fitted.score({"a": file}))[0].mean() < 0.02


def test_a_mixture_without_known_rows_needs_a_group_that_stands_apart() -> None:
    values, _, bad = drawn(0.1, 9.0, 0)
    fitted = calibrate({"a": values}, {})
    p, _, _ = fitted.chances(fitted.score({"a": values}))
    assert p.mean() == pytest.approx(0.1, abs=0.01)
    assert np.mean((p >= 0.5) == bad) > 0.995
    clean, _, _ = drawn(0.0, 9.0, 0)
    fitted = calibrate({"a": clean}, {})
    assert fitted.about == "no second group of rows stands out"
    assert fitted.chances(fitted.score({"a": clean}))[0].max() == 0.0


@given(seed=st.integers(0, 50), share=st.sampled_from([0.0, 0.03, 0.3]), anchored=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_more_suspicious_row_is_never_less_likely_harmful(seed: int, share: float, anchored: bool) -> None:
    values, known, _ = drawn(share, 3.0, seed)
    fitted = calibrate({"a": values}, {"a": known} if anchored else {})
    p, low, high = fitted.chances(fitted.score({"a": np.linspace(-50, 50, 999)}))
    assert np.all(np.diff(p) >= 0)
    assert np.all((low >= 0) & (low <= p) & (p <= high) & (high <= 1))


def test_a_signal_without_news_does_not_drown_one_with_news() -> None:
    """Nine signals of noise beside a good one. Control: their plain mean does much worse."""
    values, known, bad = drawn(0.05, 6.0, 0)
    rng = np.random.default_rng(1)
    every = {"good": values} | {f"noise{n}": rng.normal(0, 1, ROWS) for n in range(9)}
    fitted = calibrate(every, {"good": known})
    assert _auroc(fitted.score(every), bad) > _auroc(values, bad) - 0.005
    mean = np.mean([(v - v.mean()) / v.std() for v in every.values()], axis=0)
    assert _auroc(mean, bad) < _auroc(values, bad) - 0.02


def test_signals_that_add_to_each_other_are_better_together() -> None:
    rng = np.random.default_rng(2)
    bad = np.arange(ROWS) < 100
    one, other = (np.where(bad, rng.normal(2.5, 1, ROWS), rng.normal(0, 1, ROWS)) for _ in range(2))
    fitted = calibrate({"one": one, "other": other}, {"one": rng.normal(2.5, 1, 200)})
    assert _auroc(fitted.score({"one": one, "other": other}), bad) > _auroc(one, bad) + 0.01


def test_a_signal_that_runs_backwards_is_not_turned_round() -> None:
    """Larger is more suspicious: where it is not, the signal is left out."""
    values, known, _ = drawn(0.1, 6.0, 0)
    fitted = calibrate({"good": values, "backwards": -values}, {"good": known})
    assert fitted.weights["backwards"] == 0.0
    assert fitted.weights["good"] > 0


def _auroc(score: np.ndarray, bad: np.ndarray) -> float:
    above = score[bad][:, None] > score[~bad][None, :]
    return float(above.mean())


def test_intervals_of_the_share_narrow_with_the_file() -> None:
    widths = []
    for count in (200, ROWS):
        values, known, _ = drawn(0.2, 3.5, 0)
        keep = np.random.default_rng(0).permutation(ROWS)[:count]
        fitted = calibrate({"a": values[keep]}, {"a": known})
        _, low, high = share_of(fitted, {"a": values[keep]})
        widths.append(high - low)
    assert widths[1] < widths[0]


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [1.0] * 500, [np.nan] * 20, [0.0] * 99 + [1e30], [np.nan] * 5 + [0.0, 1.0] * 20, [-1e30, 1e30]],
)
@pytest.mark.parametrize("known", [None, [1.0], [5.0, 6.0, 7.0], [0.0] * 50])
@pytest.mark.parametrize("harmless", [None, [2.0], [1e30, 3.0]])
def test_odd_values_give_probabilities_all_the_same(
    values: list[float], known: list[float] | None, harmless: list[float] | None
) -> None:
    given = {"a": np.array(values)}
    ends = [{} if one is None else {"a": np.array(one)} for one in (known, harmless)]
    fitted = calibrate(given, *ends)
    p, low, high = fitted.chances(fitted.score(given))
    assert p.shape == (len(values),)
    assert np.all((low >= 0) & (low <= p) & (p <= high) & (high <= 1))


def test_the_mixture_is_that_of_plain_expectation_maximisation() -> None:
    """Against scikit-learn's, on rows instead of counts on a grid."""
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 4000), rng.normal(7, 1.5, 1000)])
    grid = np.linspace(-6, 16, 1000)
    counts = np.bincount(np.rint((values + 6) / (22 / 999)).astype(int), minlength=1000).astype(float)
    found = fit_mixture(grid, counts, None)
    other = GaussianMixture(2, random_state=0, tol=1e-6, max_iter=500).fit(values[:, None])
    order = np.argsort(other.means_.ravel())
    assert found.share == pytest.approx(other.weights_[order][-1], abs=0.003)
    if len(found.means) == 2:
        np.testing.assert_allclose(found.means, other.means_.ravel()[order], atol=0.03)
    assert np.interp(3.5, grid, found.chance()) == pytest.approx(other.predict_proba([[3.5]])[0, order[-1]], abs=0.1)
