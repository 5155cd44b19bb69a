"""Rows of tokens as texts: ``input_ids`` and ``labels``, decoded and encoded again.

What is a label is the answer, what is not (-100) the prompt: each run of either is one text. A row that is all labels
is one text, of which nobody knows where its answer begins. A text must give back its own tokens when it is encoded,
else the row is refused: a rendered row would hold other tokens than the task's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from safe_sched.errors import DataError

IGNORE_INDEX = -100

COLUMNS = ("input_ids", "labels", "attention_mask")
"""The columns of a row of tokens. A trainer that finds all of them ignores the row's texts."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Text of some tokens."""
        ...


def spans(row: Mapping[str, Any], tokenizer: Tokenizer | None) -> Iterator[tuple[str, str, str]]:
    """Role, text and place of every run of tokens that are, or are not, labels.

    Args:
        row: With ``input_ids`` and ``labels``, one integer per token each.
        tokenizer: To decode with.

    Raises:
        DataError: There is no tokenizer, the columns do not fit together, or a text does not give its tokens back.
    """
    if tokenizer is None:
        raise DataError("a row of tokens is read with a tokenizer; give tokenizer=..., the one that made the tokens")
    ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    if len(ids) != len(labels):
        raise DataError(f"a row has {len(ids)} input_ids and {len(labels)} labels; needed: one label per token")
    wrong = [i for i, (token, label) in enumerate(zip(ids, labels, strict=True)) if label not in (token, IGNORE_INDEX)]
    if wrong:
        raise DataError(
            f"label {wrong[0]} of a row is {labels[wrong[0]]}, its token {ids[wrong[0]]}; needed: the token itself, or "
            f"{IGNORE_INDEX}. Labels must not be shifted: the model does that."
        )
    runs = [(labelled, len(list(run))) for labelled, run in itertools.groupby(l != IGNORE_INDEX for l in labels)]
    start = 0
    for labelled, length in runs:
        span = ids[start : start + length]
        text = tokenizer.decode(span, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if list(tokenizer.encode(text, add_special_tokens=False)) != span:
            raise DataError(
                f"tokens {start} to {start + length - 1} of a row are {text[:60]!r}, but that text has other "
                "tokens: this tokenizer did not make them so. Use the rows as they were before they were tokenized."
            )
        role = "user" if not labelled else "text" if len(runs) == 1 else "assistant"
        yield role, text, f"input_ids[{start}:{start + length}]"
        start += length


def with_spans(row: dict[str, Any], texts: Sequence[tuple[str, str]], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A row with other texts in some of its places; a row whose texts are its own is returned as it is.

    Args:
        row: As it was read.
        texts: Text and place of each run, in order.
        tokenizer: To encode with.

    Raises:
        DataError: Another column has one entry per token, so that nothing says what it is for other tokens.
    """
    if tokenizer is None:
        raise DataError("a row of tokens is written with a tokenizer; give tokenizer=... when it is read")
    old_ids, old_labels = _integers(row, "input_ids"), _integers(row, "labels")
    ids: list[int] = []
    labels: list[int] = []
    for text, field in texts:
        start = int(field.removeprefix("input_ids[").partition(":")[0])
        span = list(tokenizer.encode(text, add_special_tokens=False))
        ids += span
        labels += span if old_labels[start] != IGNORE_INDEX else [IGNORE_INDEX] * len(span)
    if (ids, labels) == (old_ids, old_labels):
        return row
    masked = row.get("attention_mask") is not None
    if masked and set(_integers(row, "attention_mask")) - {1}:
        raise DataError("a row has an attention_mask with zeros; give rows without padding")
    stale = [
        name
        for name, value in row.items()
        if name not in ("input_ids", "labels", "attention_mask") and _length(value) == len(old_ids)
    ]
    if stale:
        raise DataError(
            f"the columns {', '.join(map(repr, stale))} have one entry per token, of tokens that have changed; drop "
            "these columns, or write with extras=False"
        )
    return row | {"input_ids": ids, "labels": labels} | ({"attention_mask": [1] * len(ids)} if masked else {})


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple | np.ndarray | pa.ListScalar) else None


def _integers(row: Mapping[str, Any], column: str) -> list[int]:
    values: Any = row.get(column)
    values = values.as_py() if isinstance(values, pa.Scalar) else values
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise DataError(f"{column} is a {type(values).__name__}; needed: a list of whole numbers, one per token")
    return list(values)
