"""Which rows of a training file would undo a model's safety?

The package is called like the function::

    from safe_sched import audit

    findings = audit("train.jsonl")
"""

from __future__ import annotations

import sys
import types
from typing import Any

from safe_sched.audit.engines.ranks import ranks
from safe_sched.audit.findings import Bad, Findings, Share, Signal, Summary
from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.audit.run import audit
from safe_sched.audit.signals import Anchored, Detector, Evidence

__all__ = [
    "Anchored",
    "AuditRow",
    "Bad",
    "Detector",
    "Evidence",
    "Findings",
    "Share",
    "Signal",
    "Summary",
    "audit",
    "audit_row",
    "ranks",
]


class _Callable(types.ModuleType):
    """``safe_sched.audit`` is this package once anything of it is imported, whatever a name in its parent said."""

    def __call__(self, *args: Any, **options: Any) -> Findings:
        return audit(*args, **options)


sys.modules[__name__].__class__ = _Callable
