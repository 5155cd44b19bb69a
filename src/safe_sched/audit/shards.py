"""Scores on disk, shard by shard: what is there is whole, and belongs to this input and these detectors.

A folder holds::

    audit.json              what the shards belong to: detectors with their settings, versions, and the input's digests
    shards/00000.parquet    the scores of a shard
    shards/00000.json       its completion marker, written after it: its size and digest

Every file is written under another name, flushed to the disk, and renamed. So a kill at any point leaves shards that
are whole, or that count as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from safe_sched.data.writing import write_file
from safe_sched.errors import OptionError, StateError

MANIFEST = "audit.json"
_VERSION = 1


def digest(data: bytes) -> str:
    """Of some bytes, as text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Shards:
    """The scores of an audit in a folder.

    Args:
        folder: Made where it is not there.
        resume: Whether to go on with the shards that the folder holds.

    Raises:
        OptionError: The folder holds an audit, and is not to be resumed; or other files in ``shards``; or cannot be
            written.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.folder, self._shards = folder, folder / "shards"
        if (folder / MANIFEST).exists() and not resume:
            raise OptionError(f"{folder} holds an audit already; go on with it (--resume), or name another folder")
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
            strange = None if (folder / MANIFEST).exists() else next(self._shards.iterdir(), None)
        except OSError as error:
            raise OptionError(f"{folder} cannot be written: {error.strerror or error}") from error
        if strange is not None:  # what they belong to is written before the first of them, so these are not ours
            raise OptionError(f"{strange} belongs to no audit, for {folder} holds no {MANIFEST}; name another folder")
        self._digests: list[str] = []

    def begin(self, settings: Mapping[str, Any], digests: Sequence[str]) -> None:
        """Say what the shards belong to.

        Args:
            settings: Whatever else the scores depend on, as plain JSON values.
            digests: Of the rows of every shard.

        Raises:
            StateError: The folder belongs to another input, or to other settings; the first difference is named.
        """
        self._digests = list(digests)
        asked = json.loads(json.dumps({"version": _VERSION, "settings": settings, "digests": self._digests}))
        path = self.folder / MANIFEST
        if path.exists():
            self._require_same(path, asked)
        else:
            write_file(path, json.dumps(asked, indent=1).encode())

    def _require_same(self, path: Path, asked: Mapping[str, Any]) -> None:
        try:
            there = json.loads(path.read_bytes())
            settings, digests = dict(there["settings"]), list(there["digests"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateError(f"{path} is damaged ({error}); remove the folder and audit anew") from error
        for name in sorted({*settings, *asked["settings"]}):
            if (old := settings.get(name)) != (new := asked["settings"].get(name)):
                raise StateError(
                    f"{self.folder} was made with {name}={_short(old)}, now it is {_short(new)}; resume with the same "
                    "options and versions, or name another folder"
                )
        if digests != asked["digests"] or there.get("version") != _VERSION:
            raise StateError(
                f"{self.folder} was made from other rows: {_first_difference(digests, asked['digests'])}. Resume with "
                "the same input, or name another folder"
            )

    def done(self, number: int) -> bool:
        """Whether a shard is there as it was written."""
        return self._whole(number) is not None

    def _whole(self, number: int) -> bytes | None:
        """A shard as it was written, or None."""
        marker, part = self._paths(number)
        try:
            told = json.loads(marker.read_bytes())
            data = part.read_bytes()
        except (OSError, ValueError, RecursionError):
            return None
        return data if told == self._marker(number, data) else None

    def put(self, number: int, table: pa.Table) -> None:
        """Keep the scores of a shard."""
        marker, part = self._paths(number)
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        write_file(part, data)
        write_file(marker, json.dumps(self._marker(number, data)).encode())

    def tables(self) -> Iterator[pa.Table]:
        """The scores of all shards, in the order of the rows.

        Raises:
            StateError: One is not there.
        """
        for number in range(len(self._digests)):
            if (data := self._whole(number)) is None:
                raise StateError(f"{self._paths(number)[1]} is missing or damaged; resume the audit to make it anew")
            yield pyarrow.parquet.read_table(pa.BufferReader(data), use_threads=False)

    def keep(self, findings: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
        """The findings on all shards as one table that stays on disk: memory holds of it what is looked at.

        Args:
            findings: One table per shard, taken one after the other.
            schema: Of these tables.

        Raises:
            OptionError: The folder cannot be written.
        """
        path = self._shards / ".findings.part"
        try:
            path.unlink(missing_ok=True)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
                for table in findings:
                    out.write_table(table)
            found = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except OSError as error:
            raise OptionError(f"{path} cannot be written: {error.strerror or error}") from error
        with contextlib.suppress(OSError):  # without a name nobody can change it, and it goes with the table
            path.unlink()
        return found

    def _marker(self, number: int, data: bytes) -> dict[str, Any]:
        return {"rows": self._digests[number], "bytes": len(data), "scores": digest(data)}

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self._shards / f"{number:05d}.json", self._shards / f"{number:05d}.parquet"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _first_difference(old: Sequence[str], new: Sequence[str]) -> str:
    for number, (one, other) in enumerate(zip(old, new, strict=False)):
        if one != other:
            return f"shard {number} differs"
    return f"{len(old)} shards, now {len(new)}"
