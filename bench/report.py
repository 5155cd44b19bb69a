"""Reports of the benches: tables on the screen, the same tables on a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Section:
    """One table of a report."""

    title: str
    note: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


def show(sections: Sequence[Section], setting: str, console: Console) -> None:
    """The report on the screen."""
    for section in sections:
        table = Table(title=section.title, caption=section.note.replace("`", ""), box=SIMPLE_HEAD)
        for number, name in enumerate(section.header):
            table.add_column(name, justify="right" if number and name != "target" else "left")
        for line in section.lines:
            table.add_row(*line)
        console.print(table)
    console.print(setting, soft_wrap=True)


def markdown(opening: Sequence[str], sections: Sequence[Section]) -> str:
    """The report as a page: its first paragraphs, then the tables."""
    parts = list(opening)
    for section in sections:
        rows = [section.header, ["---"] * len(section.header), *section.lines]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts += [f"## {section.title}", section.note, table]
    return "\n\n".join(parts) + "\n"
