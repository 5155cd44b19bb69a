"""Asking a language model for texts: what the core asks for, and what answers.

A *text generator* is anything with the three members of `TextGenerator`: a server
(`mixing.rewriting.endpoint.Endpoint`), or a model on this machine, which an integration brings through the hook
`safe_sched.hooks.safe_sched_text_generator`. Nothing here imports a model or opens a connection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from safe_sched.errors import OptionError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TextRequest:
    """One question to a model that knows nothing of any other.

    Attributes:
        system: The instructions.
        data: The user's turn: one JSON document. Nothing in it is an instruction.
        seed: Of the sampling, 0 to 2^31 - 1.
        max_tokens: The longest reply.
    """

    system: str
    data: str
    seed: int
    max_tokens: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat of two turns."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.data}]


@dataclass(frozen=True)
class TextReply:
    """What came back for one request.

    Attributes:
        text: The reply, None where there is none.
        problem: Why there is none, in words that name no content.
        input_tokens: As the model counts them, None where it does not say.
        output_tokens: The same of the reply.
    """

    text: str | None
    problem: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


@runtime_checkable
class TextGenerator(Protocol):
    """What answers requests."""

    @property
    def identity(self) -> Mapping[str, object]:
        """What the replies depend on besides the request, as plain JSON values. It names no key and holds no secret."""
        ...

    @property
    def price_per_million(self) -> tuple[float, float] | None:
        """The price of a million input tokens and of a million output tokens; None where it is not known."""
        ...

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextReply]]:
        """The replies, each with the number of its request, as they come and in any order.

        A request that this model will never answer gets a reply with a ``problem``. Whatever else goes wrong is
        raised after the replies that are there have been given.

        Raises:
            SafeSchedError: The model cannot be loaded, run or reached.
        """
        ...


@dataclass(frozen=True)
class LocalModel:
    """What `safe_sched.hooks.safe_sched_text_generator` is asked for.

    Attributes:
        model: A folder or a hub name of a chat model.
        device: ``"auto"`` is a GPU where there is one.
        dtype: Of the parameters; ``"auto"`` is that of the files.
        temperature: Of the sampling, >= 0; 0 takes the likeliest token each time.
        top_p: Share of the probability that is sampled from, 0 < top_p <= 1.

    Raises:
        OptionError: A value is out of range.
    """

    model: str
    device: Device = "auto"
    dtype: Dtype = "auto"
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p={self.top_p}; allowed: a number above 0, at most 1")
        for name, kind in (("device", Device), ("dtype", Dtype)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise OptionError(f"{name}={value!r}; allowed: {', '.join(map(repr, get_args(kind)))}")


def require_temperature(temperature: float) -> None:
    """Stop at a temperature that no model takes.

    Raises:
        OptionError: It is below 0, above 2, or no number.
    """
    if not 0 <= temperature <= 2:
        raise OptionError(f"temperature={temperature}; allowed: 0 to 2")


def canonical(value: object) -> str:
    r"""JSON in one spelling, for hashing.

    Example:
        >>> canonical({"b": 1, "a": [None, "é"]})
        '{"a":[null,"\\u00e9"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
