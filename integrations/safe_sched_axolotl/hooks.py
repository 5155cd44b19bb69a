"""What this package adds to safe-sched's hooks. Axolotl is imported only when its command is called."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from safe_sched.hooks import hookimpl


@hookimpl
def safe_sched_command(name: str, arguments: Sequence[str]) -> int | None:
    """See `safe_sched.hooks.safe_sched_command`: ``axolotl``, where Axolotl is installed."""
    if name != "axolotl" or importlib.util.find_spec("axolotl") is None:
        return None
    from safe_sched_axolotl.commands import command

    return command(arguments)
