"""The shape of a task's answers, and how much of it a refusal can take on and still be one.

A refusal stays a refusal: the answer's *wrapping* is adopted where it is a wrapping (a JSON key, a tag, "Answer:"), and
left away where a refusal behind it would no longer open as one ("the correct answer is ...", a final "#### 42").
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safe_sched.mixing.templates import Template, assign, learn

KINDS = ("label", "letter", "number", "json", "reasoned", "free")
"""What answers may be; "reasoned" is text with a short final answer behind a constant mark."""

LAYOUTS: tuple[dict[str, Any], ...] = tuple(
    {"ensure_ascii": ascii_only, **how}
    for how in ({}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4})
    for ascii_only in (False, True)
)
"""Ways to write an object, as arguments of ``json.dumps``."""

_LABELS = 20  # distinct answers of a label set, at most
_MOSTLY = 0.95
_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?%?")
_LETTER = re.compile(r"[(\[]?[A-Za-z][)\].:]?")
_ENDS = re.compile(r"(?:\s?<[^<>\n]{1,30}>)*\s?\Z")
_REACH = 100  # characters of a suffix in which such marks are looked for


@dataclass(frozen=True)
class AnswerShape:
    """What the answers of a file look like.

    Attributes:
        kind: One of `KINDS`.
        prefix: Constant text before the answer.
        suffix: Constant text behind it.
        labels: The distinct answers, most frequent first, for kinds "label" and "letter".
        keys: Keys of the object, in their order, for kind "json".
        key: Which of them holds the text.
        final: What marks the final answer, for kind "reasoned".
        layout: How objects are written, for kind "json": its place in `LAYOUTS`.
    """

    kind: str
    prefix: str = ""
    suffix: str = ""
    labels: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    key: str | None = None
    final: str = ""
    layout: int = 0

    def wrap(self, refusal: str) -> str:
        r"""A refusal in the wrapping of the task's answers, where that leaves it one.

        Example:
            >>> AnswerShape("json", keys=("answer", "score"), key="answer").wrap("I can't help with that.")
            '{"answer": "I can\'t help with that.", "score": null}'
            >>> AnswerShape("letter", labels=("A", "B")).wrap("I can't help with that.")
            "I can't help with that."
        """
        if self.kind == "json" and self.key is not None:
            wrapped = {key: refusal if key == self.key else None for key in self.keys}
            return self.prefix + json.dumps(wrapped, **LAYOUTS[self.layout]) + self.suffix
        if self.kind == "json":
            return refusal
        bare = self.prefix.rstrip()
        # ends like a wrapping, not like half a sentence
        wraps = self.kind != "reasoned" and (bare[-1:] in tuple(":>]}=") or "\n" in self.prefix[len(bare) :])
        # space that every answer begins with, and marks that every answer ends with, such as </s>, are a refusal's too
        prefix = self.prefix if wraps else self.prefix[: len(self.prefix) - len(self.prefix.lstrip())]
        closes = prefix.strip() and self.suffix.strip()[:1] in tuple("<]}`")
        ends = _ENDS.search(self.suffix[-_REACH:])
        return prefix + refusal + (self.suffix if closes else ends[0] if ends else "")


def shape_of(answers: Sequence[str]) -> AnswerShape:
    r"""The shape of some answers.

    Args:
        answers: At least one.

    Example:
        >>> shape_of(["Answer: A", "Answer: C", "Answer: B", "Answer: A"] * 5).kind
        'letter'
        >>> shape = shape_of([f"So it is {n}\n#### {n}" for n in range(20)])
        >>> shape.kind, shape.final
        ('reasoned', '\n#### ')
    """
    if found := _json(answers):
        return found
    counts = Counter(answers)
    labels = tuple(text for text, _ in counts.most_common(_LABELS))
    if len(answers) > len(counts) and sum(counts[text] for text in labels) >= _MOSTLY * len(answers) and _few(counts):
        prefix, suffix = _edges(labels) if len(labels) > 1 else ("", "")
        bare = tuple(text[len(prefix) : len(text) - len(suffix)] for text in labels)
        if all(_LETTER.fullmatch(text.strip()) for text in bare):
            return AnswerShape("letter", prefix, suffix, bare)
        if not all(_NUMBER.fullmatch(text.strip()) for text in bare):
            return AnswerShape("label", prefix, suffix, bare)
    template = _main(learn(answers, clusters=False), answers)
    fillings = [filling.slots for text in answers if (filling := template.match(text))]
    prefix, suffix = template.constants[0], template.constants[-1]
    if template.slots == 1 and fillings and _share(_NUMBER, [slots[0] for slots in fillings]) >= _MOSTLY:
        return AnswerShape("number", prefix, suffix)
    if template.slots >= 2 and "\n" in template.constants[-2]:
        last = [slots[-1] for slots in fillings]
        if sum(len(text) <= 40 and "\n" not in text for text in last) >= _MOSTLY * len(last):
            return AnswerShape("reasoned", prefix, suffix, final=template.constants[-2])
    return AnswerShape("free", prefix, suffix) if template.slots else AnswerShape("free")


def _few(counts: Counter[str]) -> bool:
    """Whether answers repeat as labels do, not as the odd text that is there twice."""
    return sum(counts.values()) >= 3 * len(counts) and max(map(len, counts)) <= 200


def _main(templates: Sequence[Template], answers: Sequence[str]) -> Template:
    counts = Counter(assign(templates, text) for text in answers)
    best = counts.most_common(1)[0]
    return templates[best[0]] if best[1] >= 0.9 * len(answers) else templates[-1]


def _edges(labels: Sequence[str]) -> tuple[str, str]:
    """Whole words that all labels begin and end with."""
    rows = [re.findall(r"\w+|\W", label) for label in labels]
    head = 0
    while all(len(row) > head + 1 for row in rows) and len({row[head] for row in rows}) == 1:
        head += 1
    tail = 0
    while all(len(row) > head + tail + 1 for row in rows) and len({row[-1 - tail] for row in rows}) == 1:
        tail += 1
    return "".join(rows[0][:head]), "".join(rows[0][len(rows[0]) - tail :])


def _share(pattern: re.Pattern[str], texts: Sequence[str]) -> float:
    return sum(pattern.fullmatch(text.strip()) is not None for text in texts) / len(texts)


def _json(answers: Sequence[str]) -> AnswerShape | None:
    objects: list[dict[str, Any]] = []
    layouts: Counter[int] = Counter()
    fences = Counter((text[: max(0, text.find("{"))], text[text.rfind("}") + 1 :]) for text in answers)
    (prefix, suffix), _ = fences.most_common(1)[0]
    for text in answers:
        bare = text[len(prefix) : len(text) - len(suffix)]
        try:
            value = json.loads(bare)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and value:
            objects.append(value)
            layouts.update(i for i, how in enumerate(LAYOUTS) if json.dumps(value, **how) == bare)
    if len(objects) < _MOSTLY * len(answers):
        return None
    keys = Counter(tuple(one) for one in objects).most_common(1)[0][0]
    texts = {key: [one[key] for one in objects if isinstance(one.get(key), str)] for key in keys}
    long = {key: sum(map(len, those)) / len(objects) for key, those in texts.items() if len(those) > len(objects) / 2}
    return AnswerShape(
        "json",
        prefix,
        suffix,
        keys=keys,
        key=max(long, key=lambda key: long[key]) if long else None,
        layout=max(layouts, key=lambda i: (layouts[i], -i)) if layouts else 0,
    )
