"""The errors this package raises: each says what was seen, what is allowed, and what to do next.

Every class is a `SafeSchedError`, so one ``except`` clause catches whatever stops a defended run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SafeSchedError(Exception):
    """Base class of every error that safe-sched raises on purpose."""


class OptionError(SafeSchedError, ValueError):
    """An option is unknown, out of range, or does not fit another option."""


class DataError(SafeSchedError, ValueError):
    """A data set, a row of it, or a safety set cannot be used as it is."""


class ModelError(SafeSchedError, RuntimeError):
    """The model or the trainer computes its loss in a way the gate does not know."""


class CoverageError(SafeSchedError, RuntimeError):
    """A row would have been trained on without a weight of its own."""


class NumericsError(SafeSchedError, RuntimeError):
    """A loss or a weight is not a finite number."""


class RankError(SafeSchedError, RuntimeError):
    """Another process of the run has failed, or does not do what this one does."""


class UnscoredError(SafeSchedError, RuntimeError):
    """Some rows of a data set could not be scored."""


class PluginError(SafeSchedError, RuntimeError):
    """A plugin is missing, cannot be loaded, or does not do what its hook says."""


class EndpointError(SafeSchedError, RuntimeError):
    """A model server cannot be reached, or does not do what it is asked."""


class StateError(SafeSchedError, RuntimeError):
    """A saved scheduler state, or a cache, is missing, damaged, or belongs to another run."""


def some_of(rows: Sequence[int], at_most: int = 5) -> str:
    """The first few of some row numbers, for a message.

    Example:
        >>> some_of([3, 4, 8], at_most=2)
        '3, 4, ...'
    """
    return ", ".join(map(str, rows[:at_most])) + (", ..." if len(rows) > at_most else "")


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> OptionError:
    """The error for a name that is not in a list of allowed ones, with the nearest allowed name.

    Args:
        kind: What is being named, for example ``"option of BDS"``.
        name: The name that was given.
        allowed: The names that exist.

    Example:
        >>> print(unknown_name("scheduler", "bsd", ["bds", "fixed"]))
        unknown scheduler 'bsd' (did you mean 'bds'?); allowed: 'bds', 'fixed'
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return OptionError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(map(repr, names)) or 'none'}")
