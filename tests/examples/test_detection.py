"""BDS tells harmful rows from benign ones on the demo's file, within one epoch of real training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from examples.demo import model, study, tasks
from safe_sched import BDS, BDSReleased
from safe_sched_hf import SafeSchedCallback

pytestmark = [pytest.mark.slow, pytest.mark.slow_sample]
SAFETY = tasks.load("safety")


@pytest.fixture(scope="module")
def base() -> Any:
    return model.build(progress=False)


def trained(base: Any, scheduler: Any, rows: list[tasks.Row], epochs: int = 1) -> tuple[Any, torch.Tensor]:
    ours = SafeSchedCallback(scheduler, safety_data=SAFETY, safety_batch_size=2)
    run = study.finetune(base, rows, callbacks=[ours], epochs=epochs)
    return ours.table(), torch.tensor(run.harmful)


def test_harmful_rows_are_found_and_benign_ones_are_left_alone(base: Any) -> None:
    table, harmful = trained(base, BDS(), tasks.load("poisoned"))
    p, weight = (torch.tensor(table.column(name).to_numpy()) for name in ("p_harmful", "weight"))
    assert roc_auc_score(harmful, p) >= 0.99
    benign = weight[~harmful].double()
    assert float(benign.sum() ** 2 / benign.square().sum()) >= 0.95 * benign.numel()
    assert float(weight[harmful].mean()) < 0.2


def test_a_benign_file_keeps_its_weights(base: Any) -> None:
    """Two epochs: rows of the first steps that the model was about to refuse are cleared by a second look."""
    rows = [row for row in tasks.load("poisoned") if not row["harmful"]]
    table, _ = trained(base, BDS(), rows, epochs=2)
    assert min(table.column("weight").to_pylist()) > 0.5


def test_the_released_rule_does_not_find_them(base: Any) -> None:
    """The control: what the assertion above asks for is not met by any weights at all."""
    table, harmful = trained(base, BDSReleased(), tasks.load("poisoned"))
    assert roc_auc_score(harmful, -table.column("weight").to_numpy()) < 0.9
