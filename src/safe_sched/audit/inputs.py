"""What is audited, gone through twice in the same order: rows with their places, and what could not be read."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safe_sched.audit.findings import Bad
from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.data import NAMED, BadRow, RowFile, RowWriter
from safe_sched.data.kinds import CHUNK, STDIO, opened
from safe_sched.data.named_sources import sources_of as named
from safe_sched.data.schemas import LOOKED_AT, SCHEMAS, detect
from safe_sched.data.sources import DataSource
from safe_sched.errors import DataError, unknown_name


@runtime_checkable
class RowSource(Protocol):
    """One thing to audit: a file, a folder, a data set."""

    @property
    def name(self) -> str:
        """As the report calls it."""
        ...

    @property
    def schema(self) -> str | None:
        """The schema of its rows, or None to detect it."""
        ...

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any]] | BadRow]:
        """Every row with where it stands, and what is no row, anew at every call."""
        ...

    def laid_out(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row in the columns of its schema; `DataError` where it cannot be."""
        ...


@dataclass(frozen=True)
class Unread:
    """A row that is of no schema that is known. It keeps its place in the table, without numbers."""

    number: int
    where: str
    reason: str
    row: Any


Entry = AuditRow | Unread


class Inputs:
    """Several sources, one after the other.

    Attributes:
        sources: What is read.
        bad_rows: What could not be read in the last pass: lines that are no rows, and rows of no known schema.
        bad_lines: Those of them that are no rows, so that they have no number.
        bad: The first of them, by name.
        limit: How many rows there are at most, or None.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        *,
        schema: str | None = None,
        limit: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        if schema is not None and schema not in SCHEMAS:
            raise unknown_name("schema", schema, SCHEMAS)
        self.sources = list(sources)
        self.bad_rows = self.bad_lines = 0
        self.bad: list[Bad] = []
        self.limit = limit
        self._schema, self._tokenizer = schema, tokenizer

    def __iter__(self) -> Iterator[Entry]:
        """The rows, from the first one on.

        Raises:
            DataError: A source cannot be read on, or its rows fit several schemas.
        """
        self.bad_rows = self.bad_lines = 0
        self.bad = []
        number = 0
        for source in self.sources:
            for where, row, schema in self._of(source, None if self.limit is None else self.limit - number):
                yield self._entry(row, number, where, schema)
                number += 1
            if number == self.limit:
                return

    def shards(self, size: int) -> Iterator[list[Entry]]:
        """The rows in runs of a fixed size; the last one may be shorter."""
        rows = iter(self)
        while shard := list(itertools.islice(rows, size)):
            yield shard

    def _of(
        self, source: RowSource, most: int | None
    ) -> Iterator[tuple[str, Mapping[str, Any] | DataError, str | None]]:
        """Rows of one source with their schema, which its first rows decide; or why a row has none."""
        rows = itertools.islice(self._good(source), most)  # what stands behind the last one is not even looked at
        first = list(itertools.islice(rows, LOOKED_AT))
        schema = self._schema or source.schema or _schema_of([row for _, row in first], source.name)
        if schema == "tokens" and self._tokenizer is None:
            raise DataError(
                f"{source.name}: the rows are tokens, which are read with the tokenizer that made them; name its "
                "folder: tokenizer=..., on the command line --tokenizer"
            )
        for where, row in itertools.chain(first, rows):
            yield where, row, schema

    def _good(self, source: RowSource) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
        for found in source.rows():
            if isinstance(found, BadRow):
                self.bad_lines += 1
                self._note(Bad(f"{found.source}, line {found.line}", found.reason))
                continue
            where, row = found
            try:
                yield where, source.laid_out(row)
            except DataError as error:
                yield where, error

    def _entry(self, row: Mapping[str, Any] | DataError, number: int, where: str, schema: str | None) -> Entry:
        try:
            if isinstance(row, DataError):
                raise row
            return audit_row(row, number, where, schema, self._tokenizer)
        except DataError as error:
            reason = str(error)
        except RecursionError:
            reason = "nested too deep"
        self._note(Bad(where, reason))
        return Unread(number, where, reason, {} if isinstance(row, DataError) else row)

    def _note(self, bad: Bad) -> None:
        self.bad_rows += 1
        if len(self.bad) < NAMED:
            self.bad.append(bad)


def _schema_of(first: Sequence[Mapping[str, Any] | DataError], name: str) -> str | None:
    """The schema that the first rows have in common; rows of none do not count. None: each row for itself."""
    rows = [row for row in first if isinstance(row, Mapping)]
    known = [names for row in rows if (names := {name for name, schema in SCHEMAS.items() if schema.fits(row)})]
    if rows and not known:
        try:
            detect(rows)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    common = set.intersection(*known) if known else set()
    if len(common) > 1:
        raise DataError(
            f"{name}: the rows fit several schemas: {' or '.join(map(repr, sorted(common)))}. Name the one that is "
            f"trained on, such as schema={min(common)!r}"
        )
    return common.pop() if common else None


# sources ------------------------------------------------------------------------------------------------------------


class Rows:
    """Rows in memory, or anything else that yields mappings again and again."""

    schema: str | None = None

    def __init__(self, rows: Iterable[Any], name: str = "rows") -> None:
        self.name, self._rows = name, rows

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any]] | BadRow]:
        """See `RowSource.rows`."""
        for number, row in enumerate(self._rows):
            if isinstance(row, Mapping):
                yield f"row {number}", row
            else:
                yield BadRow(self.name, number + 1, f"a {type(row).__name__}; allowed: a dict with named fields")

    def laid_out(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `RowSource.laid_out`."""
        return row


def opened_sources(data: Any, stack: contextlib.ExitStack) -> list[RowSource]:
    """What a user named or gave, as sources that can be read again.

    Args:
        data: A path, ``"-"``, ``"hf://..."``, an Axolotl YAML, a LlamaFactory ``dataset_info.json``, or several of
            these; or rows: anything that yields mappings. A `RowSource` stays what it is.
        stack: What holds temporary files: standard input and iterators are kept in one, to be read twice.

    Raises:
        DataError: There is no such file, or it is of no known kind.
    """
    if isinstance(data, RowSource):
        return [data]
    if isinstance(data, str | Path):
        return _named([str(data)], stack)
    if isinstance(data, list | tuple) and data and all(isinstance(one, str | Path) for one in data):
        return _named([str(one) for one in data], stack)
    if isinstance(data, list | tuple) and data and all(isinstance(one, RowSource) for one in data):
        return list(data)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(f"a {type(data).__name__} cannot be audited; give rows (dicts with named fields) or a path")
    if isinstance(data, RowFile):
        return [_file(data.source)]
    if iter(data) is data:  # it can only be gone through once
        return [_spooled_rows(data, stack)]
    return [Rows(data)]


def _named(paths: Sequence[str], stack: contextlib.ExitStack) -> list[RowSource]:
    if paths.count(STDIO) > 1:
        raise DataError("standard input ('-') is named twice, and can only be read once")
    found: list[RowSource] = []
    for path in paths:
        found.extend([_spooled_input(stack)] if path == STDIO else named([path]))
    return found


def _spooled_input(stack: contextlib.ExitStack) -> RowSource:
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "input.jsonl"
    with opened(STDIO, None) as stream, open(path, "wb") as file:
        shutil.copyfileobj(stream, file, CHUNK)
    return _file(path, "standard input")


def _spooled_rows(rows: Iterable[Any], stack: contextlib.ExitStack) -> RowSource:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder) / "rows.jsonl"
    with RowWriter(path) as out:
        for row in rows:
            out.write(row)
    return _file(path, "rows")


def _file(path: str | Path, alias: str | None = None) -> RowSource:
    return DataSource(alias or str(path), str(path), alias=alias)
