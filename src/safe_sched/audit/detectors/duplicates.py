r"""Rows that are there more than once, word for word or nearly.

Nearly: the sets A, B of their runs of three words overlap, |A & B| / |A | B| >= 0.8, estimated by one-permutation
MinHash (arXiv 1208.1259): every run is hashed into one of `BINS` bins, and the smallest hash of each bin is kept. Two
rows agree in a bin with the probability of their overlap. Rows that agree in a band of bins are compared in full.

*Memory.* Sketches of the first `ROWS` distinct rows are kept, about a kilobyte each; rows behind are compared with
those.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from safe_sched.audit.detectors.ngrams import words_of
from safe_sched.audit.detectors.patterns import nothing
from safe_sched.audit.detectors.sample import digest
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence, Sort

ROWS = 500_000
"""Distinct rows that others are compared with."""

BINS, BAND = 32, 4
NEAR = 0.8
"""Overlap from which on a row is a near-duplicate."""

_RUN = 3  # words
_FEWEST = 8  # words of a row that is compared by its runs; a shorter one by all its words
_EMPTY = np.uint32(0xFFFFFFFF)


class Duplicates:
    """How alike a row is to an earlier one, 0.8 to 1; 1 is the same text.

    Example:
        >>> from safe_sched.audit import audit_row
        >>> texts = ["One, two!", "Other.", "One, two!"]
        >>> rows = [audit_row({"prompt": text, "completion": ""}, number) for number, text in enumerate(texts)]
        >>> detector = Duplicates()
        >>> detector.observe(rows)
        >>> detector.ready()
        >>> detector.score(rows).group
        ['copies of row 0', None, 'copies of row 0']
    """

    name: ClassVar[str] = "duplicate"
    about: ClassVar[str] = "Overlap with another row; 1 is the same text"
    kind: ClassVar[Sort] = "quality"

    def __init__(self, rows: int = ROWS) -> None:
        self._most = rows
        self._exact: dict[int, int] = {}  # hash of a row's texts: place of the first row that has them
        self._bands: dict[int, int] = {}
        self._sketches = np.zeros((1024, BINS), np.uint32)
        self._where: list[str] = []
        self._copied: set[int] = set()  # places of rows that have a copy
        self._words: dict[str, int] = {}

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Keep sketches of rows that are like none before."""
        sketches = self._sketch(rows)
        for row, sketch in zip(rows, sketches, strict=True):
            exact, bands = _key(row), _bands(sketch)
            place, _ = self._like(exact, bands, sketch)
            if place is not None:
                self._copied.add(place)
                continue
            place = len(self._where)
            if place >= self._most:
                continue
            self._where.append(row.where)
            self._exact[exact] = place
            for band in bands:
                self._bands.setdefault(band, place)
            if place >= len(self._sketches):
                self._sketches = np.concatenate([self._sketches, np.zeros_like(self._sketches)])
            self._sketches[place] = sketch

    def ready(self) -> None:
        """Forget what only the first pass needs."""
        self._words.clear()

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """Overlap with the first row that a row is like; nan for rows like no other."""
        value, reasons = nothing(len(rows))
        group: list[str | None] = [None] * len(rows)
        for number, (row, sketch) in enumerate(zip(rows, self._sketch(rows), strict=True)):
            place, overlap = self._like(_key(row), _bands(sketch), sketch)
            if place is None or place not in self._copied:
                continue
            first = self._where[place]
            value[number], group[number] = overlap, f"copies of {first}"
            if row.where == first:
                reasons[number] = "other rows are copies of it"
            else:
                same = (
                    "the same texts as" if overlap == 1.0 else f"about {overlap:.0%} of its runs of words are those of"
                )
                reasons[number] = f"{same} {first}"
        return Evidence(value, reasons, group)

    def settings(self) -> dict[str, object]:
        """How rows are compared."""
        return {"rows": self._most, "bins": BINS, "band": BAND, "near": NEAR, "version": 1}

    def _like(self, exact: int, bands: list[int], sketch: np.ndarray) -> tuple[int | None, float]:
        """The first row that is the same or nearly so, and the overlap."""
        if (place := self._exact.get(exact)) is not None:
            return place, 1.0
        found: tuple[int | None, float] = (None, 0.0)
        for place in sorted({self._bands[band] for band in bands if band in self._bands}):
            overlap = float(np.mean(self._sketches[place] == sketch))
            if overlap >= NEAR and overlap > found[1]:
                found = place, min(overlap, 0.99)  # 1 is for the same text
        return found

    def _sketch(self, rows: Sequence[AuditRow]) -> np.ndarray:
        """uint32 (rows, BINS)."""
        known = self._words
        if len(known) > 1 << 17:
            known.clear()
        ids: list[int] = []
        ends = []
        for row in rows:
            words = [*words_of(row.system), *words_of(row.prompt), *words_of(row.answer)]
            for word in words:
                one = known.get(word)
                if one is None:
                    one = known[word] = zlib.crc32(word.encode("utf-8", "replace"))
                ids.append(one)
            if len(words) < _FEWEST:  # too few runs for a comparison
                del ids[len(ids) - len(words) :]
            ends.append(len(ids))
        sketches = np.full((len(rows), BINS), _EMPTY, np.uint32)
        if ids:
            _minima(np.array(ids, np.uint64), np.array(ends), sketches)
        return sketches


def _key(row: AuditRow) -> int:
    return digest(f"{row.system}\0{row.prompt}\0{row.answer}")


def _minima(ids: np.ndarray, ends: np.ndarray, sketches: np.ndarray) -> None:
    """Hash the runs of all rows at once, and keep the smallest of every bin."""
    owner = np.repeat(np.arange(ends.size), np.diff(ends, prepend=0))
    if ids.size < _RUN:
        return
    mixed = ids[:-2] * np.uint64(0x9E3779B97F4A7C15) + ids[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed += ids[2:] * np.uint64(0x165667B19E3779F9)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(29)
    inside = owner[:-2] == owner[2:]
    mixed, owner = mixed[inside], owner[:-2][inside]
    places = owner * BINS + (mixed >> np.uint64(59)).astype(np.int64)
    np.minimum.at(sketches.reshape(-1), places, (mixed & np.uint64(0xFFFFFFFE)).astype(np.uint32))
    for step in (1, 2, 4, 8, 16):  # an empty bin takes the value of a neighbour, which two like rows do alike
        np.copyto(sketches, np.roll(sketches, step, axis=1), where=sketches == _EMPTY)


def _bands(sketch: np.ndarray) -> list[int]:
    if sketch[0] == _EMPTY:
        return []
    raw = sketch.tobytes()
    # crc and adler together: hash() differs between processes
    parts = [(start, raw[start : start + 4 * BAND]) for start in range(0, 4 * BINS, 4 * BAND)]
    return [start << 64 | zlib.adler32(part) << 32 | zlib.crc32(part) for start, part in parts]
