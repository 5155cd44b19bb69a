"""Files that appear whole or not at all, and rows written to files of every kind."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from safe_sched.data.columns import ColumnsSink
from safe_sched.data.kinds import STDIO, Form, Kind, form_of, packing
from safe_sched.data.reading import RowFile
from safe_sched.errors import DataError, OptionError

# whole files --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Any]:
    """A binary file that takes the name ``path`` when the block ends without an error.

    It is written under a temporary name in the same folder, flushed to the disk and renamed, so ``path`` holds the old
    content or all of the new one, even after a power failure.

    Args:
        path: The final name; of a link, the file that it points to is replaced.

    Raises:
        OSError: The file cannot be written; ``path`` is unchanged.
    """
    final = Path(os.path.realpath(path))
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    file = open(part, "xb")  # noqa: SIM115 (closing may fail, and must not hide why the block failed)
    try:
        yield file
        file.close()
        _flush_to_disk(part, os.O_RDWR)  # by name, for a codec may have closed the file
        os.replace(part, final)
    finally:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can flush a folder
        _flush_to_disk(final.parent, os.O_RDONLY)


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file as `replacing` does.

    Raises:
        OptionError: ``path`` is not a regular file, or cannot be written; it is unchanged.
    """
    _require_regular(path)
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror or error}") from error


def _require_regular(path: str | Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise OptionError(f"{path} is no regular file, so it cannot be replaced by one; give another name")


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# rows ---------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> bytes:
    """JSON in one line, in UTF-8.

    Raises:
        ValueError: The value has no JSON form: NaN, a date, a key that is not a string.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except TypeError as error:
        raise ValueError(str(error)) from error
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
        return json.dumps(value, allow_nan=False, default=_plain).encode()


def _plain(value: Any) -> Any:
    """Values of Arrow and numpy as plain ones."""
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no place in JSON; make a text or a number of it")


class _Sink:
    """Writes rows of one kind to a binary stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; `ValueError` where it cannot be written as it is."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left, without closing the stream."""

    def abort(self) -> None:
        """Let go of the stream."""


class _JsonLines(_Sink):
    def write(self, row: Mapping[str, Any]) -> None:
        self._stream.write(to_json(row) + b"\n")


class _JsonList(_Sink):
    _before = b"[\n"

    def write(self, row: Mapping[str, Any]) -> None:
        self._stream.write(self._before + to_json(row))
        self._before = b",\n"

    def close(self) -> None:
        self._stream.write(b"[]\n" if self._before == b"[\n" else b"\n]\n")


class _Csv(_Sink):
    """Texts as they are, numbers as in JSON, None as an empty cell."""

    def __init__(self, stream: Any, delimiter: str) -> None:
        super().__init__(stream)
        self._names: list[str] | None = None
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text, delimiter=delimiter, lineterminator="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        if self._names is None:
            self._names = list(row)
            self._line(self._names)
        if more := [name for name in row if name not in self._names]:
            raise ValueError(f"it has the columns {', '.join(map(repr, more))}, which the first row has not")
        self._line([self._cell(name, row.get(name)) for name in self._names])

    def _cell(self, name: str, value: Any) -> str:
        value = value.as_py() if isinstance(value, pa.Scalar) else value
        if value is None or isinstance(value, str):
            return value or ""
        if not isinstance(value, bool | int | float) and not hasattr(value, "item"):
            raise ValueError(f"{name!r} is a {type(value).__name__}, which has no place in a cell")
        return to_json(value).decode()

    def _line(self, cells: list[str]) -> None:
        self._writer.writerow(cells)
        try:
            self._stream.write(self._text.getvalue().encode())
        finally:
            self._text.seek(0)
            self._text.truncate()


def _sink(form: Form, stream: Any, arrow_schema: pa.Schema | None) -> _Sink | ColumnsSink:
    if form.kind in ("parquet", "arrow"):
        return ColumnsSink(stream, form.kind, arrow_schema)
    if form.kind in ("csv", "tsv"):
        return _Csv(stream, "\t" if form.kind == "tsv" else ",")
    return _JsonLines(stream) if form.kind == "jsonl" else _JsonList(stream)


class RowWriter:
    r"""Write rows to a file, which appears whole or not at all.

    Used with ``with``: rows go to a hidden file in the same folder, which takes the name when the block ends without
    an error, and is removed when it does not.

    Args:
        path: A name with one of the endings that `open_rows` knows, packed or not; ``"-"`` is standard output, as
            JSON lines.
        sources: What the rows are read from: the output must be none of these files.
        kind: The kind of the file where its name does not tell.
        arrow_schema: Types of the columns of a .parquet or .arrow file. Otherwise they are taken from the first rows
            (as many as are written at once), and a later row that has other types is an error: no value is changed
            to fit.

    Attributes:
        rows: Rows written so far.

    Raises:
        DataError: A row cannot be written as it is. The number of the row is named, counted from 0.
        OptionError: The name is of no known kind, is one of the sources, or cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> with RowWriter(path) as out:
        ...     out.write({"text": "Hi", "weight": 0.5})
        >>> path.read_text()
        '{"text": "Hi", "weight": 0.5}\n'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sources: Iterable[str | Path | RowFile] = (),
        kind: Kind | None = None,
        arrow_schema: pa.Schema | None = None,
    ) -> None:
        self.path = str(path)
        self.rows = 0
        self._final = None if self.path == STDIO else Path(os.path.realpath(self.path))
        self._form = Form(kind or "jsonl") if self._final is None else form_of(Path(self.path), kind)
        if self._final is None and self._form.kind in ("parquet", "arrow"):
            raise OptionError(f"kind={self._form.kind!r} cannot be written to standard output; give a name")
        self._schema = arrow_schema
        if self._final is not None:
            self._require_usable(self._final, sources)
        self._sink: _Sink | ColumnsSink | None = None
        self._streams: list[Any] = []  # what rows go to, then what that packs into
        self._open = contextlib.ExitStack()

    def _require_usable(self, final: Path, sources: Iterable[str | Path | RowFile]) -> None:
        _require_regular(self.path)
        if not final.parent.is_dir():
            raise OptionError(f"there is no folder {final.parent} to write {final.name} to; make it first")
        for source in sources:
            for read in source.paths if isinstance(source, RowFile) else [Path(source)]:
                if read.exists() and os.path.realpath(read) == str(final):
                    raise OptionError(f"{self.path} is what the rows are read from; write to another name")

    def __enter__(self) -> Self:
        """Open it."""
        with self._errors(), contextlib.ExitStack() as stack:
            if self._final is None:
                self._streams = [sys.stdout.buffer]
            else:
                self._streams = [stack.enter_context(replacing(self._final))]
                if self._form.codec:
                    self._streams.insert(0, packing(self._streams[0], self._form.codec))
                    stack.callback(_quietly, self._streams[0].close)
            self._sink = _sink(self._form, self._streams[0], self._schema)
            stack.callback(_quietly, self._sink.abort)
            self._open = stack.pop_all()
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        if self._sink is None:
            raise OptionError('a RowWriter is used within a with block: with RowWriter("out.jsonl") as out')
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise DataError(f"{self.path}, row {self.rows}: no dict whose names are texts, but a {type(row).__name__}")
        with self._errors():
            self._sink.write(row)
        self.rows += 1

    def finish(self) -> None:
        """Write all that is left, so that only the renaming can still fail; no row may be added after it."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        with self._errors():
            sink.close()
            for packed in self._streams[:-1]:
                packed.close()
            if not self._streams[-1].closed:
                self._streams[-1].flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # who reads standard output has had enough
            raise
        except OSError as error:
            raise OptionError(f"{self.path} cannot be written: {error.strerror or error}") from error
        except (ValueError, RecursionError, pa.ArrowException) as error:
            number, reason = getattr(error, "row", self.rows), " ".join(str(error).split())
            raise DataError(f"{self.path}, row {number} (counted from 0) cannot be written: {reason}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Rename the file, or remove it after an error."""
        if error is not None:
            self._open.__exit__(kind, error, traceback)
            return
        with self._errors(), self._open:
            self.finish()


def _quietly(close: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        close()
