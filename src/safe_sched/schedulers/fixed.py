"""Fixed weights: every row gets the factor given for it, in a column of the training set or by its key.

    w_i = the given number,  or 1 for every row

Without weights this scheduler changes nothing, bit for bit. Cost: one look-up per row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from safe_sched.errors import DataError, OptionError
from safe_sched.estimators.prior import RowPrior
from safe_sched.rows.index import RowIndex
from safe_sched.rows.values import RowValues
from safe_sched.scheduler import Observation, PerRow, Scheduler, State, options


@dataclass
class FixedState(State):
    """``weight``: float32 (slots,), the factor of every slot."""

    weight: Annotated[Tensor, PerRow(1)]


COLUMN_WAY = (
    'put the weights into a column of the training set and name it, Fixed(column="weight"), '
    "or tie them to rows with keys=..."
)
"""What to do where positions cannot name rows."""


@options
class Fixed(Scheduler[FixedState]):
    """Given weights per training row.

    Args:
        values: One number >= 0 per row of the training set, in the order in which the trainer holds them (a list,
            a tensor or an array), or None for weight 1 everywhere. Rows with the same content must have the same
            weight. Positions are refused where the trainer moves rows (packing, shuffling).
        keys: Where given, ``values[i]`` belongs to the row with key ``keys[i]`` instead (as ``callback.table()``
            lists keys), in any order; every training row must be among them.
        column: The column of the training set that holds the weight of each row, a number >= 0. Hosted fine-tuning
            services call it ``weight``. A column goes with its rows, so packing, shuffling and streaming are allowed.

    Raises:
        OptionError: A weight is negative or not finite, there are not as many keys as weights, or ``column`` is given
            beside ``values``.
        DataError: At the start of training: the number of weights is not the number of rows, the trainer moves rows,
            two identical rows have different weights, or a row has no weight.

    Example:
        >>> from safe_sched import Fixed
        >>> from safe_sched.rows.index import RowIndex
        >>> scheduler = Fixed([1.0, 0.5, 0.0])
        >>> state = scheduler.init(RowIndex(torch.tensor([30, 10, 20])))
        >>> scheduler.slot_weights(state)  # in the order of the keys
        tensor([0.5000, 0.0000, 1.0000])
    """

    name: ClassVar[str] = "fixed"
    state_type = FixedState
    takes_prior = True

    values: Any = dataclasses.field(default=None, repr=False)
    keys: Any = dataclasses.field(default=None, repr=False)
    column: str | None = None

    def __post_init__(self) -> None:
        if self.column is not None:
            if not self.column:
                raise OptionError("Fixed(column=''): allowed: the name of a column of the training set")
            if self.values is not None or self.keys is not None:
                raise OptionError("Fixed(column=...) reads weights from the training set; leave values and keys out")
            return
        if self.values is None:
            if self.keys is not None:
                raise OptionError("Fixed(keys=...) names rows but gives no weights; add values, one per key")
            return
        values = self._values()
        bad = (~(torch.isfinite(values) & (values >= 0))).nonzero().flatten()
        if bad.numel():
            raise OptionError(
                f"Fixed: weight number {int(bad[0])} is {float(values[bad[0]])}; allowed: finite numbers >= 0"
            )
        if self.keys is not None and len(self.keys) != values.numel():
            raise OptionError(f"Fixed: {len(self.keys)} keys for {values.numel()} weights; give one key per weight")

    def _values(self) -> Tensor:
        # a copy: torch warns of arrays that it may not write to, such as the columns of an Arrow table
        return torch.tensor(np.asarray(self.values), dtype=torch.float32).flatten()

    def _keys(self) -> Tensor:
        keys = self.keys
        if isinstance(keys, list | tuple):
            # numpy makes floats of a list of integers below and above 2**63
            keys = np.array([operator.index(key) % 2**64 for key in keys], dtype=np.uint64)
        return torch.tensor(np.asarray(keys).astype(np.uint64).view(np.int64))

    def settings(self) -> dict[str, Any]:
        """The options as plain JSON values, the weights as a digest; the weights themselves are in the state."""
        if self.column is not None:
            return {"name": self.name, "column": self.column}
        if self.values is None:
            return {"name": self.name, "weights": "equal"}
        given = hashlib.sha256(self._values().numpy().tobytes())
        given.update(b"" if self.keys is None else self._keys().numpy().tobytes())
        return {"name": self.name, "weights": given.hexdigest()[:16]}

    def init(self, index: RowIndex) -> FixedState:
        """See `Scheduler.init`."""
        if self.column is None and self.values is None:
            return FixedState.fresh(index.slots)
        return FixedState(self._weights_by_key(index)(index.keys))

    def grow(self, state: FixedState, index: RowIndex) -> FixedState:
        """See `Scheduler.grow`."""
        if self.column is None:
            return self.init(index)
        added = index.keys[state.weight.numel() :]
        return FixedState(torch.cat([state.weight, self._weights_by_key(index)(added)]))

    def _weights_by_key(self, index: RowIndex) -> Callable[[Tensor], Tensor]:
        if self.column is not None:
            if index.columns is None:
                raise DataError(
                    f"Fixed(column={self.column!r}): nothing reads columns of the training set here; use "
                    "SafeSchedCallback, or give values and keys"
                )
            return index.columns(self.column)
        values = self._values()
        if self.keys is not None:
            return RowValues.of(
                self._keys(),
                values,
                "Fixed(keys=...)",
                "the keys come from another data set, tokenizer or chat template: compute them again on this one",
            )
        if index.row_slots is None:
            raise DataError(
                f"Fixed(values) needs a training set with rows to count, and a stream has none; {COLUMN_WAY}"
            )
        if index.moved is not None:
            raise DataError(f"Fixed(values) gives weights by position, but {index.moved}; {COLUMN_WAY}")
        if values.numel() != index.rows:
            raise DataError(
                f"Fixed has {values.numel()} weights for a training set of {index.rows} rows. The trainer may have "
                f"dropped some; {COLUMN_WAY}"
            )
        return RowValues.of(index.keys[index.row_slots.long()], values, "Fixed")

    def with_prior(self, state: FixedState, prior: RowPrior) -> FixedState:
        """See `Scheduler.with_prior`: the weight of a row is ``1 - p``, as ``safe-sched export`` writes it.

        Raises:
            OptionError: It has weights already.
        """
        if self.values is not None or self.column is not None:
            raise OptionError("Fixed(values) has its weights, and a prior gives others; use Fixed() with the prior")
        return FixedState((1 - prior.p).float())

    def weights(self, state: FixedState, batch: Observation) -> Tensor:
        """See `Scheduler.weights`."""
        return state.weight[batch.slots]

    def slot_weights(self, state: FixedState, slots: Any = slice(None)) -> Tensor:
        """See `Scheduler.slot_weights`."""
        return state.weight[slots]
