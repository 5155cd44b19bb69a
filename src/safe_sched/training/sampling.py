"""Acting by sampling: which rows of a step are trained on at all, so that the others cost nothing.

Every row of an optimiser step is kept with a probability that is its weight, and what it teaches is divided by that
probability (Horvitz and Thompson, 1952)::

    p_i = min(max(w_i, floor), 1),      row i is kept where u_i < p_i

    gradient = 1/T sum over kept rows of  w_i / p_i  g_i,      E[gradient] = 1/T sum over all rows of  w_i g_i

with T the label tokens of *all* rows of the step: the expectation is the gradient of the weighted loss, whatever the
weights do between the draw and the step. With weights of 1 every row is kept and every factor is 1.

- *Lazy*: a step is drawn when the data loader asks for it, with the weights of that moment.
- *Counter-based*: ``u`` is a function of (seed, epoch, place in the epoch's order) and of nothing else, so every
  rank draws the same.
- *The steps of an epoch stay what they were*: the same rows in the same order, of which some are left out. So learning
  rate schedules, accumulation and the number of passes over the data stay right.
- *Floor*: a row of weight 0 comes by now and then, so that it can be looked at again. The factor makes up for any
  ``p``, so rows may come by more often than their weights say (`safe_sched.training.session.Session.chances_of`).

The rows kept of a step fill its first micro-batches; the others become idle and need no forward. A step of which
no row is kept trains on one row with the factor 0.

Of several ranks each draws for its own micro-batches, as one process would have drawn for them: a place is one among
the rows of all ranks. Where one rank keeps a row of a micro-batch, the others keep a place for it.

Cost: O(rows of a step). Only steps that are drawn and not yet trained on are remembered, and saved: their
probabilities are all that a resumed run cannot compute again.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_sched.errors import CoverageError, NumericsError, StateError
from safe_sched.rows.keys import mix64
from safe_sched.training.ranks import Alone, Exchange

FLOOR = 0.05
"""The least probability of a row to be kept."""

_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 / golden ratio, as splitmix64 counts


def uniform(seed: int, epoch: int, places: Tensor) -> Tensor:
    """Numbers in [0, 1), each a function of (seed, epoch, place) alone.

    Args:
        seed: Of the run.
        epoch: >= 0.
        places: int64 (n,), >= 0.

    Returns:
        float64 (n,).

    Example:
        >>> import torch
        >>> uniform(0, 0, torch.arange(3))
        tensor([0.1387, 0.9711, 0.2778], dtype=torch.float64)
    """
    key = mix64(mix64(torch.tensor(seed) + _STRIDE) + torch.tensor(epoch + 1) * _STRIDE)
    word = mix64(key + _STRIDE * (places + 1))
    return ((word >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


@dataclass(frozen=True)
class Items:
    """The rows that each item of a training set holds: one, or the several that were packed into it.

    Attributes:
        slots: int (rows,), the slots of all rows, item after item; -1 for a row without labels.
        starts: int64 (items + 1,), where each item's rows begin, or None where every item is one row.

    Example:
        >>> import torch
        >>> items = Items(torch.tensor([4, 0, 7]), starts=torch.tensor([0, 2, 3]))
        >>> [found.tolist() for found in items.rows_of(torch.tensor([1, 0]))]
        [[7, 4, 0], [0, 1, 1]]
    """

    slots: Tensor
    starts: Tensor | None = None

    def rows_of(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of some items, in order.

        Args:
            items: int64 (n,).

        Returns:
            int64 (rows,) slots, and int64 (rows,) whose row each is: a place in ``items``.
        """
        if self.starts is None:
            return self.slots[items].long(), torch.arange(items.numel())
        first, sizes = self.starts[items], self.starts[items + 1] - self.starts[items]
        owner = torch.repeat_interleave(torch.arange(items.numel()), sizes)
        # the rows of an item lie side by side
        within = torch.arange(owner.numel()) - (sizes.cumsum(0) - sizes)[owner]
        return self.slots[first[owner] + within].long(), owner


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of kept rows.

    Attributes:
        items: What the data loader is to load.
        slots: int64 (rows,), the rows that teach, in order.
        tokens: int64 (rows,), their label tokens.
        inverse: float64 (rows,), ``1 / p``; 0 for a stand-in.
        origin: int64 (rows,), in which of the step's micro-batches the row would have been.
        idle: Whether nothing is to be computed for it: its item only stands in.
    """

    items: list[int]
    slots: Tensor
    tokens: Tensor
    inverse: Tensor
    origin: Tensor
    idle: bool


@dataclass(frozen=True)
class Step:
    """An optimiser step as it was drawn.

    Attributes:
        batches: As many as the trainer expects, the idle ones last or in between.
        tokens: int64 (micro-batches,), label tokens of all rows that each would have had.
        rows: Rows that teach, kept or not.
        items: int64 (items,), all items of the step, kept or not.
        p: float32 (items,), their probabilities.
        places: int64 (items,), where they lie among the items that all ranks have for the step.
    """

    batches: list[MicroBatch]
    tokens: Tensor
    rows: int
    items: Tensor
    p: Tensor
    places: Tensor

    @property
    def kept_rows(self) -> int:
        """How many of its rows are trained on."""
        return sum(int((batch.inverse > 0).sum()) for batch in self.batches)

    @property
    def kept(self) -> float:
        """The share of its rows that is trained on."""
        return self.kept_rows / max(self.rows, 1)

    def scales(self, mean: str, share: float | None = None) -> list[Tensor]:
        """What the weights of every micro-batch's rows are multiplied by: float64 (rows,) each.

        Args:
            mean: What the trainer's loss is a mean over, to be made that of all rows: ``"step"``, label tokens of the
                rows trained on; ``"batch"``, those of each micro-batch; ``"row"``, nothing to be made up for.
            share: Of all label tokens of the step, those of rows trained on, where the mean is over several ranks.
        """
        if share is None:
            trained = sum(int(batch.tokens.sum()) for batch in self.batches if not batch.idle)
            share = trained / max(int(self.tokens.sum()), 1)
        scales = []
        for batch in self.batches:
            scale = batch.inverse
            if mean == "step":
                scale = scale * share
            elif mean == "batch":
                scale = scale * (int(batch.tokens.sum()) / self.tokens[batch.origin].clamp(min=1))
            scales.append(scale)
        return scales


class Draws:
    """Draws the rows of one training run, step by step.

    Args:
        items: What the training set's items hold.
        label_tokens: int (slots,), label tokens of every row.
        chances: Gives the weights that some slots have now, from which ``p`` is made: int64 (n,) -> float (n,).
        seed: Of the draws.
        accumulation: Micro-batches of an optimiser step, >= 1.
        floor: Least probability of a row, in (0, 1].
        exchange: Joins the ranks, which have micro-batches of one size.

    Example:
        Four rows, two of which are to teach nothing.

        >>> import torch
        >>> weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> draws = Draws(Items(torch.arange(4)), torch.ones(4), lambda slots: weight[slots], seed=0)
        >>> draws.begin_epoch(0)
        >>> list(draws.walk([[0, 1], [2, 3]]))
        [[0], [2]]
        >>> step = draws.take(1)
        >>> step.kept, step.scales("step")
        (0.5, [tensor([0.5000], dtype=torch.float64)])
    """

    def __init__(
        self,
        items: Items,
        label_tokens: Tensor,
        chances: Callable[[Tensor], Tensor],
        *,
        seed: int,
        accumulation: int = 1,
        floor: float = FLOOR,
        exchange: Exchange | None = None,
    ) -> None:
        self._exchange: Exchange = exchange or Alone()
        self._items = items
        self._label_tokens = label_tokens
        self._chances = chances
        self._seed, self._accumulation, self._floor = seed, accumulation, floor
        self._epoch, self._skip = 0, 0
        self._taken = 0  # steps of the epoch that were trained on, or skipped
        self._ahead: deque[Step] = deque()
        self._order = torch.empty(0, dtype=torch.uint8)  # random numbers from which the epoch's order was drawn
        self._saved: deque[tuple[Tensor, Tensor]] = deque()

    # one epoch --------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, skip: int = 0) -> None:
        """Say which epoch is walked next.

        Args:
            epoch: >= 0.
            skip: Optimiser steps at its start that were done before and are not loaded.

        Raises:
            StateError: The restored draws begin elsewhere in this epoch.
        """
        if self._saved or self._order.numel():
            if epoch == self._epoch and skip and skip != self._taken:
                raise StateError(
                    f"the saved draws of epoch {epoch} go on after {self._taken} optimiser steps, and the trainer goes "
                    f"on after {skip}: it counts them otherwise than the saved run did. Resume with the batch size and "
                    "gradient_accumulation_steps of that run."
                )
            if epoch != self._epoch or not skip:
                self._saved.clear()
                self._order = torch.empty(0, dtype=torch.uint8)
        self._epoch, self._skip, self._taken = epoch, skip, skip
        self._ahead.clear()

    def walk(self, base: Iterable[Sequence[int]], *, regroup: bool = True) -> Iterator[list[int]]:
        """The micro-batches to load, as many as ``base`` has, each with what is kept of the step's items.

        Args:
            base: The micro-batches of the whole epoch, as lists of items.
            regroup: Whether the rows kept may move to an earlier micro-batch of their step.

        Raises:
            StateError: The order of a resumed epoch is not the saved one.
            NumericsError: A weight is negative or not finite.
        """
        self._ahead.clear()
        place, groups = 0, self._groups(base)
        for number, group in enumerate(groups):
            if number < self._skip:
                yield from group
            else:
                self._ahead.append(self._draw(group, place, regroup and self._exchange.ranks == 1))
                yield from (batch.items for batch in self._ahead[-1].batches)
            place += sum(map(len, group)) * self._exchange.ranks

    def _groups(self, base: Iterable[Sequence[int]]) -> Iterator[list[list[int]]]:
        """The micro-batches of every optimiser step; the order is the saved one where the epoch is gone on with."""
        now = torch.get_rng_state()
        resumed = bool(self._order.numel())
        if resumed:
            torch.set_rng_state(self._order)
        else:
            self._order = now
        iterator = iter(base)
        try:
            group = [list(batch) for batch in itertools.islice(iterator, self._accumulation)]
        finally:
            if resumed:
                torch.set_rng_state(now)
        while group:
            yield group
            group = [list(batch) for batch in itertools.islice(iterator, self._accumulation)]

    def _draw(self, group: list[list[int]], place: int, regroup: bool) -> Step:
        items = torch.tensor([item for batch in group for item in batch])
        slots, owner = self._items.rows_of(items)
        places = self._places(group)
        p = self._remembered(items, places)
        if p is None:
            p = self._probabilities(slots, owner, items.numel())
        kept = uniform(self._seed, self._epoch, place + places) < p
        origin = torch.repeat_interleave(torch.arange(len(group)), torch.tensor([len(batch) for batch in group]))
        teaches = slots >= 0
        tokens = torch.zeros(len(group), dtype=torch.long)
        tokens.index_add_(0, origin[owner[teaches]], self._label_tokens[slots[teaches]].long())

        where = kept.nonzero().flatten()
        if regroup and not bool(kept.all()):
            chunks = list(where.split(len(group[0]))) if where.numel() else []
            chunks += [where[:0]] * (len(group) - len(chunks))
        else:
            chunks = [where[origin[where] == number] for number in range(len(group))]
        runs = where.numel() > 0
        batches = []
        for number, chunk in enumerate(chunks):
            stands_in = not chunk.numel()
            if stands_in:
                chunk = (origin == number).nonzero().flatten()[:1]
            mine, of = self._items.rows_of(items[chunk])
            which = mine >= 0
            batches.append(
                MicroBatch(
                    items=items[chunk].tolist(),
                    slots=mine[which],
                    tokens=self._label_tokens[mine[which]].long(),
                    inverse=(0.0 if stands_in else 1.0) / p[chunk].double()[of[which]],
                    origin=origin[chunk][of[which]],
                    idle=stands_in and (runs or number > 0),
                )
            )
        return Step(batches, tokens, int(teaches.sum()), items, p, places)

    def _places(self, group: list[list[int]]) -> Tensor:
        """Where a step's items lie among those of all ranks: by micro-batch, then by rank."""
        places, before = [], 0
        for batch in group:
            start = before + self._exchange.rank * len(batch)
            places.append(torch.arange(start, start + len(batch)))
            before += self._exchange.ranks * len(batch)
        return torch.cat(places)

    def _probabilities(self, slots: Tensor, owner: Tensor, items: int) -> Tensor:
        teaches = slots >= 0
        chances = self._chances(slots[teaches]).float()
        bad = ~(torch.isfinite(chances) & (chances >= 0))
        if bool(bad.any()):
            raise NumericsError(
                f"{int(bad.sum())} rows that are to be drawn have weights that are negative or not finite (first: "
                f"{float(chances[bad][0])}); allowed: finite numbers >= 0. Lower the scheduler's learning rate."
            )
        # an item comes as a whole: as often as the row in it that is to teach most
        most = torch.ones(items).scatter_reduce(0, owner[teaches], chances, "amax", include_self=False)
        return most.clamp(self._floor, 1.0)

    def _remembered(self, items: Tensor, places: Tensor) -> Tensor | None:
        if not self._saved:
            return None
        expected, p = self._saved.popleft()
        # of one process all must be there, of several what is this one's
        fits = expected.numel() == items.numel() * self._exchange.ranks
        if not fits or not torch.equal(items, expected[places]):
            raise StateError(
                f"the trainer goes through epoch {self._epoch} in another order than the saved run did, so what was "
                "drawn of it cannot be gone on with. Resume with the same data set, seed, batch size and sampler, or "
                "from a checkpoint at the end of an epoch."
            )
        return p[places]

    def take(self, batches: int) -> Step:
        """The next step that the trainer has loaded.

        Args:
            batches: How many micro-batches it has of it.

        Raises:
            CoverageError: That is not what was drawn.
        """
        if not self._ahead or len(self._ahead[0].batches) != batches:
            drawn = len(self._ahead[0].batches) if self._ahead else 0
            raise CoverageError(
                f"the trainer has {batches} micro-batches for an optimiser step of which {drawn} were drawn: it does "
                'not take its batches in the order of its batch sampler. Use act="weight" with this trainer.'
            )
        self._taken += 1
        return self._ahead.popleft()

    # saving -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run cannot compute again: the steps that were drawn ahead, and where the epoch stands.

        Every rank must call this; the result is that of one process.
        """
        ahead = [*(self._of_all(step) for step in self._ahead), *self._saved]
        return {
            "epoch": torch.tensor([self._epoch, self._taken]),
            "sizes": torch.tensor([items.numel() for items, _ in ahead], dtype=torch.long),
            "items": torch.cat([items for items, _ in ahead] or [torch.empty(0, dtype=torch.long)]),
            "p": torch.cat([p for _, p in ahead] or [torch.empty(0)]),
            "order": self._order,
        }

    def _of_all(self, step: Step) -> tuple[Tensor, Tensor]:
        said = self._exchange("draws", step.places, step.items, step.p)
        places, items, p = (torch.cat(parts) for parts in zip(*said, strict=True))
        order = places.argsort()
        return items[order], p[order]

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave.

        Raises:
            StateError: It is not that.
        """
        fresh = self.tensors()
        if fresh.keys() != tensors.keys() or int(tensors["sizes"].sum()) != tensors["items"].numel():
            raise StateError("the saved draws are damaged. Resume from another checkpoint.")
        self._epoch, self._taken = tensors["epoch"].tolist()
        sizes = tensors["sizes"].tolist()
        self._saved = deque(zip(tensors["items"].split(sizes), tensors["p"].split(sizes), strict=True))
        self._order = tensors["order"]
