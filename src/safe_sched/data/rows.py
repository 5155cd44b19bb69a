"""Reading rows from files: every line becomes a row or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safe_sched.data import open_rows
from safe_sched.data.reading import HUB
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
        source: ``"core"``; a path to a .jsonl, .json (a list of objects), .csv, .parquet or other file that
            `safe_sched.data.open_rows` knows, or ``"hf://owner/name"``; or an iterable of mappings, such as a list of
            dicts or a `datasets.Dataset`.

    Raises:
        DataError: The file is missing or of an unknown kind, a line is not an object, or there are no rows.

    Example:
        >>> read_rows([{"prompt": "Hi", "completion": "Hello"}])
        [{'prompt': 'Hi', 'completion': 'Hello'}]
    """
    if isinstance(source, str) and source == CORE:
        return core_rows()
    if isinstance(source, str | Path):
        rows = _read_file(source)
    else:
        rows = []
        for number, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise DataError(f"row {number} is a {type(row).__name__}; allowed: a dict with named fields")
            rows.append(dict(row))
    if not rows:
        raise DataError(f"{source if isinstance(source, str | Path) else 'the given rows'}: no rows in it")
    return rows


def _read_file(source: str | Path) -> list[dict[str, Any]]:
    if not str(source).startswith(HUB) and not Path(source).is_file():
        raise DataError(f"no file {source}; give a path to a .jsonl, .json, .csv or .parquet file, or {CORE!r}")
    return list(open_rows(source))
