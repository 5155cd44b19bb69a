"""The report of an audit as one HTML file that asks for nothing else.

The file is opened by people who do not trust the data in it. So nothing of the data is ever markup: the template
escapes whatever it writes, the table's data stand in a block that is no script and is put on the page as text,
invisible and direction-changing characters are written out, and a content security policy lets the page run its own
script, whose hash it names, and load nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from safe_sched.audit.findings import Findings, Summary
from safe_sched.data.writing import write_file
from safe_sched.errors import OptionError
from safe_sched.report.charts import histogram_chart, interval_chart, matrix_chart
from safe_sched.report.texts import LONGEST, Part, RowsGiven, parts_of
from safe_sched.report.view import (
    View,
    buckets,
    correlations,
    groups,
    histogram,
    separation,
    shown_rows,
    standing,
    view_of,
)
from safe_sched.report.words import chance, interval, next_line, percent, safe, total, verdict

MOST = 10_000
"""Rows that the table of a report has at most."""

_POINTS = 1000  # of the scatter plot: at most so many flagged rows, and so many others
_GROUPS = 200
_NAME = 200  # characters of a place or a group
_REASON = 1000


def write_html(
    findings: Findings,
    rows_source: RowsGiven | None,
    path: str | Path,
    show_text: bool = False,
    *,
    max_rows: int = MOST,
    then: str | None = None,
) -> None:
    """Write the report as one file, which appears whole or not at all.

    Args:
        findings: Of an audit.
        rows_source: What was audited: paths as `safe_sched.audit.audit` takes them, or the rows in the order of the
            findings, as mappings or as `safe_sched.audit.inputs.Inputs` gives them. They are gone through once. None:
            the report says nothing of the rows themselves.
        path: The file to write.
        show_text: Whether the report shows the rows' texts. Otherwise it shows how long they are.
        max_rows: Rows of the report's table at most, >= 1; the worst come first.
        then: The line to type next; None: one that is told from the findings, where that is possible.

    Raises:
        DataError: The table and the summary of the findings, or the findings and the rows, do not belong together.
        OptionError: The file cannot be written, or texts are asked for without rows.

    Example:
        >>> import pathlib, tempfile
        >>> import pyarrow as pa
        >>> from safe_sched.audit.findings import COLUMNS, Findings, Share, Summary
        >>> row = [0, "row 0", 0.9, 0.8, 0.95, True, 0.1, "looks like <b>that</b>", None]
        >>> table = pa.table({name: pa.array([one], kind) for (name, kind), one in zip(COLUMNS, row)})
        >>> findings = Findings(table, Summary(1, 1, 0, (), 1, Share(0.9, 0.8, 0.95), 1.0, 0.5, ()))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> write_html(findings, [{"prompt": "Hi", "completion": "Hello"}], path)
        >>> "<b>that</b>" in path.read_text()
        False
    """
    if max_rows < 1:
        raise OptionError(f"max_rows is {max_rows}; give a number of rows >= 1")
    if show_text and rows_source is None:
        raise OptionError("show_text=True shows texts of the rows, but rows_source is None; give the audited rows")
    view = view_of(findings)
    rows = shown_rows(view, max_rows)
    parts = None
    if rows_source is not None:
        wanted = dict(zip(rows.tolist(), view.where.take(rows).to_pylist(), strict=True))
        parts = parts_of(rows_source, wanted, show_text)
    write_file(path, _page(findings.summary, view, rows, parts, show_text, then).encode())


def _page(
    summary: Summary,
    view: View,
    rows: np.ndarray,
    parts: dict[int, list[Part] | None] | None,
    show_text: bool,
    then: str | None,
) -> str:
    folder = files("safe_sched.report").joinpath("page")
    css, script, template = (
        folder.joinpath(name).read_text("utf-8") for name in ("report.css", "report.js", "report.html.jinja")
    )
    environment = Environment(
        loader=DictLoader({"report": template}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(safe_text=safe, percent=percent, chance=chance)
    share = summary.expected_share
    every = groups(view)
    wanted = int((view.flagged | view.said).sum())
    return environment.get_template("report").render(
        css=Markup(css),
        script=Markup(script),
        css_hash=_hash(css),
        script_hash=_hash(script),
        data=_block(_data(summary, view, rows, parts, show_text)),
        summary=summary,
        verdict=verdict(summary),
        total=total(summary),
        share=share,
        share_interval=interval(share.low, share.high),
        share_chart=interval_chart(share.value, share.low, share.high),
        histogram=histogram_chart(*histogram(view), summary.threshold),
        matrix=matrix_chart([safe(one.name, 40) for one in summary.signals], correlations(view)),
        signals=[(signal, separation(view, signal.name)) for signal in summary.signals],
        groups=[
            (group, view.where[group.worst].as_py(), view.p[group.worst], view.reason[group.worst].as_py())
            for group in every[:_GROUPS]
        ],
        more_groups=max(0, len(every) - _GROUPS),
        listed=len(rows),
        flagged_listed=int(view.flagged[rows].sum()),
        cut=max(0, wanted - int((view.flagged | view.said)[rows].sum())),
        show_text=show_text,
        has_rows=parts is not None,
        then=next_line(summary, redacted=not show_text) if then is None else then,
    )


# data ---------------------------------------------------------------------------------------------------------------


def _data(
    summary: Summary,
    view: View,
    rows: np.ndarray,
    parts: dict[int, list[Part] | None] | None,
    show_text: bool,
) -> dict[str, Any]:
    """What the script makes its table and its scatter plot of: columns, as plain JSON values."""
    code, names = buckets(view)
    ranks = standing(view, rows)
    points = _points(view)
    return {
        "signals": [
            {"name": safe(one.name, 60), "kind": one.kind, "about": safe(one.about), "said": one.said}
            for one in summary.signals
        ],
        "rows": {
            "where": [safe(one, _NAME) for one in view.where.take(rows).to_pylist()],
            "p": _chances(view.p[rows]),
            "low": _chances(view.low[rows]),
            "high": _chances(view.high[rows]),
            "weight": _chances(view.weight[rows]),
            "flagged": view.flagged[rows].astype(int).tolist(),
            "reason": [safe(one, _REASON) for one in view.reason.take(rows).to_pylist()],
            "group": [safe(names[one], _NAME) if one >= 0 else "" for one in code[rows].tolist()],
            "values": [_figures(values[rows]) for values in view.signals.values()],
            "ranks": [_figures(ranks[name], 3) for name in view.signals],
            "parts": None if parts is None else [_shown(parts[row]) for row in rows.tolist()],
        },
        "points": {
            "where": [safe(one, _NAME) for one in view.where.take(points).to_pylist()],
            "p": _chances(view.p[points]),
            "flagged": view.flagged[points].astype(int).tolist(),
            "values": [_figures(values[points]) for values in view.signals.values()],
        },
        "show_text": show_text,
        "longest": LONGEST,
    }


def _shown(parts: Sequence[Part] | None) -> list[list[Any]] | None:
    if parts is None:
        return None
    return [[part["role"], part["characters"], part["lines"], part["text"]] for part in parts]


def _points(view: View) -> np.ndarray:
    """Rows of the scatter plot: flagged and other ones, each spread evenly over their order."""
    scored = view.order[~np.isnan(view.p[view.order])]
    found = []
    for wanted in (True, False):
        some = scored[view.flagged[scored] == wanted]
        found.append(some[:: max(1, -(-len(some) // _POINTS))])
    return np.concatenate(found)


def _figures(values: np.ndarray, digits: int = 4) -> list[float | None]:
    return [float(f"{one:.{digits}g}") if np.isfinite(one) else None for one in values.tolist()]


def _chances(values: np.ndarray) -> list[float | None]:
    """In four digits, of which none makes a 0 or a 1 of what is not."""
    inside = np.where((values > 0) & (values < 1), np.clip(values, 1e-4, 1 - 1e-4), values)
    return _figures(inside)


def _block(data: dict[str, Any]) -> Markup:
    """JSON that cannot end the element that it stands in, or begin another."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for one in "<>&":
        text = text.replace(one, f"\\u{ord(one):04x}")
    return Markup(text)


# the file -----------------------------------------------------------------------------------------------------------


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _replace(path: Path, text: str) -> None:
    final = path.resolve()
    if final.exists() and not final.is_file():
        raise OptionError(f"{path} is no regular file, so it cannot be replaced by the report; give another name")
    write_file(final, text.encode())
