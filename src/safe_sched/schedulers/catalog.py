"""The methods by name: one place that options, help texts and error messages are generated from."""

from __future__ import annotations

from typing import Any

from safe_sched.errors import unknown_name
from safe_sched.scheduler import Scheduler
from safe_sched.schedulers.antibody import Antibody
from safe_sched.schedulers.bds import BDS
from safe_sched.schedulers.fixed import Fixed
from safe_sched.schedulers.lisa import Lisa
from safe_sched.schedulers.neural import NeuralBDS

CATALOG: dict[str, type] = {cls.name: cls for cls in (BDS, NeuralBDS, Antibody, Lisa, Fixed)}


def build(scheduler: Scheduler[Any] | str, /, **options: Any) -> Scheduler[Any]:
    """A scheduler from its name and options; a scheduler that is built already is given back.

    A name that is not built in is looked for among the installed plugins (`safe_sched.hooks`).

    Raises:
        OptionError: The name or an option is unknown.
        PluginError: The name is not built in, and a plugin cannot be loaded.

    Example:
        >>> build("bds", draws=64).settings()["draws"]
        64
    """
    if not isinstance(scheduler, str):
        return scheduler
    known = CATALOG
    if scheduler not in known:
        # here, so that importing the core loads neither pluggy nor any plugin
        from safe_sched.hooks import third_party_schedulers

        known = third_party_schedulers() | CATALOG
    if scheduler not in known:
        raise unknown_name("scheduler", scheduler, known)
    return known[scheduler](**options)
