r"""Rows that are there more than once, word for word or nearly.

Nearly: the sets A, B of their runs of three words overlap, |A & B| / |A | B| >= 0.8, estimated by one-permutation
MinHash (arXiv 1208.1259): every run is hashed into one of `BINS` bins, and the smallest hash of each bin is kept. Two
rows agree in a bin with the probability of their overlap. Rows that agree in a band of bins are compared in full.

*Memory.* Sketches of the first `ROWS` distinct rows are kept while the rows are gone through, about a kilobyte each;
rows behind are compared with those. After that, sketches of rows that have copies are kept, and eight bytes of each
other row.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from safe_sched.audit.detectors.ngrams import words_of
from safe_sched.audit.detectors.rowwise import nothing
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
        self._alone = np.zeros(0, np.uint64)  # sorted hashes of kept rows that have none
        self._words = _Hashes()

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Keep sketches of rows that are like none before."""
        exact = [_key(row) for row in rows]
        new = [number for number, key in enumerate(exact) if key not in self._exact]
        self._copied.update(self._exact[key] for key in exact if key in self._exact)
        for number, sketch in zip(new, self._sketch([rows[number] for number in new]), strict=True):
            bands = _bands(sketch)
            place, _ = self._like(exact[number], bands, sketch)
            if place is not None:
                self._copied.add(place)
                continue
            place = len(self._where)
            if place >= self._most:
                continue
            self._where.append(rows[number].where)
            self._exact[exact[number]] = place
            for band in bands:
                self._bands.setdefault(band, place)
            if place >= len(self._sketches):
                self._sketches = np.concatenate([self._sketches, np.zeros_like(self._sketches)])
            self._sketches[place] = sketch

    def ready(self) -> None:
        """Forget what only the first pass needs: all of the rows without a copy but that they have none."""
        kept = sorted(self._copied)
        new = {old: place for place, old in enumerate(kept)}
        alone = [key for key, place in self._exact.items() if place not in self._copied]
        self._alone = np.sort(np.array(alone, np.uint64))
        self._exact = {key: new[place] for key, place in self._exact.items() if place in new}
        self._bands = {band: new[place] for band, place in self._bands.items() if place in new}
        self._sketches = self._sketches[kept]
        self._where = [self._where[place] for place in kept]
        self._words = _Hashes()

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """Overlap with the first row that a row is like; nan for rows like no other."""
        value, reasons = nothing(len(rows))
        group: list[str | None] = [None] * len(rows)
        exact = [_key(row) for row in rows]
        alone = self._is_alone(exact)
        near = [number for number, key in enumerate(exact) if not alone[number] and key not in self._exact]
        sketches = dict(zip(near, self._sketch([rows[number] for number in near]), strict=True))
        for number, row in enumerate(rows):
            if alone[number]:
                continue
            sketch = sketches.get(number)
            place, overlap = self._like(exact[number], [] if sketch is None else _bands(sketch), sketch)
            if place is None:
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
        return {"rows": self._most, "bins": BINS, "band": BAND, "near": NEAR, "version": 2}

    def _is_alone(self, exact: list[int]) -> list[bool]:
        """Which hashes are those of rows that are like no other."""
        if not self._alone.size:
            return [False] * len(exact)
        keys = np.array(exact, np.uint64)
        places = np.minimum(np.searchsorted(self._alone, keys), self._alone.size - 1)
        return (self._alone[places] == keys).tolist()

    def _like(self, exact: int, bands: list[int], sketch: np.ndarray | None) -> tuple[int | None, float]:
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
        if len(self._words) > 1 << 17:
            self._words = _Hashes()
        known = self._words.__getitem__
        ids: list[int] = []
        ends = []
        for row in rows:
            words = words_of(row.prompt) + words_of(row.answer)
            if row.system:
                words = words_of(row.system) + words
            if len(words) >= _FEWEST:  # else there are too few runs for a comparison
                ids.extend(map(known, words))
            ends.append(len(ids))
        sketches = np.full((len(rows), BINS), _EMPTY, np.uint32)
        if ids:
            _minima(np.array(ids, np.uint64), np.array(ends), sketches)
        return sketches


class _Hashes(dict[str, int]):
    """Hashes of words; a look-up of one that is there is no call of Python's."""

    def __missing__(self, word: str) -> int:
        found = self[word] = zlib.crc32(word.encode("utf-8", "replace"))
        return found


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
