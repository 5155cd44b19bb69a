"""A number for every training row, tied to the row's key.

A key goes with its row wherever a trainer moves it, so a value tied to a key cannot reach another row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_sched.errors import DataError


@dataclass(frozen=True)
class RowValues:
    """Values by row key. Use `of`, then call it with the keys to look up.

    Attributes:
        keys: int64 (distinct,), ascending.
        values: float32 (distinct,).
        name: What gives the values, for messages.
        remedy: What to do where a row has none.

    Example:
        >>> weights = RowValues.of(torch.tensor([30, 10]), torch.tensor([0.5, 1.0]), "Fixed", "add it")
        >>> weights(torch.tensor([10, 30, 10]))
        tensor([1.0000, 0.5000, 1.0000])
    """

    keys: Tensor
    values: Tensor
    name: str
    remedy: str

    @staticmethod
    def of(keys: Tensor, values: Tensor, name: str, remedy: str = "give one") -> RowValues:
        """Tie values to keys.

        Args:
            keys: int64 (rows,).
            values: float32 (rows,).
            name: What gives the values, for messages.
            remedy: What to do where a row has none.

        Raises:
            DataError: Two rows have the same key and different values.
        """
        ordered, order = keys.sort(stable=True)
        sorted_values = values[order]
        differs = ((ordered[1:] == ordered[:-1]) & (sorted_values[1:] != sorted_values[:-1])).nonzero().flatten()
        if differs.numel():
            at = int(differs[0])
            raise DataError(
                f"{name}: rows {int(order[at])} and {int(order[at + 1])} have the same content but weights "
                f"{float(sorted_values[at])} and {float(sorted_values[at + 1])}; give identical rows one weight"
            )
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        return RowValues(ordered[first], sorted_values[first], name, remedy)

    def __call__(self, keys: Tensor) -> Tensor:
        """The value of every key.

        Args:
            keys: int64 (any,).

        Returns:
            float32 (any,).

        Raises:
            DataError: A key has no value.
        """
        missing = int((~torch.isin(keys, self.keys)).sum())
        if missing:
            raise DataError(
                f"{self.name} has no weight for {missing} of {keys.numel()} distinct training rows; {self.remedy}"
            )
        return self.values[torch.searchsorted(self.keys, keys)]

    def fingerprint(self) -> str:
        """A name for the values and their rows, whatever their order: 16 hexadecimal digits."""
        return hashlib.sha256(self.keys.numpy().tobytes() + self.values.numpy().tobytes()).hexdigest()[:16]
