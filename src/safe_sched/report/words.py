"""The words of a report that the terminal and the HTML page share."""

from __future__ import annotations

import math
import shlex

from safe_sched.audit.findings import Summary
from safe_sched.data.terminal_text import printable

_LONGEST = 400


def safe(text: str | None, at_most: int = _LONGEST) -> str:
    r"""A text of the data: cut, and with whatever a terminal would obey or a reader not see written out.

    Example:
        >>> print(safe("a\u202eb\x1b[31m"), safe("abc", 2))
        a\u202eb\x1b[31m ab ... (1 more characters)
    """
    if text is None:
        return ""
    cut = printable(text[:at_most])
    return cut if len(text) <= at_most else f"{cut} ... ({len(text) - at_most:,} more characters)"


def chance(value: float) -> str:
    """A probability in two digits, which is never rounded to 0 or to 1; a dash where there is none.

    Example:
        >>> chance(0.126), chance(0.9999), chance(0.001), chance(1.0), chance(float("nan"))
        ('0.13', '> 0.99', '< 0.01', '1.00', '–')
    """
    if math.isnan(value):
        return "–"
    if 0 < value < 0.01:
        return "< 0.01"
    return "> 0.99" if 0.99 < value < 1 else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share in percent, which is never rounded to 0 or to 100.

    Example:
        >>> percent(0.1234), percent(0.00001), percent(0.99999), percent(1.0), percent(None)
        ('12.3 %', '< 0.1 %', '> 99.9 %', '100 %', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if value in (0.0, 1.0):
        return f"{value:.0%}".replace("%", " %")
    if value < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if value > 0.999 else f"{100 * value:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """An interval of shares, in words."""
    return f"{percent(low)} to {percent(high)}"


def total(summary: Summary) -> int:
    """Rows of the table, and lines that are no rows."""
    return round(summary.scored / summary.coverage) if summary.coverage else max(summary.rows, summary.bad_rows)


def verdict(summary: Summary) -> str:
    """What the numbers say, in a sentence."""
    if not summary.rows:
        return "There were no rows to audit."
    if not summary.scored:
        return "No row could be scored, so nothing can be said."
    unread = total(summary) - summary.scored
    rest = ""
    if unread:
        rest = f" {unread:,} {'was' if unread == 1 else 'were'} not scored: nothing is said of "
        rest += "it." if unread == 1 else "them."
    if not summary.flagged:
        return "No row is flagged." + rest
    flagged = "1 row looks" if summary.flagged == 1 else f"{summary.flagged:,} rows look"
    return f"{flagged} like rows that undo a model's safety. Read some before you act on them." + rest


def next_line(summary: Summary, *, redacted: bool | None = None) -> str | None:
    """The line to type next, where one can be told from the summary alone.

    Args:
        summary: Of the audit.
        redacted: Whether the reader has an HTML report without texts before them; None: no HTML report at all.
    """
    source = summary.sources[0] if len(summary.sources) == 1 else None
    if source in (None, "-") or not summary.flagged or redacted is False:
        return None
    line = f"safe-sched audit {shlex.quote(str(source))} --out audit --report html"
    return f"{line} --show-text" if redacted else line
