"""The block ``safe_sched:`` of an Axolotl configuration, and the plugin's name beside it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from safe_sched.errors import OptionError
from safe_sched_hf.config import Settings, read_settings

KEY = "safe_sched"
"""The block's key."""

PLUGIN = "safe_sched_axolotl.SafeSchedPlugin"
"""What ``plugins:`` has to name."""

ADD_PLUGIN = f"add it:\n  plugins:\n    - {PLUGIN}"
ADD_BLOCK = f"say what it is to do, for example:\n  {KEY}:\n    method: bds\n    safety_data: core"


def plain(value: Any) -> Any:
    """A configuration's value as plain dicts, lists and scalars: Axolotl's own classes answer None to any key."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(exclude_none=True))
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def plugin_names(config: Mapping[str, Any]) -> list[str]:
    """What ``plugins:`` names.

    Raises:
        OptionError: It is not a list of names.
    """
    names = config.get("plugins") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"plugins: {names!r}; allowed: a list of names. To be defended, {ADD_PLUGIN}")
    return list(names)


def named_in(config: Mapping[str, Any]) -> bool:
    """Whether ``plugins:`` names this plugin."""
    return PLUGIN in plugin_names(config)


def settings_of(block: Any) -> Settings:
    """The block, checked.

    Raises:
        OptionError: Naming the key's path, what was seen there, and what is allowed.
    """
    return read_settings(plain(block), where=KEY)


def require_block(config: Mapping[str, Any]) -> Settings:
    """The block of a configuration that names the plugin.

    Raises:
        OptionError: There is none, perhaps under a name that is nearly right, or it is not what is allowed.
    """
    block = config.get(KEY)
    if block is None:
        near = difflib.get_close_matches(KEY, [str(name) for name in config if name != KEY], n=1, cutoff=0.7)
        hint = f"there is {near[0]!r}: rename it to {KEY!r}" if near else ADD_BLOCK
        raise OptionError(f"plugins: {PLUGIN} is loaded, and the configuration has no {KEY!r} block; {hint}")
    return settings_of(block)
