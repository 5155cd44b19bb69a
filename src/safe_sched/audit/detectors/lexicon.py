"""Words of harmful requests, by area: the vocabulary that a small safety set has gaps in (``lexicon.txt``).

None of them makes a request harmful, and most stand in harmless texts every day. They are features of the text scorer,
which learns from the safety set, from harmless look-alikes and from the file itself what each area is worth there.
"""

from __future__ import annotations

import functools
from importlib.resources import files

NAMES: tuple[str, ...] = ()
_SHORTEST = 4  # letters that a stem has; a shorter word stands for itself
_STEMS: dict[str, tuple[int, ...]] = {}  # areas by their place in `NAMES`
for _line in files("safe_sched.audit.detectors").joinpath("lexicon.txt").read_text("utf-8").splitlines():
    if _line.startswith("["):
        NAMES = (*NAMES, _line.strip("[]"))
    elif not _line.startswith("#"):
        for _word in _line.split():
            _STEMS[_word] = (*_STEMS.get(_word, ()), len(NAMES) - 1)


@functools.lru_cache(maxsize=1 << 16)
def areas_of(word: str) -> tuple[int, ...]:
    """The areas that a word belongs to, by their place in `NAMES`.

    Args:
        word: In lower case.

    Example:
        >>> [NAMES[area] for area in areas_of("forged")], areas_of("forest")
        (['fraud', 'plain'], ())
    """
    found = set(_STEMS.get(word, ()))
    for size in range(_SHORTEST, len(word)):
        found.update(_STEMS.get(word[:size], ()))
    return tuple(sorted(found))
