"""Scoring shards on the machines of a Ray cluster, or on the cores of this one.

The rows are read in one place, where their numbers and the fits are made, and go out in shards; every worker runs the
same `audit.engines.shard.score_shard` on a copy of the fitted detectors. So the results are those of one process.
As many shards are under way as the workers need to stay busy, however many there are.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from safe_sched.audit.engines.shard import Shard, cannot_be_sent, score_shard, to_send
from safe_sched.audit.signals import Detector
from safe_sched.errors import OptionError, PluginError

AHEAD = 2
"""Shards per worker that are under way: one is scored, and the next is there when it is done."""

RETRIES = 2
"""How often a shard is given out again, and a worker started again, after a machine was lost."""


class RayEngine:
    """Scores shards with Ray, which is a package of its own: the extra ``ray``.

    Where ``RAY_ADDRESS`` names a cluster, or the program has connected to one, that is used; its machines need the same
    versions of safe-sched and of plug-ins. Else Ray is started on this machine, and stopped again.

    Args:
        workers: Processes that score, >= 1; None: one per CPU (or per ``gpus``) that the cluster has.
        gpus: GPUs that each of them needs, >= 0; below 1: workers share one.

    Raises:
        OptionError: A value is out of range, or Ray is not installed.
    """

    def __init__(self, workers: int | None = None, *, gpus: float = 0) -> None:
        if workers is not None and workers < 1:
            raise OptionError(f"workers={workers}; allowed: a whole number >= 1, or None")
        if not gpus >= 0:
            raise OptionError(f"gpus={gpus}; allowed: a number >= 0")
        self._ray, self._workers, self._gpus = _ray(), workers, gpus

    def run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        """Every shard with its scores, in the order in which they get done.

        Raises:
            PluginError: Workers were lost again and again, or a detector cannot be sent to them.
            SafeSchedError: Whatever a detector raises.
        """
        ray, started = self._ray, not self._ray.is_initialized()
        if started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network that nobody asked for
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            yield from self._run(detectors, shards)
        finally:
            if started:
                ray.shutdown()

    def _run(self, detectors: Sequence[Detector], shards: Iterable[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
        ray = self._ray
        try:
            fitted = ray.put(list(detectors))
        except Exception as error:  # whatever a foreign object raises while it is pickled
            raise cannot_be_sent(error) from error
        remote = ray.remote(num_cpus=1, num_gpus=self._gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(_Worker)
        workers = [remote.remote(fitted) for _ in range(self._workers or self._as_many_as_fit())]
        free = workers * AHEAD  # a worker stands in it once for every shard that it can take
        waiting: dict[Any, tuple[Shard, Any]] = {}
        rows = iter(shards)
        try:
            while True:
                while free and (shard := next(rows, None)) is not None:
                    worker = free.pop()
                    waiting[worker.score.remote(to_send(shard))] = (shard, worker)
                if not waiting:
                    return
                (done, *_), _ = ray.wait(list(waiting), num_returns=1)
                shard, worker = waiting.pop(done)
                free.insert(0, worker)
                yield shard, self._get(done)
        finally:
            for worker in workers:
                ray.kill(worker)

    def _get(self, done: Any) -> pa.Table:
        try:
            return self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(getattr(error, "cause", None), Exception) else error from error
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-400:]  # the end of a traceback says most
            raise PluginError(
                f"a worker of Ray was lost, and those in its place too ({type(error).__name__}: ... {reason}). Look at "
                "the memory of its machine, and at whether it has the same packages; what is scored is kept"
            ) from error

    def _as_many_as_fit(self) -> int:
        has = self._ray.cluster_resources()
        places = has.get("GPU", 0) / self._gpus if self._gpus else has.get("CPU", 1)
        return max(1, int(places))


class _Worker:
    """A process that scores, with its copy of the detectors."""

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self._detectors = detectors

    def score(self, shard: Shard) -> pa.Table:
        return score_shard(self._detectors, shard)


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise OptionError("engine='ray' takes Ray: pip install 'safe-sched[ray]'") from error
