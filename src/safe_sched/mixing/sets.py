"""Training sets of the kinds that `safe_sched.mixing.mix` takes, and what a mix of each is."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch.utils.data

from safe_sched.errors import DataError
from safe_sched.hooks import manager
from safe_sched.mixing.plan import MixPlan


@runtime_checkable
class RowSet(Protocol):
    """A training set of some kind, as `mix` works with it; plugins bring others (`safe_sched.hooks`)."""

    def sample(self, count: int) -> list[dict[str, Any]]:
        """At most so many of its rows; none of them is lost by that."""
        ...

    def mixed(self, plan: MixPlan) -> Any:
        """The mix, as the same kind of set."""
        ...


def row_set(data: Any) -> RowSet:
    """A training set of any kind that is known, here or to a plugin.

    Raises:
        DataError: It is of none of these kinds.
    """
    if isinstance(data, list | tuple):
        return _List(data)
    found = None if isinstance(data, str | bytes | Path) else manager().hook.safe_sched_row_set(data=data)
    if found is not None:
        return found
    if isinstance(data, str | bytes | Path | Mapping) or not isinstance(data, Iterable | Sized):
        raise DataError(
            f"a {type(data).__name__} is no training set; allowed: a list of dicts, a data set, or a stream of dicts. "
            "Read a file with safe_sched.data.rows.read_rows, or mix it with the command safe-sched mix."
        )
    if isinstance(data, Sized) and hasattr(data, "__getitem__"):
        return _MapStyle(data)  # pyright: ignore[reportArgumentType]
    return _Iterator(data) if isinstance(data, Iterator) else _Stream(data)  # pyright: ignore[reportArgumentType]


def spread(rows: int, count: int) -> list[int]:
    """At most ``count`` numbers below ``rows``, evenly spread.

    Example:
        >>> spread(10, 4), spread(2, 4)
        ([0, 2, 5, 7], [0, 1])
    """
    count = min(rows, count)
    return [i * rows // count for i in range(count)]


class _List:
    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def sample(self, count: int) -> list[dict[str, Any]]:
        return [_dict(self.rows[i], i) for i in spread(len(self.rows), count)]

    def mixed(self, plan: MixPlan) -> Any:
        plan.require_any(len(self.rows))
        mixed = plan.interleave(self.rows)
        return tuple(mixed) if isinstance(self.rows, tuple) else list(mixed)


class MixedRows(torch.utils.data.Dataset[Any]):
    """A map-style set with safety rows between its own; nothing is copied, rows are made when they are asked for.

    Args:
        rows: A set with a length and rows by number.
        plan: What comes between them.
    """

    def __init__(self, rows: Any, plan: MixPlan) -> None:
        self.rows, self.plan = rows, plan
        self.users = len(rows)
        self._length = self.users + plan.require_any(self.users)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Any:
        if not -self._length <= position < self._length:
            raise IndexError(f"row {position} of {self._length}")
        safety, number = self.plan.schedule.at(position % self._length, self.users)
        return self.plan.safety(number) if safety else self.plan.user(self.rows[number])

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(self._length))


class _MapStyle(_List):
    def mixed(self, plan: MixPlan) -> Any:
        return MixedRows(self.rows, plan)


class MixedStream(torch.utils.data.IterableDataset[Any]):
    """A stream with safety rows between its own, mixed as it is read.

    Args:
        rows: Anything that can be iterated, as often as it can be.
        plan: What comes between its rows.
    """

    def __init__(self, rows: Iterable[Any], plan: MixPlan) -> None:
        self.rows, self.plan = rows, plan

    def __iter__(self) -> Iterator[Any]:
        return counted(self.rows, self.plan)

    def set_epoch(self, epoch: int) -> None:
        """What a trainer calls between epochs: other places and orders; a stream that shuffles itself is told too."""
        self.plan = self.plan.at(epoch=epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]


def counted(rows: Iterable[Any], plan: MixPlan) -> Iterator[Any]:
    """A mixed stream that warns at its end if no safety row has come.

    Example:
        >>> import warnings
        >>> from safe_sched.mixing.plan import plan_mix
        >>> row = {"prompt": "How do I pick a lock?", "completion": "I can't help with that."}
        >>> some = plan_mix([row], [row], share=0.01, mimic=False)
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     len(list(counted([row] * 9, some)))
        9
        >>> print(told[0].message)
        share=0.01 of 9 user rows is less than half a safety row, so none has been mixed in. ...
    """
    users = 0

    def count() -> Iterator[Any]:
        nonlocal users
        for row in rows:
            users += 1
            yield row

    yield from plan.interleave(count())
    if plan.schedule.share > 0 and plan.schedule.count(users) == 0:
        warnings.warn(
            f"share={plan.schedule.share:g} of {users} user rows is less than half a safety row, so none has been "
            "mixed in. Raise share, or mix more rows at once.",
            stacklevel=2,
        )


class _Stream:
    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows

    def sample(self, count: int) -> list[dict[str, Any]]:
        return [_dict(row, number) for number, row in enumerate(itertools.islice(self.rows, count))]

    def mixed(self, plan: MixPlan) -> Any:
        return MixedStream(self.rows, plan)


class _Iterator:
    """What can be read once: the sample is kept and comes first."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self.rows = rows

    def sample(self, count: int) -> list[dict[str, Any]]:
        first = list(itertools.islice(self.rows, count))
        self.rows = itertools.chain(first, self.rows)
        return [_dict(row, number) for number, row in enumerate(first)]

    def mixed(self, plan: MixPlan) -> Any:
        return counted(self.rows, plan)


def _dict(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"user row {number} is a {type(row).__name__}; allowed: a dict with named fields")
    return dict(row)
