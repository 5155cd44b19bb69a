"""Which rows of a training file would undo a model's safety?

The package is named like its function, and ``safe_sched.audit`` is the function::

    from safe_sched import audit
    from safe_sched.audit import Detector, Evidence

    findings = audit("train.jsonl")
"""

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
