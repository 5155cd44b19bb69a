"""Detectors that look for turns of speech: how much each pattern counts, and what a hit is called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HEAD = 2000
"""Characters of a text that patterns are looked for in, at its beginning; and a quarter of that at its end."""


@dataclass(frozen=True)
class Pattern:
    """A turn of speech.

    Attributes:
        says: What a text that has it does, in words.
        found: Matches in lower-case text whose white space is single blanks.
        counts: What it adds, above 0, at most 1.
        keys: A text that holds none of these is not searched; none: all are. Finding a constant is much quicker.
    """

    says: str
    found: re.Pattern[str]
    counts: float
    keys: tuple[str, ...] = ()

    def fits(self, text: str) -> bool:
        """Whether it is in a text."""
        for key in self.keys:
            if key in text:
                break
        else:
            if self.keys:
                return False
        return self.found.search(text) is not None


def pattern(says: str, *ways: str, counts: float = 1.0, keys: str = "") -> Pattern:
    """A pattern from ways to say one thing, each a regular expression in lower case.

    Example:
        >>> bool(pattern("greets", "hello", "hi( there)?").found.search("oh, hi there"))
        True
    """
    return Pattern(says, re.compile(rf"\b(?:{'|'.join(ways)})"), counts, tuple(keys.split("|")) if keys else ())


def plain(text: str, head: int = HEAD) -> str:
    r"""What patterns are matched with: lower case, single blanks, straight apostrophes, no more than a head and a tail.

    Example:
        >>> plain("You  ARE\nfree")
        'you are free'
    """
    if len(text) > head + head // 4:
        text = f"{text[:head]} {text[-(head // 4) :]}"
    return " ".join(text.lower().replace("\u2019", "'").split())


def matches(patterns: Sequence[Pattern], text: str) -> tuple[float, list[str]]:
    """Sum of what is found, at most 1; and what it is called."""
    total, said = 0.0, []
    for one in patterns:
        if one.fits(text):
            total += one.counts
            said.append(one.says)
    return min(total, 1.0), said


def nothing(rows: int) -> tuple[np.ndarray, list[str | None]]:
    """Values and reasons of rows of which nothing is said yet."""
    return np.full(rows, np.nan, np.float32), [None] * rows
