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
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from safe_sched.errors import OptionError
from safe_sched.estimators.calibration import LIMIT
from safe_sched.estimators.prior import CLEARS
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Columns, Observation, Scheduler, State
from safe_sched.schedulers.catalog import build


@runtime_checkable
class Expert(Protocol):
    """A scheduler that can say what it knows of a row as log-odds."""

    def log_odds(self, state: Any, slots: Any) -> Tensor:
        """Evidence that rows are harmful, without a prior: float32 (rows,), nats; 0 where nothing is known."""
        ...


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
    def from_tensors(cls, tensors: dict[str, Tensor]) -> CombinedState:
        """The inverse of `tensors`."""
        return cls(
            tuple(
                kind.from_tensors(
                    {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                )
                for name, kind in cls.kinds.items()
            )
        )


class Combined:
    """See `combine`."""

    name: ClassVar[str] = "combined"

    def __init__(self, parts: tuple[Scheduler[Any], ...], prior_share: float) -> None:
        self.parts, self.prior_share = parts, prior_share

    @property
    def state_type(self) -> type[State]:
        """The class of its state."""
        kinds = {part.name: part.state_type for part in self.parts}
        later = frozenset(f"{name}.{field}" for name, kind in kinds.items() for field in kind.sized_later)
        return type("CombinedState", (CombinedState,), {"kinds": kinds, "sized_later": later})

    @property
    def needs_nll(self) -> bool:
        """Whether an expert reads the rows' losses."""
        return any(part.needs_nll for part in self.parts)

    def settings(self) -> dict[str, object]:
        """The options as plain JSON values."""
        return {"name": self.name, "prior_share": self.prior_share, "parts": [part.settings() for part in self.parts]}

    def init(self, index: RowIndex) -> Any:
        """See `safe_sched.scheduler.Scheduler.init`."""
        return self.state_type(tuple(part.init(index) for part in self.parts))  # pyright: ignore[reportCallIssue]

    def grow(self, state: Any, index: RowIndex) -> Any:
        """See `safe_sched.scheduler.Scheduler.grow`."""
        parts = (part.grow(own, index) for part, own in self.experts(state))
        return self.state_type(tuple(parts))  # pyright: ignore[reportCallIssue]

    def experts(self, state: Any) -> list[tuple[Scheduler[Any], Any]]:
        """The parts, each with its own state."""
        return list(zip(self.parts, state.parts, strict=True))

    def _total(self, state: Any, slots: Any) -> Tensor:
        said = [part.log_odds(own, slots) for part, own in self.experts(state) if isinstance(part, Expert)]
        return torch.stack([one.clamp(-CLEARS, LIMIT) for one in said]).sum(0)

    def _weights(self, total: Tensor) -> Tensor:
        # in double: the weight of a row that nothing is known of must be exactly 1
        prior = math.log(self.prior_share / (1 - self.prior_share))
        start = torch.sigmoid(torch.tensor(-prior, dtype=torch.float64))
        return (torch.sigmoid(-(prior + total.double())) / start).clamp(max=1).float()

    def weights(self, state: Any, batch: Observation) -> Tensor:
        """See `safe_sched.scheduler.Scheduler.weights`."""
        for part, own in self.experts(state):
            part.weights(own, batch)  # an expert that was not asked about a row says so
        return self._weights(self._total(state, batch.slots))

    def slot_weights(self, state: Any, slots: Any = slice(None)) -> Tensor:
        """See `safe_sched.scheduler.Scheduler.slot_weights`."""
        return self._weights(self._total(state, slots))

    def update(self, state: Any, step: Observation) -> dict[str, float]:
        """See `safe_sched.scheduler.Scheduler.update`."""
        return {f"{part.name}_{k}": v for part, own in self.experts(state) for k, v in part.update(own, step).items()}

    def columns(self, state: Any) -> dict[str, Tensor]:
        """``p_harmful``, and what each expert says, under its name."""
        prior = math.log(self.prior_share / (1 - self.prior_share))
        found = {"p_harmful": torch.sigmoid(prior + self._total(state, slice(None)))}
        for part, own in self.experts(state):
            said = part.columns(own) if isinstance(part, Columns) else {}
            found |= {f"{part.name}_weight": part.slot_weights(own)}
            found |= {f"{part.name}_{name}": values for name, values in said.items()}
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
        if not isinstance(part, Expert) or getattr(part, "compat", None) is not None:
            raise OptionError(
                f"{getattr(part, 'name', part)!r} cannot be combined: it gives no log-odds; use BDS and Antibody"
            )
    names = [part.name for part in parts]
    if len(names) < 2 or len(set(names)) < len(names):
        raise OptionError(f"combine({', '.join(names)}): give two or more schedulers of different names")
    if not 0 < prior_share < 1:
        raise OptionError(f"combine(prior_share={prior_share}); allowed: a number in (0, 1)")
    return Combined(parts, prior_share)
