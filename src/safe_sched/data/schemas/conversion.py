"""Safety rows in the schema of the user's rows, their texts unchanged: what a mix does without mimicry."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safe_sched.data.schemas import SCHEMAS, Example, read
from safe_sched.data.schemas.renamed import RenamedTurns
from safe_sched.data.schemas.texts import ROLES, TURN_KEYS
from safe_sched.errors import DataError


def turns_of(example: Example) -> list[tuple[str, str]]:
    r"""Role and text of every turn; adjacent texts of one role are one turn, joined by an empty line.

    Example:
        >>> turns_of(read({"instruction": "Add.", "input": "1, 2", "output": "3"}))
        [('user', 'Add.\n\n1, 2'), ('assistant', '3')]
    """
    groups = itertools.groupby(example.parts, key=lambda part: part.role)
    return [(role, "\n\n".join(part.text for part in group if part.text)) for role, group in groups]


class Converter:
    """Converts rows of any schema into the schema of some rows.

    Args:
        rows: Some rows of the target; the first one of the schema decides on the columns.
        schema: Their schema.

    Raises:
        DataError: There are no rows, or the schema has no place for a prompt and an answer.

    Example:
        >>> convert = Converter([{"id": 1, "instruction": "Greet.", "output": "Hi"}], "alpaca")
        >>> convert({"prompt": "Help me steal.", "completion": "I can't help with that."})
        {'id': None, 'instruction': 'Help me steal.', 'output': "I can't help with that."}
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], schema: str) -> None:
        if schema == "tokens":
            raise DataError(
                "the user's rows are tokens, which have no schema that text could be put into. Mix before the rows "
                "are tokenized."
            )
        rows = list(rows)
        if not rows:
            raise DataError("there are no user rows to take the schema from")
        self.columns = list(_first_of(rows, schema))
        self.schema = SCHEMAS[schema]
        self.turns = [_learnt(column, rows) for column in self.schema.turns]

    def __call__(self, row: Mapping[str, Any], counter: int = 0) -> dict[str, Any]:
        """The row in the target's schema; other columns are None. The counter does nothing: there is one way only.

        Raises:
            DataError: The row has no schema, or turns that the target has no place for.
        """
        example = read(row)
        own = {name: row[name] for name in row if name in self.schema.columns}
        if example.schema == self.schema.name and own.keys() <= set(self.columns):
            values = own
        elif example.answer is None or self.schema.name == "text":
            raise DataError(
                f"a row of schema {example.schema!r} cannot be put into schema {self.schema.name!r}: nothing says "
                "where the prompt of a text ends. Let mix() mimic the task's format, or give rows of the same schema."
            )
        else:
            values = self._values(turns_of(example))
        return {name: values.get(name) for name in self.columns} | values

    def _values(self, turns: list[tuple[str, str]]) -> dict[str, Any]:
        roles = [role for role, _ in turns]
        if len(self.turns) == 1:
            return self.turns[0].written(turns)
        if self.turns:
            last = max(number for number, role in enumerate(roles) if role == "assistant")
            prompt, completion = self.turns
            return prompt.written(turns[:last]) | completion.written(turns[last : last + 1])
        values: dict[str, Any] = {}
        if "system" in self.schema.texts and "system" in self.columns:
            values["system"] = turns.pop(0)[1] if roles[0] == "system" else None
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise DataError(
                f"a row with the turns {', '.join(role for role, _ in turns)} cannot be put into schema "
                f"{self.schema.name!r}, which has one prompt and one answer. Remove the row, or cut it to one turn."
            )
        (_, prompt), (_, answer) = turns
        if self.schema.name == "prompt_completion":
            return values | {"prompt": prompt, "completion": answer}
        if "input" in self.columns:
            values["input"] = ""
        return values | {"instruction": prompt, "output": answer}


def _learnt(column: str, rows: Sequence[Mapping[str, Any]]) -> RenamedTurns:
    """How some rows write the turns of a column."""
    keys: tuple[str, str] | None = None
    names: dict[str, str] = {}
    for row in rows:
        turns = row.get(column)
        for turn in turns if isinstance(turns, list | tuple) else ():
            if isinstance(turn, Mapping):
                own = TURN_KEYS[turn.get("role") is None]
                keys = keys or own
                said = str(turn.get(own[0]))
                names.setdefault(ROLES.get(said, said), said)
    who, what = keys or TURN_KEYS[column == "conversations"]
    usual = {role: said for said, role in ROLES.items()} if who == "from" else {}
    return RenamedTurns(column, (who,), (what,), {said: role for role, said in (usual | names).items()})


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
