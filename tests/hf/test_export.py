"""A run's weights to a file and back: what is exported trains another run alike."""

from __future__ import annotations

from typing import Any

import torch

from safe_sched import Fixed
from safe_sched.data.export import export
from safe_sched.data.rows import read_rows
from safe_sched_hf import SafeSchedCallback
from tests.support import make_sft, text_rows, uneven_weights


def trained(folder: Any, rows: Any, weights: Any) -> tuple[SafeSchedCallback, list[torch.Tensor]]:
    callback = SafeSchedCallback(Fixed(weights))
    trainer = make_sft(folder, rows, callbacks=[callback], max_steps=4)
    trainer.train()
    assert trainer.model is not None
    return callback, [p.detach().clone() for p in trainer.model.parameters()]


def test_weights_that_are_exported_and_read_back_train_the_same_model(tmp_path):
    """Bit for bit. Control: other weights train another one."""
    rows, weights = text_rows(12), uneven_weights(12)
    callback, first = trained(tmp_path / "first", rows, weights)
    export(rows, tmp_path / "weighted.jsonl", table=callback.table())

    again = read_rows(tmp_path / "weighted.jsonl")
    read = [row.pop("weight") for row in again]
    assert again == rows
    assert read == weights
    _, second = trained(tmp_path / "second", again, read)
    assert all(map(torch.equal, first, second))
    _, other = trained(tmp_path / "other", again, read[::-1])
    assert not all(map(torch.equal, first, other))
