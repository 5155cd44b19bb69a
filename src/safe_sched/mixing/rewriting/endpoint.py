"""A model behind an OpenAI-compatible server: one POST to ``{base_url}/chat/completions`` a request.

Nothing is sent before `Endpoint.generate` is called, and nothing but requests to the address that was given: redirects
are not followed, and no environment variable changes the address. The standard library is enough for that, so there is
no client to install. (Proxies of the environment are used, as by every program, but not for this machine itself.)

The key is read from an environment variable when it is needed. It is in no error and no repr, and is only sent through
HTTPS or to this machine.

What is tried again, after 1, 2, 4, ... times ``backoff`` seconds or as long as the server asks for: status 408, 409,
425, 429 and 5xx, timeouts, broken connections, and answers that are no chat completion. Any other status stops the run,
but for a request that the server's filter or the model's window turns down, which fails alone.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from safe_sched.errors import EndpointError, OptionError
from safe_sched.generation import TextReply, TextRequest, canonical, require_temperature
from safe_sched.mixing.rewriting.endpoint_http import (
    Again,
    Alone,
    body_of,
    error_of,
    opener_for,
    plain,
    require_url,
    text_of,
    wait_of,
)

_AGAIN = {408, 409, 425, 429}
_ALONE = {  # codes of errors that are about one request, and what they mean
    "content_filter": "the server's filter turned it down",
    "content_policy_violation": "the server's filter turned it down",
    "context_length_exceeded": "it is too long for the model",
}
_REMEDIES = {
    400: "see which field the server does not take; options={name: None} leaves one out",
    401: "see whether the right key is",
    402: "there is no money left with this provider",
    403: "see whether the key may use this model",
    404: "see whether base_url ends where /chat/completions follows, often in /v1, and whether the model has this name",
    422: "see which field the server does not take; options={name: None} leaves one out",
}
_OURS = {"messages", "model", "stream", "n", "tools", "functions", "tool_choice", "function_call"}


@dataclass(frozen=True)
class Endpoint:
    """A text generator behind an OpenAI-compatible server.

    Args:
        base_url: Up to what ``/chat/completions`` follows, such as ``"http://localhost:8000/v1"``.
        model: The model's name there.
        api_key_env: The environment variable that holds the key; None where the server needs none.
        price_per_million: The price of a million input and of a million output tokens, in any currency; None where
            it is not known.
        timeout: Seconds, for one request and its answer.
        max_retries: How often a request is sent again, >= 0.
        concurrency: Requests at a time, 1 to 64.
        temperature: Of the sampling, 0 to 2.
        options: More fields of the request, or other values of ``temperature``, ``seed`` and ``max_tokens``; None
            leaves a field out, which some servers need: ``{"max_tokens": None, "max_completion_tokens": 512}``.
        backoff: Seconds before the first retry; twice as many before each further one, up to ``longest_wait``.
        longest_wait: Seconds. A server that asks to wait longer stops the run.

    Raises:
        OptionError: A value is out of range, or the key would travel unencrypted.

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
    backoff: float = 1.0
    longest_wait: float = 120.0

    def __post_init__(self) -> None:
        require_url(self.base_url, with_key=self.api_key_env is not None)
        require_temperature(self.temperature)
        for name, low, high in (
            ("timeout", 0.001, 3600),
            ("max_retries", 0, 100),
            ("concurrency", 1, 64),
            ("backoff", 0, 600),
            ("longest_wait", 0, 3600),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise OptionError(f"{name}={value}; allowed: {low} to {high}")
        if not self.model:
            raise OptionError("model=''; allowed: the name of a model on the server")
        if self.price_per_million is not None and not (
            len(self.price_per_million) == 2 and all(price >= 0 for price in self.price_per_million)
        ):
            raise OptionError(
                f"price_per_million={self.price_per_million}; allowed: two numbers >= 0, for input and output tokens"
            )
        if taken := _OURS & self.options.keys():
            raise OptionError(f"options has {sorted(taken)}, which are not free: what is asked is the rewriter's")
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
        """See `safe_sched.generation.TextGenerator.generate`; some requests at a time.

        Raises:
            EndpointError: The server cannot be reached or refuses to work. Requests under way are finished and given
                first; no other is begun.
            OptionError: The environment variable holds no key.
        """
        key = self._key()
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="safe-sched-endpoint")
        failed: Exception | None = None
        try:
            asked: dict[Future[TextReply | None], int] = {
                pool.submit(self._ask, request, key, stop): number for number, request in enumerate(requests)
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
        if failed is not None:
            raise failed

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise OptionError(
                f"the environment variable {self.api_key_env} is not set, and the key is read from there. Set it, name "
                "another one (api_key_env=...), or give api_key_env=None for a server that needs no key."
            )
        if not key.isascii() or not key.isprintable():
            raise OptionError(f"the environment variable {self.api_key_env} holds characters that no key has")
        return key

    def _ask(self, request: TextRequest, key: str | None, stop: threading.Event) -> TextReply | None:
        """One request, with its retries; None where the run has been stopped before it was sent."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "temperature": self.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        body = {name: value for name, value in (body | dict(self.options)).items() if value is not None}
        try:
            return self._try(json.dumps(body).encode(), key, stop)
        except BaseException:
            stop.set()  # here, before this thread takes the next request
            raise

    def _try(self, body: bytes, key: str | None, stop: threading.Event) -> TextReply | None:
        for attempt in range(self.max_retries + 1):
            if stop.is_set():
                return None
            try:
                return self._send(body, key)
            except Alone as error:
                return TextReply(None, str(error))
            except Again as error:
                if attempt == self.max_retries:
                    raise EndpointError(
                        f"{self._where} {error} ({attempt + 1} times). What was answered before is kept where there is "
                        "a cache: run again to go on."
                    ) from None
                # not all at the same moment
                wait = min(self.backoff * 2**attempt, self.longest_wait) * random.uniform(0.5, 1.0)
                if error.wait is not None:
                    wait = max(wait, error.wait)
                if wait > self.longest_wait:
                    raise EndpointError(
                        f"{self._where} {error}, and asks to wait {wait:.0f} seconds; longest_wait is "
                        f"{self.longest_wait:g}. Run again later: what was answered before is kept where there is a "
                        "cache."
                    ) from None
                stop.wait(wait)
        raise AssertionError("unreachable")

    def _send(self, body: bytes, key: str | None) -> TextReply:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "safe-sched"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, body, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with opener_for(self.base_url).open(request, timeout=self.timeout) as response:
                return self._read(body_of(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, text_of(error, deadline), key) from None
        except TimeoutError:
            raise Again(f"did not answer within {self.timeout:g} seconds") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise EndpointError(f"{self._where} has a certificate that cannot be trusted: {reason}") from None
            if isinstance(reason, TimeoutError):
                raise Again(f"did not answer within {self.timeout:g} seconds") from None
            raise Again(f"cannot be reached: {plain(str(reason) or type(reason).__name__, key)}") from None

    @property
    def _address(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    @property
    def _where(self) -> str:
        return f"the server at {self.base_url}"

    def _read(self, body: bytes) -> TextReply:
        """An answer with status 200."""
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            if not isinstance(text, str | None):
                raise TypeError
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise Again("gave an answer that is no chat completion") from None
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        tokens = [count if type(count) is int and 0 <= count < 1 << 40 else None for count in counts]
        problem = None
        if reason == "content_filter":
            problem = _ALONE["content_filter"]
        elif reason == "length":
            problem = "the reply is longer than max_tokens"
        elif refusal or text is None:
            problem = "the model declined" if refusal else "the reply is empty"
        return TextReply(None if problem else text, problem, *tokens)

    def _refused(self, error: urllib.error.HTTPError, said: str, key: str | None) -> Exception:
        """What a status other than 200 becomes."""
        code, message = error_of(said)
        told = plain(message, key)
        told = f"status {error.code}" + (f": {told}" if told else "")
        if error.code == 429 and code == "insufficient_quota":
            return EndpointError(f"{self._where} refuses ({told}). {_REMEDIES[402].capitalize()}.")
        if error.code in _AGAIN or error.code >= 500:
            return Again(f"answers with {told}", wait_of(error.headers))
        if 300 <= error.code < 400:
            place = urllib.parse.urlsplit(error.headers.get("Location", ""))
            place = plain(urllib.parse.urlunsplit((place.scheme, place.netloc, place.path, "", "")), key)
            return EndpointError(
                f"{self._where} sends elsewhere ({told}, to {place!r}), which is not followed. Give the address itself "
                "as base_url, if you trust it."
            )
        if code in _ALONE:
            return Alone(_ALONE[code])
        remedy = _REMEDIES.get(error.code, "see what the server says")
        if error.code == 401:
            name = self.api_key_env
            remedy = "name the variable that holds its key (api_key_env)" if name is None else f"{remedy} in {name}"
        return EndpointError(f"{self._where} refuses ({told}): {remedy}.")
