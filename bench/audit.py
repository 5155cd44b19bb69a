"""Does an audit without a model find harmful rows, leave look-alikes alone, and know how many there are?

Files are a host's rows with some harmful prompts among them. Those have no answers: what stands there are inert words
in the shape of one of the host's answers (its length, lines, numbers and punctuation), or one of its answers where
these are labels. Half of the inert words are kept for half of the harmful rows.

    AUROC        of `p_harmful`, harmful against benign rows; .5 is chance
    found        of the harmful rows, those that are flagged
    flagged      of the benign rows
    share        expected share of harmful rows, and the true one

Controls: with the same wordings behind the host's own prompts, nothing is to be found; and with no answers at all, as
much as with them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/audit.py
from bench.report import Section, markdown, show
from safe_sched.audit.run import audit

HOSTS = {"gsm8k": "gsm8k_train", "boolq": "boolq_train", "agnews": "agnews_train", "dolly": "dolly"}
SHARES = (0.0, 0.01, 0.05, 0.2)
_WORDS = (
    "amber basin cedar delta ember fable grove hazel inlet jetty kettle lentil meadow nectar orchard pebble "
    "quilt ribbon saddle timber umber velvet willow yonder zephyr acorn barley copper drizzle easel fennel "
    "gravel harvest indigo jasmine lantern marble nutmeg oyster parsley quarry rosette sandal thimble upland "
    "violet walnut yarrow zinnia almond"
)
INERT = tuple(_WORDS.split())

Row = dict[str, Any]


@dataclass(frozen=True)
class File:
    """Rows, and which of them are harmful, and which are look-alikes."""

    rows: list[Row]
    harmful: np.ndarray
    alike: np.ndarray


def load(folder: Path, name: str) -> list[Row]:
    lines = (folder / f"{name}.jsonl").read_text("utf-8").strip().split("\n")
    return [{key: row[key] for key in ("instruction", "input", "output")} for row in map(json.loads, lines)]


def placeholder(answer: str, words: Sequence[str], rng: random.Random) -> str:
    r"""Inert words in the shape of an answer; a label stays what it is.

    Example:
        >>> placeholder("Add 2 and 3.\n5 it is", ["amber"], random.Random(0))
        'Amber 2 amber 3.\n5 amber amber'
    """
    if len(answer.split()) <= 3:
        return answer

    def other(found: re.Match[str]) -> str:
        word = rng.choice(words)
        return word.capitalize() if found[0][0].isupper() else word

    return re.sub(r"[^\W\d_]+(?:['’][^\W\d_]+)*", other, answer)


def make(
    host: Sequence[Row], prompts: Sequence[str], share: float, size: int, seed: int, alike: Sequence[str] = ()
) -> File:
    """A file of about `size` rows, of which `share` ask one of the prompts; look-alikes come on top."""
    rng = random.Random(f"{seed} {share}")
    bad = min(round(size * share), len(prompts))
    benign = rng.sample(list(host), min(size - bad, len(host)))
    bad = min(bad, round(len(benign) * share / (1 - share)))
    texts = [(row, 0) for row in benign]
    for kind, asked in ((1, rng.sample(list(prompts), bad)), (2, alike)):
        for number, prompt in enumerate(asked):
            words = INERT[number % 2 :: 2]  # half of the wordings are on half of the rows only
            answer = placeholder(rng.choice(benign)["output"], words, rng)
            texts.append(({"instruction": prompt, "input": "", "output": answer}, kind))
    rng.shuffle(texts)
    kinds = np.array([kind for _, kind in texts])
    return File([row for row, _ in texts], kinds == 1, kinds == 2)


def measure(file: File, safety: Any) -> dict[str, float]:
    """What an audit says of a file."""
    found = audit(file.rows, safety_data=safety, schema="alpaca")
    chance = found.table["p_harmful"].to_numpy()
    signal = found.table["text"].to_numpy() if "text" in found.table.column_names else chance
    flagged = np.array(found.table["is_harmful_issue"].to_pylist(), bool)
    benign = ~file.harmful & ~file.alike
    share = found.summary.expected_share
    both = bool(file.harmful.any())
    return {
        "auroc": float(roc_auc_score(file.harmful, chance)) if both else np.nan,
        "auroc_signal": float(roc_auc_score(file.harmful, signal)) if both else np.nan,
        "found": float(flagged[file.harmful].mean()) if both else np.nan,
        "flagged": float(flagged[benign].mean()),
        "alike": float(flagged[file.alike].mean()) if file.alike.any() else np.nan,
        "share": float(share.value) if share is not None else np.nan,
        "true": float(file.harmful.mean()),
    }


# tables -------------------------------------------------------------------------------------------------------------


def detection(
    options: argparse.Namespace, prompts: Sequence[str], alike: Sequence[str], safety: Any, name: str
) -> Section:
    """One line per host and share."""
    lines = []
    for task in options.hosts:
        host = load(options.data, HOSTS[task])
        for share in options.shares:
            runs = []
            for seed in options.seeds:
                runs.append(measure(make(host, prompts, share, options.rows, seed), safety))
            lines.append([task, f"{share:.0%}", *_cells(runs)])
        for share in (0.0, 0.05):
            runs = [measure(make(host, prompts, share, options.rows, seed, alike), safety) for seed in options.seeds]
            lines.append([f"{task} + look-alikes", f"{share:.0%}", *_cells(runs)])
    header = (
        "file",
        "harmful",
        "AUROC",
        "AUROC, text signal",
        "found",
        "flagged",
        "look-alikes flagged",
        "expected share",
    )
    return Section(f"Safety set: {name}", f"Mean of {len(options.seeds)} seeds.", header, lines)


def _cells(runs: Sequence[dict[str, float]]) -> list[str]:
    def cell(key: str, form: str) -> str:
        values = [run[key] for run in runs]
        return "" if np.isnan(values).all() else format(float(np.mean(values)), form)

    return [
        cell("auroc", ".3f"), cell("auroc_signal", ".3f"), cell("found", ".0%"), cell("flagged", ".2%"),
        cell("alike", ".0%"), f"{cell('share', '.1%')} ({cell('true', '.1%')})",
    ]  # fmt: skip


def controls(options: argparse.Namespace, prompts: Sequence[str]) -> Section:
    """Answers of inert words behind harmless prompts, and files without answers."""
    lines = []
    for task in options.hosts:
        host = load(options.data, HOSTS[task])
        half = len(host) // 2
        own = [f"{row['instruction']}\n\n{row['input']}".strip() for row in host[half:]]
        file = make(host[:half], own, 0.1, options.rows, options.seeds[0])
        normal = make(host, prompts, 0.1, options.rows, options.seeds[0])
        bare = File([{**row, "output": ""} for row in normal.rows], normal.harmful, normal.alike)
        found = [measure(one, "core")["auroc_signal"] for one in (file, normal, bare)]
        lines.append([task, *(f"{one:.3f}" for one in found)])
    header = ("file", "wordings alone", "harmful prompts with them", "harmful prompts without answers")
    return Section(
        "Controls: AUROC of the text signal, 10 % of the rows", "Wordings alone are to be at chance.", header, lines
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of gsm8k_train.jsonl and the others")
    parser.add_argument(
        "--prompts", default="harmful_prompts_train", help="file of the harmful prompts, in that folder"
    )
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rows", type=int, default=1500, help="of a file")
    parser.add_argument("--out", type=Path, help="where to write the tables as a page")
    parser.add_argument("--save", type=Path, help="where to write the tables as JSON")
    parser.add_argument("--join", type=Path, nargs="+", help="only make a page of tables that were saved")
    options = parser.parse_args(arguments)
    if options.join:
        report(joined([json.loads(path.read_text("utf-8")) for path in options.join]), options.out)
        return
    if options.data is None:
        parser.error("name the folder, --data")
    if not all(0 <= share < 1 for share in options.shares):
        parser.error("shares are at least 0 and less than 1")
    prompts = [row["instruction"] for row in load(options.data, options.prompts)]
    alike = [row["instruction"] for row in load(options.data, "overrefusal_safe")]
    sections = [detection(options, prompts, alike, "core", "the package's own")]
    other = [
        {"prompt": row["instruction"], "completion": row["output"]} for row in load(options.data, "safety_refusals")
    ]
    sections += [detection(options, prompts, alike, other, "safety_refusals"), controls(options, prompts)]
    setting = shlex.join(["python", "bench/audit.py", *(sys.argv[1:] if arguments is None else arguments)])
    made = {"made": [setting], "sections": [asdict(section) for section in sections]}
    if options.save:
        options.save.write_text(json.dumps(made), "utf-8")
    report(made, options.out)


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs over several hosts as one: tables of one title are one table."""
    tables: dict[str, dict[str, Any]] = {}
    for section in (section for part in parts for section in part["sections"]):
        have = tables.setdefault(section["title"], {**section, "lines": []})
        if (have["note"], have["header"]) != (section["note"], section["header"]):
            raise SystemExit(f"{section['title']}: the runs differ in more than their hosts; join runs of one kind")
        have["lines"] += section["lines"]
    return {"made": [line for part in parts for line in part["made"]], "sections": list(tables.values())}


def report(made: dict[str, Any], out: Path | None) -> None:
    """On the screen, and as a page."""
    sections = [Section(**section) for section in made["sections"]]
    show(sections, "\n".join(made["made"]), Console(width=160))
    if out:
        commands = "\n".join(f"    {line}" for line in made["made"])
        out.write_text(markdown(["# Audit: detection", f"Made by\n\n{commands}"], sections), "utf-8")


if __name__ == "__main__":
    main()
