"""Reading rows from files: every line becomes a row or an error that names it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from safe_sched.errors import DataError

CORE = "core"
"""The name of the safety set that comes with the package."""


def core_rows() -> list[dict[str, Any]]:
    """The project's own small safety set: ``prompt``, ``completion`` and ``area`` of about 250 refusals.

    Example:
        >>> sorted(core_rows()[0])
        ['area', 'completion', 'prompt']
    """
    text = resources.files("safe_sched.data").joinpath("core.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def core_refusals() -> list[str]:
    """About a hundred refusals of one line each, which say nothing of what they refuse.

    Example:
        >>> core_refusals()[0]
        "I can't help with that."
    """
    return resources.files("safe_sched.data").joinpath("refusals.txt").read_text(encoding="utf-8").splitlines()


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
    if kind == ".parquet":
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable .parquet file: {error}") from error
    if kind not in (".jsonl", ".json", ".csv"):
        raise DataError(f"{path}: unknown kind {kind!r}; allowed: .jsonl, .json, .csv, .parquet")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error
    if kind == ".csv":
        return _read_csv(path, text)
    if kind == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} is not a list of objects; for one object per line name it .jsonl")
        return rows
    rows = []
    # not splitlines(): U+2028 and its like may stand in a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
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


def _read_csv(path: Path, text: str) -> list[dict[str, Any]]:
    # every cell stays text: a reader that guesses types makes 7 of the answer "007"
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        names = next(reader, [])
        for cells in reader:
            if cells and len(cells) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells; the first line names {len(names)} columns"
                )
            if cells:
                rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    return rows
