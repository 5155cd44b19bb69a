"""Rows read from files one by one: each is a row, or an error that names its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet

from safe_sched.data.kinds import CHUNK, KINDS, MAX_ROW, STDIO, Form, Kind, form_of, is_data, opened, seekable
from safe_sched.data.strict_json import JsonList, NotAList, StrictDecoder, Unreadable
from safe_sched.errors import DataError, OptionError, unknown_name

HUB = "hf://"
"""How the name of a data set on the hub begins."""

NAMED = 20
"""Bad rows that are kept by name; the others are counted."""

OnBad = Literal["stop", "collect"]

_BATCH = 256  # rows of a columnar file that are made into dictionaries at once
_BOM = b"\xef\xbb\xbf"
_TOO_LONG = f"longer than {MAX_ROW >> 20} MiB"

# files --------------------------------------------------------------------------------------------------------------


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


class RowFile:
    """The rows of a file, a folder, a hub data set or standard input, read anew by every ``for``.

    Memory does not grow with the file: at most one row of a text file, or a few hundred of a columnar one, is held.

    Attributes:
        source: What was asked for.
        paths: The files that are read, in order; none for standard input and the hub.
        rows: Rows given so far.
        bad_rows: What was no row so far; with ``on_bad="stop"`` none.
        bad: The first `NAMED` of these.
    """

    def __init__(self, source: str, files: list[tuple[str, Form]], on_bad: OnBad, rows: Iterable[Any] | None) -> None:
        self.source = source
        self.paths = [Path(name) for name, _ in files if name != STDIO]
        self.rows = self.bad_rows = 0
        self.bad: list[BadRow] = []
        self._files, self._on_bad, self._rows = files, on_bad, rows
        self._once = source == STDIO
        self._used = False
        self._at = ("", "row", 0)

    @property
    def where(self) -> str:
        """Where the row given last stands, such as ``"train.jsonl, line 12"`` or ``"train.parquet, row 12"``."""
        name, unit, number = self._at
        return f"{name}, {unit} {number}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, from the first one on.

        Raises:
            DataError: A file is damaged, or (with ``on_bad="stop"``) something in it is no row; standard input is
                read a second time.
        """
        if self._once and self._used:
            raise DataError("standard input was read before, and can only be read once; give a file instead of '-'")
        self._used = True
        self.rows = self.bad_rows = 0
        self.bad = []
        return self._read()

    def arrow_schema(self) -> pa.Schema | None:
        """Types of the columns, where all files are .parquet or .arrow files that agree in them; for `RowWriter`."""
        schemas = [_schema_of(name, form) for name, form in self._files]
        return schemas[0] if schemas and all(schema == schemas[0] for schema in schemas) else None

    def _read(self) -> Iterator[dict[str, Any]]:
        for found in self.found():
            if isinstance(found, BadRow):
                if self._on_bad == "stop":
                    raise DataError(str(found))
                self.bad_rows += 1
                if len(self.bad) < NAMED:
                    self.bad.append(found)
                continue
            self.rows += 1
            yield found

    def found(self) -> Iterator[dict[str, Any] | BadRow]:
        """The rows, and in their places what is none, whatever ``on_bad`` says; nothing is counted.

        Raises:
            DataError: A file is damaged.
        """
        if self._rows is not None:
            for number, row in enumerate(self._rows, start=1):
                self._at = (self.source, "row", number)
                good = isinstance(row, Mapping)
                yield dict(row) if good else BadRow(self.source, number, f"a {type(row).__name__}")
        for name, form in self._files:
            unit = "row" if form.kind in ("parquet", "arrow") else "line"
            try:
                for number, found in _READERS[form.kind](name, form):
                    self._at = (name, unit, number)
                    yield found
            except _DAMAGE as error:
                raise _damaged(name, form, error) from error


_DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError)


def _damaged(name: str, form: Form, error: Exception) -> DataError:
    packed = {None: "", "gzip": ".gz", "zstd": ".zst"}[form.codec]
    return DataError(f"{name} is not a readable .{form.kind}{packed} file: {' '.join(str(error).split())}")


def _schema_of(name: str, form: Form) -> pa.Schema | None:
    if form.kind not in ("parquet", "arrow"):
        return None
    try:
        with seekable(name, form.codec) as file:
            schema = pyarrow.parquet.read_schema(file) if form.kind == "parquet" else _open_arrow(file).schema
        return schema.remove_metadata()
    except _DAMAGE as error:
        raise _damaged(name, form, error) from error


def open_rows(source: str | Path, *, on_bad: OnBad = "stop", kind: Kind | None = None) -> RowFile:
    r"""Open a file of rows, to be read row by row.

    Args:
        source: A .jsonl (or .ndjson), .json (a list of objects), .csv, .tsv, .parquet or .arrow file, each also with
            .gz or .zst behind it; a folder: all such files in it and in its folders, sorted by name; ``"-"``: JSON
            lines from standard input; ``"hf://owner/name"``, ``"hf://owner/name:split"`` or
            ``"hf://owner/name/config:split"``: a data set of the Hugging Face hub, streamed (split ``train``). The
            network is used for the last only.
        on_bad: What to do with a line that is no row. ``"stop"``: raise an error that names it. ``"collect"``: count
            it, keep the first `NAMED` by name, and go on; what cannot be read past, such as a damaged file, is an
            error all the same.
        kind: The kind of the file where its name does not tell: one of the values of `safe_sched.data.KINDS`.

    Returns:
        The rows, to be gone through with ``for``. Cells of .csv and .tsv files are texts.

    Raises:
        DataError: There is no such file, or none of a known kind.
        OptionError: ``on_bad`` or ``kind`` is unknown.
        PluginError: Nothing that is installed can open a hub data set.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"text": "Hi"}\n{"text": \n{"text": "Bye"}\n')
        >>> file = open_rows(path, on_bad="collect")
        >>> list(file)
        [{'text': 'Hi'}, {'text': 'Bye'}]
        >>> file.bad_rows, file.bad[0].line
        (1, 2)
    """
    if on_bad not in get_args(OnBad):
        raise unknown_name("way with bad rows", str(on_bad), get_args(OnBad))
    if kind is not None and kind not in get_args(Kind):
        raise unknown_name("kind of file", str(kind), get_args(Kind))
    name = str(source)
    if name == STDIO:
        if kind in ("parquet", "arrow"):
            raise OptionError(f"kind={kind!r} cannot be read from standard input; give the name of a file")
        return RowFile(name, [(STDIO, Form(kind or "jsonl"))], on_bad, None)
    if name.startswith(HUB):
        from safe_sched.hooks import open_source  # it loads the plugins

        return RowFile(name, [], on_bad, open_source(name))
    path = Path(source)
    if path.is_dir():
        return RowFile(name, [(str(file), form_of(file)) for file in _files_in(path)], on_bad, None)
    if not path.exists():
        hint = f"; a data set of the hub is {HUB}{name}" if name.count("/") == 1 and not path.suffix else ""
        raise DataError(f"no file or folder {name}{hint}")
    return RowFile(name, [(name, form_of(path, kind))], on_bad, None)


_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # notes beside the data


def _files_in(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and is_data(path)
        and path.name not in _NOT_ROWS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (path.name.startswith("cache-") and (path.parent / "state.json").exists())  # left by datasets
    ]
    if not found:
        raise DataError(f"the folder {folder} has no data file in it; looked for: {', '.join(KINDS)}, also packed")
    return found


# kinds of files -----------------------------------------------------------------------------------------------------

_Found = Iterator[tuple[int, dict[str, Any] | BadRow]]
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


def _read_jsonl(name: str, form: Form) -> _Found:
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


def _read_json(name: str, form: Form) -> _Found:
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


def _read_csv(name: str, form: Form) -> _Found:
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


def _read_parquet(name: str, form: Form) -> _Found:
    """Row group after row group, a few rows at once."""
    with seekable(name, form.codec) as file:
        # pre_buffer would hold whole row groups
        source = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK)
        _need_distinct(name, source.schema_arrow)
        batches = source.iter_batches(batch_size=_BATCH, use_threads=False)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _read_arrow(name: str, form: Form) -> _Found:
    """The stream or the file format of Arrow IPC."""
    with seekable(name, form.codec) as file:
        source = _open_arrow(file)
        _need_distinct(name, source.schema)
        whole = isinstance(source, pa.RecordBatchFileReader)
        batches = map(source.get_batch, range(source.num_record_batches)) if whole else source
        before = 1
        for batch in batches:
            batch.validate(full=True)  # offsets that point elsewhere would be followed
            for start in range(0, batch.num_rows, _BATCH):
                yield from enumerate(batch.slice(start, _BATCH).to_pylist(), before + start)
            before += batch.num_rows


def _open_arrow(file: Any) -> Any:
    """A reader of either format, told by the first bytes."""
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def _need_distinct(name: str, schema: pa.Schema) -> None:
    if doubles := sorted({column for column in schema.names if schema.names.count(column) > 1}):
        raise DataError(f"{name}: the columns {', '.join(map(repr, doubles))} are there twice; rename them")


_READERS: dict[Kind, Callable[[str, Form], _Found]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
