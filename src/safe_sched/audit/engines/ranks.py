"""Scoring in all processes that a launcher has started: ``accelerate launch``, ``torchrun``.

The first process reads, fits, writes and prints, as without a launcher. It sends every shard to all processes, and each
scores a share of it with its own copy of the fitted detectors, on its own device. All of them are done with a shard
before the next is sent.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from safe_sched.audit.engines.shard import Shard, cannot_be_sent, score_shard, to_send
from safe_sched.audit.signals import Detector
from safe_sched.errors import OptionError, PluginError, SafeSchedError

_MEETING = timedelta(minutes=10)  # until all processes are there
_PATIENCE = timedelta(days=30)  # of those that wait while the first one reads; one that is lost is noticed at once


def launched() -> bool:
    """Whether a launcher has started this process and others beside it.

    Example:
        >>> launched()
        False
    """
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


@contextlib.contextmanager
def ranks() -> Iterator[RankEngine | None]:
    """The processes of a launcher as one engine.

    Yields:
        In the first process the engine. In the others None, after the first one has stopped them.

    Raises:
        OptionError: There is no launcher, or its processes do not find one another.
        PluginError: The first process is gone.

    Example:
        A script for ``accelerate launch``::

            with ranks() as engine:
                if engine is not None:
                    findings = audit("train.jsonl", model="models/chat", engine=engine)
    """
    with _group() as group:
        engine = RankEngine(group)
        if engine.rank:
            engine.serve()
            yield None
            return
        try:
            yield engine
        finally:
            engine.stop()


@contextlib.contextmanager
def _group() -> Iterator[Any]:
    """A process group on the CPU: that of a program which has one already, or one of our own."""
    if not dist.is_available():
        raise OptionError("this build of torch has no torch.distributed; run without a launcher")
    started = not dist.is_initialized()
    if started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        try:
            dist.init_process_group("gloo", timeout=_MEETING)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OptionError(
                f"the processes of the launcher do not meet ({reason}); start all of them with accelerate launch or "
                "torchrun, or unset WORLD_SIZE"
            ) from error
    try:
        yield dist.new_group(backend="gloo", timeout=_PATIENCE)
    finally:
        if started:
            with contextlib.suppress(RuntimeError):  # a process that is lost cannot take leave
                dist.destroy_process_group()


class RankEngine:
    """Scores shards in all processes of a group; see `ranks`, which makes it.

    The first process broadcasts one message after the other: the fitted detectors, shards, and at the end None. To a
    shard every process answers with the scores of its share, every ``size``-th row.

    Args:
        group: Processes that can send objects, as gloo can.
    """

    def __init__(self, group: Any) -> None:
        self._group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._lost = False

    def run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """Every shard with its scores, in order.

        Raises:
            PluginError: Another process is gone or has failed, or a detector or a row cannot be sent to it.
            SafeSchedError: Whatever a detector raises.
        """
        self._message(list(detectors))
        for shard in shards:
            found = self._answers(self._scored(detectors, self._message(to_send(shard))))
            yield shard, joined([_table(rank, one) for rank, one in enumerate(found)])

    def serve(self) -> None:
        """Answer the first process, until it sends None."""
        detectors: list[Detector] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first process gives the same warnings
            while (message := self._message(None)) is not None:
                if isinstance(message, Shard):
                    self._answers(self._scored(detectors, message))
                else:
                    detectors = message

    def stop(self) -> None:
        """Let the other processes go."""
        if not self._lost:
            with contextlib.suppress(SafeSchedError):
                self._message(None)

    def _message(self, message: Any) -> Any:
        """The message of the first process, in all of them."""
        messages = [message]
        with self._in_touch():
            dist.broadcast_object_list(messages, group_src=0, group=self._group)
        return messages[0]

    def _answers(self, answer: Any) -> list[Any]:
        """The answers of all processes, in the first one; none in the others."""
        answers: list[Any] | None = None if self.rank else [None] * self.size
        with self._in_touch():
            dist.gather_object(answer, answers, group_dst=0, group=self._group)
        return answers or []

    def _scored(self, detectors: Sequence[Detector], shard: Shard) -> pa.Table | SafeSchedError | str:
        """The scores of this process's share, or what went wrong."""
        try:
            return score_shard(detectors, share_of(shard, self.rank, self.size))
        except SafeSchedError as error:
            return error
        except Exception:  # it is raised in the first process, where all the others have been heard
            return traceback.format_exc()

    @contextlib.contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            reason = " ".join(str(error).split())[-200:]
            raise PluginError(
                f"another process of the launcher is gone ({reason}). Look at its messages and at the memory of its "
                "machine; what is scored is kept, go on with --resume"
            ) from error
        except Exception as error:  # whatever a foreign object raises while it is pickled
            raise cannot_be_sent(error) from error


def share_of(shard: Shard, rank: int, size: int) -> Shard:
    """Every size-th row of a shard."""
    return Shard(shard.number, shard.entries[rank::size], shard.labels[rank::size])


def joined(shares: Sequence[pa.Table]) -> pa.Table:
    """The rows of all shares in the order of the shard.

    Example:
        >>> joined([pa.table({"row": [0, 2, 4]}), pa.table({"row": [1, 3]})])["row"].to_pylist()
        [0, 1, 2, 3, 4]
    """
    places = np.concatenate([np.arange(table.num_rows) * len(shares) + i for i, table in enumerate(shares)])
    return pa.concat_tables(shares).take(pa.array(places.argsort()))


def _table(rank: int, found: pa.Table | SafeSchedError | str) -> pa.Table:
    if isinstance(found, SafeSchedError):
        raise found
    if isinstance(found, str):
        raise PluginError(f"process {rank} of the launcher has failed; what is scored is kept. It says:\n{found}")
    return found
