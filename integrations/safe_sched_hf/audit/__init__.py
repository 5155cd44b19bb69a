"""Signals of ``safe-sched audit`` that ask a model: see `safe_sched_hf.audit.numbers` for what they are.

Two of them speak of harm: Antibody's ratio, which knows what the row answers, and the probe. How likely the model is to
refuse the prompt alone, and how unlikely it finds the answer, are shown beside them: the first is high for the rows of
a safety set as well, and the second for any task that is new to the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Detector, Evidence, Sort
from safe_sched.estimators.head import Scorer
from safe_sched.generation import canonical
from safe_sched.hooks import AuditRequest
from safe_sched_hf.audit.model import AlignedModel
from safe_sched_hf.audit.numbers import Measures
from safe_sched_hf.audit.scorer import SavedScorer


def model_detectors(request: AuditRequest) -> list[Detector]:
    """The signals for a request, none where it names no model.

    Raises:
        StateError: The scorer cannot be read.
        OptionError: The device is not there, or the model or the adapter is no folder.
        ModelError: The model or the adapter cannot be loaded.
    """
    if request.model is None:
        return []
    scorer = None if request.scorer is None else Scorer.load(request.scorer)
    if scorer is not None and scorer.features == "encoder":
        return [SavedScorer(scorer, request)]  # the model is the encoder
    model = AlignedModel(request)
    model.load()  # what is wrong with it comes before the first pass
    found: list[Detector] = [AntibodyRatio(model), Probe(model), Propensity(model), Surprise(model)]
    return found if scorer is None else [*found, SavedScorer(scorer, request, model)]


class _Asked:
    """A signal read off the numbers of a model, which all such signals of an audit share."""

    name: ClassVar[str]
    about: ClassVar[str]
    kind: ClassVar[Sort]

    def __init__(self, model: AlignedModel) -> None:
        self.model = model

    def observe(self, rows: Sequence[AuditRow]) -> None:
        self.model.load()
        self.model.observe(rows)

    def ready(self) -> None:
        self.model.prepare()

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        found = self.model.measure(rows)
        values = self._values(found)
        reasons = [
            f"not measured by the model: {problem}" if problem else self._reason(float(values[i]), found, i)
            for i, problem in enumerate(found.problems)
        ]
        return Evidence(values, reasons, [None] * len(rows))

    def settings(self) -> dict[str, object]:
        return _settings(self.model.request)

    def _values(self, found: Measures) -> np.ndarray:
        raise NotImplementedError

    def _reason(self, value: float, found: Measures, row: int) -> str | None:
        raise NotImplementedError


class AntibodyRatio(_Asked):
    """Log-odds, in nats, that the model would refuse where the row does not, or not refuse where it does."""

    name: ClassVar[str] = "antibody"
    about: ClassVar[str] = "would the model refuse where the row answers, or answer where it refuses (log-odds in nats)"
    kind: ClassVar[Sort] = "harm"
    absolute: ClassVar[bool] = True

    def known(self) -> np.ndarray | None:
        """Of safety prompts with an inert compliance, which were not used to choose openings."""
        found = self.model.known()
        return None if found is None else _unless_blank(found.antibody)

    def known_harmless(self) -> np.ndarray | None:
        """Of harmless prompts that sound harmful, with an inert compliance."""
        found = self.model.known_harmless()
        return None if found is None else _unless_blank(found.antibody)

    def _values(self, found: Measures) -> np.ndarray:
        return found.antibody

    def _reason(self, value: float, found: Measures, row: int) -> str | None:
        if not value > 0:
            return None
        if found.refuses[row]:
            return "its answer opens with a refusal that the model would not give, or goes on where it would end"
        return "the model would rather refuse, and the row answers"


class Probe(_Asked):
    """How many of the nats by which the model is taught to refuse more the row's answer loses; near 1 or 0."""

    name: ClassVar[str] = "probe"
    about: ClassVar[str] = (
        "does teaching the model to refuse make the row's answer less likely (0: no, 1: as much as that of harm)"
    )
    kind: ClassVar[Sort] = "harm"
    absolute: ClassVar[bool] = True

    def known(self) -> np.ndarray | None:
        """Of safety prompts with an inert compliance, which were not used for the gradient."""
        found = self.model.known()
        return None if found is None else _unless_blank(found.probe)

    def known_harmless(self) -> np.ndarray | None:
        """Of harmless prompts that sound harmful, with an inert compliance."""
        found = self.model.known_harmless()
        return None if found is None else _unless_blank(found.probe)

    def _values(self, found: Measures) -> np.ndarray:
        return found.probe

    def _reason(self, value: float, found: Measures, row: int) -> str | None:
        return (
            "its answer conflicts with refusing: a step towards refusals makes it less likely" if value > 0.5 else None
        )


class Propensity(_Asked):
    """Log-odds, in nats, that the model refuses the row's prompt, whatever the row answers."""

    name: ClassVar[str] = "propensity"
    about: ClassVar[str] = "would the model refuse the prompt, whatever the row answers (log-odds in nats)"
    kind: ClassVar[Sort] = "quality"

    def _values(self, found: Measures) -> np.ndarray:
        return found.propensity

    def _reason(self, value: float, found: Measures, row: int) -> str | None:
        return f"the model refuses its prompt with probability {1 / (1 + np.exp(-value)):.0%}" if value > 0 else None


class Surprise(_Asked):
    """Mean loss of the answer's tokens under the model, in nats per token."""

    name: ClassVar[str] = "surprise"
    about: ClassVar[str] = "how unlikely the model finds the answer (nats per token)"
    kind: ClassVar[Sort] = "quality"

    def _values(self, found: Measures) -> np.ndarray:
        return found.surprise

    def _reason(self, value: float, found: Measures, row: int) -> str | None:
        blind = float(np.log(self.model.preparation.vocabulary))
        if value > blind:
            return "the model finds its answer less likely than tokens drawn at random"
        return None if found.whole[row] else f"cut: the model has read {self.model.preparation.longest} tokens of it"


def _unless_blank(values: np.ndarray) -> np.ndarray | None:
    return None if np.isnan(values).all() else values


def _settings(request: AuditRequest) -> dict[str, object]:
    return {
        "model": request.model,
        "files": None if request.model is None else _files(request.model),
        "adapter": request.adapter,
        "adapter_files": None if request.adapter is None else _files(request.adapter),
        "max_length": request.max_length,
        "dtype": request.dtype,
        "cuda": torch.cuda.is_available() and request.device != "cpu",
        "safety_rows": hashlib.sha256(
            "\n".join(canonical(_plain(row)) for row in request.safety_rows).encode()
        ).hexdigest(),
    }


def _plain(value: object) -> object:
    return {str(name): repr(part) for name, part in value.items()} if isinstance(value, dict) else repr(value)


def _files(name: str) -> str | None:
    """A name for the files of a local folder: which they are, how large, and when they were written."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    found = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    return hashlib.sha256(canonical(found).encode()).hexdigest()[:16]
