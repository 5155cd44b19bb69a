"""A sample of texts that does not depend on their order: those with the smallest hashes."""

from __future__ import annotations

import hashlib


def digest(text: str) -> int:
    """64 bits of a text, the same in every process.

    Example:
        >>> f"{digest('a'):016x}"
        '40f89e395b66422f'
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class Sample:
    """At most so many distinct texts; every distinct text has the same chance to be in it.

    Args:
        size: How many, >= 1.

    Example:
        >>> one, other = Sample(2), Sample(2)
        >>> for text in "abcda":
        ...     one.add(text)
        >>> for text in "dcba":
        ...     other.add(text)
        >>> one.texts() == other.texts(), len(one.texts())
        (True, 2)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[int, str] = {}
        self._most = 1 << 64

    def add(self, text: str) -> None:
        """Offer a text."""
        key = digest(text)
        if key < self._most:
            self._kept[key] = text
            if len(self._kept) >= 2 * self.size:
                self._cut()

    def texts(self) -> list[str]:
        """The sample, in the order of the hashes."""
        self._cut()
        return [self._kept[key] for key in sorted(self._kept)]

    def _cut(self) -> None:
        if len(self._kept) > self.size:
            keys = sorted(self._kept)[: self.size]
            self._kept = {key: self._kept[key] for key in keys}
            self._most = keys[-1]
