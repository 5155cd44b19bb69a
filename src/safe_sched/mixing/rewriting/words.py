"""Words as the checks of a rewritten prompt compare them: key words, forms of a word, words that turn a request round.

The lists are English. In another language fewer words are left out as function words, so more must be kept.
"""

from __future__ import annotations

import re
import unicodedata

# scripts without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese characters
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_LETTER = rf"(?:(?![{_UNSPACED}])[^\W_])"
_WORD = re.compile(rf"[{_UNSPACED}]+|{_LETTER}+(?:'{_LETTER}+)*")


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


FUNCTION_WORDS = _listed(
    """a about after again all also am an and any anyone are as at back be because been before being both but by can
    could did do does doing done each either else ever every everyone for from get gets getting give gives go going got
    had has have having he her here hers him his how i i'd i'll i'm i've if in into is isn't it it's its itself just
    let like many may me might mine more most much must my myself of off ok on one only onto or other our out over own
    per please quite rather really same shall she should so some someone something such than that that's the their them
    then there these they they're thing things this those through to too under until up upon us very want wants was way
    ways we we're were what what's when where whether which while who whole whom whose why will with within would yes
    yet you you're your yours"""
)
ASKING_WORDS = _listed(
    """answer ask carefully describe detail detailed details draft easily exactly example explain explanation explicit
    find full fully guide help helps idea ideas instruction instructions know list make makes making method methods
    need needs outline plan possible produce provide question quick quickly recipe recommend say show step steps
    suggest suggestion tell tips tutorial use used using write writing"""
)
NEGATIONS = _listed("not never no nothing none nobody neither nor cannot without")
TURNS = tuple(
    sorted(
        _listed(
            """prevent avoid protect defend defens stop keep refrain resist deter discourag illegal unlawful crime
            wrong danger risk warn report detect recogni spot identif safe secur legal lawful ethic harmless responsib
            educat awareness against instead punish penalt consequenc harmful"""
        )
    )
)
"""Beginnings of words of warning and prevention."""


def spelled(text: str) -> list[str]:
    """The words of a text in order, in small letters and with one spelling of the apostrophe.

    Example:
        >>> spelled("Don’t STOP")
        ["don't", 'stop']
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("ʼ", "'")
    return _WORD.findall(text)


def words_of(text: str) -> set[str]:
    """Its different words; pairs of characters where a script has no spaces."""
    found: set[str] = set()
    for word in spelled(text):
        if re.match(f"[{_UNSPACED}]", word):
            found.update(word[i : i + 2] for i in range(max(len(word) - 1, 1)))
        else:
            found.add(word.removesuffix("'s"))
    return found


def key_words(request: str) -> frozenset[str]:
    """The words that say what a request is for.

    Example:
        >>> sorted(key_words("Tell me how to pick the lock of a neighbor's house."))
        ['house', 'lock', 'neighbor', 'pick']
    """
    words = frozenset(words_of(request) - NEGATIONS - FUNCTION_WORDS)
    return words - ASKING_WORDS or words


def same_word(one: str, other: str) -> bool:
    """Whether two words are forms of one: one begins like the other, but for an ending.

    Example:
        >>> same_word("poison", "poisoning"), same_word("city", "cities"), same_word("car", "card")
        (True, True, False)
    """
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    if len(short) < 4:
        return long in (short + "s", short + "es")
    alike = len(common_start(short, long))
    return short[alike:] in ("", "e", "y") and len(long) - alike <= 4


def turns_of(text: str) -> set[str]:
    """What in a text could turn a request into its opposite: negations, and words of warning and prevention.

    Example:
        >>> sorted(turns_of("Why don't people prevent it?"))
        ['not', 'prevent']
    """
    found = set()
    for word in words_of(text):
        if word in NEGATIONS or word.endswith("n't"):
            found.add("without" if word == "without" else "not")
        elif start := next((start for start in TURNS if word.startswith((start, "un" + start))), None):
            found.add(start)
    return found


def common_start(*texts: str) -> str:
    """What all texts begin with.

    Example:
        >>> common_start("lock", "local")
        'loc'
    """
    first, last = min(texts), max(texts)  # in the order of the alphabet these two differ the earliest
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:size]
