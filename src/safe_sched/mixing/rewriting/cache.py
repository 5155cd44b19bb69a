"""Replies that were paid for, on disk: one SQLite file, by the content hash of the request.

A reply is written as soon as it is there, so a run that is killed goes on where it was, and pays twice for no reply
that had arrived. What is kept is what the model said, not what the checks made of it: other checks need no new replies.
The file holds replies and their sizes, but no request, no key and no address of a server.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from safe_sched.errors import StateError
from safe_sched.generation import TextReply

FORMAT = 1
_APPLICATION = 0x73667273  # in the file's header: a database of another program is not written to
_PATIENCE = 30.0  # seconds to wait for another process


class ReplyCache:
    """Replies by the hash of their request (`safe_sched.mixing.rewriting.request.key_of`); a context manager.

    Several processes may use one file. Of two that ask the same at the same time both pay, and the first reply counts
    for both.

    Args:
        path: The file, made where there is none, for its owner only; None keeps the replies in memory.

    Raises:
        StateError: The file cannot be written, is damaged, or belongs to another program or version.

    Example:
        >>> with ReplyCache(None) as cache:
        ...     _ = cache.put("a1", TextReply('{"prompt": "Hi"}', input_tokens=9))
        ...     cache.get("a1"), cache.get("b2")
        (TextReply(text='{"prompt": "Hi"}', problem=None, input_tokens=9, output_tokens=None), None)
    """

    def __init__(self, path: Path | None) -> None:
        self._name = ":memory:" if path is None else str(path)
        with self._errors_named():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):  # SQLite would make it readable to everybody
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            # every statement is its own transaction
            self._file = sqlite3.connect(self._name, timeout=_PATIENCE, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._file.close()
                raise

    def _prepare(self) -> None:
        self._file.execute("PRAGMA trusted_schema = OFF")
        self._file.execute("BEGIN IMMEDIATE")  # two processes may make the file at the same time
        (application,) = self._file.execute("PRAGMA application_id").fetchone()
        (version,) = self._file.execute("PRAGMA user_version").fetchone()
        (tables,) = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not application:
            self._file.execute(
                "CREATE TABLE replies (key TEXT PRIMARY KEY, text TEXT, problem TEXT, input_tokens INTEGER, "
                "output_tokens INTEGER) WITHOUT ROWID"
            )
            self._file.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._file.execute(f"PRAGMA user_version = {FORMAT}")
        elif (application, version) != (_APPLICATION, FORMAT):
            raise StateError(
                f"{self._name} is a database, but no cache of this version (application {application:#x}, format "
                f"{version}; needed: {_APPLICATION:#x}, {FORMAT}). Name another file as cache."
            )
        self._file.execute("COMMIT")

    def get(self, key: str) -> TextReply | None:
        """The reply to a request, None where there is none yet.

        Raises:
            StateError: The file is damaged.
        """
        with self._errors_named():
            found = self._file.execute(
                "SELECT text, problem, input_tokens, output_tokens FROM replies WHERE key = ?", (key,)
            ).fetchone()
            if found is None:
                return None
            text, problem, *tokens = found
            if not (isinstance(text, str | None) and isinstance(problem, str | None)) or (text is None) == (
                problem is None
            ):
                raise sqlite3.DatabaseError("a reply in it is none")
            return TextReply(text, problem, *(count if isinstance(count, int) else None for count in tokens))

    def put(self, key: str, reply: TextReply) -> TextReply:
        """Keep a reply, and give the one that counts: an earlier one where another process was first.

        Raises:
            StateError: The file cannot be written.
        """
        values = (key, reply.text, reply.problem, reply.input_tokens, reply.output_tokens)
        with self._errors_named():
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", values)
        return self.get(key) or reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StateError(
                f"the cache {self._name} cannot be used: {error}. Name another file, or delete it: what it holds is "
                "asked for again."
            ) from error
