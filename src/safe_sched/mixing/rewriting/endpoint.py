"""A model behind an OpenAI-compatible server: one POST to ``{base_url}/chat/completions`` per request, with httpx2.

The client reads nothing from the environment (no address, no proxy, no netrc) and follows no redirect. The key comes
from the variable that ``api_key_env`` names, appears in no error and no repr, and travels through HTTPS or to this
machine only. Answers are read up to `LARGEST_BODY`.

Status 408, 409, 425, 429 and 5xx, timeouts, broken connections and answers that are no chat completion are tried again
after `FIRST_WAIT`, twice, four times ... as many seconds, or as many as the server asks for. Any other status stops the
run, except for a request that the server's filter or the model's window refuses: that request fails alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from safe_sched.errors import EndpointError, OptionError
from safe_sched.generation import TextReply, TextRequest, canonical, require_temperature

if TYPE_CHECKING:
    import httpx2

LARGEST_BODY = 4 << 20
"""Bytes of an answer that are read at most."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0
"""Seconds before the first retry, and before any. A server that asks for a longer wait stops the run."""

_AGAIN = {408, 409, 425, 429}
_ALONE = {  # error codes that are about one request
    "content_filter": "the server's filter turned it down",
    "content_policy_violation": "the server's filter turned it down",
    "context_length_exceeded": "it is too long for the model",
}
_UNKNOWN_FIELD = "see which field the server does not take; options={name: None} leaves one out"
_REMEDIES = {
    400: _UNKNOWN_FIELD,
    401: "see whether the right key is in the variable that api_key_env names",
    402: "there is no money left with this provider",
    403: "see whether the key may use this model",
    404: "see whether base_url ends where /chat/completions follows, often in /v1, and whether the model has this name",
    422: _UNKNOWN_FIELD,
}
_OURS = {"messages", "model", "stream", "n", "tools", "functions", "tool_choice", "function_call"}


class _Again(Exception):
    """Worth another try, after ``wait`` seconds at least."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """A text generator behind an OpenAI-compatible server.

    Args:
        base_url: Address up to ``/chat/completions``, such as ``"http://localhost:8000/v1"``.
        model: The model's name on the server.
        api_key_env: Environment variable that holds the key; None for a server that needs none.
        price_per_million: Price of a million input and of a million output tokens, in any currency; None if unknown.
        timeout: Seconds for one request and its answer.
        max_retries: Retries of one request, 0 to 100.
        concurrency: Requests at a time, 1 to 64.
        temperature: Sampling temperature, 0 to 2.
        options: More fields of the request, or other values of ``temperature``, ``seed`` and ``max_tokens``. None
            leaves a field out, which some servers need: ``{"max_tokens": None, "max_completion_tokens": 512}``.

    Raises:
        OptionError: A value is out of range, the key would travel unencrypted, or httpx2 is not installed.

    Example:
        >>> Endpoint("http://localhost:8000/v1", "my-model", api_key_env=None).identity["model"]
        'my-model'
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    price_per_million: tuple[float, float] | None = None
    timeout: float = 120.0
    max_retries: int = 5
    concurrency: int = 4
    temperature: float = 0.7
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _client_library()
        _require_url(self.base_url, with_key=self.api_key_env is not None)
        require_temperature(self.temperature)
        for name, low, high in (("timeout", 0.001, 3600), ("max_retries", 0, 100), ("concurrency", 1, 64)):
            if not low <= (value := getattr(self, name)) <= high:
                raise OptionError(f"{name}={value}; allowed: {low} to {high}")
        if not self.model:
            raise OptionError("model=''; allowed: the name of a model on the server")
        prices = self.price_per_million
        if prices is not None and not (len(prices) == 2 and all(price >= 0 for price in prices)):
            raise OptionError(f"price_per_million={prices}; allowed: two numbers >= 0, for input and output tokens")
        if taken := _OURS & self.options.keys():
            raise OptionError(f"options has {sorted(taken)}, which are not free: the rewriter sets them")
        try:
            canonical(dict(self.options))
        except (TypeError, ValueError) as error:
            raise OptionError(f"options are sent as JSON and cannot be: {error}") from error

    @property
    def identity(self) -> Mapping[str, object]:
        """See `safe_sched.generation.TextGenerator.identity`."""
        return {
            "base_url": self.base_url.rstrip("/"),
            "model": self.model,
            "temperature": self.temperature,
            "options": dict(self.options),
        }

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextReply]]:
        """See `safe_sched.generation.TextGenerator.generate`; ``concurrency`` requests at a time.

        Raises:
            EndpointError: The server cannot be reached or refuses to work. Requests under way are finished and their
                replies given first; no other request begins.
            OptionError: The environment variable holds no key.
        """
        httpx2, key = _client_library(), self._key()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "safe-sched"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        client = httpx2.Client(headers=headers, timeout=self.timeout, trust_env=False, follow_redirects=False)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="safe-sched-endpoint")
        failed: Exception | None = None
        try:
            asked: dict[Future[TextReply | None], int] = {
                pool.submit(self._ask, client, request, key, stop): number for number, request in enumerate(requests)
            }
            for future in as_completed(asked):
                try:
                    reply = future.result()
                except Exception as error:
                    failed = failed or error
                    continue
                if reply is not None:
                    yield asked[future], reply
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            client.close()
        if failed is not None:
            raise failed

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            raise OptionError(
                f"the environment variable {self.api_key_env} is not set to a key. Set it, name another variable "
                "(api_key_env=...), or give api_key_env=None for a server that needs no key."
            )
        return key

    def _ask(
        self, client: httpx2.Client, request: TextRequest, key: str | None, stop: threading.Event
    ) -> TextReply | None:
        """One request with its retries; None if the run has stopped before it was sent."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "temperature": self.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        fields = {name: value for name, value in (fields | dict(self.options)).items() if value is not None}
        try:
            for attempt in range(self.max_retries + 1):
                if stop.is_set():
                    return None
                try:
                    return self._send(client, fields, key)
                except _Again as error:
                    # random, so that requests that failed together do not come back together
                    wait = max(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0), error.wait)
                    if wait > LONGEST_WAIT or attempt == self.max_retries:
                        limit = f"and asks to wait {wait:.0f} seconds; allowed: {LONGEST_WAIT:g}"
                        raise EndpointError(
                            f"the server at {self.base_url} {error}, "
                            f"{limit if wait > LONGEST_WAIT else f'{attempt + 1} times'}. The cache keeps the replies "
                            "that came before: run again later to go on."
                        ) from None
                    stop.wait(wait)
        except BaseException:
            stop.set()  # before this thread takes the next request
            raise
        raise AssertionError("unreachable")

    def _send(self, client: httpx2.Client, fields: dict[str, Any], key: str | None) -> TextReply:
        httpx2, deadline, body = _client_library(), time.monotonic() + self.timeout, bytearray()
        late = f"did not answer within {self.timeout:g} seconds"
        try:
            with client.stream(
                "POST", f"{self.base_url.rstrip('/')}/chat/completions", content=json.dumps(fields).encode()
            ) as response:
                for piece in response.iter_raw():
                    body += piece
                    if len(body) > LARGEST_BODY:
                        raise _Again(f"gave an answer of more than {LARGEST_BODY >> 20} MiB")
                    if time.monotonic() > deadline:
                        raise _Again(late)
        except httpx2.TimeoutException:
            raise _Again(late) from None
        except httpx2.HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise EndpointError(
                    f"the server at {self.base_url} has a certificate that cannot be trusted: {error}"
                ) from None
            raise _Again(f"cannot be reached: {_plain(str(error) or type(error).__name__, key)}") from None
        if response.status_code != 200:
            return self._refused(response, body.decode("utf-8", "replace"), key)
        return _reply(bytes(body))

    def _refused(self, response: httpx2.Response, said: str, key: str | None) -> TextReply:
        """What a status other than 200 means: a reply with a problem, or an error."""
        status, code, message = response.status_code, "", said
        with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
            error = json.loads(said)["error"]
            code, message = str(error.get("code")), str(error.get("message", said))
        told = ": ".join(filter(None, [f"status {status}", _plain(message, key)]))
        if code == "insufficient_quota":
            status = 402
        if status in _AGAIN or status >= 500:
            raise _Again(f"answers with {told}", _wait_of(response.headers.get("Retry-After", "")))
        if code in _ALONE:
            return TextReply(None, _ALONE[code])
        remedy = _REMEDIES.get(status, "see what the server says")
        if 300 <= status < 400:
            place = _plain(response.headers.get("Location", "").partition("?")[0], key)
            remedy = f"it sends elsewhere, to {place!r}, which is not followed; if you trust that, give it as base_url"
        raise EndpointError(f"the server at {self.base_url} refuses ({told}): {remedy}.")


def _client_library() -> Any:
    """httpx2, which only those who ask a server need."""
    try:
        import httpx2
    except ImportError as error:
        raise OptionError("Endpoint asks a server through httpx2: pip install 'safe-sched[rewrite]'") from error
    return httpx2


def _reply(body: bytes) -> TextReply:
    """The reply in an answer with status 200."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _Again("gave an answer that is no chat completion") from None
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    tokens = [count if type(count) is int and 0 <= count < 1 << 40 else None for count in counts]
    problem = None
    if reason == "content_filter":
        problem = _ALONE["content_filter"]
    elif reason == "length":
        problem = "the reply is longer than max_tokens"
    elif refusal or text is None:
        problem = "the model declined" if refusal else "the reply is empty"
    return TextReply(None if problem else text, problem, *tokens)


def _wait_of(given: str) -> float:
    """Seconds that ``Retry-After`` asks for, a number or a date; 0 if it is neither."""
    try:
        wait = float(given)
    except ValueError:
        try:
            wait = parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return wait if wait > 0 else 0.0  # 0 for NaN too


def _plain(text: str, key: str | None) -> str:
    """What a server says, for a message: short, printable, without the key."""
    if key:
        text = text.replace(key, "***")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def _require_url(url: str, *, with_key: bool) -> None:
    """Stop at an address that is no server's, holds a password, or would take a key unencrypted."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise OptionError(f"base_url={url!r} is no address: {error}") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise OptionError(
            "base_url has a user, a password, a query or a fragment; allowed: https://host/path. The key is read from "
            "an environment variable (api_key_env)."
        )
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise OptionError(f"base_url={url!r}; allowed: an address such as 'https://host/v1'")
    try:
        this_machine = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        this_machine = False
    if with_key and parts.scheme == "http" and not this_machine:
        raise OptionError(
            f"base_url={url!r} would send the key unencrypted; use https, or api_key_env=None if the server needs no "
            "key"
        )
