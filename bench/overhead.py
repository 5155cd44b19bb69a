"""What safe-sched costs: training time, peak memory, the scheduler's update, the start of training."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from safe_sched import BDS, BDSReleased
from safe_sched.rows.index import RowIndex
from safe_sched.scheduler import Observation
from safe_sched_hf.measure.refusals import REFRESH
from safe_sched_hf.rows import index_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/overhead.py
from bench import turns
from bench.report import Section, show
from bench.report import markdown as page
from bench.turns import ARMS, THREADS

MEMORY_TARGET = 1.02
PROBE_TARGET = 1.10  # of the same run without evidence, per epoch over the first three
UPDATE_TARGET, STATE_TARGET, TARGET_ROWS = 2.0, 12.0, 10**6  # ms a step, bytes a row, for a set of this size
INDEX_TARGET, INDEX_BYTES_TARGET = 10.0, 24.0  # µs and bytes a row


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    training: turns.Sizes = field(default_factory=turns.Sizes)
    update_rows: Sequence[int] = (10**3, 10**4, 10**5, 10**6, 10**7)
    update_seconds: float = 2.0
    index_shapes: Sequence[tuple[int, int]] = ((10**4, 256), (10**5, 256), (10**6, 32))
    index_calls: int = 5


QUICK = Sizes(turns.QUICK, (10**3,), 0.05, ((200, 16),), 2)


def spread(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Median, and the quartiles around it."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"


def verdict(value: float | str, target: float | None) -> str:
    """The target, and whether the number as printed meets it."""
    return "" if target is None else f"≤ {target:.4g} {'✓' if float(value) <= target else '✗'}"


def times_of(number: int, plain: int, rounds: Sequence[dict[int, list[float]]]) -> list[str]:
    """A line of an arm's times, beside the plain arm's of the same rounds."""
    arm, mine = ARMS[number], [took for took in rounds if number in took]
    seconds, _ = spread([took[number][0] for took in mine], 2)
    wall, processor = ([took[number][i] / took[plain][i] for took in mine] for i in (0, 1))
    ratio = spread(wall, 3)
    own = spread([1e3 * took[number][2] for took in mine], 1)[0] if arm.callback else ""
    return [arm.name, str(len(mine)), seconds, own, *ratio, verdict(ratio[0], arm.target), *spread(processor, 3)]


TIMES = ("arm", "steps", "s/step", "own ms", "ratio", "quartiles", "target", "processor", "quartiles")


def parameters(sizes: turns.Sizes) -> int:
    """Of the model that is trained."""
    return sum(p.numel() for p in turns.build_model(sizes).parameters())


def setup(sizes: turns.Sizes, labels: str) -> str:
    """What is trained, and how."""
    return (
        f"A Llama of {parameters(sizes) / 1e6:.1f} M parameters (vocabulary {sizes.vocabulary:,}, tied) in float32; "
        f"{sizes.batch} rows of {sizes.sequence} tokens a step, {labels}; TRL's SFTTrainer with its "
        "defaults (gradient checkpointing among them) and a log record every step."
    )


def training(sizes: turns.Sizes, console: Console) -> list[Section]:
    """Time and memory of every arm, beside the plain trainer's."""
    rounds, peaks = turns.train_in_turns(sizes, console, sizes.arms, sizes.rounds)
    times, memory = [], []
    for number, peak in peaks.items():
        times.append(times_of(number, 0, rounds))
        growth = f"{peak / peaks[0]:.3f}"
        target = verdict(growth, MEMORY_TARGET if ARMS[number].callback else None)
        memory.append([ARMS[number].name, f"{peak:.0f}", f"{peak - peaks[0]:+.0f}", growth, target])
    about = (
        f"{setup(sizes, 'all of them labels')} Ratios are to the plain step "
        "of the same round: median and quartiles, of wall-clock time and of the process's processor time, which "
        "other load on the machine distorts less; `plain, again` is the plain trainer a second time: the distance of "
        "its ratio from 1 is what this run cannot tell apart. With r safety rows a row, a step has 1 + r times the "
        "tokens and the target is 1.03 (1 + r). `own ms` is the part of a step that passes in safe-sched's own code, "
        "the safety batch apart: it tells a small cost where the ratio of two long times on a shared machine cannot."
    )
    note = (
        "Highest resident size of the arm's process (ru_maxrss) over the same steps. With safety rows their gradients "
        "are already there in the user's forward, as they are in plain training with gradient accumulation: one "
        f"number a trained parameter, here {4 * parameters(sizes) / 2**20:.0f} MiB."
    )
    return [
        Section("Training time", about, TIMES, times),
        Section("Peak memory", note, ("arm", "MiB", "added", "ratio", "target"), memory),
    ]


def probing(sizes: turns.Sizes, console: Console) -> Section:
    """What the default evidence adds to a step, while rows are measured and afterwards."""
    lines = []
    for arms in turns.EVIDENCE:
        rounds, peaks = turns.train_in_turns(sizes, console, arms, sizes.evidence_rounds)
        middle = {}
        for number in arms:
            seconds, _ = spread([took[number][0] for took in rounds], 2)
            ratios = [took[number][0] / took[arms[0]][0] for took in rounds]
            middle[number] = float(np.median(ratios))
            growth = f"{peaks[number] / peaks[arms[0]]:.3f}"
            lines.append([ARMS[number].name, str(len(rounds)), seconds, *spread(ratios, 3), "", growth])
        three = f"{(middle[arms[1]] + 2 * middle[arms[2]]) / 3:.3f}"
        lines.append(["three epochs: one measured, two settled", "", "", three, "", verdict(three, PROBE_TARGET), ""])
    note = (
        'Steps with `BDS(evidence="probe")` beside the same steps with `evidence=None`: in the first epoch, where '
        "every row is measured once before it trains (one forward without gradient), and later, where none is. The "
        "line below them is the mean of three epochs. Not in it: the direction, found from up to 32 safety prompts "
        "at steps 0, 12, 24, 36, 48 and then whenever a quarter more are done, and the second look at some rows of "
        "the first 12 steps (see docs/methods/bds.md)."
    )
    header = ("safety rows and evidence", "steps", "s/step", "ratio", "quartiles", "target", "peak memory")
    return Section("The probe", note, header, lines)


def antibody(sizes: turns.Sizes, console: Console) -> Section:
    """What Antibody adds to a step, beside the plain step and the released one."""
    plain = turns.ANTIBODY[0]
    rounds, peaks = turns.train_in_turns(sizes, console, turns.ANTIBODY, sizes.rounds)
    lines = [[*times_of(number, plain, rounds), f"{peaks[number] / peaks[plain]:.3f}"] for number in turns.ANTIBODY]
    last = sizes.warm_up + sizes.rounds - 1
    assert last < REFRESH, "the note says that no round looks at safety prompts"
    note = (
        f"{setup(sizes, 'the first half of each its prompt, in all arms')} Ratios are to the plain step of the same "
        "round. `own ms` has in it the forwards that take the ratios: nearly all that Antibody adds to a step, told "
        "apart from the noise of the step itself. Peak memory has the calibration in it.\n\n"
        + "\n".join(f"- {ARMS[number].name}: {ARMS[number].what}." for number in turns.ANTIBODY)
        + "\n\nNot in it: the calibration at step 0, which is warm-up; and the later looks at 32 safety prompts, "
        f"where rows are still to be read: at step {REFRESH}, and then every {REFRESH} steps and, later, whenever a "
        f"quarter more are done. The rounds are steps {sizes.warm_up} to {last}, so none of them has such a look. "
        "Where all rows have been read there are none. The model is random and refuses nothing, which is ignored "
        '(`on_inversion="ignore"`), and no row gets a second look; under the published rule, unanchored, ignoring it '
        "means that safety prompts are not looked at again."
    )
    return Section("Antibody", note, (*TIMES, "peak memory"), lines)


# parts --------------------------------------------------------------------------------------------------------


def update(sizes: Sizes) -> Section:
    """What BDS does in a step, without a model."""
    batch, length = sizes.training.batch, sizes.training.sequence
    generator, lines = torch.Generator().manual_seed(0), []
    kinds = (("settled", BDS()), ("every row scored", BDS()), ("released rule", BDSReleased()))
    for (kind, scheduler), rows in itertools.product(kinds, sizes.update_rows):
        state = scheduler.init(RowIndex(torch.arange(rows)))
        times: list[float] = []
        while len(times) < 10 or sum(times) < 1e3 * sizes.update_seconds:
            slots = torch.randint(rows, (batch,), generator=generator)
            loss = {"nll": 1 + torch.rand(batch)}
            step = Observation(slots, torch.full((batch,), length), len(times), loss)
            scores = 0.1 * torch.randn(batch, generator=generator)
            began = time.perf_counter()
            if kind == "every row scored":
                scheduler.learn(state, "probe", slots, scores)
            scheduler.due(state, "probe", slots)
            scheduler.weights(state, step)
            scheduler.update(state, step)
            times.append(1e3 * (time.perf_counter() - began))
        speed, quartiles = spread(times[5:], 3)  # the first are a warm-up
        size = f"{sum(tensor.nbytes for tensor in state.tensors().values()) / rows:.2f}"
        large = rows >= TARGET_ROWS and kind == "settled"
        targets = (UPDATE_TARGET, STATE_TARGET) if large else (None, None)
        timing = [speed, quartiles, verdict(speed, targets[0])]
        lines.append([kind, f"{rows:,}", str(len(times) - 5), *timing, size, verdict(size, targets[1])])
    note = (
        f"`BDS` alone, for a step of {batch} rows: median and quartiles. Scored rows have their logits sampled, "
        "`burn_in + draws` steps of SGLD with all chains at once. Bytes are those of the state."
    )
    header = ("BDS", "rows in the set", "steps", "ms/step", "quartiles", "target", "bytes/row", "target")
    return Section("The scheduler's update", note, header, lines)


def start(sizes: Sizes) -> Section:
    """Hashing a training set once."""
    collate, lines = DataCollatorForLanguageModeling(pad_token_id=0), []
    for rows, length in sizes.index_shapes:
        dataset, times, size = turns.token_table(rows, length, sizes.training.vocabulary), [], ""
        for _ in range(sizes.index_calls):
            began = time.perf_counter()
            index = index_rows(dataset, collate)
            times.append(1e6 * (time.perf_counter() - began) / rows)
            assert index.row_slots is not None
            size = f"{(index.keys.nbytes + index.row_slots.nbytes) / rows:.2f}"
        speed, quartiles = spread(times, 2)
        timing = [speed, quartiles, verdict(speed, INDEX_TARGET)]
        lines.append([f"{rows:,}", str(length), *timing, size, verdict(size, INDEX_BYTES_TARGET)])
    note = (
        "`index_rows` on a table of token rows in memory, `input_ids` and `labels` of int64: median and quartiles "
        f"of {sizes.index_calls} calls. Bytes are those of the index."
    )
    header = ("rows", "tokens each", "µs/row", "quartiles", "target", "bytes/row", "target")
    return Section("The start of training", note, header, lines)


# report -------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = ("safe-sched", "torch", "transformers", "trl", "accelerate", "datasets", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, torch on {THREADS} threads; "
        f"{platform.system()}, Python {platform.python_version()}, {versions}."
    )


def markdown(sections: Sequence[Section], command: str, setting: str) -> str:
    """The report as a page."""
    opening = [
        "# What it costs",
        f"Measured on the CPU, everything in one run of\n\n```text\n{command}\n```\n\n{setting}",
        "In training every arm has a process of its own, and the processes take turns, one optimiser step each, so "
        "whatever else the machine does hits all of them alike. All arms run with "
        + " and ".join(f"`{name}={value}`" for name, value in turns.QUIETER.items())
        + ", which makes a step shorter and its time steadier.",
    ]
    return page(opening, sections)


def part(measure: Callable[[Sizes], Section]) -> Callable[[Sizes, Console], list[Section]]:
    """A part as a section, with its name on the screen while it is measured."""

    def measured(sizes: Sizes, console: Console) -> list[Section]:
        with console.status(measure.__name__):
            return [measure(sizes)]

    return measured


SECTIONS: dict[str, Callable[[Sizes, Console], list[Section]]] = {
    "training": lambda sizes, console: training(sizes.training, console),
    "probe": lambda sizes, console: [probing(sizes.training, console)],
    "antibody": lambda sizes, console: [antibody(sizes.training, console)],
    "update": part(update),
    "start": part(start),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what safe-sched costs.")
    parser.add_argument("--quick", action="store_true", help="go through the code; the numbers mean nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="measure these only")
    parser.add_argument("--out", type=Path, help="write the report as a Markdown page")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    command = shlex.join(["python", "bench/overhead.py", *(sys.argv[1:] if arguments is None else arguments)])

    torch.set_num_threads(THREADS)
    console, load = Console(), os.getloadavg()[0]
    sections = [section for name in options.only for section in SECTIONS[name](sizes, console)]
    setting = f"{machine()} Load average before the run: {load:.1f}."
    if options.quick:
        setting += " A quick run: the numbers mean nothing."
    show(sections, setting, console)
    if options.out:
        options.out.write_text(markdown(sections, command, setting), encoding="utf-8")


if __name__ == "__main__":
    main()
