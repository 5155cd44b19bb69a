"""What the plugin adds to Axolotl's configuration: one key."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, field_validator


class SafeSchedArgs(BaseModel):
    """Merged by Axolotl into its own configuration class, so it claims one name and no more.

    Attributes:
        safe_sched: The block; see `safe_sched_hf.config.Settings`.

    Example:
        >>> SafeSchedArgs(safe_sched={"method": "bds"}).safe_sched
        {'method': 'bds'}
        >>> SafeSchedArgs(safe_sched={"methd": "bds"})
        Traceback (most recent call last):
        ...
        pydantic_core._pydantic_core.ValidationError: 1 validation error for SafeSchedArgs
        safe_sched
          Value error, safe_sched.methd: unknown key 'methd' (did you mean 'method'?); allowed: ...
    """

    safe_sched: dict[str, Any] | None = None

    @field_validator("safe_sched")
    @classmethod
    def _checked(cls, block: dict[str, Any] | None) -> dict[str, Any] | None:
        from safe_sched_axolotl.block import settings_of

        if block is not None:
            settings_of(block)
        return block
