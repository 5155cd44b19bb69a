"""The one mutable object that integrations talk to: it owns the state, the coverage count and the numbers to log.

The order of calls is that of `safe_sched.training.loop`: ``begin_step`` with everything the optimiser step will train
on, ``weigh`` once per micro-batch after its forward, ``mark_gated`` when its backward came through the gate,
``end_step``. A step in which any of these is missing for any row ends with an error: a run that ends without one was
defended on every row.

**Several processes.** Every rank has a session for the rows that it trains on itself, and the scheduler of each works
on those of all: an `training.ranks.Exchange` joins them by micro-batch, then by rank, which is the order of one
process with micro-batches as large as those of all ranks together. So the states stay equal without being sent. Every
rank must call ``begin_step``, ``weigh`` and ``learn`` equally often, with no rows where it has none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
from torch import Tensor

from safe_sched.errors import CoverageError, DataError, NumericsError, OptionError, StateError
from safe_sched.estimators.prior import RowPrior
from safe_sched.needs import Need
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import Layout, keys_of
from safe_sched.rows.nll import label_counts
from safe_sched.scheduler import Observation, Scheduler, State
from safe_sched.training.checkpoint import load_state, require_same, save_state
from safe_sched.training.ranks import Alone, Exchange, by_place

Normalizer = Literal["token", "row"]

_NAMES = {"nll": "loss"}  # of needs, in messages


def require_normalizer(name: str) -> None:
    """Raise an `OptionError` unless ``name`` is a normaliser."""
    if name not in get_args(Normalizer):
        raise OptionError(f"normalizer={name!r}; allowed: {', '.join(map(repr, get_args(Normalizer)))}")


@dataclass
class Batch:
    """One micro-batch on its way through a step.

    Attributes:
        input_ids: int64 (batch, sequence).
        labels: int64 (batch, sequence), for the losses.
        layout: Where its rows lie.
        slots: int64 (rows,), -1 for a run of tokens without labels, which teaches nothing.
        label_tokens: int64 (rows,).
        factors: float32 (rows,), what the gate multiplies by: 1 until weighed, and for rows that teach nothing.
        observed: What the scheduler was told of the rows that teach, once it was asked for their weights.
        weights: float32 (rows that teach,), its answer.
        gated: Whether a backward came through the gate.
        scale: float32 (rows,), what the weights are multiplied by where rows are sampled (`training.sampling`).
        everyone: int64 (rows of all ranks that teach,), slots and label tokens of what the ranks have for this place of
            the step.
        first: Where its own begin among them.
    """

    input_ids: Tensor
    labels: Tensor
    layout: Layout
    slots: Tensor
    label_tokens: Tensor
    factors: Tensor
    observed: Observation | None = None
    weights: Tensor | None = None
    gated: bool = False
    scale: Tensor | None = None
    everyone: tuple[Tensor, Tensor] | None = None
    first: int = 0

    @property
    def slots_of_all(self) -> Tensor:
        """int64 (any,), the slots of its rows that teach, and of those of other ranks at this place of the step."""
        return self.slots[self.slots >= 0] if self.everyone is None else self.everyone[0]


class Session:
    """A scheduler at work on one training set.

    Args:
        scheduler: The method.
        index: The rows of the training set.
        normalizer: What the weighted loss is a mean over. ``"token"``: the trainer's own mean over label tokens.
            ``"row"``: the mean over rows of each row's mean, as the BDS paper writes its loss; every row then counts
            the same, however long its answer. Equal weights leave training untouched with ``"token"`` only.
        settings: What else a resumed run must have in common with the saved one, as plain JSON values.
        exchange: Joins this session with those of other processes; None where there is one process.

    Example:
        >>> import torch
        >>> from safe_sched import Fixed
        >>> from safe_sched.rows.keys import layout_of, keys_of
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
        >>> where = layout_of(ids)
        >>> session = Session(Fixed([1.0, 0.25]), RowIndex(keys_of(ids, ids, where)))
        >>> (batch,) = session.begin_step([(ids, ids, where)])
        >>> session.weigh(batch).tolist()
        [1.0, 0.25]
        >>> session.mark_gated(batch)
        >>> session.end_step()["safe_sched/weight_mean"]
        0.625
        >>> session.table().column("seen").to_pylist()
        [1, 1]
    """

    def __init__(
        self,
        scheduler: Scheduler[Any],
        index: RowIndex,
        normalizer: Normalizer = "token",
        settings: Mapping[str, Any] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        require_normalizer(normalizer)
        self.exchange: Exchange = Alone() if exchange is None else exchange
        self.scheduler = scheduler
        self.index = index
        self.normalizer = normalizer
        self.settings = dict(settings or {})
        self.state: State = scheduler.init(index)
        self.seen = torch.zeros(index.slots, dtype=torch.int32)
        self.steps = 0
        self.rows_trained = 0
        self._batches: list[Batch] = []
        self._step_rows: tuple[Tensor, Tensor] | None = None
        self._learned: dict[str, float] = {}

    def take_prior(self, p: Tensor) -> None:
        """Give the scheduler what is believed of every row before the run (`safe_sched.estimators.prior`).

        Args:
            p: float (rows,), the probability of being harmful of every row of the training set, in its order.

        Raises:
            DataError: There is not one number from 0 to 1 per row.
            OptionError: The scheduler takes no prior.
        """
        prior = RowPrior.of(p, self.index)
        self.state = self.scheduler.with_prior(self.state, prior)
        self.settings["prior"] = prior.fingerprint()

    # one step ---------------------------------------------------------------------------------------------------

    def require_same(self) -> None:
        """Compare the ranks, before the first step.

        Raises:
            DataError: Another rank has other rows, another order of them, other options, or another saved state.
        """
        order = b"" if self.index.row_slots is None else self.index.row_slots.numpy().tobytes()
        texts = (
            json.dumps(self._binding(), sort_keys=True, default=str).encode(),
            order,
            self.seen.numpy().tobytes() + str(self.steps).encode(),
        )
        mine = torch.tensor([int.from_bytes(hashlib.sha256(text).digest()[:7], "big") for text in texts])
        said = torch.stack([theirs for (theirs,) in self.exchange("settings", mine)])
        other = [rank for rank, same in enumerate((said == said[0]).all(1).tolist()) if not same]
        if other:
            names = ("options or rows", "order of rows", "saved state")
            what = next(name for name, same in zip(names, (said == said[0]).all(0).tolist(), strict=True) if not same)
            raise DataError(
                f"rank {other[0]} does not have the {what} of rank 0. Every process must build the same callback and "
                "the same training set in the same order (do not shard, shuffle or filter it by rank), and resume from "
                "the same checkpoint."
            )

    def begin_step(
        self, batches: Sequence[tuple[Tensor, Tensor, Layout]], stand_ins: Sequence[bool] = ()
    ) -> list[Batch]:
        """Identify every row of an optimiser step before its first forward.

        Args:
            batches: ``(input_ids, labels, layout)`` of each micro-batch, in order.
            stand_ins: Which micro-batches only keep a place, where other ranks have rows: theirs teach nothing.

        Returns:
            One `Batch` per micro-batch.

        Raises:
            CoverageError: A row is not in the training set that was indexed at the start, or the ranks have different
                numbers of micro-batches.
        """
        self._batches = []
        read = [self._read(*batch) for batch in batches]
        for number in (i for i, idle in enumerate(stand_ins) if idle):
            read[number][1].zero_()
        found: list[Batch] = []
        if not self.index.streaming:  # a row that is not known is to be noticed before the others are told
            found = [self._find(*batch, *known) for batch, known in zip(batches, read, strict=True)]
        sizes = torch.tensor([int((tokens > 0).sum()) for _, tokens in read], dtype=torch.long)
        empty = torch.empty(0, dtype=torch.long)
        names = [batch.slots[batch.slots >= 0] for batch in found] or [keys[tokens > 0] for keys, tokens in read]
        told = [tokens[tokens > 0] for _, tokens in read]
        said = self.exchange("rows", sizes, torch.cat([empty, *names]), torch.cat([empty, *told]).to(torch.int32))
        counts = [theirs.numel() for theirs, *_ in said]
        if len(set(counts)) > 1:
            raise CoverageError(
                f"the ranks have {', '.join(map(str, counts))} micro-batches in step {self.steps}, and need as many "
                "each: leave even_batches on, or use dataloader_drop_last=True."
            )
        everyone = [(names, tokens.long()) for names, tokens in by_place(said)]
        if self.index.streaming:
            if sum(self.index.add(keys) for keys, _ in everyone):
                self._grow()
            everyone = [(self.index.lookup(keys), tokens) for keys, tokens in everyone]
            found = [self._find(*batch, *known) for batch, known in zip(batches, read, strict=True)]
        for number, batch in enumerate(found):
            batch.everyone = everyone[number]
            batch.first = sum(int(theirs[number]) for theirs, *_ in said[: self.exchange.rank])
            if number < len(stand_ins) and stand_ins[number]:
                batch.factors.zero_()
        self._batches = found
        slots, tokens = (
            (torch.cat([empty, *column]) for column in zip(*everyone, strict=True)) if found else [empty] * 2
        )
        self._step_rows = slots, tokens
        return self._batches

    @property
    def step_rows(self) -> int:
        """Rows of the optimiser step that teach, those of all ranks together."""
        return 0 if self._step_rows is None else self._step_rows[0].numel()

    def identify(self, input_ids: Tensor, labels: Tensor, layout: Layout) -> Batch:
        """Which rows of the training set a micro-batch holds.

        Args:
            input_ids: int64 (batch, sequence).
            labels: int64 (batch, sequence), -100 where ignored.
            layout: Where its rows lie.

        Raises:
            CoverageError: A row is not in the training set that was indexed at the start.
        """
        keys, tokens = self._read(input_ids, labels, layout)
        if self.index.streaming and self.index.add(keys[tokens > 0]):
            self._grow()
        return self._find(input_ids, labels, layout, keys, tokens)

    @staticmethod
    def _read(input_ids: Tensor, labels: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return keys_of(input_ids, labels, layout).cpu(), label_counts(labels, layout).cpu()

    def _find(self, input_ids: Tensor, labels: Tensor, layout: Layout, keys: Tensor, tokens: Tensor) -> Batch:
        teaches = tokens > 0
        slots = torch.where(teaches, self.index.lookup(keys), -1)
        unknown = (teaches & (slots < 0)).nonzero().flatten()
        if unknown.numel():
            self._raise_unknown(input_ids, layout, unknown)
        return Batch(input_ids, labels, layout, slots, tokens, torch.ones(layout.rows, device=labels.device))

    def _raise_unknown(self, input_ids: Tensor, layout: Layout, unknown: Tensor) -> None:
        row = int(unknown[0])
        head = input_ids[layout.row == row][:12].tolist()
        raise CoverageError(
            f"{unknown.numel()} of {layout.rows} rows in a batch of step {self.steps} are not among the "
            f"{self.index.rows} rows that the training set had at the start (first: row {row} of the batch, tokens "
            f"{head}...). The collator or a transform changes rows at run time, or the set was changed. Switch the "
            "run-time change off, or do it to the data set before training."
        )

    def _grow(self) -> None:
        self.state = self.scheduler.grow(self.state, self.index)
        self.seen = torch.cat([self.seen, self.seen.new_zeros(self.index.slots - self.seen.numel())])

    def weigh(
        self, batch: Batch, measured: Mapping[str, Tensor | None] | None = None, mean_tokens: float | None = None
    ) -> Tensor:
        """The factors of a micro-batch's rows, once its forward is done.

        Args:
            batch: From `begin_step`.
            measured: What was measured of its rows, by the name of the need: (rows,) or (rows, width); None where a
                rank has nothing under a name that others have. All ranks give the same names.
            mean_tokens: Label tokens per row of the optimiser step, as the trainer's loss counts them; needed
                for ``normalizer="row"``.

        Returns:
            float32 (rows,) on the batch's device; also kept in ``batch.factors``.

        Raises:
            NumericsError: A measured value or a weight is not finite, or a weight is negative.
            OptionError: The scheduler does not return one number per row.
        """
        teaches = (batch.slots >= 0).nonzero().flatten()
        mine = {
            name: None if values is None else values.detach().float().cpu()[teaches]
            for name, values in (measured or {}).items()
        }
        for name, values in mine.items():
            self._require_finite(name, values, batch.slots[teaches])
        slots, tokens = batch.everyone or (batch.slots[teaches], batch.label_tokens[teaches])
        seen = Observation(slots, tokens, self.steps, self._of_all(mine), self._step_rows)
        weights = self._require_weights(self.scheduler.weights(self.state, seen), slots)
        factors = weights[batch.first : batch.first + teaches.numel()]
        if self.normalizer == "row":
            if mean_tokens is None:
                raise OptionError('normalizer="row" needs mean_tokens: the label tokens per row of the optimiser step')
            factors = factors * (mean_tokens / batch.label_tokens[teaches])
        if batch.scale is not None:
            factors = factors * batch.scale[teaches]
        batch.factors[teaches.to(batch.factors.device)] = factors.to(batch.factors)
        batch.observed, batch.weights = seen, weights
        return batch.factors

    def _require_finite(self, need: str, values: Tensor | None, slots: Tensor) -> None:
        if values is None:
            return
        bad = ~torch.isfinite(values.flatten(1).sum(1) if values.dim() > 1 else values)
        if bool(bad.any()):
            raise NumericsError(
                f"the {_NAMES.get(need, need)} of {int(bad.sum())} rows is not finite at step {self.steps} (training "
                f"rows {self._rows_of(slots[bad])}). Lower the learning rate, train in bfloat16 or float32 instead of "
                "float16, or look at these rows."
            )

    def _require_weights(self, weights: object, slots: Tensor) -> Tensor:
        """What a scheduler returned, if it is one finite number >= 0 for every row of this micro-batch."""
        name, rows = self.scheduler.name, slots.numel()
        if not isinstance(weights, Tensor):
            raise OptionError(
                f"{name} returned a {type(weights).__name__} as weights; needed: a float32 tensor of shape ({rows},), "
                "one number per row of the micro-batch"
            )
        if weights.shape != (rows,) or weights.dtype != torch.float32:
            raise OptionError(
                f"{name} returned weights of shape {tuple(weights.shape)} and type {weights.dtype} for {rows} rows; "
                f"needed: shape ({rows},) and torch.float32, one number per row of the micro-batch, in its order"
            )
        weights = weights.detach().cpu()
        wrong = (~(torch.isfinite(weights) & (weights >= 0))).nonzero().flatten()
        if wrong.numel():
            raise NumericsError(
                f"{name} returned {wrong.numel()} weights that are negative or not finite at step "
                f"{self.steps} (first: {float(weights[wrong[0]])}); allowed: finite numbers >= 0. Lower its "
                "learning rate."
            )
        return weights

    def _of_all(self, mine: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The measured values with those of the other ranks; without those that some rank does not have."""
        there = torch.tensor([values is not None for values in mine.values()], dtype=torch.bool)
        parts = [torch.empty(0) if values is None else values for values in mine.values()]
        said = self.exchange("measured", there, *parts)
        every = torch.stack([theirs[0] for theirs in said]).all(0).tolist()
        return {
            name: torch.cat([theirs[1 + i] for theirs in said if theirs[1 + i].numel()] or [said[0][1 + i]])
            for i, name in enumerate(mine)
            if every[i]
        }

    # measurements -----------------------------------------------------------------------------------------------

    def needs(self) -> dict[str, Need]:
        """What the scheduler wants to have measured as of now, by name."""
        return {need.name: need for need in self.scheduler.needs_now(self.state)}

    def due(self, need: str, slots: Tensor) -> Tensor:
        """Which rows should be measured when they come by: bool (rows,), False for negative slots."""
        return self._asked(self.scheduler.due, need, slots)

    def unknown(self, need: str, slots: Tensor) -> Tensor:
        """Of which rows no value is known yet: bool (rows,), False for negative slots."""
        return self._asked(self.scheduler.unknown, need, slots)

    def doubtful(self, need: str, slots: Tensor) -> Tensor:
        """Which rows were measured in a time of noise: bool (rows,), False for negative slots."""
        return self._asked(self.scheduler.doubtful, need, slots)

    def _asked(self, question: Callable[[Any, str, Tensor], Tensor], need: str, slots: Tensor) -> Tensor:
        answer = slots.cpu() >= 0
        answer[answer.clone()] = question(self.state, need, slots.cpu()[answer])
        return answer

    def learn(self, need: str, slots: Tensor, values: Tensor) -> None:
        """Give the scheduler what was measured of some rows. Of several ranks each gives its own.

        Args:
            need: The name of the need.
            slots: int64 (rows,), from a `Batch`; negative ones are left out.
            values: float (rows,).

        Raises:
            NumericsError: A value is not finite.
            OptionError: The scheduler takes no such values.
        """
        slots, values = slots.cpu(), values.detach().float().cpu()
        slots, values = slots[slots >= 0], values[slots >= 0]
        self._require_finite(need, values, slots)
        said = self.exchange(need, slots, values)
        slots, values = (torch.cat(parts) for parts in zip(*said, strict=True))
        self._learned |= self.scheduler.learn(self.state, need, slots, values)

    def calibrate(self, need: str, known: Mapping[str, Tensor]) -> None:
        """Give the scheduler what was measured of rows whose nature is known; the same on all ranks."""
        self._learned |= self.scheduler.calibrate(self.state, need, known)

    def note(self, metrics: Mapping[str, float]) -> None:
        """Log some numbers with this step's."""
        self._learned |= metrics

    def mark_gated(self, batch: Batch) -> None:
        """Note that the gradients of a micro-batch came through the gate."""
        batch.gated = True

    def end_step(self) -> dict[str, float]:
        """Let the scheduler learn from the step; returns what to log.

        Raises:
            CoverageError: A micro-batch of the step was trained on without its weights.
        """
        missed = [i for i, batch in enumerate(self._batches) if batch.observed is None or not batch.gated]
        if missed or not self._batches:
            raise CoverageError(
                f"micro-batches {missed} of {len(self._batches)} in step {self.steps} were trained on without passing "
                "the gate: this trainer takes its loss from another output of the model than the gate knows. See "
                "docs/compatibility.md for what is supported."
            )
        step = Observation.concatenate([batch.observed for batch in self._batches if batch.observed is not None])
        metrics = self._learned | self.scheduler.update(self.state, step)
        self._learned = {}
        self.seen.index_add_(0, step.slots, torch.ones(step.slots.numel(), dtype=torch.int32))
        self.rows_trained += step.slots.numel()
        self.steps += 1
        weights = torch.cat([batch.weights for batch in self._batches if batch.weights is not None])
        self._batches = []
        metrics = {f"safe_sched/{name}": value for name, value in metrics.items()}
        if not weights.numel():  # no row of the step has labels
            return metrics
        return {
            **metrics,
            "safe_sched/weight_mean": float(weights.mean()),
            "safe_sched/weight_min": float(weights.min()),
            "safe_sched/weight_max": float(weights.max()),
        }

    # results ----------------------------------------------------------------------------------------------------

    def chances_of(self, slots: Tensor) -> Tensor:
        """How likely some slots should come by where rows are sampled: int64 (n,) -> float32 (n,), above 1 for surely.

        Their weights; but a row that was judged in a time of noise, or that a model has yet to be asked about, comes by
        whatever its weight is.
        """
        chances = self.scheduler.slot_weights(self.state, slots)
        again = self.scheduler.revisit(self.state, slots)
        return torch.where(again, chances.clamp(min=1), chances)

    def row_weights(self) -> Tensor:
        """The weight of every row of the training set now: float32 (rows,), in the order of the set."""
        weights = self.scheduler.slot_weights(self.state)
        return weights if self.index.row_slots is None else weights[self.index.row_slots.long()]

    def effective_sample_size(self) -> float:
        """``(sum w)**2 / sum w**2`` over the rows of the training set: between 1 and their number."""
        weights = self.row_weights().double()
        square = float((weights * weights).sum())
        return float(weights.sum()) ** 2 / square if square else math.nan

    def table(self) -> pa.Table:
        """One line per training row: ``row`` int64, ``key`` uint64, ``weight`` float32, ``seen`` int32.

        ``seen`` counts how often the row's content was trained on, so identical rows share one count. A scheduler may
        add columns, as `safe_sched.BDS` does: ``p_harmful`` with ``p_harmful_low`` and ``p_harmful_high`` (float32, the
        posterior's mean and its 5 % and 95 % quantiles), ``log_odds`` (float32, what the row's scores say, in nats)
        and ``scored`` (int32, how many scores).
        """
        columns = self.scheduler.columns(self.state)
        slots = torch.arange(self.index.slots) if self.index.row_slots is None else self.index.row_slots.long()
        return pa.table(
            {
                "row": pa.array(range(slots.numel()), pa.int64()),
                "key": pa.array(self.index.keys[slots].numpy().view("uint64")),
                "weight": pa.array(self.row_weights().numpy()),
                "seen": pa.array(self.seen[slots].numpy()),
            }
            | {name: pa.array(values[slots].numpy()) for name, values in columns.items()}
        )

    def _rows_of(self, slots: Tensor, at_most: int = 5) -> list[int]:
        rows: list[int] = []
        for slot in slots[:at_most].tolist():
            found = [slot] if self.index.row_slots is None else (self.index.row_slots == slot).nonzero()[0].tolist()
            rows += found
        return rows

    # saving -----------------------------------------------------------------------------------------------------

    def _binding(self) -> dict[str, Any]:
        """What a saved state must agree with."""
        data = "stream" if self.index.streaming else self.index.fingerprint()
        return {"scheduler": self.scheduler.settings(), "normalizer": self.normalizer, "data": data, **self.settings}

    def save(self, path: Path, others: Mapping[str, Tensor] | None = None, **header: Any) -> None:
        """Write the state, the counts and, for a stream, the keys. Every rank must call this; the first one writes.

        Args:
            path: The state file.
            others: What measurements and parts of the loop want to find again, by name.
            header: Plain JSON values.
        """
        tensors = {f"state.{name}": value for name, value in self.state.tensors().items()}
        tensors["seen"] = self.seen
        if self.index.streaming:
            tensors["keys"] = self.index.keys
        tensors |= {f"part.{name}": value for name, value in (others or {}).items()}
        if self.exchange.rank:
            return
        save_state(
            path,
            tensors,
            {**header, **self._binding(), "steps": self.steps, "rows_trained": self.rows_trained},
        )

    def load(self, path: Path, steps: int | None = None) -> dict[str, Tensor]:
        """Go on from what `save` wrote.

        Args:
            path: The state file.
            steps: Optimiser steps that the checkpoint says were done, to be compared.

        Returns:
            The ``others`` that were given to `save`.

        Raises:
            StateError: It is missing, damaged, or was saved by another run.
        """
        tensors, header = load_state(path)
        others = {name.removeprefix("part."): tensors.pop(name) for name in list(tensors) if name.startswith("part.")}
        require_same(path, header, self._binding() | ({} if steps is None else {"steps": steps}))
        fresh = {f"state.{name}": value for name, value in self.state.tensors().items()} | {"seen": self.seen}
        if self.index.streaming:
            fresh["keys"] = self.index.keys
        wrong = fresh.keys() ^ tensors.keys()
        if not self.index.streaming and not wrong:
            later = {f"state.{name}" for name in self.scheduler.state_type.sized_later}
            wrong = {name for name, value in fresh.items() if tensors[name].shape != value.shape and name not in later}
        if wrong:
            raise StateError(
                f"{path} does not hold what this scheduler saves: {', '.join(sorted(wrong))} missing, unknown or of "
                "another size. Resume from another checkpoint."
            )
        if self.index.streaming:
            self.index.add(tensors["keys"])
        prefix = "state."
        fields = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        self.state = self.scheduler.state_type.from_tensors(fields)
        self.seen = tensors["seen"]
        self.steps, self.rows_trained = header["steps"], header["rows_trained"]
        return others
