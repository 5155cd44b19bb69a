"""Rows into columns: types from the first rows, and no value changed to fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

AT_ONCE = 10_000
"""Rows written at once, at most."""

BYTES_AT_ONCE = 16 << 20
"""Characters of these rows, at most (and one row)."""


_REFUSALS = (ValueError, TypeError, OverflowError, pa.ArrowException)


class RowRefused(ValueError):
    """A row does not fit; ``row`` is its number in the file."""

    def __init__(self, reason: str, row: int) -> None:
        super().__init__(reason)
        self.row = row


class ColumnsSink:
    """Writes Parquet, or the file format of Arrow IPC.

    Args:
        stream: Bytes go there.
        kind: ``"parquet"`` or ``"arrow"``.
        schema: Types of the columns, or None to take them from the first rows.
    """

    def __init__(self, stream: Any, kind: str, schema: pa.Schema | None) -> None:
        self._stream, self._kind, self._schema, self._given = stream, kind, schema, schema is not None
        self._rows: list[dict[str, Any]] = []
        self._size = self._written = 0
        self._writer: Any = None  # until the types are known

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is looked at when enough of them are together."""
        self._rows.append({name: _plain(value) for name, value in row.items()})
        self._size += size_of(row)
        if len(self._rows) >= AT_ONCE or self._size >= BYTES_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Write the rest. A file without rows has the columns of the schema that was given, if any."""
        if self._rows or self._writer is None:
            self._flush()
        self.abort()

    def abort(self) -> None:
        """Let go of the stream."""
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        schema = self._schema = self._schema or first_types(self._rows)
        if self._writer is None:
            self._writer = (
                pyarrow.parquet.ParquetWriter(self._stream, schema, compression="zstd")
                if self._kind == "parquet"
                else pa.ipc.new_file(self._stream, schema)
            )
        try:
            table = self._table(self._rows)
        except _REFUSALS as error:
            raise self._refusal(error) from error
        self._writer.write_table(table)
        self._written += len(self._rows)
        self._rows, self._size = [], 0

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        """The rows as a table; one of `_REFUSALS` where they are none."""
        assert self._schema is not None
        if more := sorted({name for row in rows for name in row} - set(self._schema.names)):
            raise ValueError(f"it has the columns {', '.join(map(repr, more))}, which the first rows have not")
        columns = []
        for field in self._schema:
            values = [row.get(field.name) for row in rows]
            if not self._given and not fits(own := pa.array(values).type, field.type):
                raise ValueError(f"{field.name!r} is {_told(own)}, in the first rows {_told(field.type)}")
            column = pa.array(values, field.type)
            if self._given and not same(values, column.to_pylist()):
                raise ValueError(f"{field.name!r} would change as {field.type}")
            columns.append(column)
        return pa.table(columns, schema=self._schema)

    def _refusal(self, error: Exception) -> RowRefused:
        """The first row that is refused alone; where none is, the rows do not go together."""
        found, number = error, 0
        for place, row in enumerate(self._rows):
            try:
                self._table([row])
            except _REFUSALS as refused:
                found, number = refused, place
                break
        return RowRefused(
            f"{found}. Make the rows alike, or write .jsonl, which takes rows of any types", self._written + number
        )


def first_types(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Types of the columns of some rows: of all of them, or of those before the first that does not go with them.

    Example:
        >>> first_types([{"a": None}, {"a": 1, "b": ["x"]}, {"a": "no number"}])
        a: int64
        b: list<item: string>
          child 0, item: string
    """

    def type_of(values: Sequence[Any]) -> pa.DataType | None:
        try:
            return pa.array(values).type
        except _REFUSALS:
            return None

    def longest(values: Sequence[Any]) -> pa.DataType:
        if (whole := type_of(values)) is not None:
            return whole
        good, bad = 0, len(values)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if type_of(values[:middle]) is None else (middle, bad)
        return pa.array(values[:good]).type

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, longest([row.get(name) for row in rows])) for name in names])


def same(values: Any, read: Any) -> bool:
    """Whether values came back as they were; a field that was not there comes back as None.

    Example:
        >>> same([{"a": 1}], [{"a": 1, "b": None}]), same([{"a": 1.5}], [{"a": 1}]), same([True], [1])
        (True, False, False)
    """
    if isinstance(values, Mapping) and isinstance(read, Mapping):
        return values.keys() <= read.keys() and all(same(values.get(name), value) for name, value in read.items())
    if hasattr(values, "tolist"):
        values = values.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(values, list | tuple) and isinstance(read, list | tuple):
        return len(values) == len(read) and all(map(same, values, read))
    if isinstance(values, bool) != isinstance(read, bool):
        return False
    return values == read or (values != values and read != read)


def fits(own: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type can be written as another without becoming something else.

    Example:
        >>> fits(pa.int64(), pa.float64()), fits(pa.float64(), pa.int64()), fits(pa.int64(), pa.string())
        (True, False, False)
    """
    if own.equals(wanted) or pa.types.is_null(own):
        return True
    if pa.types.is_struct(own) and pa.types.is_struct(wanted):
        places = {field.name: field.type for field in wanted}
        return all(field.name in places and fits(field.type, places[field.name]) for field in own)
    if _is_list(own) and _is_list(wanted):
        return fits(own.value_type, wanted.value_type)
    if pa.types.is_integer(own):
        return pa.types.is_float64(wanted)
    return _is_text(own) and _is_text(wanted)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _told(kind: pa.DataType) -> str:
    return "always None" if pa.types.is_null(kind) else str(kind)


def _plain(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def size_of(value: Any) -> int:
    """About how many characters a value has.

    Example:
        >>> size_of({"text": "Hello", "n": [1, 2]})
        45
    """
    if isinstance(value, str | bytes):
        return len(value) + 8
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values())) + 8
    if isinstance(value, list | tuple):
        return sum(map(size_of, value)) + 8
    return getattr(value, "nbytes", 8)
