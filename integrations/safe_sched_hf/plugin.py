"""What this package adds to safe-sched's hooks. Imports a trainer only when a hook is called."""

from __future__ import annotations

import importlib.util

from safe_sched.hooks import RowLosses, RowLossesRequest, hookimpl


@hookimpl
def safe_sched_row_losses(request: RowLossesRequest) -> RowLosses | None:
    """See `safe_sched.hooks.safe_sched_row_losses`; nothing where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    from safe_sched_hf.losses import row_losses

    return row_losses(request)
