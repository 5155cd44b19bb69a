"""The audit: two passes over the rows, then a calibrated probability for each."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from safe_sched.audit.engines.ranks import launched
from safe_sched.audit.engines.shard import Engine, LocalEngine, require_names
from safe_sched.audit.findings import Bad, Findings, Summary
from safe_sched.audit.inputs import Inputs, opened_sources
from safe_sched.audit.labels import KnownLabels, Labels
from safe_sched.audit.passes import Clock, calibrated, observe, score
from safe_sched.audit.shards import Shards
from safe_sched.audit.signals import Detector
from safe_sched.audit.to_table import FindingsBuilder, schema_of
from safe_sched.data.rows import CORE, read_rows
from safe_sched.errors import DataError, OptionError, UnscoredError
from safe_sched.generation import Device, Dtype
from safe_sched.version import versions

SHARD_ROWS = 4096
"""Rows of a shard: what a killed audit does again, at most."""

AUTO = 0.5
"""The threshold where none is given: a row is flagged where it is more likely harmful than not."""

_DEPENDS = ("numpy", "pyarrow", "scikit-learn", "torch", "transformers")


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def audit(
    data: Any,
    *,
    model: str | None = None,
    adapter: str | None = None,
    safety_data: Any = CORE,
    scorer: str | None = None,
    threshold: float | str = "auto",
    labels: Labels | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    schema: str | None = None,
    detectors: Sequence[Detector] | None = None,
    max_length: int = 1024,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
    engine: Engine | None = None,
    tokenizer: Any = None,
    progress: Callable[[str, int, int | None], None] = _silent,
) -> Findings:
    """Estimate for every row of a training set how likely it is harmful, with reasons.

    Args:
        data: Rows (dicts with named fields, in a schema of `safe_sched.mixing.SCHEMAS`), or a path: a file, a folder,
            ``"-"`` (standard input), ``"hf://owner/name"``, or a list of these.
        model: A folder or hub name of a causal language model, whose signals are added. Best is the aligned model that
            is to be fine-tuned.
        adapter: A folder with a PEFT adapter of it.
        safety_data: Prompts that are to be refused: ``"core"``, a path, or rows.
        scorer: A file with a saved scorer of NeuralBDS.
        threshold: Rows whose ``p_harmful`` is at least this are flagged, above 0, at most 1; ``"auto"`` is `AUTO`.
        labels: What is known of some rows: the name of a column, or one value per row; 1 is harmful, 0 is not, None
            is unknown. The labelled rows must be a fair sample, for ``p_harmful`` is fitted to them.
        limit: Look at so many rows only, the first ones.
        out: A folder for shards of scores. An audit that was killed goes on there with ``resume``.
        resume: Whether to go on with what is in ``out``.
        schema: The schema of the rows, where they fit several.
        detectors: Signals in the place of the built-in ones and those of plugins.
        max_length: Tokens that a row is cut to for the model, >= 2.
        device: ``"auto"`` is a GPU where there is one.
        dtype: Of the model's parameters.
        seed: Random seed of the detectors and of the bootstrap.
        shard_rows: Rows of a shard.
        engine: Runs the scoring; None: this process.
        tokenizer: For rows of tokens: what made them, as a folder, a hub name or an object. None: the model's.
        progress: Called with what is being done, how much of it is done, and of how much (None: unknown).

    Returns:
        A table with one line per row, and a summary.

    Raises:
        DataError: The input or the safety set cannot be read, or no row of it can.
        OptionError: An option is out of range, or does not fit another.
        StateError: ``out`` belongs to another input or to other settings.
        PluginError: Nothing that is installed can run the model.

    Example:
        >>> rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
        >>> findings = audit(rows)
        >>> findings.summary.rows, findings.summary.scored
        (40, 40)
        >>> findings.table.column_names[:3]
        ['row', 'where', 'p_harmful']
    """
    least = _threshold(threshold)
    for name, value, lowest in (("limit", limit, 1), ("shard_rows", shard_rows, 1)):
        if value is not None and (not isinstance(value, int) or value < lowest):
            raise OptionError(f"{name}={value}; allowed: a whole number >= {lowest}")
    if resume and out is None:
        raise OptionError("resume=True goes on with an audit in a folder; name it, out=...")
    if out is not None and engine is None and launched():
        raise OptionError(f"several processes would write to {out}; give engine=, which safe_sched.audit.ranks() makes")
    if detectors is not None and model is not None:
        raise OptionError(f"model={model!r} asks a model, and detectors= leaves its signals out; give one of them")
    clock = Clock(progress)
    with contextlib.ExitStack() as stack:
        shards = Shards(Path(out or stack.enter_context(tempfile.TemporaryDirectory())), resume=resume)
        inputs = Inputs(opened_sources(data, stack), schema=schema, limit=limit, tokenizer=_tokenizer(tokenizer, model))
        found = _detectors(
            detectors,
            safety_rows=read_rows(safety_data),
            model=model,
            adapter=adapter,
            scorer=scorer,
            max_length=max_length,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        require_names(found)
        if not any(one.kind == "harm" for one in found):
            raise OptionError("none of the detectors is of kind 'harm', of which p_harmful is made; add one")
        wanted = KnownLabels(labels)
        rows, digests = observe(inputs, found, wanted, shard_rows, clock)
        if rows == 0 and inputs.bad_rows == 0:
            raise DataError(f"{_names(inputs)}: no rows in it")
        bad, bad_rows = tuple(inputs.bad), inputs.bad_rows
        shards.begin(_settings(found, limit, schema, shard_rows, seed), digests)
        score(inputs.shards(shard_rows), found, wanted, shards, digests, engine or LocalEngine(), rows, clock)
        clock.stage("calibrating", None)
        fitted = calibrated(found, shards, rows, seed)
        builder = FindingsBuilder(found, fitted, least)
        lines, schema_out = map(builder.lines, shards.tables()), schema_of(found)
        # in a folder of the user's the table stays on disk, so that memory does not grow with the rows
        table = pa.concat_tables([schema_out.empty_table(), *lines]) if out is None else shards.keep(lines, schema_out)
    summary = _summary(table, builder, inputs, bad, bad_rows, limit, model, clock.done())
    if summary.scored == 0:
        first = f"the first: {bad[0].where}: {bad[0].reason}" if bad else "no signal says anything of any of them"
        raise UnscoredError(f"none of {rows} rows could be scored; {first}")
    return Findings(table, summary)


def _threshold(threshold: float | str) -> float:
    if threshold == "auto":
        return AUTO
    try:
        value = float(threshold)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise OptionError(f"threshold={threshold!r}; allowed: a number above 0 and at most 1, or 'auto'")
    return value


def _tokenizer(given: Any, model: str | None) -> Any:
    """Reads rows of tokens; loaded when the first one comes."""
    from safe_sched.hooks import NamedTokenizer

    named = model if given is None else given
    return NamedTokenizer(str(named)) if isinstance(named, str | Path) else named


def _detectors(given: Sequence[Detector] | None, **options: Any) -> list[Detector]:
    """The signals that were given, or the built-in ones and those of plugins."""
    from safe_sched.hooks import AuditRequest, detectors

    request = AuditRequest(**options)
    if given is not None:
        return list(given)
    from safe_sched.audit.detectors import default_detectors  # it imports scikit-learn

    return [*default_detectors(request.safety_rows), *detectors(request)]


def _settings(
    found: Sequence[Detector], limit: int | None, schema: str | None, shard_rows: int, seed: int
) -> dict[str, Any]:
    return {
        "limit": limit,
        "schema": schema,
        "shard_rows": shard_rows,
        "seed": seed,
        "versions": versions(_DEPENDS),
        "detectors": {detector.name: detector.settings() for detector in found},
    }


def _names(inputs: Inputs) -> str:
    return ", ".join(source.name for source in inputs.sources)


def _summary(
    table: pa.Table,
    builder: FindingsBuilder,
    inputs: Inputs,
    bad: tuple[Bad, ...],
    bad_rows: int,
    limit: int | None,
    model: str | None,
    seconds: Mapping[str, float],
) -> Summary:
    scored = table.num_rows - table.column("p_harmful").null_count
    lines = table.num_rows + inputs.bad_lines
    return Summary(
        rows=table.num_rows,
        scored=scored,
        bad_rows=bad_rows,
        bad=bad,
        flagged=int(np.count_nonzero(table.column("is_harmful_issue").fill_null(False).to_numpy())),
        expected_share=builder.share(),
        coverage=scored / lines if lines else 0.0,
        threshold=builder.threshold,
        signals=builder.signals(),
        sources=tuple(source.name for source in inputs.sources),
        seconds=dict(seconds),
        versions=versions(_DEPENDS),
        limited=limit,
        model=model,
        calibration=builder.calibration.about,
    )
