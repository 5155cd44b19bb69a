"""The laws of `safe_sched.testing`, put to what this package measures."""

from __future__ import annotations

from typing import Any

import pytest

from safe_sched.hooks import measurements
from safe_sched.needs import HiddenState, Need, Probe
from safe_sched.testing import TinyLM, check_measurement
from safe_sched_hf.safety import SafetySet
from tests.support import make_model, token_rows

SAFETY = SafetySet(token_rows(6, seed=8), None, None, 2, 3)


@pytest.mark.parametrize("need", [HiddenState(), Probe()], ids=lambda need: need.name)
@pytest.mark.parametrize("model", [TinyLM, lambda: make_model(attention_dropout=0.1)], ids=["tiny", "llama"])
def test_a_measurement_obeys_the_laws(need: Need, model: Any) -> None:
    check_measurement(measurements()[need.name](need), safety=SAFETY, model=model)
