"""The laws of `safe_sched.testing`, put to what this package measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safe_sched.hooks import measurements
from safe_sched.needs import HiddenState, Need, Probe, RefusalOdds
from safe_sched.testing import TinyLM, check_measurement
from safe_sched_hf.measure.probe import ProbeMeasurement
from safe_sched_hf.safety import SafetySet
from tests.support import make_model, make_tokenizer, text_rows

SAFETY = SafetySet(text_rows(6, seed=8), make_tokenizer(), None, 2, 3)
REFUSALS = (" w50 w51", " w52 w53 w54")


def llama() -> Any:
    return make_model(attention_dropout=0.1)


CASES = [
    (HiddenState(), TinyLM),
    (HiddenState(), llama),
    (Probe(), TinyLM),
    (Probe(), llama),
    (RefusalOdds(refusals=REFUSALS, on_inversion="ignore"), llama),
    (RefusalOdds(refusals=REFUSALS, on_inversion="ignore", anchor=False), llama),
]


@pytest.mark.parametrize(("need", "model"), CASES, ids=lambda value: getattr(value, "name", None) or value.__name__)
def test_a_measurement_obeys_the_laws(need: Need, model: Any) -> None:
    check_measurement(measurements()[need.name](need), safety=SAFETY, model=model)


class Keeps(ProbeMeasurement):
    """Keeps the direction of its probe over a save."""

    def forget(self) -> None:
        pass


def test_a_probe_that_keeps_its_direction_over_a_save_is_noticed() -> None:
    with pytest.raises(AssertionError, match="a resumed run measures what the run that went on does"):
        check_measurement(Keeps(Probe()), safety=SAFETY, model=llama)


class Draws(ProbeMeasurement):
    def before_forward(self, batch: Any, inputs: Any) -> None:
        torch.rand(1)
        super().before_forward(batch, inputs)


def test_a_probe_that_draws_random_numbers_is_noticed() -> None:
    with pytest.raises(AssertionError, match="as they would be without it"):
        check_measurement(Draws(Probe()), safety=SAFETY, model=llama)
