"""What a detector is, and what it says of some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from safe_sched.audit.rows import AuditRow

Sort = Literal["harm", "quality"]


@dataclass(frozen=True)
class Evidence:
    """What a detector says of some rows, in their order.

    Attributes:
        value: float32 (rows,), in a unit of its own: larger is more suspicious, nan where there is nothing to say.
        reasons: In words, for rows where the signal says something, else None. It never quotes the row's text.
        group: What belongs together, such as ``"duplicate of train.jsonl, line 3"``, or None.
    """

    value: np.ndarray
    reasons: Sequence[str | None]
    group: Sequence[str | None]


@runtime_checkable
class Detector(Protocol):
    """One signal. It sees all rows once, is fitted, and then scores them.

    ``observe`` holds bounded memory: sketches and samples, not the rows. ``score`` is pure once the detector is ready:
    a row gets the same value in any batch, in any order and in any process.
    """

    name: ClassVar[str]
    """The column, ``safe_sched.<name>`` in files: lower case letters, digits and ``_``."""

    about: ClassVar[str]
    """One line for the report."""

    kind: ClassVar[Sort]
    """``"harm"`` speaks of how likely the row is harmful; ``"quality"`` is shown beside it."""

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Look at some rows, in the first pass over all of them."""
        ...

    def ready(self) -> None:
        """Fit to what was seen, between the passes."""
        ...

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """What it says of some rows."""
        ...

    def settings(self) -> dict[str, object]:
        """Its options as plain JSON values, for the fingerprint of saved shards."""
        ...


def absolute(detector: Detector) -> bool:
    """Whether a harm detector's values mean the same in every file, as those of a model do.

    It says so by ``absolute: ClassVar[bool] = True``, and must be `Anchored` and `Contrasted`: what its values are
    worth is then learnt from known rows, not from the file.
    """
    return bool(getattr(detector, "absolute", False))


@runtime_checkable
class Anchored(Protocol):
    """A harm detector that knows what harmful rows get, which anchors the calibration."""

    def known(self) -> np.ndarray | None:
        """float32 (n,): the values of known harmful rows, each by a fit that has not seen the row; None: unknown."""
        ...


@runtime_checkable
class Contrasted(Protocol):
    """A harm detector that knows what harmless rows get that sound harmful; it counts where it is `Anchored` too."""

    def known_harmless(self) -> np.ndarray | None:
        """float32 (m,): the values of known harmless rows, each by a fit that has not seen the row; None: unknown."""
        ...
