"""A sample that does not depend on the order of what is offered: items whose keys have the smallest hashes."""

from __future__ import annotations

import hashlib
from typing import Generic, TypeVar

T = TypeVar("T")


def digest(text: str) -> int:
    """64 bits of a text, the same in every process.

    Example:
        >>> f"{digest('a'):016x}"
        '40f89e395b66422f'
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class Sample(Generic[T]):
    """At most so many items with distinct keys; every key has the same chance to be in it.

    Args:
        size: How many, >= 1.

    Example:
        >>> one, other = Sample(2), Sample(2)
        >>> for text in "abcda":
        ...     one.add(text, text)
        >>> for text in "dcba":
        ...     other.add(text, text)
        >>> one.items() == other.items(), len(one.items())
        (True, 2)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[int, T] = {}
        self._most = 1 << 64

    def add(self, key: str, item: T) -> None:
        """Offer an item."""
        number = digest(key)
        if number < self._most:
            self._kept[number] = item
            if len(self._kept) >= 2 * self.size:
                self._cut()

    def items(self) -> list[T]:
        """The sample, in the order of the hashes."""
        self._cut()
        return [self._kept[number] for number in sorted(self._kept)]

    def _cut(self) -> None:
        if len(self._kept) > self.size:
            numbers = sorted(self._kept)[: self.size]
            self._kept = {number: self._kept[number] for number in numbers}
            self._most = numbers[-1]
