"""A request among the sentences of a task's own text.

A slot that holds a news article or a word problem does not hold a bare request: put there alone, it is told by its
length and its punctuation. So one of the task's texts carries it: a run of its clauses is taken out and the request
stands in their place, word for word; only the case of its first letter and its final punctuation follow what is around.

Which clauses of which text: those that make the result most like another row of the task, drawn at random, in its
*profile*: how many words, capitals, numbers and signs of each kind there are,

    distance = sum over kinds k of  w_k | sqrt(count_k) - sqrt(target_k) |
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_QUOTES = r"[\"'”’)\]]{0,3}"
_CLAUSE = re.compile(
    rf".+?(?:[.!?…]{{1,6}}{_QUOTES}(?:\s+|\Z)|[,;:]{_QUOTES}\s+|\s{{1,3}}[-–—]{{1,3}}\s+|\n+|\Z)", re.DOTALL
)
_SIGN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_|\n+")
_SEPARATOR = re.compile(r"(?:[.!?…,;:]+[\"'”’)\]]*|\s[-–—]+)\Z")
_STOPS = re.compile(r"[.!?…][\"'”’)\]]*\Z")
_NEAR = 16  # characters at the end of a text that say what it ends with
_KINDS = 24  # of signs that a task's texts are described by, besides those that every text has
_ALWAYS = (".", "?", "!", ",", ";", ":", "\n", "9", "X", "x")
_ENDS_COUNT = 2.0  # sentences are few, and tell most
_LENGTH_COUNTS = 0.5  # words are counted by kind already
_CLAUSES = 40  # of a text that are looked at; more are taken together


def shape(sign: str) -> str:
    """A word without its letters: "x", "X" where it begins with a capital, "9" for a number; other signs are kept.

    Example:
        >>> [shape(sign) for sign in ("dogs", "Paris", "42", ",")]
        ['x', 'X', '9', ',']
    """
    first = sign[0]
    if first.isalpha():
        return "X" if first.isupper() else "x"
    return "9" if first.isnumeric() else "\n" if first == "\n" else sign


def clauses(text: str) -> list[str]:
    """The clauses of a text, each with the separator behind it; together they are the text.

    Example:
        >>> clauses("If it rains, we stay. And you?")
        ['If it rains, ', 'we stay. ', 'And you?']
    """
    found = _CLAUSE.findall(text)
    if len(found) > _CLAUSES:
        found = [*found[: _CLAUSES - 1], "".join(found[_CLAUSES - 1 :])]
    return found


@dataclass(frozen=True)
class Profiler:
    """Counts the kinds of signs that the texts of a task are made of."""

    kinds: tuple[str, ...]

    @staticmethod
    def of(texts: Sequence[str]) -> Profiler:
        """For some texts of a task."""
        counts = Counter(shape(sign) for text in texts for sign in _SIGN.findall(text))
        return Profiler(tuple(dict.fromkeys([*(kind for kind, _ in counts.most_common(_KINDS)), *_ALWAYS])))

    def counts(self, text: str) -> np.ndarray:
        """float64 (kinds + 1,): signs of each kind, and words."""
        found = Counter(shape(sign) for sign in _SIGN.findall(text))
        counts = [float(found[kind]) for kind in self.kinds]
        return np.array([*counts, float(found["x"] + found["X"] + found["9"])])

    @property
    def weights(self) -> np.ndarray:
        """float64 (kinds + 1,), what a difference in each counts."""
        return np.array([_ENDS_COUNT if kind in ".?!" else 1.0 for kind in self.kinds] + [_LENGTH_COUNTS])


@dataclass(frozen=True)
class Place:
    """Where a request goes: the clauses ``first`` to ``last`` (not included) of a text are taken out."""

    text: str
    first: int
    last: int

    @property
    def words_kept(self) -> int:
        """Words of the text that stay around the request."""
        parts = clauses(self.text)
        return len("".join(parts[: self.first] + parts[self.last :]).split())


def whole(text: str) -> Place:
    """All of a text is taken out."""
    return Place(text, 0, len(clauses(text)))


def choose(
    request: str, target: str, texts: Sequence[str], profiler: Profiler, rng: random.Random
) -> tuple[int, Place]:
    """The text and the place in it where a request makes a row most like the target.

    Args:
        request: What is to be put in.
        target: A text of the task.
        texts: Those that may carry it, at least one.
        profiler: Counts signs.
        rng: Breaks ties.

    Returns:
        Which of the texts, and where in it.
    """
    aim, weights = np.sqrt(profiler.counts(target)), profiler.weights
    body, stop = profiler.counts(_bare(request)), profiler.counts(".")
    best: tuple[float, int, Place] | None = None
    for number, text in enumerate(texts):
        parts = clauses(text)
        size = len(parts)
        counts = np.array([profiler.counts(part) for part in parts]).reshape(size, body.size)
        # the separator of what was there stays; where a text ends without one, a request behind it brings a stop
        ends = [separator_of(part) for part in parts]
        kept = [profiler.counts(end) for end in ends]
        sums = np.vstack([np.zeros_like(body), counts.cumsum(axis=0)])
        spans = [(0, size)] + [(i, j) for i in range(1, size + 1) for j in range(i, size + 1)]
        first, last = np.array(spans).T
        left = sums[-1] - (sums[last] - sums[first]) + body
        for row, (i, j) in enumerate(spans[: len(spans) if size else 0]):
            left[row] += kept[(j if j > i else i) - 1]
            if i and not ends[i - 1]:
                left[row] += stop
        distance = np.abs(np.sqrt(np.maximum(left, 0)) - aim) @ weights
        distance += np.array([rng.random() for _ in spans]) * 1e-6
        nearest = int(distance.argmin())
        if best is None or distance[nearest] < best[0]:
            best = (float(distance[nearest]), number, Place(text, *spans[nearest]))
    if best is None:
        raise ValueError("no text to put a request into")
    return best[1], best[2]


def put(request: str, place: Place) -> str:
    """The text with the request in its place.

    Example:
        >>> put("Tell me how to pick a lock.", Place("It rains, we stay. And you?", 1, 2))
        'It rains, tell me how to pick a lock. And you?'
        >>> put("tell me how to pick a lock", Place("Where is Rome?", 0, 1))
        'Tell me how to pick a lock?'
    """
    parts = clauses(place.text)
    head, tail = "".join(parts[: place.first]), "".join(parts[place.last :])
    if not head and not tail:
        return _end(_case(request, place.text.lstrip()[:1]), place.text)
    after = parts[place.first][:1] if place.first < len(parts) else parts[0][:1]
    if not head:
        body = _case(request, place.text.lstrip()[:1])
    else:
        body = _case(request, "a" if after.islower() or not _begins_sentence(head) else "A")
    if head and not head[-1].isspace():
        head += " " if _SEPARATOR.search(head[-_NEAR:]) else ". "
    if not tail:
        return head + _end(body, place.text)
    taken = parts[place.last - 1] if place.last > place.first else parts[place.first - 1]
    separator = separator_of(taken) or " "
    return head + (_bare(body) + separator if separator.strip() else body.rstrip() + separator) + tail


def separator_of(clause: str) -> str:
    """What a clause ends with: punctuation and space.

    Example:
        >>> separator_of("If it rains, ")
        ', '
    """
    body = clause.rstrip()
    found = _SEPARATOR.search(body[-_NEAR:])
    return (found[0] if found else "") + clause[len(body) :]


def _begins_sentence(head: str) -> bool:
    """Whether a sentence begins behind this."""
    body = head.rstrip()
    spaced = len(body) < len(head)
    return bool(_STOPS.search(body[-_NEAR:])) or head.endswith("\n") or (spaced and body[-1:] in (":", "-", "–", "—"))


def _bare(request: str) -> str:
    """Without its final punctuation."""
    return request.rstrip().rstrip(".?!…")


def _end(request: str, like: str) -> str:
    """With the final punctuation of another text."""
    return _bare(request) + like[len(_bare(like)) :]


def _case(request: str, like: str) -> str:
    """With a first letter as large as another; "I" and words of capitals stay."""
    word = re.match(r"\S*", request)[0]  # pyright: ignore[reportOptionalSubscript]
    if like.isupper():
        return request[:1].upper() + request[1:]
    if like.islower() and re.split(r"['’]", word)[0] != "I" and word[1:] == word[1:].lower():
        return request[:1].lower() + request[1:]
    return request
