"""What safe-sched calls. It is imported whenever plug-ins are looked up, so it imports what it needs when asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safe_sched.hooks import AuditRequest, hookimpl

if TYPE_CHECKING:
    from safe_sched.audit.signals import Detector


@hookimpl
def safe_sched_detectors(request: AuditRequest) -> Sequence[Detector]:
    """One detector, with or without a model."""
    from .detector import RareLinks

    return [RareLinks()]
