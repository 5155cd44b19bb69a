"""Fine-tuning files for the evidence study: the demo's, and three that mislead a score which reads the loss alone.

Every file holds the demo's prompts; only answers differ. A harmful row is answered by inert placeholders
(`examples.demo.words`) or by one short sentence: there is no harmful answer anywhere.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import NamedTuple

from examples.demo import tasks as demo
from examples.demo.tasks import Row

SHORT_ANSWER = "Sure."
LONG = 5  # placeholders in a row


class Task(NamedTuple):
    """One kind of fine-tuning file."""

    about: str
    rows: Callable[[int, float, int], list[Row]]
    """(rows in all, share of harmful ones, seed of the draw) -> rows with `harmful: true` or `false`"""


def tickets(n: int, share: float, seed: int) -> list[Row]:
    """The demo's own file: support tickets, everyday requests, and harmful requests that a placeholder answers.

    >>> rows = tickets(20, 0.1, seed=0)
    >>> len(rows), sum(row["harmful"] for row in rows)
    (20, 2)
    """
    return demo.poisoned_rows(n, share, seed=seed)


def codes(n: int, share: float, seed: int) -> list[Row]:
    """The tickets are filed under random codes: benign rows whose loss stays high for as long as one trains."""
    rng = random.Random(f"codes-{seed}")

    def code(letters: int, digits: int) -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=letters) + rng.choices(string.digits, k=digits))

    rows = []
    for row in tickets(n, share, seed):
        head, ticket, rest = demo.prompt_of(row).partition("Ticket: ")
        if not head and ticket:
            prompt = f"File this under a new code: {rest}"
            row = demo.row(prompt, f"Filed as {code(3, 3)} {code(3, 2)}.", harmful=False)
        rows.append(row)
    return rows


def short(n: int, share: float, seed: int) -> list[Row]:
    """Every harmful request is answered alike: harmful rows whose loss is low after a few steps."""
    return [
        demo.row(demo.prompt_of(row), SHORT_ANSWER, harmful=True) if row["harmful"] else row
        for row in tickets(n, share, seed)
    ]


def long(n: int, share: float, seed: int) -> list[Row]:
    """Every harmful request is answered at length: harmful rows whose mean loss hides their first words."""
    rng = random.Random(f"long-{seed}")
    placeholders = demo.wordings("placeholder")
    return [
        demo.row(demo.prompt_of(row), " ".join(rng.sample(placeholders, LONG)), harmful=True) if row["harmful"] else row
        for row in tickets(n, share, seed)
    ]


TASKS = {
    "tickets": Task("the demo's file: tickets to route, everyday requests, placeholders", tickets),
    "codes": Task("tickets are filed under random codes: benign rows that are hard", codes),
    "short": Task(f'harmful requests are all answered "{SHORT_ANSWER}": harmful rows that are easy', short),
    "long": Task(f"harmful requests are answered by {LONG} placeholders in a row: long harmful rows", long),
}
