"""The audit: two passes over the rows, then a calibrated probability for each."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from safe_sched.audit.calibrate import Calibration, calibrate
from safe_sched.audit.engine import Engine, LocalEngine, Shard, require_names
from safe_sched.audit.findings import Bad, Findings, Summary
from safe_sched.audit.inputs import Entry, Inputs, opened_sources
from safe_sched.audit.judge import Judge, schema_of
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.shards import Shards
from safe_sched.audit.signals import Anchored, Detector
from safe_sched.errors import DataError, OptionError, StateError, UnscoredError
from safe_sched.generation import Device, Dtype
from safe_sched.hooks import AuditRequest
from safe_sched.hooks import detectors as hooked
from safe_sched.rows import CORE, read_rows

SHARD_ROWS = 4096
"""Rows of a shard: what a killed audit does again, at most."""

SAMPLE = 200_000
"""Rows that the calibration is fitted to, at most; evenly spread ones of larger inputs."""

AUTO = 0.5
"""The threshold where none is given: a row is flagged where it is more likely harmful than not."""

_DEPENDS = ("numpy", "pyarrow", "scikit-learn", "torch", "transformers")
_LABELS = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0, "": math.nan}

Labels = str | Sequence[bool | int | float | None]


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def audit(
    data: Any,
    *,
    model: str | None = None,
    adapter: str | None = None,
    safety_data: Any = CORE,
    scorer: str | None = None,
    threshold: float | str = "auto",
    labels: Labels | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    schema: str | None = None,
    detectors: Sequence[Detector] | None = None,
    max_length: int = 1024,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
    engine: Engine | None = None,
    progress: Callable[[str, int, int | None], None] = _silent,
) -> Findings:
    """Say of every row of a training set how likely it is harmful, and why.

    Args:
        data: Rows (dicts with named fields, in a schema of `safe_sched.mixing.SCHEMAS`), or a path: a file, a folder,
            ``"-"`` (standard input), ``"hf://owner/name"``, or a list of these.
        model: A folder or hub name of a causal language model, whose signals are added. Best is the aligned model that
            is to be fine-tuned.
        adapter: A folder with a PEFT adapter of it.
        safety_data: Prompts that are to be refused: ``"core"``, a path, or rows.
        scorer: A file with a saved scorer of NeuralBDS.
        threshold: Rows whose ``p_harmful`` is at least this are flagged, above 0, at most 1; ``"auto"`` is `AUTO`.
        labels: What is known of some rows: the name of a column, or one value per row; 1 is harmful, 0 is not, None
            is unknown. The labelled rows must be a fair sample, for ``p_harmful`` is fitted to them.
        limit: Look at so many rows only, the first ones.
        out: A folder for shards of scores. An audit that was killed goes on there with ``resume``.
        resume: Whether to go on with what is in ``out``.
        schema: The schema of the rows, where they fit several.
        detectors: Signals in the place of the built-in ones and those of plugins.
        max_length: Tokens that a row is cut to for the model, >= 2.
        device: ``"auto"`` is a GPU where there is one.
        dtype: Of the model's parameters.
        seed: Of whatever is drawn.
        shard_rows: Rows of a shard.
        engine: What runs the scoring; None: this process.
        progress: Called with what is being done, how much of it is done, and of how much (None: unknown).

    Returns:
        A table with one line per row, and a summary.

    Raises:
        DataError: The input or the safety set cannot be read, or no row of it can.
        OptionError: An option is out of range, or does not fit another.
        StateError: ``out`` belongs to another input or to other settings.
        PluginError: Nothing that is installed can run the model.

    Example:
        >>> rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
        >>> findings = audit(rows)
        >>> findings.summary.rows, findings.summary.scored
        (40, 40)
        >>> findings.table.column_names[:3]
        ['row', 'where', 'p_harmful']
    """
    least = _threshold(threshold)
    for name, value, lowest in (("limit", limit, 1), ("shard_rows", shard_rows, 1)):
        if value is not None and value < lowest:
            raise OptionError(f"{name}={value}; allowed: a whole number >= {lowest}")
    if resume and out is None:
        raise OptionError("resume=True goes on with an audit in a folder; name it, out=...")
    clock = _Clock(progress)
    with contextlib.ExitStack() as stack:
        shards = Shards(Path(out or stack.enter_context(tempfile.TemporaryDirectory())), resume=resume)
        inputs = Inputs(opened_sources(data, stack), schema=schema, limit=limit)
        found = _detectors(detectors, safety_data, model, adapter, scorer, max_length, device, dtype, seed)
        require_names(found)
        wanted = _Labels(labels)
        rows, digests = _observe(inputs, found, wanted, shard_rows, clock)
        if rows == 0 and inputs.bad_rows == 0:
            raise DataError(f"{_names(inputs)}: no rows in it")
        bad, bad_rows = tuple(inputs.bad), inputs.bad_rows
        shards.begin(_settings(found, limit, schema, shard_rows, seed), digests)
        _score(inputs.shards(shard_rows), found, wanted, shards, digests, engine or LocalEngine(), rows, clock)
        clock.stage("calibrating", None)
        fitted = _calibrate(found, shards, rows, seed)
        judge = Judge(found, fitted, least)
        table = pa.concat_tables([schema_of(found).empty_table(), *map(judge.lines, shards.tables())])
    summary = _summary(table, judge, inputs, bad, bad_rows, limit, model, clock.done())
    if summary.scored == 0:
        first = f"the first: {bad[0].where}: {bad[0].reason}" if bad else "no signal says anything of any of them"
        raise UnscoredError(f"none of {rows} rows could be scored; {first}")
    return Findings(table, summary)


# before -------------------------------------------------------------------------------------------------------------


def _threshold(threshold: float | str) -> float:
    if threshold == "auto":
        return AUTO
    try:
        value = float(threshold)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise OptionError(f"threshold={threshold!r}; allowed: a number above 0 and at most 1, or 'auto'")
    return value


def _detectors(
    given: Sequence[Detector] | None,
    safety_data: Any,
    model: str | None,
    adapter: str | None,
    scorer: str | None,
    max_length: int,
    device: Device,
    dtype: Dtype,
    seed: int,
) -> list[Detector]:
    safety = read_rows(safety_data)
    request = AuditRequest(
        safety_rows=safety,
        model=model,
        adapter=adapter,
        scorer=scorer,
        max_length=max_length,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    if given is not None:
        return list(given)
    from safe_sched.audit.detectors import default_detectors  # it imports scikit-learn

    return [*default_detectors(safety), *hooked(request)]


class _Labels:
    """What is known of some rows, by column or by number."""

    def __init__(self, labels: Labels | None) -> None:
        self._labels = labels
        self.found = 0

    def of(self, entries: Sequence[Entry]) -> np.ndarray:
        return np.array([self._one(entry) for entry in entries], np.float32)

    def _one(self, entry: Entry) -> float:
        if self._labels is None:
            return math.nan
        if isinstance(self._labels, str):
            row = entry.example.row if isinstance(entry, AuditRow) else entry.row
            if self._labels not in row:
                raise DataError(f"{entry.where} has no column {self._labels!r}, which labels= names")
            value = row[self._labels]
        else:
            if entry.number >= len(self._labels):
                raise DataError(f"there are {len(self._labels)} labels, and more rows; give one per row, or None")
            value = self._labels[entry.number]
        told = math.nan if value is None else _LABELS.get(str(value).strip().lower(), value)
        if isinstance(told, str) or (told not in (0, 1) and not math.isnan(told)):
            raise DataError(f"{entry.where} has the label {str(value)[:40]!r}; allowed: 0, 1, or None for unknown")
        return float(told)


# the passes ---------------------------------------------------------------------------------------------------------


def _observe(
    inputs: Inputs, found: Sequence[Detector], labels: _Labels, size: int, clock: _Clock
) -> tuple[int, list[str]]:
    """The first pass: how many rows there are, and a digest of the rows of every shard."""
    clock.stage("reading", None)
    rows, digests = 0, []
    for entries in inputs.shards(size):
        readable = [entry for entry in entries if isinstance(entry, AuditRow)]
        if readable:
            for detector in found:
                detector.observe(readable)
        rows += len(entries)
        digests.append(_digest(entries, labels.of(entries)))
        clock.show(rows)
    clock.stage("fitting", None)
    for detector in found:
        detector.ready()
    return rows, digests


def _digest(entries: Sequence[Entry], labels: np.ndarray) -> str:
    """Of all that the scores of a shard may depend on."""
    found = hashlib.blake2b(labels.tobytes(), digest_size=16)
    for entry in entries:
        row = entry.example.row if isinstance(entry, AuditRow) else entry.row
        try:
            text = json.dumps(row, ensure_ascii=True, default=repr)
        except Exception:  # whatever a value that is no plain one raises
            text = _written(entry, row)
        found.update(f"{len(text)} {entry.where} {text}".encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def _written(entry: Entry, row: Any) -> str:
    try:
        return repr(row)
    except Exception as error:  # whatever a value that is no plain one raises
        raise DataError(
            f"{entry.where} holds a value that cannot be written down ({type(error).__name__}: {error}); give texts, "
            "numbers, lists and dicts"
        ) from error


def _score(
    runs: Iterable[list[Entry]],
    found: Sequence[Detector],
    labels: _Labels,
    shards: Shards,
    digests: Sequence[str],
    engine: Engine,
    rows: int,
    clock: _Clock,
) -> None:
    """The second pass, over the shards that are not there yet."""
    clock.stage("scoring", rows)
    changed = StateError("the input changed while it was read; audit it when nothing writes to it")
    seen = shown = 0

    def missing() -> Iterator[Shard]:
        nonlocal seen, shown
        for number, entries in enumerate(runs):
            known = labels.of(entries)
            if number >= len(digests) or _digest(entries, known) != digests[number]:
                raise changed
            seen += 1
            if shards.done(number):
                shown += len(entries)
                clock.show(shown)
                continue
            yield Shard(number, entries, known)

    for shard, table in engine.run(found, missing()):
        shards.put(shard.number, table)
        shown += len(shard.entries)
        clock.show(shown)
    if seen != len(digests):
        raise changed


def _calibrate(found: Sequence[Detector], shards: Shards, rows: int, seed: int) -> Calibration:
    names = [detector.name for detector in found if detector.kind == "harm"]
    step = max(1, math.ceil(rows / SAMPLE))
    kept: dict[str, list[np.ndarray]] = {name: [] for name in [*names, "label"]}
    first = 0
    for table in shards.tables():
        some = np.arange(-first % step, table.num_rows, step)
        first += table.num_rows
        known = table.column("label").to_numpy()
        if step > 1:  # labels are few, and all count
            some = np.union1d(some, np.flatnonzero(~np.isnan(known)))
        some = some[table.column("unread").is_null().to_numpy()[some]]
        for name, parts in kept.items():
            parts.append(table.column(name).to_numpy().astype(np.float64)[some])
    values = {name: np.concatenate(parts or [np.empty(0)]) for name, parts in kept.items()}
    known = {d.name: d.known() for d in found if d.kind == "harm" and isinstance(d, Anchored)}
    return calibrate(
        {name: values[name] for name in names},
        {name: value for name, value in known.items() if value is not None and len(value)},
        labels=values["label"],
        seed=seed,
    )


# after --------------------------------------------------------------------------------------------------------------


def _settings(
    found: Sequence[Detector], limit: int | None, schema: str | None, shard_rows: int, seed: int
) -> dict[str, Any]:
    return {
        "limit": limit,
        "schema": schema,
        "shard_rows": shard_rows,
        "seed": seed,
        "versions": _versions(),
        "detectors": {detector.name: detector.settings() for detector in found},
    }


def _versions() -> dict[str, str]:
    import safe_sched

    found = {"safe-sched": safe_sched.__version__}
    for name in _DEPENDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _names(inputs: Inputs) -> str:
    return ", ".join(source.name for source in inputs.sources)


def _summary(
    table: pa.Table,
    judge: Judge,
    inputs: Inputs,
    bad: tuple[Bad, ...],
    bad_rows: int,
    limit: int | None,
    model: str | None,
    seconds: Mapping[str, float],
) -> Summary:
    scored = table.num_rows - table.column("p_harmful").null_count
    lines = table.num_rows + inputs.bad_lines
    return Summary(
        rows=table.num_rows,
        scored=scored,
        bad_rows=bad_rows,
        bad=bad,
        flagged=int(np.count_nonzero(table.column("is_harmful_issue").fill_null(False).to_numpy())),
        expected_share=judge.share(),
        coverage=scored / lines if lines else 0.0,
        threshold=judge.threshold,
        signals=judge.signals(),
        sources=tuple(source.name for source in inputs.sources),
        seconds=dict(seconds),
        versions=_versions(),
        limited=limit,
        model=model,
        calibration=judge.calibration.about,
    )


class _Clock:
    """How long each stage takes, and what there is to show of it."""

    def __init__(self, progress: Callable[[str, int, int | None], None]) -> None:
        self._progress, self._name, self._total, self._start = progress, "", None, 0.0
        self._seconds: dict[str, float] = {}

    def stage(self, name: str, total: int | None) -> None:
        self.done()
        self._name, self._total, self._start = name, total, time.perf_counter()
        self.show(0)

    def show(self, done: int) -> None:
        self._progress(self._name, done, self._total)

    def done(self) -> dict[str, float]:
        if self._name:
            self._seconds[self._name] = time.perf_counter() - self._start
            self._name = ""
        return self._seconds
