"""Kinds of data files, told by the name, and the bytes of one, unpacked."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from safe_sched.errors import DataError

CHUNK = 1 << 20
"""Bytes read at once."""

MAX_ROW = 64 << 20
"""Bytes that one row of a text file may have: without a limit, a file without line ends would be read as a whole."""

STDIO = "-"
"""The name of standard input and output."""

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".ndjson": "jsonl",
}
"""What the ending of a name says of the file."""

PACKED = {".gz": "gzip", ".zst": "zstd"}
"""Endings behind it, and the codecs that they name."""


@dataclass(frozen=True)
class Form:
    """How a file is laid out.

    Attributes:
        kind: What kind it is of.
        codec: What it is compressed with, ``"gzip"`` or ``"zstd"``, or None.
    """

    kind: Kind
    codec: str | None = None


def form_of(path: Path, kind: Kind | None = None) -> Form:
    """How a file is laid out, by its name.

    Args:
        path: Its name; capitals do not matter.
        kind: To be taken in the place of what the ending says.

    Raises:
        DataError: The ending is none that is known.

    Example:
        >>> form_of(Path("rows.jsonl.gz"))
        Form(kind='jsonl', codec='gzip')
    """
    codec = PACKED.get(path.suffix.lower())
    ending = (path.with_suffix("") if codec else path).suffix.lower()
    if kind is None and ending not in KINDS:
        raise DataError(
            f"{path}: unknown kind {ending!r}; allowed: {', '.join(KINDS)}, each also with {' or '.join(PACKED)} behind"
        )
    return Form(kind or KINDS[ending], codec)


def is_data(path: Path) -> bool:
    """Whether the name of a file is that of a data file."""
    bare = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return bare.suffix.lower() in KINDS


@contextlib.contextmanager
def opened(name: str, codec: str | None) -> Iterator[Any]:
    """The bytes of a file, unpacked as they are read; ``"-"`` is standard input."""
    if name == STDIO:
        yield sys.stdin.buffer
    elif codec is None:
        with open(name, "rb") as file:
            yield file
    else:
        with pa.OSFile(name) as file, pa.CompressedInputStream(file, codec) as unpacked:
            yield unpacked


@contextlib.contextmanager
def seekable(name: str, codec: str | None) -> Iterator[Any]:
    """A file that is read here and there: a packed one is unpacked to a temporary file first."""
    if codec is None:
        with pa.OSFile(name) as file:
            yield file
    else:
        with opened(name, codec) as packed, tempfile.TemporaryFile() as file:
            shutil.copyfileobj(packed, file, CHUNK)
            file.seek(0)
            yield pa.PythonFile(file, mode="r")


def packing(stream: Any, codec: str) -> Any:
    """A stream that packs what is written to it."""
    if codec == "gzip":  # Arrow's packs harder than gzip does by default, and takes seven times as long
        return gzip.GzipFile("", "wb", 6, stream, mtime=0)
    return pa.CompressedOutputStream(stream, codec)
