"""What safe-sched calls. It is imported whenever plug-ins are looked up, so it imports what it needs when asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safe_sched.hooks import hookimpl

if TYPE_CHECKING:
    from safe_sched.scheduler import Scheduler
    from safe_sched.training.loop import Measurement


@hookimpl
def safe_sched_schedulers() -> Mapping[str, type[Scheduler[Any]]]:
    """The scheduler, by the name that users write."""
    from .scheduler import Seal

    return {Seal.name: Seal}


@hookimpl
def safe_sched_measurements() -> Mapping[str, type[Measurement[Any]]]:
    """What measures the need of the scheduler, by the need's name."""
    from .measurement import SafeAdapterLossMeasurement
    from .scheduler import SafeAdapterLoss

    return {SafeAdapterLoss.name: SafeAdapterLossMeasurement}
