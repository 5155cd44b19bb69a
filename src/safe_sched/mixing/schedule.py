r"""Where safety rows stand among user rows: a function of (seed, epoch, counter), without a generator that has a state.

With share ``s`` of the result, ``r = s / (1 - s)`` safety rows come with every user row. The user rows are cut into
cells of ``1/r`` rows, and safety row number ``k`` stands in the second half of the k-th cell, at a place of its own::

    t_k = (k + 1/2 + u_k / 2) / r       place_k = ceil(t_k)       u_k in [0, 1), from (seed, epoch, k)

so that it comes after ``place_k`` user rows. What follows:

- after ``i`` user rows ``floor(r i)`` safety rows have come, or ``floor(r i + 1/2)``: the count is within 1 of ``r i``;
- ``n`` user rows have ``floor(r n + 1/2)`` in all, the nearest whole number: the last one may have to wait for the end;
- what stands at any one place of the result is known without going through what stands before it.

The sum is exact: ``s`` is taken as the decimal that it was written as, and everything after it is whole numbers.

*Which* safety row number ``k`` is: the set goes round, every row once per round, and every round has an order of its
own. Random words are Philox's (Salmon et al., 2011), whose key is a hash of seed and epoch, and whose counter is ``k``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeVar

import numpy as np

from safe_sched.errors import OptionError

T = TypeVar("T")

_WORD = 1 << 64
_AHEAD = 1024  # places drawn at once: one word is drawn as fast as a thousand


@dataclass(frozen=True)
class Schedule:
    """The places of safety rows in a mix.

    Args:
        share: Safety rows / all rows of the result, at least 0 and below 1.
        safety_rows: How many different ones there are, at least 1.
        seed: Any whole number.
        epoch: Whole number >= 0: every epoch has places and rounds of its own.
        lane: Whole number >= 0: workers that each mix a part of one stream have rounds of their own.

    Raises:
        OptionError: A value is out of range.

    Example:
        One safety row among five rows; this is where the first four stand, and which they are.

        >>> schedule = Schedule(share=0.2, safety_rows=3)
        >>> [schedule.place(k) for k in range(4)], [schedule.pick(k) for k in range(4)]
        ([4, 7, 12, 15], [2, 0, 1, 0])
        >>> schedule.count(10), schedule.count(11)
        (3, 3)
    """

    share: float
    safety_rows: int
    seed: int = 0
    epoch: int = 0
    lane: int = 0
    ratio: Fraction = field(init=False, repr=False, compare=False)
    """Safety rows per user row, r."""
    _drawn: dict[tuple[str, int], list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, int | float | np.floating) or not 0 <= share < 1:
            raise OptionError(f"share={share!r}; allowed: a number >= 0 and < 1, safety rows over all rows of the mix")
        for name, value, least in (("seed", self.seed, None), ("epoch", self.epoch, 0), ("lane", self.lane, 0)):
            if (
                isinstance(value, bool)
                or not isinstance(value, int | np.integer)
                or (least is not None and value < least)
            ):
                what = "a whole number" if least is None else f"a whole number >= {least}"
                raise OptionError(f"{name}={value!r}; allowed: {what}")
        if self.safety_rows < 1:
            raise OptionError(f"safety_rows={self.safety_rows}; allowed: a whole number >= 1")
        share = Fraction(repr(float(self.share)))  # .1 is a tenth, not the float next to it
        object.__setattr__(self, "ratio", share / (1 - share))

    def count(self, users: int) -> int:
        """How many safety rows belong to a number of user rows: the nearest whole number, halves up."""
        return (2 * self.ratio.numerator * users // self.ratio.denominator + 1) // 2

    def place(self, k: int) -> int:
        """How many user rows come before safety row number ``k``. There is no such row where ``share`` is 0."""
        number, place = divmod(k, _AHEAD)
        jitter = self._once("place", number, lambda: self._words("place", number * _AHEAD, 4 * _AHEAD)[::4])[place]
        above = ((2 * k + 1) * _WORD + jitter) * self.ratio.denominator
        return -(-above // (2 * _WORD * self.ratio.numerator))

    def pick(self, k: int) -> int:
        """Which of the safety rows number ``k`` is."""
        number, place = divmod(k, self.safety_rows)
        return self._once("round", number, lambda: self._round(number))[place]

    def at(self, position: int, users: int | None = None) -> tuple[bool, int]:
        """What stands at a place of the result.

        Args:
            position: From 0.
            users: How many user rows there are, None where there is no end.

        Returns:
            Whether it is a safety row, and the number of the safety row or of the user row.

        Example:
            >>> schedule = Schedule(share=0.2, safety_rows=3)
            >>> [schedule.at(position) for position in range(3, 6)]
            [(False, 3), (True, 0), (False, 4)]
        """
        if self.share == 0:
            return False, position
        # place_k + k is at least k/s and below (k + 1)/s: only this one can stand here
        k = self.ratio.numerator * position // (self.ratio.numerator + self.ratio.denominator)
        if users is not None and k >= self.count(users):
            k = self.count(users) - 1
            if k < 0:
                return False, position
        after = self.place(k)
        here = k + (after if users is None else min(after, users))
        return (True, k) if here == position else (False, position - k - (here < position))

    def order(self, users: int) -> np.ndarray:
        """What stands where in the mix of a number of user rows, at once.

        Returns:
            int64 (users + count,), the number of the user row, or ``users + k``.

        Example:
            >>> Schedule(share=0.2, safety_rows=3).order(5).tolist()
            [0, 1, 2, 3, 5, 4]
        """
        count = self.count(users)
        places = np.array([min(self.place(k), users) + k for k in range(count)], dtype=np.int64)
        order = np.empty(users + count, dtype=np.int64)
        is_user = np.ones(users + count, dtype=bool)
        is_user[places] = False
        order[is_user] = np.arange(users)
        order[places] = users + np.arange(count)
        return order

    def _round(self, number: int) -> list[int]:
        words = np.array(self._words("round", number << 64, self.safety_rows), dtype=np.uint64)
        return np.argsort(words, kind="stable").tolist()

    def _once(self, what: str, number: int, draw: Callable[[], list[int]]) -> list[int]:
        """Keeps the latest two of each kind."""
        if (what, number) not in self._drawn:
            for old in [key for key in self._drawn if key[0] == what][:-1]:
                self._drawn.pop(old, None)
            self._drawn[what, number] = draw()
        return self._drawn[what, number]

    def _words(self, what: str, counter: int, count: int) -> list[int]:
        # four words for every number that the counter counts
        name = f"{what} {self.seed} {self.epoch} {self.lane}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        return np.random.Philox(key=key, counter=counter).random_raw(count).tolist()


def interleave(
    user: Iterable[T], schedule: Schedule, safety: Callable[[int], T], first: int = 0, end: bool = True
) -> Iterator[T]:
    """User rows in their order, with safety rows between them.

    Args:
        user: The user rows; none is read before it is asked for.
        schedule: Where safety rows stand.
        safety: Makes safety row number k.
        first: How many user rows came before these, for a stream that starts in the middle. The safety rows that
            stand right behind these have come too.
        end: Whether nothing comes after these, so that the last safety row need not wait.

    Example:
        >>> mixed = interleave("abcdefgh", Schedule(share=0.2, safety_rows=3), lambda k: str(k))
        >>> "".join(mixed)
        'abcd0efg1h'
    """
    if schedule.share == 0:
        yield from user
        return
    users = first
    k = schedule.count(first)
    if k and schedule.place(k - 1) > first:
        k -= 1
    due = schedule.place(k)
    for row in user:
        yield row
        users += 1
        while due <= users:
            yield safety(k)
            k += 1
            due = schedule.place(k)
    if end and k < schedule.count(users):
        yield safety(k)
