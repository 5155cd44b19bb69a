"""Rows that are laid out unlike the file's: the templates that most prompts share are learnt, and a few lack them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from safe_sched.audit.detectors.rowwise import nothing
from safe_sched.audit.detectors.sample import Sample
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence, Sort
from safe_sched.data.schemas import Example
from safe_sched.mixing.templates import Template, assign, learn

SAMPLE = 600
"""Rows that layouts are learnt from."""

RARE = 0.02
"""Share of the sample under which a layout is an outlier."""

_LONGEST = 8000  # characters of a row that is learnt from or looked at
_PARTS = 20

RowLayout = tuple[object, ...]


class LayoutOutliers:
    """How rare the layout of a row is: minus the logarithm (base 10) of its share.

    Layouts are the schema, the roles of a row's texts and the templates of its prompt. Files without a common layout
    have no outliers.

    Example:
        >>> from safe_sched.audit import audit_row
        >>> texts = [f"Question: what is {n} plus {n}?" for n in range(99)] + ["Tell me a secret"]
        >>> rows = [audit_row({"prompt": text, "completion": "x"}, n) for n, text in enumerate(texts)]
        >>> detector = LayoutOutliers()
        >>> detector.observe(rows)
        >>> detector.ready()
        >>> detector.score(rows[-2:]).value.round(1)
        array([nan,  2.], dtype=float32)
    """

    name: ClassVar[str] = "layout"
    about: ClassVar[str] = "How rare the row's layout is in the file: 2 is one in a hundred"
    kind: ClassVar[Sort] = "quality"

    def __init__(self) -> None:
        self._sample = Sample[AuditRow](SAMPLE)
        self._templates: dict[tuple[str, str], list[Template]] = {}  # by schema and place
        self._shares: dict[RowLayout, float] = {}
        self._seen = 0

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Keep a sample of the rows."""
        for row in rows:
            if _size(row) <= _LONGEST and len(row.example.parts) <= _PARTS:
                self._sample.add(f"{row.prompt[:500]}\0{row.answer[:200]}", row)

    def ready(self) -> None:
        """Learn the templates of every place, and count the layouts."""
        kept = self._sample.items()
        self._sample = Sample(SAMPLE)
        self._seen = len(kept)
        texts: dict[tuple[str, str], list[str]] = {}
        for row in kept:
            for place, text in _prompt(row.example):
                texts.setdefault((row.example.schema, place), []).append(text)
        self._templates = {key: learn(those, endings=key[0] != "text") for key, those in texts.items()}
        counts = Counter(self._layout(row) for row in kept)
        self._shares = {layout: count / len(kept) for layout, count in counts.items()}

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """Minus the logarithm of the share of rows laid out like this one, where that is small; else nan."""
        value, reasons = nothing(len(rows))
        if not self._shares or max(self._shares.values()) < 0.5:
            return Evidence(value, reasons, [None] * len(rows))
        for number, row in enumerate(rows):
            share = self._shares.get(self._layout(row), 0.0)
            if share <= RARE:
                value[number] = -np.log10(max(share, 1 / (self._seen + 1)))
                reasons[number] = (
                    f"laid out like {share:.1%} of the file's rows" if share else "laid out like no other row"
                )
        return Evidence(value, reasons, [None] * len(rows))

    def settings(self) -> dict[str, object]:
        """How much is learnt from, and what is rare."""
        return {"sample": SAMPLE, "rare": RARE, "version": 1}

    def _layout(self, row: AuditRow) -> RowLayout:
        example = row.example
        roles = tuple(part.role for part in example.parts[:_PARTS])
        if _size(row) > _LONGEST:
            return (example.schema, roles)
        return (example.schema, *(self._template(example.schema, place, text) for place, text in _prompt(example)))

    def _template(self, schema: str, place: str, text: str) -> tuple[str, int]:
        templates = self._templates.get((schema, place))
        return place, -1 if templates is None else assign(templates, text)


def _prompt(example: Example) -> list[tuple[str, str]]:
    """Place and text of the parts before the answer: a column's name, or the role of a turn."""
    parts = example.parts[:_PARTS] if example.answer is None else example.parts[: min(example.answer, _PARTS)]
    return [(part.role if "." in part.field or "[" in part.field else part.field, part.text) for part in parts]


def _size(row: AuditRow) -> int:
    return len(row.system) + len(row.prompt)
