"""What `mixing.rewriting.endpoint` needs of HTTP: addresses that are safe to use, bounded answers, errors, waits."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from safe_sched.errors import OptionError

LARGEST_BODY = 4 << 20
"""Bytes of an answer that are read at most."""


class Again(Exception):
    """Worth another try, after so many seconds where the server says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Alone(Exception):
    """This request will never be answered; others may be."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """None: what would be followed becomes an error."""


def opener_for(base_url: str) -> urllib.request.OpenerDirector:
    """What opens addresses: without redirects, and without a proxy for this machine."""
    if _is_this_machine(urllib.parse.urlsplit(base_url).hostname or ""):
        return urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(_NoRedirect)


def body_of(response: Any, deadline: float) -> bytes:
    """All of an answer, if it is not too large and does not take too long."""
    found = bytearray()
    while piece := response.read1(1 << 16):
        found += piece
        if len(found) > LARGEST_BODY:
            raise Again(f"gave an answer of more than {LARGEST_BODY >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(found)


def text_of(error: urllib.error.HTTPError, deadline: float) -> str:
    """What stands in an answer with an error's status."""
    try:
        return body_of(error, deadline).decode("utf-8", "replace")
    except (Again, OSError, http.client.HTTPException, AttributeError):
        return ""  # the status alone says enough


def error_of(said: str) -> tuple[str, str]:
    """The code and the message of an error, in the forms that servers give it."""
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        return "", said
    if not isinstance(answer, dict):
        return "", said
    error = answer.get("error", answer)
    if not isinstance(error, dict):
        return "", str(error)
    code = error.get("code") or error.get("type") or ""
    return str(code), str(error.get("message") or error.get("detail") or "")


def wait_of(headers: Any) -> float | None:
    """Seconds that ``Retry-After`` asks for: a number, or a date."""
    given = (headers.get("Retry-After") or "").strip()
    if not given:
        return None
    try:
        wait = float(given)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(given)
        except (ValueError, TypeError):
            return None
        now = datetime.datetime.now(datetime.UTC)
        wait = (date - now).total_seconds() if date.tzinfo else 0.0
    return max(wait, 0.0) if wait == wait else None


def plain(text: str, key: str | None) -> str:
    """What a server says, for a message: short, printable, and without the key."""
    if key:
        text = text.replace(key, "***")
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:300]


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_url(url: str, *, with_key: bool) -> None:
    """Stop at an address that nothing should be sent to.

    Raises:
        OptionError: It is none of a server, holds a password, or would take a key unencrypted.
    """
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
    if with_key and parts.scheme == "http" and not _is_this_machine(host):
        raise OptionError(
            f"base_url={url!r} would send the key unencrypted; use https, or api_key_env=None where the server needs "
            "no key"
        )
