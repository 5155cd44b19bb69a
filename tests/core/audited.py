"""A small file to audit, and a detector whose every number can be told by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from safe_sched.audit import AuditRow, Evidence

WORD = "zork"


class Counts:
    """How often a word is in the prompt, over how often it is on average in the file."""

    name: ClassVar[str] = "word"
    about: ClassVar[str] = "how often a word is there"
    kind: ClassVar[Literal["harm", "quality"]] = "harm"

    def __init__(self, known: bool = True, word: str = WORD) -> None:
        self.rows = self.words = 0
        self.numbers: list[int] = []
        self._known, self._word = known, word

    def observe(self, rows: Sequence[AuditRow]) -> None:
        self.rows += len(rows)
        self.words += sum(len(row.prompt.split()) for row in rows)
        self.numbers += [row.number for row in rows]

    def ready(self) -> None:
        self.mean = self.words / max(self.rows, 1)

    def value(self, row: AuditRow) -> float:
        return row.prompt.split().count(self._word) - len(row.prompt.split()) / self.mean / 10

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        values = np.array([self.value(row) for row in rows], np.float32)
        said = [f"the word is there {round(v)} times" if v > 1 else None for v in values]
        return Evidence(values, said, ["with the word" if v > 1 else None for v in values])

    def known(self) -> np.ndarray | None:
        return np.random.default_rng(0).normal(5, 0.6, 60).astype(np.float32) if self._known else None

    def settings(self) -> dict[str, object]:
        return {"word": self._word}


class Long(Counts):
    """Speaks of quality, and only of long prompts."""

    name = "long"
    about = "prompts of many words"
    kind = "quality"

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        counts = [len(row.prompt.split()) for row in rows]
        values = np.array([np.nan if count < 10 else count for count in counts], np.float32)
        return Evidence(values, ["long" if count >= 10 else None for count in counts], [None] * len(rows))

    def known(self) -> np.ndarray | None:
        return None


def some_rows(count: int, every: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of which each ``every``-th has the word 4 to 6 times; none where it is 0."""
    rng = random.Random(seed)

    def prompt(number: int) -> str:
        bad = every and number % every == every - 1
        words = rng.choices(["one", "two", "three", "four", "five", "six"], k=rng.randint(3, 9))
        return " ".join([f"row{number}", *words, *([WORD] * rng.randint(4, 6) if bad else [])])

    return [{"id": n, "prompt": prompt(n), "completion": f"answer {n}"} for n in range(count)]
