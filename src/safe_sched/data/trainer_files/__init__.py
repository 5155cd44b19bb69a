"""The data sets that a trainer's own configuration file names, and how the values of such a file are read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safe_sched.errors import DataError, OptionError

MAX_BYTES = 4 << 20
"""Of a YAML: those that people write for a trainer have a few thousand."""

MAX_KEYS = 10_000
"""Of one mapping: merge keys (``<<``) of merge keys make a few lines into any number of them."""


def read_yaml(path: Path) -> Mapping[Any, Any]:
    """What a YAML says; no objects are made of it, whatever it asks for.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be read, or is no mapping.
        OptionError: PyYAML is not installed.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.yml"
        >>> _ = path.write_text("datasets: [{path: a.jsonl, type: alpaca}]")
        >>> read_yaml(path)
        {'datasets': [{'path': 'a.jsonl', 'type': 'alpaca'}]}
    """
    try:
        import yaml
    except ImportError as error:
        raise OptionError(f"{path}: reading a YAML takes PyYAML: pip install 'safe-sched[audit]'") from error

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            if len(node.value) > MAX_KEYS:
                raise ValueError(f"a mapping of more than {MAX_KEYS:,} keys")

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES >> 20} MiB; give the YAML that training is run with")
    try:
        config = yaml.load(data, Loader)
    except RecursionError:
        raise DataError(f"{path} is nested too deep") from None
    except Exception as error:  # what PyYAML raises over odd dates and numbers has no common class
        raise DataError(f"{path} is no readable YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, Mapping):
        raise DataError(f"{path} is a {type(config).__name__}; needed: the YAML that training is run with, a mapping")
    return config


def text(entry: Mapping[Any, Any], key: str, name: str) -> str | None:
    """A text of an entry; None where it is absent or empty.

    Args:
        entry: A mapping of the file.
        key: Its key.
        name: What the entry is called in messages.

    Raises:
        DataError: The value is not a text.
    """
    value = entry.get(key)
    if value is None or isinstance(value, str):
        return value or None
    raise DataError(f"{name}: {key} is a {type(value).__name__}; needed: a text")


def texts(entry: Mapping[Any, Any], key: Any, name: str) -> list[str]:
    """The texts of a list, or the one text; none where the key is absent. See `text`."""
    value = entry.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in values):
        raise DataError(f"{name}: {str(key)[:60]} is no text, nor a list of texts")
    return values


def mapping(entry: Mapping[Any, Any], key: str, name: str) -> Mapping[Any, Any]:
    """A mapping; an empty one where the key is absent or has an empty value. See `text`."""
    value = entry.get(key) or {}
    if isinstance(value, Mapping):
        return value
    raise DataError(f"{name}: {key} is a {type(value).__name__}; needed: a mapping")


def require_known(entry: Mapping[Any, Any], known: Iterable[str], name: str) -> None:
    """Refuse a key that looks like a known one: it would do nothing. Other keys are about training.

    Raises:
        DataError: Naming the key and the known one.
    """
    names = sorted(known)
    for key in entry:
        if str(key) not in names and (near := difflib.get_close_matches(str(key)[:60], names, n=1, cutoff=0.9)):
            raise DataError(f"{name}: unknown key {str(key)[:60]!r}; did you mean {near[0]!r}?")
