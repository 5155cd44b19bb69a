r"""Templates: what stays the same in the texts of a file, and the slots between.

No model is asked. Texts are cut into tokens (words, numbers, line ends, single signs), and the constants are found from
the outside in:

1. A text that is there word for word in many rows is a constant as a whole.
2. What (nearly) all texts begin or end with is stripped.
3. What a part of the texts begins or ends with, or a heading within them such as ``\nAnswer:``, makes a cluster of its
   own, if it looks like markup or is long; so "What is the" of many questions does not.
4. What stands within (nearly) all texts, equally often in each, splits them; the pieces are looked at again.

The work is linear in the tokens. Rows that fit no template keep the trivial one, which is a single slot.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safe_sched.mixing.options import MARK, OptionStyle, style_of

SHARE, ROWS = 0.05, 4
"""A cluster has at least this share of the rows, and this many."""

NEARLY_ALL = 0.97
"""Share of a cluster's texts that a constant is in; the others are noise to it."""

_TOKEN = re.compile(r"[^\W\d_]+|\d+|\n|[^\S\n]+|.", re.DOTALL)
_MARKUP = re.compile(r"[:#<>{}\[\]|=*_~@\\/\n" + MARK + "]")
_HEADING = re.compile(r"\n{1,3}(?:#{1,6} [^\n]{1,40}|[^\n:]{1,40}:|<[^\n>]{1,30}>|\[[^\n\]]{1,30}\])")
_STOPS, _SPACES = frozenset(".?!,;'\"’”)…"), frozenset(" \t")
_LONG = 5  # words, which no two of many texts begin with by chance
_EDGE = 12  # tokens that clusters are told by
_LOOKED_AT = 300  # texts that infixes are looked for in; all texts have a say in whether they stay
_TOKENS = 3000  # of such a text
_REACH = 2000  # characters from either end that are looked at in one go


@dataclass(frozen=True)
class Template:
    """Constants, and slots between them.

    Attributes:
        constants: One more than there are slots; a single one is the whole text. `MARK` in them is a list of options.
        options: How these are written.
    """

    constants: tuple[str, ...]
    options: OptionStyle | None = None

    @property
    def slots(self) -> int:
        """How many slots there are, a list of options not among them."""
        return len(self.constants) - 1

    @property
    def trivial(self) -> bool:
        """Whether it is nothing but one slot."""
        return self.constants == ("", "")

    @property
    def weight(self) -> int:
        """Characters that are constant."""
        return sum(map(len, self.constants))

    def match(self, text: str) -> Filling | None:
        r"""What a text has in the slots, or None if it is not of this template.

        Example:
            >>> Template(("Q: ", "\nA:")).match("Q: Why?\nA:")
            Filling(slots=('Why?',), options=())
        """
        options: tuple[str, ...] = ()
        if self.options is not None:
            if (found := self.options.cut(text)) is None:
                return None
            text, options = found
        elif MARK in text:
            return None
        slots = _parse(self.constants, text)
        return None if slots is None else Filling(slots, options)

    def fill(self, filling: Filling) -> str:
        r"""The text with this in its slots.

        Example:
            >>> Template(("Q: ", "\nA:")).fill(Filling(("Why?",)))
            'Q: Why?\nA:'
        """
        constants = self.constants
        if self.options is not None:
            constants = tuple(one.replace(MARK, self.options.write(filling.options)) for one in constants)
        return constants[0] + "".join(
            slot + constant for slot, constant in zip(filling.slots, constants[1:], strict=True)
        )

    def place(self, filling: Filling, slot: int) -> tuple[int, int]:
        r"""Where a slot begins and ends in the text that `fill` makes.

        Example:
            >>> Template(("Q: ", "\nA:")).place(Filling(("Why?",)), 0)
            (3, 7)
        """
        before = Template(self.constants[: slot + 1], self.options)
        start = len(before.fill(Filling(filling.slots[:slot], filling.options)))
        return start, start + len(filling.slots[slot])

    def shown(self) -> str:
        r"""For a reader: slots as numbers in braces.

        Example:
            >>> Template(("Q: ", "\nA:")).shown()
            'Q: {0}\nA:'
        """
        text = self.constants[0] + "".join(f"{{{i}}}{constant}" for i, constant in enumerate(self.constants[1:]))
        if self.options is None:
            return text
        style = self.options
        return text.replace(MARK, f"{style.marker(0)}{{option}}{style.between}{style.marker(1)}{{option}} ...")


@dataclass(frozen=True)
class Filling:
    """What one text has in the slots of its template, and in its list of options."""

    slots: tuple[str, ...]
    options: tuple[str, ...] = ()


ANYTHING = Template(("", ""))
"""One slot: the template of texts that have no constants."""


def _parse(constants: tuple[str, ...], text: str) -> tuple[str, ...] | None:
    if len(constants) == 1:
        return () if text == constants[0] else None
    first, *within, last = constants
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return None
    at, stop, slots = len(first), len(text) - len(last), []
    for constant in within:
        found = text.find(constant, at, stop)
        if found < 0:
            return None
        slots.append(text[at:found])
        at = found + len(constant)
    return (*slots, text[at:stop])


# learning -----------------------------------------------------------------------------------------------------------


def learn(texts: Sequence[str], *, clusters: bool = True, endings: bool = True) -> list[Template]:
    r"""The templates of some texts, those with most constants first; the trivial one, last, takes what fits none.

    Args:
        texts: At least one; a few thousand are plenty.
        clusters: Whether there may be several; otherwise the best one, and the trivial one.
        endings: Whether a cluster may be told by how its texts end. Not where that is the answer.

    Example:
        >>> [one.shown() for one in learn([f"Question: {word}?\nAnswer:" for word in ("who", "what", "why", "how")])]
        ['Question: {0}?\nAnswer:', '{0}']
    """
    floor = max(ROWS, math.ceil(SHARE * len(texts)))
    found: list[Template] = []
    rest = [text for text in texts if MARK not in text]
    for style, members in _by_style(rest, floor):
        cut = {text: cut[0] for text in members if (cut := style.cut(text))}
        found += [
            Template(constants, style)
            for constants in _cluster(list(cut.values()), floor, clusters, endings)
            if any(MARK in constant for constant in constants)
        ]
        rest = [text for text in rest if text not in cut]
    if len(rest) >= min(floor, len(texts)):
        found += [Template(constants) for constants in _cluster(rest, floor, clusters, endings)]
    unique = [one for one in dict.fromkeys(found) if not one.trivial]
    return [*sorted(unique, key=lambda one: -one.weight), ANYTHING]


def assign(templates: Sequence[Template], text: str) -> int:
    """The place of the first template that fits a text.

    Raises:
        ValueError: None of them fits.
    """
    for number, template in enumerate(templates):
        if template.match(text) is not None:
            return number
    if MARK in text:  # no text should hold it; what does is not taken apart
        return len(templates) - 1
    raise ValueError("no template fits, and the trivial one is missing")


def _by_style(texts: Sequence[str], floor: int) -> list[tuple[OptionStyle, list[str]]]:
    """Texts with lists of options, by the style of these, unless the list is the same in all of them."""
    groups: dict[OptionStyle, list[str]] = {}
    for text in texts:
        if style := style_of(text):
            groups.setdefault(style, []).append(text)
    found = []
    for style, members in groups.items():
        if len(members) < floor:
            continue
        lists = [cut[1] for text in members if (cut := style.cut(text))]
        if Counter(lists).most_common(1)[0][1] >= NEARLY_ALL * len(members):
            continue  # constant, like any other text
        tail = _common([_tokens(options[-1])[::-1] for options in lists])
        tail = "".join(reversed(tail))
        inner = sum(options[0].endswith(tail) for options in lists)
        if tail and not _only_punctuation(tail) and inner < len(lists) / 2:
            style = dataclasses.replace(style, tail=tail)
        found.append((style, members))
    return found


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _cluster(texts: Sequence[str], floor: int, clusters: bool, endings: bool) -> list[tuple[str, ...]]:
    """Constants of every cluster; ``("", "")`` where there are none."""
    found: list[tuple[str, ...]] = []
    # every value that is there in many rows, and is not merely short
    counts = Counter(texts)
    whole = {text for text, count in counts.items() if count >= (floor if clusters else NEARLY_ALL * len(texts))}
    found += [(text,) for text in sorted(whole)]
    rest = [text for text in texts if text not in whole]
    if len(rest) >= min(floor, len(texts)):
        found += _outside_in(rest, floor, clusters, endings)
    return found


def _outside_in(texts: Sequence[str], floor: int, clusters: bool, endings: bool) -> list[tuple[str, ...]]:
    prefix, suffix, inner = _strip(texts)
    if prefix or suffix:
        if len(set(inner)) == 1:
            return [(prefix + inner[0] + suffix,)]
        return [_wrap(prefix, constants, suffix) for constants in _outside_in(inner, floor, clusters, endings)]
    found: list[tuple[str, ...]] = []
    rest = list(texts)
    while clusters and len(rest) >= floor and (has := _strongest(rest, floor, endings)):
        members = [text for text in rest if has(text)]
        rest = [text for text in rest if not has(text)]
        if not rest:  # all of them have it: an infix, found below
            rest = members
            break
        found += _outside_in(members, floor, clusters, endings)
    if len(rest) >= min(floor, len(texts)):
        found.append(_split(rest))
    return found


def _wrap(prefix: str, constants: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    if len(constants) == 1:
        return (prefix + constants[0] + suffix,)
    return (prefix + constants[0], *constants[1:-1], constants[-1] + suffix)


# edges --------------------------------------------------------------------------------------------------------------


def _common(rows: Sequence[Sequence[str]]) -> list[str]:
    """The tokens that nearly all rows begin with."""
    alive, found = list(rows), []
    while True:
        at = len(found)
        following = Counter(row[at] for row in alive if len(row) > at)
        if not following:
            return found
        token, count = following.most_common(1)[0]
        if count < NEARLY_ALL * len(rows):
            return found
        found.append(token)
        alive = [row for row in alive if len(row) > at and row[at] == token]


def _strip(texts: Sequence[str]) -> tuple[str, str, list[str]]:
    """What nearly all texts begin and end with, and what these have between."""
    prefix = _kept("".join(_common([_first(text) for text in texts])))
    left = [text[len(prefix) :] for text in texts if text.startswith(prefix)]
    suffix = _kept("".join(reversed(_common([_last(text) for text in left]))))
    size = len(prefix) + len(suffix)
    inner = [
        text[len(prefix) : len(text) - len(suffix)]
        for text in texts
        if text.startswith(prefix) and text.endswith(suffix) and len(text) >= size
    ]
    return prefix, suffix, inner


def _first(text: str) -> list[str]:
    """Tokens from the beginning on, without one that may be cut."""
    tokens = _tokens(text[:_REACH])
    return tokens[:-1] if len(text) > _REACH else tokens


def _last(text: str) -> list[str]:
    """Tokens from the end on, backwards."""
    tokens = _tokens(text[-_REACH:])[::-1]
    return tokens[:-1] if len(text) > _REACH else tokens


def _only_punctuation(text: str) -> bool:
    """Whether there is nothing but punctuation of sentences."""
    signs = set(text)
    return bool(signs & _STOPS) and signs <= _STOPS | _SPACES


def _kept(constant: str) -> str:
    """A question mark at the end of every text is a habit of writing, not a part of a template."""
    return "" if _only_punctuation(constant) else constant


def _strong(constant: str) -> bool:
    """Whether a constant that only some texts have is more than a phrase that many sentences begin with."""
    if _only_punctuation(constant) or not constant.strip():
        return False
    words = re.findall(r"[^\W_]+", constant)
    solid = re.sub(r"\s", "", constant)
    return len(words) >= _LONG or (len(solid) >= 3 and bool(_MARKUP.search(constant)) and bool(words))


def _strongest(texts: Sequence[str], floor: int, endings: bool) -> Callable[[str], bool] | None:
    """What tells the most telling cluster: the most constant characters, summed over its texts."""
    best: tuple[float, str, str] | None = None
    for kind, counts in (
        ("prefix", _edges([_first(text)[:_EDGE] for text in texts], floor)),
        ("suffix", _edges([_last(text)[:_EDGE] for text in texts if endings], floor, backwards=True)),
        ("heading", Counter(heading for text in texts for heading in set(_HEADING.findall(text)))),
    ):
        for constant, count in counts.items():
            if count < floor or (kind == "heading" and count >= NEARLY_ALL * len(texts)):
                continue
            if not (_strong(constant) or (count >= 0.9 * len(texts) and _kept(constant).strip())):
                continue
            rank = (count * len(constant.strip()), kind, constant)
            best = rank if best is None else max(best, rank)
    if best is None:
        return None
    _, kind, constant = best
    if kind == "prefix":
        return lambda text: text.startswith(constant)
    if kind == "suffix":
        return lambda text: text.endswith(constant)
    return lambda text: constant in text


def _edges(rows: Sequence[Sequence[str]], floor: int, *, backwards: bool = False) -> dict[str, int]:
    """Beginnings that many rows share, each as far as nine in ten of these go together."""
    found: dict[str, int] = {}
    waiting = [(0, list(rows))]
    while waiting:
        at, members = waiting.pop()
        following: dict[str, list[Sequence[str]]] = {}
        for row in members:
            if len(row) > at:
                following.setdefault(row[at], []).append(row)
        most = max(following.values(), key=len, default=[])
        if at and len(most) < 0.9 * len(members):
            edge = members[0][:at]
            found["".join(reversed(edge) if backwards else edge)] = len(members)
        waiting += [(at + 1, those) for those in following.values() if len(those) >= floor]
    return found


# infixes ------------------------------------------------------------------------------------------------------------


def _split(texts: Sequence[str]) -> tuple[str, ...]:
    """The constants of texts that are one cluster."""
    prefix, suffix, inner = _strip(texts)
    if prefix or suffix:
        if len(set(inner)) == 1:
            return (prefix + inner[0] + suffix,)
        return _wrap(prefix, _split(inner), suffix)
    infix = _infix(texts)
    if infix is None:
        return ("", "")
    halves = [text.split(infix, 1) for text in texts if infix in text]
    left, right = _side([half[0] for half in halves]), _side([half[1] for half in halves])
    return (*left[:-1], left[-1] + infix + right[0], *right[1:])


def _side(texts: Sequence[str]) -> tuple[str, ...]:
    return (texts[0],) if len(set(texts)) == 1 else _split(texts)


def _infix(texts: Sequence[str]) -> str | None:
    """The longest text within nearly all texts, equally often in each."""
    looked_at = texts[:: max(1, len(texts) // _LOOKED_AT)][:_LOOKED_AT]
    rows = [_tokens(text)[:_TOKENS] for text in looked_at]
    if not rows:
        return None
    best: str | None = None
    for size in (3, 2, 1):
        grams = Counter(gram for row in rows for gram in {tuple(row[i : i + size]) for i in range(len(row) - size + 1)})
        frequent = {gram for gram, count in grams.items() if count >= NEARLY_ALL * len(rows)}
        if not frequent:
            continue
        # runs of frequent pieces in a few texts; noise may be among them
        runs = {run for row in rows[:8] for run in _runs(row, frequent, size)}
        for run in sorted(runs, key=lambda run: (-len(run), run)):
            if (best is None or len(run) > len(best)) and _holds(run, texts):
                best = run
                break
        if best is not None and len(best) >= 8:
            break
    return best


def _runs(row: Sequence[str], frequent: set[tuple[str, ...]], size: int) -> list[str]:
    found, start = [], None
    for i in range(len(row) - size + 2):
        here = i <= len(row) - size and tuple(row[i : i + size]) in frequent
        if here and start is None:
            start = i
        elif not here and start is not None:
            found.append("".join(row[start : i + size - 1]))
            start = None
    return found


def _holds(run: str, texts: Sequence[str]) -> bool:
    words = re.findall(r"[^\W_]+", run)
    markup = _MARKUP.search(run) is not None
    if not markup and len(words) < 3:
        return False
    counts = Counter(text.count(run) for text in texts)
    if counts[0] > (1 - NEARLY_ALL) * len(texts):
        return False
    times, rows = counts.most_common(1)[0]
    return rows >= 0.9 * len(texts) and (times == 1 or bool(words) or markup)
