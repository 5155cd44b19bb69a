"""The audited rows with what was found, as a file of any kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from safe_sched.audit.findings import COLUMNS, Findings
from safe_sched.audit.inputs import RowSource
from safe_sched.data import BadRow, RowWriter
from safe_sched.data.writing import to_json
from safe_sched.errors import DataError, StateError

PREFIX = "safe_sched."
"""What the names of added columns begin with."""

_LEFT_OUT = ("row", "where")  # the place of the line says it
_AT_ONCE = 4096


def write_rows(findings: Findings, sources: Sequence[RowSource], path: str | Path) -> int:
    r"""Write every audited row with its own columns, then ``safe_sched.p_harmful`` and the others.

    Args:
        findings: Of an audit of these sources.
        sources: What was audited, to be read once more.
        path: The file to write, of a kind that `safe_sched.data.RowWriter` knows. Cells of CSV that are no numbers or
            texts are written as JSON.

    Returns:
        Rows written: those of the findings, in their order. Numbers are None for rows that could not be scored.

    Raises:
        DataError: A row has such a column already, or cannot be written.
        StateError: The sources have changed since.

    Example:
        >>> import pathlib, tempfile
        >>> from safe_sched.audit.findings import Share, Summary
        >>> from safe_sched.audit.inputs import Rows
        >>> table = pa.table({"row": [0], "where": ["row 0"], "p_harmful": [0.25]})
        >>> findings = Findings(table, Summary(1, 1, 0, (), 0, Share(0.0, 0.0, 0.1), 1.0, 0.5, ()))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> write_rows(findings, [Rows([{"text": "Hi"}])], path)
        1
        >>> path.read_text()
        '{"text": "Hi", "safe_sched.p_harmful": 0.25}\n'
    """
    names = [name for name in findings.table.column_names if name not in _LEFT_OUT]
    cells = str(path).lower().removesuffix(".gz").removesuffix(".zst").endswith((".csv", ".tsv"))
    lines = _lines(findings.table, names)
    changed = StateError("the input changed since it was audited; audit it again")
    with RowWriter(path, sources=_paths(sources), arrow_schema=_schema(findings, sources)) as out:
        rows = (found for source in sources for found in source.rows() if not isinstance(found, BadRow))
        for line in lines:
            where, row = next(rows, ("", None))
            if row is None or where != line.pop("where"):
                raise changed
            if taken := [name for name in line if name in row]:
                raise DataError(f"{where} has a column {taken[0]!r} already: it was audited before. Drop that column")
            out.write({**(_cells(row) if cells else row), **line})
    return out.rows


def _lines(table: pa.Table, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=_AT_ONCE):
        columns = {f"{PREFIX}{name}": _plain(batch.column(name)) for name in names}
        columns["where"] = batch.column("where").to_pylist()
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _plain(column: pa.Array) -> list[Any]:
    """As Python values; a number in single precision as the shortest decimal that names it."""
    if column.type != pa.float32():
        return column.to_pylist()
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    there = column.is_valid().to_pylist()
    return [value if known else None for value, known in zip(_shortest(values), there, strict=True)]


def _shortest(values: np.ndarray) -> list[float]:
    return values.astype(str).astype(np.float64).tolist()


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_json(value).decode() if isinstance(value, list | dict) else value for name, value in row.items()}


def _paths(sources: Sequence[RowSource]) -> list[Path]:
    return [path for source in sources for path in getattr(getattr(source, "file", None), "paths", ())]


def _schema(findings: Findings, sources: Sequence[RowSource]) -> pa.Schema | None:
    """Types of the columns where the source has them; for Parquet and Arrow."""
    files = [getattr(source, "file", None) for source in sources]
    schemas = [None if file is None else file.arrow_schema() for file in files]
    if not schemas or schemas[0] is None or any(one != schemas[0] for one in schemas):
        return None
    known = dict(COLUMNS)
    added = [name for name in findings.table.column_names if name not in _LEFT_OUT]
    kinds = [known.get(name, pa.float32()) for name in added]
    doubles = [pa.float64() if kind == pa.float32() else kind for kind in kinds]
    return pa.schema(
        [*schemas[0], *(pa.field(f"{PREFIX}{name}", kind) for name, kind in zip(added, doubles, strict=True))]
    )
