"""Strict JSON, and the objects of a JSON list of any length.

Refused beyond what is malformed: a duplicate key (one of its values would be lost), NaN and Infinity, and numbers too
large for a double (they would become Infinity).
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from safe_sched.data.kinds import CHUNK, MAX_ROW

_SPACE = re.compile(r"[ \t\n\r]*")
_BROKEN = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are no UTF-8
_CUT = 16  # characters before the end of the text read so far in which an error may come of the cut


class Unreadable(ValueError):
    """Something is not JSON.

    Attributes:
        at: Where in the text, in characters.
    """

    def __init__(self, reason: str, at: int = 0) -> None:
        super().__init__(reason)
        self.at = at


class StrictDecoder(json.JSONDecoder):
    """Reads JSON and notes what it would have to lose."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._number)
        self.problem: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.problem = f"duplicate key {twice[:40]!r}"
        return found

    def _constant(self, name: str) -> float:
        self.problem = f"{name} is not JSON; write null or a text"
        return math.nan

    def _number(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self.problem = f"the number {digits[:40]} is too large for a double"
        return number

    def one(self, text: str, at: int = 0) -> tuple[Any, int]:
        """One value, and where it ends.

        Raises:
            Unreadable: It is not JSON. What else is wrong with it is in ``problem``.
        """
        self.problem = None
        try:
            value, end = self.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise Unreadable(f"not JSON ({error.msg})", error.pos) from error
        except RecursionError:
            raise Unreadable("nested too deep", at) from None
        except ValueError as error:  # a whole number of thousands of digits
            raise Unreadable(f"not JSON ({error})", at) from error
        return value, end

    def line(self, text: str) -> Any:
        """The one value of a text.

        Raises:
            Unreadable: It is not JSON, or there is more behind it.

        Example:
            >>> StrictDecoder().line('{"a": 1, "a": 2}')
            Traceback (most recent call last):
            ...
            safe_sched.data.strict_json.Unreadable: duplicate key 'a'
        """
        value, end = self.one(text, _space(text, 0))
        if (end := _space(text, end)) != len(text):
            raise Unreadable("not JSON (Extra data)", end)
        if self.problem is not None:
            raise Unreadable(self.problem)
        return value


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


class NotAList(ValueError):
    """A JSON text is something else than a list of objects."""


class JsonList:
    """The objects of a JSON list, read piece by piece.

    pyarrow reads no JSON lists, and the reader of datasets takes the whole file into memory; neither knows the line of
    a value or refuses a duplicate key.

    Args:
        stream: Bytes, in UTF-8.

    Attributes:
        line: Where the last value began, or where reading failed, counted from 1.
    """

    def __init__(self, stream: Any) -> None:
        self.line = 1
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self._text, self._at, self._counted, self._ended = "", 0, 0, False

    def __iter__(self) -> Iterator[tuple[Any, str | None]]:
        """Each value, and what is wrong with it.

        Raises:
            NotAList: The text is no list.
            Unreadable: It is not JSON, and what follows cannot be read.
        """
        decoder = StrictDecoder()
        if self._next() != "[":
            raise NotAList(self._text[self._at : self._at + 1])
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            while True:
                self._next()
                self._mark(self._at)
                value, end = self._value(decoder)
                broken = _BROKEN.search(self._text, self._at, end)
                self._at = end
                yield value, "not UTF-8 text" if broken else decoder.problem
                separator = self._next()
                self._at += 1
                if separator == "]":
                    break
                if separator != ",":
                    self._mark(self._at - 1)
                    raise Unreadable(
                        "not JSON (it breaks off)" if not separator else "not JSON (Expecting ',' delimiter)"
                    )
        if self._next():
            self._mark(self._at)
            raise Unreadable("not JSON (there is more behind the list)")

    def _value(self, decoder: StrictDecoder) -> tuple[Any, int]:
        size = CHUNK
        while True:
            try:
                value, end = decoder.one(self._text, self._at)
            except Unreadable as error:
                cut = "Unterminated" in str(error) or error.at > len(self._text) - _CUT
                if self._ended or not cut or len(self._text) - self._at > MAX_ROW:
                    self._mark(error.at)
                    raise
            else:
                if self._ended or end < len(self._text):  # a number might go on
                    return value, end
            self._more(size)
            size *= 2

    def _next(self) -> str:
        """The next character that is no space, "" at the end."""
        while (at := _space(self._text, self._at)) == len(self._text) and not self._ended:
            self._at = at
            self._more(CHUNK)
        self._at = at
        return self._text[at : at + 1]

    def _more(self, size: int) -> None:
        chunk = self._stream.read(size)
        self._ended = not chunk
        self._mark(self._at)
        self._text = self._text[self._at :] + self._decode(chunk, self._ended)
        self._at = self._counted = 0

    def _mark(self, at: int) -> None:
        """Count the lines up to here."""
        if at > self._counted:
            self.line += self._text.count("\n", self._counted, at)
            self._counted = at
