"""Another plugin of Axolotl, for one that stands beside ours."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class Seen(TrainerCallback):
    """Does nothing."""


class Other(BasePlugin):
    """Adds a callback."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [Seen()]
