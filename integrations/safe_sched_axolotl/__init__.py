"""safe-sched for Axolotl: a plugin and a block in the YAML.

::

    plugins:
      - safe_sched_axolotl.SafeSchedPlugin
    safe_sched:
      method: bds
      safety_data: core

Axolotl goes on training when a plugin cannot be imported. ``safe-sched axolotl train config.yaml`` does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_sched_axolotl.plugin import Hooks as SafeSchedPlugin

__all__ = ["SafeSchedPlugin"]


def __getattr__(name: str) -> Any:
    if name != "SafeSchedPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from safe_sched.errors import PluginError

    try:
        from safe_sched_axolotl.plugin import plugin_class

        return plugin_class()
    except ImportError as error:
        # not an ImportError: Axolotl prints those, and trains without the plugin
        raise PluginError(
            f"safe_sched_axolotl cannot be used here: {type(error).__name__}: {error}. It is made for Axolotl 0.19; "
            "install what it takes: pip install 'safe-sched[axolotl]'"
        ) from error
