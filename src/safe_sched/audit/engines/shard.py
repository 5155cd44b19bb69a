"""Scoring shards. `score_shard` is a pure function, so that any machine may run it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import pyarrow as pa

from safe_sched.audit.findings import COLUMNS
from safe_sched.audit.inputs import Entry
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Detector, travels
from safe_sched.errors import OptionError, PluginError

if TYPE_CHECKING:
    from safe_sched.audit.engines.workers import Workers

MANY = 15_000
"""Rows from which on several processes are quicker than one."""

MOST = 4
"""Processes that score where nobody says how many: the one that reads keeps no more of them busy."""

REASON, GROUP = "reason", "group"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")


@dataclass(frozen=True)
class Shard:
    """A run of rows.

    Attributes:
        number: Its place among the shards, from 0.
        entries: Its rows, those that could not be read among them.
        labels: float32 (rows,): 1 for a row that is known to be harmful, 0 for one known not to be, else nan.
    """

    number: int
    entries: Sequence[Entry]
    labels: np.ndarray


def light(shard: Shard) -> Shard:
    """A shard without the tokenizer that its rows were read with, which may be large, and has done its work."""
    if not any(isinstance(one, AuditRow) and one.example.tokenizer is not None for one in shard.entries):
        return shard
    entries = [
        replace(one, example=replace(one.example, tokenizer=None)) if isinstance(one, AuditRow) else one
        for one in shard.entries
    ]
    return Shard(shard.number, entries, shard.labels)


class Engine(Protocol):
    """What runs `score_shard` over many shards, here or elsewhere."""

    def run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """Every shard with its scores, in any order; no more shards are taken than are worked on."""
        ...


class LocalEngine:
    """On this machine: in this process, or in several.

    Detectors that say ``travels = True`` are copied into each process. Others, which may hold a model or a device, stay
    in this one. The numbers are the same, however many processes there are.

    Args:
        processes: That score, >= 1. None: one per core, `MOST` at most, where there are `MANY` rows, so that starting
            them pays; else this one alone.

    Raises:
        OptionError: ``processes`` is out of range.
    """

    def __init__(self, processes: int | None = 1) -> None:
        if processes is not None and processes < 1:
            raise OptionError(f"processes={processes}; allowed: a whole number >= 1, or None")
        self._processes = processes
        self._workers: Workers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, detectors: Sequence[Detector], rows: int) -> None:
        """Start the processes as soon as that pays, so that they are there when the detectors are fitted.

        Args:
            detectors: That are going to score.
            rows: As many have been read so far.
        """
        if self._workers is not None or not any(travels(one) for one in detectors):
            return
        count = self._processes or (min(_cores(), MOST) if rows >= MANY else 1)
        if count > 1:
            from safe_sched.audit.engines.workers import Workers

            self._workers = Workers(count)

    def run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """See `Engine.run`.

        Raises:
            PluginError: A process is gone, or a detector cannot be sent to it.
        """
        self.prepare(detectors, 0)
        try:
            if self._workers is None:
                yield from ((shard, score_shard(detectors, shard)) for shard in shards)
            else:
                yield from self._run(self._workers, detectors, shards)
        finally:
            self.close()

    def _run(
        self, workers: Workers, detectors: Sequence[Detector], shards: Iterable[Shard]
    ) -> Iterator[tuple[Shard, pa.Table]]:
        stay = [one for one in detectors if not travels(one)]
        workers.equip([one for one in detectors if travels(one)])
        here: dict[int, pa.Table] = {}

        def taken() -> tuple[Shard, pa.Table]:
            shard, scores = workers.take()
            return shard, _joined(detectors, scores, here.pop(shard.number))

        under_way = 0
        for shard in shards:
            workers.give(shard)
            here[shard.number] = score_shard(stay, shard)
            under_way += 1
            if under_way == workers.count * workers.ahead:
                yield taken()
                under_way -= 1
        for _ in range(under_way):
            yield taken()

    def close(self) -> None:
        """Stop the processes, if there are any."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def _joined(detectors: Sequence[Detector], *parts: pa.Table) -> pa.Table:
    """The columns of one shard that were made in several places, as `score_shard` orders them."""
    columns = {name: part.column(name) for part in parts for name in part.column_names}
    own = {f"{one.name}{what}" for one in detectors for what in ("", f":{REASON}", f":{GROUP}")}
    first = [name for name in columns if name not in own]
    names = [f"{one.name}{what}" for one in detectors for what in ("", f":{REASON}", f":{GROUP}")]
    return pa.table({name: columns[name] for name in [*first, *names]})


def require_names(detectors: Sequence[Detector]) -> None:
    """Stop unless every detector has a name of its own that can be a column.

    Raises:
        OptionError: Two have one name.
        PluginError: A name cannot be a column.
    """
    taken = {name for name, _ in COLUMNS} | {"label"}
    seen: set[str] = set()
    for detector in detectors:
        if not _NAME.match(detector.name) or detector.name in taken:
            raise PluginError(
                f"a detector ({type(detector).__module__}) is named {detector.name!r}; allowed: lower case letters, "
                f"digits and _, and none of {', '.join(sorted(taken))}"
            )
        if detector.name in seen:
            raise OptionError(f"two detectors are named {detector.name!r}; leave one out")
        seen.add(detector.name)


def score_shard(detectors: Sequence[Detector], shard: Shard) -> pa.Table:
    """What every detector says of the rows of a shard.

    Args:
        detectors: Fitted to the whole input.
        shard: Some rows of it.

    Returns:
        One line per row: ``row``, ``where``, ``unread`` (why it could not be, or None), ``label``, and for every
        detector its value under its name, null where it has nothing to say, with ``<name>:reason``, ``<name>:group``.

    Raises:
        PluginError: A detector gave something else than one value, reason and group per row.
    """
    entries = shard.entries
    places = [place for place, entry in enumerate(entries) if isinstance(entry, AuditRow)]
    rows = [entry for entry in entries if isinstance(entry, AuditRow)]
    columns: dict[str, pa.Array] = {
        "row": pa.array([entry.number for entry in entries], pa.int64()),
        "where": pa.array([entry.where for entry in entries], pa.string()),
        "unread": pa.array([None if isinstance(entry, AuditRow) else entry.reason for entry in entries], pa.string()),
        "label": pa.array(shard.labels, pa.float32(), mask=np.isnan(shard.labels)),
    }
    for detector in detectors:
        values = np.full(len(entries), np.nan, np.float32)
        said: dict[str, list[str | None]] = {REASON: [None] * len(entries), GROUP: [None] * len(entries)}
        if rows:
            found = detector.score(rows)
            value = np.asarray(found.value, np.float32)
            if value.shape != (len(rows),) or not len(found.reasons) == len(found.group) == len(rows):
                raise PluginError(
                    f"the detector {detector.name!r} gave {value.shape} values, {len(found.reasons)} reasons and "
                    f"{len(found.group)} groups for {len(rows)} rows; needed: one each per row"
                )
            if np.isinf(value).any():
                raise PluginError(f"the detector {detector.name!r} gave an infinite value; allowed: numbers, or nan")
            values[places] = value
            for place, reason, group in zip(places, found.reasons, found.group, strict=True):
                said[REASON][place], said[GROUP][place] = reason, group
        columns[detector.name] = pa.array(values, pa.float32(), mask=np.isnan(values))
        for what, texts in said.items():
            columns[f"{detector.name}:{what}"] = pa.array(texts, pa.string())
    return pa.table(columns)
