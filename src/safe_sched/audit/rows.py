"""A row as an audit sees it: its number, where it stands, and its texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safe_sched.data.schemas import Example, read


@dataclass(frozen=True)
class AuditRow:
    """A row that is to be scored.

    Attributes:
        number: Its place in the whole input, from 0.
        where: Where it stands, such as ``"train.jsonl, line 12"`` or ``"row 7"``.
        example: Its texts with their roles, beside the row itself.
        system: The system texts, ``""`` where there are none.
        prompt: Every text before the answer except system texts; the whole text in schema ``"text"``.
        answer: ``""`` where it is not known which text is the answer.
    """

    number: int
    where: str
    example: Example
    system: str
    prompt: str
    answer: str


def audit_row(
    row: Mapping[str, Any], number: int = 0, where: str | None = None, schema: str | None = None, tokenizer: Any = None
) -> AuditRow:
    r"""A row of a data set as an audit sees it.

    Args:
        row: A dict with named fields, kept and not copied.
        number: Its place in the input, from 0.
        where: Where it stands; None: its number.
        schema: A name in `safe_sched.mixing.SCHEMAS`, or None to detect it from this row.
        tokenizer: For rows of tokens: what decodes them.

    Raises:
        DataError: The row is not of that schema, or of none or several.

    Example:
        >>> row = audit_row({"instruction": "Add.", "input": "1, 2", "output": "3"})
        >>> row.prompt, row.answer, row.where
        ('Add.\n\n1, 2', '3', 'row 0')
    """
    example = read(row, schema, tokenizer=tokenizer)
    before = example.parts if example.answer is None else example.parts[: example.answer]
    return AuditRow(
        number=number,
        where=f"row {number}" if where is None else where,
        example=example,
        system="\n\n".join(part.text for part in before if part.role == "system" and part.text),
        prompt="\n\n".join(part.text for part in before if part.role != "system" and part.text),
        answer="" if example.answer is None else example.parts[example.answer].text,
    )
