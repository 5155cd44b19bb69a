"""Several schedulers as one: a product of experts on the log-odds of a row being harmful.

Each expert k gives evidence ``E_ki`` in nats, 0 where it knows nothing, held within ``-CLEARS`` and ``LIMIT``. With the
prior share q of harmful rows::

    log-odds_i = log q / (1 - q)  +  sum_k E_ki,        w_i = P(harmless) / P(harmless before any evidence), at most 1

The experts fail in different places: `BDS` asks which rows get harder as the model refuses more, `Antibody` whether
the aligned model would have answered alike. To an expert that cannot see what is wrong with a row the row looks
harmless, so evidence that clears a row is held closer than evidence against it: one that is sure outweighs another that
sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from safe_sched.errors import OptionError
from safe_sched.estimators.calibration import LIMIT
from safe_sched.estimators.prior import CLEARS
from safe_sched.needs import Need
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation, Scheduler, State
from safe_sched.schedulers.catalog import build


@dataclass
class CombinedState(State):
    """The states of the experts, in order."""

    kinds: ClassVar[dict[str, type[State]]] = {}

    parts: tuple[State, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Those of all experts, named after them."""
        named = zip(self.kinds, self.parts, strict=True)
        return {f"{name}.{field}": value for name, part in named for field, value in part.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CombinedState:
        """The inverse of `tensors`."""
        return cls(
            tuple(
                kind.from_tensors(
                    {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                )
                for name, kind in cls.kinds.items()
            )
        )


class Combined(Scheduler[Any]):
    """See `combine`."""

    name: ClassVar[str] = "combined"

    def __init__(self, parts: tuple[Scheduler[Any], ...], prior_share: float) -> None:
        self.parts, self.prior_share = parts, prior_share

    @property
    def state_type(self) -> type[State]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The class of its state."""
        kinds = {part.name: part.state_type for part in self.parts}
        later = frozenset(f"{name}.{field}" for name, kind in kinds.items() for field in kind.sized_later)
        return type("CombinedState", (CombinedState,), {"kinds": kinds, "sized_later": later})

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Scheduler.needs`: those of all experts, each once."""
        return tuple(dict.fromkeys(need for part in self.parts for need in part.needs))

    def needs_now(self, state: Any) -> tuple[Need, ...]:
        """See `Scheduler.needs_now`."""
        return tuple(dict.fromkeys(need for part, own in self._experts(state) for need in part.needs_now(own)))

    def settings(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {"name": self.name, "prior_share": self.prior_share, "parts": [part.settings() for part in self.parts]}

    def init(self, index: RowIndex) -> Any:
        """See `Scheduler.init`."""
        return self.state_type(tuple(part.init(index) for part in self.parts))  # pyright: ignore[reportCallIssue]

    def grow(self, state: Any, index: RowIndex) -> Any:
        """See `Scheduler.grow`."""
        parts = (part.grow(own, index) for part, own in self._experts(state))
        return self.state_type(tuple(parts))  # pyright: ignore[reportCallIssue]

    def _experts(self, state: Any, need: str | None = None) -> list[tuple[Scheduler[Any], Any]]:
        """The parts, each with its own state; only those with a need, where one is named."""
        pairs = zip(self.parts, state.parts, strict=True)
        return [(part, own) for part, own in pairs if need is None or need in {one.name for one in part.needs}]

    def _any(self, question: str, state: Any, need: str, slots: Tensor) -> Tensor:
        answers = [getattr(part, question)(own, need, slots) for part, own in self._experts(state, need)]
        return torch.stack([torch.zeros(slots.numel(), dtype=torch.bool), *answers]).any(0)

    def due(self, state: Any, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.due`: for any expert."""
        return self._any("due", state, need, slots)

    def unknown(self, state: Any, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.unknown`: for any expert."""
        return self._any("unknown", state, need, slots)

    def doubtful(self, state: Any, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.doubtful`: for any expert."""
        return self._any("doubtful", state, need, slots)

    def revisit(self, state: Any, slots: Tensor) -> Tensor:
        """See `Scheduler.revisit`: for any expert."""
        return torch.stack([part.revisit(own, slots) for part, own in self._experts(state)]).any(0)

    def calibrate(self, state: Any, need: str, known: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Scheduler.calibrate`: every expert with this need."""
        return {k: v for part, own in self._experts(state, need) for k, v in part.calibrate(own, need, known).items()}

    def learn(self, state: Any, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        """See `Scheduler.learn`: every expert with this need."""
        takers = self._experts(state, need)
        if not takers:
            return super().learn(state, need, slots, values)
        return {k: v for part, own in takers for k, v in part.learn(own, need, slots, values).items()}

    def _total(self, state: Any, slots: Any) -> Tensor:
        said = [part.log_odds(own, slots) for part, own in self._experts(state)]
        return torch.stack([one.clamp(-CLEARS, LIMIT) for one in said if one is not None]).sum(0)

    def _weights(self, total: Tensor) -> Tensor:
        # in double: the weight of a row that nothing is known of must be exactly 1
        prior = math.log(self.prior_share / (1 - self.prior_share))
        start = torch.sigmoid(torch.tensor(-prior, dtype=torch.float64))
        return (torch.sigmoid(-(prior + total.double())) / start).clamp(max=1).float()

    def weights(self, state: Any, batch: Observation) -> Tensor:
        """See `Scheduler.weights`."""
        for part, own in self._experts(state):
            part.weights(own, batch)  # an expert that was not asked about a row says so
        return self._weights(self._total(state, batch.slots))

    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        """See `Scheduler.slot_weights`."""
        return self._weights(self._total(state, slots))

    def update(self, state: Any, step: Observation) -> dict[str, float]:
        """See `Scheduler.update`."""
        return {f"{part.name}_{k}": v for part, own in self._experts(state) for k, v in part.update(own, step).items()}

    def columns(self, state: Any) -> dict[str, Tensor]:
        """``p_harmful``, and what each expert says, under its name."""
        prior = math.log(self.prior_share / (1 - self.prior_share))
        found = {"p_harmful": torch.sigmoid(prior + self._total(state, slice(None)))}
        for part, own in self._experts(state):
            found |= {f"{part.name}_weight": part.slot_weights(own)}
            found |= {f"{part.name}_{name}": values for name, values in part.columns(own).items()}
        return found


def combine(*schedulers: Scheduler[Any] | str, prior_share: float = 0.1) -> Combined:
    """Several schedulers as one, each with its say in the table.

    Args:
        schedulers: At least two of different names, each of which can say what it knows as log-odds: `BDS`,
            `Antibody`, and schedulers of plugins with a method ``log_odds``; or their names in the catalogue.
        prior_share: Share of harmful rows expected, in (0, 1).

    Raises:
        OptionError: A scheduler cannot be combined, or two have one name.

    Example:
        >>> from safe_sched import BDS, Antibody
        >>> combine(BDS(), Antibody()).settings()["parts"][1]["name"]
        'antibody'
        >>> from safe_sched import Fixed
        >>> combine(BDS(), Fixed())
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: 'fixed' cannot be combined: it gives no log-odds; use BDS and Antibody
    """
    parts = tuple(build(scheduler) for scheduler in schedulers)
    for part in parts:
        if type(part).log_odds is Scheduler.log_odds:
            raise OptionError(f"{part.name!r} cannot be combined: it gives no log-odds; use BDS and Antibody")
    names = [part.name for part in parts]
    if len(names) < 2 or len(set(names)) < len(names):
        raise OptionError(f"combine({', '.join(names)}): give two or more schedulers of different names")
    if not 0 < prior_share < 1:
        raise OptionError(f"combine(prior_share={prior_share}); allowed: a number in (0, 1)")
    return Combined(parts, prior_share)
