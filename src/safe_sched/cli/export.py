"""``safe-sched export``: the weights of a run, on the rows of its training file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet
import typer
from rich.console import Console
from rich.table import Table

from safe_sched.cli.screen import errors_as_exit_codes, table_of
from safe_sched.data.export import Exported
from safe_sched.data.export import export as write_weights
from safe_sched.errors import DataError


def export(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Training file or folder, hf://owner/name, or - for JSON lines.")
    ],
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A run's table or an audit's findings.parquet.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where to write; - is standard output.")],
    threshold: Annotated[
        float | None, typer.Option(metavar="WEIGHT", help="Take rows of a lower weight out.", show_default=False)
    ] = None,
    removed: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where those go, with reasons.", show_default=False)
    ] = None,
    multiply: Annotated[
        bool, typer.Option("--multiply", metavar="", help="Multiply by weights that rows have.", show_default=False)
    ] = False,
    unscored: Annotated[
        Literal["error", "keep", "remove"],
        typer.Option(metavar="WHAT", help="Rows without a score: keep with weight 1, or remove."),
    ] = "error",
) -> None:
    r"""Write every row of a training file with its weight.

    Hosted fine-tuning services take the weight of a row as a number at
    its root. The file may be .jsonl, .json, .csv, .tsv, .parquet or
    .arrow, also with .gz or .zst behind it, and is read row by row.

    [bold]Example[/bold]: at the end of the training script

        pq.write_table(callback.table(), "weights.parquet")

    and then

        safe-sched export train.jsonl weights.parquet --out kept.jsonl \
            --threshold 0.2 --removed removed.jsonl

    After an audit, WEIGHTS is the findings.parquet in its folder. Rows that
    the audit could not score have no weight: --unscored says whether to keep
    or to remove them, and without it they are an error that names them.

    Exit codes: 0 every row is in one of the files; 2 something that was
    given cannot be used, and nothing is written.
    """
    with errors_as_exit_codes():
        found = write_weights(
            data,
            out,
            table=_table(weights),
            threshold=threshold,
            removed=removed,
            multiply=multiply,
            unscored=unscored,
        )
    Console(stderr=True).print(_summary(found, out, removed))  # standard output may be the rows


def _table(path: Path) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"no weights in {path} ({reason}). Write them after the training: "
            'pyarrow.parquet.write_table(callback.table(), "weights.parquet")'
        ) from error


def _summary(found: Exported, out: str, removed: Path | None) -> Table:
    lines = [("rows", f"{found.rows:,}"), ("kept", f"{found.kept:,}, in {out}")]
    if removed is not None:
        lines.append(("removed", f"{found.removed:,}, in {removed}"))
    return table_of("Rows with weights", [*lines, ("mean weight of those kept", f"{found.mean:.4f}")])
