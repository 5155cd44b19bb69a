"""Scoring shards. `score_shard` is a pure function, so that any machine may run it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from safe_sched.audit.findings import COLUMNS
from safe_sched.audit.inputs import Entry
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Detector
from safe_sched.errors import OptionError, PluginError

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


class Engine(Protocol):
    """Runs `score_shard` over many shards, in this process or in others."""

    def run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """Every shard with its scores, in any order; no more shards are taken than are worked on."""
        ...


class LocalEngine:
    """Scores shards in this process, one after the other."""

    def run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """See `Engine.run`."""
        return ((shard, score_shard(detectors, shard)) for shard in shards)


def to_send(shard: Shard) -> Shard:
    """A shard without the tokenizer that its rows were read with: it may be large, and is not needed for scoring."""
    entries = [
        replace(one, example=replace(one.example, tokenizer=None)) if isinstance(one, AuditRow) else one
        for one in shard.entries
    ]
    return replace(shard, entries=entries)


def cannot_be_sent(error: Exception) -> PluginError:
    """The error of an engine that could not pickle a detector or a row for other processes."""
    return PluginError(
        f"a detector or a row cannot be sent to other processes: {type(error).__name__}: {error}. Audit in one "
        "process, leave the detector's plug-in out, or give rows of plain values"
    )


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
    """The scores of every detector for the rows of a shard.

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
