"""The bench of the prior: what it reads from a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.prior import run
from examples.demo import tasks
from tests.support import make_model, make_tokenizer


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_the_weights_are_those_that_rows_were_trained_on_with(tmp_path: Path) -> None:
    """With fixed weights they are known beforehand: 1 - p, of harmful rows and of benign ones."""
    make_model(max_position_embeddings=2048).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rows = tasks.load("poisoned")[:24]
    p = [0.75 if row["harmful"] else 0.125 for row in rows]
    found = run(tmp_path, rows, p, tasks.safety_rows(4), "Fixed, prior", 0)
    assert found == {"harmful": 0.25, "benign": 0.875, "auroc": 1.0, "audit": 1.0}
