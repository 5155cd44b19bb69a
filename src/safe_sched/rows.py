"""Reading rows from files: every line becomes a row or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from safe_sched.errors import DataError

CORE = "core"
"""The name of the safety set that comes with the package."""

_READERS = {
    ".csv": pyarrow.csv.read_csv,
    ".parquet": pyarrow.parquet.read_table,
}


def core_rows() -> list[dict[str, Any]]:
    """The project's own small safety set: ``prompt``, ``completion`` and ``area`` of about 250 refusals.

    Example:
        >>> sorted(core_rows()[0])
        ['area', 'completion', 'prompt']
    """
    text = resources.files("safe_sched.data").joinpath("core.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as dictionaries, from a file, from the package's safety set, or from anything that yields mappings.

    Args:
        source: ``"core"``; a path to a .jsonl, .json (a list of objects), .csv or .parquet file; or an iterable of
            mappings, such as a list of dicts or a `datasets.Dataset`.

    Raises:
        DataError: The file is missing or of an unknown kind, a line is not an object, or there are no rows.

    Example:
        >>> read_rows([{"prompt": "Hi", "completion": "Hello"}])
        [{'prompt': 'Hi', 'completion': 'Hello'}]
    """
    if isinstance(source, str) and source == CORE:
        return core_rows()
    if isinstance(source, str | Path):
        rows = _read_file(Path(source))
    else:
        rows = []
        for number, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise DataError(f"row {number} is a {type(row).__name__}; allowed: a dict with named fields")
            rows.append(dict(row))
    if not rows:
        raise DataError(f"{source if isinstance(source, str | Path) else 'the given rows'}: no rows in it")
    return rows


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"no file {path}; give a path to a .jsonl, .json, .csv or .parquet file, or {CORE!r}")
    kind = path.suffix.lower()
    if kind in _READERS:
        try:
            return _READERS[kind](path).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"{path} is not a readable {kind} file: {error}") from error
    if kind == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} is not a list of objects; for one object per line name it .jsonl")
        return rows
    if kind != ".jsonl":
        raise DataError(f"{path}: unknown kind {kind!r}; allowed: .jsonl, .json, .csv, .parquet")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {type(row).__name__}; allowed: an object with named fields")
        rows.append(row)
    return rows
