"""The methods by name: one place that options, help texts and error messages are generated from."""

from __future__ import annotations

from typing import Any

from safe_sched.errors import OptionError, unknown_name
from safe_sched.scheduler import Scheduler, require_options
from safe_sched.schedulers.antibody import Antibody
from safe_sched.schedulers.bds import BDS
from safe_sched.schedulers.bds_released import BDSReleased
from safe_sched.schedulers.fixed import Fixed
from safe_sched.schedulers.neural import NeuralBDS

CATALOG: dict[str, type[Scheduler[Any]]] = {cls.name: cls for cls in (BDS, BDSReleased, NeuralBDS, Antibody, Fixed)}


def known_schedulers(name: str | None = None) -> dict[str, type[Scheduler[Any]]]:
    """The schedulers by name, those of plug-ins among them; a name that is built in loads no plug-in.

    Raises:
        PluginError: A plug-in cannot be loaded.
    """
    if name in CATALOG:
        return CATALOG
    # here, so that importing the core loads neither pluggy nor any plugin
    from safe_sched.hooks import third_party_schedulers

    return third_party_schedulers() | CATALOG


def build(scheduler: Scheduler[Any] | str, /, **options: Any) -> Scheduler[Any]:
    """A scheduler from its name and options; a scheduler that is built already is given back.

    A name that is not built in is looked for among the installed plugins (`safe_sched.hooks`).

    Raises:
        OptionError: The name or an option is unknown, or what was given is no scheduler.
        PluginError: The name is not built in, and a plugin cannot be loaded.

    Example:
        >>> build("bds", draws=64).settings()["draws"]
        64
    """
    if not isinstance(scheduler, str):
        if not isinstance(scheduler, Scheduler):
            raise OptionError(
                f"{scheduler!r} is not a scheduler; allowed: a name, or an object of a class that derives from "
                "safe_sched.Scheduler, such as safe_sched.BDS()"
            )
        return scheduler
    known = known_schedulers(scheduler)
    if scheduler not in known:
        raise unknown_name("scheduler", scheduler, known)
    require_options(known[scheduler], options)
    return known[scheduler](**options)
