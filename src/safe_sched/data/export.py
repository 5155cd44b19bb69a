"""Weights in a file: every row with a root-level ``weight``, as hosted fine-tuning services take it.

A row keeps its schema, its columns and their order; ``weight`` comes behind them. With a threshold, rows under it go to
a file of their own, each with a ``reason`` in words: what is not kept is not lost. Rows are written as they are read,
so files may be of any size; the weights are held.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from safe_sched.data import RowFile, RowWriter, open_rows
from safe_sched.data.terminal_text import printable
from safe_sched.errors import CoverageError, DataError, OptionError, unknown_name

WEIGHT, REASON = "weight", "reason"
"""The columns that are added."""

Unscored = Literal["error", "keep", "remove"]

_NAMED = 5
_INTERVALS = (("p_harmful_low", "p_harmful_high"), ("p_low", "p_high"))  # of a run, of an audit


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        rows: Rows that were read.
        kept: Rows in the file.
        removed: Rows in the file of removed rows; with the kept ones, all that were read.
        mean: Mean weight of the kept rows, nan where none was kept.
    """

    rows: int
    kept: int
    removed: int
    mean: float


@dataclass(frozen=True)
class _Judged:
    """Weight of every row, and what is known of it; a row that was not scored has the weight 1."""

    weight: np.ndarray
    columns: Mapping[str, np.ndarray]
    reasons: Sequence[str | None] | None = None
    unscored: np.ndarray | None = None

    def is_unscored(self, row: int) -> bool:
        return self.unscored is not None and bool(self.unscored[row])

    def reason(self, row: int, weight: float, threshold: float | None) -> str:
        if self.is_unscored(row):
            return "" if self.reasons is not None and self.reasons[row] else "not scored"
        assert threshold is not None
        told = f"weight {weight:.4g} is under the threshold {threshold:.4g}"
        if "p_harmful" not in self.columns:
            return told
        told += f"; harmful with probability {self.columns['p_harmful'][row]:.3g}"
        for ends in (ends for ends in _INTERVALS if set(ends) <= self.columns.keys()):
            low, high = (self.columns[end][row] for end in ends)
            told += f" (90 % interval {low:.3g} to {high:.3g})"
        return told


def export(
    rows: str | Path | RowFile | Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    weights: Any = None,
    table: pa.Table | None = None,
    p_harmful: Any = None,
    threshold: float | None = None,
    removed: str | Path | None = None,
    reasons: Sequence[str | None] | None = None,
    multiply: bool = False,
    unscored: Unscored = "error",
) -> Exported:
    r"""Write every row with its weight.

    Exactly one of ``weights``, ``table`` and ``p_harmful`` says what the weights are.

    Args:
        rows: The training rows, in the order in which the weights count them: a path or another source that
            `safe_sched.data.open_rows` knows, or anything that yields mappings.
        out: The file to write, of a kind that `safe_sched.data.RowWriter` knows.
        weights: One number >= 0 per row.
        table: From ``callback.table()``, or the findings of an audit, read back from a file or not: the columns ``row``
            and ``weight``, and ``p_harmful`` where the method tells it. The rows of ``callback.table()`` are those that
            the trainer held, so the data set must not have been shuffled, filtered or packed on the way.
        p_harmful: One probability per row; the weight is 1 minus it.
        threshold: Rows whose weight is under it are removed, >= 0; None keeps all.
        removed: Where removed rows go, with their weight and the reason. Needed with a threshold.
        reasons: What else there is to say of each row, for those that are removed.
        multiply: What to do with rows that have a ``weight`` of their own: their weight and the given one are
            multiplied, so that neither is lost (none, or None, counts as 1). Without it, such a row is an error.
        unscored: What to do with rows of a table that have no weight, since an audit could not score them: ``"keep"``
            gives them the weight 1, ``"remove"`` treats them as rows under the threshold.

    Raises:
        DataError: There are not as many weights as rows, a weight is negative or not finite, a row has none, or a row
            has a ``weight`` or a ``reason`` already. Nothing is written then.
        OptionError: The options do not go together.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> rows = [{"prompt": "Hi", "completion": "Hello"}, {"prompt": "Bye", "completion": "Go away"}]
        >>> export(rows, folder / "kept.jsonl", weights=[1.2, 0.1], threshold=0.5, removed=folder / "removed.jsonl")
        Exported(rows=2, kept=1, removed=1, mean=1.2)
        >>> (folder / "kept.jsonl").read_text()
        '{"prompt": "Hi", "completion": "Hello", "weight": 1.2}\n'
        >>> next(iter(open_rows(folder / "removed.jsonl")))["reason"]
        'weight 0.1 is under the threshold 0.5'
    """
    if unscored not in get_args(Unscored):
        raise unknown_name("choice for unscored rows", unscored, get_args(Unscored))
    judged = _judge(weights, table, p_harmful, unscored)
    count = len(judged.weight)
    _require_together(threshold, removed, out, unscored)
    if reasons is not None and len(reasons) != count:
        raise DataError(f"{len(reasons)} reasons for {count} weights; give one per row, None where there is none")
    source = open_rows(rows) if isinstance(rows, str | Path) else rows
    schema = source.arrow_schema() if isinstance(source, RowFile) else None
    sources = [source] if isinstance(source, RowFile) else []
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(RowWriter(out, sources=sources, arrow_schema=_with(schema, WEIGHT)))
        drop = None
        if removed is not None:
            more = _with(_with(schema, WEIGHT), REASON)
            drop = stack.enter_context(RowWriter(removed, sources=sources, arrow_schema=more))
        total = 0.0
        number = -1
        for number, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise DataError(f"row {number} is a {type(row).__name__}; allowed: a dict with named fields")
            if number >= count:
                raise DataError(f"there are more rows than the {count} weights; {_ONE_EACH}")
            weight = _combined(row, number, judged.weight[number], multiply)
            weighed = {**row, WEIGHT: weight}
            low = threshold is not None and weight < threshold
            if drop is None or not (unscored == "remove" if judged.is_unscored(number) else low):
                keep.write(weighed)
                total += weight
                continue
            if REASON in row:
                raise DataError(f"row {number} has a column {REASON!r} already; rename it")
            said = [one[number] for one in (reasons, judged.reasons) if one is not None]
            told = judged.reason(number, weight, threshold)
            drop.write({**weighed, REASON: "; ".join(filter(None, (*said, told)))})
        if number + 1 != count:
            raise DataError(f"there are {count} weights for {number + 1} rows; {_ONE_EACH}")
        for writer in filter(None, (keep, drop)):
            writer.finish()
        kept, dropped = keep.rows, 0 if drop is None else drop.rows
        if kept + dropped != count:
            raise CoverageError(f"{kept} rows kept and {dropped} removed of {count}; nothing was written")
    return Exported(count, kept, dropped, total / kept if kept else math.nan)


_ONE_EACH = (
    "give one weight per row. A trainer that dropped, cut or packed rows holds other rows than the file: train without "
    "packing, on the rows that are exported"
)


def _judge(weights: Any, table: pa.Table | None, p_harmful: Any, unscored: Unscored) -> _Judged:
    given = {"weights": weights, "table": table, "p_harmful": p_harmful}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise OptionError(
            f"export(...) was given {' and '.join(named) or 'no weights'}; give one of {', '.join(given)}"
        )
    if table is not None:
        return _from_table(table, unscored)
    if p_harmful is not None:
        chances = _numbers(p_harmful, "p_harmful")
        _require(chances, "probability", "a number from 0 to 1", most=1.0)
        return _Judged(1 - chances, {"p_harmful": chances})
    found = _numbers(weights, "weights")
    _require(found, "weight", "a finite number >= 0")
    return _Judged(found, {})


def _from_table(table: pa.Table, unscored: Unscored) -> _Judged:
    if missing := [name for name in ("row", "weight") if name not in table.column_names]:
        raise DataError(
            f"the table has the columns {', '.join(table.column_names)}, but not {' and '.join(missing)}; give what "
            "callback.table() returns, or the findings of an audit"
        )
    order = np.argsort(table.column("row").to_numpy(), kind="stable")
    if not np.array_equal(table.column("row").to_numpy()[order], np.arange(table.num_rows)):
        raise DataError(
            f"the table's rows are not 0 to {table.num_rows - 1}, each once; give what callback.table() returns"
        )
    table = table.take(order)
    known = ("weight", "p_harmful", *(end for ends in _INTERVALS for end in ends))
    columns = {name: _numbers(table.column(name), name) for name in known if name in table.column_names}
    reasons = table.column(REASON).to_pylist() if REASON in table.column_names else None
    lacking = table.column("weight").is_null().to_numpy()
    if lacking.any() and unscored == "error":
        first = ", ".join(_place(table, row) for row in np.flatnonzero(lacking)[:_NAMED].tolist())
        raise DataError(
            f"{int(lacking.sum())} of {table.num_rows} rows have no weight, since they could not be scored ({first}"
            f'{", ..." if lacking.sum() > _NAMED else ""}). Say what becomes of them: unscored="keep" gives them the '
            'weight 1, unscored="remove" takes them out'
        )
    columns["weight"] = np.where(lacking, 1.0, columns["weight"])
    _require(columns["weight"], "weight", "a finite number >= 0")
    return _Judged(columns["weight"], columns, reasons, lacking)


def _place(table: pa.Table, row: int) -> str:
    return printable(table.column("where")[row].as_py()) if "where" in table.column_names else f"row {row}"


def _numbers(values: Any, name: str) -> np.ndarray:
    """As doubles; a single-precision number becomes the shortest decimal that names it, 0.1 and not 0.10000000149."""
    if hasattr(values, "detach"):  # a tensor, of any type and on any device
        values = values.detach().cpu()
        values = (values.float() if values.dtype.is_floating_point and values.element_size() < 4 else values).numpy()
    elif isinstance(values, pa.Array | pa.ChunkedArray):
        values = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
    try:
        found = np.asarray(values)
        found = found.astype(str).astype(np.float64) if found.dtype == np.float32 else found.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} are no numbers ({error}); give one number per row") from error
    if found.ndim != 1:
        raise DataError(f"{name} has the shape {found.shape}; give one number per row")
    return found


def _require(values: np.ndarray, kind: str, allowed: str, most: float = math.inf) -> None:
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0) & (values <= most)))
    if bad.size:
        raise DataError(f"{kind} number {bad[0]} is {values[bad[0]]} ({bad.size} such in all); allowed: {allowed}")


def _require_together(threshold: float | None, removed: str | Path | None, out: str | Path, unscored: Unscored) -> None:
    if unscored == "remove" and removed is None:
        raise OptionError('unscored="remove" takes rows out of the file; say where they go with removed=...')
    if threshold is None and unscored != "remove":
        if removed is not None:
            raise OptionError("removed=... is for rows under a threshold; give threshold=... as well")
        return
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise OptionError(f"threshold={threshold}; allowed: a finite number >= 0")
    if removed is None:
        raise OptionError("threshold=... takes rows out of the file; say where they go with removed=...")
    if Path(out).resolve() == Path(removed).resolve():
        raise OptionError(f"kept and removed rows would both go to {out}; give two names")


def _with(schema: pa.Schema | None, name: str) -> pa.Schema | None:
    if schema is None:
        return None
    field = pa.field(name, pa.float64() if name == WEIGHT else pa.string())
    return schema.set(schema.get_field_index(name), field) if name in schema.names else schema.append(field)


def _combined(row: Mapping[str, Any], number: int, weight: np.float64, multiply: bool) -> float:
    if WEIGHT not in row:
        return float(weight)
    if not multiply:
        raise DataError(
            f"row {number} has a column {WEIGHT!r} already; multiply=True multiplies the two, or drop or rename it"
        )
    try:
        own = 1.0 if row[WEIGHT] is None else float(row[WEIGHT])
    except (TypeError, ValueError):
        own = math.nan
    product = own * float(weight)
    if not (math.isfinite(product) and own >= 0):
        raise DataError(f"row {number} has the weight {row[WEIGHT]!r}; allowed: a finite number >= 0, or None for 1")
    return product
