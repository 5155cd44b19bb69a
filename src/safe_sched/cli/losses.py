"""``safe-sched losses``: what a plain model loses on every row, once and before the training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from safe_sched.cli.screen import DeviceOption, DtypeOption, errors_as_exit_codes, progress_bar, table_of
from safe_sched.data.rows import read_rows
from safe_sched.errors import OptionError
from safe_sched.estimators.reference import save_reference
from safe_sched.hooks import RowLosses, RowLossesRequest, row_losses


def losses(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the plain model.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Training file: .jsonl, .json, .csv or .parquet, in a schema of TRL.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write: a .parquet file.")],
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A PEFT adapter to put on the model.", show_default=False)
    ] = None,
    max_length: Annotated[
        int, typer.Option(metavar="TOKENS", help="Cut rows to this, as the training does. 0 keeps them whole.")
    ] = 1024,
    assistant_only_loss: Annotated[
        bool,
        typer.Option("--assistant-only-loss", metavar="", help="Only assistant turns are labels.", show_default=False),
    ] = False,
    completion_only_loss: Annotated[
        Literal["auto", "yes", "no"],
        typer.Option(metavar="WHEN", help="Only completions are labels: yes, no, or auto: where rows have them."),
    ] = "auto",
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Jinja template, not the model's own.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="ROWS", help="Rows of one forward pass.")] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    r"""Measure what a plain model loses on every row of a training file.

    BDS(evidence="reference") compares the model in training with it.

    The model runs once over the rows, without gradient. TRL prepares the
    rows, so name what decides on their labels and their length as the
    training will: the options are those of TRL's SFTConfig. Packing needs
    none.

    [bold]Example[/bold]: chats, trained with assistant_only_loss=True

        safe-sched losses models/base train.jsonl \
            --assistant-only-loss --out plain.parquet

    and then, in the training script

        scheduler = BDS(evidence="reference", reference="plain.parquet")
        callbacks = [SafeSchedCallback(scheduler, safety_data="core")]

    Exit codes: 0 every row has its loss; 2 something that was given cannot
    be used; 3 rows have no loss: they are named, and nothing is written.
    """
    with errors_as_exit_codes():
        _require_writable(out)
        rows = read_rows(data)
        with progress_bar() as progress:
            start = time.perf_counter()
            found = row_losses(
                RowLossesRequest(
                    model=model,
                    rows=rows,
                    adapter=adapter,
                    max_length=max_length or None,
                    assistant_only_loss=assistant_only_loss,
                    completion_only_loss={"auto": None, "yes": True, "no": False}[completion_only_loss],
                    chat_template=None if chat_template is None else _read_template(chat_template),
                    batch_size=batch_size,
                    device=device,
                    dtype=dtype,
                    progress=progress,
                )
            )
            seconds = time.perf_counter() - start
        found.require_complete()
        save_reference(out, found.keys, found.nll, found.label_tokens)
    console = Console()
    console.print(_summary(found, seconds, out))
    console.print("Next, in the training script:")
    console.print(f'  BDS(evidence="reference", reference="{out}")', style="bold", markup=False, soft_wrap=True)


def _require_writable(out: Path) -> None:
    """Before the work, not after it."""
    if out.suffix != ".parquet":
        raise OptionError(f"--out {out}: the losses are a Parquet file; name it {out.with_suffix('.parquet')}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()
    except OSError as error:
        raise OptionError(f"--out {out} cannot be written: {error.strerror}") from error
    if not out.stat().st_size:
        out.unlink()  # what a run that fails would leave behind


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--chat-template {path} cannot be read: {error}") from error


def _summary(found: RowLosses, seconds: float, out: Path) -> Table:
    nll = found.nll.double()
    lines = [
        ("rows", f"{nll.numel():,}"),
        ("label tokens", f"{int(found.label_tokens.sum()):,}"),
        ("nats per token, mean over rows", f"{float(nll.mean()):.4f}"),
        ("lowest, highest row", f"{float(nll.min()):.4f}, {float(nll.max()):.4f}"),
        ("seconds", f"{seconds:.1f}"),
        ("written to", str(out)),
    ]
    return table_of("Losses of the plain model", lines)
