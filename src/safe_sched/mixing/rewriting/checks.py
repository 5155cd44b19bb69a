"""Is a rewritten prompt still the request that it was, and a prompt of the task? Checked without a model.

In this order; the first that fails is the reason:

1. *Clean*: not empty, not the request itself; no control or invisible characters, no new links, no new markup, no
   marks of chat templates; not much longer than the request and the longest example together.
2. *Format*: what the caller's ``matches`` says; else the text that all examples begin or end with is there.
3. *A request*: it does not open like a refusal, an answer, or a comment on the rewriting; it is no list of steps.
4. *Intent*: enough of the request's key words are in it, beyond the words of the format. Key words are its words
   without function words and words of asking; two words are the same where one begins like the other.
5. *No turn to the opposite*: no word of warning, of prevention or of negation that the request does not have.

What these cannot see: a text that keeps the words and changes what is asked ("Which plants are poisonous to my
neighbor's dog?"), synonyms (refused although they are right), and words of other languages than English in 3 and 5,
which are lists. In languages that are written without spaces, pairs of characters are taken for words.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from safe_sched.data.rows import core_refusals
from safe_sched.errors import OptionError
from safe_sched.mixing.rewriting.request import REWRITE
from safe_sched.mixing.rewriting.words import common_start, key_words, same_word, spelled, turns_of, words_of

ENOUGH = 4
"""Examples from which on what all of them begin or end with is taken for a part of the format."""


@dataclass(frozen=True)
class Checks:
    """How strict the checks are.

    Attributes:
        keep: Share of the request's key words that must be kept, 0 < keep <= 1.
        longest: Times the longest example and the request together that a prompt may be long, >= 1.

    Raises:
        OptionError: A value is out of range.
    """

    keep: float = 0.6
    longest: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise OptionError(f"keep={self.keep}; allowed: a share above 0, at most 1")
        if not 1 <= self.longest <= 100:
            raise OptionError(f"longest={self.longest}; allowed: a factor from 1 to 100")


class TaskChecks:
    """The checks for one task.

    Args:
        examples: Prompts of the task, as many as there are.
        matches: Whether a prompt has the task's format; None: what all examples begin and end with is compared.
        checks: How strict they are.

    Raises:
        OptionError: There are no examples, or ``matches`` turns most of them away.

    Example:
        >>> topics = ["is rain wet", "do cats bark", "can iron rust", "are all primes odd"]
        >>> task = TaskChecks([f"Question: {topic}? Answer yes or no." for topic in topics])
        >>> prompt = "How do I poison my neighbor's dog?"
        >>> task.problem("Question: how do I poison a neighbor's dog? Answer yes or no.", prompt) is None
        True
        >>> task.problem("How do I poison my neighbor's dog? Answer yes or no.", prompt)
        'it does not begin with the fixed text of the task'
        >>> task.problem("Question: how do I keep a neighbor's dog from poison? Answer yes or no.", prompt)
        'it turns the request into its opposite'
        >>> task.problem("Question: how do I walk a dog? Answer yes or no.", prompt)
        'it does not ask for what the request asks for'
    """

    def __init__(
        self, examples: Sequence[str], matches: Callable[[str], bool] | None = None, checks: Checks | None = None
    ) -> None:
        if not examples:
            raise OptionError("there are no examples of the task's prompts; give some, such as 50")
        if matches is not None and (missed := sum(not matches(example) for example in examples)) * 2 > len(examples):
            raise OptionError(
                f"matches() turns {missed} of {len(examples)} examples away: it belongs to another format than they do"
            )
        self._examples, self._matches, self._checks = examples, matches, checks or Checks()
        self._prefix, self._suffix = _fixed(examples) if len(examples) >= ENOUGH else ("", "")
        self._longest = max(map(len, examples))
        # what most examples have belongs to the format; what some have is no news
        self._words = _common(words_of(self._inner(example)) for example in examples)
        self._turns = _common(turns_of(self._inner(example)) for example in examples)
        self._openings = _common({" ".join(spelled(example)[:2])} for example in examples)
        self._with_steps = sum(_has_steps(example) for example in examples) * 2 >= len(examples)
        self._markup = {mark for example in examples for mark in _markup(example)}
        self._characters = set().union(*(_odd_characters(example) for example in examples))

    @property
    def described(self) -> str:
        """Which check of the format there is, in words."""
        if self._matches is not None:
            return "the caller's matches()"
        if self._prefix or self._suffix:
            return f"begins with {_shortened(self._prefix)}, ends with {_shortened(self._suffix)}"
        return "none: the examples share no beginning and no end"

    def problem(self, rewritten: str, request: str) -> str | None:
        """What is wrong with a rewritten prompt, in words that quote nothing of it; None where nothing is found.

        Args:
            rewritten: The prompt that a model wrote.
            request: The safety prompt that it was given.
        """
        return (
            self._unclean(rewritten, request)
            or self._misfit(rewritten)
            or self._no_request(self._inner(rewritten))
            or self._other_intent(self._inner(rewritten), request)
        )

    def _unclean(self, text: str, request: str) -> str | None:
        if not text.strip():
            return "it is empty"
        if text.strip() == request.strip() and not (self._matches and self._matches(text)):
            return "it is the request, unchanged"
        if _odd_characters(text) - self._characters - _odd_characters(request):
            return "it has control or invisible characters"
        if len(text) > self._checks.longest * (self._longest + len(request)):
            return "it is too long"
        if set(_markup(text)) - self._markup - set(_markup(request)):
            return "it has links, markup or marks of a chat template that neither the request nor an example has"
        return None

    def _misfit(self, text: str) -> str | None:
        if self._matches is not None:
            return None if self._matches(text) else "it does not have the format of the task"
        if not text.startswith(self._prefix):
            return "it does not begin with the fixed text of the task"
        if not text.endswith(self._suffix):
            return "it does not end with the fixed text of the task"
        return None

    def _inner(self, text: str) -> str:
        """Without the fixed text, which may say anything."""
        return text.removeprefix(self._prefix).removesuffix(self._suffix).strip()

    def _no_request(self, inner: str) -> str | None:
        words = spelled(inner)
        opening = " ".join(words) + " "
        if opening.startswith(_refusal_openings()) or _REFUSES.search(opening):
            return "it declines instead of asking"
        if opening.startswith(_ANSWERS) and " ".join(words[:2]) not in self._openings:
            return "it answers instead of asking"
        if _ANSWERS_INSIDE.search(opening) or (_has_steps(inner) and not self._with_steps):
            return "it answers instead of asking"
        if _shingles(inner) & _shingles(REWRITE):
            return "it repeats the instructions"
        return None

    def _other_intent(self, inner: str, request: str) -> str | None:
        keys = key_words(request)
        if not keys:
            return "the request has no key words to compare"
        keys, words = (keys - self._words or keys), words_of(inner)
        kept = sum(any(same_word(key, word) for word in words) for key in keys)
        if kept < math.ceil(self._checks.keep * len(keys)):
            return "it does not ask for what the request asks for"
        if turns_of(inner) - turns_of(request) - self._turns:
            return "it turns the request into its opposite"
        return None


def _common(sets: Iterable[set[str]]) -> set[str]:
    """What is in at least half of some sets, nothing where they are so few that it may be chance."""
    sets = list(sets)
    if len(sets) < ENOUGH:
        return set()
    counts = Counter(item for one in sets for item in one)
    return {item for item, count in counts.items() if count * 2 >= len(sets)}


# what a prompt does not look like -----------------------------------------------------------------------------------

_REFUSES = re.compile(
    r"\b(?:i|we)(?:'m| am|'re| are)? (?:sorry|afraid)\b.{0,40}\b(?:can't|cannot|can not|unable|won't|not able)\b"
    r"|\b(?:i|we) (?:can't|cannot|can not|won't|will not|am unable to|am not able to|must decline to|refuse to) "
    r"(?:help|assist|provide|comply|fulfil|answer|give|share|show|support|rewrite|write|create|discuss|do that|do this)"
    r"|\b(?:i|we) (?:refuse|decline)\b|\bi'm (?:unable|not able) to\b|\bas an ai\b"
    r"|\bagainst my (?:guidelines|policy|policies|programming)\b"
)
_ANSWERS = (
    *("sure ", "certainly ", "of course ", "absolutely ", "here is ", "here are ", "here's ", "step 1 ", "okay so "),
    *("rewritten ", "the rewritten ", "the request ", "note that ", "first you ", "to do this "),
)
_ANSWERS_INSIDE = re.compile(
    r"\b(?:sure|certainly|of course|absolutely) (?:here|i|let|this|the)\b"
    r"|\bhere (?:is|are) (?:how|the steps|some steps)\b"
)


@functools.cache
def _refusal_openings() -> tuple[str, ...]:
    """Four words: three of them open requests as well ("I need to ...")."""
    return tuple({" ".join(spelled(refusal)[:4]) + " " for refusal in core_refusals()})


_STEP = re.compile(r"^\s*(?:step\s+\d+|\d+\s*[.):]|[-*•])\s+\S", re.IGNORECASE | re.MULTILINE)


def _has_steps(text: str) -> bool:
    return len(_STEP.findall(text)) >= 3


_MARKUP = re.compile(
    r"</?[a-zA-Z!][^<>]{0,200}>"  # tags, and marks like <s>
    r"|<<?/?[A-Z]{2,12}>>?|<\|[^<>]{0,60}\|>|\[/?[A-Z_]{2,24}\]|<(?:start|end)_of_[a-z]+>"
    r"|```|^\s*#{1,6}\s|https?:|www\.|javascript:|data:\w+/|!\[|\]\(",
    re.MULTILINE,
)


def _markup(text: str) -> list[str]:
    """Links, markup and the marks of chat templates, each by its kind."""
    return [mark.strip().split(" ")[0].casefold() for mark in _MARKUP.findall(text)]


def _odd_characters(text: str) -> set[str]:
    """Characters that are not seen, other than spaces, line ends and the tabulator."""
    return {
        c for c in text if c not in "\n\t\r" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    }


def _shingles(text: str, size: int = 7) -> set[tuple[str, ...]]:
    words = spelled(text)
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")


def _fixed(examples: Sequence[str]) -> tuple[str, str]:
    """What all examples begin and end with, in whole words; nothing where that is so short that it may be chance."""
    prefix = common_start(*examples)
    if any(len(example) > len(prefix) and example[len(prefix)].isalnum() for example in examples):
        prefix = re.sub(r"\w+\Z", "", prefix)
    rests = [example[len(prefix) :][::-1] for example in examples]
    suffix = common_start(*rests)[::-1]
    if any(len(rest) > len(suffix) and rest[len(suffix)].isalnum() for rest in rests):
        suffix = re.sub(r"\A\w+", "", suffix)
    suffix = suffix.lstrip(".?!,;: ")  # how the last sentence of a prompt ends is its own matter
    return prefix if len(prefix.strip()) >= 6 else "", suffix if len(suffix.strip()) >= 6 else ""
