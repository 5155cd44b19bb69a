"""Findings to report on: made by hand, so that every figure of a report can be told from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from safe_sched.audit.findings import COLUMNS, Bad, Findings, Share, Signal, Summary


def findings_of(
    p: Sequence[float | None],
    *,
    signals: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    reasons: Mapping[int, str] | None = None,
    groups: Mapping[int, str] | None = None,
    where: Sequence[str] | None = None,
    threshold: float = 0.5,
    bad: Sequence[Bad] = (),
    **more: Any,
) -> Findings:
    """Findings on rows of these probabilities, flagged at a threshold."""
    rows = len(p)
    signals = {} if signals is None else signals
    flagged = [None if one is None else one >= threshold for one in p]
    columns = [
        list(range(rows)),
        [f"row {i}" for i in range(rows)] if where is None else list(where),
        list(p),
        [None if one is None else 0.8 * one for one in p],
        [None if one is None else min(1.0, 1.2 * one) for one in p],
        flagged,
        [None if one is None else 1 - one for one in p],
        [(reasons or {}).get(i) for i in range(rows)],
        [(groups or {}).get(i) for i in range(rows)],
    ]
    table = pa.table(
        {name: pa.array(values, kind) for (name, kind), values in zip(COLUMNS, columns, strict=True)}
        | {name: pa.array(np.array(values, np.float32)) for name, values in signals.items()}
    )
    scored = [one for one in p if one is not None]
    share = sum(scored) / len(scored) if scored else math.nan
    told = {
        "sources": ("train.jsonl",),
        "seconds": {"scoring": 1.5},
        "versions": {"safe-sched": "0.1"},
        "calibration": "by hand",
    }
    summary = Summary(
        rows=rows,
        scored=len(scored),
        bad_rows=len(bad),
        bad=tuple(bad),
        flagged=sum(map(bool, flagged)),
        expected_share=Share(share, 0.9 * share, 1.1 * share if share < 0.9 else share),
        coverage=len(scored) / max(1, rows + len(bad)),
        threshold=threshold,
        signals=tuple(
            Signal(name, f"what {name} sees", (kinds or {}).get(name, "harm"), int(np.isfinite(values).sum()))
            for name, values in signals.items()
        ),
        **told | more,
    )
    return Findings(table, summary)


NASTY = [
    "<script>window.broken = 1</script>",
    "</script><script>window.broken = 2</script>",
    "<!--<script>",
    '"><img src=x onerror="window.broken = 3">',
    "<svg onload=window.broken=4></svg>",
    "<base href=http://example.invalid/><link rel=stylesheet href=http://example.invalid/a.css>",
    "<iframe src=http://example.invalid/></iframe><meta http-equiv=refresh content='0;url=http://example.invalid/'>",
    "javascript:window.broken=5",
    "{{ 7 * 7 }}{% for x in y %}${7*7}",
    '=HYPERLINK("http://example.invalid")',
    "\x1b[2J\x1b]0;title\x07\x9b31m",
    "[bold red]markup[/] [link=http://example.invalid]x[/link]",
    "\u202eevil\u2066 \u200bzero \u2028 \ufeff",
    "\x00\x01 nul",
    "__proto__",
]
"""Texts that try to get out of a report."""
