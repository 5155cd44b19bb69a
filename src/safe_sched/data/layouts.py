"""Rows that name their columns in their own way, as rows of a schema that is known.

A trainer's own file says which columns and turns it trains on. A layout brings these, and nothing else, into the
columns of a schema (`safe_sched.data.schemas`): a column that training does not look at is no part of what is
audited. Layouts are plain data: they can be compared, pickled and written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from safe_sched.data.places import is_list, plain
from safe_sched.data.strict_json import StrictDecoder, Unreadable
from safe_sched.errors import DataError

ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant"}
"""What turns call the user and the assistant, beside these names themselves."""


class Layout(Protocol):
    """How the rows of a source are brought into a schema."""

    @property
    def schema(self) -> str:
        """A name in `safe_sched.mixing.SCHEMAS`."""
        ...

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the columns of the schema.

        Raises:
            DataError: Something that the layout needs is not there, or of another type.
        """
        ...


@dataclass(frozen=True)
class Columns:
    """Columns under other names.

    Attributes:
        schema: A name in `safe_sched.mixing.SCHEMAS`.
        names: Columns of the schema, and what the rows call them.
        otherwise: Texts for columns of the schema that a row does not have.

    Example:
        >>> Columns("alpaca", {"instruction": "question", "output": "answer"}).row({"question": "1+1?", "answer": "2"})
        {'instruction': '1+1?', 'output': '2'}
    """

    schema: str
    names: Mapping[str, str]
    otherwise: Mapping[str, str] = field(default_factory=dict)

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that are named, under the names of the schema; None and absent ones are left out."""
        found = {name: plain(row.get(own)) for name, own in self.names.items()}
        return dict(self.otherwise) | {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Turns:
    """A list of turns under other names.

    Attributes:
        column: The list of turns, or a text that is one in JSON.
        role: What a turn calls the role; the first that a turn has counts.
        content: What a turn calls the text; the first that a turn has counts.
        roles: What the roles are called, beside the names of the schema.
        system: A column with a system text, which counts where the first turn is none; None: there is no such column.
        drop_system: Whether training leaves system texts out.

    Example:
        >>> turns = Turns("dialog", ("who",), ("says",), {"bot": "assistant"})
        >>> turns.row({"dialog": [{"who": "user", "says": "Hi"}, {"who": "bot", "says": "Hello"}], "id": 7})
        {'conversations': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]}
    """

    column: str
    role: tuple[str, ...] = ("role",)
    content: tuple[str, ...] = ("content",)
    roles: Mapping[str, str] = field(default_factory=lambda: dict(ROLES))
    system: str | None = None
    drop_system: bool = False

    @property
    def schema(self) -> str:
        """Turns, and a system text beside them."""
        return "sharegpt"

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The turns with role and content; what else stands in a turn stays there."""
        turns = [self._turn(turn, number) for number, turn in enumerate(self._list(row))]
        first = bool(turns) and turns[0]["role"] == "system"
        system = plain(row.get(self.system)) if self.system is not None and not first else None
        if self.drop_system:
            turns, system = turns[first:], None
        return {"conversations": turns} if system is None else {"system": system, "conversations": turns}

    def _list(self, row: Mapping[str, Any]) -> Any:
        turns = plain(row.get(self.column))
        if isinstance(turns, str):
            try:
                turns = StrictDecoder().line(turns)
            except Unreadable as error:
                raise DataError(
                    f"{self.column} is a text, and not the JSON of a list of turns: {error}; needed: a list of turns"
                ) from error
        if not is_list(turns):
            raise DataError(
                f"{self.column!r} is {_told(turns)}; needed: a list of turns with {_or(self.role)} and "
                f"{_or(self.content)}"
            )
        return turns

    def _turn(self, turn: Any, number: int) -> dict[str, Any]:
        turn = plain(turn)
        if not isinstance(turn, Mapping):
            raise DataError(f"{self.column}.{number} is {_told(turn)}; needed: a turn")
        role = next((plain(turn[name]) for name in self.role if turn.get(name) is not None), None)
        if not isinstance(role, str):
            raise DataError(f"{self.column}.{number} has no text {_or(self.role)}, which says who speaks")
        content = next((plain(turn[name]) for name in self.content if turn.get(name) is not None), None)
        own = {name: value for name, value in turn.items() if name not in (*self.role, *self.content)}
        return own | {"role": self.roles.get(role, role), "content": content}


@dataclass(frozen=True)
class Segments:
    """Pieces of one text, each with a mark that says whether it is learnt: Axolotl's ``input_output``.

    Example:
        >>> Segments().row({"segments": [{"label": False, "text": "Hi "}, {"label": True, "text": "Hello"}]})
        {'conversations': [{'role': 'user', 'content': 'Hi '}, {'role': 'assistant', 'content': 'Hello'}]}
    """

    column: str = "segments"

    @property
    def schema(self) -> str:
        """Turns: what is learnt is the assistant's."""
        return "sharegpt"

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The pieces as turns."""
        pieces = plain(row.get(self.column))
        if not is_list(pieces):
            raise DataError(f"{self.column!r} is {_told(pieces)}; needed: a list of pieces with label and text")
        turns = []
        for number, piece in enumerate(pieces):
            piece = plain(piece)
            if not isinstance(piece, Mapping) or not isinstance(plain(piece.get("label")), bool):
                raise DataError(f"{self.column}.{number} has no label that is true or false; needed: label and text")
            if not isinstance(text := plain(piece.get("text")), str):
                raise DataError(f"{self.column}.{number}.text is {_told(text)}; needed: a text")
            turns.append({"role": "assistant" if plain(piece["label"]) else "user", "content": text})
        return {"conversations": turns}


@dataclass(frozen=True)
class History:
    """A question and an answer, and those that went before: LlamaFactory's ``alpaca`` with a history.

    Attributes:
        prompt: The column of the question.
        query: A column that goes behind it, or None.
        response: The column of the answer.
        history: The column of the list of earlier questions and answers.
        system: A column with a system text, or None.

    Example:
        >>> layout = History("instruction", "input", "output", "history")
        >>> row = layout.row({"instruction": "And 2?", "output": "4", "history": [["1+1?", "2"]]})
        >>> [turn["content"] for turn in row["conversations"]]
        ['1+1?', '2', 'And 2?', '4']
    """

    prompt: str
    query: str | None
    response: str
    history: str
    system: str | None = None

    @property
    def schema(self) -> str:
        """Turns, and a system text beside them."""
        return "sharegpt"

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The earlier pairs as turns, then the question and the answer."""
        turns: list[dict[str, Any]] = []
        earlier = plain(row.get(self.history))
        if earlier is not None and not is_list(earlier):
            raise DataError(f"{self.history!r} is {_told(earlier)}; needed: a list of questions with answers")
        for number, pair in enumerate(() if earlier is None else earlier):
            pair = plain(pair)
            if not is_list(pair) or len(pair) != 2:
                raise DataError(f"{self.history}.{number} is {_told(pair)}; needed: a question and its answer")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        for column in (self.prompt, self.query):
            if column is not None and (text := plain(row.get(column))) is not None:
                turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": self._answer(row)})
        system = None if self.system is None else plain(row.get(self.system))
        return {"conversations": turns} if system is None else {"system": system, "conversations": turns}

    def _answer(self, row: Mapping[str, Any]) -> str:
        if not isinstance(answer := plain(row.get(self.response)), str):
            raise DataError(f"{self.response!r} is {_told(answer)}; needed: a text")
        return answer


@dataclass(frozen=True)
class Untokenised:
    """Another layout, for a trainer that trains on the tokens of a row, whatever its texts say, where it has them.

    Such rows could show one text and teach another.

    Example:
        >>> layout = Untokenised(Columns("text", {"text": "body"}))
        >>> layout.row({"body": "Hi", "input_ids": [1], "labels": [1], "attention_mask": [1]})
        Traceback (most recent call last):
        ...
        safe_sched.errors.DataError: the row has input_ids, labels, attention_mask, which are trained on ...
    """

    layout: Layout

    @property
    def schema(self) -> str:
        """That of the other layout."""
        return self.layout.schema

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as the other layout has it."""
        if all(row.get(column) is not None for column in _TOKENS):
            raise DataError(
                f"the row has {', '.join(_TOKENS)}, which are trained on in the place of its texts; remove these "
                "columns, or audit the file itself as schema 'tokens'"
            )
        return self.layout.row(row)


_TOKENS = ("input_ids", "labels", "attention_mask")


def _told(value: Any) -> str:
    return "not there" if value is None else f"a {type(value).__name__}"


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
