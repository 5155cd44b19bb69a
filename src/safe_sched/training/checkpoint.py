"""Saving what a scheduler has learned: one safetensors file, with a JSON header that binds it to its run.

Nothing is pickled, so a state file from anywhere can be opened safely. The header names the format's version, the
scheduler with its options, and the fingerprint of the training set; a state is only loaded where all agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safe_sched.data.writing import replacing
from safe_sched.errors import StateError

FORMAT = 1
STATE_FILE = "safe_sched.safetensors"
MANIFEST_FILE = "safe_sched_manifest.json"


def save_state(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a header; the file appears whole or not at all.

    Args:
        path: Where to.
        tensors: On the CPU.
        header: Plain JSON values.
    """
    metadata = {"safe_sched": json.dumps({"format": FORMAT, **header}, sort_keys=True)}
    with replacing(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        StateError: The file is missing, damaged, not a state of ours, or of a format that this version cannot read.
    """
    if not path.is_file():
        raise StateError(
            f"no scheduler state at {path}: the run there was not defended, or it stopped before its state was "
            "written. Resume from a checkpoint that has one, or start again without resuming."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata["safe_sched"])
        if not isinstance(header, dict):
            raise KeyError("safe_sched")
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise StateError(
            f"{path} is damaged or not a scheduler state ({error}). Resume from another checkpoint."
        ) from error
    if header.get("format") != FORMAT:
        raise StateError(
            f"{path} has format {header.get('format')!r}; this version reads {FORMAT}. Resume with the version of "
            f"safe-sched that wrote it ({header.get('version', 'unknown')})."
        )
    return tensors, header


def header_of(path: Path) -> dict[str, Any]:
    """The header alone of what `save_state` wrote.

    Raises:
        StateError: The file is missing, damaged or not a state of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["safe_sched"])
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        raise StateError(f"{path} is missing, damaged or not a scheduler state ({error})") from error
    if not isinstance(header, dict):
        raise StateError(f"{path} is not a scheduler state: its header is a {type(header).__name__}")
    return header


def require_same(path: Path, header: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a state that was saved under other circumstances.

    Args:
        path: For the message.
        header: What the file says.
        expected: What this run says; each of its entries must be equal.

    Raises:
        StateError: Naming every entry that differs, with both values.
    """
    wanted = json.loads(json.dumps(expected))
    differences = [
        f"{name}: saved {header.get(name)!r}, now {value!r}"
        for name, value in wanted.items()
        if header.get(name) != value
    ]
    if differences:
        raise StateError(
            f"{path} belongs to another run. " + "; ".join(differences) + ". Resume with the same data set, tokenizer "
            "and options, or start again without resuming."
        )
