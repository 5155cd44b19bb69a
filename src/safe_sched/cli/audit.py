"""``safe-sched audit``: which rows of a training file would undo a model's safety?"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import typer
from rich.console import Console

from safe_sched.cli.screen import (
    UNSCORED,
    DeviceOption,
    DtypeOption,
    errors_as_exit_codes,
    name_bad,
    progress_bar,
    say_error,
)
from safe_sched.data.terminal_text import printable
from safe_sched.errors import OptionError

FOUND = 1
"""The exit code where as much was flagged as ``--fail-on`` names."""


def audit(
    context: typer.Context,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Files, folders, hf://owner/name, an Axolotl YAML, a dataset_info.json; -."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="Ask this model too: folder or hub.", show_default=False),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A PEFT adapter to put on MODEL.", show_default=False)
    ] = None,
    safety: Annotated[
        str, typer.Option("--safety-data", "-s", metavar="FILE", help="Prompts to be refused; core: built in.")
    ] = "core",
    scorer: Annotated[
        str | None, typer.Option(metavar="SAVED", help="A saved scorer of NeuralBDS.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to write.", show_default=False)
    ] = None,
    form: Annotated[
        Literal["parquet", "jsonl", "csv", "same"],
        typer.Option("--format", metavar="KIND", help="Rows in DIR: parquet, jsonl, csv, or same as FILE."),
    ] = "same",
    report: Annotated[
        Literal["html"] | None, typer.Option(metavar="KIND", help="html: a report in DIR.", show_default=False)
    ] = None,
    show_text: Annotated[
        bool, typer.Option("--show-text", metavar="", help="Show rows in the report.", show_default=False)
    ] = False,
    fail_on: Annotated[
        str | None,
        typer.Option(metavar="N|SHARE", help="Exit with 1 at so many flagged rows: 10, 1%.", show_default=False),
    ] = None,
    threshold: Annotated[str, typer.Option(metavar="P", help="Flag rows at this probability; auto is 0.5.")] = "auto",
    labels: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of labels, 1: harmful.", show_default=False)
    ] = None,
    schema: Annotated[
        str | None, typer.Option(metavar="NAME", help="Schema of the rows, where they fit several.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Look at the first N rows only.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on with what is in DIR.", show_default=False)
    ] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(metavar="KIND", help="ray: score with Ray, on a cluster or all cores.")
    ] = "local",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Of rows of tokens; MODEL's if unset.", show_default=False)
    ] = None,
    max_length: Annotated[int, typer.Option(metavar="TOKENS", help="Cut rows to this for MODEL.")] = 1024,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed.")] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", metavar="", help="Say nothing but errors.", show_default=False)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the summary as JSON.", show_default=False)
    ] = False,
) -> None:
    r"""Say which rows of a training file would undo a model's safety.

    Every row gets a probability of being harmful, with an interval and the
    reason in words. It takes no model and no training; an aligned --model,
    best the one that is to be fine-tuned, sees more.

    [bold]Example[/bold]: look, then write the rows and a report

        safe-sched audit train.jsonl

        safe-sched audit train.jsonl --model models/chat \
            --out found --report html

    In DIR are the rows with their own columns and safe_sched.p_harmful,
    .weight, .reason and others; findings.parquet without them, for
    safe-sched export; summary.json; and shards of scores, so that an audit
    that was killed goes on with --resume.

    In a CI job: fail where a row in a hundred is flagged, or ten rows

        safe-sched audit train.jsonl --fail-on 1% --quiet

    A pipe has JSON lines: zcat t.jsonl.gz | safe-sched audit -

    Exit codes: 0 done; 1 as much is flagged as --fail-on names; 2 something
    that was given cannot be used; 3 some rows could not be scored: they are
    named, the others are. 1 goes before 3.
    """
    with errors_as_exit_codes(), contextlib.ExitStack() as stack:
        scoring, first = _engine(engine, stack)
        if not first:
            return  # the first process of a launcher writes and prints
        fails = None if fail_on is None else _limit_of(fail_on)
        _require_together(out, report, show_text, resume, quiet, as_json)
        from safe_sched.audit.inputs import opened_sources
        from safe_sched.audit.run import audit as run

        sources = opened_sources(files, stack)
        path = None if out is None else out / f"rows.{_ending(form, sources)}"
        if out is not None and path is not None:
            _require_ours(out, path.name, *(["report.html"] if report else []))
        with progress_bar(shown=not quiet and not as_json) as progress:
            findings = run(
                sources,
                model=model,
                adapter=adapter,
                safety_data=safety,
                scorer=scorer,
                threshold=threshold,
                labels=labels,
                limit=limit,
                out=out,
                resume=resume,
                schema=schema,
                max_length=max_length,
                device=device,
                dtype=dtype,
                seed=seed,
                engine=scoring,
                tokenizer=tokenizer,
                progress=progress,
            )
            then = _next(findings, context, sources, path)
            if out is not None and path is not None:
                progress("writing", 0, None)
                _write(findings, sources, out, path)
                if report is not None:
                    from safe_sched.audit.inputs import Inputs
                    from safe_sched.hooks import NamedTokenizer
                    from safe_sched.report.html import write_html

                    read = tokenizer or model
                    reader = None if read is None else NamedTokenizer(read)
                    rows = Inputs(sources, schema=schema, limit=limit, tokenizer=reader)
                    write_html(findings, rows, out / "report.html", show_text=show_text, then=then)
        if as_json:
            from safe_sched.report.summary import summary_json

            typer.echo(json.dumps(summary_json(findings), indent=1))
        elif not quiet:
            _say(findings, then, out)
        summary = findings.summary
        if summary.coverage < 1:
            _name_bad(findings)
        if fails is not None and fails(summary.flagged, summary.scored):
            raise typer.Exit(FOUND)
        if summary.coverage < 1:
            raise typer.Exit(UNSCORED)


def _engine(name: str, stack: contextlib.ExitStack) -> tuple[Any, bool]:
    """What scores, and whether it is this process that asks it to."""
    from safe_sched.audit.engines.ranks import launched, ranks

    if launched():
        if name != "local":
            raise OptionError(f"--engine {name} starts processes of its own; run it without accelerate launch")
        scoring = stack.enter_context(ranks())
        return scoring, scoring is not None
    if name == "local":
        return None, True
    from safe_sched.audit.engines.ray import RayEngine

    return RayEngine(), True


def _limit_of(text: str) -> Callable[[int, int], bool]:
    """When to fail: whether so many flagged of so many rows are enough."""
    wrong = OptionError(
        f"--fail-on {text!r}; allowed: a number of rows, 1 or more, such as 10, or a share above 0, such as 1% or 0.01"
    )
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    if not found:
        raise wrong
    number, percent = float(found[1]), bool(found[2])
    if not percent and found[1].isdigit():
        if number < 1:
            raise wrong
        return lambda flagged, scored: flagged >= number
    share = number / 100 if percent else number
    if not 0 < share <= 1:
        raise wrong
    # 1 % of 300 rows are 3 rows, whatever 0.01 is in binary
    return lambda flagged, scored: flagged > 0 and flagged >= math.ceil(round(share * scored, 6))


def _require_together(
    out: Path | None, report: str | None, show_text: bool, resume: bool, quiet: bool, as_json: bool
) -> None:
    if out is None:
        given = {"--report": report, "--resume": resume}
        if named := [name for name, value in given.items() if value]:
            raise OptionError(f"{', '.join(named)} without --out; name the folder, --out DIR")
    if show_text and report is None:
        raise OptionError("--show-text belongs to a report; ask for one, --report html")
    if quiet and as_json:
        raise OptionError("--quiet says nothing and --json prints the summary; give one of them")


def _require_ours(out: Path, *names: str) -> None:
    """Stop where a file that is no audit's would be written over."""
    from safe_sched.audit.shards import MANIFEST

    there = [name for name in (*names, "findings.parquet", "summary.json") if (out / name).exists()]
    if there and not (out / MANIFEST).exists():
        raise OptionError(f"{out / there[0]} is there and {out} holds no audit; name another folder with --out")


def _ending(form: str, sources: list[Any]) -> str:
    """Of the file of rows: that of the first file, where it is to be the same."""
    if form != "same":
        return form
    from safe_sched.data.kinds import PACKED, form_of

    file = getattr(sources[0], "file", None)
    if file is None or not file.paths:
        return "jsonl"
    first = file.paths[0]
    packed = first.suffix.lower() if first.suffix.lower() in PACKED else ""
    kind = getattr(sources[0], "kind", None)
    return f"{form_of(first, kind).kind}{packed}"


def _write(findings: Any, sources: list[Any], out: Path, path: Path) -> None:
    from safe_sched.audit.output import write_rows
    from safe_sched.data.writing import write_file
    from safe_sched.report.summary import summary_json

    write_rows(findings, sources, path)
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(findings.table, sink, compression="zstd")
    write_file(out / "findings.parquet", sink.getvalue().to_pybytes())
    write_file(out / "summary.json", json.dumps(summary_json(findings), indent=1).encode())


def _say(findings: Any, then: str | None, out: Path | None) -> None:
    from safe_sched.report.terminal import render

    console = Console()
    console.print(render(findings, then=then, bad=False))  # bad rows are named on standard error
    if out is not None:
        console.print(f"Written to {printable(str(out))}", markup=False, highlight=False, soft_wrap=True)


_NOT_AGAIN = ("files", "out", "report", "show_text", "fail_on", "resume", "quiet", "as_json")


def _next(findings: Any, context: typer.Context, sources: list[Any], path: Path | None) -> str | None:
    """What to type now: take flagged rows out; where there are none, put safety rows between the others."""
    from safe_sched.report.words import total

    asked, summary = context.params, findings.summary
    nothing = not summary.flagged and summary.scored == summary.rows
    # the commands count the rows of the file, so it must be one, and they must be all of it
    plain = len(sources) == 1 and sources[0].name == asked["files"][0] and total(summary) == summary.rows
    data = str(asked["files"][0]) if plain and not summary.limited else None if path is None else str(path)
    ending = ".jsonl" if path is None else path.name.removeprefix("rows")
    if nothing and data is not None:
        return shlex.join(["safe-sched", "mix", data, "--safety", asked["safety"], "--out", f"mixed{ending}"])
    if path is None or data is None:
        given = [p for p in context.command.params if p.name not in _NOT_AGAIN and asked[p.name or ""] != p.default]
        words = [*asked["files"], *(word for p in given for word in (p.opts[0], str(asked[p.name or ""])))]
        return shlex.join(["safe-sched", "audit", *words, "--out", "found", "--report", "html"])
    words = ["safe-sched", "export", data, str(path.parent / "findings.parquet")]
    if summary.flagged:
        words += ["--threshold", _cut(findings)]
    if summary.scored < summary.rows:
        words += ["--unscored", "remove"]
    return shlex.join([*words, "--out", f"kept{ending}", "--removed", f"removed{ending}"])


def _cut(findings: Any) -> str:
    """The weight under which all flagged rows are, as text; export keeps a row whose weight is as high as it."""
    table = findings.table
    flagged = table.column("is_harmful_issue").fill_null(False).to_numpy()
    heaviest = table.column("weight").to_numpy()[flagged].max()
    cut = f"{1 - findings.summary.threshold:g}"
    return cut if heaviest < float(cut) else str(np.nextafter(np.float32(heaviest), np.float32(2)))


def _name_bad(findings: Any) -> None:
    """What could not be read or scored, on standard error: the first by name, all by number."""
    summary = findings.summary
    unscored, unnamed = summary.rows - summary.scored, summary.bad_rows - len(summary.bad)
    name_bad(
        f"{summary.bad_rows:,} lines or rows could not be read, {unscored:,} of {summary.rows:,} rows have no score:",
        [f"{one.where}: {one.reason}" for one in summary.bad],
        f"and {unnamed:,} more that could not be read" if unnamed else "",
    )
    for where, reason in _silent(findings, {one.where for one in summary.bad}):
        say_error(f"  {where}: {reason}")


def _silent(findings: Any, named: set[str]) -> list[tuple[str, str]]:
    """The first rows that could be read, and of which no signal says anything."""
    from safe_sched.data import NAMED

    table = findings.table.select(["where", "reason", "p_harmful"])
    unscored = table.filter(table.column("p_harmful").is_null()).slice(0, NAMED + len(named)).to_pylist()
    return [(row["where"], row["reason"]) for row in unscored if row["where"] not in named][:NAMED]
