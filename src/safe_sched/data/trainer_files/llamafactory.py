"""The data sets of LlamaFactory's ``dataset_info.json``.

The file lists what *may* be trained on, the training names some of it. So a hub data set, whose rows have to be
fetched, is only audited where it is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_sched.data.kinds import MAX_ROW
from safe_sched.data.reading import HUB
from safe_sched.data.schemas.renamed import PromptHistory, RenamedColumns, RenamedTurns, RowFormat
from safe_sched.data.sources import DataSource, data_sources, there
from safe_sched.data.strict_json import StrictDecoder, Unreadable
from safe_sched.data.trainer_files import mapping, text
from safe_sched.errors import DataError, unknown_name

NAME = "dataset_info.json"
"""What the file is called."""

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ROLES = {  # a call of a function is what the model learns to say
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "assistant",
    "system_tag": "system",
}
_ELSEWHERE = {
    "ms_hub_url": "is on another hub",
    "om_hub_url": "is on another hub",
    "script_url": "is made by a script, which is not run",
    "cloud_file_name": "is in a cloud storage",
}


def read_info(path: Path) -> Mapping[str, Any]:
    """What a ``dataset_info.json`` says.

    Raises:
        DataError: It cannot be read, or is no object.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_ROW + 1)
        if len(data) > MAX_ROW:
            raise Unreadable(f"longer than {MAX_ROW >> 20} MiB")
        info = StrictDecoder().line(data.decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is no list of data sets: {error}") from error
    if not isinstance(info, Mapping):
        raise DataError(f"{path} is a {type(info).__name__}; needed: an object with a description per data set")
    return info


def info_sources(path: Path, names: Sequence[str] | None = None) -> list[DataSource]:
    """The data sets that a ``dataset_info.json`` describes.

    Args:
        path: The file; names of files are relative to its folder.
        names: Those that are wanted, or None for all, which must then be files.

    Raises:
        DataError: One is described in a way that is not known, is no file and was not named, or is not there.
        OptionError: There is none of that name.
    """
    info = read_info(path)
    found: list[DataSource] = []
    for name in dict.fromkeys(info if names is None else names):
        if name not in info:
            raise unknown_name(f"data set of {path}", name[:80], [one[:80] for one in info][:100])
        entry, shown = info[name], f"{path}, {name[:80]}"
        if not isinstance(entry, Mapping):
            raise DataError(f"{shown} is a {type(entry).__name__}; needed: an object that describes a data set")
        if names is None and "hf_hub_url" in entry:
            raise DataError(
                f"{shown} is on the Hugging Face hub. Name the data sets that are trained on, so that nothing else is "
                f"fetched: {path}:{name[:80]}"
            )
        found += _entry(entry, path.parent, shown)
    if not found:
        raise DataError(f"{path}: it names no data sets")
    return found


def _entry(entry: Mapping[str, Any], folder: Path, shown: str) -> list[DataSource]:
    layout = _layout(entry, shown)
    split = text(entry, "split", shown)
    if (hub := text(entry, "hf_hub_url", shown)) is not None:
        for key in ("folder", "revision"):
            if entry.get(key):
                raise DataError(f"{shown}: {key} picks files of a hub data set; get them, and give their folder")
        subset = text(entry, "subset", shown)
        target = f"{HUB}{hub}" + (f"/{subset}" if subset else "") + (f":{split}" if split else "")
        return data_sources(shown, target, layout, folders=())
    for key, why in _ELSEWHERE.items():
        if key in entry:
            raise DataError(f"{shown} {why}; get its files, and give their folder")
    if (file := text(entry, "file_name", shown)) is None:
        raise DataError(f"{shown} has neither file_name nor hf_hub_url; one of them says where the rows are")
    if not there(folder / file):  # never a hub data set of that name
        raise DataError(f"{shown}: no file or folder {folder / file[:200]}")
    return data_sources(shown, str(file), layout, folders=(folder,), split=split)


def _layout(entry: Mapping[str, Any], shown: str) -> RowFormat:
    columns, tags = mapping(entry, "columns", shown), mapping(entry, "tags", shown)
    if entry.get("ranking") or columns.get("kto_tag"):
        raise DataError(f"{shown}: preference data is not audited, only the rows of supervised fine-tuning")
    form = text(entry, "formatting", shown) or "alpaca"
    told = {name: text(columns, name, shown) for name in (*_ALPACA, "history", "messages", "system")}
    if form == "alpaca":
        return _alpaca(told if columns else {**told, **_ALPACA}, shown)
    if form not in ("sharegpt", "openai"):
        raise unknown_name(f"formatting in {shown}", form[:60], ("alpaca", "sharegpt", "openai"))
    named = {tag: text(tags, tag, shown) or usual for tag, usual in _TAGS.items()}
    if columns and told["messages"] is None:
        raise DataError(f"{shown}: columns has no messages, which names the list of turns")
    return RenamedTurns(
        told["messages"] or "conversations",
        (named["role_tag"],),
        (named["content_tag"],),
        {named[tag]: role for tag, role in _ROLES.items()},
        told["system"],
    )


def _alpaca(told: Mapping[str, str | None], shown: str) -> RowFormat:
    prompt, query, response = told["prompt"], told["query"], told["response"]
    if prompt is None:
        raise DataError(f"{shown}: columns has no prompt, which names the column of the questions")
    if response is None:
        if query or told["history"]:
            raise DataError(f"{shown}: columns has no response, which names the column of the answers")
        return RenamedColumns("text", {"text": prompt})
    if told["history"]:
        return PromptHistory(prompt, query, response, told["history"], told["system"])
    names = {"system": told["system"], "instruction": prompt, "input": query, "output": response}
    return RenamedColumns("alpaca", {name: own for name, own in names.items() if own})
