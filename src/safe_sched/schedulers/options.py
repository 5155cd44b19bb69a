"""How a scheduler declares its options: a frozen dataclass whose values are checked, with errors that teach."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import ConfigDict, ValidationError

from safe_sched.errors import OptionError, unknown_name

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Turn a class into a frozen dataclass that pydantic checks, with our errors instead of pydantic's.

    Example:
        >>> from safe_sched import BDS
        >>> BDS(learning_rte=0.01)
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: unknown option of BDS 'learning_rte' (did you mean 'learning_rate'?); ...
        >>> BDS(learning_rate=-1)
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: BDS(learning_rate=-1): Input should be greater than 0
    """
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    checked: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(cls)
    build = checked.__init__
    known = [field.name for field in dataclasses.fields(checked)]

    @functools.wraps(build)
    def init(self: T, *args: Any, **kwargs: Any) -> None:
        for option in kwargs:
            if option not in known:
                raise unknown_name(f"option of {cls.__name__}", option, known)
        try:
            build(self, *args, **kwargs)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(ours := first.get("ctx", {}).get("error"), OptionError):
                raise ours from None
            where = ".".join(map(str, first["loc"])) or "options"
            raise OptionError(f"{cls.__name__}({where}={first['input']!r}): {first['msg']}") from None

    checked.__init__ = init
    return checked


def settings_of(scheduler: Any) -> dict[str, object]:
    """A scheduler's options as plain JSON values, its catalogue name first.

    Example:
        >>> from safe_sched import BDS
        >>> settings_of(BDS())["chains"]
        8
    """
    return {"name": scheduler.name} | {
        field.name: getattr(scheduler, field.name) for field in dataclasses.fields(scheduler) if field.repr
    }
