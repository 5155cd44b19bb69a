"""Texts as sparse vectors: words, pairs of words, pieces of words, and the lexicon's areas.

The work is done once per distinct word: a row looks its words up. Hashes are CRC-32, the same in every process.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from safe_sched.audit.detectors.lexicon import NAMES, areas_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

GRAMS = 1 << 16
"""Hashed places."""

AREAS = len(NAMES) + 2
"""Places behind them: one per area of the lexicon, how many words are in it, and their share of all words."""

WORDS = 256
"""Words of a text that are looked at: three quarters of them its first ones, and its last ones."""

SHORT = 16
"""Words of a text, above which the lexicon counts less."""

_PIECES = (3, 5)  # letters of a piece
_WORD = re.compile(r"[^\W\d_]+|\d+")
# of bytes: what is no letter and no digit becomes a blank; letters become "a", digits "0"
_BLANKED = bytes(one if chr(one).isascii() and chr(one).isalnum() else 32 for one in range(256))
_SHAPE = bytes(48 if chr(one).isdigit() else 97 if chr(one).isalpha() else 32 for one in _BLANKED)
_LONGEST = 30  # letters of a word that pieces are taken of
_CACHE = 1 << 17  # words that are remembered
_SIGNS = "\u2019\u201c\u201d\u2018\u2013\u2014\u2026\u2022\u00a0"  # the usual ones beyond ASCII: no part of a word
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_SHIFT, _IN_GRAMS = np.uint64(33), np.uint64(GRAMS - 1)

Word = tuple[bytes, tuple[int, ...], int]  # hashed places, areas, hash; bytes are quicker to put together than arrays


def words_of(text: str) -> list[str]:
    """Words and numbers of a text in lower case, `WORDS` at most.

    Example:
        >>> words_of("Don't add 12 eggs!")
        ['don', 't', 'add', '12', 'eggs']
    """
    # a text may have millions of letters; those in the middle are not looked at
    if len(text) > 40 * WORDS:
        first = _WORD.search(text)
        text = text[first.start() if first else len(text) :]
    if len(text) > 40 * WORDS:
        text = f"{text[: 30 * WORDS]}\n{text[-10 * WORDS :]}"
    found = _all_words(text.lower())
    return found if len(found) <= WORDS else [*found[: WORDS * 3 // 4], *found[-WORDS // 4 :]]


def _all_words(text: str) -> list[str]:
    """All of a text in lower case, as `_WORD` finds them, and many times as quick in plain text."""
    if not text.isascii():
        for sign in _SIGNS:
            text = text.replace(sign, " ")
        if not text.isascii():
            return _WORD.findall(text)
    raw = text.encode()
    shape = raw.translate(_SHAPE)
    found = raw.translate(_BLANKED).decode().split()
    if b"a0" in shape or b"0a" in shape:
        return [word for both in found for word in ([both] if both.isalpha() else _WORD.findall(both))]
    return found


def has_words(text: str) -> bool:
    """Whether there is a word or a number in a text.

    Example:
        >>> has_words("?!"), has_words("hm")
        (False, True)
    """
    return _WORD.search(text) is not None


class Grams:
    """Turns texts into rows of a sparse matrix; remembers words.

    Example:
        >>> grams = Grams()
        >>> grams.matrix(["one", "two three"]).shape == (2, GRAMS + AREAS)
        True
    """

    def __init__(self) -> None:
        self._words = _Words()
        self._last = np.zeros(GRAMS, np.int32)  # see `_distinct`

    def __reduce__(self) -> tuple[type[Grams], tuple[()]]:
        return Grams, ()  # only caches are lost; an array that Ray has sent could not be written

    def indices(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hashed places of a text, int64, each once; and float64 (AREAS,)."""
        if len(self._words) >= _CACHE:
            self._words.clear()
        areas = np.zeros(AREAS)
        if not words:
            return np.zeros(0, np.int64), areas
        got = map(self._words.__getitem__, words)
        each, told, ids = zip(*got, strict=True)
        pieces = list(dict(zip(words, each, strict=True)).values())
        if len(words) > 1:
            pieces.append(_pairs(np.array(ids, np.uint64)).tobytes())
        hits = 0
        for where in told:
            if where:
                hits += 1
                for area in where:
                    areas[area] += 0.5
        np.minimum(areas, 1.0, out=areas)
        areas[-2] = min(hits, 4) / 4
        areas *= min(1.0, SHORT / len(words))  # in a long text they are there by chance
        areas[-1] = 2 * hits / len(words)
        return self._distinct(np.frombuffer(b"".join(pieces), np.int64)), areas

    def matrix(self, texts: Sequence[str]) -> csr_matrix:
        """One row per text: the hashed part has length 1."""
        from scipy.sparse import csr_matrix

        index, data, ends = [], [], [0]
        for text in texts:
            places, areas = self.indices(words_of(text))
            some = np.flatnonzero(areas)
            places.sort()
            index += [places, GRAMS + some]
            data += [np.full(places.size, weight_of(places.size)), areas[some]]
            ends.append(ends[-1] + places.size + some.size)
        if not texts:
            return csr_matrix((0, GRAMS + AREAS))
        return csr_matrix((np.concatenate(data), np.concatenate(index), ends), shape=(len(texts), GRAMS + AREAS))

    def _distinct(self, places: np.ndarray) -> np.ndarray:
        """Each place once, in an order of their own: quicker than sorting, where each place notes who came last."""
        numbers = np.arange(places.size, dtype=np.int32)
        self._last[places] = numbers
        return places[self._last[places] == numbers]


class _Words(dict[str, Word]):
    """What is known of words; a look-up of one that is there is no call of Python's."""

    def __missing__(self, word: str) -> Word:
        padded = f" {word[:_LONGEST]} "
        pieces = [
            padded[i : i + size] for size in range(_PIECES[0], _PIECES[1] + 1) for i in range(len(padded) - size + 1)
        ]
        places = [zlib.crc32(b"w" + word.encode("utf-8", "replace")) % GRAMS]
        places += [zlib.crc32(b"c" + piece.encode("utf-8", "replace")) % GRAMS for piece in pieces]
        found = np.array(places, np.int64).tobytes(), areas_of(word), zlib.crc32(word.encode("utf-8", "replace"))
        self[word] = found
        return found


def weight_of(places: int) -> float:
    """What each of the hashed places of a text counts."""
    return 1.0 / np.sqrt(max(places, 1))


def _pairs(ids: np.ndarray) -> np.ndarray:
    mixed = ids[:-1] * _FIRST + ids[1:] * _SECOND
    return ((mixed >> _SHIFT) & _IN_GRAMS).astype(np.int64)
