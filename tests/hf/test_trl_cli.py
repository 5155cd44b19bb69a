"""``safe-sched trl sft``: what a YAML says is done as a script with the callback does it, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
import yaml
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer
from trl.scripts import sft as plain_sft
from typer.testing import CliRunner

from safe_sched import BDS, Antibody, Fixed
from safe_sched.cli import app
from safe_sched.errors import OptionError
from safe_sched.mixing import mix
from safe_sched.training.checkpoint import MANIFEST_FILE
from safe_sched.training.manifest import verify
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.trl import command
from safe_sched_hf.trl_call import read_call
from tests.support import make_model, make_tokenizer, single_thread, text_rows

STEPS = 3
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "loss_type": "nll",
    "max_length": 64,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: Any) -> Iterator[Path]:
    """A model, its tokenizer, a data set and a safety set, and caches that go away again."""
    folder = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    lines = {"data/train.jsonl": text_rows(20), "safety.jsonl": text_rows(6, seed=9)}
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def config(home: Path, out: Path, block: Any = None, **options: Any) -> Path:
    """A YAML for TRL, with or without our block."""
    said = {"model_name_or_path": str(home / "model"), "dataset_name": str(home / "data"), "output_dir": str(out)}
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(said | OPTIONS | ({} if block is None else {"safe_sched": block}) | options))
    return path


def run(home: Path, out: Path, block: Any, *words: str, **options: Any) -> dict[str, torch.Tensor]:
    """Our command; what it saved."""
    torch.manual_seed(0)  # some versions make an adapter before they set their own seed
    with single_thread():
        assert command(["sft", "--config", str(config(home, out, block, **options)), *words]) == 0
    return weights_in(out)


def script(home: Path, out: Path, callback: Any, rows: Any = None, peft: Any = None, **options: Any) -> Any:
    """A script with the callback, on the same rows; what it saved."""
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=str(home / "model"),
        args=SFTConfig(output_dir=str(out), **(OPTIONS | options)),
        train_dataset=load_dataset(str(home / "data"), split="train") if rows is None else rows,
        peft_config=peft,
        callbacks=[] if callback is None else [callback],
    )
    with single_thread():
        trainer.train()
    trainer.save_model(str(out))
    return weights_in(out)


def weights_in(out: Path) -> dict[str, torch.Tensor]:
    (file,) = [p for p in out.glob("*model.safetensors") if p.is_file()]
    return load_file(file)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
PEFT = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("how", ["full", "lora", "packed"])
def test_a_yaml_does_what_a_script_with_the_callback_does(how: str, home: Path, tmp_path: Path) -> None:
    """Parameters bit for bit. Control: they are not those of the undefended run."""
    more: dict[str, Any] = {"packing": True, "max_length": 32} if how == "packed" else {}
    peft = LoraConfig(lora_dropout=0.05, **PEFT) if how == "lora" else None
    safety = str(home / "safety.jsonl")
    block = {"method": {"name": "bds", "prior_share": 0.3}, "safety_data": safety, "safety_batch_size": 2}
    found = run(home, tmp_path / "ours", block, **more, **(LORA if how == "lora" else {}))
    callback = SafeSchedCallback(BDS(prior_share=0.3), safety_data=safety, safety_batch_size=2)
    assert same(found, script(home, tmp_path / "script", callback, peft=peft, **more))
    assert not same(found, script(home, tmp_path / "plain", None, peft=peft, **more))
    verdict = verify(tmp_path / "ours", data=home / "data" / "train.jsonl")
    assert verdict.defended
    assert {check.name: check.ok for check in verdict.checks}["model files"] is True
    assert not verify(tmp_path / "ours", data=home / "safety.jsonl").defended


def test_equal_weights_change_nothing(home: Path, tmp_path: Path) -> None:
    """Bit for bit what ``trl sft`` itself saves. Control: other weights change it."""
    found = run(home, tmp_path / "ours", {"method": "fixed"})
    words = ["--config", str(config(home, tmp_path / "trl"))]
    with single_thread():
        plain_sft.main(*plain_sft.make_parser().parse_args_and_config(words, fail_with_unknown_args=False))
    assert same(found, weights_in(tmp_path / "trl"))
    values = [0.0, 1.0] * 10
    assert not same(found, run(home, tmp_path / "halved", {"method": {"name": "fixed", "values": values}}))
    assert not verify(tmp_path / "trl").defended


def test_mixed_rows_are_trained_on(home: Path, tmp_path: Path) -> None:
    block = {"method": "fixed", "safety_data": str(home / "safety.jsonl"), "safety_weight": 0}
    found = run(home, tmp_path / "ours", block | {"mix": {"share": 0.25, "mimic": False, "seed": 1}})
    rows = load_dataset(str(home / "data"), split="train")
    mixed = mix(rows, str(home / "safety.jsonl"), share=0.25, mimic=False, seed=1)
    assert same(found, script(home, tmp_path / "script", SafeSchedCallback(Fixed()), rows=mixed))
    manifest = json.loads((tmp_path / "ours" / MANIFEST_FILE).read_text())
    assert (manifest["source"]["mix"]["share"], manifest["data"]["rows"]) == (0.25, 27)


def test_a_prior_goes_with_the_rows(home: Path, tmp_path: Path) -> None:
    """A column of the data set, by its name in the block. Control: it is not the run without it."""
    rows = [{**row, "p": 0.05 + 0.04 * i} for i, row in enumerate(text_rows(20))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"dataset_name": str(tmp_path / "data")}
    found = run(home, tmp_path / "ours", {"method": "fixed", "prior": "p"}, **more)
    held = datasets.Dataset.from_list(rows)
    assert same(found, script(home, tmp_path / "script", SafeSchedCallback(Fixed(), prior="p"), rows=held))
    assert not same(found, run(home, tmp_path / "none", {"method": "fixed"}, **more))
    assert json.loads((tmp_path / "ours" / MANIFEST_FILE).read_text())["prior"]
    assert verify(tmp_path / "ours", data=tmp_path / "data" / "train.jsonl").defended


@pytest.mark.parametrize("packing", [False, True])
def test_a_weight_column_goes_with_the_rows(packing: bool, home: Path, tmp_path: Path) -> None:
    """Also where packing has dropped it: the command hands the rows over. Control: it is not the run without it."""
    rows = [{**row, "weight": 0.1 * i} for i, row in enumerate(text_rows(20))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"packing": packing, "max_length": 32, "shuffle_dataset": True}
    more = {"dataset_name": str(tmp_path / "data")} | options
    found = run(home, tmp_path / "ours", {"method": {"name": "fixed", "column": "weight"}}, **more)
    held = datasets.Dataset.from_list(rows)
    callback = SafeSchedCallback(Fixed(column="weight"), rows=held)
    assert same(found, script(home, tmp_path / "script", callback, rows=held, **options))
    assert not same(found, run(home, tmp_path / "none", {"method": "fixed"}, **more))
    assert "weight" in json.loads((tmp_path / "ours" / MANIFEST_FILE).read_text())["columns"]


def test_a_stream_is_defended_too(home: Path, tmp_path: Path) -> None:
    """Its rows are known as they come, so there is nothing to compare a file with."""
    run(home, tmp_path / "ours", {"method": "fixed"}, dataset_streaming=True)
    assert verify(tmp_path / "ours").defended
    found = verify(tmp_path / "ours", data=home / "data" / "train.jsonl")
    assert [check.name for check in found.checks if check.ok is False] == ["data"]


def test_the_command_line_has_the_last_word(home: Path, tmp_path: Path) -> None:
    """On TRL's options and on the block's."""
    words = ["--safe_sched.method.tau", "2", "--safe-sched.method.on_inversion=ignore", "--learning_rate", "0.02"]
    found = run(home, tmp_path / "ours", {"method": "antibody"}, *words)
    callback = SafeSchedCallback(Antibody(tau=2.0, on_inversion="ignore"))
    assert same(found, script(home, tmp_path / "script", callback, learning_rate=0.02))


def test_a_resume_goes_on(home: Path, tmp_path: Path) -> None:
    """TRL 1.9's own script would start again here."""
    block, saved = {"method": "fixed"}, {"save_strategy": "steps", "save_steps": 1}
    whole = run(home, tmp_path / "whole", block, **saved)
    run(home, tmp_path / "parts", block, **(saved | {"max_steps": 1}))
    assert same(whole, run(home, tmp_path / "parts", block, resume_from_checkpoint=True, **saved))
    manifest = json.loads((tmp_path / "parts" / MANIFEST_FILE).read_text())
    assert manifest["coverage"]["rows_trained_on"] == 4 * STEPS
    assert verify(tmp_path / "parts").defended


def test_trl_has_its_trainer_back_afterwards(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "ours", {"method": "fixed"})
    assert trl.SFTTrainer is SFTTrainer
    with pytest.raises(ValueError, match="No valid checkpoint"):
        run(home, tmp_path / "none", {"method": "fixed"}, resume_from_checkpoint=True)
    assert trl.SFTTrainer is SFTTrainer


WRONG = [
    ({}, [], "has no block safe_sched:, so nothing would be defended"),
    ({"safe_sched": {"methd": "bds"}}, [], "safe_sched.methd: unknown key"),
    ({"safe_sched": {"method": "bds"}}, [], "safe_sched: 'bds' .* give safety_data"),
    ({"safe_sched": None}, [], "safe_sched: None; allowed: keys with values"),
    ({"safe_sched": {"method": "fixed"}, "safe_shed": {}}, [], r"unknown key 'safe_shed' \(did you mean 'safe_sched'"),
    (
        {"safe_sched": {"method": "fixed"}, "lerning_rate": 1},
        [],
        r"unknown key 'lerning_rate' \(did you mean 'learning_rate'",
    ),
    (
        {"safe_sched": {"method": "fixed"}, "max-steps": 1},
        [],
        r"unknown key 'max-steps' \(did you mean 'max_steps'",
    ),
    ({"safe_sched": {}}, ["--safe_sched", "bds"], "--safe_sched; allowed: --safe_sched.KEY VALUE"),
    ({"safe_sched": {}}, ["--safe_sched.method"], "--safe_sched.method needs a value"),
    ({"safe_sched": {}}, ["--safe_sched.method", "[bds"], r"--safe_sched.method '\[bds'"),
    ({"safe_sched": {"method": "fixed"}, "accelerate_config": "zero9"}, [], "zero9 is neither a file nor a valid"),
]


@pytest.mark.parametrize(("said", "words", "expected"), WRONG)
def test_what_is_wrong_stops_before_anything_runs(
    said: Any, words: list[str], expected: str, home: Path, tmp_path: Path
) -> None:
    path = config(home, tmp_path / "out", **said)
    with pytest.raises(OptionError, match=expected):
        command(["sft", "--config", str(path), *words])
    assert not (tmp_path / "out").exists()


def test_what_is_accelerates_goes_to_accelerate(home: Path, tmp_path: Path) -> None:
    said = {"num_processes": 2, "accelerate_config": "zero2", "cpu": True, "multi_gpu": False}
    path = config(home, tmp_path / "out", {"method": "fixed"}, **said)
    words = ["--config", str(path), "--machine_rank", "1", "--seed", "5"]
    call = read_call(words)
    assert call.launch[0] == "--config_file"
    assert call.launch[1].endswith("zero2.yaml")
    assert sorted(call.launch[2:]) == sorted(["--num_processes", "2", "--cpu", "--machine_rank", "1"])
    assert call.arguments == ["--config", str(path), "--seed", "5"]
    assert call.parsed[1].seed == 5
    assert read_call(call.arguments, launched=True).launch == []


def test_the_command_exits_with_words_and_codes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def invoke(*words: str) -> Any:
        return CliRunner().invoke(app, ["trl", "sft", *words])

    assert invoke("--config", str(tmp_path / "nothing.yaml")).exit_code == 2
    assert invoke("--config", str(config(home, tmp_path / "a"))).exit_code == 2
    with monkeypatch.context() as patch:  # a door that forgets the callback
        patch.setattr("safe_sched_hf.trl.Settings.callback", lambda self: SafeSchedCallback(Fixed(), report="none"))
        patch.setattr("safe_sched.training.record.RunRecord.finish", lambda *args, **more: None)
        patch.setattr("safe_sched_hf.trl.seal", lambda folder: {})
        found = invoke("--config", str(config(home, tmp_path / "b", {"method": "fixed"}, max_steps=1)))
        assert found.exit_code == 3
        assert "not defended: finished: training did not end" in found.output
    with monkeypatch.context() as patch:  # a release of TRL that takes its trainer from elsewhere
        patch.setattr(plain_sft, "main", lambda *parsed: None)
        found = invoke("--config", str(config(home, tmp_path / "c", {"method": "fixed"})))
        assert found.exit_code == 2
        assert "this training was not defended" in found.output
    found = CliRunner().invoke(app, ["trl"])
    assert "sft" in found.output


def launched(home: Path, out: Path, block: Any, *words: str) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own, with a word for accelerate in the YAML and one behind it."""
    path = config(home, out, block, num_processes=1, num_machines=1)
    line = ["trl", "sft", "--config", str(path), "--mixed_precision", "no", *words]
    code = f"import sys; sys.argv[1:] = {line!r}; from safe_sched.cli import main; main()"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)


def test_a_process_that_fails_is_an_exit_code(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of accelerate's one process, killed or not, and of the first that failed of several; others are not hidden."""
    import accelerate.commands.launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = config(home, tmp_path / "out", {"method": "fixed"}, num_processes=2)
    failures = {
        3: subprocess.CalledProcessError(3, "python"),
        137: subprocess.CalledProcessError(-9, "python"),
        2: ChildFailedError("worker", {1: ProcessFailure(1, 77, 2, str(tmp_path / "none"))}),
    }
    for code, error in failures.items():

        def fail(options: Any, error: Exception = error) -> None:
            assert (options.module, options.training_script) == (True, "safe_sched_hf.trl")
            assert options.num_processes == 2
            raise error

        monkeypatch.setattr(accelerate.commands.launch, "launch_command", fail)
        assert command(["sft", "--config", str(path)]) == code


@pytest.mark.slow
@pytest.mark.slow_sample
def test_processes_that_accelerate_starts_do_the_same(home: Path, tmp_path: Path) -> None:
    """``accelerate launch`` underneath: the same weights."""
    block = {"method": "bds", "safety_data": str(home / "safety.jsonl")}
    found = launched(home, tmp_path / "there", block)
    assert found.returncode == 0, found.stderr
    assert same(run(home, tmp_path / "here", block), weights_in(tmp_path / "there"))
    assert verify(tmp_path / "there").defended


@pytest.mark.slow
def test_an_error_in_such_a_process_is_an_exit_code(home: Path, tmp_path: Path) -> None:
    found = launched(home, tmp_path / "fails", {"method": "fixed", "safety_data": str(tmp_path / "none.jsonl")})
    assert found.returncode == 2, found.stderr
    assert "none.jsonl" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "fails" / MANIFEST_FILE).exists()


@pytest.mark.slow
@pytest.mark.compat("several processes: DDP", "trl")
def test_two_processes_write_one_manifest(home: Path, tmp_path: Path) -> None:
    """By torchrun, as ``accelerate launch`` does on several GPUs: the rows of both are counted, by one of them."""
    block = {"method": "bds", "safety_data": str(home / "safety.jsonl")}
    path = config(home, tmp_path / "two", block, ddp_backend="gloo", save_strategy="steps", save_steps=2)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += ["-m", "safe_sched_hf.trl", "--config", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run(line, capture_output=True, text=True, env=env, timeout=280)
    assert found.returncode == 0, found.stderr
    verdict = verify(tmp_path / "two", data=home / "data" / "train.jsonl")
    assert verdict.defended, verdict
    manifest = json.loads((tmp_path / "two" / MANIFEST_FILE).read_text())
    assert manifest["coverage"]["rows_trained_on"] == 2 * 4 * STEPS
