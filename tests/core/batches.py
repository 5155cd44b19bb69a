"""Rows as plain Python values, and the ways in which a collator lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from safe_sched.rows.keys import Layout, keys_of, layout_of

laws = settings(max_examples=30, deadline=None)


@dataclass(frozen=True)
class Row:
    """Token ids, and which of them are labels."""

    tokens: tuple[int, ...]
    labelled: tuple[bool, ...]

    @property
    def labels(self) -> list[int]:
        return [token if on else -100 for token, on in zip(self.tokens, self.labelled, strict=True)]

    @property
    def label_tokens(self) -> int:
        """The first token never counts: nothing predicts it."""
        return sum(self.labelled[1:])


def row(*tokens: int, prompt: int = 1) -> Row:
    """A row whose first ``prompt`` tokens are no labels."""
    return Row(tokens, tuple(place >= prompt for place in range(len(tokens))))


@st.composite
def any_row(draw: st.DrawFn, shortest: int = 1, longest: int = 7) -> Row:
    """Few different tokens, so that rows differ in little; 0 and large ids among them."""
    length = draw(st.integers(shortest, longest))
    tokens = draw(st.lists(st.sampled_from([0, 1, 2, 3, 151_643]), min_size=length, max_size=length))
    labelled = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return Row(tuple(tokens), tuple(labelled))


def any_rows(most: int = 5, **lengths: int) -> st.SearchStrategy[list[Row]]:
    return st.lists(any_row(**lengths), min_size=1, max_size=most)


class Micro(NamedTuple):
    """A micro-batch as the core sees it."""

    ids: Tensor
    labels: Tensor
    layout: Layout

    @property
    def keys(self) -> list[int]:
        return keys_of(*self).tolist()


def pad(rows: Sequence[Row], side: str = "right", extra: int = 0, filler: int = 0) -> Micro:
    """One row a line, padded on one side to the longest row and ``extra`` tokens more."""
    length = max(len(r.tokens) for r in rows) + extra

    def line(values: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (length - len(values))
        return [*values, *gap] if side == "right" else [*gap, *values]

    ids = torch.tensor([line(r.tokens, filler) for r in rows])
    labels = torch.tensor([line(r.labels, -100) for r in rows])
    mask = torch.tensor([line([1] * len(r.tokens), 0) for r in rows])
    return Micro(ids, labels, layout_of(ids, attention_mask=mask))


BOUNDARIES = ("position_ids", "cu_seq_lens", "mask_ids")
"""The ways of saying where packed rows begin."""


def pack(rows: Sequence[Row], boundaries: str = "position_ids") -> Micro:
    """All rows end to end on one line."""
    lengths = [len(r.tokens) for r in rows]
    ids = torch.tensor([[token for r in rows for token in r.tokens]])
    labels = torch.tensor([[label for r in rows for label in r.labels]])
    fields: dict[str, Any] = {}
    if boundaries == "position_ids":
        fields["position_ids"] = torch.tensor([[place for n in lengths for place in range(n)]])
    elif boundaries == "cu_seq_lens":
        fields["cu_seq_lens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    else:
        # positions that count on over the whole line, as they do where attention is told apart by the mask
        fields["position_ids"] = torch.arange(ids.shape[1])[None]
        fields["attention_mask"] = torch.tensor([[i + 1 for i, n in enumerate(lengths) for _ in range(n)]])
    return Micro(ids, labels, layout_of(ids, **fields))
