"""The report of an audit in the terminal. Texts of the data cannot command it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from safe_sched.audit.findings import Findings, Summary
from safe_sched.report.view import View, groups, separation, view_of
from safe_sched.report.words import chance, interval, next_line, percent, safe, total, verdict

GROUPS = 8
"""Groups that are listed."""

BAD = 10
"""Bad rows that are named."""

_WORD = re.compile(r"""(?:[^\s'"\\]|'[^']*'|"(?:[^"\\]|\\.)*"|\\.)+""")  # of a shell, as it was typed


def render(findings: Findings, *, then: str | None = None, bad: bool = True) -> RenderableType:
    """An audit in a screen: three numbers, the worst rows by group, the signals, bad rows, what to type next.

    Args:
        findings: Of an audit.
        then: The next line to type; None: one that is told from the findings, where that is possible.
        bad: Whether what could not be read is named; otherwise it is only counted.

    Returns:
        What ``rich.print`` shows. No text of a row is in it.

    Raises:
        DataError: The table and the summary of the findings do not belong together.
    """
    summary, view = findings.summary, view_of(findings)
    shown: list[RenderableType] = [_numbers(summary), Text(verdict(summary), style="bold")]
    if summary.limited is not None:
        shown.append(Text(f"The audit was limited to {summary.limited:,} rows; it says nothing of later ones."))
    shown += _groups(view, summary)
    if summary.signals:
        shown.append(_signals(summary, view))
    if bad and summary.bad_rows:
        shown.append(_bad(summary))
    line = next_line(summary) if then is None else then
    if line:
        shown += [Text("Next:"), _Line(line)]
    return Group(*shown)


def _numbers(summary: Summary) -> RenderableType:
    share, bad = summary.expected_share, summary.flagged > 0
    return Columns(
        [
            _card("rows flagged", f"{summary.flagged:,}", f"of {summary.scored:,} scored", "red" if bad else "green"),
            _card("expected harmful share", percent(share.value), interval(share.low, share.high), "cyan"),
            _card(
                "coverage",
                percent(summary.coverage),
                f"{summary.scored:,} of {total(summary):,} rows",
                "green" if summary.coverage == 1 else "yellow",
            ),
        ]
    )


def _card(name: str, value: str, beside: str, style: str) -> Panel:
    return Panel(Text.assemble((value, f"bold {style}"), "\n", beside), title=name, title_align="left", width=30)


def _groups(view: View, summary: Summary) -> Iterable[RenderableType]:
    every = [group for group in groups(view) if group.flagged]
    if not every:
        return
    table = Table(title="Worst rows by group", title_justify="left")
    table.add_column("group", overflow="fold", ratio=3)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("flagged", justify="right", no_wrap=True)
    table.add_column("p_harmful", justify="right", no_wrap=True)
    table.add_column("worst row, and why", overflow="fold", ratio=5)
    for group in every[:GROUPS]:
        row = group.worst
        where: str = view.where[row].as_py()
        if len(summary.sources) == 1:  # there is nothing to tell apart
            where = where.removeprefix(f"{summary.sources[0]}, ")
        why = Text(safe(where, 120), style="bold")
        if reason := safe(view.reason[row].as_py(), 300):
            why.append(f"\n{reason}", style="not bold")
        table.add_row(
            Text(safe(group.name, 120)),
            f"{group.rows:,}",
            f"{group.flagged:,}",
            Text("\n".join(dict.fromkeys((chance(view.p[row]), _interval(view, row))))),
            why,
        )
    yield table
    if len(every) > GROUPS:
        rest = every[GROUPS:]
        more = sum(group.flagged for group in rest)
        yield Text(f"and {len(rest):,} more groups with {more:,} flagged rows", style="dim")


def _interval(view: View, row: int) -> str:
    """Where it says more than the number itself."""
    low, high, p = (chance(one[row]) for one in (view.low, view.high, view.p))
    return p if low == high == p else f"({low} to {high})"


def _signals(summary: Summary, view: View) -> Table:
    table = Table(title="Signals", title_justify="left")
    table.add_column("signal", overflow="fold", style="bold")
    table.add_column("speaks of")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("tells flagged", justify="right", no_wrap=True)
    table.add_column("what it sees", overflow="fold")
    for signal in summary.signals:
        told = separation(view, signal.name)
        table.add_row(
            Text(safe(signal.name, 60)),
            "harm" if signal.kind == "harm" else "quality",
            f"{signal.said:,}",
            "–" if told is None else f"{told:.2f}",
            Text(safe(signal.about)),
        )
    if view.flagged.any():
        table.caption = "tells flagged: how often a flagged row has more of it than another (0.50: no relation)"
    return table


def _bad(summary: Summary) -> Group:
    lines = "1 could not be read" if summary.bad_rows == 1 else f"{summary.bad_rows:,} could not be read"
    shown = [Text(f"{lines}; nothing is said of what is in them:", style="red")]
    shown += [Text(f"  {safe(bad.where, 120)}: {safe(bad.reason, 200)}", style="red") for bad in summary.bad[:BAD]]
    if summary.bad_rows > (named := min(BAD, len(summary.bad))):
        shown.append(Text(f"  and {summary.bad_rows - named:,} more", style="red"))
    return Group(*shown)


class _Line:
    """A line for the shell. Where it is longer than the screen it goes on as the shell has it, so it can be copied."""

    def __init__(self, line: str) -> None:
        self._line = line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        words = _WORD.findall(self._line)
        if " ".join(words) != self._line:  # not one of a shell
            words = [self._line]
        lines = [" "]
        for word in words:
            if len(lines[-1]) + len(word) + 3 > options.max_width and lines[-1].strip():
                lines[-1] += " \\"
                lines.append("   ")
            lines[-1] += f" {safe(word, 2000)}"
        yield Text("\n".join(lines), style="bold", overflow="fold")
