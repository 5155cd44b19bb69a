"""A trainer's YAML, read as plain values."""

from __future__ import annotations

from collections.abc import Mapping
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
