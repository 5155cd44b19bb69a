"""safe-sched for HF Trainer and TRL: one callback added to an existing script."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_sched_hf.alignment import FlatAlignmentCallback as FlatAlignmentCallback
    from safe_sched_hf.callback import SafeSchedCallback as SafeSchedCallback
    from safe_sched_hf.lisa import Lisa as Lisa

_ROOMS = {"FlatAlignmentCallback": "alignment", "Lisa": "lisa", "SafeSchedCallback": "callback"}
__all__ = ["FlatAlignmentCallback", "Lisa", "SafeSchedCallback"]


def __getattr__(name: str) -> Any:
    # late: the entry point of this package is read where no trainer is installed, and by commands that need none
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"safe_sched_hf.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
