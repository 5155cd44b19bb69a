"""What was learnt of a task's format, for a person to check. Texts of the data cannot command the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from safe_sched.data.rows import core_rows
from safe_sched.data.schemas import Example, read
from safe_sched.data.terminal_text import printable
from safe_sched.mixing.answers import AnswerShape
from safe_sched.mixing.clusters import CARRIER_WORDS
from safe_sched.mixing.formats import TaskFormat
from safe_sched.mixing.templates import Template

_CLUSTERS = 10  # that are shown
_CHARACTERS = 600  # of one text


def explain(found: TaskFormat) -> RenderableType:
    """The formats of a file with their shares, and safety rows before and after.

    Args:
        found: What was learnt.
    """
    head = Text(f"{found.rows_seen:,} rows of schema {found.schema}", style="bold")
    if found.learned:
        head.append(f": {_count(len(found.clusters), 'format')}", style="bold")
    else:
        head.append(
            ": no constant template. Prompts are free text; only their length, punctuation and case are followed.",
            style="bold yellow",
        )
    shown: list[RenderableType] = [head]
    for number, cluster in enumerate(found.clusters[:_CLUSTERS], start=1):
        table = Table(title=f"Format {number}: {cluster.share:.1%} of the rows", title_justify="left", show_lines=True)
        table.add_column("part", style="bold", no_wrap=True)
        table.add_column("template", overflow="fold")
        for part, (place, which) in enumerate(zip(cluster.places, cluster.templates, strict=True)):
            main = cluster.main.slot if part == cluster.main.part else None
            table.add_row(printable(place), _template(found.templates[place][which], main, cluster.main.wide))
        table.add_row("answer", _answer(cluster.answer))
        shown.append(table)
    if len(found.clusters) > _CLUSTERS:
        rest = found.clusters[_CLUSTERS:]
        share = sum(cluster.share for cluster in rest)
        shown.append(Text(f"{_count(len(rest), 'more format')} with {share:.1%} of the rows"))
    shown.append(Text(_carrying(found)))
    row = core_rows()[0]
    rendered = read(found.render(row), found.schema, tokenizer=found.tokenizer)
    shown += [_row("A safety row", read(row)), _row("in the format of the task", rendered)]
    return Group(*shown)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _template(template: Template, main: int | None, wide: bool) -> Text:
    if template.constants == ("",):
        return Text("(empty)", style="dim")
    text = Text(_cut(printable(template.shown())))
    text.highlight_regex(re.compile(r"\{(?:\d+|option)\}"), "cyan")
    if main is not None:
        text.highlight_regex(re.compile(rf"\{{{main}\}}"), "bold magenta")
        where = f"take the place of the sentence around {{{main}}}" if wide else f"go into {{{main}}}"
        text.append(f"\n(requests {where})", style="dim")
    return text


def _answer(shape: AnswerShape) -> Text:
    text = Text(shape.kind)
    if shape.labels:
        text.append(": " + _cut(printable(", ".join(shape.labels)), 200))
    if shape.keys:
        text.append(": " + _cut(printable(", ".join(shape.keys)), 200))
        if shape.key is not None:
            text.append(printable(f"; the refusal goes under {json.dumps(shape.key, ensure_ascii=False)}"))
    if shape.final:
        text.append(printable(f", its final answer behind {json.dumps(shape.final, ensure_ascii=False)}"))
    if shape.prefix or shape.suffix:
        text.append(printable(f"\n{_quoted(shape.prefix)} ... {_quoted(shape.suffix)} around it"))
        if shape.wrap("x") == "x":
            text.append("; not around refusals, which would not open as one")
    return text


def _quoted(text: str) -> str:
    return json.dumps(_cut(text, 120), ensure_ascii=False)


def _carrying(found: TaskFormat) -> str:
    """How much of the user's own text is refused along."""
    rows = core_rows()[:32]
    words = [
        sum(len(part.text.split()) for part in _before(found.render(row, number), found)) - len(row["prompt"].split())
        for number, row in enumerate(rows)
    ]
    return (
        f"Requests stand in genuine rows of at most {CARRIER_WORDS} words (longer only where all are). Beside the "
        f"request, a rendered prompt holds {sum(words) / len(words):.0f} words of the task on average (most: "
        f"{max(words)}), and is answered with a refusal: too much of it may teach the model to refuse the task; share "
        "and blend= limit it."
    )


def _before(row: Mapping[str, Any], found: TaskFormat) -> tuple[Any, ...]:
    example = read(row, found.schema, tokenizer=found.tokenizer)
    return example.parts if example.answer is None else example.parts[: example.answer]


def _row(title: str, example: Example) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for part in example.parts:
        table.add_row(Text(printable(part.field)), Text(_cut(printable(part.text))))
    return table


def _cut(text: str, most: int = _CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most:,} more characters)"
