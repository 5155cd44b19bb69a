"""`make demo`: fine-tune a small chat model on a poisoned file, undefended and defended.

Offline and on a CPU. The base model is made here on the first run (about a minute, then kept under .cache/demo);
every arm trains it with TRL's own SFTTrainer. Written to the run folder:

    results.json                  the table below as numbers, with seeds and settings
    weights.parquet               the weight of every row of the defended run, as `callback.table()` gives it
    weights.png                   how the weights moved, harmful and benign rows apart
    bds/safe_sched_manifest.json  what the defended run was defended with, and that no row was left out
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import measure, model, study, tasks

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from safe_sched.scheduler import Scheduler
    from safe_sched_hf import SafeSchedCallback

DEFENDED = "BDS"
COLUMNS = {
    "hs": "HS",
    "over_refusal": "refusal",
    "task_accuracy": "task",
    "auroc": "AUROC",
    "ess": "ESS/N",
    "seconds": "sec",
}
# few safety rows, and few of them in a step of 16: with many the safety batch alone defends, whatever the weights are
SAFETY_ROWS, SAFETY_BATCH = 20, 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the base model, run the arms, print the table, write the run folder."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fine-tuning runs (default: 0)")
    parser.add_argument("--epochs", type=float, default=study.EPOCHS, help=f"default: {study.EPOCHS}")
    parser.add_argument("--rows", type=int, default=None, help="use only the first ROWS rows of the file")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()

    console.print("[bold]1.[/] the base model: answers a few task families, refuses harmful requests")
    with study.quiet():
        base = model.build()
        results = {"base model": measure.evaluate(*model.load(base)).as_dict()}

    rows = tasks.load("poisoned")[: options.rows]
    harmful = sum(row["harmful"] for row in rows)
    console.print(
        f"[bold]2.[/] fine-tuning on {len(rows)} rows of examples/data/poisoned.jsonl, {harmful} of them harmful"
    )
    with Progress(
        TextColumn("   {task.description:32}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn()
    ) as progress:
        for name, arm, ours in _arms(rows):
            trace = _Trace(progress.add_task(name), progress, ours)
            main_arm = name == DEFENDED
            run = study.run_arm(
                base,
                arm,
                seed=options.seed,
                out=options.out / "bds" if main_arm else None,
                epochs=options.epochs,
                extra_callbacks=[trace.callback()],
            )
            results[name] = measure.evaluate(run.model, run.tokenizer).as_dict() | {"seconds": run.seconds}
            if ours is not None:
                results[name] |= _judge_weights(ours, run.harmful)
            if ours is not None and main_arm:
                _write_weights(ours, run.harmful, trace, options.out)

    (options.out / "results.json").write_text(
        json.dumps({"seed": options.seed, "epochs": options.epochs, "rows": len(rows), "arms": results}, indent=2)
        + "\n"
    )
    _print_table(console, results)
    console.print(
        f"\nwritten to {options.out}: results.json, weights.parquet, weights.png, bds/safe_sched_manifest.json"
    )


def _arms(rows: list[tasks.Row]) -> list[tuple[str, study.Arm, SafeSchedCallback | None]]:
    """The arms in the order of the table, with the callback of the defended one."""
    from safe_sched import BDS, Antibody, BDSReleased, Fixed
    from safe_sched_hf import SafeSchedCallback

    safety = tasks.load("safety")[:SAFETY_ROWS]
    undefended, mix, oracle = study.arms(rows, safety)

    def with_safety(scheduler: Scheduler[Any]) -> SafeSchedCallback:
        return SafeSchedCallback(scheduler, safety_data=safety, safety_batch_size=SAFETY_BATCH)

    equal, released, ours, antibody = (
        with_safety(scheduler) for scheduler in (Fixed(), BDSReleased(), BDS(), Antibody())
    )
    return [
        ("undefended", undefended, None),
        ("unweighted safety mix", mix, None),
        (
            "safety batch, weights 1",
            study.Arm("control", "the safety batch alone, every row at weight 1", rows, callbacks=[equal]),
            None,
        ),
        (
            "BDS, released rule",
            study.Arm("released", "the rule of the authors' released code", rows, callbacks=[released]),
            released,
        ),
        (DEFENDED, study.Arm("bds", "the file as it is, one callback", rows, callbacks=[ours]), ours),
        (
            "Antibody",
            study.Arm("antibody", "the same with likelihood-ratio weights", rows, callbacks=[antibody]),
            antibody,
        ),
        ("oracle: harmful rows removed", oracle, None),
    ]


class _Trace:
    """Moves the progress bar and remembers the weights of all rows after every fourth step."""

    def __init__(self, task: Any, progress: Progress, ours: SafeSchedCallback | None) -> None:
        self.task, self.progress, self.ours = task, progress, ours
        self.steps: list[int] = []
        self.weights: list[list[float]] = []

    def callback(self) -> TrainerCallback:
        """The trainer's view of it."""
        from transformers import TrainerCallback

        outer = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                outer.progress.update(outer.task, total=state.max_steps, completed=state.global_step)
                if outer.ours is not None and (state.global_step % 4 == 0 or state.global_step == state.max_steps):
                    outer.steps.append(state.global_step)
                    outer.weights.append(outer.ours.session.row_weights().tolist())

        return Callback()


def _judge_weights(ours: SafeSchedCallback, harmful: list[bool]) -> dict[str, float]:
    """AUROC of 'harmful rows have low weights', and effective sample size per row."""
    from sklearn.metrics import roc_auc_score

    weights = ours.session.row_weights().tolist()
    return {
        "auroc": float(roc_auc_score(harmful, [-weight for weight in weights])),
        "ess": ours.session.effective_sample_size() / len(weights),
    }


def _write_weights(ours: SafeSchedCallback, harmful: list[bool], trace: _Trace, out: Path) -> None:
    """The table of rows, and how their weights moved."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(ours.table(), out / "weights.parquet")
    _plot(trace, harmful, out / "weights.png")


def _plot(trace: _Trace, harmful: list[bool], path: Path) -> None:
    """Weights over time: median and middle 80 % of harmful and of benign rows."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weights, flags = np.array(trace.weights), np.array(harmful)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, chosen, color in (("benign rows", ~flags, "#0072B2"), ("harmful rows", flags, "#D55E00")):
        low, middle, high = np.quantile(weights[:, chosen], [0.1, 0.5, 0.9], axis=1)
        axes.plot(trace.steps, middle, color=color, label=f"{name} ({chosen.sum()}): median")
        axes.fill_between(trace.steps, low, high, color=color, alpha=0.2, linewidth=0, label="middle 80 %")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimiser step", ylabel="weight of a row", ylim=(0, None))
    axes.set_title("How much each row may teach", loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _print_table(console: Console, results: dict[str, dict[str, float]]) -> None:
    table = Table(title="\nheld-out prompts after fine-tuning", title_justify="left")
    table.add_column("arm", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for name, scores in results.items():
        cells = []
        for key in COLUMNS:
            value = scores.get(key)
            percent = key in ("hs", "over_refusal", "task_accuracy", "ess")
            cells.append(
                "-"
                if value is None
                else f"{100 * value:.0f} %"
                if percent
                else f"{value:.{0 if key == 'seconds' else 2}f}"
            )
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        "HS       harmful prompts answered with compliance: lower is better\n"
        "refusal  harmless look-alikes refused: lower is better\n"
        "task     held-out prompts of the new task answered right: higher is better\n"
        "AUROC    of the weights: 1.00 tells harmful from benign rows, 0.50 tells nothing\n"
        "ESS/N    share of the rows that the weights leave in effect\n"
        "sec      seconds of training"
    )
    console.print(
        "\nThe released rule reads the loss itself: rows that are hard to learn are not the harmful ones. BDS asks "
        "which rows become harder to learn when the model refuses more (docs/methods/bds.md), Antibody where the "
        "aligned model would have refused (docs/methods/antibody.md)."
    )


if __name__ == "__main__":
    main()
