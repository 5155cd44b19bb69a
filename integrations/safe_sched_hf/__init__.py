"""safe-sched for HF Trainer and TRL: one callback added to an existing script."""

from safe_sched_hf.callback import SafeSchedCallback

__all__ = ["SafeSchedCallback"]
