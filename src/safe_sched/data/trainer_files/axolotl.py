"""The data sets that an Axolotl YAML trains on.

The keys are those that Axolotl 0.19 reads, and the deprecated ones that it still understood not long ago. A type that
is not known here is an error: the audit must see the texts that training sees. Axolotl itself is not imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_sched.data import Kind
from safe_sched.data.schemas.renamed import RenamedColumns, RenamedTurns, RowFormat, Segments, Untokenised
from safe_sched.data.schemas.texts import ROLES
from safe_sched.data.sources import DataSource, data_sources, matching
from safe_sched.data.trainer_files import mapping, require_known, text, texts
from safe_sched.errors import DataError

_ALPACA = {"instruction": "instruction", "input": "input", "output": "output"}
_ORCA = {"instruction": "question", "output": "response", "system": "system_prompt"}


def _alpaca(names: Mapping[str, str]) -> RowFormat:
    return RenamedColumns("alpaca", names)


TYPES: Mapping[str, RowFormat] = {
    **dict.fromkeys(
        (
            "alpaca",
            "alpaca_chat",
            "alpaca_chat.load_concise",
            "alpaca_chat.load_no_prompt",
            "alpaca_instruct",
            "alpaca_instruct.load_no_prompt",
        ),
        _alpaca(_ALPACA),
    ),
    **dict.fromkeys(
        ("alpaca_w_system", "alpaca_w_system.load_instruct", "alpaca_w_system.load_chat"),
        _alpaca({"system": "system", **_ALPACA}),
    ),
    **dict.fromkeys(("alpaca_w_system.load_open_orca", "alpaca_w_system.load_open_orca_chatml"), _alpaca(_ORCA)),
    "alpaca_chat.load_qa": _alpaca({"instruction": "question", "output": "answer"}),
    "alpaca_chat.load_camel_ai": _alpaca({"instruction": "message_1", "output": "message_2"}),
    "gpteacher": _alpaca({"instruction": "instruction", "input": "input", "output": "response"}),
    "oasst": _alpaca({"instruction": "INSTRUCTION", "output": "RESPONSE"}),
    "jeopardy": _alpaca({"instruction": "question", "input": "category", "output": "answer"}),
    "summarizetldr": _alpaca({"instruction": "article", "output": "summary"}),
    "metharme": _alpaca({"instruction": "prompt", "output": "generation"}),
    "context_qa": _alpaca({"instruction": "article", "input": "question", "output": "answer"}),
    "context_qa.load_v2": _alpaca({"instruction": "context", "input": "question", "output": "answer"}),
    "input_output": Segments(),
    "pygmalion": RenamedTurns("conversations", ("role",), ("value",)),
}
"""Types whose columns have fixed names. ``chat_template``, ``sharegpt``, ``completion`` and types that are a mapping
say the names of theirs."""

_LOADERS: Mapping[str, Kind] = {"json": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}
_READ = {
    *("path", "name", "split", "type", "ds_type", "data_files", "field", "field_messages", "field_system"),
    *("field_human", "field_model", "message_property_mappings", "message_field_role", "message_field_content"),
    *("roles", "drop_system_message", "revision", "shards", "shards_idx", "input_transform", "text_column"),
}
_OWN = {"system_prompt", "field_system", "field_instruction", "field_input", "field_output"}


def axolotl_sources(path: Path, config: Mapping[Any, Any], *, test: bool = False) -> list[DataSource]:
    """The data sets that a YAML of Axolotl names.

    Args:
        path: The YAML, from whose folder relative names are tried where the working folder has no such file.
        config: What it says.
        test: Whether ``test_datasets`` are wanted too.

    Raises:
        DataError: A data set is described in a way that is not known, or is not there.

    Example:
        >>> axolotl_sources(Path("train.yml"), {"datasets": [{"path": "a.jsonl", "type": "alpacca"}]})
        Traceback (most recent call last):
        ...
        safe_sched.errors.DataError: train.yml, datasets.0: unknown type 'alpacca' (did you mean 'alpaca'?); ...
    """
    if config.get("rl"):
        raise DataError(f"{path}: rl: preference data is not audited, only the rows of supervised fine-tuning")
    found: list[DataSource] = []
    for key in ("datasets", "pretraining_dataset", *(("test_datasets",) if test else ())):
        listed = config.get(key)
        if listed is None:
            continue
        if key == "pretraining_dataset" and isinstance(listed, str | Mapping):
            listed = [listed]
        if not isinstance(listed, list):
            raise DataError(f"{path}: {key} is a {type(listed).__name__}; needed: a list of data sets")
        for number, entry in enumerate(listed):
            name = f"{path}, {key}.{number}"
            if key == "pretraining_dataset" and isinstance(entry, str):
                entry = {"path": entry}
            if not isinstance(entry, Mapping):
                raise DataError(f"{name} is a {type(entry).__name__}; needed: a mapping with path and type")
            if key == "pretraining_dataset":
                column = text(entry, "text_column", name) or "text"
                rows: RowFormat | None = RenamedColumns("text", {"text": column})
            else:
                rows = row_format(entry, name)
            found += _files(entry, rows and Untokenised(rows), path.parent, name)
    if not found:
        raise DataError(f"{path}: it names no data sets; needed: datasets, a list of mappings with path and type")
    return found


def _files(entry: Mapping[Any, Any], rows: RowFormat | None, folder: Path, name: str) -> list[DataSource]:
    require_known(entry, _READ, name)
    for key in ("revision", "shards", "shards_idx", "input_transform", "skip"):
        if entry.get(key):
            raise DataError(f"{name}: {key} picks or changes rows in a way that is not followed; audit those rows")
    split = text(entry, "split", name)
    if split is not None and not split.replace("_", "").replace("-", "").isalnum():
        raise DataError(f"{name}: the split {split[:60]!r} takes a part of the rows; audit a file with that part")
    told = text(entry, "ds_type", name)
    if told is not None and told not in _LOADERS:
        raise DataError(f"{name}: unknown ds_type {told[:60]!r}; allowed: {', '.join(map(repr, _LOADERS))}")
    target = text(entry, "path", name)
    if target is None:
        raise DataError(f"{name}: it has no path; needed: a file, a folder, or owner/name on the hub")
    folders = (Path(), folder)
    files = texts(entry, "data_files", name)
    kind = None if told is None else _LOADERS[told]
    if files:
        if target not in _LOADERS and not any(os.path.isdir(one / target) for one in folders):
            raise DataError(f"{name}: data_files of the hub are not fetched; get them, and give their names as path")
        kind = kind or _LOADERS.get(target)
        inside = tuple(one / target for one in folders if os.path.isdir(one / target))
        targets = [one for pattern in files for one in matching(name, pattern, (*folders, *inside))]
    else:
        targets = [target]
    return [
        source
        for one in targets
        for config in texts(entry, "name", name) or [None]
        for source in data_sources(name, one, rows, folders=folders, config=config, split=split, kind=kind)
    ]


def row_format(entry: Mapping[Any, Any], name: str) -> RowFormat | None:
    """How the rows of a data set are laid out, by its ``type``.

    Args:
        entry: The data set, as the YAML describes it.
        name: What it is called in messages.

    Returns:
        None without a type: rows of tokens, or of a schema of their own.

    Raises:
        DataError: The type is unknown, or a key has a value of another type.
    """
    kind = entry.get("type")
    if kind is None:
        return None
    if isinstance(kind, Mapping):
        return _own(kind, name)
    if not isinstance(kind, str):
        raise DataError(f"{name}: type is a {type(kind).__name__}; needed: a text or a mapping")
    base = kind.partition(":")[0]  # behind it stands a style of prompts
    if base in ("chat_template", "sharegpt") or base.startswith("sharegpt."):
        return _turns(entry, name, base)
    if base == "completion":
        return RenamedColumns("text", {"text": text(entry, "field", name) or "text"})
    if base not in TYPES:
        allowed = ["chat_template", "sharegpt", "completion", *TYPES]
        near = difflib.get_close_matches(base, allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"{name}: unknown type {base[:60]!r}{hint}; allowed: {', '.join(map(repr, allowed))}, or a mapping with "
            "field_instruction and field_output"
        )
    return TYPES[base]


def _own(kind: Mapping[Any, Any], name: str) -> RowFormat:
    require_known(kind, _OWN, f"{name}, type")
    names = {
        column: text(kind, f"field_{column}", name) or column for column in ("system", "instruction", "input", "output")
    }
    constant = text(kind, "system_prompt", name)
    return RenamedColumns("alpaca", names, {"output": ""} | ({"system": constant} if constant else {}))


def _turns(entry: Mapping[Any, Any], name: str, base: str) -> RowFormat:
    old = base != "chat_template"
    told = mapping(entry, "message_property_mappings", name)

    def called(what: str, otherwise: tuple[str, ...]) -> tuple[str, ...]:
        found = {text(told, what, name), text(entry, f"message_field_{what}", name)} - {None}
        if len(found) > 1:
            raise DataError(f"{name}: message_field_{what} and message_property_mappings differ; leave one out")
        return (*(one for one in found if one is not None),) or otherwise

    return RenamedTurns(
        text(entry, "field_messages", name) or ("conversations" if old else "messages"),
        called("role", ("from", "role") if old else ("role",)),
        called("content", ("value", "content") if old else ("content",)),
        _roles(entry, name),
        text(entry, "field_system", name) or "system",
        bool(entry.get("drop_system_message")),
    )


def _roles(entry: Mapping[Any, Any], name: str) -> dict[str, str]:
    """What the rows call the roles; a list in the YAML replaces the usual names."""
    if told := mapping(entry, "roles", name):
        roles = {own: str(role) for role in told for own in texts(told, role, name)}
    else:
        roles = {**{role: role for role in ROLES.values()}, **ROLES}  # written under their own names
    for key, role in (("field_human", "user"), ("field_model", "assistant")):
        if (own := text(entry, key, name)) is not None:
            roles[own] = role
    return roles
