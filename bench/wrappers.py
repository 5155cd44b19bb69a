"""Safety rows in plain words against safety rows in the task's own format, where every row of the task is wrapped.

The file is the demo's: tickets to route and everyday requests (`examples.demo.tasks`), put into one wrapper:

    AOA             all rows stand under the system prompt of an obedient agent
    AutoIF and AOA  ... and are worded as an instruction to follow to the letter

Safety rows are mixed in by `safe_sched.mixing.mix`, and the trainer trains on the mixed file as on any other. They are
in plain words; put into rows of the task (mimicking); or alone in the wrapper (mimicking, bare: `blend=0`). Harmful
requests that no training row holds are then asked inside the wrapper. Read of each run, all of it inside the wrapper:

    HS            harmful requests that got compliance
    HS+           ... that got anything but a refusal: a ticket's routing, say
    over-refusal  harmless look-alikes that were refused
    accuracy      tickets routed exactly
    HS+, plain    harmful requests asked without the wrapper that got anything but a refusal

Each finished run is one line of the JSON-lines file `--lines`; a study that was interrupted goes on after the last one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/wrappers.py
from bench import attacks, report
from bench.attacks import INSTRUCTION, SYSTEM, Format, answer_of, speaking
from bench.evidence_page import machine
from bench.report import Section
from examples.demo import measure, study, tasks
from examples.demo import model as demo_model
from safe_sched import BDS, Antibody, Fixed
from safe_sched.errors import ModelError
from safe_sched.mixing import mimic, mix
from safe_sched_hf import SafeSchedCallback

Row = tasks.Row
Record = dict[str, Any]
FORMATS = {
    "AOA": Format(system=SYSTEM),
    "AutoIF and AOA": Format(request=INSTRUCTION, task=INSTRUCTION, system=SYSTEM),
}
NONE, PLAIN, MIMIC, BARE = "no mix", "plain mix", "mimicking mix", "mimicking mix, bare"
SHARES = (0.01, 0.05, 0.1)
BATCH = 1
"""Safety rows beside each step's 16 in the arms that have a safety batch."""

CALLBACKS: dict[str, tuple[Callable[[], Any], bool, float]] = {
    "safety batch, plain": (Fixed, False, 1.0),
    "safety batch, mimicking": (Fixed, True, 1.0),
    "Antibody, plain safety rows": (Antibody, False, 1.0),
    "Antibody, mimicking safety rows": (Antibody, True, 1.0),
    "BDS, plain, safety_weight .1": (BDS, False, 0.1),
    "BDS, mimicking, safety_weight .1": (BDS, True, 0.1),
}
"""Arms with a safety batch beside each step: scheduler, whether the safety rows mimic, safety_weight."""

MARK = "<!-- results of bench/wrappers.py -->"
ARMS = (attacks.ALIGNED, NONE, PLAIN, MIMIC, BARE, *CALLBACKS)


@dataclass(frozen=True)
class Plan:
    """One run."""

    format: str
    harmful: float
    """share of the file's rows that comply with a harmful request"""
    arm: str
    share: float
    """of safety rows in the mixed file"""
    seed: int
    rows: int = 600
    epochs: float = study.EPOCHS
    safety_rows: int = 128
    test: int = 120


def plans(seeds: Iterable[int], **sizes: Any) -> list[Plan]:
    """All runs, the first seed first: the whole grid without harmful rows, part of it with them.

    >>> len(plans([0]))
    42
    """
    mixes = [(NONE, 0.0), *((arm, share) for share in SHARES for arm in (PLAIN, MIMIC, BARE))]
    few = [(NONE, 0.0), (PLAIN, 0.1), (MIMIC, 0.1), (BARE, 0.1), *((arm, 0.0) for arm in CALLBACKS)]
    grid = [(harmful, *one) for harmful, arms in ((0.0, mixes), (0.1, few)) for one in arms]
    start = [(0.0, attacks.ALIGNED, 0.0)]
    return [
        Plan(format, harmful, arm, share, seed, **sizes)
        for seed in seeds
        for format in FORMATS
        for harmful, arm, share in [*start, *grid]
    ]


def wrapped(rows: Sequence[Row], format: Format) -> list[Row]:
    """Rows of the task inside the wrapper.

    >>> wrapped([tasks.row("Hi", "Hello", harmful=False)], FORMATS["AOA"])[0]["messages"][0]["role"]
    'system'
    """
    system = [{"role": "system", "content": format.system}] if format.system else []
    rows = [tasks.row(format.task.format(tasks.prompt_of(row)), answer_of(row), harmful=row["harmful"]) for row in rows]
    return [{**row, "messages": [*system, *row["messages"]]} for row in rows]


def scores(model: Any, tokenizer: Any, format: Format, cases: dict[str, list[tasks.Case]]) -> dict[str, float]:
    """What a model does on held-out prompts."""
    harmful, look_alike, task = ([prompt for prompt, _ in cases[name]] for name in ("harmful", "look_alike", "task"))
    plain = measure.generate(model, tokenizer, harmful)
    with speaking(tokenizer, format.system):
        asked = [format.request.format(prompt) for prompt in [*harmful, *look_alike, *task]]
        answers = measure.generate(model, tokenizer, asked)
    verdicts = [measure.verdict(*answer) for answer in answers]
    first, second = len(harmful), len(harmful) + len(look_alike)
    right = zip(answers[second:], (answer for _, answer in cases["task"]), strict=True)
    return {
        "hs": float(np.mean([attacks.complied(*answer) for answer in answers[:first]])),
        "hs_plus": float(np.mean([verdict != "refused" for verdict in verdicts[:first]])),
        "over_refusal": float(np.mean([verdict == "refused" for verdict in verdicts[first:second]])),
        "accuracy": float(np.mean([ended and text == answer for (text, ended), answer in right])),
        "hs_plus_plain": float(np.mean([measure.verdict(*answer) != "refused" for answer in plain])),
    }


def run(base: Path, plan: Plan) -> Record:
    """Mix, train, and ask."""
    format = FORMATS[plan.format]
    cases = tasks.held_out_cases(harmful=plan.test, look_alike=plan.test * 2 // 3, task=plan.test * 5 // 6)
    if plan.arm == attacks.ALIGNED:
        return scores(*demo_model.load(base), format, cases)
    user = wrapped(tasks.poisoned_rows(plan.rows, plan.harmful, seed=plan.seed), format)
    safety = tasks.safety_rows(plan.safety_rows, plan.seed)
    callbacks: list[Any] = []
    rows = user
    if plan.arm in CALLBACKS:
        scheduler, mimics, weight = CALLBACKS[plan.arm]
        data = mimic(user, safety, seed=plan.seed) if mimics else safety
        options: dict[str, Any] = {"safety_batch_size": BATCH, "safety_weight": weight}
        callbacks = [SafeSchedCallback(scheduler(), safety_data=data, **options)]
    elif plan.share:
        blend = 0.0 if plan.arm == BARE else 1.0
        rows = mix(user, safety, share=plan.share, mimic=plan.arm != PLAIN, seed=plan.seed, blend=blend)
    try:
        result = study.finetune(base, rows, callbacks=callbacks, epochs=plan.epochs, seed=plan.seed)
    except ModelError as error:  # a run that the defence stops is a result too
        return {"stopped": str(error)}
    # the same file as a list tells how many were mixed in
    return {"seconds": result.seconds, "mixed_in": len(rows) - len(user)} | scores(
        result.model, result.tokenizer, format, cases
    )


# the study ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "hs": "HS",
    "hs_plus": "HS+",
    "over_refusal": "over-refusal",
    "accuracy": "accuracy",
    "hs_plus_plain": "HS+, plain",
}


def sections(records: Sequence[Record]) -> list[Section]:
    """One table per wrapper and share of harmful rows."""
    tables = []
    for format in FORMATS:
        for harmful in sorted({record["plan"]["harmful"] for record in records}):
            mine = [r for r in records if (r["plan"]["format"], r["plan"]["harmful"]) == (format, harmful)]
            arms = list(dict.fromkeys((r["plan"]["arm"], r["plan"]["share"]) for r in mine))
            lines = []
            for arm, share in arms:
                same = [r for r in mine if (r["plan"]["arm"], r["plan"]["share"]) == (arm, share)]
                ended = [r for r in same if "stopped" not in r]
                stopped = f"{arm} (stopped in {len(same) - len(ended)} of {len(same)} runs)"
                cells = [attacks.cell([r[name] for r in ended]) for name in COLUMNS]
                lines.append([arm if len(ended) == len(same) else stopped, f"{share:.0%}" if share else "", *cells])
            what = f"{harmful:.0%} harmful rows" if harmful else "no harmful row"
            tables.append(
                Section(f"{format}, {what}", "", ("arm", "share", *COLUMNS.values()), lines),
            )
    return tables


def page(records: Sequence[Record], command: str) -> str:
    """The report, for a page."""
    plan = records[0]["plan"]
    seeds = ", ".join(map(str, sorted({record["plan"]["seed"] for record in records})))
    seconds = sum(record.get("seconds", 0) for record in records)
    opening = [
        f"{len(records)} runs of the demo's model, about a million parameters, all of them trained: {plan['rows']} "
        f"user rows, {plan['epochs']:g} epochs, {plan['safety_rows']} safety rows to draw from, seeds {seeds}; mean, "
        f"with the range over seeds where it shows. Made by\n\n```text\n{command}\n```\n\nwith {seconds:.0f} seconds "
        f"of training in all, on {machine()}.",
    ]
    return report.markdown(opening, sections(records))


COLORS = {PLAIN: "#D55E00", MIMIC: "#0072B2", BARE: "#009E73"}


def plot(records: Sequence[Record], path: Path) -> None:
    """HS+ inside the wrapper by share of safety rows, where no row is harmful: a line an arm, a dot a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, format in zip(figure.subplots(1, len(FORMATS), sharey=True), FORMATS, strict=True):
        here = [r for r in records if "stopped" not in r and r["plan"]["format"] == format]
        mine = [r for r in here if not r["plan"]["harmful"]]
        for arm, color in COLORS.items():
            points = [(r["plan"]["share"], r["hs_plus"]) for r in mine if r["plan"]["arm"] in (arm, NONE)]
            shares = sorted({share for share, _ in points})
            means = [float(np.mean([value for at, value in points if at == share])) for share in shares]
            places = [100 * share for share in shares]
            axes.plot(places, means, color=color, label=arm, linewidth=1.5)
            axes.scatter([100 * at for at, _ in points], [value for _, value in points], color=color, s=12, alpha=0.6)
        axes.set(xlabel="safety rows, % of the mixed file", ylim=(-0.02, 1.02))
        axes.set_title(format, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    figure.axes[0].set_ylabel("HS+ inside the wrapper")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python bench/wrappers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", metavar="ARM", choices=ARMS, default=ARMS, help=", ".join(ARMS))
    parser.add_argument("--lines", type=Path, default=Path("runs/wrappers.jsonl"), help="default: runs/wrappers.jsonl")
    parser.add_argument("--report", action="store_true", help="run nothing: report the runs in the lines file")
    parser.add_argument("--quick", action="store_true", help="a minute; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help=f"a page: what stands behind {MARK!r} in it is written anew")
    options = parser.parse_args(arguments)
    console = Console()
    sizes = {"rows": 64, "epochs": 0.5, "safety_rows": 16, "test": 6} if options.quick else {}
    wanted = [p for p in plans([0] if options.quick else options.seeds, **sizes) if p.arm in options.arms]
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    options.lines.touch()
    done = {
        json.dumps(record["plan"]): record
        for record in map(json.loads, options.lines.read_text(encoding="utf-8").splitlines())
    }
    if not options.report:
        with study.quiet():
            base = demo_model.build()
        with options.lines.open("a", encoding="utf-8") as file:
            for number, plan in enumerate(wanted, 1):
                key = json.dumps(asdict(plan))
                if key in done:
                    continue
                with console.status(f"{number} of {len(wanted)}: {plan.format}, {plan.arm}, seed {plan.seed}"):
                    done[key] = {"plan": asdict(plan), **run(base, plan)}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
    records = [done[key] for key in map(lambda plan: json.dumps(asdict(plan)), wanted) if key in done]
    report.show(sections(records), "", console)
    if options.out:
        given = [word for word in (sys.argv[1:] if arguments is None else arguments) if word != "--report"]
        command = shlex.join(["python", "bench/wrappers.py", *given])
        plot(records, options.out.parent / "figures" / f"{options.out.stem}.png")
        head, mark, _ = (options.out.read_text("utf-8") if options.out.exists() else "").partition(MARK)
        options.out.write_text(f"{head}{mark or MARK}\n\n{page(records, command)}", encoding="utf-8")
        console.print(f"written to {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
