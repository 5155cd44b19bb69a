"""The version of this package, and of those that a result depends on."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable

__version__ = "0.1.0.dev0"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """This package's version, and those of the packages that are installed, by name.

    Example:
        >>> list(versions(["numpy", "no-such-package"]))
        ['safe-sched', 'numpy']
    """
    found = {"safe-sched": __version__}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
