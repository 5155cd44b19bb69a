"""The example of a scheduler with a measurement of its own: installed as a package, used by name everywhere."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from examples.scheduler_plugin.safe_sched_seal.scheduler import Seal
from safe_sched import Fixed
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE
from safe_sched.training.loop import TrainingLoop
from tests.support import make_model, make_tokenizer, text_rows

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "scheduler_plugin"
SFT = ["trl", "sft", "--config", "train.yaml", "--safe_sched.method.keep", "0.5"]
ROWS = text_rows(20, seed=3)
TINY = {"use_cpu": True, "bf16": False, "loss_type": "nll", "report_to": "none", "disable_tqdm": True, "seed": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Path:
    """The package as it is installed, beside a model, a safety-tuned adapter of it, and rows."""
    folder = tmp_path_factory.mktemp("home")
    source = shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*install, "--target", str(folder / "site"), str(source)], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed here")
    assert done.returncode == 0, done.stderr
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(1)
    get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained(
        folder / "safe"
    )
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def run(home: Path, *command: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
    paths = [home / "site"] * installed + [ROOT / "src", ROOT / "integrations"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["HF_DATASETS_CACHE"] = str(home / "cache")
    return subprocess.run([sys.executable, *command], env=env, cwd=home, capture_output=True, text=True)


def script(home: Path, out: str, steps: int, *more: str) -> None:
    words = ["--model", "model", "--safe", "safe", "--data", "data/train.jsonl", "--out", out, "--steps", str(steps)]
    done = run(home, str(PLUGIN / "train.py"), *words, *more)
    assert done.returncode == 0, done.stderr[-2000:]


def losses_by_hand(home: Path) -> list[float]:
    """Mean loss of every row's completion under the safe adapter, one row at a time."""
    from peft import PeftModel

    model, tokenizer = PeftModel.from_pretrained(make_model(), str(home / "safe")).eval(), make_tokenizer()
    found = []
    for row in ROWS:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(-sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start))
    return found


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """What the script leaves after two epochs, of three steps each."""
    script(home, "whole", 6)
    return home / "whole"


@pytest.mark.slow
@pytest.mark.slow_sample
def test_a_trl_script_finds_it_by_name_and_drops_the_rows_with_the_highest_losses(home: Path, whole: Path) -> None:
    """Of 20 rows 16 have weight 1 and 4 weight 0."""
    table = pyarrow.parquet.read_table(whole / "weights.parquet")
    losses, weights = table["safe_adapter_loss"].to_pylist(), table["weight"].to_pylist()
    assert losses == pytest.approx(losses_by_hand(home), rel=1e-4)
    assert {i for i, w in enumerate(weights) if not w} == set(sorted(range(20), key=lambda i: losses[i])[16:])
    assert set(weights) == {0.0, 1.0}
    assert (whole / MANIFEST_FILE).exists()


@pytest.mark.slow
@pytest.mark.slow_sample
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(home: Path, whole: Path) -> None:
    """State and adapter bit for bit, from a checkpoint in the first epoch, when rows are still to be measured."""
    assert load_file(whole / "checkpoint-2" / STATE_FILE)["state.loss"].isnan().any()
    shutil.copytree(whole / "checkpoint-2", home / "resumed" / "checkpoint-2")
    script(home, "resumed", 6, "--resume")
    for file in (STATE_FILE, "adapter_model.safetensors"):
        one, other = (load_file(folder / "checkpoint-6" / file) for folder in (whole, home / "resumed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.slow_sample
def test_trls_command_line_finds_it_by_name(home: Path) -> None:
    """``safe-sched trl sft`` with the block of train.yaml, and an option of it changed on the command line."""
    block = yaml.safe_load((PLUGIN / "train.yaml").read_text())
    assert block["safe_sched"]["method"] == {"name": "seal", "keep": 0.8, "adapter": "adapters/safe"}
    here = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "cli", "max_steps": 3}
    shutil.copytree(home / "safe", home / "adapters" / "safe")
    (home / "train.yaml").write_text(yaml.safe_dump(block | here | TINY))
    command = "import sys; from safe_sched.cli import main; main()"
    done = run(home, "-c", command, *SFT)
    assert done.returncode == 0, done.stderr[-2000:]
    table = pyarrow.parquet.read_table(home / "cli" / "safe_sched_table.parquet")
    assert sorted(table["weight"].to_pylist()) == [0.0] * 10 + [1.0] * 10
    assert not (home / "cli" / "seal").exists()  # the safe adapter is no part of what was trained
    manifest = json.loads((home / "cli" / MANIFEST_FILE).read_text())
    assert manifest["scheduler"] == {"name": "seal", "keep": 0.5, "adapter": "adapters/safe"}


READ = """
from safe_sched_hf.config import read_settings
for option in ("keep", "kep"):
    try:
        print(read_settings({"method": {"name": "seal", option: 0.8, "adapter": "safe"}}).scheduler().settings())
    except Exception as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.slow_sample
def test_a_block_of_a_yaml_is_checked_like_ours(home: Path) -> None:
    """Control: where the package is not installed, the name is unknown."""
    done = run(home, "-c", READ)
    assert "{'name': 'seal', 'keep': 0.8, 'adapter': 'safe'}" in done.stdout, done.stderr
    assert "safe_sched.method.kep: unknown option of 'seal' 'kep' (did you mean 'keep'?)" in done.stdout
    assert "unknown method 'seal'" in run(home, "-c", READ, installed=False).stdout


def test_a_row_is_dropped_where_too_many_others_have_lower_losses() -> None:
    """Of five rows with losses 1 to 5 the limit is the fourth; a row that was not measured is kept."""
    seal, index = Seal(keep=0.8), RowIndex(torch.arange(6))
    state = seal.init(index)
    assert seal.slot_weights(state).tolist() == [1] * 6
    slots = torch.arange(5)
    seal.learn(state, "safe_adapter_loss", slots, slots + 1.0)
    assert seal.due(state, "safe_adapter_loss", torch.arange(6)).tolist() == [False] * 5 + [True]
    assert seal.update(state, Observation(slots, slots + 1)) == {"seal_limit": 4.0}
    assert seal.slot_weights(state).tolist() == [1, 1, 1, 1, 0, 1]
    assert math.isnan(state.loss[5])


def test_it_passes_the_laws_of_a_scheduler() -> None:
    testing = pytest.importorskip("safe_sched.testing")
    testing.check_scheduler(Seal())


def test_the_page_about_it_shows_commands_and_code_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are those of the tests here and of test_pytorch_loop; the code is run."""
    page = (ROOT / "docs" / "write-a-scheduler.md").read_text()
    assert f"$ safe-sched {' '.join(SFT)}\n" in page
    assert "$ python examples/pytorch_loop.py --method antibody " in page
    monkeypatch.syspath_prepend(str(PLUGIN))
    laws, part = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(part, names)
    batches = [{"input_ids": (ids := torch.randint(5, 64, (2, 6))), "labels": ids}]
    model = make_model()
    start = model.lm_head.weight.detach().clone()
    for saved in (None, tmp_path / "state.safetensors"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loop = TrainingLoop(model, Fixed(), batches, optimizer, parts=[average := names["Average"]()])
        if saved is not None:
            loop.load(saved)
        with loop.step(batches):
            with loop.forward(batches[0]):
                loss = model(**batches[0]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loop.save(tmp_path / "state.safetensors")
        if saved is None:
            first = start.lerp(model.lm_head.weight.detach(), 0.01)
            assert torch.equal(average.mean["lm_head.weight"], first)
    assert torch.equal(average.mean["lm_head.weight"], first.lerp(model.lm_head.weight.detach(), 0.01))
    pytest.importorskip("safe_sched.testing")
    exec(laws, {})
