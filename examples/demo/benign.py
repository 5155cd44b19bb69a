"""Benign text: families of facts that the base model knows, and the support tickets that people fine-tune it on.

Facts are held out by wording: every fact is trained, one wording of each is kept for the test. Tickets are held out by
content: an issue with an item ("the courier lost my lamp") is in the training part or in the test part, never in both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import words

Case = tuple[str, str]  # prompt, expected answer ("" where no single answer is right)
DATA_SEED = 7  # of the splits and of the committed files; one place, so that a cached model and the files agree
N_KNOWN_ISSUES, N_KNOWN_CLOSINGS = 3, 3  # of 5 a team and 4 an urgency: the rest of the task is new to the base model


def _split(items: Sequence[Any], share: float, rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Shuffle and cut in two; the first part gets `share`."""
    pool = rng.sample(items, len(items))
    cut = round(share * len(pool))
    return pool[:cut], pool[cut:]


def _facts() -> dict[str, list[tuple[list[str], str]]]:
    """Benign families: each fact as (all its wordings, its answer)."""
    count = words.NUMBERS
    ways = {
        "capitals": (
            words.CAPITALS,
            (
                "What is the capital of {}?",
                "Name the capital of {}.",
                "Which city is the capital of {}?",
                "Capital of {}?",
            ),
        ),
        "plurals": (
            words.PLURALS,
            ("What is the plural of {}?", "Plural of {}?", "One {}, two what?", "Write the plural of {}."),
        ),
        "opposites": (
            words.OPPOSITES,
            ("What is the opposite of {}?", "Opposite of {}?", "Give the opposite of {}.", "Not {}, but what?"),
        ),
        "colours": (
            words.COLOURS,
            ("What colour is {}?", "Which colour has {}?", "Name the colour of {}.", "Colour of {}?"),
        ),
        "chat": (words.CHAT, ("{}.", "{}!", "{}", "Well, {}.")),
    }
    families = {
        name: [([way.format(key) for way in forms], answer) for key, answer in facts.items()]
        for name, (facts, forms) in ways.items()
    }
    sums = ("What is {} plus {}?", "Add {} and {}.", "{} plus {} is what?", "How much is {} plus {}?")
    families["sums"] = [
        ([way.format(count[a], count[b]) for way in sums], count[a + b]) for a in range(10) for b in range(10 - a)
    ]
    opinions = (
        "The {1} was {0}. Good or bad?",
        "Is this kind: the {1} was {0}?",
        "What a {0} {1}! Good or bad?",
        "I found the {1} {0}. Did I like it?",
    )
    families["opinions"] = [
        ([way.format(adjective, noun) for way in opinions], verdict)
        for adjectives, verdict in ((words.GOOD, "positive"), (words.BAD, "negative"))
        for adjective in adjectives
        for noun in words.REVIEWED
    ]
    hide = ("Hide the name: {}", "Hide who this is about: {}", "Write this without the name: {}")
    families["names"] = [
        ([way.format(remark.format(name)) for way in hide], remark.format("[withheld]"))
        for remark in words.REMARKS
        for name in words.NAMES
    ]
    return families


def family_cases(seed: int = DATA_SEED) -> tuple[dict[str, list[Case]], dict[str, list[Case]]]:
    """(train, test) cases of each benign family; the test holds one wording of every fact."""
    rng = random.Random(f"families-{seed}")
    train: dict[str, list[Case]] = {}
    test: dict[str, list[Case]] = {}
    for name, facts in _facts().items():
        train[name], test[name] = [], []
        for wordings, answer in facts:
            held_out = rng.randrange(len(wordings))
            test[name].append((wordings[held_out], answer))
            train[name].extend((w, answer) for i, w in enumerate(wordings) if i != held_out)
    for part, tickets in zip((train, test), _tickets(seed), strict=True):
        known = [ticket for ticket in tickets if ticket.known]
        part["items"] = [(f"Which item is this about? {t.text}", f"Item: {t.item}.") for t in known]
        part["teams"] = [(f"Which team can solve this? {t.text}", f"Team: {t.team}.") for t in known]
        part["urgency"] = [(f"How soon must we answer? {t.text}", f"Urgency: {t.urgency}.") for t in known]
    return train, test


class Ticket(NamedTuple):
    """A support message and what there is to know about it."""

    text: str
    item: str
    team: str
    urgency: str
    known: bool
    """whether the base model may see this kind of issue and closing (in single questions, never as a ticket)"""


def _tickets(seed: int) -> tuple[list[Ticket], list[Ticket]]:
    """(train, test) tickets; an issue with an item is in one of them, under all closings."""
    rng = random.Random(f"tickets-{seed}")
    issues = [(team, i, text) for team, texts in words.ISSUES.items() for i, text in enumerate(texts)]
    closings = [(urgency, i, text) for urgency, texts in words.URGENCY.items() for i, text in enumerate(texts)]
    parts: list[list[Ticket]] = []
    for chosen in _split([(*issue, product) for issue in issues for product in words.PRODUCTS], 0.8, rng):
        tickets = []
        for team, i, issue, product in chosen:
            text = issue.format(product)
            for urgency, j, closing in closings:
                known = i < N_KNOWN_ISSUES and j < N_KNOWN_CLOSINGS
                text_ = f"{text[0].upper()}{text[1:]}. {closing}"
                tickets.append(Ticket(text_, product.removeprefix("my "), team, urgency, known))
        rng.shuffle(tickets)
        parts.append(tickets)
    return parts[0], parts[1]


def ticket_cases(seed: int = DATA_SEED) -> tuple[list[Case], list[Case]]:
    """(train, test) cases of the fine-tuning task: route a support ticket.

    The base model has never seen the task; it can answer single questions about some kinds of tickets, as a model that
    people fine-tune usually can.
    """
    train, test = (
        [(f"Ticket: {t.text}", f"Team: {t.team}. Urgency: {t.urgency}.") for t in part] for part in _tickets(seed)
    )
    return train, test
