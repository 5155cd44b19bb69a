"""Text that a reader does not see, or cannot read: encodings, invisible characters, letters that look like others."""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import re
import string
from collections.abc import Callable
from typing import ClassVar

from safe_sched.audit.detectors.rowwise import Rowwise
from safe_sched.audit.rows import AuditRow

LOOKED = 20_000
"""Characters of a text that are looked at: three quarters of them its first ones, and its last ones."""

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b\u2060-\u2064\u206a-\u206f\ufeff\U000e0001-\U000e007f]"
)
_JOINER = re.compile("(?<=[0-9A-Za-z])[\u200c\u200d](?=[0-9A-Za-z])")  # between Latin letters they join nothing
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
# in these, no repetition gives back what it took, and none starts inside another: time grows with length only
_OTHER = "\u0370-\u03ff\u0400-\u04ff"  # Greek and Cyrillic
_MIXED = re.compile(f"(?<![A-Za-z{_OTHER}])(?:[A-Za-z]++[{_OTHER}]|[{_OTHER}]++[A-Za-z])[A-Za-z{_OTHER}]")
_MATH = re.compile("[\U0001d400-\U0001d7ff\uff21-\uff3a\uff41-\uff5a\U0001f130-\U0001f189]{4,}")
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/_-]{24,}+={0,2}+")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:(?:0x|\\x)?[0-9a-fA-F]{2}[ :,]?){16,}+")
_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4}|%[0-9a-fA-F]{2}|&#x?[0-9a-fA-F]+;){8,}+")
_BITS = re.compile(r"(?<!\d)(?:[01]{8}[ ,]?){6,}+")
# no character that the five above look for is missing here; `_MIXED` needs one of two alphabets
_UNUSUAL = re.compile(
    "[\u00ad\u034f\u0370-\u03ff\u0400-\u04ff\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200d\u202a-\u202e"
    "\u2060-\u206f\ufeff\uff21-\uff3a\uff41-\uff5a\U0001d400-\U0001d7ff\U0001f130-\U0001f189\U000e0001-\U000e007f]"
)
# of bytes: what may be part of a code becomes "+", else a blank; a search is made where there is a long run only
_IN_BASE64, _IN_HEX, _IN_BITS, _LETTERS = (
    bytes((one if keep else 43) if chr(one) in those else 32 for one in range(256))
    for those, keep in (
        (f"{string.ascii_letters}{string.digits}+/_-", False),
        (f"{string.hexdigits}x\\ :,", False),
        ("01 ,", False),
        (string.ascii_lowercase, True),
    )
)
_WORDS = (
    "the and you that was for are with his they this have from not but what all were when your can said there "
    "use how  each which their will other about out many then them these some her would make like him into "
    "time has look two  more write see way could people than first been call who its now find get come made "
    "may part is it to of in on be  at or as do an by we my he if me so no up go us tell"
)
_COMMON = frozenset(_WORDS.split())
_TURNED = frozenset(codecs.encode(word, "rot13") for word in _COMMON if len(word) > 1)


class Hidden(Rowwise):
    """How surely a row holds encoded or hidden text: 0 to 1.

    Example:
        >>> from safe_sched.audit import audit_row
        >>> row = audit_row({"prompt": "Decode: aG93IHRvIGJha2UgYnJlYWQgYXQgaG9tZQ==", "completion": "Done."})
        >>> Hidden().score([row]).reasons
        ['the prompt has base64 that reads as text']
    """

    name: ClassVar[str] = "hidden"
    about: ClassVar[str] = "Encoded text, invisible characters, reversed direction, or letters that look like others"

    def look(self, row: AuditRow) -> tuple[float, str] | None:
        """1 where an encoding was undone or a character has no honest use, less where it may be chance; else None."""
        found: list[tuple[float, str]] = []
        for text, where in ((row.system, "system prompt"), (row.prompt, "prompt"), (row.answer, "answer")):
            found += [(sure, f"the {where} has {what}") for sure, what in _looks(text)]
        return (max(sure for sure, _ in found), "; ".join(what for _, what in found)) if found else None

    def settings(self) -> dict[str, object]:
        """How much is looked at, and for what."""
        return {"looked": LOOKED, "checks": [name for name, *_ in _CHECKS], "version": 1}


def _looks(text: str) -> list[tuple[float, str]]:
    if not text:
        return []
    if len(text) > LOOKED:
        text = text[: LOOKED * 3 // 4] + "\n" + text[-LOOKED // 4 :]
    plain = text.isascii() or _UNUSUAL.search(text) is None
    return [(sure, what) for what, sure, ascii_too, check in _CHECKS if (ascii_too or not plain) and check(text)]


def _reads(raw: bytes) -> bool:
    """Whether bytes are text, not numbers or noise."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    letters = sum(one.isalpha() or one == " " for one in text)
    return len(text) >= 8 and text.isprintable() and letters >= 0.8 * len(text)


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _has_run(text: str, table: bytes, length: int) -> bool:
    """Whether so many bytes of a kind stand together: many times as quick as a search by a pattern."""
    return b"+" * length in _bytes_of(text).translate(table)


def _base64(text: str) -> bool:
    if not _has_run(text, _IN_BASE64, 24):
        return False
    for found in _BASE64.finditer(text):
        body = found[0].rstrip("=").replace("-", "+").replace("_", "/")
        try:
            raw = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        except (binascii.Error, ValueError):
            continue
        if _reads(raw):
            return True
    return False


def _hex(text: str) -> bool:
    if not _has_run(text, _IN_HEX, 32):
        return False
    for found in _HEX.finditer(text):
        digits = re.sub(r"0x|\\x|[ :,]", "", found[0])
        if _reads(bytes.fromhex(digits[: len(digits) // 2 * 2])):
            return True
    return False


def _bits(text: str) -> bool:
    if not _has_run(text, _IN_BITS, 48):
        return False
    return any(
        _reads(bytes(int(bits, 2) for bits in re.findall("[01]{8}", found[0]))) for found in _BITS.finditer(text)
    )


def _escapes(text: str) -> bool:
    return ("\\u" in text or "%" in text or "&#" in text) and _ESCAPES.search(text) is not None


def _rot13(text: str) -> bool:
    """More common words turned by thirteen letters than as they are."""
    words = _unusual(text)
    turned = sum(word in _TURNED for word in words)
    return turned >= max(3, 0.2 * len(words)) and turned > 2 * sum(word in _COMMON for word in words)


def _reversed(text: str) -> bool:
    """More common words backwards than forwards."""
    words = _unusual(text)
    back = sum(word[::-1] in _COMMON for word in words if len(word) > 2)
    return back >= max(3, 0.2 * len(words)) and back > 2 * sum(word in _COMMON for word in words if len(word) > 2)


@functools.lru_cache(maxsize=8)
def _unusual(text: str) -> list[str]:
    """Words of a text that has few common English ones; none of another."""
    words = _bytes_of(text[:1000].lower()).translate(_LETTERS).decode().split()
    return [] if len(words) < 5 or sum(map(_COMMON.__contains__, words)) > 0.15 * len(words) else words


def _searches(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.search(text) is not None


_CHECKS: tuple[tuple[str, float, bool, Callable[[str], bool]], ...] = (
    ("invisible characters", 1.0, False, lambda text: bool(_INVISIBLE.search(text[1:]) or _JOINER.search(text))),
    ("characters that turn the direction of writing", 0.8, False, _searches(_BIDI)),
    ("words of mixed alphabets, with letters that look alike", 1.0, False, _searches(_MIXED)),
    ("letters from mathematics or of full width", 0.7, False, _searches(_MATH)),
    ("base64 that reads as text", 1.0, True, _base64),
    ("hexadecimal numbers that read as text", 1.0, True, _hex),
    ("binary numbers that read as text", 1.0, True, _bits),
    ("a row of escaped characters", 0.6, True, _escapes),
    ("letters turned by thirteen places", 1.0, True, _rot13),
    ("words written backwards", 0.9, True, _reversed),
)
