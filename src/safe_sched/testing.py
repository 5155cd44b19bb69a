"""The laws that schedulers, measurements and detectors obey, as functions for the tests of a plug-in.

Each runs what it is given on a small synthetic run, on the CPU, in a few seconds::

    from safe_sched.testing import check_detector, check_measurement, check_scheduler

    def test_the_laws():
        check_scheduler(DropHardest())
        check_measurement(MyMeasurement(MyNeed()))
        check_detector(MyDetector, rows)

A broken law is an `AssertionError` that names it. pytest is not needed.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import random
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from safe_sched.audit.rows import audit_row
from safe_sched.audit.signals import Detector, Evidence, Sort
from safe_sched.errors import NumericsError, OptionError, SafeSchedError
from safe_sched.needs import NLL, Need
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import IGNORE_INDEX, keys_of, layout_of
from safe_sched.scheduler import Observation, PerRow, Scheduler, State, require_options
from safe_sched.training.loop import Measurement, TrainingLoop
from safe_sched.training.ranks import Exchange
from safe_sched.training.session import Session

T = TypeVar("T")

WIDTHS: Mapping[str, int | None] = {"nll": None, "hidden_state": 6, "encoder_vector": 6}
"""Needs that are measured of every row, and how many numbers a row has; None: one."""

_SET = [0, 1, 2, 3, 4, 5, 6, 2, 2, 5]  # rows of the training set, some of them several times
_STEPS = [[0, 1, 2, 3], [4, 5, 6, 2], [2, 2, 0, 5], [6, 1, 3, 4], [5, 0, 2, 5], [3, 4, 1, 6]]


def _law(holds: object, law: str) -> None:
    if not holds:
        raise AssertionError(f"broken law: {law}")


# ranks in one process -------------------------------------------------------------------------------------------


@dataclass
class _Table:
    said: list[Any]
    barrier: threading.Barrier


class InProcess:
    """The exchange of one thread with the others (`safe_sched.training.ranks.Exchange`)."""

    def __init__(self, table: _Table, rank: int, *, deaf: bool = False) -> None:
        self._table, self.rank, self.ranks, self._deaf = table, rank, len(table.said), deaf

    def __call__(self, what: str, *mine: Tensor) -> list[tuple[Tensor, ...]]:
        """See `safe_sched.training.ranks.Exchange`."""
        self._table.said[self.rank] = what, mine
        self._table.barrier.wait()
        said = list(self._table.said)
        self._table.barrier.wait()
        _law({name for name, _ in said} == {what}, f"ranks exchange the same things in the same order, here {what!r}")
        return [tuple(part.clone() for part in (mine if self._deaf else theirs)) for _, theirs in said]

    def fail(self, error: BaseException) -> None:
        """See `safe_sched.training.ranks.Exchange`."""
        self._table.barrier.abort()


def on_ranks(ranks: int, work: Callable[[InProcess], T], *, deaf: bool = False) -> list[T]:
    """What each of several ranks, here threads, makes of ``work``.

    Args:
        ranks: How many.
        work: Called with the rank's exchange.
        deaf: Whether a rank hears itself in the place of the others, for negative controls.
    """
    table = _Table([None] * ranks, threading.Barrier(ranks, timeout=200))

    def one(exchange: InProcess) -> T:
        try:
            return work(exchange)
        except BaseException as error:
            exchange.fail(error)
            raise

    with ThreadPoolExecutor(ranks) as pool:
        running = [pool.submit(one, InProcess(table, rank, deaf=deaf)) for rank in range(ranks)]
    failed = [error for done in running if (error := done.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [done.result() for done in running]


# a synthetic run ------------------------------------------------------------------------------------------------


def _tokens(numbers: Sequence[int]) -> Tensor:
    """Token rows, each with its number in it: int64 (rows, 4)."""
    return torch.tensor([[number + 10, 1, number % 3 + 2, 5] for number in numbers])


def _keys(numbers: Sequence[int]) -> Tensor:
    ids = _tokens(numbers)
    return keys_of(ids, ids, layout_of(ids))


def _values(numbers: Sequence[int], step: int, width: int | None) -> Tensor:
    """What is measured of rows: a function of the row and the step."""
    place = torch.tensor(numbers, dtype=torch.float32) * 1.7 + 0.1 * step + 1
    one = 1 + torch.sin(place)
    return one if width is None else torch.stack([torch.sin((1 + i) * place) for i in range(width)], 1)


@dataclass
class _Trace:
    """A run of a scheduler on synthetic rows.

    Attributes:
        at_once: Whether values of some rows are given for the whole step, and not for each micro-batch.
        weights: Of all rows so far, in order.
    """

    session: Session
    widths: Mapping[str, int | None]
    at_once: bool = True
    weights: list[Tensor] = field(default_factory=list)

    def step(self, micros: Sequence[Sequence[int]]) -> dict[str, float]:
        session, number = self.session, self.session.steps
        ids = [_tokens(rows) for rows in micros]
        batches = session.begin_step([(each, each, layout_of(each)) for each in ids])
        pairs = list(zip(batches, micros, strict=True))
        if self.at_once:
            slots = torch.cat([batch.slots for batch in batches])
            self._learn(slots, [row for rows in micros for row in rows], number)
        else:
            for batch, rows in pairs:
                self._learn(batch.slots, rows, number)
        for batch, rows in pairs:
            names = [name for name in session.needs() if name in self.widths]
            measured = {name: _values(rows, number, self.widths[name]) for name in names}
            try:
                self.weights.append(session.weigh(batch, measured).clone())
            except (OptionError, NumericsError) as error:
                raise AssertionError(f"broken law: weights are float32 (rows,), finite and >= 0: {error}") from error
            session.mark_gated(batch)
        return session.end_step()

    def _learn(self, slots: Tensor, rows: Sequence[int], number: int) -> None:
        for name in self.session.needs():
            if name not in self.widths:
                due = self.session.due(name, slots)
                _law(
                    due.dtype == torch.bool and due.shape == slots.shape,
                    f"due() returns bool (rows,), here {due.dtype} {tuple(due.shape)}",
                )
                self.session.learn(name, slots[due], 3 * _values(rows, number, None)[due] - 3)

    def run(self, steps: Sequence[Sequence[int]]) -> _Trace:
        for rows in steps:
            self.step([rows])
        return self

    def tensors(self) -> dict[str, Tensor]:
        return self.session.state.tensors()


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit; nan, which stands for "not known", is itself."""
    return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


# schedulers -----------------------------------------------------------------------------------------------------


def check_scheduler(
    scheduler: Scheduler[Any], *, widths: Mapping[str, int | None] | None = None, mean_1: bool = False
) -> None:
    """Check the laws that every scheduler obeys.

    Weights are float32, finite and >= 0; copies of a row have one weight; a run is a function of its input; splitting a
    step into micro-batches or over ranks changes nothing, nor does a stop with a resume; new rows of a stream leave the
    others alone; settings are JSON and tell options apart; unknown options and unknown needs are refused.

    Args:
        scheduler: As built with the options to check.
        widths: Needs of other names than those in `WIDTHS` that are measured of every row, with the numbers per row
            (None: one). Values of all others come through ``learn``, for rows that are ``due``.
        mean_1: Whether the method promises weights of mean 1 over the training set.

    Raises:
        AssertionError: A law is broken; the message names it.

    Example:
        >>> from safe_sched import BDSReleased
        >>> check_scheduler(BDSReleased(), mean_1=True)
    """
    dense = {**WIDTHS, **(widths or {})}

    def begun(exchange: Exchange | None = None, *, at_once: bool = True) -> _Trace:
        return _Trace(Session(scheduler, RowIndex(_keys(_SET)), exchange=exchange), dense, at_once)

    _check_settings(scheduler)
    _check_options(scheduler)
    _check_numbers(begun(), mean_1)
    _check_repeats(begun())
    first, second = begun().run(_STEPS), begun().run(_STEPS)
    _law(_same(first.tensors(), second.tensors()), "the same run twice gives the same state, bit for bit")
    _law(all(map(torch.equal, first.weights, second.weights)), "the same run twice gives the same weights")
    _check_questions(first)
    _check_unknown_need(first.session)
    _check_split(begun(), begun())
    _check_resume(begun)
    _check_ranks(begun)
    _check_growth(scheduler, dense)


def _check_settings(scheduler: Scheduler[Any]) -> None:
    settings = scheduler.settings()
    try:
        back = json.loads(json.dumps(settings))
    except TypeError as error:
        raise AssertionError(f"broken law: settings() are plain JSON values: {error}") from error
    _law(back.keys() == settings.keys(), "settings() are plain JSON values with texts as names")
    _law(settings.get("name") == scheduler.name, f"settings() hold the name {scheduler.name!r}")
    if not dataclasses.is_dataclass(scheduler):
        return
    for each in dataclasses.fields(scheduler):
        value = getattr(scheduler, each.name)
        if not each.init or isinstance(value, str) or not isinstance(value, bool | int | float):
            continue
        try:
            other: Any = dataclasses.replace(
                scheduler, **{each.name: not value if isinstance(value, bool) else value * 2 + 1}
            )
        except SafeSchedError:  # out of range
            try:
                other = dataclasses.replace(scheduler, **{each.name: value / 2})
            except SafeSchedError:
                continue
        _law(other.settings() != settings, f"settings() tell options apart, here {each.name!r}")


def _check_options(scheduler: Scheduler[Any]) -> None:
    kind = type(scheduler)
    names = list(inspect.signature(kind).parameters)
    if not names:
        return
    name = f"{names[0]}x"
    law = f"a misspelt option, here {name!r}, is an OptionError that names the nearest option"
    try:
        require_options(kind, {name: None})
    except OptionError as error:
        _law("did you mean" in str(error), law)
    else:
        raise AssertionError(f"broken law: {law}: it was accepted")
    try:
        kind(**{name: None})
    except (OptionError, TypeError):
        return
    raise AssertionError(f"broken law: {law}: it was accepted")


def _check_numbers(trace: _Trace, mean_1: bool) -> None:
    session = trace.session
    for rows in _STEPS:
        logged = trace.step([rows])
        wrong = {name: value for name, value in logged.items() if not isinstance(value, float)}
        _law(not wrong, f"what is logged are floats: {wrong}")
        _law(all(map(math.isfinite, logged.values())), f"what is logged is finite: {logged}")
        weights = session.scheduler.slot_weights(session.state)
        _law(
            weights.shape == (session.index.slots,) and weights.dtype == torch.float32 and not weights.requires_grad,
            f"slot_weights() are float32 (slots,), here {weights.dtype} {tuple(weights.shape)}",
        )
        _law(bool((torch.isfinite(weights) & (weights >= 0)).all()), "slot_weights() are finite and >= 0")
        if mean_1:
            mean = float(session.row_weights().double().mean())
            _law(abs(mean - 1) < 1e-4, f"the mean weight of the training set is 1, here {mean}")


def _check_repeats(trace: _Trace) -> None:
    for rows in _STEPS:
        trace.step([rows])
        found: dict[int, float] = {}
        for row, weight in zip(rows, trace.weights[-1].tolist(), strict=True):
            _law(found.setdefault(row, weight) == weight, "copies of a row in one step have one weight")


def _check_questions(trace: _Trace) -> None:
    session = trace.session
    scheduler, state, slots = session.scheduler, session.state, torch.arange(session.index.slots)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    every = scheduler.slot_weights(state)
    some = torch.tensor([3, 0, 3])
    _law(torch.equal(scheduler.slot_weights(state, some), every[some]), "slot_weights(slots) are those of all at slots")
    try:
        found = scheduler.weights(state, Observation(slots, torch.full_like(slots, 3), session.steps))
    except OptionError:  # weights that need a measured value; slot_weights has its own way then
        found = every
    _law(
        torch.allclose(found * every.sum(), every * found.sum(), rtol=1e-5, atol=1e-6),
        "slot_weights() are weights() of the same rows, up to a common factor",
    )
    for name, column in scheduler.columns(state).items():
        _law(column.shape == slots.shape, f"a column has one number per slot, here {name!r}: {tuple(column.shape)}")
    for need in scheduler.needs:
        for question in (scheduler.due, scheduler.unknown, scheduler.doubtful):
            question(state, need.name, slots)
    scheduler.revisit(state, slots)
    _law(_same(before, state.tensors()), "asking for weights, columns or due rows leaves the state as it is")


def _check_unknown_need(session: Session) -> None:
    before = {name: tensor.clone() for name, tensor in session.state.tensors().items()}
    law = "learn() refuses values of a need that was not declared, with an OptionError"
    try:
        session.scheduler.learn(session.state, "no_such_need", torch.tensor([0]), torch.tensor([1.0]))
    except OptionError:
        _law(_same(before, session.state.tensors()), f"{law}, and leaves the state as it is")
    else:
        raise AssertionError(f"broken law: {law}")


def _check_split(whole: _Trace, parts: _Trace) -> None:
    for number, rows in enumerate(_STEPS):
        cut = 1 + number % (len(rows) - 1)
        whole.step([rows])
        parts.step([rows[:cut], rows[cut:]])
        one, two = whole.weights[-1], torch.cat(parts.weights[-2:])
        close = torch.allclose(one, two, rtol=1e-5, atol=1e-6)  # products of matrices round by their size
        _law(close, "the weight of a row does not depend on how its step is split into micro-batches")
    _law(_same(whole.tensors(), parts.tensors()), "a step in micro-batches is the step in one, bit for bit")


def _check_resume(begun: Callable[[], _Trace]) -> None:
    whole = begun().run(_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        for stop in range(5):
            path = Path(folder) / str(stop)
            before, after = begun().run(_STEPS[:stop]), begun()
            before.session.save(path)
            content = path.read_bytes()
            after.session.load(path, steps=stop)
            _law(
                _same(before.tensors(), after.tensors()),
                f"a state saved after {stop} steps comes back as it was: declare all that changes in the State",
            )
            after.run(_STEPS[stop:])
            _law(
                _same(whole.tensors(), after.tensors())
                and torch.equal(torch.cat(whole.weights[stop:]), torch.cat(after.weights)),
                f"a run that stops after {stop} steps and resumes is the run that does not, bit for bit",
            )
            _law(path.read_bytes() == content, "going on after a load leaves the saved file as it is")


def _check_ranks(begun: Callable[..., _Trace]) -> None:
    def half(exchange: InProcess) -> _Trace:
        trace = begun(exchange, at_once=False)
        for rows in _STEPS:
            trace.step([[rows[exchange.rank]], [rows[2 + exchange.rank]]])
        return trace

    one = begun(at_once=False)
    for rows in _STEPS:
        one.step([rows[:2], rows[2:]])
    for rank, trace in enumerate(on_ranks(2, half)):
        _law(_same(one.tensors(), trace.tensors()), f"two ranks have the state of one process, here rank {rank}")
        mine = torch.stack(one.weights)[:, rank]
        _law(
            torch.allclose(torch.cat(trace.weights), mine, rtol=1e-5, atol=1e-6),
            "two ranks have the weights of one process",
        )


def _check_growth(scheduler: Scheduler[Any], widths: Mapping[str, int | None]) -> None:
    try:
        trace = _Trace(Session(scheduler, RowIndex(None)), widths)
        trace.run([[0, 1, 2], [1, 0, 2]])
    except SafeSchedError:  # it takes no stream
        return
    session = trace.session
    old = session.index.slots
    before = {name: tensor.clone() for name, tensor in session.state.tensors().items()}
    session.index.add(_keys(range(11)))
    try:
        grown = scheduler.grow(session.state, session.index).tensors()
        fresh = scheduler.init(session.index).tensors()
    except SafeSchedError:
        return
    for name, value in fresh.items():
        if value.shape[-1:] != (session.index.slots,):
            continue
        found = grown[name]
        _law(
            found.dtype == value.dtype and found.shape == value.shape,
            f"a grown state has the sizes of a new one: {name}",
        )
        _law(_equal(found[..., :old], before[name]), f"growth leaves the rows that were there as they are: {name}")
        _law(_equal(found[..., old:], value[..., old:]), f"rows that a stream adds start as all rows start: {name}")


# measurements ---------------------------------------------------------------------------------------------------


class Output(dict[str, Tensor]):
    """What `TinyLM` returns: a dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class TinyLM(nn.Module):
    """A causal language model of a few hundred parameters, with dropout, in the form of those of transformers."""

    base_model_prefix = "model"

    def __init__(self, vocabulary: int = 64, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(width, vocabulary, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

    def get_output_embeddings(self) -> nn.Module:
        """The module that makes logits of hidden states."""
        return self.head

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> Output:
        """``logits``, and with labels the mean ``loss`` of the label tokens."""
        logits = self.head(self.model(input_ids))
        if labels is None:
            return Output(logits=logits)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits)


@dataclass
class _AsksState(State):
    times: Annotated[Tensor, PerRow(dtype=torch.int32)]


class _Asks(Scheduler[_AsksState]):
    """Weighs all rows alike, and notes what is measured of them."""

    name: ClassVar[str] = "asks"
    state_type = _AsksState

    def __init__(self, need: Need) -> None:
        self.need = need
        self.told: list[tuple[int, Tensor, Tensor]] = []

    def settings(self) -> dict[str, Any]:
        return {"name": self.name}

    def needs_now(self, state: _AsksState) -> tuple[Need, ...]:
        return (self.need,)

    def weights(self, state: _AsksState, batch: Observation) -> Tensor:
        return torch.ones(batch.slots.numel())

    def learn(self, state: _AsksState, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        _law(need == self.need.name, f"a measurement gives values under the name of its need, here {need!r}")
        _law(values.shape == slots.shape, f"learn() gets one value per row, here {tuple(values.shape)}")
        self.told.append((-1, slots.clone(), values.clone()))
        state.times[slots] += 1
        return {}

    def update(self, state: _AsksState, step: Observation) -> dict[str, float]:
        if self.need.name in step.measured:
            self.told.append((step.step, step.slots.clone(), step[self.need.name].clone()))
        return {}


@dataclass
class _Trained:
    """What a run of the tiny model leaves."""

    told: list[tuple[int, Tensor, Tensor]]
    parameters: list[Tensor]
    gradients: list[Tensor]
    random: Tensor
    before_save: int


def check_measurement(
    measurement: Measurement[Any], *, safety: Any = None, model: Callable[[], nn.Module] = TinyLM
) -> None:
    """Check the laws that every measurement obeys, in a `safe_sched.training.loop.TrainingLoop` over a tiny model.

    It leaves parameters, gradients, modes and random numbers as they would be without it; gives one finite value per
    row, for every row if ``every_row`` says so; and a run that stops and resumes measures what the other does.

    Args:
        measurement: A new one, as built with its need; copies of it are run.
        safety: Token rows of a safety set, where it needs them.
        model: Makes a causal language model whose vocabulary is larger than 20.

    Raises:
        AssertionError: A law is broken; the message names it.

    Example:
        >>> from safe_sched.needs import NLL
        >>> from safe_sched.training.loop import NLLMeasurement
        >>> check_measurement(NLLMeasurement(NLL()))
    """
    plain, whole = _train(None, safety, model), _train(measurement, safety, model)
    for what in ("parameters", "gradients"):
        same = all(map(torch.equal, getattr(plain, what), getattr(whole, what)))
        _law(same, f"a measurement leaves {what} as they would be without it")
    _law(torch.equal(plain.random, whole.random), "a measurement leaves the state of random numbers as it was")
    _law(whole.told, "a measurement returns values from after_forward, or gives them to session.learn")
    asked = [number for number, _, _ in whole.told]
    if measurement.every_row:
        _law(
            sorted(number for number in asked if number >= 0) == list(range(len(_STEPS))),
            "with every_row, after_forward returns values for every row of every micro-batch",
        )
    else:
        _law(max(asked) < 0, "without every_row, values go to session.learn and not through after_forward")
    _law(all(bool(torch.isfinite(values).all()) for _, _, values in whole.told), "measured values are finite")
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "state"
        through = _train(measurement, safety, model, save=saved)
        resumed = _train(measurement, safety, model, load=saved)
    pairs = list(zip(through.told[through.before_save :], resumed.told, strict=False))
    _law(
        len(through.told) - through.before_save == len(resumed.told)
        and all(a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in pairs),
        "a resumed run measures what the run that went on does: save() what lasts over steps, or forget() it",
    )


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


def _train(
    measurement: Measurement[Any] | None,
    safety: Any,
    make: Callable[[], nn.Module],
    save: Path | None = None,
    load: Path | None = None,
) -> _Trained:
    """Six steps, with a save after the third where that is asked for; or a load and the last three."""
    model, scheduler = make().train(), _Asks(NLL() if measurement is None else measurement.need)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop = TrainingLoop(
        model,
        scheduler,
        [_micro_batch(_SET)],
        optimizer,
        parts=[] if measurement is None else [copy.deepcopy(measurement)],
        safety=safety,
    )
    gradients: list[Tensor] = []
    before_save = 0
    with _seeded():
        if load is not None:
            loop.load(load)
            kept = torch.load(load.with_suffix(".model"), weights_only=True)
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            torch.set_rng_state(kept["random"])
        for number in range(0 if load is None else 3, len(_STEPS)):
            if save is not None and number == 3:
                before_save = len(scheduler.told)
                _save(loop, model, optimizer, save)
            batches = [_micro_batch(rows) for rows in (_STEPS[number][:2], _STEPS[number][2:])]
            with loop.step(batches):
                for batch in batches:
                    with loop.forward(batch):
                        _law(model.training, "a measurement leaves the model in training mode")
                        loss = model(**batch)["loss"] / 2
                    loss.backward()
                gradients += [torch.empty(0) if p.grad is None else p.grad.clone() for p in model.parameters()]
                optimizer.step()
                optimizer.zero_grad()
        state = torch.get_rng_state()
    loop.close()
    return _Trained(scheduler.told, [p.detach().clone() for p in model.parameters()], gradients, state, before_save)


def _micro_batch(numbers: Sequence[int]) -> dict[str, Tensor]:
    """Rows of two tokens of prompt and two of answer."""
    ids = _tokens(numbers)
    labels = ids.clone()
    labels[:, :2] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def _save(loop: TrainingLoop, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    loop.save(path)
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(kept, path.with_suffix(".model"))


# detectors ------------------------------------------------------------------------------------------------------


def check_detector(make: Callable[[], Detector], rows: Sequence[Mapping[str, Any]]) -> None:
    """Check the laws that every detector obeys.

    It gives one value per row; the same ones in every run; and a row's value depends neither on the order in which rows
    are scored, nor on the shard that it is in.

    Args:
        make: Makes a new detector: its class, or a function.
        rows: Rows of a data set of any schema that the audit reads; at least 4.

    Raises:
        AssertionError: A law is broken; the message names it.
    """
    seen = [audit_row(row, number) for number, row in enumerate(rows)]
    _law(len(seen) >= 4, f"at least 4 rows to check with, here {len(seen)}")

    def fitted(size: int) -> Detector:
        detector = make()
        for start in range(0, len(seen), size):
            detector.observe(seen[start : start + size])
        detector.ready()
        return detector

    detector = fitted(len(seen))
    _law(isinstance(detector, Detector), "a detector has all that safe_sched.audit.Detector lists")
    _law(re.fullmatch(r"[a-z0-9_]+", detector.name), f"its name is lower case letters, digits and _: {detector.name!r}")
    _law(detector.kind in get_args(Sort), f"its kind is one of {get_args(Sort)}, here {detector.kind!r}")
    settings = detector.settings()
    try:
        _law(json.loads(json.dumps(settings)) == settings, "settings() are plain JSON values")
    except TypeError as error:
        raise AssertionError(f"broken law: settings() are plain JSON values: {error}") from error

    whole = detector.score(seen)
    _law(
        len(whole.value) == len(whole.reasons) == len(whole.group) == len(seen) and whole.value.ndim == 1,
        "one value, reason and group per row",
    )
    _law(whole.value.dtype == np.float32, f"values are float32, here {whole.value.dtype}")
    _law(not np.isinf(whole.value).any(), "values are finite, or nan where there is nothing to say")
    _law(_agree(whole, detector.score(seen)), "scoring twice gives the same")
    _law(_agree(whole, fitted(len(seen)).score(seen)), "the same rows give the same values in every run")

    order = random.Random(0).sample(range(len(seen)), len(seen))
    turned = detector.score([seen[i] for i in order])
    _law(_agree(_taken(whole, order), turned), "a row's value does not depend on the order in which rows are scored")
    for start in range(0, len(seen), 3):
        part = list(range(start, min(start + 3, len(seen))))
        found = detector.score([seen[i] for i in part])
        _law(_agree(_taken(whole, part), found), "a row's value does not depend on the shard that it is scored in")
    apart = fitted(3).score(seen)
    _law(
        np.allclose(whole.value, apart.value, rtol=1e-5, atol=1e-6, equal_nan=True),
        "what is seen in several shards is what is seen in one",
    )


def _taken(found: Evidence, places: Sequence[int]) -> Evidence:
    return Evidence(found.value[list(places)], [found.reasons[i] for i in places], [found.group[i] for i in places])


def _agree(first: Evidence, second: Evidence) -> bool:
    return (
        np.array_equal(first.value, second.value, equal_nan=True)
        and list(first.reasons) == list(second.reasons)
        and list(first.group) == list(second.group)
    )
