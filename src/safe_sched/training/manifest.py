"""Reading back what a run has left in its output folder: was every row that was trained on defended?

`verify` asks several questions; a run was defended where none of them is answered with no. It guards against mistakes,
a plugin that was not loaded, a run that crashed, a second run in the same folder; it is no signature, and somebody who
means to deceive can write a manifest by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from safe_sched.data import open_rows
from safe_sched.errors import DataError, OptionError, StateError
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import keys_of_flat
from safe_sched.training.checkpoint import MANIFEST_FILE, STATE_FILE, header_of
from safe_sched.training.record import (
    CHECKPOINT,
    TABLE_FILE,
    TRAINER_STATE,
    VERSION,
    model_files,
    require_untouched,
    rows_fingerprint,
)

_MOST = 1 << 24  # bytes of a manifest


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class Coverage(_Part):
    """Optimiser steps, and rows of them: how many there were, and how many had a weight of their own."""

    steps: int
    rows_trained_on: int
    rows_weighed: int
    trainer_steps: int | None = None


class Table(_Part):
    """The final table: its digest, and whether it lies beside the manifest."""

    sha256: str
    kept: bool = True
    rows: int = 0


class Data(_Part):
    """The training rows, as the trainer held them."""

    fingerprint: str
    rows: int


class Source(_Part):
    """The rows before they were tokens, where a front end has seen them."""

    fingerprint: str | None = None
    columns: list[str] | None = None


class Manifest(_Part):
    """What `verify` reads of a manifest; the rest is for people."""

    version: int
    status: str
    run: str
    coverage: Coverage
    data: Data
    table: Table | None = None
    source: Source | None = None
    model_files: dict[str, str] | None = None


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: What was asked.
        ok: Yes, no, or None where there was nothing to ask.
        words: Why, in a line.
    """

    name: str
    ok: bool | None
    words: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.name, self.ok, self.words))


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        folder: The output folder.
        checks: In the order in which they were asked.
    """

    folder: Path
    checks: tuple[Check, ...]

    @property
    def defended(self) -> bool:
        """Whether nothing speaks against it."""
        return bool(self.checks) and all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "version": VERSION,
            "folder": str(self.folder),
            "defended": self.defended,
            "checks": [{"name": check.name, "ok": check.ok, "words": check.words} for check in self.checks],
        }


def verify(folder: str | Path, *, data: str | Path | Iterable[Mapping[str, Any]] | None = None) -> Verdict:
    """Whether the run that wrote to an output folder was defended on every row.

    Args:
        folder: The run's output folder.
        data: The training rows, to be compared with those of the run: a file with ``key`` (as ``safe-sched losses`` and
            the run's table have it) or with ``input_ids``, or, for a run of ``safe-sched trl``, the file itself.

    Raises:
        OptionError: The folder is no folder.
        DataError: The data cannot be read.

    Example:
        >>> import tempfile
        >>> found = verify(tempfile.mkdtemp())
        >>> found.defended, found.checks[0].words
        (False, 'there is no safe_sched_manifest.json: the run was not defended, or it wrote to another folder')
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OptionError(f"no folder {folder}; give the output folder of a run")
    rows = open_rows(data) if isinstance(data, str | Path) else data
    try:
        manifest = read_manifest(folder)
    except StateError as error:
        return Verdict(folder, (Check("manifest", False, str(error)),))
    found = [Check("manifest", True, f"version {manifest.version}, run {manifest.run[:8]}"), _finished(manifest)]
    if manifest.status != "finished":  # it says nothing more yet
        return Verdict(folder, tuple(found))
    checks = [
        *found,
        _coverage(manifest.coverage),
        _steps(folder, manifest.coverage),
        _checkpoints(folder, manifest),
        _table(folder, manifest.table),
        _model(folder, manifest.model_files),
    ]
    if rows is not None:
        checks.append(_data(rows, manifest))
    return Verdict(folder, tuple(checks))


def read_manifest(folder: Path) -> Manifest:
    """The manifest in an output folder.

    Raises:
        StateError: It is missing, damaged, or of a version that this one cannot read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        above = folder.name.startswith(CHECKPOINT) and (folder.resolve().parent / MANIFEST_FILE).is_file()
        more = (
            "it lies in the folder above, verify that"
            if above
            else ("the run was not defended, or it wrote to another folder")
        )
        raise StateError(f"there is no {MANIFEST_FILE}: {more}")
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST + 1)
        found = json.loads(text) if len(text) <= _MOST else None
        if isinstance(found, dict) and found.get("version") != VERSION:
            raise StateError(f"{MANIFEST_FILE} has version {found.get('version')!r}; this safe-sched reads {VERSION}")
        return Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StateError(f"{MANIFEST_FILE} is damaged: {where or 'content'}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{MANIFEST_FILE} is damaged: {error}") from None


# the questions --------------------------------------------------------------------------------------------------


def _finished(manifest: Manifest) -> Check:
    if manifest.status == "finished":
        return Check("finished", True, "training ran to its end")
    return Check("finished", False, f"training did not end (status {manifest.status!r}): it crashed, or still runs")


def _coverage(coverage: Coverage) -> Check:
    weighed, trained, steps = coverage.rows_weighed, coverage.rows_trained_on, coverage.steps
    words = f"{weighed:,} of {trained:,} rows trained on had a weight of their own, in {steps:,} steps"
    return Check("every row", weighed == trained and trained > 0 and steps > 0, words)


def _steps(folder: Path, coverage: Coverage) -> Check:
    """The trainer's own count of steps against ours."""
    counts = {"the trainer": coverage.trainer_steps}
    if (path := folder / TRAINER_STATE).is_file():
        counts[TRAINER_STATE] = _global_step(path)
    for who, count in counts.items():
        if count != coverage.steps:
            return Check(
                "every step",
                False,
                f"{who} counts {'no' if count is None else f'{count:,}'} steps, the manifest {coverage.steps:,}: steps "
                "were taken without the defence, or another run has written to this folder",
            )
    return Check("every step", True, f"{coverage.steps:,} steps, counted by {' and '.join(counts)} too")


def _global_step(path: Path) -> int | None:
    try:
        found = json.loads(path.read_bytes()).get("global_step")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, int) else None


def _checkpoints(folder: Path, manifest: Manifest) -> Check:
    found = sorted(p for p in folder.iterdir() if p.is_dir() and re.fullmatch(CHECKPOINT + "[0-9]{1,18}", p.name))
    for checkpoint in found:
        if reason := _foreign(checkpoint, manifest):
            return Check("checkpoints", False, f"{checkpoint.name}: {reason}")
    if not found:
        return Check("checkpoints", None, "there are none")
    return Check("checkpoints", True, f"{len(found)}, all of this run")


def _foreign(checkpoint: Path, manifest: Manifest) -> str | None:
    """Why a checkpoint is not one of this run; None where it is."""
    if not (checkpoint / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}, so it was not saved by a defended run"
    try:
        header = header_of(checkpoint / STATE_FILE)
        require_untouched(checkpoint, header)
    except StateError as error:
        return str(error)
    if header.get("run") != manifest.run:
        return "it was saved by another run; move it away, or verify a folder of its own"
    step = int(checkpoint.name.removeprefix(CHECKPOINT))
    if header.get("steps") != step or step > manifest.coverage.steps:
        return f"its state is that of step {header.get('steps')!r}, and the run had {manifest.coverage.steps:,}"
    if not (checkpoint / TRAINER_STATE).is_file() or _global_step(checkpoint / TRAINER_STATE) != step:
        return f"its {TRAINER_STATE} is missing or of another step"
    return None


def _table(folder: Path, table: Table | None) -> Check:
    if table is None:
        return Check("table", False, "the manifest has no digest of the final table")
    if not table.kept:
        return Check("table", None, "was not kept")
    try:
        with open(folder / TABLE_FILE, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Check("table", False, f"{TABLE_FILE} cannot be read ({error.strerror or error})")
    if digest != table.sha256:
        return Check("table", False, f"{TABLE_FILE} is not the one that the run has written")
    return Check("table", True, f"{TABLE_FILE}: {table.rows:,} rows, as the run has written them")


def _model(folder: Path, sealed: dict[str, str] | None) -> Check:
    if sealed is None:
        return Check("model files", None, "the run did not write down what was saved after it")
    found = model_files(folder)
    for name in sorted(found.keys() | sealed.keys()):
        if found.get(name) != sealed.get(name):
            what = "is gone" if name not in found else "was added" if name not in sealed else "was written over"
            return Check("model files", False, f"{name} {what} since the run has saved its model")
    return Check("model files", True, f"{len(found)}, as the run has saved them")


def _data(rows: Iterable[Mapping[str, Any]], manifest: Manifest) -> Check:
    """The rows that are given against those that were trained on."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise DataError("the data to compare with has no rows")

    def together() -> Iterator[Mapping[str, Any]]:
        yield first
        yield from rows

    if "key" in first or "input_ids" in first:
        keys = [_key(row) for row in together()]
        expected, found = manifest.data.fingerprint, RowIndex(torch.tensor(keys)).fingerprint()
    elif manifest.source is None or manifest.source.fingerprint is None:
        return Check(
            "data",
            False,
            "cannot be compared: this run did not see the rows as they are in a file. Measure their keys, "
            "safe-sched losses MODEL FILE --out keys.parquet, and give that file",
        )
    else:
        expected, found = manifest.source.fingerprint, rows_fingerprint(together(), manifest.source.columns)
    if expected == found:
        return Check("data", True, f"the same rows, {found}")
    return Check("data", False, f"other rows: these are {found}, the run trained on {expected}")


def _key(row: Mapping[str, Any]) -> int:
    """The key of a row, as a signed number."""
    try:
        if "key" in row:
            key = int(row["key"]) % (1 << 64)
            return key - (1 << 64) if key >= 1 << 63 else key
        ids = torch.tensor(row["input_ids"], dtype=torch.long)
        labels = torch.tensor(row["labels"], dtype=torch.long) if row.get("labels") is not None else None
        return int(keys_of_flat(ids, labels, torch.tensor([len(ids)]))[0][0])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"a row to compare with has no key and no tokens ({error})") from error
