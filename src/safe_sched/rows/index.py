"""The rows of a training set by key: which slot a key has, how often it occurs, what the set's fingerprint is.

Slots are the distinct keys in ascending order, so they do not depend on the order of the rows: a shuffled copy
of a data set has the same slots, and a saved state fits it. Memory: 8 bytes per distinct key (12 with its label
tokens) and 4 per row.

A streamed set has no rows to count beforehand: its index grows, slots are numbered in the order of arrival, and
the keys are saved with the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from safe_sched.errors import DataError
from safe_sched.rows.keys import mix64


class RowIndex:
    """Maps row keys to slots.

    Args:
        keys: int64 (rows,), the key of every row of the training set, in the order of the set; or None for a
            stream, whose rows are added as they arrive.
        label_tokens: int64 (rows,), label tokens of every row, where they are to be remembered: as the attribute
            ``label_tokens``, int32 (slots,).

    Attributes:
        columns: Reads a column of the training set by its name, and returns what looks its numbers up by row key, where
            an integration can. Set by the integration.
        moved: Why the position of a row in the data set is not its position here, or None. Set by the integration.

    Raises:
        DataError: ``keys`` is empty.

    Example:
        >>> import torch
        >>> index = RowIndex(torch.tensor([30, 10, 30]))
        >>> index.slots, index.lookup(torch.tensor([30, 99])).tolist()
        (2, [1, -1])
    """

    def __init__(self, keys: Tensor | None, label_tokens: Tensor | None = None) -> None:
        self.streaming = keys is None
        self.row_slots: Tensor | None = None
        self.label_tokens: Tensor | None = None
        self.columns: Callable[[str], Callable[[Tensor], Tensor]] | None = None
        self.moved: str | None = None
        self._slot_of: dict[int, int] = {}
        if keys is None:
            return
        if keys.numel() == 0:
            raise DataError("the training set has no rows; give the trainer at least one row to train on")
        self._keys, inverse = torch.unique(keys, sorted=True, return_inverse=True)
        self.row_slots = inverse.to(torch.int32)
        if label_tokens is not None:
            self.label_tokens = torch.empty(self.slots, dtype=torch.int32)
            self.label_tokens[inverse] = label_tokens.to(torch.int32)

    @property
    def slots(self) -> int:
        """How many distinct rows there are."""
        return len(self._slot_of) if self.streaming else self._keys.numel()

    @property
    def keys(self) -> Tensor:
        """int64 (slots,), the key of every slot."""
        return torch.tensor(list(self._slot_of), dtype=torch.long) if self.streaming else self._keys

    @property
    def counts(self) -> Tensor | None:
        """int64 (slots,), how many rows share each slot; None where every row has its own."""
        if self.row_slots is None or self.slots == self.rows:
            return None
        return torch.bincount(self.row_slots, minlength=self.slots)

    @property
    def rows(self) -> int:
        """How many rows there are; in a stream, how many distinct ones were seen."""
        return self.slots if self.row_slots is None else self.row_slots.numel()

    def lookup(self, keys: Tensor) -> Tensor:
        """The slots of some keys, -1 for a key that is not in the set.

        Args:
            keys: int64 (any,), on any device.

        Returns:
            int64 (any,), on the CPU.
        """
        keys = keys.cpu()
        if self.streaming:
            return torch.tensor([self._slot_of.get(k, -1) for k in keys.tolist()], dtype=torch.long)
        slots = torch.searchsorted(self._keys, keys).clamp(max=self._keys.numel() - 1)
        return torch.where(self._keys[slots] == keys, slots, -1)

    def add(self, keys: Tensor) -> int:
        """Give new keys of a stream their slots; returns how many were new.

        Args:
            keys: int64 (any,), on any device.
        """
        before = len(self._slot_of)
        for key in keys.tolist():
            self._slot_of.setdefault(key, len(self._slot_of))
        return len(self._slot_of) - before

    def fingerprint(self) -> str:
        """A name for the set of rows, the same for every order of them: 16 hexadecimal digits and the row count."""
        mixed, counts = mix64(self.keys), self.counts
        total = int((mixed if counts is None else mixed * counts).sum()) & ((1 << 64) - 1)
        return f"{total:016x}-{self.rows}"
