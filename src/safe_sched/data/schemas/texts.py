"""Where the texts of a row are, in columns and in turns, and how another text is put in the place of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from safe_sched.errors import DataError

ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant"}
"""Other names of the roles."""

TURN_KEYS = (("role", "content"), ("from", "value"))
"""What a turn calls its role and its text."""

_CALLS = ("tool_calls", "function_call")  # what a turn may hold instead of a text

Place = tuple[str | int, ...]
"""The keys that lead from a row to a text of it."""

# values -------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value of Arrow as one of Python."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def is_list(value: Any) -> bool:
    """Whether a value is a list, a tuple or an array."""
    return isinstance(plain(value), list | tuple | np.ndarray)


def at(value: Any, place: Place) -> Any:
    """The value in a place."""
    for key in place:
        value = plain(value)[key]
    return plain(value)


def put(value: Any, place: Place, text: str) -> Any:
    """A copy with another text in one place; only what leads there is copied."""
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
    """A place as one string, such as ``messages.2.content``."""
    return ".".join(map(str, place))


def place_of(field: str) -> Place:
    """The inverse of `field_of`."""
    return tuple(int(key) if key.isdecimal() else key for key in field.split("."))


# places -------------------------------------------------------------------------------------------------------------


def column_places(row: Mapping[str, Any], roles: Mapping[str, str]) -> Iterator[tuple[str, Place]]:
    """Role and place of the texts that are columns; None counts as absent.

    Args:
        row: A row.
        roles: Columns and the roles of their texts, in reading order.

    Raises:
        DataError: A column is not a text.
    """
    for column, role in roles.items():
        if (value := plain(row.get(column))) is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{column} is a {type(value).__name__}; needed: a text")
        yield role, (column,)


def turn_places(row: Mapping[str, Any], column: str) -> Iterator[tuple[str, Place]]:
    """Role and place of the texts of a list of turns.

    Raises:
        DataError: The column is not a list of turns, or a turn has neither a text nor a call.
    """
    turns = plain(row[column])
    if not is_list(turns):
        raise DataError(f"{column} is a {type(turns).__name__}; needed: a list of turns, each with role and content")
    for number, turn in enumerate(turns):
        turn, place = plain(turn), (column, number)
        if not isinstance(turn, Mapping):
            raise DataError(f"{field_of(place)} is a {type(turn).__name__}; needed: a turn with role and content")
        who, what = next((keys for keys in TURN_KEYS if turn.get(keys[0]) is not None), TURN_KEYS[0])
        role = plain(turn.get(who))
        if not isinstance(role, str):
            raise DataError(
                f"{field_of(place)} has the fields {sorted(map(str, turn))}; needed: role and content (or from, value)"
            )
        role = ROLES.get(role, role)
        content = plain(turn.get(what))
        if isinstance(content, str):
            yield role, (*place, what)
        elif is_list(content):
            yield from ((role, inner) for inner in _piece_places(content, (*place, what)))
        elif content is not None:
            raise DataError(
                f"{field_of((*place, what))} is a {type(content).__name__}; needed: a text or a list of parts"
            )
        elif what not in turn and not any(turn.get(key) for key in _CALLS):
            raise DataError(f"{field_of(place)} has the fields {sorted(map(str, turn))}, but no {what!r}")


def _piece_places(content: Any, place: Place) -> Iterator[Place]:
    """The texts of a content that is a list of typed parts; images and the like have none."""
    for number, piece in enumerate(content):
        piece, here = plain(piece), (*place, number)
        if isinstance(piece, str):
            yield here
        elif not isinstance(piece, Mapping):
            raise DataError(f"{field_of(here)} is a {type(piece).__name__}; needed: a text or a typed part")
        elif isinstance(text := plain(piece.get("text")), str):
            yield (*here, "text")
        elif text is not None or piece.get("type") == "text":
            raise DataError(f"{field_of(here)}.text is a {type(text).__name__}; needed: a text")
