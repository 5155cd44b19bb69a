"""Untrusted text made safe to print: no character of it can command a terminal or hide from the reader."""

from __future__ import annotations

import unicodedata

_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, format marks, surrogates, unassigned, separators


def printable(text: str) -> str:
    r"""The text with control and invisible characters escaped; line feeds stay.

    Example:
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    return "".join(
        one if one == "\n" or unicodedata.category(one) not in _ESCAPED else one.encode("unicode_escape").decode()
        for one in text
    )
