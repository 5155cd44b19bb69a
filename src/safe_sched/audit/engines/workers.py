"""Processes of this machine that score shards, each with its own copy of the fitted detectors.

They are started as programs of their own, which import this package and nothing of the program that asks: so a script
needs no ``if __name__ == "__main__"``, and no thread or lock is copied. What goes through the pipes is read by nobody
else. A process that ends is noticed at once, for its pipe ends with it; and so is the end of this process by them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from safe_sched.audit.engines.shard import Shard, light, score_shard
from safe_sched.audit.signals import Detector
from safe_sched.errors import DataError, OptionError, PluginError

AHEAD = 2
"""Shards per process that are under way: one is scored, and the next is there when it is done."""

_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from safe_sched.audit.engines.workers import serve; serve()"  # noqa: E501
_LENGTH = struct.Struct("<Q")


class Workers:
    """Some processes, which get ready while this one goes on.

    Args:
        count: How many, >= 1.

    Raises:
        OptionError: They cannot be started.
    """

    def __init__(self, count: int) -> None:
        self.count, self.ahead = count, AHEAD
        self._given: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Shard | None, Any]] = queue.SimpleQueue()
        self._all: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        try:
            self._all.extend(_Worker(f"{number + 1} of {count}") for number in range(count))
        except OSError as error:
            self.close()
            raise OptionError(f"{count} processes cannot be started ({error}); give a smaller processes=") from error

    def equip(self, detectors: Sequence[Detector]) -> None:
        """Give every process its copy of the fitted detectors.

        Raises:
            PluginError: A detector cannot be sent.
        """
        try:
            fitted = pickle.dumps(list(detectors), protocol=5)
        except Exception as error:  # whatever a foreign object raises while it is pickled
            raise PluginError(
                f"a detector cannot be sent to other processes: {type(error).__name__}: {error}. Audit with "
                "processes=1, or leave its plug-in out"
            ) from error
        for worker in self._all:
            thread = threading.Thread(target=self._tend, args=(worker, fitted), daemon=True)
            thread.start()
            self._threads.append(thread)

    def give(self, shard: Shard) -> None:
        """Have a shard scored."""
        self._given.put(shard)

    def take(self) -> tuple[Shard, pa.Table]:
        """A shard that is done; waits for one.

        Raises:
            PluginError: A process is gone.
            SafeSchedError: Whatever a detector raises.
        """
        shard, found = self._done.get()
        if isinstance(found, BaseException):
            raise found
        assert shard is not None
        return shard, found

    def close(self) -> None:
        """Stop the processes, whatever they do."""
        for _ in self._threads:
            self._given.put(None)
        for worker in self._all:
            worker.stop()
        for thread in self._threads:
            thread.join()
        for worker in self._all:
            worker.forget()

    def _tend(self, worker: _Worker, fitted: bytes) -> None:
        """In a thread of its own: hand one process shard after shard."""
        shard: Shard | None = None
        try:
            worker.send(fitted)
            while (shard := self._given.get()) is not None:
                worker.send(_pickled(shard))
                self._done.put((shard, pickle.loads(worker.receive())))
        except BaseException as error:  # raised again where the shards are taken
            lost = worker.lost(shard) if isinstance(error, OSError | EOFError) else error
            self._done.put((shard, lost))


def _pickled(shard: Shard) -> bytes:
    try:
        return pickle.dumps(light(shard), protocol=5)
    except Exception as error:  # whatever a foreign object in a row raises
        raise DataError(
            f"the rows of shard {shard.number} cannot be sent to other processes: {type(error).__name__}: {error}. "
            "Give rows of plain values, or audit with processes=1"
        ) from error


class _Worker:
    """One process, from this side."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            # -P: a module in the working folder, such as a json.py beside the data, must not be imported
            [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the process that was started by hand; it stops this one
        )

    def send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        _write(self._process.stdin, data)

    def receive(self) -> bytes:
        assert self._process.stdout is not None
        return _read(self._process.stdout)

    def lost(self, shard: Shard | None) -> PluginError:
        """Why it is gone, in words."""
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._said.seek(0)
        said = " ".join(self._said.read().decode("utf-8", "replace").split())[-300:]
        on = "" if shard is None else f" while it scored shard {shard.number}"
        return PluginError(
            f"process {self._name} (pid {self._process.pid}) {how}{on}{': ... ' + said if said else ''}. Where memory "
            "is short, give fewer processes; what is scored is kept, go on with resume"
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):  # what was written last does not get there any more
                if stream is not None:
                    stream.close()


# in the other process -----------------------------------------------------------------------------------------------


def serve() -> None:
    """Score what comes in by standard input, until it ends."""
    given, scores = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a detector prints must not be taken for scores
    import safe_sched.audit.detectors  # noqa: F401  # so that it is there when the first detectors come

    try:
        detectors = pickle.loads(_read(given))
        while True:
            _write(scores, _scored(detectors, pickle.loads(_read(given))))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is left to score for


def _scored(detectors: Sequence[Detector], shard: Shard) -> bytes:
    try:
        return pickle.dumps(score_shard(detectors, shard), protocol=5)
    except Exception as error:  # raised again by the process that asked
        try:
            found = pickle.dumps(error)
            pickle.loads(found)
        except Exception:  # an exception that cannot be sent
            return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return found


def _write(stream: Any, data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _read(stream: BinaryIO | Any) -> bytes:
    size = stream.read(_LENGTH.size)
    if len(size) < _LENGTH.size:
        raise EOFError
    data = stream.read(_LENGTH.unpack(size)[0])
    if len(data) < _LENGTH.unpack(size)[0]:
        raise EOFError
    return data
