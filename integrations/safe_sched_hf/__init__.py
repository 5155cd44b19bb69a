"""safe-sched for HF Trainer and TRL: one callback added to an existing script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_sched_hf.alignment import FlatAlignmentCallback
    from safe_sched_hf.callback import SafeSchedCallback

__all__ = ["FlatAlignmentCallback", "SafeSchedCallback"]


def __getattr__(name: str) -> Any:
    # late: the entry point of this package is read where no trainer is installed, and by commands that need none
    if name == "SafeSchedCallback":
        from safe_sched_hf.callback import SafeSchedCallback

        return SafeSchedCallback
    if name == "FlatAlignmentCallback":
        from safe_sched_hf.alignment import FlatAlignmentCallback

        return FlatAlignmentCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
