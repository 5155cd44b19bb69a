"""Safety rows in the schema of other rows, and otherwise as they are: what a mix does without mimicry."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safe_sched.data.schemas import SCHEMAS, Example, read
from safe_sched.errors import DataError

_TURNS = {"messages": "messages", "sharegpt": "conversations"}
_SHAREGPT = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    text: str


def turns_of(example: Example) -> list[Turn]:
    r"""The turns of a row: texts of one role that stand together are one turn, with an empty line between them.

    Example:
        >>> turns_of(read({"instruction": "Add.", "input": "1, 2", "output": "3"}))
        [Turn(role='user', text='Add.\n\n1, 2'), Turn(role='assistant', text='3')]
    """
    groups = itertools.groupby(example.parts, key=lambda part: part.role)
    return [Turn(role, "\n\n".join(part.text for part in group if part.text)) for role, group in groups]


class Converter:
    """Puts rows of any schema into the schema of some rows.

    Args:
        rows: Some rows of the target; the first one of the schema says which columns there are.
        schema: Their schema.

    Raises:
        DataError: There are no rows, or the schema has no place for a prompt and an answer.

    Example:
        >>> convert = Converter([{"id": 1, "instruction": "Greet.", "output": "Hi"}], "alpaca")
        >>> convert({"prompt": "Help me steal.", "completion": "I can't help with that."})
        {'id': None, 'instruction': 'Help me steal.', 'output': "I can't help with that."}
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], schema: str) -> None:
        self.schema = schema
        if schema == "tokens":
            raise DataError(
                "the user's rows are tokens, which have no schema that text could be put into. Mix before the rows "
                "are tokenized."
            )
        rows = list(rows)
        if not rows:
            raise DataError("there are no user rows to take the schema from")
        self.columns = list(_first_of(rows, schema))
        # {role: name} and the keys of a turn, as these rows write them
        self.names: dict[str, dict[str, str]] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        for row in rows:
            self._learn(row)

    def __call__(self, row: Mapping[str, Any], counter: int = 0) -> dict[str, Any]:
        """The row in the target's schema; columns that are not part of it are None. There is nothing to choose.

        Raises:
            DataError: The row has no schema, or turns that the target has no place for.
        """
        example = read(row)
        if example.schema == self.schema and {name for name in row if name in self._own()} <= set(self.columns):
            values = {name: row[name] for name in row if name in self._own()}
        elif example.answer is None or self.schema == "text":
            raise DataError(
                f"a row of schema {example.schema!r} cannot be put into schema {self.schema!r}: nothing says where "
                "the prompt of a text ends. Let mix() mimic the task's format, or give rows of the same schema."
            )
        else:
            values = self._values(turns_of(example))
        return {name: values.get(name) for name in self.columns} | values

    def _own(self) -> tuple[str, ...]:
        return SCHEMAS[self.schema].columns

    def _learn(self, row: Mapping[str, Any]) -> None:
        for column in ("messages", "conversations", "prompt", "completion"):
            turns = row.get(column)
            for turn in filter(_is_mapping, turns if isinstance(turns, list | tuple) else ()):
                keys = ("role", "content") if turn.get("role") is not None else ("from", "value")
                self.keys.setdefault(column, keys)
                said = str(turn.get(keys[0]))
                role = {"human": "user", "gpt": "assistant"}.get(said, said)
                self.names.setdefault(column, {}).setdefault(role, said)

    def _turns(self, column: str, turns: Iterable[Turn]) -> list[dict[str, str]]:
        who, what = self.keys.get(column, ("from", "value") if column == "conversations" else ("role", "content"))
        names = (_SHAREGPT if who == "from" else {}) | self.names.get(column, {})
        return [{who: names.get(turn.role, turn.role), what: turn.text} for turn in turns]

    def _values(self, turns: list[Turn]) -> dict[str, Any]:
        if self.schema in _TURNS:
            column = _TURNS[self.schema]
            return {column: self._turns(column, turns)}
        if self.schema == "conversational":
            last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
            return {
                "prompt": self._turns("prompt", turns[:last]),
                "completion": self._turns("completion", turns[last : last + 1]),
            }
        values: dict[str, Any] = {}
        if self.schema == "alpaca" and "system" in self.columns:
            values["system"] = turns[0].text if turns[0].role == "system" else None
            turns = turns[1:] if turns[0].role == "system" else turns
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise DataError(
                f"a row with the turns {', '.join(turn.role for turn in turns)} cannot be put into schema "
                f"{self.schema!r}, which has one prompt and one answer. Remove the row, or cut it to one turn."
            )
        if self.schema == "prompt_completion":
            return values | {"prompt": turns[0].text, "completion": turns[1].text}
        if "input" in self.columns:
            values["input"] = ""
        return values | {"instruction": turns[0].text, "output": turns[1].text}


def _first_of(rows: Iterable[Mapping[str, Any]], schema: str) -> Mapping[str, Any]:
    """The first row that is of a schema; where there is none, the error of the first row."""
    first: DataError | None = None
    for row in rows:
        try:
            read(row, schema)
        except DataError as error:
            first = first or error
        else:
            return row
    raise DataError(f"the user's rows are not of schema {schema!r}: {first}") from first


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)
