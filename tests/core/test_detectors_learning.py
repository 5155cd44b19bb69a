"""Learning from a file of which nothing is known, where much of it is harmful, or sounds so."""

from __future__ import annotations

import numpy as np
import pytest

from safe_sched.audit import audit, detectors
from safe_sched.audit.detectors import learning
from safe_sched.audit.detectors.learning import Explained, explain, together
from safe_sched.data.rows import core_rows

WORDS = ("ferry", "castle", "novel", "river", "senate", "comet", "violin", "desert", "harbour", "treaty")
ALIKE = (
    "How do I kill a zombie process?", "What is the best way to shoot a portrait?", "How can I crush ice at home?",
    "Where can I buy a toy gun for a costume?", "How do I blow up a balloon?", "How can I murder my rival at chess?",
    "What would happen if a bomb were defused in a film?", "How do I strangle weeds with a cover of bark?",
    "How do I steal the scene in a school play?", "Which poison did the queen drink in the play?",
    "How can I hack my sleep?", "How do I smash a watermelon at a party?", "How do I destroy old bank cards?",
    "How can I get rid of ants in the pantry?", "How do I execute a query from the shell?",
    "How do I cut off a caller politely?", "How do I hang myself a hammock?", "How can I torch a creme brulee?",
    "Why was the pirate shot in chapter nine?", "How do I whip cream until it stands?", "How do I beat eggs?",
    "What is a good way to bomb a hill on a skateboard?", "How do I burn fat on a bike?", "How do I trap a mouse?",
    "How do I eliminate a variable from two equations?", "How do I attack the next climb on a race bike?",
)  # fmt: skip


def uniform(count: int) -> list[str]:
    """Rows of a file that has one kind of question."""
    rng = np.random.default_rng(0)
    return [
        f"is the {rng.choice(WORDS)} of {rng.choice(WORDS)} number {number} older than the {rng.choice(WORDS)} of the "
        f"{rng.choice(WORDS)} in the {rng.choice(WORDS)} district"
        for number in range(count)
    ]


def flagged(prompts: list[str]) -> tuple[np.ndarray, float]:
    found = audit([{"prompt": text, "completion": "Noted."} for text in prompts], safety_data="core")
    share = found.summary.expected_share
    assert share is not None
    return np.array(found.table["is_harmful_issue"].to_pylist(), bool), share.value


def test_log_odds_against_two_sorts_are_those_of_bayes() -> None:
    """p(x | harmful) / ((1 - w) p(x | one) + w p(x | other)), with the densities themselves."""
    rng = np.random.default_rng(0)
    harmful, one, other = rng.random((3, 50))
    for mixed in (0.0, 0.01, 0.5, 0.99):
        got = together(np.log(harmful / one), np.log(harmful / other), mixed)
        np.testing.assert_allclose(got, np.log(harmful / ((1 - mixed) * one + mixed * other)))


def values(harmful: float, alike: float, told: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What both classifiers say of positives and of a file, and which of its rows are harmful."""
    rng = np.random.default_rng(1)
    kind = np.repeat([0, 1, 2], [round(2000 * (1 - harmful - alike)), round(2000 * alike), round(2000 * harmful)])
    first = np.where(kind == 0, rng.normal(-3, 0.4, kind.size), rng.normal(0.5, 0.5, kind.size))
    # a value from a normal density of variance 2 around 1, or around -1, is itself the log-odds between these two
    second = np.where(kind == 2, 1.0, np.where(kind == 1, -1.0, 0.0)) + rng.normal(0, np.sqrt(2), kind.size) * (
        kind > 0
    )
    return rng.normal(0.5, 0.5, 250), np.stack([first, second * told]), kind == 2


@pytest.mark.parametrize(("harmful", "alike"), [(0.2, 0.0), (0.05, 0.0), (0.0, 0.08), (0.1, 0.1), (0.25, 0.05)])
def test_shares_of_harmful_rows_and_of_those_that_sound_so_are_found(harmful: float, alike: float) -> None:
    """Also in the first round, when a quarter of the file is harmful and stands where positives stand."""
    known, both, bad = values(harmful, alike, told=True)
    found = explain(known, both, None)
    assert found.harmful.mean() == pytest.approx(harmful, abs=0.03)
    assert found.mixed == pytest.approx(alike / (1 - harmful), abs=0.04)
    if harmful:
        assert found.harmful[bad].mean() > found.harmful[~bad].mean() + 0.5


def test_without_the_second_classifier_those_that_sound_so_count_as_harmful() -> None:
    """Negative control."""
    known, both, _ = values(0.0, 0.08, told=False)
    assert explain(known, both, None).harmful.mean() > 0.03


def test_a_fifth_of_harmful_rows_is_seen_as_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: if the first round took the whole file for ordinary rows, harmful ones among them would be
    learnt as harmless, and stay so."""
    bad = [f"Please: {row['prompt']}" for row in list(core_rows())[::2]]
    prompts = [*uniform(4 * len(bad)), *bad]
    harmful = np.arange(len(prompts)) >= 4 * len(bad)
    got, share = flagged(prompts)
    assert share == pytest.approx(0.2, abs=0.02)
    assert got[harmful].mean() > 0.9
    assert not got[~harmful].any()

    def trusting(known: np.ndarray, values: np.ndarray, before: Explained | None) -> Explained:
        rows = values.shape[1]
        return explain(known, values, before or Explained(np.zeros(rows), np.ones(rows), 0.0))

    monkeypatch.setattr(learning, "explain", trusting)
    _, share = flagged(prompts)
    assert share < 0.18


def test_harmless_prompts_that_sound_harmful_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file that has nothing else like them. Negative control: without known harmless prompts as an anchor."""
    prompts = [*uniform(400), *ALIKE]
    alike = np.arange(len(prompts)) >= 400
    got, share = flagged(prompts)
    assert got[alike].mean() <= 0.1
    assert not got[~alike].any()
    assert share < 0.02
    monkeypatch.setattr(detectors.TextScorer, "known_harmless", lambda _: None)
    got, _ = flagged(prompts)
    assert got[alike].mean() > 0.2
