"""A saved state comes back as it was, or not at all and with a reason."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import safe_sched.training.checkpoint
from safe_sched.data.writing import replacing
from safe_sched.errors import StateError
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched.schedulers import BDSReleased, Fixed
from safe_sched.training.checkpoint import FORMAT, load_state, require_same, save_state
from safe_sched.training.session import Session
from tests.core.batches import pad, row

ROWS = [row(5, 6, 7), row(8, 9, 3), row(1, 2)]
TENSORS = {"a": torch.arange(6).view(2, 3), "b": torch.tensor(0.5, dtype=torch.float64), "c": torch.empty(0).int()}


def session_of(scheduler: Any = None, rows: Any = ROWS, **options: Any) -> Session:
    index = RowIndex(None if rows is None else torch.tensor(pad(rows).keys))
    return Session(BDSReleased() if scheduler is None else scheduler, index, **options)


def train(session: Session, steps: int = 2) -> Session:
    for number in range(steps):
        (batch,) = session.begin_step([pad(ROWS)])
        session.weigh(batch, {"nll": torch.tensor([1.0, 2.0, 3.0 + number])})
        session.mark_gated(batch)
        session.end_step()
    return session


def saved(path: Path, **changes: Any) -> Path:
    train(session_of(**changes)).save(path, version="1.2.3")
    return path


# files ----------------------------------------------------------------------------------------------------------------


def test_tensors_and_header_come_back_as_they_were(tmp_path):
    header = {"data": "ab-3", "scheduler": {"betas": [0.9, 0.95]}, "note": "a \u2603 of text"}
    save_state(tmp_path / "s", TENSORS, header)
    tensors, found = load_state(tmp_path / "s")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert found == {"format": FORMAT, **header}


def test_a_tensor_that_is_a_view_is_saved_by_value(tmp_path):
    save_state(tmp_path / "s", {"t": torch.arange(6).view(2, 3).t()}, {})
    assert load_state(tmp_path / "s")[0]["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def fails_half_way(opened: Any) -> Any:
    """A way to write that runs out of space within the file."""

    @contextlib.contextmanager
    def writing(path: Path) -> Iterator[Any]:
        with opened(path) as file:
            file.write(b"half a file")
            file.flush()
            raise OSError("no space left on device")
            yield

    return writing


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """The new file appears whole or not at all, and nothing else lies around."""
    path = saved(tmp_path / "s")
    content = path.read_bytes()
    monkeypatch.setattr(safe_sched.training.checkpoint, "replacing", fails_half_way(replacing))
    with pytest.raises(OSError, match="no space"):
        session_of().save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """The old file is replaced in one move, after the new one is complete."""
    path = saved(tmp_path / "s")
    content = path.read_bytes()

    def refuse(source: Path, target: Path) -> None:
        assert load_state(source)[1]["steps"] == 0
        assert target == path
        raise OSError("read-only file system")

    monkeypatch.setattr("safe_sched.data.writing.os.replace", refuse)
    with pytest.raises(OSError, match="read-only"):
        session_of().save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_in_place_would_be_noticed(tmp_path, monkeypatch):
    """Control: the same failure, written over the old file, loses it."""
    path = saved(tmp_path / "s")
    in_place = fails_half_way(lambda path: open(path, "wb"))  # noqa: SIM115
    monkeypatch.setattr(safe_sched.training.checkpoint, "replacing", in_place)
    with pytest.raises(OSError, match="no space"):
        session_of().save(path)
    with pytest.raises(StateError):
        load_state(path)


def test_a_write_that_succeeds_replaces_the_old_file(tmp_path):
    path = saved(tmp_path / "s")
    session_of().save(path)
    assert load_state(path)[1]["steps"] == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_state_is_a_state_error_that_says_what_to_do(tmp_path):
    with pytest.raises(StateError, match=r"no scheduler state at .*s: .*start again without resuming"):
        session_of().load(tmp_path / "s")
    with pytest.raises(StateError, match="no scheduler state"):
        load_state(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, 200, -1])
def test_a_truncated_state_is_a_state_error(keep, tmp_path):
    path = saved(tmp_path / "s")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StateError, match="damaged or not a scheduler state"):
        session_of().load(path)


@pytest.mark.parametrize("place", [0, 7, 8, 12])
def test_a_state_with_a_damaged_head_is_a_state_error(place, tmp_path):
    path = saved(tmp_path / "s")
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(StateError, match="damaged or not a scheduler state"):
        session_of().load(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"safe_sched": "{not json"}])
def test_somebody_elses_safetensors_file_is_a_state_error(metadata, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "s", metadata=metadata)
    with pytest.raises(StateError, match="damaged or not a scheduler state"):
        load_state(tmp_path / "s")


@pytest.mark.parametrize("header", ["[]", "7", "null", '"text"'])
def test_a_header_that_is_no_object_is_a_state_error(header, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "s", metadata={"safe_sched": header})
    with pytest.raises(StateError):
        load_state(tmp_path / "s")


@pytest.mark.parametrize("found", [FORMAT + 1, None, "1"])
def test_another_format_is_a_state_error_that_names_both(found, tmp_path):
    header = json.dumps({"format": found, "version": "9.9"})
    save_file({"weight": torch.zeros(2)}, tmp_path / "s", metadata={"safe_sched": header})
    with pytest.raises(StateError, match=rf"has format {found!r}; this version reads {FORMAT}\..*9\.9"):
        load_state(tmp_path / "s")


# no pickle ------------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", ["torch", "old torch", "pickle"])
def test_a_pickle_is_refused_and_not_run(write, tmp_path):
    sprung, path = tmp_path / "sprung", tmp_path / "s"
    content = {"state": torch.zeros(3), "trap": Trap(sprung)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(StateError, match="damaged or not a scheduler state"):
        session_of().load(path)
    assert not sprung.exists()
    # control: the trap does work where pickles are read
    if write == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert sprung.exists()


# belonging ------------------------------------------------------------------------------------------------------------


def test_a_session_goes_on_from_its_own_state(tmp_path):
    """Control for the refusals below: the same data, options and step are accepted, in any order of the rows."""
    path = saved(tmp_path / "s")
    expected = train(session_of())
    for rows in (ROWS, ROWS[::-1]):
        session = session_of(rows=rows)
        session.load(path, steps=2)
        assert torch.equal(session.state.tensors()["logits"], expected.state.tensors()["logits"])
        assert torch.equal(session.seen, expected.seen)
        assert (session.steps, session.rows_trained) == (2, 6)


@pytest.mark.parametrize(
    ("changes", "name", "before", "now"),
    [
        ({"rows": [*ROWS[:2], row(1, 3)]}, "data", "-3'", "-3'"),
        ({"rows": ROWS[:2]}, "data", "-3'", "-2'"),
        ({"rows": [*ROWS, ROWS[0]]}, "data", "-3'", "-4'"),
        ({"rows": None}, "data", "-3'", "'stream'"),
        (
            {"scheduler": BDSReleased(learning_rate=0.1)},
            "scheduler",
            "'learning_rate': 0.005",
            "'learning_rate': 0.1",
        ),
        ({"scheduler": BDSReleased(betas=(0.9, 0.99))}, "scheduler", "[0.9, 0.95]", "[0.9, 0.99]"),
        ({"scheduler": BDSReleased(transform="sigmoid")}, "scheduler", "'softmax'", "'sigmoid'"),
        ({"scheduler": Fixed()}, "scheduler", "'bds_released'", "'fixed'"),
        ({"normalizer": "row"}, "normalizer", "'token'", "'row'"),
        ({"settings": {"safety_weight": 2.0}}, "safety_weight", "None", "2.0"),
    ],
    ids=lambda x: None if not isinstance(x, dict) else ",".join(x),
)
def test_a_state_of_other_data_or_options_is_a_state_error_that_names_both(changes, name, before, now, tmp_path):
    path = saved(tmp_path / "s")
    session = session_of(**changes)
    with pytest.raises(StateError, match="belongs to another run") as caught:
        session.load(path)
    _, _, told = str(caught.value).partition(f"{name}: saved ")
    first, _, second = told.partition(", now ")
    assert before in first
    assert now in second
    assert session.steps == 0
    assert session.seen.sum() == 0


def test_a_state_of_another_step_is_a_state_error_that_names_both(tmp_path):
    with pytest.raises(StateError, match="steps: saved 2, now 7"):
        session_of().load(saved(tmp_path / "s"), steps=7)


def test_every_difference_is_named():
    with pytest.raises(StateError, match=r"a: saved 1, now 2; c: saved None, now \[3, 4\]"):
        require_same(Path("s"), {"a": 1, "b": 0}, {"a": 2, "b": 0, "c": (3, 4)})


@pytest.mark.parametrize("lost", ["seen", "state.logits", "state.steps"])
def test_a_state_with_a_tensor_missing_is_a_state_error(lost, tmp_path):
    """The header fits and the content does not: another program wrote it, or an older one."""
    path = saved(tmp_path / "s")
    header = load_state(path)[1]
    tensors = load_file(path)
    del tensors[lost]
    save_state(path, tensors, header)
    with pytest.raises(StateError, match=lost):
        session_of().load(path)


@pytest.mark.parametrize("name", ["state.logits", "seen"])
def test_a_state_with_a_tensor_of_another_size_is_a_state_error(name, tmp_path):
    path = saved(tmp_path / "s")
    header = load_state(path)[1]
    tensors = load_file(path)
    tensors[name] = tensors[name][:2].clone()
    save_state(path, tensors, header)
    with pytest.raises(StateError, match=name):
        session_of().load(path)


# streams --------------------------------------------------------------------------------------------------------------


def test_a_stream_takes_its_keys_along(tmp_path):
    """Slots are numbered by arrival; a new session that sees the rows in another order still finds them."""
    first = session_of(rows=None)
    train(first)
    first.save(tmp_path / "s")
    second = session_of(rows=None)
    second.load(tmp_path / "s", steps=2)
    assert second.index.keys.tolist() == first.index.keys.tolist() == pad(ROWS).keys
    assert torch.equal(second.row_weights(), first.row_weights())
    for session in (first, second):
        (batch,) = session.begin_step([pad([ROWS[2], row(3, 3, 3), ROWS[0]])])
        assert batch.slots.tolist() == [2, 3, 0]
        session.weigh(batch, {"nll": torch.tensor([1.0, 2.0, 3.0])})
        session.mark_gated(batch)
        session.end_step()
    assert torch.equal(second.row_weights(), first.row_weights())


def test_fixed_weights_come_from_the_state(tmp_path):
    session_of(Fixed([0.5, 2.0, 1.0])).save(tmp_path / "s")
    again = session_of(Fixed([0.5, 2.0, 1.0]))
    again.load(tmp_path / "s")
    assert again.row_weights().tolist() == [0.5, 2.0, 1.0]


def test_other_fixed_weights_are_a_state_error(tmp_path):
    """The options differ, though only in the numbers: going on with the old ones in silence would hide it."""
    session_of(Fixed([0.5, 2.0, 1.0])).save(tmp_path / "s")
    with pytest.raises(StateError, match="scheduler"):
        session_of(Fixed([0.5, 2.0, 0.0])).load(tmp_path / "s")


def test_a_saved_state_is_not_changed_by_going_on(tmp_path):
    path = saved(tmp_path / "s")
    content = path.read_bytes()
    session = session_of()
    session.load(path)
    step = Observation(torch.tensor([0, 1]), torch.tensor([1, 1]), 2, {"nll": torch.tensor([2.0, 1.0])})
    session.scheduler.update(session.state, step)
    assert path.read_bytes() == content
