"""One reader per kind of file: rows one after the other, and what cannot be read, by its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from safe_sched.data.kinds import CHUNK, MAX_ROW, Form, Kind, opened, seekable
from safe_sched.data.strict_json import JsonList, NotAList, StrictDecoder, Unreadable
from safe_sched.errors import DataError

BATCH = 256
"""Rows of a columnar file made into dictionaries at once."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRow:
    """Something in a file that is no row.

    Attributes:
        source: The file.
        line: Of the file, counted from 1; of a JSON list, where it begins.
        reason: What is wrong with it.
    """

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        """As an editor would find it."""
        return f"{self.source}, line {self.line}: {self.reason}"


Found = Iterator[tuple[int, dict[str, Any] | BadRow]]
"""Each with its line in a text file, or its number in a columnar one, counted from 1."""


def _lines(stream: Any) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers, None for one that is longer than `MAX_ROW`. Only a line feed ends a line."""
    number, held, size = 1, [], 0
    read = getattr(stream, "read1", stream.read)  # what a pipe has by now
    while chunk := read(CHUNK):
        first, *others = chunk.split(b"\n")
        for piece in others:
            size += len(first)
            yield number, None if size > MAX_ROW else b"".join([*held, first])
            number, held, size, first = number + 1, [], 0, piece
        size += len(first)
        if size > MAX_ROW:
            held = []
        else:
            held.append(first)
    if size:
        yield number, None if size > MAX_ROW else b"".join(held)


def _text(line: bytes) -> str:
    """A line as text; `UnicodeDecodeError` where it is none."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = (
            ", it looks like UTF-16: save it as UTF-8"
            if b"\0" in line or line[:2] in (b"\xff\xfe", b"\xfe\xff")
            else ""
        )
        raise Unreadable(f"not UTF-8 text ({error.reason}{wide})") from error


_TOO_LONG = f"longer than {MAX_ROW >> 20} MiB"


def read_jsonl(name: str, form: Form) -> Found:
    """One object per line."""
    decoder = StrictDecoder()
    with opened(name, form.codec) as stream:
        for number, line in _lines(stream):
            if line is None:
                yield number, BadRow(name, number, _TOO_LONG)
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            try:
                text = _text(line)
                if not text.strip(" \t\r"):
                    continue
                row = decoder.line(text)
            except Unreadable as error:
                yield number, BadRow(name, number, str(error))
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                yield number, BadRow(name, number, f"a {type(row).__name__}; allowed: an object with named fields")


def read_json(name: str, form: Form) -> Found:
    """One list of objects."""
    with opened(name, form.codec) as stream:
        rows = JsonList(stream)
        try:
            for row, problem in rows:
                line = rows.line
                if problem is not None:
                    yield line, BadRow(name, line, problem)
                elif isinstance(row, dict):
                    yield line, row
                else:
                    yield line, BadRow(name, line, f"a {type(row).__name__}: {name} is not a list of objects")
        except NotAList as error:
            more = "" if str(error) != "{" else "; for one object per line name it .jsonl"
            raise DataError(f"{name} is not a list of objects{more}") from error
        except Unreadable as error:
            raise DataError(
                f"{name}, line {rows.line}: {error}. What follows in a list cannot be read; one object a line (.jsonl) "
                "can be read past a bad one"
            ) from error


def read_csv(name: str, form: Form) -> Found:
    """Texts, under the names of the first line. A reader that guesses types makes 7 of the answer "007"."""
    with opened(name, form.codec) as stream:
        reader = csv.reader(_pieces(name, stream), strict=True, delimiter="\t" if form.kind == "tsv" else ",")
        names = _cells(name, reader) or []
        if doubles := sorted({column for column in names if names.count(column) > 1}):
            raise DataError(
                f"{name}, line 1: the columns {', '.join(map(repr, doubles))} stand there twice; rename them"
            )
        start = reader.line_num + 1
        while (cells := _cells(name, reader)) is not None:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(names):
                bad = BadRow(name, number, f"{len(cells)} cells; the first line names {len(names)} columns")
                yield number, bad
            elif not all(map(_is_utf8, cells)):
                yield number, BadRow(name, number, "not UTF-8 text")
            else:
                yield number, dict(zip(names, cells, strict=True))


def _is_utf8(cell: str) -> bool:
    return cell.isascii() or not any("\udc80" <= character <= "\udcff" for character in cell)


def _cells(name: str, reader: Any) -> list[str] | None:
    limit = csv.field_size_limit(MAX_ROW)  # a setting of the whole process, so only for as long as it is needed
    try:
        return next(reader, None)
    except csv.Error as error:  # from here on nobody knows what is quoted
        raise DataError(f"{name}, line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _pieces(name: str, stream: Any) -> Iterator[str]:
    for number, line in _lines(stream):
        if line is None:
            raise DataError(f"{name}, line {number}: {_TOO_LONG}")
        text = (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8", "surrogateescape") + "\n"
        if "\r" in text[:-2]:  # the line ends of old Macs
            yield from io.StringIO(text, newline="")
        else:
            yield text


def read_parquet(name: str, form: Form) -> Found:
    """Row group after row group, a few rows at once."""
    with seekable(name, form.codec) as file:
        # pre_buffer would hold whole row groups
        source = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK)
        _need_distinct(name, source.schema_arrow)
        batches = source.iter_batches(batch_size=BATCH, use_threads=False)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def read_arrow(name: str, form: Form) -> Found:
    """The stream or the file format of Arrow IPC."""
    with seekable(name, form.codec) as file:
        source = open_arrow(file)
        _need_distinct(name, source.schema)
        whole = isinstance(source, pa.RecordBatchFileReader)
        batches = map(source.get_batch, range(source.num_record_batches)) if whole else source
        before = 1
        for batch in batches:
            batch.validate(full=True)  # offsets that point elsewhere would be followed
            for start in range(0, batch.num_rows, BATCH):
                yield from enumerate(batch.slice(start, BATCH).to_pylist(), before + start)
            before += batch.num_rows


def open_arrow(file: Any) -> Any:
    """A reader of either format, told by the first bytes."""
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def _need_distinct(name: str, schema: pa.Schema) -> None:
    if doubles := sorted({column for column in schema.names if schema.names.count(column) > 1}):
        raise DataError(f"{name}: the columns {', '.join(map(repr, doubles))} are there twice; rename them")


READERS: dict[Kind, Callable[[str, Form], Found]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
