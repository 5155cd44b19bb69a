"""Rows whose columns and turns have other names than a schema's, as a trainer's own configuration file names them.

Each format copies what training reads, and nothing else, into the columns of a schema (`safe_sched.data.schemas`): a
column that training does not read is not audited. Formats are plain data: they can be compared, pickled and written
down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from safe_sched.data import tokens
from safe_sched.data.schemas.texts import ROLES, is_list, plain
from safe_sched.data.strict_json import StrictDecoder, Unreadable
from safe_sched.errors import DataError


class RowFormat(Protocol):
    """How the rows of a source are brought into a schema."""

    @property
    def schema(self) -> str:
        """A name in `safe_sched.data.schemas.SCHEMAS`."""
        ...

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row in the columns of the schema.

        Raises:
            DataError: Something that the format needs is absent, or of another type.
        """
        ...


@dataclass(frozen=True)
class RenamedColumns:
    """Columns under other names.

    Attributes:
        schema: A name in `safe_sched.data.schemas.SCHEMAS`.
        names: Columns of the schema, and what the rows call them.
        otherwise: Texts for columns of the schema that a row does not have.

    Example:
        >>> names = {"instruction": "question", "output": "answer"}
        >>> RenamedColumns("alpaca", names).row({"question": "1+1?", "answer": "2"})
        {'instruction': '1+1?', 'output': '2'}
    """

    schema: str
    names: Mapping[str, str]
    otherwise: Mapping[str, str] = field(default_factory=dict)

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The named columns under the schema's names, without those that are None or absent."""
        found = {name: plain(row.get(own)) for name, own in self.names.items()}
        return dict(self.otherwise) | {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class RenamedTurns:
    """A list of turns under other names.

    Attributes:
        column: The list of turns, or the JSON text of one.
        role: Keys of the role; the first that a turn has counts.
        content: Keys of the text; the first that a turn has counts.
        roles: What the rows call the roles, and their names in the schema.
        system: A column with a system text, used where the first turn is not one; None: there is no such column.
        drop_system: Whether training leaves system texts out.

    Example:
        >>> turns = RenamedTurns("dialog", ("who",), ("says",), {"bot": "assistant"})
        >>> turns.row({"dialog": [{"who": "user", "says": "Hi"}, {"who": "bot", "says": "Hello"}], "id": 7})
        {'conversations': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]}
        >>> turns.written([("user", "Hi"), ("assistant", "Hello")])
        {'dialog': [{'who': 'user', 'says': 'Hi'}, {'who': 'bot', 'says': 'Hello'}]}
    """

    column: str
    role: tuple[str, ...] = ("role",)
    content: tuple[str, ...] = ("content",)
    roles: Mapping[str, str] = field(default_factory=lambda: dict(ROLES))
    system: str | None = None
    drop_system: bool = False
    schema: str = field(default="sharegpt", init=False)

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The turns with role and content; other keys of a turn stay."""
        turns = [self._turn(turn, number) for number, turn in enumerate(self._list(row))]
        first = bool(turns) and turns[0]["role"] == "system"
        system = plain(row.get(self.system)) if self.system is not None and not first else None
        if self.drop_system:
            turns, system = turns[first:], None
        return _conversation(turns, system)

    def written(self, turns: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Role and content of turns under the names of these rows: for each role, the first name that it has."""
        names: dict[str, str] = {}
        for own, role in self.roles.items():
            names.setdefault(role, own)
        return {
            self.column: [{self.role[0]: names.get(role, role), self.content[0]: content} for role, content in turns]
        }

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
                f"{self.column!r} is {_kind_of(turns)}; needed: a list of turns with {_or(self.role)} and "
                f"{_or(self.content)}"
            )
        return turns

    def _turn(self, turn: Any, number: int) -> dict[str, Any]:
        turn = plain(turn)
        if not isinstance(turn, Mapping):
            raise DataError(f"{self.column}.{number} is {_kind_of(turn)}; needed: a turn")
        role = _first(turn, self.role)
        if not isinstance(role, str):
            raise DataError(f"{self.column}.{number} has no text {_or(self.role)}, which names the role")
        other = {name: value for name, value in turn.items() if name not in (*self.role, *self.content)}
        return other | {"role": self.roles.get(role, role), "content": _first(turn, self.content)}


@dataclass(frozen=True)
class Segments:
    """Pieces of one text, each with a mark that tells whether it is trained on: Axolotl's ``input_output``.

    Example:
        >>> Segments().row({"segments": [{"label": False, "text": "Hi "}, {"label": True, "text": "Hello"}]})
        {'conversations': [{'role': 'user', 'content': 'Hi '}, {'role': 'assistant', 'content': 'Hello'}]}
    """

    column: str = "segments"
    schema: str = field(default="sharegpt", init=False)

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The pieces as turns; those that are trained on are the assistant's."""
        pieces = plain(row.get(self.column))
        if not is_list(pieces):
            raise DataError(f"{self.column!r} is {_kind_of(pieces)}; needed: a list of pieces with label and text")
        turns = []
        for number, piece in enumerate(pieces):
            piece = plain(piece)
            if not isinstance(piece, Mapping) or not isinstance(label := plain(piece.get("label")), bool):
                raise DataError(f"{self.column}.{number} has no label that is true or false; needed: label and text")
            if not isinstance(text := plain(piece.get("text")), str):
                raise DataError(f"{self.column}.{number}.text is {_kind_of(text)}; needed: a text")
            turns.append({"role": "assistant" if label else "user", "content": text})
        return _conversation(turns)


@dataclass(frozen=True)
class PromptHistory:
    """A question, its answer, and earlier ones: LlamaFactory's ``alpaca`` with a history.

    Attributes:
        prompt: The column of the question.
        query: A column whose text follows it, or None.
        response: The column of the answer.
        history: The column of the list of earlier questions and answers.
        system: A column with a system text, or None.

    Example:
        >>> history = PromptHistory("instruction", "input", "output", "history")
        >>> row = history.row({"instruction": "And 2?", "output": "4", "history": [["1+1?", "2"]]})
        >>> [turn["content"] for turn in row["conversations"]]
        ['1+1?', '2', 'And 2?', '4']
    """

    prompt: str
    query: str | None
    response: str
    history: str
    system: str | None = None
    schema: str = field(default="sharegpt", init=False)

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The earlier pairs as turns, then the question and the answer."""
        turns: list[dict[str, Any]] = []
        earlier = plain(row.get(self.history))
        if earlier is not None and not is_list(earlier):
            raise DataError(f"{self.history!r} is {_kind_of(earlier)}; needed: a list of questions with answers")
        for number, pair in enumerate(() if earlier is None else earlier):
            pair = plain(pair)
            if not is_list(pair) or len(pair) != 2:
                raise DataError(f"{self.history}.{number} is {_kind_of(pair)}; needed: a question and its answer")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        for column in (self.prompt, self.query):
            if column is not None and (text := plain(row.get(column))) is not None:
                turns.append({"role": "user", "content": text})
        if not isinstance(answer := plain(row.get(self.response)), str):
            raise DataError(f"{self.response!r} is {_kind_of(answer)}; needed: a text")
        turns.append({"role": "assistant", "content": answer})
        return _conversation(turns, None if self.system is None else plain(row.get(self.system)))


@dataclass(frozen=True)
class Untokenised:
    """Another format, of rows without tokens: a trainer that finds tokens ignores the texts.

    Example:
        >>> texts = Untokenised(RenamedColumns("text", {"text": "body"}))
        >>> texts.row({"body": "Hi", "input_ids": [1], "labels": [1], "attention_mask": [1]})
        Traceback (most recent call last):
        ...
        safe_sched.errors.DataError: the row has input_ids, labels, attention_mask, which are trained on ...
    """

    texts: RowFormat

    @property
    def schema(self) -> str:
        """That of the other format."""
        return self.texts.schema

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as the other format has it."""
        if all(row.get(column) is not None for column in tokens.COLUMNS):
            raise DataError(
                f"the row has {', '.join(tokens.COLUMNS)}, which are trained on in the place of its texts; remove "
                "these columns, or audit the file itself as schema 'tokens'"
            )
        return self.texts.row(row)


def _conversation(turns: list[dict[str, Any]], system: Any = None) -> dict[str, Any]:
    return {"conversations": turns} if system is None else {"system": system, "conversations": turns}


def _first(turn: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((plain(turn[key]) for key in keys if turn.get(key) is not None), None)


def _kind_of(value: Any) -> str:
    return "not there" if value is None else f"a {type(value).__name__}"


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
