"""What this package adds to safe-sched's hooks. Imports a trainer only when a hook is called."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safe_sched.generation import LocalModel, TextGenerator
from safe_sched.hooks import AuditRequest, RowLosses, RowLossesRequest, hookimpl

if TYPE_CHECKING:
    from safe_sched.audit.signals import Detector
    from safe_sched.training.loop import Measurement, Part


@hookimpl
def safe_sched_measurements() -> Mapping[str, type[Measurement[Any]]]:
    """See `safe_sched.hooks.safe_sched_measurements`; nothing where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    from safe_sched_hf.measure import MEASUREMENTS

    return MEASUREMENTS


@hookimpl
def safe_sched_parts() -> Mapping[str, type[Part]]:
    """See `safe_sched.hooks.safe_sched_parts`; nothing where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    from safe_sched_hf.lisa import Lisa
    from safe_sched_hf.noise import ParameterNoise
    from safe_sched_hf.safety import SafetyBatch
    from safe_sched_hf.sampling import Sampling

    return {part.name: part for part in (SafetyBatch, Sampling, Lisa, ParameterNoise)}


@hookimpl
def safe_sched_row_losses(request: RowLossesRequest) -> RowLosses | None:
    """See `safe_sched.hooks.safe_sched_row_losses`; nothing where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    from safe_sched_hf.measure.row_losses import row_losses

    return row_losses(request)


@hookimpl
def safe_sched_text_generator(request: LocalModel) -> TextGenerator | None:
    """See `safe_sched.hooks.safe_sched_text_generator`; nothing where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from safe_sched_hf.rewriter import ChatModel

    return ChatModel(request)


@hookimpl
def safe_sched_row_set(data: object) -> object | None:
    """See `safe_sched.hooks.safe_sched_row_set`; nothing unless it is a set of datasets."""
    if "datasets" not in sys.modules:  # then it cannot be one
        return None
    from safe_sched_hf.data import row_set

    return row_set(data)


@hookimpl
def safe_sched_open_source(source: str) -> Iterable[Mapping[str, Any]] | None:
    """See `safe_sched.hooks.safe_sched_open_source`; nothing where datasets is not installed."""
    if not source.startswith("hf://") or importlib.util.find_spec("datasets") is None:
        return None
    from safe_sched_hf.data import HubRows

    return HubRows(source)


@hookimpl
def safe_sched_tokenizer(name: str) -> Any:
    """See `safe_sched.hooks.safe_sched_tokenizer`; nothing where transformers or datasets is not installed."""
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("datasets") is None:
        return None
    from safe_sched_hf.data import tokenizer

    return tokenizer(name)


@hookimpl
def safe_sched_detectors(request: AuditRequest) -> Sequence[Detector]:
    """See `safe_sched.hooks.safe_sched_detectors`; nothing without a model, or where TRL is not installed."""
    if request.model is None or importlib.util.find_spec("trl") is None:
        return []
    from safe_sched_hf.audit import model_detectors

    return model_detectors(request)


@hookimpl
def safe_sched_command(name: str, arguments: Sequence[str]) -> int | None:
    """See `safe_sched.hooks.safe_sched_command`: ``trl``, where TRL is installed."""
    if name != "trl" or importlib.util.find_spec("trl") is None:
        return None
    from safe_sched_hf.trl import command

    return command(arguments)
