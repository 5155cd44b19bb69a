"""What the processes of one training run tell each other, so that every one of them has the same scheduler.

To a scheduler, a run on several ranks is a run on one: every rank gets the rows of all, in the order in which one
process would have had them, and does the same arithmetic. So the states are equal on all ranks without ever being sent.
What is sent is a few numbers per row (`safe_sched.training.session`).

Every exchange also says whether the rank is well. An error on one rank so becomes an error on all of them, in place of
ranks that wait for one that will not come.

This module is torch and nothing else; an integration brings the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Exchange(Protocol):
    """Joins the ranks of one run. Every rank must call it the same number of times, in the same order."""

    @property
    def rank(self) -> int:
        """Which of the ranks this is, from 0."""
        ...

    @property
    def ranks(self) -> int:
        """How many there are."""
        ...

    def __call__(self, what: str, *mine: Tensor) -> list[tuple[Tensor, ...]]:
        """What every rank has to say, in the order of the ranks.

        Args:
            what: A name for it, the same on all ranks.
            mine: Tensors on the CPU; as many, and of the same types, on all ranks. Shapes may differ.

        Raises:
            RankError: Another rank has failed, or is at another place.
        """
        ...

    def fail(self, error: BaseException) -> None:
        """Tell the others, at their next exchange, that this rank has failed; harmless when they know already."""
        ...


class Alone:
    """The exchange of a run with one process: what it gives is what it gets."""

    rank, ranks = 0, 1

    def __call__(self, what: str, *mine: Tensor) -> list[tuple[Tensor, ...]]:
        """See `Exchange`."""
        return [mine]

    def fail(self, error: BaseException) -> None:
        """Nobody to tell."""


def by_place(said: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """The rows of a step on all ranks, in the order of one process: by micro-batch, then by rank.

    Args:
        said: Of each rank, first how many rows each of its micro-batches has, int64 (micro-batches,), then columns of
            (rows,) for all of them.

    Returns:
        The columns of every micro-batch.

    Example:
        Two ranks with two micro-batches each, the last of them without a row.

        >>> first = torch.tensor([1, 2]), torch.tensor([10, 11, 12])
        >>> second = torch.tensor([1, 0]), torch.tensor([20])
        >>> [slots.tolist() for (slots,) in by_place([first, second])]
        [[10, 20], [11, 12]]
    """
    split = [[column.split(sizes.tolist()) for column in columns] for sizes, *columns in said]
    columns = zip(*split, strict=True)
    joined = [[torch.cat(parts) for parts in zip(*ranks, strict=True)] for ranks in columns]
    return list(zip(*joined, strict=True))
