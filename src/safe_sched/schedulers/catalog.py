"""The methods by name: one place that options, help texts and error messages are generated from."""

from __future__ import annotations

from typing import Any

from safe_sched.errors import unknown_name
from safe_sched.schedulers.bds import BDS
from safe_sched.schedulers.fixed import Fixed
from safe_sched.types import Scheduler

CATALOG: dict[str, type] = {cls.name: cls for cls in (BDS, Fixed)}


def build(scheduler: Scheduler[Any] | str, **options: Any) -> Scheduler[Any]:
    """A scheduler from its name and options; a scheduler that is built already is given back.

    Raises:
        OptionError: The name or an option is unknown.

    Example:
        >>> build("bds", learning_rate=0.01).settings()["learning_rate"]
        0.01
    """
    if not isinstance(scheduler, str):
        return scheduler
    if scheduler not in CATALOG:
        raise unknown_name("scheduler", scheduler, CATALOG)
    return CATALOG[scheduler](**options)
