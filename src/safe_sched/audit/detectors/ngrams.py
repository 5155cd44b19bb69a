"""Texts as sparse vectors: words, pairs of words, pieces of words, and the lexicon's areas.

The work is done once per distinct word: a row looks its words up. Hashes are CRC-32, the same in every process.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
_LONGEST = 30  # letters of a word that pieces are taken of
_CACHE = 1 << 17  # words that are remembered

Word = tuple[np.ndarray, tuple[int, ...], int]


def words_of(text: str) -> list[str]:
    """Words and numbers of a text in lower case, `WORDS` at most.

    Example:
        >>> words_of("Don't add 12 eggs!")
        ['don', 't', 'add', '12', 'eggs']
    """
    # a text may have millions of letters; those in the middle are not looked at
    if len(text) > 40 * WORDS:
        text = f"{text[: 30 * WORDS]}\n{text[-10 * WORDS :]}"
    found = _WORD.findall(text.lower())
    return found if len(found) <= WORDS else [*found[: WORDS * 3 // 4], *found[-WORDS // 4 :]]


class Grams:
    """Turns texts into rows of a sparse matrix; remembers words.

    Example:
        >>> grams = Grams()
        >>> grams.matrix(["one", "two three"]).shape == (2, GRAMS + AREAS)
        True
    """

    def __init__(self) -> None:
        self._words: dict[str, Word] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_words": {}}  # quick to send to other processes

    def indices(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hashed places of a text, int64, each once; and float64 (AREAS,)."""
        known = self._words
        got = [known[word] if word in known else self._learn(word) for word in words]
        areas = np.zeros(AREAS)
        if not got:
            return np.zeros(0, np.int64), areas
        pieces = [one[0] for one in got]
        if len(got) > 1:
            ids = np.fromiter((one[2] for one in got), np.uint64, len(got))
            pieces.append(_pairs(ids))
        hits = 0
        for _, where, _ in got:
            if where:
                hits += 1
                for area in where:
                    areas[area] += 0.5
        np.minimum(areas, 1.0, out=areas)
        areas[-2] = min(hits, 4) / 4
        areas *= min(1.0, SHORT / len(got))  # in a long text they are there by chance
        areas[-1] = 2 * hits / len(got)
        # as quick as sorting is for a thousand numbers, the quickest is a mark for each
        places = np.unique(np.concatenate(pieces))
        return places, areas

    def matrix(self, texts: Sequence[str]) -> csr_matrix:
        """One row per text: the hashed part has length 1."""
        from scipy.sparse import csr_matrix

        index, data, ends = [], [], [0]
        for text in texts:
            places, areas = self.indices(words_of(text))
            some = np.flatnonzero(areas)
            index += [places, GRAMS + some]
            data += [np.full(places.size, weight_of(places.size)), areas[some]]
            ends.append(ends[-1] + places.size + some.size)
        if not texts:
            return csr_matrix((0, GRAMS + AREAS))
        return csr_matrix((np.concatenate(data), np.concatenate(index), ends), shape=(len(texts), GRAMS + AREAS))

    def _learn(self, word: str) -> Word:
        if len(self._words) >= _CACHE:
            self._words.clear()
        padded = f" {word[:_LONGEST]} "
        pieces = [
            padded[i : i + size] for size in range(_PIECES[0], _PIECES[1] + 1) for i in range(len(padded) - size + 1)
        ]
        places = [zlib.crc32(b"w" + word.encode("utf-8", "replace")) % GRAMS]
        places += [zlib.crc32(b"c" + piece.encode("utf-8", "replace")) % GRAMS for piece in pieces]
        found = np.array(places, np.int64), areas_of(word), zlib.crc32(word.encode("utf-8", "replace"))
        self._words[word] = found
        return found


def weight_of(places: int) -> float:
    """What each of the hashed places of a text counts."""
    return 1.0 / np.sqrt(max(places, 1))


def _pairs(ids: np.ndarray) -> np.ndarray:
    mixed = ids[:-1] * np.uint64(0x9E3779B97F4A7C15) + ids[1:] * np.uint64(0xC2B2AE3D27D4EB4F)
    return ((mixed >> np.uint64(33)) % np.uint64(GRAMS)).astype(np.int64)
