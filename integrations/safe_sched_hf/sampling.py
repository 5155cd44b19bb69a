"""Acting by sampling on a trainer: its batch sampler is asked for the step, and only what is kept of it is loaded.

The batch sampler of the training loader is replaced for one ``train()``, and given back after it. A micro-batch that
became idle is loaded with one row, which its place needs, and costs no forward and no backward. What arrives is
compared with what was drawn, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from safe_sched.errors import CoverageError, DataError, ModelError
from safe_sched.rows.index import RowIndex
from safe_sched.training.loop import Choice, Part, Run
from safe_sched.training.sampling import Draws, Items, Step
from safe_sched.training.session import Batch
from safe_sched_hf.rows import keys_of_table

_CHUNK = 4096  # packed items read at once


class DrawnBatches:
    """The trainer's batch sampler, of whose micro-batches only some rows are loaded.

    Args:
        base: The trainer's own.
        draws: What decides.
        active: Whether the run is still on; after it, this is ``base``.
    """

    def __init__(self, base: Any, draws: Draws, active: Callable[[], bool]) -> None:
        self._base, self._draws, self._active = base, draws, active

    def __iter__(self) -> Iterator[list[int]]:
        # a batch sampler of another kind may have sized its batches by what is in them
        regroup = type(self._base) is BatchSampler
        return self._draws.walk(self._base, regroup=regroup) if self._active() else iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._base, name)


@dataclass(frozen=True)
class Turn(Choice):
    """An optimiser step as the ranks go through it.

    Attributes:
        step: As this rank has drawn it.
        tokens: Label tokens of the rows that teach.
    """

    step: Step
    tokens: int


class Sampling(Part):
    """A weight is the probability that its row is trained on at all: `safe_sched.training.sampling` in a trainer."""

    name = "sampling"

    def settings(self) -> dict[str, Any]:
        """See `Part.settings`."""
        return {"name": self.name}

    def begin(self, run: Run) -> None:
        """See `Part.begin`.

        Raises:
            DataError: The set is a stream, or packed by the collator.
            ModelError: The loader has no batch sampler, or gives its batches in another order.
        """
        super().begin(run)
        session, loader, trainer = run.session, run.loader, run.trainer
        if session.index.streaming:
            raise DataError(
                'act="sample" chooses among the rows of a set, and this one is a stream: rows that were read have been '
                'paid for. Use act="weight", or a set with a length.'
            )
        # accelerate's loader holds the real one
        self._holder = getattr(loader, "base_dataloader", loader)
        sampler = getattr(self._holder, "batch_sampler", None)
        if sampler is None:
            raise ModelError(
                f'act="sample" needs a data loader with a batch sampler, and {type(loader).__name__} has none; use '
                'act="weight"'
            )
        if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
            raise ModelError(
                'act="sample" needs batches in the order of the sampler: set dataloader_in_order=True, or use '
                'act="weight"'
            )
        self._base = sampler
        self._trainer, self._session, self._state = trainer, session, trainer.state
        self._steps = max(-(-len(loader) // trainer.args.gradient_accumulation_steps), 1)
        self._epoch = -1  # before the first epoch of this run
        tokens = session.index.label_tokens
        assert tokens is not None
        items = items_of(loader.dataset, session.index)
        accumulation = trainer.args.gradient_accumulation_steps
        self.draws = Draws(
            items, tokens, session.chances_of, seed=run.seed, accumulation=accumulation, exchange=session.exchange
        )
        session.settings["sample_seed"] = run.seed

    def save(self) -> dict[str, Tensor]:
        """See `Part.save`."""
        return self.draws.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Part.load`."""
        self.draws.restore(dict(tensors))

    def attach(self) -> None:
        """Put the batch sampler in."""
        own = DrawnBatches(self._base, self.draws, lambda: self._trainer.state is self._state)
        # a DataLoader does not let itself be changed, but asks for its sampler at the start of every epoch
        object.__setattr__(self._holder, "batch_sampler", own)

    def end(self) -> None:
        """Give the loader its own batch sampler back; harmless when called twice."""
        object.__setattr__(self._holder, "batch_sampler", self._base)

    def begin_epoch(self) -> None:
        """Before the trainer goes through its loader."""
        skip = 0
        if self._epoch < 0:  # the first epoch of this run, which may have begun in an earlier one
            self._epoch, skip = divmod(self._trainer.state.global_step, self._steps)
            skip = 0 if self._trainer.args.ignore_data_skip else skip
        else:
            self._epoch += 1
        self.draws.begin_epoch(self._epoch, skip)

    def choose(self, count: int) -> Turn:
        """The next step that the trainer has loaded, as all ranks will go through it.

        Args:
            count: How many micro-batches it has of it.
        """
        step, exchange = self.draws.take(count), self._session.exchange
        idle = [batch.idle for batch in step.batches]
        if exchange.ranks == 1:
            return Turn(idle, [False] * count, step.rows, step.kept, step, int(step.tokens.sum()))
        works = [
            not (batch.idle or (batch.inverse.numel() and not bool(batch.inverse.any()))) for batch in step.batches
        ]
        counts = torch.tensor([step.rows, step.kept_rows, int(step.tokens.sum())])
        said = exchange("drawn", torch.tensor(works), counts)
        anywhere = torch.stack([theirs for theirs, _ in said]).any(0).tolist()
        rows, kept, tokens = torch.stack([theirs for _, theirs in said]).sum(0).tolist()
        if not any(anywhere):  # as one process does: a first row, with the factor 0
            anywhere[0], works[0] = True, exchange.rank == 0
        # the ranks average their gradients in the last micro-batch, so that one is never idle
        idle = [not some and number < count - 1 for number, some in enumerate(anywhere)]
        stand_ins = [not mine and not nothing for mine, nothing in zip(works, idle, strict=True)]
        return Turn(idle, stand_ins, rows, kept / max(rows, 1), step, tokens)

    def scale(self, choice: Choice, batches: Sequence[Batch], mean: str, trained: int) -> None:
        """See `Part.scale`.

        Raises:
            CoverageError: A micro-batch holds other rows than were drawn.
        """
        assert isinstance(choice, Turn)
        turn = choice
        share, ranks = None, self._session.exchange.ranks
        if ranks > 1 and self._trainer.args.average_tokens_across_devices:
            share = trained / max(turn.tokens, 1)
        elif ranks > 1:
            share = trained / max(int(turn.step.tokens.sum()), 1)
        scales = turn.step.scales(mean, share)
        plan = zip(turn.step.batches, scales, turn.idle, turn.stand_ins, strict=True)
        drawn = [(batch, scale, stands_in) for batch, scale, nothing, stands_in in plan if not nothing]
        for (expected, scale, stands_in), batch in zip(drawn, batches, strict=True):
            if stands_in:
                continue
            teaches = batch.slots >= 0
            if not torch.equal(batch.slots[teaches], expected.slots):
                raise CoverageError(
                    f"a micro-batch of step {self._session.steps} holds other rows than were drawn for it "
                    f"({int(teaches.sum())} rows, {expected.slots.numel()} drawn): the collator or a worker changes "
                    'their order. Use act="weight" with this loader.'
                )
            batch.scale = torch.zeros(batch.slots.numel())
            batch.scale[teaches] = scale.float()


def items_of(dataset: Any, index: RowIndex) -> Items:
    """Which rows each item of a training set holds.

    Raises:
        DataError: The collator packs rows, so that it is not known which item they came from.
    """
    assert index.row_slots is not None
    packed = isinstance(dataset, datasets.Dataset) and "seq_lengths" in dataset.column_names
    if not packed and index.rows == len(dataset):
        return Items(index.row_slots)
    if not packed:
        raise DataError(
            f'act="sample" needs to know which rows an item of the set holds: {len(dataset)} items came as '
            f"{index.rows} rows, and there is no column seq_lengths. Pack with SFTConfig(packing=True), or not at all, "
            'or use act="weight".'
        )
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    table = dataset.select_columns(columns).with_format("arrow")
    slots: list[Tensor] = []
    sizes: list[Tensor] = []
    for start in range(0, len(dataset), _CHUNK):
        part: pa.Table = table[start : start + _CHUNK]
        keys, counts = keys_of_table(part)
        slots.append(torch.where(counts > 0, index.lookup(keys), -1).to(torch.int32))
        lengths = pc.call_function("list_value_length", [part.column("seq_lengths").combine_chunks()])
        sizes.append(torch.tensor(lengths.to_numpy(zero_copy_only=False).astype("int64")))
    ends = torch.cat(sizes).cumsum(0)
    return Items(torch.cat(slots), torch.cat([torch.zeros(1, dtype=torch.long), ends]))
