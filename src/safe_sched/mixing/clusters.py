"""Rows of one format: which templates go together, where their rows ask, what their answers look like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from safe_sched.data.schemas import Example
from safe_sched.errors import DataError
from safe_sched.mixing.answers import AnswerShape, shape_of
from safe_sched.mixing.templates import Filling, Template, assign, learn

LEARNT_FROM = 800
"""Texts of a place that templates are learnt from; they tell all kept rows apart."""

CARRIER_WORDS = 400
"""Words of a row's prompt above which it carries no request, unless all rows are longer."""

_FEW_WORDS = 3
_FILLINGS = 500  # texts that say what a slot holds
_BOUNDS = "\n.?!:;"
_ASKS = re.compile(r"question|query|instruct|request|task|prompt|problem|\bask|user|input|\bq\b", re.IGNORECASE)


@dataclass(frozen=True)
class Main:
    """Where a cluster's rows have what they ask: part and slot; in rows that are one text, also the answer's slot.

    ``wide``: the slot holds numbers within a sentence (*What is {0} plus {1}?*), and the sentence is what they ask.
    """

    part: int
    slot: int | None
    answer_slot: int | None = None
    wide: bool = False


@dataclass(frozen=True)
class Cluster:
    """Rows of one format.

    Attributes:
        places: Of the parts of its prompts, in reading order.
        templates: Template of each place, by its number there.
        share: Share of the sample's rows.
        main: Where the request goes.
        answer: Shape of the answers.
        rows: Its carriers, by their number.
    """

    places: tuple[str, ...]
    templates: tuple[int, ...]
    share: float
    main: Main
    answer: AnswerShape
    rows: tuple[int, ...]


def prompt_texts(example: Example) -> list[tuple[str, str]]:
    """Place and text of every part before the answer. The place of a turn is its role and whether it is the last."""
    stop = len(example.parts) if example.answer is None else example.answer
    parts = example.parts[:stop]
    last = {part.role: number for number, part in enumerate(parts)}
    found = []
    for number, part in enumerate(parts):
        if not _positional(part.field):
            place = part.field
        elif part.role == "system":
            place = "system"
        else:
            place = part.role if last[part.role] == number and part.role != "assistant" else f"{part.role}, earlier"
        found.append((place, part.text))
    return found


def find_clusters(examples: Sequence[Example]) -> tuple[dict[str, list[Template]], list[Cluster]]:
    """The templates of every place, and the clusters of rows that have the same ones, largest share first.

    Args:
        examples: Rows of one schema.

    Raises:
        DataError: No row has both a prompt and an answer.
    """
    prompts = [prompt_texts(example) for example in examples]
    texts: dict[str, list[str]] = {}
    for place, text in itertools.chain.from_iterable(prompts):
        texts.setdefault(place, []).append(text)
    one_text = any(example.schema == "text" for example in examples)
    templates = {place: learn(_some(those), endings=not one_text) for place, those in texts.items()}
    members: dict[tuple[tuple[str, ...], tuple[int, ...]], list[int]] = {}
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        if prompt and (example.answer is not None or one_text):
            numbers = tuple(assign(templates[place], text) for place, text in prompt)
            members.setdefault((tuple(place for place, _ in prompt), numbers), []).append(number)
    if not members:
        raise DataError("no row has both a prompt and an answer; needed: rows that a model is trained to answer")
    words = [sum(len(text.split()) for _, text in prompt) for prompt in prompts]
    total = sum(map(len, members.values()))
    clusters = []
    for (places, numbers), rows in members.items():
        chosen = [templates[place][number] for place, number in zip(places, numbers, strict=True)]
        main = _main([examples[row] for row in rows], [prompts[row] for row in rows], chosen)
        answers = [example.parts[example.answer].text for row in rows if (example := examples[row]).answer is not None]
        carriers = [row for row in rows if words[row] <= CARRIER_WORDS]
        clusters.append(
            Cluster(
                places,
                numbers,
                len(rows) / total,
                main,
                shape_of(_some(answers)) if answers else AnswerShape("free"),
                tuple(carriers or sorted(sorted(rows, key=lambda row: words[row])[:20])),
            )
        )
    return templates, sorted(clusters, key=lambda one: -one.share)


def _some(texts: list[str]) -> list[str]:
    """At most `LEARNT_FROM` texts, evenly spread over the file."""
    step = len(texts) / LEARNT_FROM
    return texts if step <= 1 else [texts[int(i * step)] for i in range(LEARNT_FROM)]


def _positional(field: str) -> bool:
    """Whether a field is a turn or a stretch of tokens, which stands elsewhere in other rows."""
    return "." in field or "[" in field


def _main(
    examples: Sequence[Example], prompts: Sequence[Sequence[tuple[str, str]]], chosen: Sequence[Template]
) -> Main:
    """The slot in which rows ask: in the last user turn, where texts differ, behind a cue or with questions in it."""
    first = examples[0]
    if first.answer is None:
        return _main_of_text([prompt[-1][1] for prompt in prompts], chosen[-1], len(chosen) - 1)
    parts = [number for number in range(len(chosen)) if first.parts[number].role == "user"]
    if any(_positional(first.parts[number].field) for number in parts):
        parts = parts[-1:]
    best: tuple[float, int, int] | None = None
    for part in parts or [len(chosen) - 1]:
        texts = [prompt[part][1] for prompt in prompts]
        for slot, rank in enumerate(_ranks(texts, chosen[part])):
            rank = (rank, -part, -slot)
            best = rank if best is None else max(best, rank)
    if best is None:
        return Main((parts or [len(chosen) - 1])[-1], None)
    part, slot = -best[1], -best[2]
    return Main(
        part, slot, wide=_is_numbers_within_a_sentence([prompt[part][1] for prompt in prompts], chosen[part], slot)
    )


def _is_numbers_within_a_sentence(texts: Sequence[str], template: Template, slot: int) -> bool:
    """Whether a slot holds numbers and hardly a word, with words of the template beside it."""
    found = [filling.slots[slot] for filling in _fillings(texts, template)]
    tokens = [word for value in found for word in value.split()]
    words = sum(any(map(str.isalpha, word)) for word in tokens)
    numeric = len(tokens) - words >= len(found) and words < _FEW_WORDS * len(found)
    before, after = template.constants[slot], template.constants[slot + 1]
    if before[-1:].isalnum() or after[:1].isalnum():
        return False  # a part of a word
    before, after = before.rstrip(" "), after.lstrip(" ")
    bounded = (not before or before[-1] in _BOUNDS) and (not after or after[0] in _BOUNDS)
    return numeric and not bounded


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentence around a place: from behind a line end, a stop or a colon to before a stop."""
    before = [match.end() for match in re.finditer(r"\n|[.?!:]\s+", text[:start])]
    after = re.search(r"\n|[.?!](?:\s|\Z)|\Z", text[end:])
    within = text[end : end + after.start()] if after else ""
    return (before[-1] if before else 0), end + len(within.rstrip())


def _fillings(texts: Sequence[str], template: Template) -> list[Filling]:
    """What the first texts that are of a template have in its slots."""
    return list(itertools.islice(filter(None, map(template.match, texts)), _FILLINGS))


def _main_of_text(texts: Sequence[str], template: Template, part: int) -> Main:
    """In rows that are one text the last slot is the answer."""
    if template.slots < 2:
        return Main(part, 0 if template.slots else None)
    ranks = _ranks(texts, template)[:-1]
    return Main(part, ranks.index(max(ranks)), template.slots - 1)


def _ranks(texts: Sequence[str], template: Template) -> list[float]:
    """How likely each slot is what the rows ask."""
    fillings = [filling.slots for filling in _fillings(texts, template)]
    ranks = []
    for slot in range(template.slots):
        values = [slots[slot].strip() for slots in fillings] or [""]
        differ = len(set(values)) / len(values)
        asks = sum(value.endswith("?") for value in values) / len(values)
        if template.constants[slot + 1].lstrip().startswith("?"):
            asks = 1.0
        cue = bool(_ASKS.search(template.constants[slot].strip().rsplit("\n", 1)[-1]))
        words = sum(len(value.split()) for value in values) / len(values)
        ranks.append((2.0 if differ > 0.3 else 0.0) + cue + asks + min(words, 50) / 100)
    return ranks
