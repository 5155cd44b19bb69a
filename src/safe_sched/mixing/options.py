"""Lists of options in a prompt: ``A) ... B) ... C) ...``, numbered or with bullets, as many as the row has.

A list is cut out of its text and leaves `MARK` behind, so that texts with three and with five options look alike.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from os.path import commonprefix

MARK = "\ufdd0"
"""What stands for a list that was cut out: a code point that Unicode keeps out of texts."""

_SERIES = {"A": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "a": "abcdefghijklmnopqrstuvwxyz", "1": None}
_BULLETS = ("-", "*", "•")
_BRACKETS = (("(", ")"), ("[", "]"), ("", ")"), ("", "."), ("", ":"))
_BETWEEN = ("\n\n", "\n", "; ", ", ", " ")
_MOST = 100  # options of one list
_TRIED = 20  # places in a text where a list may begin


@dataclass(frozen=True)
class OptionStyle:
    """How the options of a list are written.

    Attributes:
        series: ``"A"``, ``"a"``, ``"1"``, or a bullet.
        before: What opens a marker.
        after: What closes it, with the space behind it.
        between: What stands between two options.
        tail: What follows the last option on its line, in every row.
    """

    series: str
    before: str
    after: str
    between: str
    tail: str = ""

    def marker(self, number: int) -> str:
        """The marker of an option, counted from 0.

        Example:
            >>> OptionStyle("A", "(", ") ", " ").marker(1)
            '(B) '
        """
        letters = _SERIES.get(self.series, self.series)
        if letters is None:
            return f"{self.before}{number + 1}{self.after}"
        return f"{self.before}{letters if letters in _BULLETS else letters[number : number + 1]}{self.after}"

    def write(self, options: tuple[str, ...]) -> str:
        r"""The list as a text.

        Example:
            >>> OptionStyle("1", "", ". ", "\n").write(("tea", "milk"))
            '1. tea\n2. milk'
        """
        return self.between.join(self.marker(i) + option for i, option in enumerate(options))

    def cut(self, text: str) -> tuple[str, tuple[str, ...]] | None:
        """The text with `MARK` in the place of its first list of this style, and the options; None: there is none.

        Example:
            >>> found = OptionStyle("A", "", ") ", " ").cut("Which? A) tea B) milk")
            >>> found[0] == "Which? " + MARK, found[1]
            (True, ('tea', 'milk'))
        """
        if MARK in text:
            return None
        first = self.marker(0)
        at = text.find(first)
        for _ in range(_TRIED):
            if at < 0:
                break
            if (at == 0 or text[at - 1].isspace()) and (found := self._from(text, at)):
                return found
            at = text.find(first, at + 1)
        return None

    def _from(self, text: str, start: int) -> tuple[str, tuple[str, ...]] | None:
        line = text.find("\n", start) if "\n" not in self.between else -1
        limit = len(text) if line < 0 else line
        options, at = [], start + len(self.marker(0))
        limit_of_series = 26 if self.series in "Aa" else _MOST
        while len(options) < limit_of_series:
            follows = self.between + self.marker(len(options) + 1)
            nearest = text.find(follows, at, limit)
            if "\n" in self.between and nearest != text.find("\n", at):
                nearest = -1  # an option is one line
            if nearest < 0:
                break
            options.append(text[at:nearest])
            at = nearest + len(follows)
        stop = text.find("\n", at)
        stop = limit if stop < 0 else min(stop, limit)
        if not options or not text[at:stop].endswith(self.tail):
            return None
        options.append(text[at : stop - len(self.tail)])
        return text[:start] + MARK + text[stop - len(self.tail) :], tuple(options)


def style_of(text: str) -> OptionStyle | None:
    r"""The style of the list of options in a text, if it has one.

    Example:
        >>> style_of("Which?\n(a) tea\n(b) milk\nAnswer:")
        OptionStyle(series='a', before='(', after=') ', between='\n', tail='')
        >>> style_of("A plain sentence.") is None
        True
    """
    for series in _SERIES:
        for before, after in _BRACKETS:
            first = re.search(rf"(?:^|(?<=\s)){re.escape(before + series + after)}([ \t]+)", text)
            if first is None:
                continue
            closing = after + first[1]
            second = OptionStyle(series, before, closing, "").marker(1)
            at = text.find(second, first.end())
            between = next((b for b in _BETWEEN if text[:at].endswith(b)), None) if at >= 0 else None
            if between is not None and OptionStyle(series, before, closing, between).cut(text):
                return OptionStyle(series, before, closing, between)
    for bullet in _BULLETS:
        if bullet not in text:
            continue
        lines = [line[1:] if line.startswith(bullet) else "" for line in text.split("\n")]
        blanks = [line[: len(line) - len(line.lstrip(" \t"))] for line in lines]
        # two lines in turn that begin alike
        if after := next(filter(None, map(commonprefix, itertools.pairwise(blanks))), ""):
            return OptionStyle(bullet, "", after, "\n")
    return None
