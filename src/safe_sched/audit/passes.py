"""The two passes of an audit over its rows, and the fit between what they gave and a probability."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from safe_sched.audit.calibration.calibrate import FileCalibration, calibrate
from safe_sched.audit.engines.shard import Engine, Shard
from safe_sched.audit.inputs import Entry, Inputs
from safe_sched.audit.labels import KnownLabels
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.shards import Shards
from safe_sched.audit.signals import Anchored, Contrasted, Detector, absolute
from safe_sched.errors import DataError, PluginError, StateError

SAMPLE = 200_000
"""Rows that the calibration is fitted to, at most; evenly spread ones of larger inputs."""


def observe(
    inputs: Inputs, found: Sequence[Detector], labels: KnownLabels, size: int, clock: Clock
) -> tuple[int, list[str]]:
    """The first pass: how many rows there are, and a digest of the rows of every shard."""
    clock.stage("reading", None)
    rows, known, digests = 0, 0, []
    for entries in inputs.shards(size):
        readable = [entry for entry in entries if isinstance(entry, AuditRow)]
        if readable:
            for detector in found:
                detector.observe(readable)
        rows += len(entries)
        told = labels.of(entries)
        known += int(np.count_nonzero(~np.isnan(told)))
        digests.append(_digest(entries, told))
        clock.show(rows)
    if rows:
        labels.require(rows, known, inputs.limit)
    clock.stage("fitting", None)
    for detector in found:
        detector.ready()
    return rows, digests


_written_json = json.JSONEncoder(ensure_ascii=True, default=repr).encode


def _digest(entries: Sequence[Entry], labels: np.ndarray) -> str:
    """Of all that the scores of a shard may depend on."""
    found = hashlib.blake2b(labels.tobytes(), digest_size=16)
    for entry in entries:
        row = entry.example.row if isinstance(entry, AuditRow) else entry.row
        try:
            text = _written_json(row)
        except Exception:  # whatever a value that is no plain one raises
            text = _written(entry, row)
        if isinstance(entry, AuditRow) and entry.example.tokenizer is not None:  # another one makes other texts
            text = f"{text} {entry.system}\0{entry.prompt}\0{entry.answer}"
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


def score(
    runs: Iterable[list[Entry]],
    found: Sequence[Detector],
    labels: KnownLabels,
    shards: Shards,
    digests: Sequence[str],
    engine: Engine,
    rows: int,
    clock: Clock,
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


def calibrated(found: Sequence[Detector], shards: Shards, rows: int, seed: int) -> FileCalibration:
    """What turns the scores into a probability, fitted to those of at most `SAMPLE` rows."""
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
    harmless = {d.name: d.known_harmless() for d in found if d.kind == "harm" and isinstance(d, Contrasted)}
    there = [
        {name: value for name, value in one.items() if value is not None and len(value)} for one in (known, harmless)
    ]
    for name, value in (pair for one in there for pair in one.items()):
        if np.ndim(value) != 1 or np.isinf(value).any():
            raise PluginError(
                f"the detector {name!r} gave known rows of the shape {np.shape(value)}, or an infinite value; allowed: "
                "one number per known row, or nan"
            )
    return calibrate(
        {name: values[name] for name in names},
        *there,
        absolute=[detector.name for detector in found if detector.kind == "harm" and absolute(detector)],
        labels=values["label"],
        seed=seed,
    )


class Clock:
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
