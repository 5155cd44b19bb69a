"""``safe-sched axolotl``: what would train undefended is found before, and what has, after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("axolotl")

from safetensors.torch import load_file

from safe_sched.cli import app
from safe_sched.training.manifest import verify
from tests.axolotl.runs import LORA, chats, config, defended, page_config, train, write_rows
from tests.support import largest_difference, single_thread

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = {"method": "bds", "safety_data": "core"}
OURS = ("-c", "from safe_sched.cli import main; main()")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axolotl-check")


def written(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def check(folder: Path, settings: dict[str, Any], *options: str) -> tuple[int, str]:
    """The exit code and all that is said, each run of spaces as one."""
    from typer.testing import CliRunner  # here: older releases warn when they are imported

    found = CliRunner().invoke(app, ["axolotl", "check", str(written(folder, settings)), *options])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, " ".join(found.output.split())


def test_a_defended_configuration_is_explained(folder: Path) -> None:
    code, said = check(folder, config(folder, **defended(**BLOCK, mix={"share": 0.2}, safety_weight=0.5)))
    assert code == 0, said
    for words in (
        "method bds, with its defaults",
        "safety set core, 252 rows",
        "safety batch 4 rows in each optimiser step, loss times 0.5",
        "mixed in safety rows, 20% of the training set",
        "train.jsonl, 16 rows",
        "It would be defended on every row.",
    ):
        assert words in said
    assert "caution" not in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plugins": ["safe_sched_axolot.SafeSchedPlugin"]}, "did you mean 'safe_sched_axolotl.SafeSchedPlugin'?"),
        ({"plugins": ["safe_sched_axolotl.SafeSchedPlugn"]}, "did you mean 'safe_sched_axolotl.SafeSchedPlugin'?"),
        ({"plugins": None}, "is not named, so nothing would be defended; add it: plugins:"),
        ({"plugins": "safe_sched_axolotl.SafeSchedPlugin"}, "allowed: a list of names"),
        ({"safe_sched": None}, "no 'safe_sched' block; say what it is to do"),
        ({"safe_sched": None, "safe_shed": BLOCK}, "there is 'safe_shed': rename it"),
        ({"safe_sched": {"method": "bds", "saftey_data": "core"}}, "did you mean 'safety_data'?"),
        ({"safe_sched": {"method": "bds"}}, "give safety_data"),
        ({"safe_sched": BLOCK | {"safety_data": "nowhere.jsonl"}}, "safe_sched.safety_data: no file nowhere.jsonl"),
        (
            {"safe_sched": BLOCK | {"safety_data": [{"path": "no/such/a.jsonl", "type": "alpaca"}]}},
            "safety_data.0.path",
        ),
        (
            {"safe_sched": BLOCK | {"safety_data": [{"path": "a.jsonl", "tpye": "alpaca"}]}},
            "safe_sched.safety_data.0.tpye: unknown key 'tpye' (did you mean 'type'?)",
        ),
        ({"safety_data": "core"}, "belongs into the block: safe_sched.safety_data"),
        ({"rl": "dpo"}, "does not support preference and reinforcement learning"),
    ],
)
def test_what_would_train_undefended_is_an_error(folder: Path, changes: dict[str, Any], words: str) -> None:
    code, said = check(folder, config(folder, **(defended(**BLOCK) | changes)))
    assert code == 2, said
    assert words in said
    assert "It would be defended" not in said


def test_keys_that_do_nothing_are_named(folder: Path) -> None:
    settings = config(folder, **defended(**BLOCK), lerning_rate=1.0)
    settings["datasets"][0]["weight"] = 2.0
    settings["plugins"].append("no.such.Plugin")
    code, said = check(folder, settings)
    assert code == 0
    assert "unknown key 'lerning_rate' (did you mean 'learning_rate'?): Axolotl ignores it" in said
    assert "unknown key datasets.0.weight: Axolotl ignores it. It would weigh nothing" in said
    assert "no.such.Plugin: there is no such module" in said
    assert check(folder, settings, "--strict")[0] == 2


@pytest.mark.parametrize("option", ["--sweep", "--cloud", "--plugins", "--safe_sched.method"])
def test_options_that_take_a_run_out_of_sight_are_refused(folder: Path, option: str) -> None:
    assert check(folder, config(folder, **defended(**BLOCK)), option, "x")[0] == 2


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, as a user starts it."""
    source = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(str(source / part) for part in ("", "src", "integrations"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    given = {"PYTHONPATH": paths, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=os.environ | given, capture_output=True, text=True, check=False
    )


def test_the_configuration_of_the_page_is_defended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "refusals.jsonl"):
        write_rows(tmp_path / name, chats())
    code, said = check(tmp_path, page_config(), "--strict")
    assert code == 0, said
    assert "safety set refusals.jsonl (type chat_template)" in said
    assert "trains lora, packed" in said


@pytest.mark.slow
@pytest.mark.slow_sample
def test_the_command_trains_defended_and_says_so(folder: Path) -> None:
    """The run of ``safe-sched axolotl train`` is that of a plain process: the saved weights are the same."""
    settings = config(folder, **defended(method="bds", safety_data=str(folder / "train.jsonl")), save_safetensors=True)
    path = written(folder, settings | {"output_dir": str(folder / "command")})
    done = run(*OURS, "axolotl", "train", str(path), "--learning-rate", "0.02")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Defended on every row" in done.stdout
    assert verify(folder / "command").defended
    manifest = json.loads((folder / "command" / "safe_sched_manifest.json").read_text())
    assert manifest["source"]["front_end"].startswith("axolotl 0.")
    with single_thread():
        expected = train(settings | {"learning_rate": 0.02})
    found = load_file(folder / "command" / "model.safetensors")
    assert largest_difference(found, {name: expected.parameters[name] for name in found}) < 1e-6


@pytest.mark.slow
def test_axolotl_itself_trains_on_without_the_plugin(folder: Path) -> None:
    """Why there is a command: a misspelt name trains undefended, and nothing but our command stops it."""
    settings = config(folder, **LORA, **defended(**BLOCK), output_dir=str(folder / "open"), max_steps=1)
    path = written(folder, settings | {"plugins": ["safe_sched_axolot.SafeSchedPlugin"]})
    plain = run("-m", "axolotl.cli.main", "train", str(path))
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert (folder / "open" / "adapter_model.safetensors").exists()
    assert not verify(folder / "open").defended
    ours = run(*OURS, "axolotl", "train", str(path))
    assert ours.returncode == 2
    assert "did you mean" in ours.stderr


@pytest.mark.slow
def test_a_run_that_axolotl_does_not_start_fails(folder: Path) -> None:
    settings = config(folder, **defended(**BLOCK), base_model=str(folder / "no-model"), output_dir=str(folder / "bad"))
    done = run(*OURS, "axolotl", "train", str(written(folder, settings)))
    assert done.returncode == 1
    assert "axolotl train has failed" in done.stderr
