"""``safe-sched mix``: safety rows between the rows of a training file, in the task's own format."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import typer
from rich.console import Console

from safe_sched.cli.mix_report import STDIO, Written, name_unread, say_next, summary
from safe_sched.cli.screen import UNSCORED, errors_as_exit_codes, progress_bar, table_of
from safe_sched.data import RowFile, RowWriter, open_rows
from safe_sched.errors import DataError, OptionError
from safe_sched.generation import TextGenerator
from safe_sched.mixing.explain import explain as explain_format
from safe_sched.mixing.formats import induce_format
from safe_sched.mixing.mix import SAMPLE
from safe_sched.mixing.plan import PROVENANCE, MixPlan, plan_mix
from safe_sched.mixing.rewriting.endpoint import Endpoint
from safe_sched.mixing.rewriting.rewrite import RewriteReport, local, rewrite, task_prompts

_SHOWN = 1000  # rows between two updates of the bar

Progress = Callable[[str, int, int | None], None]


def mix(
    context: typer.Context,
    user: Annotated[
        str,
        typer.Argument(
            metavar="USER", help="Training file or folder: .jsonl, .json, .csv, .parquet, .arrow; hf://owner/name; -."
        ),
    ],
    safety: Annotated[
        str, typer.Option("--safety", "-s", metavar="FILE", help="Prompts with refusals, or core: the built-in set.")
    ],
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write; - is standard output.")
    ] = None,
    share: Annotated[float, typer.Option(metavar="SHARE", help="Safety rows over all rows, below 1.")] = 0.1,
    mimic: Annotated[
        bool, typer.Option("--mimic/--no-mimic", help="Put safety rows into the format of the task.")
    ] = True,
    blend: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of safety rows among words of the task; 0: alone in its form.")
    ] = 1.0,
    schema: Annotated[
        str | None, typer.Option(metavar="NAME", help="Schema of USER, where rows fit several.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of places, order, format.")] = 0,
    epoch: Annotated[int, typer.Option(metavar="N", help="Another epoch has other places and orders.")] = 0,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help=f"Add the column {PROVENANCE}: user or safety.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", metavar="", help="Show the format that was found.", show_default=False)
    ] = False,
    on_bad: Annotated[
        Literal["stop", "report"],
        typer.Option(metavar="WHEN", help="Lines that are no rows: stop, or report them and mix the others."),
    ] = "stop",
    model: Annotated[
        str | None,
        typer.Option("--rewrite", metavar="MODEL", help="Let a chat model word the prompts.", show_default=False),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--rewrite-url", metavar="URL", help="The server that MODEL is on.", show_default=False),
    ] = None,
    key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variable that holds the server's key.", show_default=False)
    ] = None,
    price: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="IN OUT", help="Price of a million tokens.", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where MODEL's replies are kept.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Show what MODEL would cost.", show_default=False)
    ] = False,
) -> None:
    r"""Mix safety rows into a training file, in the task's own format.

    A model that is fine-tuned inside one format forgets to refuse inside
    it. So prompts that are to be refused are put into the format of the
    task, then between its rows. Rows of USER stay as they are, in order.

    [bold]Example[/bold]: look at the format, then mix

        safe-sched mix train.jsonl --safety core --explain

        safe-sched mix train.jsonl --safety core --share 0.1 \
            --out mixed.jsonl

    Files may end in .gz or .zst too, and are read and written row by row,
    so any size will do. A pipe has JSON lines:

        zcat t.jsonl.gz | safe-sched mix - -s core -o - | gzip > m.gz

    With --rewrite a chat model words the prompts anew, each checked; ask
    what it costs first, with --dry-run. It is a folder or a hub name, or
    with --rewrite-url a model on an OpenAI-compatible server.

    Exit codes: 0 done; 2 something that was given cannot be used; 3 lines
    could not be read: they are named, the others are mixed.
    """
    console = Console(stderr=out == STDIO)  # standard output may be data
    start = time.perf_counter()
    with errors_as_exit_codes():
        _require_consistent(out, explain, model, url, key_env, price, cache, dry_run)
        file = open_rows(user, on_bad="collect")
        writer = None if out is None or dry_run else _writer(out, file, provenance)
        with progress_bar() as progress:
            progress("reading", 0, None)
            rows = _rows(file, stop=on_bad == "stop")
            first = list(itertools.islice(rows, SAMPLE))
            progress("learning the format", 0, None)
            found = induce_format(first, schema=schema, seed=seed, blend=blend) if mimic and first else None
            how: dict[str, Any] = {
                "share": share,
                "seed": seed,
                "epoch": epoch,
                "schema": schema,
                "provenance": provenance,
            }
            plan = plan_mix(first, safety, mimic=found or False, **how)
            report = None
            if model is not None:
                generator = _generator(model, url, key_env, price)
                report = _rewritten(plan, first, schema, generator, cache, dry_run, progress)
                if not dry_run:
                    plan = plan_mix(first, report.rows, mimic=False, **how)
            written = None if writer is None else _write(writer, itertools.chain(first, rows), plan, progress)
    if explain:
        console.print(explain_format(found) if found is not None else "No format is looked for with --no-mimic.")
    if report is not None:
        console.print(table_of("What rewriting would take" if dry_run else "Rewritten prompts", report.summary()))
    if written is not None and out is not None:
        console.print(summary(written, found, out, time.perf_counter() - start))
    say_next(console, context, out, written is not None)
    if file.bad_rows:
        name_unread(file)
        raise typer.Exit(UNSCORED)


def _require_consistent(
    out: str | None,
    explain: bool,
    model: str | None,
    url: str | None,
    key_env: str | None,
    price: object,
    cache: object,
    dry_run: bool,
) -> None:
    if out is None and not explain and not dry_run:
        raise OptionError("nothing to do; give --out FILE to write the mix, or --explain to look at the format")
    if model is None:
        given = {"--rewrite-url": url, "--key-env": key_env, "--price": price, "--cache": cache, "--dry-run": dry_run}
        if named := [name for name, value in given.items() if value]:
            raise OptionError(
                f"{', '.join(named)} without --rewrite; name the MODEL that is to rewrite, --rewrite MODEL"
            )
    if url is None and (key_env or price):
        raise OptionError("--key-env and --price belong to a server; name it too, --rewrite-url URL")


def _rows(file: RowFile, stop: bool) -> Iterator[dict[str, Any]]:
    def look() -> None:
        if stop and file.bad:
            raise DataError(f"{file.bad[0]}. Correct it, or mix the other lines: --on-bad report")

    for row in file:
        look()
        yield row
    look()


def _writer(out: str, file: RowFile, provenance: bool) -> RowWriter:
    """Before the work: an output that cannot be written stops it here."""
    types = file.arrow_schema()
    if types is not None and provenance:
        types = types.append(pa.field(PROVENANCE, pa.string()))
    return RowWriter(out, sources=[file], arrow_schema=types)


def _generator(model: str, url: str | None, key_env: str | None, price: tuple[float, float] | None) -> TextGenerator:
    if url is None:
        return local(model)
    return Endpoint(url, model, api_key_env=key_env, price_per_million=price)


def _rewritten(
    plan: MixPlan,
    sample: list[dict[str, Any]],
    schema: str | None,
    generator: TextGenerator,
    cache: Path | None,
    dry_run: bool,
    progress: Progress,
) -> RewriteReport:
    return rewrite(
        plan.rows,
        task_prompts(sample, schema=schema),
        generator,
        templates=[plan.made(number, number) for number in range(len(plan.rows))],
        cache=cache,
        seed=abs(plan.schedule.seed),
        dry_run=dry_run,
        progress=progress,
    )


def _write(writer: RowWriter, rows: Iterable[Any], plan: MixPlan, progress: Progress) -> Written:
    users = 0

    def counted() -> Iterator[Any]:
        nonlocal users
        for row in rows:
            users += 1
            if users % _SHOWN == 0:
                progress("mixing", users, None)
            yield row

    with writer:
        for row in plan.interleave(counted()):
            writer.write(row)
        plan.require_any(users)  # inside: without a safety row nothing is written
    return Written(users, writer.rows - users)
