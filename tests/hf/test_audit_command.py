"""``safe-sched audit`` with a model, as it is typed: in several processes, and with a scorer of a real training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from safe_sched import NeuralBDS, SafeSchedError
from safe_sched.cli import app
from safe_sched.estimators.head import Scorer
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.measure.features import score_rows
from tests.core.ranked import alone
from tests.support import make_model, make_sft, make_tokenizer, text_rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def saved(folder: Path, model: Any) -> Path:
    make_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_processes_say_of_every_row_what_one_says(tmp_path: Path) -> None:
    """torchrun starts them, as accelerate launch does where there are several GPUs."""
    from examples.demo import model, tasks

    rows = [{"messages": row["messages"]} for row in tasks.poisoned_rows(90, 0.2, seed=1)]
    data, safety = written(tmp_path / "t.jsonl", rows), written(tmp_path / "s.jsonl", tasks.safety_rows(32))
    words = ["audit", str(data), "-m", str(model.build(progress=False)), "-s", str(safety), "--quiet"]
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "safe_sched.cli")
    found = alone(*launcher, *words, "--out", str(tmp_path / "two"), wait=200)
    assert found.returncode == 0, found.stderr
    one = alone("safe_sched.cli", *words, "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two, one = (pq.read_table(tmp_path / name / "findings.parquet") for name in ("two", "one"))
    assert two.column_names == one.column_names
    for name in one.column_names:
        if name in ("antibody", "probe", "propensity", "surprise", "p_harmful", "p_low", "p_high", "weight"):
            assert one[name].null_count == two[name].null_count == 0
            np.testing.assert_allclose(two[name].to_numpy(), one[name].to_numpy(), atol=1e-3)
        else:
            assert two[name].equals(one[name]), name


@pytest.mark.parametrize("features", ["hidden", "encoder"])
def test_a_scorer_of_a_training_run_scores_a_file_by_the_command(tmp_path: Path, features: Any) -> None:
    folder = saved(tmp_path / "model", make_model())
    rows, others = text_rows(12, seed=1), text_rows(8, seed=2)
    encoder = {"encoder": str(folder)} if features == "encoder" else {}
    callback = SafeSchedCallback(NeuralBDS(features=features, **encoder), safety_data=text_rows(6, seed=3))
    trainer = make_sft(tmp_path / "out", rows, callbacks=[callback], max_steps=4)
    trainer.train()
    callback.scorer().save(tmp_path / "scorer.safetensors")
    trained = saved(tmp_path / "trained", trainer.model) if features == "hidden" else folder
    words = [
        "--model",
        str(trained),
        "--scorer",
        str(tmp_path / "scorer.safetensors"),
        "--out",
        str(tmp_path / "found"),
    ]
    data, safety = written(tmp_path / "t.jsonl", others), written(tmp_path / "s.jsonl", text_rows(10, seed=4))
    words = ["audit", str(data), "--safety-data", str(safety), *words, "--json"]
    if features == "hidden":
        with pytest.warns(UserWarning, match="the model refuses 0% of the safety prompts"):
            found = CliRunner().invoke(app, words)
    else:
        found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "scorer" in [signal["name"] for signal in json.loads(found.stdout)["signals"]]
    value = pq.read_table(tmp_path / "found/findings.parquet")["scorer"].to_numpy()
    scorer = Scorer.load(tmp_path / "scorer.safetensors")
    how = {"model": str(trained)} if features == "hidden" else {"encoder": str(folder), "tokenizer": make_tokenizer()}
    p = score_rows(scorer, others, **how).p_harmful.numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-value)), p, atol=1e-4)
    assert np.ptp(value) > 0


def test_a_scorer_of_another_model_is_an_error(tmp_path: Path) -> None:
    rows = text_rows(12, seed=1)
    callback = SafeSchedCallback(NeuralBDS(), safety_data=text_rows(6, seed=3))
    make_sft(tmp_path / "out", rows, callbacks=[callback], max_steps=2).train()
    callback.scorer().save(tmp_path / "scorer.safetensors")
    other = saved(tmp_path / "other", make_model(hidden_size=48))
    data = written(tmp_path / "t.jsonl", rows)
    words = ["--model", str(other), "--scorer", str(tmp_path / "scorer.safetensors"), "--safety-data", str(data)]
    with pytest.warns(UserWarning, match="the model refuses 0%"):
        found = CliRunner().invoke(app, ["audit", str(data), *words])
    assert found.exit_code == 2
    assert not isinstance(found.exception, SafeSchedError)
    assert "width" in found.stderr
