"""Rows out of files, one after the other: a row, or an error that names its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet

from safe_sched.data.kinds import KINDS, STDIO, Form, Kind, form_of, is_data, seekable
from safe_sched.data.readers import READERS, BadRow, open_arrow
from safe_sched.errors import DataError, OptionError, unknown_name

HUB = "hf://"
"""How the name of a data set on the hub begins."""

NAMED = 20
"""Bad rows that are kept by name; the others are counted."""

OnBad = Literal["stop", "collect"]


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
                for number, found in READERS[form.kind](name, form):
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
            schema = pyarrow.parquet.read_schema(file) if form.kind == "parquet" else open_arrow(file).schema
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
