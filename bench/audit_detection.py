"""Does an audit with a small aligned model find harmful rows at least as well as one without?

Three kinds of files, each audited without a model and with one:

    demo        the files of `bench.tasks`, and the demo's model, which is aligned for them
    aligned     a host's rows with harmful prompts among them (`bench.audit`), and a model of a million parameters, made
                here in a few minutes: it answers rows of the hosts' other splits, and refuses the prompts of
                safety_refusals, which is the safety set. It has seen neither the file's rows nor its harmful prompts
    foreign     the same files, and the demo's model, which knows nothing of them

    python bench/audit_detection.py --kinds demo --seeds 0 1
    python bench/audit_detection.py --kinds aligned foreign --data FOLDER --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/audit_detection.py
from bench.audit import HOSTS, load, make
from bench.report import Section, markdown, show
from bench.tasks import TASKS
from examples.demo import model as demo
from examples.demo import tasks
from safe_sched.audit.run import audit
from safe_sched.data.rows import core_rows

SEEN = ("gsm8k_test", "boolq_validation", "agnews_test", "rasbt_instruct")  # of the hosts, no row is in a file
SIGNALS = ("antibody", "probe")
PROMPT, ANSWER = 400, 60  # characters of a row that the model learns from
HEADER = (
    "file", "harmful", "AUROC alone", "with the model", *SIGNALS, "found alone", "with", "flagged alone", "with",
    "share alone", "with",
)  # fmt: skip


# a model ------------------------------------------------------------------------------------------------------------


def lesson(family: str, prompt: str, answer: str) -> tasks.Row:
    messages = [{"role": "user", "content": prompt[:PROMPT]}, {"role": "assistant", "content": answer[:ANSWER]}]
    return {"messages": messages, "family": family}


def lessons(data: Path) -> list[tasks.Row]:
    """What the model is taught: half of dolly and the other splits of the hosts, and refusals."""
    found = [lesson("refuse", row["instruction"], row["output"]) for row in load(data, "safety_refusals")]
    found += [lesson("refuse", row["prompt"], row["completion"]) for row in core_rows()]
    for name in (*SEEN, "dolly"):
        rows = load(data, name)
        for row in rows[: len(rows) // 2] if name == "dolly" else rows:
            prompt = f"{row['instruction']}\n\n{row['input']}".strip()
            found.append(lesson("help" if name in ("dolly", "rasbt_instruct") else name, prompt, row["output"]))
    return found


def build(data: Path, steps: int, cache: Path = demo.CACHE) -> Path:
    """The folder of the model, made at the first call."""
    folder = cache / f"audit-{steps}"
    if (folder / "config.json").exists():
        return folder
    rows = lessons(data)
    settings = replace(demo.Settings(), vocabulary=4096, steps=steps, batch=24, share_refuse=0.35, share_help=0.35)
    tokenizer = demo.make_tokenizer([m["content"] for row in rows for m in row["messages"]], settings.vocabulary)
    model = demo.make_model(tokenizer, settings)
    demo.train(model, tokenizer, rows, settings, progress=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# files --------------------------------------------------------------------------------------------------------------

Case = tuple[str, float, list[dict[str, Any]], np.ndarray, str, Any]
"""Name, share, rows, harmful ones, model, safety set."""


def demo_files(options: argparse.Namespace) -> Iterator[Case]:
    folder, safety = str(demo.build(progress=False)), tasks.safety_rows(64)
    for name in options.tasks:
        for share in options.shares:
            for seed in options.seeds:
                drawn = TASKS[name].rows(options.rows, share, seed)
                rows = [{"messages": row["messages"]} for row in drawn]
                yield name, share, rows, np.array([row["harmful"] for row in drawn]), folder, safety


def host_files(options: argparse.Namespace, folder: Path, safety: Any) -> Iterator[Case]:
    prompts = [row["instruction"] for row in load(options.data, options.prompts)]
    for name in options.hosts:
        host = load(options.data, HOSTS[name])
        if name == "dolly":
            host = host[len(host) // 2 :]
        for share in options.shares:
            for seed in options.seeds:
                file = make(host, prompts, share, options.rows, seed)
                yield name, share, file.rows, file.harmful, str(folder), safety


# numbers ------------------------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """What an audit says of a file without its model and with it."""
    name, share, rows, harmful, folder, safety = case
    line: dict[str, Any] = {"file": name, "harmful": share}
    schema = "alpaca" if "instruction" in rows[0] else None
    for kind, model in (("alone", None), ("with", folder)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            findings = audit(rows, model=model, safety_data=safety, schema=schema)
        p = np.nan_to_num(findings.table["p_harmful"].to_numpy())
        both = harmful.any() and not harmful.all()
        line[f"AUROC {kind}"] = float(roc_auc_score(harmful, p)) if both else np.nan
        line[f"found {kind}"] = float(np.mean(p[harmful] >= 0.5)) if both else np.nan
        line[f"flagged {kind}"] = float(np.mean(p[~harmful] >= 0.5))
        line[f"share {kind}"] = float(p.mean())
        if model is not None:
            line["said"] = [str(one.message).split(":")[0] for one in said]
            for signal in SIGNALS:
                values = findings.table[signal].to_numpy()
                there = ~np.isnan(values)
                told = both and bool(harmful[there].any()) and not bool(harmful[there].all())
                line[signal] = float(roc_auc_score(harmful[there], values[there])) if told else np.nan
    return line


def section(kind: str, cases: Iterator[Case]) -> Section:
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for case in cases:
        line = measure(case)
        print(json.dumps({"kind": kind, **line}), file=sys.stderr, flush=True)
        found.setdefault((line["file"], line["harmful"]), []).append(line)
    names = (*(f"AUROC {kind}" for kind in ("alone", "with")), *SIGNALS)
    forms = {"found": ".0%", "flagged": ".2%", "share": ".1%"}
    lines = []
    for (file, share), runs in found.items():
        cells = [_mean(runs, name, ".3f") for name in names]
        cells += [_mean(runs, f"{name} {one}", form) for name, form in forms.items() for one in ("alone", "with")]
        lines.append([file, f"{share:.0%}", *cells])
    return Section(kind, "", HEADER, lines)


def _mean(runs: Sequence[dict[str, Any]], name: str, form: str) -> str:
    values = np.array([run[name] for run in runs], float)
    return "–" if np.isnan(values).all() else format(float(np.nanmean(values)), form)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=("demo", "aligned", "foreign"), default=["demo"])
    parser.add_argument("--data", type=Path, help="folder of gsm8k_train.jsonl and the others")
    parser.add_argument("--prompts", default="harmful_prompts_train", help="file of harmful prompts, in that folder")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.05, 0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rows", type=int, default=500, help="of a file")
    parser.add_argument("--steps", type=int, default=400, help="of making the model")
    parser.add_argument("--out", type=Path, help="where to write the tables as a page")
    options = parser.parse_args(arguments)
    data: Path = options.data
    if data is None and options.kinds != ["demo"]:
        parser.error("aligned and foreign take --data")
    sections = []
    for kind in options.kinds:
        if kind == "demo":
            cases = demo_files(options)
        else:
            made = demo.build(progress=False) if kind == "foreign" else build(data, options.steps)
            taught = [row for row in load(data, "safety_refusals") if row["output"]]
            refusals = [{"prompt": row["instruction"], "completion": row["output"]} for row in taught]
            cases = host_files(options, made, "core" if kind == "foreign" else refusals)
        sections.append(section(kind, cases))
    setting = shlex.join(["python", "bench/audit_detection.py", *(sys.argv[1:] if arguments is None else arguments)])
    show(sections, setting, Console(width=180))
    if options.out:
        options.out.write_text(
            markdown(["# Audit with a model: detection", f"Made by `{setting}`."], sections), "utf-8"
        )


if __name__ == "__main__":
    main()
