"""Methods of one trainer wrapped for the time of one ``train()``, and numbers of ours in its log record.

A callback has no event between the last backward of an optimiser step and clipping, and none in which the trainer's
log record can be added to. So methods are wrapped on the trainer *instance*; its class and other trainers are not
touched, and nothing outlives the run:

- a wrapper sleeps as soon as the trainer has begun another ``train()``, for nobody tells a callback that one failed;
- `Wrapping.detach` gives the trainer its own methods back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

Wrapper = Callable[..., Any]
"""Called with the trainer's own method first, then with what that was called with."""


class Wrapping:
    """Wrapped methods of one trainer. Use `attach` and `detach`.

    Args:
        trainer: In the ``train()`` that this is to last for.
        wrappers: By the method's name. ``log`` is wrapped besides.
    """

    def __init__(self, trainer: Trainer, wrappers: Mapping[str, Wrapper]) -> None:
        self.trainer = trainer
        self._wrappers = {**wrappers, "log": self._log}
        self._state = trainer.state  # every train() makes a new one
        self._wrapped: dict[str, Any] = {}
        self._metrics: dict[str, list[float]] = {}

    @property
    def active(self) -> bool:
        """Whether the trainer is still in the ``train()`` that this belongs to."""
        return bool(self._wrapped) and self.trainer.state is self._state

    def attach(self) -> None:
        """Wrap the methods."""
        for name, wrapper in self._wrappers.items():
            self._wrap(name, wrapper)

    def _wrap(self, name: str, wrapper: Wrapper) -> None:
        original, previous = getattr(self.trainer, name), vars(self.trainer).get(name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs) if self.active else original(*args, **kwargs)

        setattr(self.trainer, name, wrapped)
        self._wrapped[name] = previous

    def detach(self) -> None:
        """Give the trainer its own methods back; harmless when called twice."""
        while self._wrapped:
            name, previous = self._wrapped.popitem()
            if previous is None:
                delattr(self.trainer, name)
            else:
                setattr(self.trainer, name, previous)

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep numbers for the trainer's next record, which gets their mean since the last one."""
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value)

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs:  # the record of training steps; not evaluation, not the closing summary
            logs.update({name: sum(values) / len(values) for name, values in self._metrics.items()})
            self._metrics.clear()
        return original(logs, *args, **kwargs)
