"""What other packages can add: hooks of pluggy's size, found through the entry point group ``safe_sched``.

A plugin is a module, or any object, with functions that are named like the specifications below and marked with
`hookimpl`. It names as arguments what it uses, and nothing else::

    # my_package/plugin.py
    from safe_sched.hooks import hookimpl

    @hookimpl
    def safe_sched_schedulers():
        from my_package.scheduler import Mine     # inside: a plugin is loaded when a name is looked up
        return {"mine": Mine}

    # my_package's pyproject.toml
    [project.entry-points.safe_sched]
    my_package = "my_package.plugin"

After ``pip install my_package``, ``SafeSchedCallback("mine")`` finds it. A plugin that cannot be loaded, or that
implements a hook which does not exist, is an error that names it: a misspelt hook would otherwise do nothing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import pluggy
import torch
from torch import Tensor

from safe_sched.errors import OptionError, PluginError, UnscoredError, some_of
from safe_sched.generation import Device, Dtype, LocalModel, TextGenerator

if TYPE_CHECKING:
    from safe_sched.audit.signals import Detector
    from safe_sched.data.tokens import Tokenizer
    from safe_sched.scheduler import Scheduler
    from safe_sched.training.loop import Measurement, Part

T = TypeVar("T")

PROJECT = "safe_sched"
"""The name of the entry point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook that it is named after."""


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


@dataclass(frozen=True)
class RowLossesRequest:
    """What `safe_sched_row_losses` is asked for.

    Attributes:
        model: A folder or a hub name.
        rows: The training rows, in a schema of TRL's SFTTrainer.
        adapter: A folder with a PEFT adapter of the model, or None.
        max_length: Tokens that a row is cut to, >= 2, or None to keep rows whole.
        assistant_only_loss: Whether only the assistant's turns are labels.
        completion_only_loss: Whether only completions are labels; None: where there are prompts and completions.
        chat_template: A template to use in the place of the tokenizer's own, or None.
        batch_size: Rows of a forward, >= 1.
        device: ``"auto"`` is a GPU where there is one.
        dtype: Of the parameters; ``"auto"`` is that of the files.
        progress: Called with what is being done, how much of it is done, and of how much (None: unknown).

    Raises:
        OptionError: A value is out of range.
    """

    model: str
    rows: Sequence[Mapping[str, Any]]
    adapter: str | None = None
    max_length: int | None = 1024
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    chat_template: str | None = None
    batch_size: int = 8
    device: Device = "auto"
    dtype: Dtype = "auto"
    progress: Callable[[str, int, int | None], None] = _silent

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise OptionError(f"max_length={self.max_length}; allowed: a whole number >= 2, or None to keep rows whole")
        if self.batch_size < 1:
            raise OptionError(f"batch_size={self.batch_size}; allowed: a whole number >= 1")
        for name, kind in (("device", Device), ("dtype", Dtype)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise OptionError(f"{name}={value!r}; allowed: {', '.join(map(repr, get_args(kind)))}")


@dataclass(frozen=True)
class RowLosses:
    """One entry per row, in the order of the request.

    Attributes:
        keys: int64 (rows,), see `safe_sched.rows.keys`; of no meaning where ``label_tokens`` is 0.
        nll: float32 (rows,), mean loss of the row's label tokens in nats per token.
        label_tokens: int64 (rows,), 0 for a row that training would leave out.
    """

    keys: Tensor
    nll: Tensor
    label_tokens: Tensor

    def require_complete(self) -> None:
        """Stop unless every row has a loss.

        Raises:
            UnscoredError: Naming the rows without a label token, or those whose loss is not finite.

        Example:
            >>> import torch
            >>> one = torch.ones(2, dtype=torch.long)
            >>> RowLosses(one, torch.tensor([1.5, float("nan")]), one).require_complete()
            Traceback (most recent call last):
            ...
            safe_sched.errors.UnscoredError: the loss of 1 of 2 rows is not finite (rows 1, counted from 0). ...
        """
        count = self.keys.numel()
        empty = (self.label_tokens == 0).nonzero().flatten().tolist()
        if empty:
            raise UnscoredError(
                f"{len(empty)} of {count} rows have no label token, so there is no loss to measure (rows "
                f"{some_of(empty)}, counted from 0). Their answers are empty, masked or cut off by max_length: remove "
                "these rows or raise max_length."
            )
        bad = (~torch.isfinite(self.nll)).nonzero().flatten().tolist()
        if bad:
            raise UnscoredError(
                f"the loss of {len(bad)} of {count} rows is not finite (rows {some_of(bad)}, counted from 0). Use "
                "bfloat16 or float32 instead of float16, or another model; or look at these rows."
            )


@dataclass(frozen=True)
class AuditRequest:
    """What `safe_sched_detectors` is asked for.

    Attributes:
        safety_rows: Prompts that are to be refused, with refusals: the rows of the safety set.
        model: A folder or a hub name; None: without a model.
        adapter: A folder with a PEFT adapter of the model, or None.
        scorer: A file with a saved scorer of NeuralBDS, or None.
        max_length: Tokens that a row is cut to, >= 2.
        device: ``"auto"`` is a GPU where there is one.
        dtype: Of the parameters; ``"auto"`` is that of the files.
        seed: Of whatever is drawn.

    Raises:
        OptionError: A value is out of range, or ``adapter`` or ``scorer`` is given without a model.
    """

    safety_rows: Sequence[Mapping[str, Any]] = ()
    model: str | None = None
    adapter: str | None = None
    scorer: str | None = None
    max_length: int = 1024
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise OptionError(f"max_length={self.max_length}; allowed: a whole number >= 2")
        for name, kind in (("device", Device), ("dtype", Dtype)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise OptionError(f"{name}={value!r}; allowed: {', '.join(map(repr, get_args(kind)))}")
        for name in ("adapter", "scorer"):
            if getattr(self, name) is not None and self.model is None:
                raise OptionError(f"{name}={getattr(self, name)!r} belongs to a model; name it too, model=...")


# the hooks ------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def safe_sched_row_losses(request: RowLossesRequest) -> RowLosses | None:  # pyright: ignore[reportReturnType]
    """The loss of every row under a model, without gradient, for ``safe-sched losses``.

    Keys must be those that training computes, so rows must be prepared as the trainer prepares them. The first
    answer that is not None counts: return None where what is needed is not installed.

    Raises:
        SafeSchedError: Whatever is wrong with the model or the rows.
    """


@hookspec
def safe_sched_schedulers() -> Mapping[str, type[Scheduler[Any]]]:  # pyright: ignore[reportReturnType]
    """Schedulers by name, for `safe_sched.schedulers.catalog.build`.

    Each is a subclass of `safe_sched.scheduler.Scheduler` whose arguments are its options. A name that is built in
    stays what it is.
    """


@hookspec
def safe_sched_measurements() -> Mapping[str, type[Measurement[Any]]]:  # pyright: ignore[reportReturnType]
    """Measurements by the name of the need that they measure, for `safe_sched.training.loop`.

    Each is a subclass of `safe_sched.training.loop.Measurement`, built with the need.
    """


@hookspec
def safe_sched_parts() -> Mapping[str, type[Part]]:  # pyright: ignore[reportReturnType]
    """Parts of the training loop by name: subclasses of `safe_sched.training.loop.Part`. Arguments are options."""


@hookspec(firstresult=True)
def safe_sched_text_generator(request: LocalModel) -> TextGenerator | None:  # pyright: ignore[reportReturnType]
    """A chat model on this machine that answers `safe_sched.generation.TextRequest`, for rewriting.

    The model is loaded when it is first asked, not here. The first answer that is not None counts: return None where
    what is needed is not installed.
    """


@hookspec(firstresult=True)
def safe_sched_row_set(data: object) -> object | None:
    """A training set of a kind of its own as a `safe_sched.mixing.sets.RowSet`, for `safe_sched.mixing.mix`.

    The first answer that is not None counts: return None for what is not yours. Lists and tuples are never asked about.
    """


@hookspec(firstresult=True)
def safe_sched_open_source(source: str) -> Iterable[Mapping[str, Any]] | None:  # pyright: ignore[reportReturnType]
    """The rows of a data set that is no file, such as ``"hf://owner/name:split"``, for `safe_sched.data.open_rows`.

    They are gone through once or several times, and must not be held in memory. The first answer that is not None
    counts: return None for what is another plugin's, or where what is needed is not installed.

    Raises:
        SafeSchedError: The source cannot be opened.
    """


@hookspec
def safe_sched_detectors(request: AuditRequest) -> Sequence[Detector]:  # pyright: ignore[reportReturnType]
    """Further signals for ``safe-sched audit``: `safe_sched.audit.Detector` objects, one per signal.

    All answers are taken together. Give none where there is nothing to add: without ``request.model``, a detector that
    needs one. A model is loaded here or when the first rows come, not at import.

    Raises:
        SafeSchedError: Whatever is wrong with the model.
    """


@hookspec(firstresult=True)
def safe_sched_command(name: str, arguments: Sequence[str]) -> int | None:
    """Run ``safe-sched NAME ARGUMENTS...``, a front end of a training stack such as ``trl``; returns the exit code.

    The first answer that is not None counts: return None for another name, or where what is needed is not installed.

    Raises:
        SafeSchedError: Something that was given cannot be used.
    """


@hookspec(firstresult=True)
def safe_sched_tokenizer(name: str) -> Tokenizer | None:  # pyright: ignore[reportReturnType]
    """A tokenizer of a folder or of the hub, for rows that are tokens.

    The first answer that is not None counts: return None where what is needed is not installed.

    Raises:
        SafeSchedError: It cannot be loaded.
    """


# calling them ---------------------------------------------------------------------------------------------------


@functools.cache
def manager() -> pluggy.PluginManager:
    """The plugins that are installed, loaded at the first call.

    Raises:
        PluginError: One cannot be loaded, or implements an unknown hook.
    """
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(sys.modules[__name__])
    for point in importlib.metadata.entry_points(group=PROJECT):
        try:
            plugins.register(point.load(), name=point.name)
            plugins.check_pending()
        except Exception as error:  # whatever a foreign module raises while it is imported
            reason = " ".join(str(error).split())
            raise PluginError(
                f"the plugin {point.name!r} ({point.value}) cannot be used: {type(error).__name__}: {reason}. Update "
                "or uninstall the package that brings it."
            ) from error
    return plugins


def row_losses(request: RowLossesRequest) -> RowLosses:
    """The loss of every row, from the first plugin that can measure it.

    Raises:
        PluginError: There is none, or its answer has another number of rows.
        SafeSchedError: Whatever is wrong with the model or the rows.
    """
    found = manager().hook.safe_sched_row_losses(request=request)
    if found is None:
        raise PluginError(
            "nothing that is installed can run a model over training rows. Install what it takes: "
            "pip install 'safe-sched[trl]'"
        )
    if {tensor.shape for tensor in (found.keys, found.nll, found.label_tokens)} != {(len(request.rows),)}:
        raise PluginError(
            f"a plugin gave {tuple(found.nll.shape)} losses for {len(request.rows)} rows; needed: one per row, in "
            "order. Update or uninstall the package that brings it."
        )
    return found


def text_generator(request: LocalModel) -> TextGenerator:
    """A model on this machine, from the first plugin that can run one.

    Raises:
        PluginError: There is none.
        SafeSchedError: Whatever is wrong with the model.
    """
    found = manager().hook.safe_sched_text_generator(request=request)
    if found is None:
        raise PluginError(
            "nothing that is installed can run a chat model. Install what it takes: pip install 'safe-sched[trl]'; or "
            "ask a server: Endpoint(...)"
        )
    return found


def open_source(source: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a data set that is no file, from the first plugin that can open it.

    Raises:
        PluginError: There is none.
        SafeSchedError: The source cannot be opened.
    """
    found = manager().hook.safe_sched_open_source(source=source)
    if found is None:
        raise PluginError(
            f"nothing that is installed can open {source!r}. Install what it takes: pip install 'safe-sched[trl]'"
        )
    return found


def command(name: str, arguments: Sequence[str], needs: str) -> int:
    """Run a front end of a training stack, from the first plugin that has it; returns its exit code.

    Args:
        name: ``"trl"``, for one.
        arguments: What follows the name on the command line.
        needs: What to install where nothing that is installed has it, for pip.

    Raises:
        PluginError: There is none.
        SafeSchedError: Something that was given cannot be used.
    """
    code = manager().hook.safe_sched_command(name=name, arguments=arguments)
    if code is None:
        raise PluginError(
            f"nothing that is installed can run safe-sched {name}. Install what it takes: pip install {needs!r}"
        )
    return code


class NamedTokenizer:
    """A tokenizer by the name of its folder or on the hub, loaded by the first plugin that can when it is first used.

    Raises:
        PluginError: There is none; when it is used.
        SafeSchedError: It cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loaded: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_loaded": None}  # quick to send to other processes

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `safe_sched.data.tokens.Tokenizer`."""
        return self._here().encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """See `safe_sched.data.tokens.Tokenizer`."""
        return self._here().decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )

    def _here(self) -> Tokenizer:
        if self._loaded is None:
            self._loaded = manager().hook.safe_sched_tokenizer(name=self._name)
        if self._loaded is None:
            raise PluginError(
                "nothing that is installed can load a tokenizer. Install what it takes: pip install 'safe-sched[trl]'"
            )
        return self._loaded


def third_party_schedulers() -> dict[str, type[Scheduler[Any]]]:
    """The schedulers of all plugins, by name.

    Raises:
        PluginError: Two plugins give one name to different schedulers.
    """
    return _by_name("scheduler", manager().hook.safe_sched_schedulers())


def measurements() -> dict[str, type[Measurement[Any]]]:
    """The measurements of all plugins by the name of the need, those of our integrations among them.

    Raises:
        PluginError: Two plugins measure one need.
    """
    return _by_name("measurement", manager().hook.safe_sched_measurements())


def parts() -> dict[str, type[Part]]:
    """The parts of the loop of all plugins, ours among them, by name.

    Raises:
        PluginError: Two plugins give one name to different parts.
    """
    return _by_name("part", manager().hook.safe_sched_parts())


def _by_name(what: str, answers: Iterable[Mapping[str, type[T]] | None]) -> dict[str, type[T]]:
    found: dict[str, type[T]] = {}
    for several in answers:
        for name, kind in (several or {}).items():
            if found.setdefault(name, kind) is not kind:
                raise PluginError(
                    f"two plugins bring a {what} {name!r}: {found[name].__module__} and {kind.__module__}. "
                    f"Uninstall one of them, or give the {what} itself in the place of its name."
                )
    return found


def detectors(request: AuditRequest) -> list[Detector]:
    """The signals of all plugins.

    Raises:
        PluginError: Nothing that is installed makes use of the model that was named.
        SafeSchedError: Whatever is wrong with the model.
    """
    # pluggy calls the plugin that was registered last first
    found = [one for several in reversed(manager().hook.safe_sched_detectors(request=request)) for one in several or ()]
    if request.model is not None and not found:
        raise PluginError(
            "nothing that is installed can run a model over the rows of an audit. Install what it takes: "
            "pip install 'safe-sched[trl]'"
        )
    return found
