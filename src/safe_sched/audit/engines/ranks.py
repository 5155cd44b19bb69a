"""Scoring in all processes that a launcher has started: ``accelerate launch``, ``torchrun``.

The first process reads, fits, writes and prints, as without a launcher. Of every shard it hands each process a share,
which that process scores with its own copy of the fitted detectors, on its own device. All of them are done with a
shard before the next is given out; shares are every n-th row, so they take about as long.
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

from safe_sched.audit.engines.shard import Shard, light, score_shard
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
        In the first process the engine. In the others None, when they have done all that the first one gave them.

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
            _serve(engine)
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

    Args:
        group: Of processes that can send objects, as gloo can.
    """

    def __init__(self, group: Any) -> None:
        self._group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._lost = False

    def run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """Every shard with its scores, in order.

        Raises:
            PluginError: Another process is gone or has failed, or a detector cannot be sent to it.
            SafeSchedError: Whatever a detector raises.
        """
        self.told(list(detectors))
        for shard in shards:
            self.told(shard.number)
            sent = light(shard)
            shares = [_share(sent, rank, self.size) for rank in range(self.size)]
            found = self.gathered(_scored(detectors, self.handed(shares)))
            yield shard, _joined([_table(rank, one) for rank, one in enumerate(found)])

    def stop(self) -> None:
        """Let the other processes go."""
        if not self._lost:
            with contextlib.suppress(SafeSchedError):
                self.told(None)

    # between the processes, each at the same point -----------------------------------------------------------------

    def told(self, word: Any) -> Any:
        """What the first process has to say: detectors to score with, the number of a shard, or None, to stop."""
        words = [word]
        with self._in_touch():
            dist.broadcast_object_list(words, group_src=0, group=self._group)
        return words[0]

    def handed(self, shares: list[Shard] | None) -> Shard:
        """This process's own share, of those that the first one gives."""
        mine: list[Any] = [None]
        with self._in_touch():
            try:
                dist.scatter_object_list(mine, shares, group_src=0, group=self._group)
            except Exception:  # a row that cannot be pickled: the others wait for it, and would take a stop for it
                self._lost = True
                raise
        return mine[0]

    def gathered(self, found: Any) -> list[Any]:
        """What every process has found, in the first one; none in the others."""
        everything: list[Any] | None = None if self.rank else [None] * self.size
        with self._in_touch():
            dist.gather_object(found, everything, group_dst=0, group=self._group)
        return everything or []

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
            raise PluginError(
                f"a detector or a row cannot be sent to other processes: {type(error).__name__}: {error}. Audit "
                "without a launcher, leave the detector's plug-in out, or give rows of plain values"
            ) from error


def _serve(engine: RankEngine) -> None:
    """Score what the first process hands out, until it says stop."""
    detectors: list[Detector] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process says the same
        while (word := engine.told(None)) is not None:
            if isinstance(word, list):
                detectors = word
            else:
                engine.gathered(_scored(detectors, engine.handed(None)))


def _scored(detectors: Sequence[Detector], share: Shard) -> pa.Table | SafeSchedError | str:
    """The scores of a share, or what went wrong."""
    try:
        return score_shard(detectors, share)
    except SafeSchedError as error:
        return error
    except Exception:  # it is raised in the first process, where all the others have been heard
        return traceback.format_exc()


def _share(shard: Shard, rank: int, size: int) -> Shard:
    """Every size-th row of a shard."""
    return Shard(shard.number, shard.entries[rank::size], shard.labels[rank::size])


def _table(rank: int, found: pa.Table | SafeSchedError | str) -> pa.Table:
    if isinstance(found, SafeSchedError):
        raise found
    if isinstance(found, str):
        raise PluginError(f"process {rank} of the launcher has failed; what is scored is kept. It says:\n{found}")
    return found


def _joined(shares: Sequence[pa.Table]) -> pa.Table:
    """The rows of all shares in the order of the shard.

    Example:
        >>> _joined([pa.table({"row": [0, 2, 4]}), pa.table({"row": [1, 3]})])["row"].to_pylist()
        [0, 1, 2, 3, 4]
    """
    places = np.concatenate([np.arange(table.num_rows) * len(shares) + i for i, table in enumerate(shares)])
    return pa.concat_tables(shares).take(pa.array(places.argsort()))
