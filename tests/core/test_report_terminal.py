"""The report in the terminal: its numbers, and that nothing in the data commands it."""

from __future__ import annotations

import io
import math
import re
import shlex
import unicodedata
from typing import Any

import pytest
from rich.console import Console

from safe_sched.audit.findings import Bad
from safe_sched.report.terminal import BAD, GROUPS, render
from tests.core.reports import NASTY, findings_of


def screen(found: Any, width: int = 120, terminal: bool = False, **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    console.print(render(found, **options))
    return out.getvalue()


def codes_of(text: str) -> set[str]:
    """The escape sequences in a text."""
    return set(re.findall("\x1b[^m]*m?", text))


def test_the_three_numbers_are_those_of_the_summary():
    shown = screen(findings_of([0.9, 0.6, 0.1, 0.0, None]))
    cards = shown.split("\n")[:4]
    assert ["rows flagged" in cards[0], "expected harmful share" in cards[0], "coverage" in cards[0]] == [True] * 3
    assert [cell.strip() for cell in cards[1].split("│") if cell.strip()] == ["2", "40.0 %", "80.0 %"]
    assert [cell.strip() for cell in cards[2].split("│") if cell.strip()] == [
        "of 4 scored",
        "36.0 % to 44.0 %",
        "4 of 5 rows",
    ]
    assert "2 rows look like rows that undo a model's safety" in shown
    assert "1 was not scored" in shown


def test_the_worst_row_of_every_group_stands_with_its_reason():
    found = findings_of(
        [0.7, 0.9, 0.6, 0.2],
        groups={0: "wrapper A", 1: "wrapper A", 2: "wrapper B", 3: "wrapper C"},
        reasons={1: "opens by complying", 2: "asks for obedience"},
        where=["a.jsonl, line 3", "a.jsonl, line 9", "b.jsonl, line 1", "b.jsonl, line 2"],
    )
    shown = screen(found)
    lines = [line for line in shown.split("\n") if "wrapper" in line]
    assert ["wrapper A" in lines[0], "wrapper B" in lines[1], len(lines)] == [True, True, 2]  # C has nothing flagged
    assert "a.jsonl, line 9" in lines[0]
    assert "b.jsonl, line 1" in lines[1]
    assert shown.index("opens by complying") < shown.index("asks for obedience")


def test_groups_and_bad_rows_that_are_not_shown_are_counted():
    rows, bad = GROUPS + 3, BAD + 4
    found = findings_of(
        [0.9] * rows,
        groups={i: f"group {i:02}" for i in range(rows)},
        bad=[Bad(f"line {i:02}", "not JSON") for i in range(bad)],
    )
    shown = screen(found)
    assert sum(f"group {i:02}" in shown for i in range(rows)) == GROUPS
    assert "and 3 more groups with 3 flagged rows" in shown
    assert sum(f"line {i:02}: not JSON" in shown for i in range(bad)) == BAD
    assert "and 4 more" in shown


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (findings_of([]), "There were no rows to audit"),
        (findings_of([None]), "No row could be scored, so nothing can be said"),
        (findings_of([0.1]), "No row is flagged."),
        (findings_of([0.9]), "1 row looks like"),
        (findings_of([0.1] * 10_000 + [None]), "1 was not scored: nothing is said of it"),
        (findings_of([0.1] * 99, bad=[Bad("line 1", "no JSON")]), "1 was not scored: nothing is said of it"),
        (findings_of([0.1], limited=1), "limited to 1 rows; it says nothing of later ones"),
    ],
)
def test_the_verdict_says_no_more_than_is_known(found, said):
    assert said in " ".join(screen(found).split())


@pytest.mark.parametrize("width", [40, 50, 100])
def test_the_next_line_can_be_copied_into_a_shell(width):
    """Continued as the shell continues lines where the screen is narrow, it has the same words."""
    words = ["safe-sched", "audit", "it's my file; rm -rf x", "--out", "audit", "--report", "html"]
    shown = screen(findings_of([0.9], sources=("it's my file; rm -rf x",)), width=width)
    line = shown.partition("Next:\n")[2]
    assert shlex.split(line.replace("\\\n", "")) == words
    assert ("\\\n" in line) == (width < 80)
    assert max(map(len, line.split("\n"))) <= width


def test_a_next_line_is_only_there_where_there_is_one():
    found = findings_of([0.9])
    assert "  do this\n" in screen(found, then="do this")
    assert "  it's no shell's\n" in screen(found, then="it's no shell's")
    assert "Next" not in screen(found, then="")
    assert "Next" not in screen(findings_of([0.1]))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("nasty", NASTY)
def test_no_text_of_the_data_commands_the_terminal(nasty, terminal):
    """Control characters and markup come out as what they are. Control: rich itself would pass the escape on."""
    options = {
        "signals": {"plain": [1.0, 2.0]},
        "reasons": {0: nasty},
        "groups": {0: nasty},
        "where": [nasty, "row 1"],
        "bad": [Bad(nasty, nasty)],
        "sources": (nasty,),
    }
    shown = screen(findings_of([0.9, 0.1], **options), width=300)
    assert {unicodedata.category(one) for one in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"} <= {"Cc"}
    assert {one for one in shown if unicodedata.category(one) == "Cc"} == {"\n"}
    if terminal:  # where rich paints: exactly the codes that it paints plain words with, so none of the data's
        painted = screen(findings_of([0.9, 0.1], **options), width=300, terminal=True)
        plain = {name: value for name, value in options.items() if name == "signals"} | {
            "reasons": {0: "x"},
            "groups": {0: "x"},
            "where": ["x", "row 1"],
            "bad": [Bad("x", "x")],
            "sources": ("x",),
        }
        clean = screen(findings_of([0.9, 0.1], **plain), width=300, terminal=True)
        assert codes_of(painted) == codes_of(clean)
    if "[bold red]" in nasty:
        assert "[bold red]markup[/] [link=http://example.invalid]x[/link]" in shown


def test_the_report_fits_a_narrow_terminal():
    found = findings_of([0.9] * 3, signals={"a_long_name_of_a_signal": [1, 2, math.nan]}, groups={0: "g" * 300})
    assert max(map(len, screen(found, width=60, then="").split("\n"))) <= 60


def test_half_a_surrogate_pair_is_written_out():
    """Arrow has no place for one, but a bad line's name may have."""
    found = findings_of([0.1], bad=[Bad("a\ud800b", "\udfff")])
    assert "a\\ud800b: \\udfff" in screen(found)
