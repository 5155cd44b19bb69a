"""Where the texts of a row stand, in columns and in turns, and how one is put in the place of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from safe_sched.errors import DataError

_ROLES = {"human": "user", "gpt": "assistant"}
_TURN_KEYS = (("role", "content"), ("from", "value"))
_CALLS = ("tool_calls", "function_call")  # what a turn may hold in the place of a text

Place = tuple[str | int, ...]
"""The keys that lead from a row to a text of it."""

Finder = Callable[[Mapping[str, Any]], Sequence[tuple[str, Place]]]
"""Role and place of every text of a row, in reading order; `DataError` where something else stands in one."""

# values -------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value of Arrow as one of Python."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def is_list(value: Any) -> bool:
    """Whether something is a list, a tuple or an array."""
    return isinstance(plain(value), list | tuple | np.ndarray)


def at(value: Any, place: Place) -> Any:
    """What stands in a place."""
    for key in place:
        value = plain(value)[key]
    return plain(value)


def put(value: Any, place: Place, text: str) -> Any:
    """A copy with another text in one place; what is not on the way there is not copied."""
    if not place:
        return text
    value, key = plain(value), place[0]
    inner = put(value[key], place[1:], text)
    if isinstance(value, Mapping):
        return {**value, key: inner}
    changed: Any = value.copy() if isinstance(value, np.ndarray) else list(value)
    changed[key] = inner
    return tuple(changed) if isinstance(value, tuple) else changed


def field_of(place: Place) -> str:
    """A place in words, such as ``messages.2.content``."""
    return ".".join(map(str, place))


def place_of(field: str) -> Place:
    """The inverse of `field_of`."""
    return tuple(int(key) if key.isdecimal() else key for key in field.split("."))


# places -------------------------------------------------------------------------------------------------------------


def in_columns(*roles: tuple[str, str], needed: Sequence[str] = ()) -> Finder:
    """Texts that are columns, each with its role; None is no text."""

    def places(row: Mapping[str, Any]) -> Sequence[tuple[str, Place]]:
        for column in needed:
            if column not in row:
                raise DataError(f"there is no column {column!r}; needed: a text")
        found = [(role, (column,)) for column, role in roles if plain(row.get(column)) is not None]
        for _, place in found:
            if not isinstance(value := at(row, place), str):
                raise DataError(f"{field_of(place)} is a {type(value).__name__}; needed: a text")
        return found

    return places


def in_turns(*columns: str) -> Finder:
    """Texts of turns, in columns that are lists of them."""
    return lambda row: [found for column in columns for found in _turns(column, row)]


def both(first: Finder, second: Finder) -> Finder:
    """The places of one finder, then those of another."""
    return lambda row: [*first(row), *second(row)]


def _turns(column: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    turns = plain(row[column])
    if not is_list(turns):
        raise DataError(f"{column} is a {type(turns).__name__}; needed: a list of turns, each with role and content")
    for number, turn in enumerate(turns):
        turn, place = plain(turn), (column, number)
        if not isinstance(turn, Mapping):
            raise DataError(f"{field_of(place)} is a {type(turn).__name__}; needed: a turn with role and content")
        who, what = next((keys for keys in _TURN_KEYS if turn.get(keys[0]) is not None), _TURN_KEYS[0])
        role = plain(turn.get(who))
        if not isinstance(role, str):
            raise DataError(
                f"{field_of(place)} has the fields {sorted(map(str, turn))}; needed: role and content (or from, value)"
            )
        role = _ROLES.get(role, role)
        content = plain(turn.get(what))
        if isinstance(content, str):
            yield role, (*place, what)
        elif is_list(content):
            yield from ((role, inner) for inner in _pieces(content, (*place, what)))
        elif content is not None:
            raise DataError(
                f"{field_of((*place, what))} is a {type(content).__name__}; needed: a text or a list of parts"
            )
        elif what not in turn and not any(turn.get(key) for key in _CALLS):
            raise DataError(f"{field_of(place)} has the fields {sorted(map(str, turn))}, but no {what!r}")


def _pieces(content: Any, place: Place) -> Iterator[Place]:
    """The texts of a content that is a list of typed parts; images and the like are none."""
    for number, piece in enumerate(content):
        piece = plain(piece)
        if isinstance(piece, str):
            yield (*place, number)
        elif not isinstance(piece, Mapping):
            raise DataError(f"{field_of((*place, number))} is a {type(piece).__name__}; needed: a text or a typed part")
        elif isinstance(text := plain(piece.get("text")), str):
            yield (*place, number, "text")
        elif text is not None or piece.get("type") == "text":
            raise DataError(f"{field_of((*place, number))}.text is a {type(text).__name__}; needed: a text")
