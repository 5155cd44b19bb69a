"""What a run leaves in its output folder: a manifest, and the final table beside it. `training.manifest` reads it.

The manifest is written twice: when training starts, as ``"running"``, and when it has ended, as ``"finished"``. A run
that crashes or is killed leaves the first, so a manifest of an older run never vouches for it. Every checkpoint carries
the run's number and the digest of its ``trainer_state.json`` in the header of our state file: what another run has
written over, or added, is told apart.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from safe_sched.data.writing import replacing
from safe_sched.errors import DataError, StateError
from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE, header_of

VERSION = 1
"""Of the manifest."""

TABLE_FILE = "safe_sched_table.parquet"
TRAINER_STATE = "trainer_state.json"
CHECKPOINT = "checkpoint-"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class RunRecord:
    """The record of one run.

    Args:
        folder: The run's output folder.
        resumed_from: The checkpoint that it goes on from, None for a new run.

    Raises:
        StateError: Something else has written to that checkpoint since.
    """

    def __init__(self, folder: str | Path, resumed_from: str | Path | None = None) -> None:
        self.folder = Path(folder or ".")
        self.run, self.started = uuid.uuid4().hex, _now()
        if resumed_from is not None:
            header = header_of(Path(resumed_from) / STATE_FILE)
            require_untouched(Path(resumed_from), header)
            self.run = header.get("run", self.run)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Say that the run has started; what an older run has said of this folder is gone.

        Args:
            facts: Plain JSON values.

        Raises:
            StateError: The folder cannot be written to.
        """
        _written(self.folder / MANIFEST_FILE, self._json(facts, "running"))
        (self.folder / TABLE_FILE).unlink(missing_ok=True)

    def checkpoint(self, folder: Path) -> dict[str, str]:
        """What the header of a checkpoint's state file says: the run, and which ``trainer_state.json`` it knows."""
        return {"run": self.run, "trainer_state": _digest_of(folder / TRAINER_STATE) or ""}

    def finish(self, facts: Mapping[str, Any], table: pa.Table, *, keep_table: bool = True) -> None:
        """Say that the run has ended, defended to its last step.

        Args:
            facts: Plain JSON values, with ``coverage``.
            table: The final table.
            keep_table: Whether to write it too, as `TABLE_FILE`; its digest is kept in any case.

        Raises:
            StateError: The folder cannot be written to.
        """
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        if keep_table:
            _written(self.folder / TABLE_FILE, data)
        kept = {"kept": keep_table, "rows": table.num_rows, "sha256": hashlib.sha256(data).hexdigest()}
        _written(self.folder / MANIFEST_FILE, self._json({**facts, "table": kept}, "finished"))

    def _json(self, facts: Mapping[str, Any], status: str) -> bytes:
        said = {
            "version": VERSION,
            "status": status,
            "defended": status == "finished",
            "run": self.run,
            "started": self.started,
            "ended": _now() if status == "finished" else None,
            **facts,
        }
        return (json.dumps(said, indent=2) + "\n").encode()


def seal(folder: str | Path) -> dict[str, str]:
    """Add the digests of the model files in an output folder to its manifest, once the model has been saved.

    A front end calls this after ``trainer.save_model()``; `training.manifest.verify` then notices when something
    else is saved over the model.

    Args:
        folder: The run's output folder, with the manifest of a finished run.

    Returns:
        SHA-256 by file name.

    Raises:
        StateError: There is no such manifest, or it cannot be written.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["status"] != "finished":
            raise ValueError(f"status {manifest['status']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path} is not the manifest of a finished run ({error}), so it cannot take model files"
        ) from error
    manifest["model_files"] = model_files(Path(folder))
    _written(path, (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest["model_files"]


def model_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file with weights that lies directly in a folder, by name; our own files are left out."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.suffix in _WEIGHTS and p.name != STATE_FILE)
    return {name: _digest_of(folder / name) or "" for name in names if name != "training_args.bin"}


def require_untouched(checkpoint: Path, header: Mapping[str, Any]) -> None:
    """Stop where a checkpoint was written over since our state was put beside it.

    Args:
        checkpoint: Its folder.
        header: Of the state file in it.

    Raises:
        StateError: Its ``trainer_state.json`` is another one.
    """
    known = header.get("trainer_state")
    if known and _digest_of(checkpoint / TRAINER_STATE) not in (known, None):
        raise StateError(
            f"{checkpoint / TRAINER_STATE} is not the one that {STATE_FILE} was saved with: another run has written to "
            "this checkpoint since, or the file was edited. Resume from another checkpoint, or start again."
        )


def rows_fingerprint(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] | None = None) -> str:
    """A name for the rows of a file, the same for every order of them: 16 hexadecimal digits and the row count.

    Fields that are None count as absent, and 1.0 as 1: a reader may fill the one in and make the other of it.

    Args:
        rows: As a file or a data set gives them, before they are tokens.
        columns: Those that count; None: all.

    Example:
        >>> a, b = {"prompt": "Hi", "completion": "Hello"}, {"prompt": "Bye", "completion": None}
        >>> rows_fingerprint([a, b]) == rows_fingerprint([{"prompt": "Bye"}, a])
        True
        >>> rows_fingerprint([a, b]) == rows_fingerprint([a, a])
        False
    """
    wanted = None if columns is None else set(columns)
    total = count = 0
    for row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"row {count} is a {type(row).__name__}; allowed: a dict with named fields")
        kept = row if wanted is None else {name: value for name, value in row.items() if name in wanted}
        text = json.dumps(_plain(kept), sort_keys=True, ensure_ascii=False, default=str)
        total += int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        count += 1
    return f"{total & ((1 << 64) - 1):016x}-{count}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _digest_of(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _written(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise StateError(
            f"{path} cannot be written ({error.strerror or error}), so nothing would show that this run is defended. "
            "Make room, or name another output folder."
        ) from error
