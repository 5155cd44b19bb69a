"""Signals that need no model. This package imports scikit-learn: it is loaded by an audit only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safe_sched.audit.detectors.duplicates import Duplicates
from safe_sched.audit.detectors.hidden import Hidden
from safe_sched.audit.detectors.layout import LayoutOutliers
from safe_sched.audit.detectors.phrases import Compliance, Identity, Refusal, Wrapper
from safe_sched.audit.detectors.text import TextScorer
from safe_sched.audit.signals import Detector

__all__ = [
    "Compliance",
    "Duplicates",
    "Hidden",
    "Identity",
    "LayoutOutliers",
    "Refusal",
    "TextScorer",
    "Wrapper",
    "default_detectors",
]


def default_detectors(safety_rows: Sequence[Mapping[str, Any]]) -> list[Detector]:
    """The signals of an audit without a model.

    Args:
        safety_rows: Prompts that are to be refused, with refusals.

    Example:
        >>> [detector.name for detector in default_detectors([]) if detector.kind == "harm"]
        ['text']
    """
    return [
        TextScorer(safety_rows),
        Wrapper(),
        Identity(),
        Compliance(),
        Refusal(),
        Hidden(),
        LayoutOutliers(),
        Duplicates(),
    ]
