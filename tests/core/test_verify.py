"""The manifest and `verify`: what speaks against a run is seen, one thing at a time, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from safe_sched import Fixed
from safe_sched.cli import app
from safe_sched.errors import DataError, OptionError, StateError
from safe_sched.rows.index import RowIndex
from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE, header_of
from safe_sched.training.manifest import Verdict, read_manifest, verify
from safe_sched.training.record import TABLE_FILE, TRAINER_STATE, RunRecord, require_untouched, rows_fingerprint, seal
from safe_sched.training.session import Session
from tests.core.batches import pad, row

ROWS = [row(5, 6, 7), row(8, 9, 3), row(1, 2)]
TEXTS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]


class Run:
    """A run as an integration does it, without a trainer: two steps, a checkpoint after each."""

    def __init__(self, folder: Path, resumed_from: Path | None = None) -> None:
        self.folder = folder
        self.session = Session(Fixed([1.0, 0.5, 0.0]), RowIndex(torch.tensor(pad(ROWS).keys)))
        if resumed_from is not None:
            self.session.load(resumed_from / STATE_FILE)
        self.record = RunRecord(folder, resumed_from)
        self.record.begin(self.facts())

    def facts(self, **changes: Any) -> dict[str, Any]:
        session = self.session
        trained = {"steps": session.steps, "rows_trained_on": session.rows_trained}
        return {
            "data": {"fingerprint": session.index.fingerprint(), "rows": 3},
            "coverage": {**trained, "rows_weighed": session.rows_trained, "trainer_steps": session.steps},
            "source": {"fingerprint": rows_fingerprint(TEXTS), "columns": ["prompt", "completion"]},
        } | changes

    def step(self) -> None:
        (batch,) = self.session.begin_step([pad(ROWS)])
        self.session.weigh(batch, None)
        self.session.mark_gated(batch)
        self.session.end_step()
        folder = self.folder / f"checkpoint-{self.session.steps}"
        folder.mkdir(exist_ok=True)
        # the losses in it differ from run to run, as those of a trainer do
        log = {"global_step": self.session.steps, "log_history": [self.record.run]}
        (folder / TRAINER_STATE).write_text(json.dumps(log))
        self.session.save(folder / STATE_FILE, **self.record.checkpoint(folder))

    def end(self, **changes: Any) -> None:
        self.record.finish(self.facts(**changes), self.session.table())


def whole(folder: Path, steps: int = 2) -> Path:
    run = Run(folder)
    for _ in range(steps):
        run.step()
    run.end()
    return folder


def answers(verdict: Verdict) -> dict[str, bool | None]:
    return {name: ok for name, ok, _ in verdict.checks}


def against(folder: Path, **options: Any) -> tuple[list[str], str]:
    """Which checks say no, and the first one's words."""
    found = [(name, words) for name, ok, words in verify(folder, **options).checks if ok is False]
    return [name for name, _ in found], found[0][1] if found else ""


def change(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_defended_run_is_found_defended(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert answers(verify(tmp_path)) == {
        "manifest": True,
        "finished": True,
        "every row": True,
        "every step": True,
        "checkpoints": True,
        "table": True,
        "model files": None,
    }
    seal(tmp_path)
    assert answers(verify(tmp_path))["model files"] is True
    assert verify(tmp_path).defended


def test_copying_the_folder_changes_nothing(tmp_path: Path) -> None:
    """Times of files say nothing: a copy has new ones, in any order."""
    whole(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    seal(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    for number, path in enumerate(sorted((tmp_path / "b").rglob("*"))):
        os.utime(path, (number, number))
    assert verify(tmp_path / "b").defended


# what speaks against it -----------------------------------------------------------------------------------------


def test_no_manifest_is_not_defended(tmp_path: Path) -> None:
    assert against(tmp_path) == (
        ["manifest"],
        f"there is no {MANIFEST_FILE}: the run was not defended, or it wrote to another folder",
    )
    whole(tmp_path)
    assert "in the folder above" in against(tmp_path / "checkpoint-2")[1]


def test_a_crashed_run_is_not_defended(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step()
    names, words = against(tmp_path)
    assert names == ["finished"]
    assert "crashed, or still runs" in words


def test_an_older_manifest_does_not_vouch_for_a_crashed_run(tmp_path: Path) -> None:
    whole(tmp_path)
    assert (tmp_path / TABLE_FILE).exists()
    Run(tmp_path)
    assert "finished" in against(tmp_path)[0]
    assert not (tmp_path / TABLE_FILE).exists()


def test_a_run_that_cannot_start_leaves_the_older_one_as_it_was(tmp_path: Path) -> None:
    """Nothing is written before the checkpoint that is resumed from has been looked at."""
    whole(tmp_path)
    (tmp_path / "checkpoint-2" / TRAINER_STATE).write_text('{"global_step": 2}')
    before = (tmp_path / MANIFEST_FILE).read_bytes()
    with pytest.raises(StateError, match="another run has written to this checkpoint since"):
        Run(tmp_path, tmp_path / "checkpoint-2")
    assert (tmp_path / MANIFEST_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("coverage", "name"),
    [
        ({"rows_weighed": 5}, "every row"),
        ({"rows_trained_on": 7}, "every row"),
        ({"rows_trained_on": 0, "rows_weighed": 0}, "every row"),
        ({"trainer_steps": 3}, "every step"),
        ({"trainer_steps": None}, "every step"),
    ],
)
def test_coverage_below_all_is_not_defended(coverage: dict[str, Any], name: str, tmp_path: Path) -> None:
    whole(tmp_path)
    found = json.loads((tmp_path / MANIFEST_FILE).read_text())["coverage"]
    change(tmp_path, coverage=found | coverage)
    assert against(tmp_path)[0] == [name]


def test_steps_that_the_trainer_took_without_us_are_seen(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / TRAINER_STATE).write_text('{"global_step": 2}')
    assert verify(tmp_path).defended
    for text in ('{"global_step": 4}', "{}", "[]", "no json"):
        (tmp_path / TRAINER_STATE).write_text(text)
        assert against(tmp_path)[0] == ["every step"]


def test_a_changed_table_is_seen(tmp_path: Path) -> None:
    whole(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / TABLE_FILE)
    changed = table.set_column(2, "weight", pa.array([1.0, 1.0, 1.0], pa.float32()))
    pyarrow.parquet.write_table(changed, tmp_path / TABLE_FILE)
    assert against(tmp_path) == (["table"], f"{TABLE_FILE} is not the one that the run has written")
    (tmp_path / TABLE_FILE).unlink()
    assert against(tmp_path)[0] == ["table"]


def test_a_table_that_was_not_kept_is_no_fault(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step()
    run.record.finish(run.facts(), run.session.table(), keep_table=False)
    assert not (tmp_path / TABLE_FILE).exists()
    assert answers(verify(tmp_path))["table"] is None
    assert verify(tmp_path).defended


def test_a_checkpoint_of_an_undefended_run_is_seen(tmp_path: Path) -> None:
    """A later run without us in the same folder: a new checkpoint, or one of ours written over."""
    whole(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "kept")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / TRAINER_STATE).write_text('{"global_step": 5}')
    assert "was not saved by a defended run" in against(tmp_path)[1]
    shutil.rmtree(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-2" / TRAINER_STATE).write_text('{"global_step": 2, "log_history": ["other losses"]}')
    names, words = against(tmp_path)
    assert names == ["checkpoints"]
    assert "another run has written to this checkpoint since" in words
    assert verify(tmp_path / "kept").defended


def test_a_checkpoint_of_an_older_defended_run_is_seen(tmp_path: Path) -> None:
    """The manifest says nothing of how that one was trained; without it, the folder is all one run's."""
    whole(tmp_path, steps=3)
    whole(tmp_path, steps=2)
    assert "checkpoint-3: it was saved by another run" in against(tmp_path)[1]
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert verify(tmp_path).defended


def test_a_checkpoint_from_beyond_the_end_of_the_run_is_seen(tmp_path: Path) -> None:
    """Of the same run, before it was resumed and ended earlier: its model is not one that this manifest tells of."""
    whole(tmp_path, steps=3)
    again = Run(tmp_path, resumed_from=tmp_path / "checkpoint-1")
    again.step()
    again.end()
    names, words = against(tmp_path)
    assert names == ["checkpoints"]
    assert words == "checkpoint-3: its state is that of step 3, and the run had 2"


def test_a_checkpoint_that_lost_its_trainer_state_is_seen(tmp_path: Path) -> None:
    """Without it there is nothing to tell that the weights beside our state are those of its step."""
    whole(tmp_path)
    (tmp_path / "checkpoint-1" / TRAINER_STATE).unlink()
    names, words = against(tmp_path)
    assert names == ["checkpoints"]
    assert "trainer_state.json is missing or of another step" in words


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Killed after a step, resumed: the checkpoints from before belong to it."""
    killed = Run(tmp_path)
    killed.step()
    again = Run(tmp_path, tmp_path / "checkpoint-1")
    again.step()
    again.end()
    assert verify(tmp_path).defended
    assert header_of(tmp_path / "checkpoint-1" / STATE_FILE)["run"] == read_manifest(tmp_path).run == killed.record.run


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": 1}', '{"version": 2}', "[" * 100_000, "\xff"])
def test_a_damaged_manifest_is_not_defended(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    names, words = against(tmp_path)
    assert names == ["manifest"]
    assert "is damaged" in words or "has version" in words


@pytest.mark.parametrize("state", [b"", b"not a state", None])
def test_a_damaged_state_is_not_defended(state: bytes | None, tmp_path: Path) -> None:
    whole(tmp_path)
    path = tmp_path / "checkpoint-2" / STATE_FILE
    if state is None:
        save_file({"a": torch.ones(1)}, path)  # somebody else's
    else:
        path.write_bytes(state)
    assert against(tmp_path)[0] == ["checkpoints"]


@pytest.mark.parametrize("what", ["other", "more", "gone"])
def test_a_model_that_was_saved_over_is_seen(what: str, tmp_path: Path) -> None:
    whole(tmp_path)
    for name in ("model.safetensors", "training_args.bin"):
        (tmp_path / name).write_bytes(b"first")
    assert list(seal(tmp_path)) == ["model.safetensors"]
    (tmp_path / "training_args.bin").write_bytes(b"no model")
    assert verify(tmp_path).defended
    if what == "other":
        (tmp_path / "model.safetensors").write_bytes(b"other")
    elif what == "more":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"more")
    else:
        (tmp_path / "model.safetensors").unlink()
    assert against(tmp_path)[0] == ["model files"]


def test_only_a_finished_run_is_sealed(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not the manifest of a finished run"):
        seal(tmp_path)
    Run(tmp_path)
    with pytest.raises(StateError, match="'running'"):
        seal(tmp_path)


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StateError, match="nothing would show that this run is defended"):
        Run(tmp_path / "out")


def test_a_disk_that_is_full_leaves_the_running_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.step()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safe_sched.data.writing.os.fsync", full)
    with pytest.raises(StateError, match="No space left on device.*Make room"):
        run.end()
    assert read_manifest(tmp_path).status == "running"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


# the data -------------------------------------------------------------------------------------------------------


def test_the_data_are_compared(tmp_path: Path) -> None:
    """By the rows of the file, in any order; by their keys; by their tokens."""
    whole(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / TABLE_FILE)
    tokens = [{"input_ids": list(one.tokens), "labels": list(one.labels)} for one in ROWS]
    for same in (TEXTS, TEXTS[::-1], [{**one, "extra": 1} for one in TEXTS], table.to_pylist(), tokens):
        assert answers(verify(tmp_path, data=same))["data"] is True
    for other in (TEXTS[:2], [*TEXTS, TEXTS[0]], table.to_pylist()[1:], tokens[1:], [{"prompt": "x"}] * 3):
        names, words = against(tmp_path, data=other)
        assert names == ["data"]
        assert "other rows" in words


def test_data_that_cannot_be_compared_are_no_proof(tmp_path: Path) -> None:
    for number, source in enumerate((None, {"front_end": "one that saw a stream"})):
        run = Run(tmp_path / str(number))
        run.step()
        run.end(source=source)
        assert "cannot be compared" in against(tmp_path / str(number), data=TEXTS)[1]
        assert verify(tmp_path / str(number)).defended
    whole(tmp_path)
    with pytest.raises(DataError, match="no rows"):
        verify(tmp_path, data=[])
    with pytest.raises(DataError, match="no key and no tokens"):
        verify(tmp_path, data=[{"key": "seven"}])


def test_a_fingerprint_of_rows_sees_what_training_sees() -> None:
    assert rows_fingerprint([{"a": 1, "b": None}]) == rows_fingerprint([{"a": 1.0}])
    assert rows_fingerprint([{"a": "1"}]) != rows_fingerprint([{"a": 1}])
    assert rows_fingerprint([{"a": ["x", "y"]}]) != rows_fingerprint([{"a": ["y", "x"]}])
    assert rows_fingerprint([{"a": "x"}, {"a": "x"}]) != rows_fingerprint([])
    assert rows_fingerprint([{"a": "\ud800"}])


def test_an_untouched_checkpoint_passes(tmp_path: Path) -> None:
    whole(tmp_path)
    require_untouched(tmp_path / "checkpoint-2", header_of(tmp_path / "checkpoint-2" / STATE_FILE))
    require_untouched(tmp_path / "checkpoint-2", {})  # of a version that did not write it down


# the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_it_in_words_and_codes(tmp_path: Path) -> None:
    whole(tmp_path)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in TEXTS))
    found = CliRunner().invoke(app, ["verify", str(tmp_path), "--data", str(data)])
    assert found.exit_code == 0, found.output
    assert "Defended on every row." in found.output
    (tmp_path / TABLE_FILE).unlink()
    found = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert found.exit_code == 3
    assert "Not defended." in found.output
    found = CliRunner().invoke(app, ["verify", str(tmp_path), "--json"])
    assert found.exit_code == 3
    told = json.loads(found.output)
    assert told["defended"] is False
    assert [check["name"] for check in told["checks"] if check["ok"] is False] == ["table"]
    for wrong in ([str(tmp_path / "nothing")], [str(tmp_path), "--data", "nothing.jsonl"], []):
        assert CliRunner().invoke(app, ["verify", *wrong]).exit_code == 2


def test_terminal_escapes_in_a_manifest_are_shown_and_not_sent(tmp_path: Path) -> None:
    whole(tmp_path)
    change(tmp_path, status="\x1b]0;owned\x07")
    found = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert found.exit_code == 3
    assert "\x1b]0" not in found.output


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no folder"):
        verify(tmp_path / "none")
