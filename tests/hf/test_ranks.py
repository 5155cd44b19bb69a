"""Two processes with batches of b are one process with batches of 2b; and what one of them says is heard by the other.

All runs of a kind are made by one launch of `tests.hf.ranks_cases`, as a launch takes longer than a run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE
from tests.hf import ranks_cases
from tests.hf.ranks_cases import BATCH, CASES, FAULTS, run
from tests.support import make_hf, single_thread

ROOT = Path(__file__).parents[2]
FLOAT, HALF = 1e-5, 2e-3  # of what is kept in float16, where a rounding error can be one of its last digits

SAMPLE = ["safety", "row", "probe", "neural", "antibody, step", "lisa", "sample, accumulated", "stream"]
UNTOUCHED = ["untouched", "equal", "untouched sft", "equal sft"]
ODD = ["uneven", "sample nothing", "stream, each its own", "split"]
SHARDED = ["safety", "neural", "sample, accumulated", "row", "released", "packed", "lora", "stream"]
REST = [name for name in CASES if name not in (*SAMPLE, *UNTOUCHED, *ODD)]
RESUMED = ["fixed", "released", "probe", "sample, probe"]
SAMPLED = [*SAMPLE, *UNTOUCHED[:2], "released; deaf", "fault; loss", "exchange", "probe; sharded"]

DDP, FSDP2 = "several processes: DDP", "several processes: FSDP2"
slow = pytest.mark.slow
sample = [pytest.mark.slow, pytest.mark.slow_sample, pytest.mark.timeout(600)]


def cases(names: Sequence[str], feature: str, *marks: Any) -> list[Any]:
    """The cases as parameters, each with its line of docs/compatibility.md."""
    columns = {name: "hf" if CASES[name][0] is make_hf else "sft" for name in names}
    return [pytest.param(name, marks=[*marks, pytest.mark.compat(feature, column)]) for name, column in columns.items()]


def launch(folder: Path, names: Sequence[str], limit: float = 500) -> None:
    """Both processes of all these runs; one that hangs is an error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(ROOT / part) for part in (".", "src", "integrations")]
    more = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run(
        [*command, ranks_cases.__file__, str(folder), *names],
        env=os.environ | more,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-4000:]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    launch(folder, SAMPLED)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    runs = [f"{name}; {how}" for name in RESUMED for how in ("saved", "resumed")]
    faults = [f"fault; {name}" for name in FAULTS if name != "loss"]
    launch(folder, [*REST, *UNTOUCHED[2:], *ODD, *runs, *faults])
    kept = ["released; sharded saved", "released; sharded resumed"]
    launch(folder, [*(f"{name}; sharded" for name in SHARDED), *kept])
    return folder


def said(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / name / f"rank{rank}.safetensors") for rank in (0, 1)]


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By how much more than rounding tensors differ, 1 being as much as rounding may; nothing where they do not."""
    assert found.keys() == expected.keys()
    halves = any(tensor.dtype == torch.float16 for tensor in expected.values())
    worse = {}
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        a, b = (torch.nan_to_num(x.double(), nan=-77.0) for x in (found[name], tensor))
        sums = not name.startswith("model.") and name.endswith(("weight", "judged"))
        rough = tensor.dtype == torch.float16 or (halves and sums)
        allowed = HALF if rough else FLOAT
        ratio = float((a - b).norm()) / max(float(b.norm()), 1e-12) / allowed
        if ratio > 1:
            worse[name] = ratio
    return worse


def is_law(folder: Path, made: str, tmp_path: Path, **options: Any) -> None:
    first, second = said(folder, made)
    assert all(torch.equal(torch.nan_to_num(first[k]), torch.nan_to_num(second[k])) for k in first)
    with single_thread():
        one = run(**({"name": made, "folder": tmp_path, "batch": 2 * BATCH} | options))
    assert off(first, one) == {}


# the law --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(SAMPLE, DDP, *sample))
def test_two_ranks_are_one_with_twice_the_batch(name: str, sampled: Path, tmp_path: Path) -> None:
    is_law(sampled, name, tmp_path)


@pytest.mark.parametrize("name", cases(REST, DDP, slow))
def test_two_ranks_are_one_with_twice_the_batch_in_every_method(name: str, others: Path, tmp_path: Path) -> None:
    is_law(others, name, tmp_path)


@pytest.mark.parametrize("name", cases(["probe"], FSDP2, *sample))
def test_two_ranks_with_half_the_model_each_measure_as_one(name: str, sampled: Path, tmp_path: Path) -> None:
    """FSDP2: the parameters that a probe moves are shards."""
    is_law(sampled, f"{name}; sharded", tmp_path, name=name)


@pytest.mark.parametrize("name", cases(SHARDED, FSDP2, slow))
def test_two_ranks_with_half_the_model_each_are_one(name: str, others: Path, tmp_path: Path) -> None:
    """FSDP2."""
    is_law(others, f"{name}; sharded", tmp_path, name=name)


@slow
@pytest.mark.parametrize("name", ["stream, each its own", "sample nothing"])
def test_two_ranks_are_one_however_batches_come(name: str, others: Path, tmp_path: Path) -> None:
    is_law(others, name, tmp_path)


@slow
def test_ranks_that_split_every_batch_are_one_with_that_batch(others: Path, tmp_path: Path) -> None:
    is_law(others, "split", tmp_path, batch=BATCH)


@pytest.mark.slow
@pytest.mark.slow_sample
def test_ranks_that_do_not_hear_of_each_other_break_the_law(sampled: Path, tmp_path: Path) -> None:
    """The control: the same run without its exchange."""
    first, second = said(sampled, "released; deaf")
    assert not torch.equal(first["weight"], second["weight"])
    with single_thread():
        one = run("released", tmp_path, batch=2 * BATCH)
    assert off(first, one).get("state.logits", 0) > 1000


@pytest.mark.slow
@pytest.mark.slow_sample
def test_equal_weights_are_the_untouched_run_bit_for_bit(sampled: Path) -> None:
    untouched, equal = said(sampled, "untouched")[0], said(sampled, "equal")[0]
    assert all(torch.equal(equal[name], tensor) for name, tensor in untouched.items())


@slow
def test_equal_weights_are_the_untouched_run_under_accumulation(others: Path) -> None:
    untouched, equal = said(others, "untouched sft")[0], said(others, "equal sft")[0]
    assert all(torch.equal(equal[name], tensor) for name, tensor in untouched.items())


@slow
def test_rows_that_fill_the_last_batches_are_counted_as_often_as_they_are_trained_on(others: Path) -> None:
    """21 rows are 6 steps of 2 x 2: the trainer fills up with three from the start of the epoch."""
    first, second = said(others, "uneven")
    assert torch.equal(first["seen"], second["seen"])
    assert int(first["seen"].sum()) == 2 * 24
    assert int(first["seen"].min()) == 2


# saving ---------------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("name", ["fixed; ", "released; ", "released; sharded "])
def test_two_ranks_go_on_as_if_they_had_not_stopped(name: str, others: Path) -> None:
    whole, resumed = said(others, f"{name}saved"), said(others, f"{name}resumed")
    for rank in (0, 1):
        assert all(torch.equal(resumed[rank][k], tensor) for k, tensor in whole[rank].items())


@slow
@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_where_two_have_stopped(name: str, others: Path, tmp_path: Path) -> None:
    saved = others / f"{name}; saved" / "out" / "checkpoint-3"
    is_law(others, f"{name}; resumed", tmp_path, name=name, resume=str(saved))


@slow
def test_one_process_writes(others: Path) -> None:
    """The other could not: see `tests.hf.ranks_cases`."""
    folder = others / "probe; saved" / "out"
    assert (folder / "checkpoint-3" / STATE_FILE).exists()
    assert json.loads((folder / MANIFEST_FILE).read_text())["coverage"]["rows_trained_on"] == 28 * 2 * 2 * BATCH


# the exchange ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.slow_sample
def test_every_rank_hears_what_the_others_say(sampled: Path) -> None:
    for rank in (0, 1):
        found = json.loads((sampled / "exchange" / f"rank{rank}.json").read_text())
        assert found["wrong"] == 0
        assert found["text"].startswith(f"rank {1 - rank} is at another place of the training loop than rank {rank}")


# faults ---------------------------------------------------------------------------------------------------------------

HEARD = {
    "loss": ("NumericsError", "the loss of 2 rows is not finite"),
    "safety loss": ("NumericsError", "the safety loss is nan at step 1"),
    "memory": ("OutOfMemoryError", "out of memory"),
    "score": ("OutOfMemoryError", "out of memory"),
    "batch": ("CoverageError", "are not among the 24 rows"),
}
TOLD = {
    "rows": ("DataError", "rank 1 does not have the options or rows of rank 0"),
    "order": ("DataError", "rank 1 does not have the order of rows of rank 0"),
    "prior": ("DataError", "rank 1 does not have the options or rows of rank 0"),
    "steps": ("ModelError", "even_batches=False lets one process have batches left"),
}


def errors_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The error of each rank. A rank that waited for the other one would wait for longer than `launch` does."""
    return [json.loads((folder / f"fault; {name}" / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def is_heard(folder: Path, name: str) -> None:
    kind, text = HEARD[name]
    other, own = errors_of(folder, name)
    assert own["error"] == kind
    assert text in own["text"]
    assert other["error"] == "RankError"
    assert other["text"].startswith(f"rank 1 stopped: {kind}: ")
    assert text in other["text"]


@pytest.mark.slow
@pytest.mark.slow_sample
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(sampled: Path) -> None:
    is_heard(sampled, "loss")


@slow
@pytest.mark.parametrize("name", [name for name in HEARD if name != "loss"])
def test_an_error_on_one_rank_stops_both(name: str, others: Path) -> None:
    is_heard(others, name)


@slow
def test_a_manifest_that_cannot_be_written_stops_both(others: Path) -> None:
    own, other = errors_of(others, "manifest")
    assert own["error"] == "StateError"
    assert other["error"] == "RankError"
    assert other["text"].startswith("rank 0 stopped: StateError: ")


@slow
@pytest.mark.parametrize("name", TOLD)
def test_ranks_that_differ_stop_before_the_first_step(name: str, others: Path) -> None:
    for found in errors_of(others, name):
        assert found["error"] == TOLD[name][0]
        assert TOLD[name][1] in found["text"]
