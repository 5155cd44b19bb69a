"""A method as a configuration file writes it: a name, or a name with options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safe_sched.errors import OptionError, SafeSchedError, unknown_name
from safe_sched.hooks import parts, third_party_schedulers
from safe_sched.scheduler import Scheduler, require_options
from safe_sched.schedulers import CATALOG, build, combine
from safe_sched.schedulers.catalog import known_schedulers
from safe_sched.training.loop import Part, part_of

COMBINED = "combined"
"""The name of several methods as one: ``{name: combined, parts: [bds, antibody]}``."""


def scheduler_of(method: Any, where: str = "safe_sched.method") -> Scheduler[Any]:
    """A scheduler from what a block says of it.

    Args:
        method: A name in the catalogue, or a mapping with ``name`` and options. ``{name: combined, parts: [...],
            prior_share: 0.1}`` is `safe_sched.combine`.
        where: The key's path, for messages.

    Raises:
        OptionError: The name or an option is unknown or out of range.

    Example:
        >>> scheduler_of({"name": "combined", "parts": ["bds", {"name": "antibody", "tau": 2}]}).parts[1].tau
        2.0
    """
    if isinstance(method, str):
        name, options = method, {}
    elif isinstance(method, Mapping) and isinstance(method.get("name"), str):
        name, options = method["name"], {str(k): v for k, v in method.items() if k != "name"}
    else:
        raise OptionError(
            f"{where}: {method!r}; allowed: a name, or a name with options, {{name: bds, prior_share: 0.05}}. Names: "
            f"{', '.join(method_names())}"
        )
    if name == COMBINED:
        return _combined(options, where)
    known = known_schedulers(name)
    if name not in known:
        raise at(where, unknown_name("method", name, method_names()))
    _require_options(known[name], name, options, where)
    try:
        return build(name, **options)
    except SafeSchedError as error:
        raise at(_key_in(str(error), where, options), error) from error


def method_names() -> list[str]:
    """The names that ``method`` may have, those of plugins among them."""
    return sorted({*CATALOG, *third_party_schedulers(), COMBINED})


def _combined(options: dict[str, Any], where: str) -> Scheduler[Any]:
    for option in options:
        if option not in ("parts", "prior_share"):
            raise at(f"{where}.{option}", unknown_name(f"option of {COMBINED!r}", option, ("parts", "prior_share")))
    parts, share = options.get("parts"), options.get("prior_share", 0.1)
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise OptionError(f"{where}.parts: {parts!r}; allowed: a list of methods, [bds, {{name: antibody}}]")
    try:
        share = float(share)
    except (TypeError, ValueError):
        raise OptionError(f"{where}.prior_share: {share!r}; allowed: a number in (0, 1)") from None
    built = [scheduler_of(part, f"{where}.parts.{number}") for number, part in enumerate(parts)]
    try:
        return combine(*built, prior_share=share)
    except OptionError as error:
        raise at(where, error) from error


def part_from(part: Any, where: str = "safe_sched.parts.0") -> Part:
    """A part of the loop from what a block says of it: a name, or a mapping with ``name`` and options.

    Raises:
        OptionError: The name or an option is unknown or out of range.

    Example:
        >>> part_from({"name": "lisa", "safe_steps": 2, "user_steps": 18}).settings()["user_steps"]
        18
    """
    name = part.get("name") if isinstance(part, Mapping) else part
    options = {str(k): v for k, v in part.items() if k != "name"} if isinstance(part, Mapping) else {}
    known = parts()
    if not isinstance(name, str):
        raise OptionError(
            f"{where}: {part!r}; allowed: a name, or a name with options. Names: {', '.join(sorted(known))}"
        )
    if name not in known:
        raise at(where, unknown_name("part", name, known))
    _require_options(known[name], name, options, where)
    try:
        return part_of(name, **options)
    except SafeSchedError as error:
        raise at(_key_in(str(error), where, options), error) from error


def _require_options(kind: type, name: str, options: Mapping[str, Any], where: str) -> None:
    for option in options:
        try:
            require_options(kind, {option: None}, f"option of {name!r}")
        except OptionError as error:
            raise at(f"{where}.{option}", error) from None


def _key_in(message: str, where: str, options: Mapping[str, Any]) -> str:
    """The path of the option that a scheduler's error is about: ``BDS(draws=1): ...`` is about ``draws``."""
    found = re.match(r"\w+\((\w+)", message)
    return f"{where}.{found[1]}" if found and found[1] in options else where


def at(where: str, error: SafeSchedError) -> OptionError:
    """The same error with the key's path before it."""
    return OptionError(f"{where}: {error}")
