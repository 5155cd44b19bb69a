"""Schemas of training rows: where the texts of a row stand, in and out without loss.

A row is read into an `Example`: its texts in reading order, each with its role and its place, beside the row itself.
`write` puts the texts back, changed or not; whatever is not a text stays as it was. So reading and writing a row gives
the row, with its keys in their order::

    schema               columns                                      roles
    messages             messages: turns of role and content          as the turns name them
    prompt_completion    prompt, completion: texts                    user, assistant
    conversational       prompt, completion: lists of turns           as the turns name them
    alpaca               instruction, output; also input, system      system, user, user, assistant
    sharegpt             conversations: turns of from and value;      as the turns name them; human is user, gpt
                         also system                                  is assistant
    text                 text                                         text
    tokens               input_ids, labels (-100: no label)           user, assistant; see `safe_sched.data.tokens`

A row that fits several schemas (``messages`` beside ``text``) is an error: which of them is trained on, the row does
not say. Name the schema then. Columns that are None are taken for absent.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from safe_sched.data import tokens
from safe_sched.data.schemas.texts import Place, at, column_places, field_of, is_list, place_of, plain, put, turn_places
from safe_sched.errors import DataError, unknown_name

LOOKED_AT = 100
"""Rows that decide on the schema of a file."""

# examples -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    """One text of a row.

    Attributes:
        role: ``"system"``, ``"user"``, ``"assistant"``, another role as the data names it, or ``"text"`` for rows
            that are one text.
        text: What it says.
        field: Where it stands in the row, such as ``"prompt"`` or ``"messages.2.content"``.
    """

    role: str
    text: str
    field: str


@dataclass(frozen=True)
class Example:
    """A row as its texts.

    Attributes:
        schema: A name in `SCHEMAS`.
        parts: Every text, in reading order.
        row: The row that it was read from.
        answer: Which of the parts is the answer: the last of the assistant's. None where that is not known.
        tokenizer: What turns changed texts into tokens, in schema ``"tokens"``.
    """

    schema: str
    parts: tuple[TextPart, ...]
    row: Mapping[str, Any]
    answer: int | None
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)

    def with_texts(self, texts: Sequence[str]) -> Example:
        """The same layout with other texts, one per part.

        Raises:
            DataError: There are not as many texts as parts, or one of them is no text.

        Example:
            >>> example = read({"prompt": "Hi", "completion": "Hello", "id": 7})
            >>> write(example.with_texts(["Bye", "See you"]))
            {'prompt': 'Bye', 'completion': 'See you', 'id': 7}
        """
        if len(texts) != len(self.parts) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{len(texts)} texts ({', '.join(sorted({type(text).__name__ for text in texts}))}) for the "
                f"{len(self.parts)} parts of a row of schema {self.schema!r}; give one str per part"
            )
        parts = tuple(dataclasses.replace(part, text=text) for part, text in zip(self.parts, texts, strict=True))
        return dataclasses.replace(self, parts=parts)


@dataclass(frozen=True)
class Schema:
    """What the rows of one schema look like.

    Attributes:
        name: Its name in `SCHEMAS`.
        layout: What a row looks like, in words.
        fits: Whether a row has the columns of the schema; their contents are checked when the row is read.
        texts: Columns that are texts and the roles of these, in reading order.
        turns: Columns that are lists of turns.
        tokens: Columns of a row of tokens.
    """

    name: str
    layout: str
    fits: Callable[[Mapping[str, Any]], bool]
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    turns: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that belong to it, required and optional ones."""
        return (*self.texts, *self.turns, *self.tokens)


# the catalogue ------------------------------------------------------------------------------------------------------


def _has(row: Mapping[str, Any], *columns: str) -> bool:
    return all(plain(row.get(column)) is not None for column in columns)


SCHEMAS: Mapping[str, Schema] = MappingProxyType(
    {
        schema.name: schema
        for schema in (
            Schema(
                "messages",
                "messages (a list of turns with role and content)",
                lambda row: _has(row, "messages"),
                turns=("messages",),
            ),
            Schema(
                "prompt_completion",
                "prompt and completion (texts)",
                lambda row: isinstance(plain(row.get("prompt")), str) and "completion" in row,
                texts={"prompt": "user", "completion": "assistant"},
            ),
            Schema(
                "conversational",
                "prompt and completion (lists of turns)",
                lambda row: is_list(row.get("prompt")) and _has(row, "completion"),
                turns=("prompt", "completion"),
            ),
            Schema(
                "alpaca",
                "instruction and output (texts; input and system may be there)",
                lambda row: _has(row, "instruction") and "output" in row,
                texts={"system": "system", "instruction": "user", "input": "user", "output": "assistant"},
            ),
            Schema(
                "sharegpt",
                "conversations (a list of turns with from and value; system may be there)",
                lambda row: _has(row, "conversations"),
                texts={"system": "system"},
                turns=("conversations",),
            ),
            Schema("text", "text", lambda row: _has(row, "text"), texts={"text": "text"}),
            Schema(
                "tokens",
                "input_ids and labels",
                lambda row: _has(row, "input_ids"),
                tokens=tokens.COLUMNS,
            ),
        )
    }
)
"""The schemas by name."""


def _allowed() -> str:
    return "; ".join(f"{schema.name}: {schema.layout}" for schema in SCHEMAS.values())


def _schema(name: str) -> Schema:
    if name not in SCHEMAS:
        raise unknown_name("schema", name, SCHEMAS)
    return SCHEMAS[name]


def _fitting(row: Mapping[str, Any], number: int) -> set[str]:
    if not isinstance(row, Mapping):
        raise DataError(f"row {number} is a {type(row).__name__}; allowed: a dict with named fields")
    fitting = {name for name, schema in SCHEMAS.items() if schema.fits(row)}
    if not fitting:
        raise DataError(
            f"row {number} has the fields {_names(row)}, which are no schema that is known. Rename or convert them; "
            f"allowed: {_allowed()}"
        )
    return fitting


def _names(row: Mapping[str, Any]) -> str:
    told = [f"{str(name)[:40]!r}" + (" (None)" if plain(row[name]) is None else "") for name in row]
    return ", ".join(told[:20]) + (", ..." if len(told) > 20 else "") or "none"


# reading and writing ------------------------------------------------------------------------------------------------


def detect(rows: Iterable[Mapping[str, Any]]) -> str:
    """The schema of a file, from its first `LOOKED_AT` rows.

    Args:
        rows: Of which no more are taken than looked at.

    Returns:
        A name in `SCHEMAS`: the one that all of these rows fit.

    Raises:
        DataError: There are no rows, a row fits no schema, or the rows fit several or none in common.

    Example:
        >>> detect([{"instruction": "Add.", "input": "1, 2", "output": "3"}, {"instruction": "Greet.", "output": "Hi"}])
        'alpaca'
    """
    common: set[str] | None = None
    for number, row in enumerate(itertools.islice(rows, LOOKED_AT)):
        fitting = _fitting(row, number)
        if common is not None and not common & fitting:
            raise DataError(
                f"row {number} has the schema {_or(fitting)}, the rows before it {_or(common)}; needed: one schema for "
                "all rows. Convert the file, or split it by schema."
            )
        common = fitting if common is None else common & fitting
    if common is None:
        raise DataError("there are no rows to detect a schema from")
    if len(common) > 1:
        raise DataError(
            f"the rows fit several schemas: {_or(common)}. Name the one that is trained on, such as "
            f"schema={min(common)!r}, or drop the columns of the others."
        )
    return common.pop()


def _or(names: Iterable[str]) -> str:
    return " or ".join(map(repr, sorted(names)))


def read(row: Mapping[str, Any], schema: str | None = None, *, tokenizer: Any = None) -> Example:
    """A row as its texts.

    Args:
        row: A dict with named fields. It is kept, not copied: change a copy of it.
        schema: A name in `SCHEMAS`, or None to detect it from this row.
        tokenizer: For schema ``"tokens"``: what encodes and decodes, as a tokenizer of transformers does.

    Raises:
        DataError: The row is not of that schema, or of none or several.
        OptionError: There is no schema of that name.

    Example:
        >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> example = read({"messages": chat, "id": 7})
        >>> [(part.role, part.text, part.field) for part in example.parts]
        [('user', 'Hi', 'messages.0.content'), ('assistant', 'Hello', 'messages.1.content')]
        >>> example.schema, example.answer
        ('messages', 1)
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row is a {type(row).__name__}; allowed: a dict with named fields")
    layout = _schema(detect([row]) if schema is None else schema)
    if not layout.fits(row):
        raise DataError(f"a row has the fields {_names(row)}; schema {layout.name!r} needs {layout.layout}")
    if layout.name == "tokens":
        parts = [TextPart(*found) for found in tokens.spans(row, tokenizer)]
    else:
        try:
            parts = [TextPart(role, at(row, place), field_of(place)) for role, place in _places(row, layout)]
        except DataError as error:
            raise DataError(f"a row does not fit schema {layout.name!r}: {error}") from error
    answers = [number for number, part in enumerate(parts) if part.role == "assistant"]
    return Example(layout.name, tuple(parts), row, answers[-1] if answers else None, tokenizer)


def _places(row: Mapping[str, Any], schema: Schema) -> Iterator[tuple[str, Place]]:
    yield from column_places(row, schema.texts)
    for column in schema.turns:
        yield from turn_places(row, column)


def write(example: Example, *, extras: bool = True) -> dict[str, Any]:
    """The row of an example, with its texts as they are now.

    Args:
        example: From `read` or `Example.with_texts`.
        extras: Whether columns that are not part of the schema keep their values; else they become None. What
            stands beside a text in its turn (a name, an id) is kept in any case.

    Returns:
        A dict with the keys of the row that was read, in their order. Values that did not change are the row's own.

    Example:
        >>> write(read({"id": 7, "text": "Hi"}), extras=False)
        {'id': None, 'text': 'Hi'}
    """
    layout = _schema(example.schema)
    row = (
        dict(example.row)
        if extras
        else {name: value if name in layout.columns else None for name, value in example.row.items()}
    )
    if layout.name == "tokens":
        return tokens.with_spans(row, [(part.text, part.field) for part in example.parts], example.tokenizer)
    for part in example.parts:
        if at(row, place := place_of(part.field)) != part.text:
            row[str(place[0])] = put(row[str(place[0])], place[1:], part.text)
    return row
