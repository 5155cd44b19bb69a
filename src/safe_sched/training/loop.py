"""The training loop as our code sees it: its events, who hears them, and a driver for a plain PyTorch loop.

One optimiser step (the user's own lines are unmarked, ours start with ``>``)::

    > session.begin_step(batches)                # row keys, label counts; an unknown row stops the run
    > before_step                                # gradients are empty: safety batch, probe direction, ratios
      for batch in batches:
    >     before_forward                         # a forward without gradient, where rows are due to be measured
          loss = model(batch)                    # the trainer's own forward and loss
    >     after_forward, session.weigh           # what the forward shows -> scheduler.weights -> a factor per row
          loss.backward()                        # the gate multiplies each row's gradient by its factor
      clip, optimizer.step()
    > after_optimizer                            # parameter noise
    > session.end_step, after_step               # scheduler.update with what the step saw; Lisa's safe phase

Whoever takes part is a `Part`: a *measurement* (`Measurement`) tells the scheduler something about rows, other parts
change what is trained on: safety batch, sampling, Lisa, parameter noise. The loop calls all of them alike and
knows none of them by name. Third parties register both through `safe_sched.hooks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from safe_sched.errors import OptionError, StateError, unknown_name
from safe_sched.needs import NLL, Need
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import IGNORE_INDEX, batch_fields, keys_of
from safe_sched.rows.nll import label_counts
from safe_sched.scheduler import Scheduler, require_options
from safe_sched.training.forward import Forward, listening
from safe_sched.training.ranks import Exchange
from safe_sched.training.session import Batch, Normalizer, Session

Inputs = Mapping[str, Any]
Mean = Literal["micro_batch", "step"]


@dataclass
class Run:
    """One training run, as parts see it.

    Attributes:
        model: What is trained, without wrappers.
        session: Rows, scheduler and state.
        device: Where micro-batches go.
        precision: Makes the context of a forward, such as autocast.
        backward: Adds the gradient of a loss to the model's; with ``reduce=True`` the ranks average theirs in it.
        prepare: Puts a micro-batch where the model is.
        rows_at_once: Rows of a micro-batch.
        safety: Token rows of the safety set (`safe_sched_hf.safety.SafetySet`), where one was given.
        tokenizer: The tokenizer or processor of the rows, or None.
        default_safety: Makes those of the package's own safety set.
        seed: Random seed of the run.
        dataset, collate: The training set and what makes micro-batches of it; None in a loop that has no such thing.
        progress: Whether to show progress bars.
        sharded: Whether each rank holds only a part of every parameter, so that all of them must run every forward.
        safety_weight: Factor of the loss of safety rows.
        wrapped: The model as the ranks share it, where that is another object; gradients of its backwards are averaged.
        trainer: The trainer that drives the run, or None.
        optimizer: The optimiser, or None.
        loader: The training data loader, or None.
    """

    model: nn.Module
    session: Session
    device: torch.device
    backward: Callable[..., None]
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    prepare: Callable[[Inputs], Inputs] = dict
    rows_at_once: int = 8
    safety: Any = None
    tokenizer: Any = None
    default_safety: Callable[[], Any] | None = None
    seed: int = 0
    dataset: Any = None
    collate: Callable[[list[Any]], Any] | None = None
    progress: bool = False
    sharded: bool = False
    safety_weight: float = 1.0
    wrapped: nn.Module | None = None
    trainer: Any = None
    optimizer: Any = None
    loader: Any = None

    @property
    def exchange(self) -> Exchange:
        """Joins the ranks."""
        return self.session.exchange

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.session.steps


@dataclass(frozen=True)
class Choice:
    """Which micro-batches of an optimiser step are computed.

    Attributes:
        idle: Which micro-batches nothing is computed for, on any rank.
        stand_ins: Which only keep a place on this rank, as another has rows there.
        rows: Rows that teach, kept or not, on all ranks.
        kept: The share of them that is trained on.
    """

    idle: list[bool]
    stand_ins: list[bool]
    rows: int
    kept: float


class Part:
    """Takes part in a training run. Every event has a default that does nothing.

    Of several ranks, each calls every event equally often.
    """

    name: ClassVar[str]
    """Its name in the catalogue, in checkpoints and in the manifest."""

    brings_safety_rows: ClassVar[bool] = False
    """Whether it trains on the safety rows itself, in the place of the safety batch of every step."""

    unsharded: str | None = None
    """What it is that needs the whole model on every rank, for the error under FSDP; None: nothing."""

    run: Run
    """The run; there from `begin` on."""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the saved one, as plain JSON values."""
        return {"name": self.name}

    def require(self, scheduler: Scheduler[Any], options: Mapping[str, Any]) -> None:
        """Check what was put together, before there is a trainer.

        Args:
            scheduler: The scheduler of the run.
            options: ``safety_data``, ``safety_weight`` and the other options of the front end.

        Raises:
            OptionError: Something is missing, or does not go together.
        """

    def refuse(self, trainer: Any) -> None:
        """Check the trainer, while the script is still setting up.

        Raises:
            ModelError: It cannot be defended this way, with the reason and the remedy.
        """

    def begin(self, run: Run) -> None:
        """Before training, before a saved state is loaded."""
        self.run = run

    def ready(self) -> None:
        """Before training, after a saved state was loaded: what has to be asked of all rows is asked here."""

    def attach(self) -> None:
        """The last event before training; what it changes is given back by `end`."""

    def begin_epoch(self) -> None:
        """Before the trainer goes through its data once more."""

    def choose(self, count: int) -> Choice | None:
        """Which of the next ``count`` micro-batches are computed; None: all, as they are."""
        return None

    def scale(self, choice: Choice, batches: Sequence[Batch], mean: str, trained: int) -> None:
        """Set ``batch.scale`` of the micro-batches that were chosen.

        Args:
            choice: From `choose`.
            batches: Those that are not idle.
            mean: What the trainer's loss is a mean over: ``"row"``, ``"batch"`` or ``"step"``.
            trained: Label tokens that it is a mean over, where that is ``"step"``.
        """

    def before_step(self, batches: Sequence[Batch]) -> None:
        """Before an optimiser step, while gradients are empty."""

    def before_forward(self, batch: Batch, inputs: Inputs) -> None:
        """Before the training forward of a micro-batch."""

    def after_forward(self, batch: Batch, forward: Forward) -> Tensor | None:
        """After it, before its rows are weighed. A measurement may return a value, or a vector, for every row."""
        return None

    def after_optimizer(self) -> None:
        """After the optimiser has moved the parameters."""

    def after_step(self, *, last: bool, log: bool) -> dict[str, float]:
        """After an optimiser step; returns numbers to log.

        Args:
            last: Whether training ends here. May be told more than once.
            log: Whether the trainer is about to log.
        """
        return {}

    def summary(self) -> dict[str, Any]:
        """What the manifest tells of it, beside its settings."""
        return {}

    def save(self) -> dict[str, Tensor]:
        """What a resumed run needs, as named tensors."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `save`.

        Raises:
            StateError: Something is missing, or of another run.
        """

    def forget(self) -> None:
        """At a checkpoint, let go of what is not in it, so that this run and a resumed one go on alike."""

    def end(self) -> None:
        """Training is over, or has failed. May be called twice."""


N = TypeVar("N", bound=Need)


class Measurement(Part, Generic[N]):
    """Measures something of rows that a scheduler needs.

    Values of every row are returned by ``after_forward`` (then ``every_row`` is true); values of some rows, as they
    become due, are given to ``run.session.learn``.

    Args:
        need: What the scheduler asked for.
    """

    safety: ClassVar[Literal["required", "default", "unused"]] = "unused"
    """Whether it needs safety rows: given ones, or those of the package where none are given."""

    every_row: ClassVar[bool] = False
    """Whether ``after_forward`` returns a value for every row of every micro-batch."""

    def __init__(self, need: N) -> None:
        self.need = need

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The name of the need."""
        return self.need.name

    @property
    def safety_rows(self) -> Any:
        """The safety rows that it asks the model about.

        Raises:
            OptionError: The run has none, and no set to take in their place.
        """
        if self.run.safety is not None:
            return self.run.safety
        if self.run.default_safety is None:
            raise OptionError(
                f"{self.name!r} is measured with safety rows, and this run has none: give safety=SafetySet(...)"
            )
        return self.run.default_safety()

    def require(self, scheduler: Scheduler[Any], options: Mapping[str, Any]) -> None:
        """See `Part.require`: safety rows, where they are needed."""
        if self.safety == "required" and options.get("safety_data") is None:
            raise OptionError(
                f"{scheduler.name!r} measures {self.name!r} with safety rows: give safety_data, for example "
                'safety_data="core"'
            )


class NLLMeasurement(Measurement[Need]):
    """The loss of every row, from the training forward itself."""

    every_row = True

    def after_forward(self, batch: Batch, forward: Forward) -> Tensor | None:
        """See `Part.after_forward`: float32 (rows,), nats per token."""
        return forward.nll


class Company:
    """All that take part in a run, as one.

    Args:
        measurements: What the scheduler needs, in its order.
        parts: The other parts, in the order in which they hear of events, after the measurements.

    Raises:
        OptionError: Two have one name.
    """

    def __init__(self, measurements: Sequence[Measurement[Any]], parts: Sequence[Part]) -> None:
        self.measurements, self.parts = list(measurements), list(parts)
        names = [part.name for part in self]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError(f"{', '.join(map(repr, sorted(twice)))} takes part twice; give each part once")

    def __iter__(self) -> Iterator[Part]:
        return iter([*self.measurements, *self.parts])

    def begin(self, run: Run) -> None:
        """See `Part.begin`."""
        self.run = run
        for part in self:
            part.begin(run)

    def each(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Tell everyone of an event without an answer."""
        for part in self:
            getattr(part, event)(*args, **kwargs)

    def choose(self, count: int) -> tuple[Part, Choice] | None:
        """The choice of the first part that makes one."""
        for part in self.parts:
            if (choice := part.choose(count)) is not None:
                return part, choice
        return None

    def after_forward(self, batch: Batch, forward: Forward, mean_tokens: float) -> None:
        """Measure a micro-batch, weigh its rows, and bind the weights to its backward."""
        session = self.run.session
        measured: dict[str, Tensor | None] = {"nll": forward.nll if forward.nll_is_free else None}
        for part in self:
            values = part.after_forward(batch, forward)
            if isinstance(part, Measurement) and part.every_row:
                measured[part.name] = values
        session.weigh(batch, measured, mean_tokens)
        forward.bind(lambda: session.mark_gated(batch))

    def after_step(self, *, last: bool, log: bool) -> dict[str, float]:
        """See `Part.after_step`; the names of the numbers begin with ``safe_sched/``."""
        found: dict[str, float] = {}
        for part in self:
            found |= part.after_step(last=last, log=log)
        return {f"safe_sched/{name}": value for name, value in found.items()}

    def settings(self) -> list[dict[str, Any]]:
        """Those of the parts; what is measured follows from the scheduler's own."""
        return [part.settings() for part in self.parts]

    def save(self) -> dict[str, Tensor]:
        """What everyone saves, by name."""
        return {f"{part.name}.{name}": value for part in self for name, value in part.save().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `save`.

        Raises:
            StateError: There is something of a part that does not take part, or something is missing.
        """
        left = set(tensors)
        for part in self:
            own = {name: tensors[name] for name in tensors if name.startswith(f"{part.name}.")}
            left -= own.keys()
            part.load({name.removeprefix(f"{part.name}."): value for name, value in own.items()})
        if left:
            raise StateError(
                f"the saved state holds {', '.join(sorted(left))}, which nothing in this run has saved. Resume with "
                "the same scheduler and parts, or start again without resuming."
            )


def part_of(part: Part | str, /, **options: Any) -> Part:
    """A part from the name under which it is registered and its options; a part that is built already is given back.

    Raises:
        OptionError: The name or an option is unknown, or what was given is no part.
    """
    if isinstance(part, Part):
        return part
    from safe_sched.hooks import parts  # here, so that importing the core loads no plugin

    known = parts()
    if not isinstance(part, str):
        raise OptionError(f"{part!r} is no part of the loop; allowed: a Part, or a name: {', '.join(sorted(known))}")
    if part not in known:
        raise unknown_name("part", part, known)
    require_options(known[part], options)
    return known[part](**options)


def measurements_for(scheduler: Scheduler[Any]) -> list[Measurement[Any]]:
    """What measures the needs of a scheduler: ours, or those that a plug-in registers under the need's name.

    Raises:
        OptionError: Nothing measures it, or two needs of one name differ.
    """
    found: dict[str, Need] = {}
    for need in scheduler.needs:
        if found.setdefault(need.name, need) != need:
            raise OptionError(
                f"{scheduler.name!r} needs {need.name!r} twice, with different options: {need}, {found[need.name]}"
            )
    # here, so that a scheduler without needs loads no plugin
    from safe_sched.hooks import measurements

    known: dict[str, type[Measurement[Any]]] = {NLL.name: NLLMeasurement}
    if found.keys() - known.keys():
        known |= measurements()
    for name in found:
        if name not in known:
            raise OptionError(
                f"{scheduler.name!r} needs {name!r}, which nothing that is installed can measure (known: "
                f"{', '.join(sorted(known))}). Install what brings it; for training a language model: "
                "pip install 'safe-sched[trl]'"
            )
    return [known[name](need) for name, need in found.items()]


class TrainingLoop:
    """A plain PyTorch loop, defended: the same arithmetic as `safe_sched_hf.SafeSchedCallback` in a trainer.

    Call `step` around every optimiser step and `forward` around the forward of every micro-batch. One process with one
    device, or several that share nothing but ``exchange``; losses are not scaled, so train in bfloat16 or float32.

    Args:
        model: A causal language model that returns ``logits``, such as those of transformers.
        scheduler: The scheduler.
        rows: The training rows: micro-batches of ``input_ids`` and ``labels`` (and ``attention_mask``), each int64
            (rows, sequence). How rows are padded or grouped does not matter. None: rows are known as they come by.
        optimizer: The optimiser.
        parts: What else takes part, for example `safe_sched_hf.safety.SafetyBatch`, or names of registered parts.
        safety: Token rows of a safety set (`safe_sched_hf.safety.SafetySet`), for what needs them.
        safety_weight: Factor of the loss of safety rows, >= 0.
        normalizer: What the weighted loss is a mean over, see `safe_sched.training.session.Session`.
        mean: Over what the loop's own loss is a mean: the label tokens of each ``"micro_batch"``, and then over those
            of the step; or of the whole ``"step"``.
        seed: Random seed of the parts.
        precision: Makes the context of a forward, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        exchange: Joins several processes; None: one process.

    Raises:
        OptionError: An option is out of range, something is missing, or a part chooses micro-batches, as sampling does.

    Example:
        See ``examples/pytorch_loop.py``::

            loop = TrainingLoop(model, BDS(), rows, optimizer, parts=[SafetyBatch()], safety=safety)
            for batches in steps:
                with loop.step(batches):
                    for batch in batches:
                        with loop.forward(batch):
                            loss = model(**batch).loss / len(batches)
                        loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            loop.close()
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Scheduler[Any],
        rows: Sequence[Inputs] | None,
        optimizer: torch.optim.Optimizer,
        *,
        parts: Sequence[Part | str] = (),
        safety: Any = None,
        safety_weight: float = 1.0,
        normalizer: Normalizer = "token",
        mean: Mean = "micro_batch",
        seed: int = 0,
        precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        exchange: Exchange | None = None,
    ) -> None:
        if mean not in get_args(Mean):
            raise OptionError(f"mean={mean!r}; allowed: {', '.join(map(repr, get_args(Mean)))}")
        if not 0 <= safety_weight < float("inf"):
            raise OptionError(f"safety_weight={safety_weight}; allowed: a finite number >= 0")
        self.company = Company(measurements_for(scheduler), [part_of(part) for part in parts])
        for part in self.company:
            if type(part).choose is not Part.choose:
                raise OptionError(
                    f"{part.name!r} chooses which micro-batches are computed, and a plain loop computes all of them; "
                    "leave it out, or use safe_sched_hf.SafeSchedCallback"
                )
        given = {"safety_data": safety, "safety_weight": safety_weight, "model_temperature": 0.0}
        self.company.each("require", scheduler, given)
        settings = {
            "parts": self.company.settings(),
            "safety": None if safety is None else safety.settings() | {"weight": safety_weight},
        }
        self.session = Session(scheduler, _index(rows), normalizer, settings, exchange)
        device = next(model.parameters()).device
        self._model, self._mean = model, mean
        self._waiting: list[tuple[Inputs, Batch, float]] = []

        def prepare(inputs: Inputs) -> Inputs:
            return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

        self.company.begin(
            Run(
                model,
                self.session,
                device,
                backward=lambda loss: loss.backward(),
                precision=precision,
                prepare=prepare,
                safety=safety,
                tokenizer=getattr(safety, "tokenizer", None),
                seed=seed,
                dataset=rows,
                collate=_side_by_side,
                safety_weight=safety_weight,
                optimizer=optimizer,
            )
        )
        self._hook = optimizer.register_step_post_hook(lambda *_: self.company.each("after_optimizer"))
        self._ready = False

    @contextlib.contextmanager
    def step(self, batches: Sequence[Inputs]) -> Iterator[dict[str, float]]:
        """One optimiser step. Gradients must be empty when it begins.

        Args:
            batches: Its micro-batches, those that `forward` is then called with.

        Yields:
            Numbers to log, filled when the step is over.

        Raises:
            CoverageError: A row is unknown, or was trained on without its weight.
        """
        if not self._ready:
            self.session.require_same()
            self.company.each("ready")
            self.company.each("attach")
            self._ready = True
        fields = [batch_fields(batch) for batch in batches]
        found = self.session.begin_step(fields)
        counts = [int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels, _ in fields]
        totals = [sum(counts)] * len(counts) if self._mean == "step" else [len(counts) * count for count in counts]
        rows = max(self.session.step_rows, 1)
        self._waiting = [
            (inputs, batch, total / rows) for inputs, batch, total in zip(batches, found, totals, strict=True)
        ]
        self.company.each("before_step", found)
        metrics: dict[str, float] = {}
        yield metrics
        metrics |= self.session.end_step() | self.company.after_step(last=False, log=False)

    @contextlib.contextmanager
    def forward(self, batch: Inputs) -> Iterator[None]:
        """The forward of one micro-batch of the step. The backward may come later, within the step.

        Args:
            batch: One of those that `step` was called with, the object itself.

        Raises:
            OptionError: It is none of those, or was given before.
        """
        place = next((i for i, (inputs, *_) in enumerate(self._waiting) if inputs is batch), None)
        if place is None:
            raise OptionError(
                f"forward() got a micro-batch that is not among the {len(self._waiting)} that step() still waits for; "
                "give it the objects that step() got, each once"
            )
        _, known, mean_tokens = self._waiting.pop(place)
        self.company.each("before_forward", known, batch)

        def heard(forward: Forward) -> None:
            self.company.after_forward(known, forward, mean_tokens)

        with listening(self._model, known, self.session.scheduler.name, heard):
            yield

    def save(self, path: str | Path) -> None:
        """Write what the scheduler and the parts have learned; parameters and optimiser are the loop's own to save."""
        self.session.save(Path(path), self.company.save())
        self.company.each("forget")

    def load(self, path: str | Path) -> None:
        """Go on from what `save` wrote, before the first step.

        Raises:
            OptionError: A step was done already.
            StateError: It is missing, damaged, or was saved by another run.
        """
        if self._ready:
            raise OptionError(f"load() after {self.session.steps} steps; call it before the first step")
        self.company.load(self.session.load(Path(path)))

    def close(self) -> dict[str, float]:
        """End the run: what is owed is done, and the model and the optimiser are left as they were.

        Returns:
            Numbers to log.
        """
        metrics = self.company.after_step(last=True, log=True)
        self.company.each("end")
        self._hook.remove()
        return metrics


def _index(rows: Sequence[Inputs] | None) -> RowIndex:
    if rows is None:
        return RowIndex(None)
    found = [batch_fields(row) for row in rows]
    keys = [keys_of(ids, labels, layout) for ids, labels, layout in found]
    counts = [label_counts(labels, layout) for _, labels, layout in found]
    joined, tokens = torch.cat(keys).cpu(), torch.cat(counts).cpu()
    return RowIndex(joined[tokens > 0], tokens[tokens > 0])


def _side_by_side(batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """The rows of several micro-batches as one, padded on the right, for measurements that look at all rows at once."""
    fills = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    lines: dict[str, list[Tensor]] = {name: [] for name in fills}
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        fields = {
            "input_ids": ids,
            "labels": batch["labels"],
            "attention_mask": torch.ones_like(ids) if mask is None else mask,
        }
        for name, values in fields.items():
            lines[name] += list(values)
    return {
        name: torch.nn.utils.rnn.pad_sequence(lines[name], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }
