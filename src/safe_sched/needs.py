"""What a scheduler can ask to have measured. A need is a name with options.

========================  =============================================  =============================================
need                      what is measured of a row                      how the scheduler gets it
========================  =============================================  =============================================
``NLL()``                 mean loss of its label tokens, nats            ``batch["nll"]``, every micro-batch
``HiddenState()``         pooled hidden states of the training forward   ``batch["hidden_state"]``, every micro-batch
``EncoderVector(...)``    vector of a frozen sentence encoder            ``batch["encoder_vector"]``, every micro-batch
``Probe()``               loss change when the model refuses more        ``learn``, for rows that are ``due``
``RefusalOdds(...)``      log-likelihood ratio of answer over refusal    ``learn``, for rows that are ``due``
``ReferenceLoss(...)``    loss under another PEFT adapter                ``learn``, for rows that are ``due``
========================  =============================================  =============================================

A plug-in brings a need of its own as a subclass of `Need`, and what measures it through the hook
`safe_sched.hooks.safe_sched_measurements`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Ratio = Literal["opening", "token_mean", "sequence_sum"]
RefusalCost = Literal["shared_prefix", "first_token", "exact"]
OnInversion = Literal["stop", "fallback", "ignore"]


@dataclass(frozen=True)
class Need:
    """Base of every need. Its fields are the options of the measurement."""

    name: ClassVar[str]
    """The name under which the measurement is registered, and under which its values are found."""

    def settings(self) -> dict[str, Any]:
        """The options as plain JSON values, its name first."""
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class NLL(Need):
    """The mean loss of a row's label tokens, in nats per token, read from the training forward."""

    name: ClassVar[str] = "nll"


@dataclass(frozen=True)
class HiddenState(Need):
    """The mean hidden state of the answer and the last one of the prompt, read from the training forward."""

    name: ClassVar[str] = "hidden_state"


@dataclass(frozen=True)
class EncoderVector(Need):
    """The vector of a row's text under a frozen sentence encoder.

    Args:
        encoder: A folder, a hub name, or a callable from a list of texts to an array (texts, width).
    """

    name: ClassVar[str] = "encoder_vector"

    encoder: Any = None


@dataclass(frozen=True)
class Probe(Need):
    """What a row's loss gains when the parameters move towards refusing; see `safe_sched.estimators.probe`."""

    name: ClassVar[str] = "probe"


@dataclass(frozen=True)
class ReferenceLoss(Need):
    """A row's loss under another adapter of the model.

    Args:
        adapter: The name of a PEFT adapter that was trained without safety data.
    """

    name: ClassVar[str] = "reference_loss"

    adapter: str = ""


@dataclass(frozen=True)
class RefusalOdds(Need):
    """The log-likelihood ratio of a row's answer over a refusal; see `safe_sched.schedulers.antibody`.

    Args:
        ratio: ``"opening"``, ``"token_mean"`` or ``"sequence_sum"``.
        refusals: Refusals to compare with; None: about a hundred that come with the package.
        anchor: Whether a row's ratio is taken under the aligned start and kept; ``"start"``: for all rows before step
            0.
        cost: ``"shared_prefix"``, ``"first_token"`` or ``"exact"``.
        refusals_per_row: Refusals that a row is compared with, >= 1.
        ahead: Whether all ratios of an optimiser step must be known before its first forward.
        on_inversion: ``"stop"``, ``"fallback"`` or ``"ignore"``.
    """

    name: ClassVar[str] = "refusal_odds"

    ratio: Ratio = "opening"
    refusals: tuple[str, ...] | None = None
    anchor: bool | Literal["start"] = True
    cost: RefusalCost = "shared_prefix"
    refusals_per_row: int = 1
    ahead: bool = False
    on_inversion: OnInversion = "stop"
