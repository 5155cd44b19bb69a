"""Is a task's format found, and do safety rows read like rows of the task?

    python bench/mimicry.py --data FOLDER --out docs/mimicry.md

*Formats.* A format is induced on one half of a file; on the other half, prompts are put together again from constants
and slots. On made-up tasks (`bench.formats`) it is known of every character whether it is constant, so what was found
is compared with what there is.

*Telling apart.* A classifier, logistic regression on character n-grams (1 to 5, tf-idf), 5-fold cross-validated, is
told to separate safety prompts from prompts of the task. Safety prompts are rendered with carriers from one half of the
file; the prompts that they are compared with are from the other half. AUROC: .5 cannot tell, 1 always can. It sees:

    words masked      every word is "w", "W" where it begins a sentence with a capital, "9" if it begins with a digit:
                      punctuation, line ends, lengths, numbers, case of beginnings are left
    names masked      the same, with every capital kept: "W"
    content masked    words that are not in a list of 180 English function words are masked, as in "words masked"
    nothing masked    the text
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/mimicry.py
from bench.formats import SYNTHETIC, Made, make
from bench.report import Section, markdown, show
from safe_sched.data.rows import core_rows, read_rows
from safe_sched.data.schemas import read
from safe_sched.mixing.formats import TaskFormat, induce_format
from safe_sched.mixing.templates import Filling, Template

TASKS = {"gsm8k": "gsm8k_train", "boolq": "boolq_train", "agnews": "agnews_train", "dolly": "dolly"}
MARK = "<!-- results of bench/mimicry.py -->"
TARGET, UNMIMICKED, REPRODUCED = 0.75, 0.95, 0.95

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_BEGINS = re.compile(r"(?:^|[.?!:\n])\s*[\"'“‘(\[]*$")

_FUNCTION = """a an the this that these those and or but nor so if then than as of in on at by for from to with without
into onto over under about after before between through during against up down out off above below again i you he she it
we they me him her us them my your his its our their mine yours hers ours theirs myself yourself himself herself itself
ourselves themselves am is are was were be been being do does did doing done have has had having can could may might
must shall should will would cannot can't don't doesn't didn't isn't aren't wasn't won't who whom whose which what
where when why how not no yes there here all any both each few more most other some such only own same too very just
also every either neither one because while until although though since whether"""
FUNCTION_WORDS = frozenset(_FUNCTION.split())


def words_masked(text: str, keep: frozenset[str] = frozenset(), *, capitals: bool = False) -> str:
    """A text without its topic.

    Args:
        text: Any text.
        keep: Words that stay, in lower case.
        capitals: Whether capitals within a sentence show.

    Example:
        >>> words_masked("How old is Ann? She's 7.")
        'W w w w? W 9.'
        >>> words_masked("How old is Ann?", FUNCTION_WORDS)
        'How w is w?'
    """

    def masked(found: re.Match[str]) -> str:
        word = found[0]
        if word.lower() in keep:
            return word
        if word[0].isdigit():
            return "9"
        begins = capitals or _BEGINS.search(text[max(0, found.start() - 8) : found.start()])
        return "W" if word[0].isupper() and begins else "w"

    return _WORD.sub(masked, text)


VIEWS: dict[str, Callable[[str], str]] = {
    "words masked": words_masked,
    "names masked": lambda text: words_masked(text, capitals=True),
    "content masked": lambda text: words_masked(text, FUNCTION_WORDS),
    "nothing masked": lambda text: text,
}


def auroc(safety: Sequence[str], task: Sequence[str]) -> float:
    """How well a classifier tells safety prompts from those of the task."""
    truth = np.r_[np.ones(len(safety)), np.zeros(len(task))]
    grams = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 5), sublinear_tf=True, min_df=2, max_features=100_000, lowercase=False
    )
    model = make_pipeline(grams, LogisticRegression(C=10, max_iter=1000, solver="liblinear"))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(model, [*safety, *task], truth, cv=folds, method="decision_function")
    return float(roc_auc_score(truth, scores))


def prompt_of(row: Mapping[str, Any], schema: str | None = None) -> str:
    """The texts before a row's answer, as one."""
    example = read(row, schema)
    return "\n\n".join(part.text for part in example.parts[: example.answer] if part.text)


def halves(rows: Sequence[Any], seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Two halves of some rows, at random."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order[: len(order) // 2], order[len(order) // 2 :]


# formats ----------------------------------------------------------------------------------------------------------


def constant_mask(template: Template, filling: Filling) -> list[bool]:
    """Of each character of a text, whether the template says that it is constant."""
    blank = Filling(
        tuple("\0" * len(slot) for slot in filling.slots), tuple("\0" * len(one) for one in filling.options)
    )
    return [character != "\0" for character in template.fill(blank)]


def reproduction(found: TaskFormat, rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Share of rows whose prompts come out exactly, and share of their characters that are constants."""
    exact, constant, characters = 0, 0, 0
    for row in rows:
        example = read(row, found.schema)
        exact += found.reproduce(row) == [part.text for part in example.parts[: example.answer]]
        for _, template, filling in found.parse(row) or []:
            mask = constant_mask(template, filling)
            constant, characters = constant + sum(mask), characters + len(mask)
    return exact / len(rows), constant / characters


def agreement(found: TaskFormat, made: Sequence[Made]) -> tuple[float, float]:
    """Precision and recall of the constants, in characters: slots that are too narrow, and too wide."""
    both = said = true = 0
    for one in made:
        for (_, template, filling), (_, mask) in zip(found.parse(one.row) or [], one.constant, strict=True):
            guess = constant_mask(template, filling)
            both += sum(a and b for a, b in zip(guess, mask, strict=True))
            said, true = said + sum(guess), true + sum(mask)
    return both / max(said, 1), both / max(true, 1)


def formats_section(data: Path, rows: int) -> tuple[Section, list[str]]:
    lines, missed = [], []
    for task, name in TASKS.items():
        file = read_rows(data / f"{name}.jsonl")
        learnt, held_out = halves(file)
        found = induce_format(learnt)
        start = time.perf_counter()
        induce_format(file)
        seconds = time.perf_counter() - start
        exact, constant = reproduction(found, held_out)
        constants = len({one for those in found.templates.values() for one in those if one.weight})
        lines.append(
            [task, f"{len(learnt)}", f"{exact:.1%}", f"{constant:.1%}", str(constants), "–", "–", f"{seconds:.1f}"]
        )
        missed += [f"{task} reproduced: {exact:.1%}"] if exact < REPRODUCED else []
    for name in SYNTHETIC:
        learnt, held_out = make(name, rows, 0), make(name, rows, 1)
        start = time.perf_counter()
        found = induce_format([one.row for one in learnt])
        seconds = time.perf_counter() - start
        exact, constant = reproduction(found, [one.row for one in held_out])
        precision, recall = agreement(found, held_out)
        constants = len({one for those in found.templates.values() for one in those if one.weight})
        lines.append(
            [
                name,
                f"{rows}",
                f"{exact:.1%}",
                f"{constant:.1%}",
                str(constants),
                f"{precision:.1%}",
                f"{recall:.1%}",
                f"{seconds:.1f}",
            ]
        )
        missed += [f"{name} reproduced: {exact:.1%}"] if exact < REPRODUCED else []
    note = (
        "Induced on one half of a file (made-up tasks: on as many rows), measured on the other. `exact`: share of rows "
        "whose prompts come out of constants and slots character by character; the trivial template alone would reach "
        "100 %, so `constant` is the share of characters that are constants, `templates` how many have any. On made-up "
        "tasks the true constants are known: `precision` is the share of found constant characters that are constant, "
        "`recall` the share of true ones that were found. `seconds`: for the whole file."
    )
    header = ["task", "rows", "exact", "constant", "templates", "precision", "recall", "seconds"]
    return Section("Formats", note, header, lines), missed


# telling apart ------------------------------------------------------------------------------------------------------


def prompts_of(
    found: TaskFormat, safety: Sequence[Mapping[str, Any]], task: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Safety prompts as they are and as rendered, beside other prompts of the task."""
    return {
        "unmimicked": [prompt_of(row) for row in safety],
        "rendered": [prompt_of(found.render(row, counter), found.schema) for counter, row in enumerate(safety)],
        "task": [prompt_of(row, found.schema) for row in task],
    }


def telling_sections(data: Path, limit: int, synthetic_rows: int) -> tuple[list[Section], list[str]]:
    sets = {"core": core_rows(), "safety_refusals": read_rows(data / "safety_refusals.jsonl")}
    files = {task: read_rows(data / f"{name}.jsonl") for task, name in TASKS.items()}
    files |= {name: [one.row for one in make(name, synthetic_rows)] for name in SYNTHETIC}
    found = {}
    main, views, controls, missed = [], [], [], []
    for task, rows in files.items():
        carriers, others = halves(rows)
        found[task] = induce_format(carriers)
        bare = induce_format(carriers, blend=0)
        made_up = task in SYNTHETIC
        for name, safety in sets.items():
            if made_up and name != "core":
                continue
            chosen = halves(safety, 1)
            safety = [*chosen[0], *chosen[1]][: min(limit, len(others), len(carriers))]
            prompts = prompts_of(found[task], safety, others[: len(safety)])
            alone = prompts_of(bare, safety, others[: len(safety)])["rendered"]
            seen = {}
            for view, mask in list(VIEWS.items())[: 1 if made_up else None]:
                others_seen = [*map(mask, prompts["task"])]
                seen[view] = [auroc([*map(mask, prompts[kind])], others_seen) for kind in ("unmimicked", "rendered")]
            before, after = seen["words masked"]
            slot = auroc([*map(words_masked, alone)], [*map(words_masked, prompts["task"])])
            verdict = "passed" if after < TARGET else "missed"
            if before <= UNMIMICKED:
                verdict += ", unmimicked under .95"
            main.append([task, name, str(len(safety)), f"{before:.3f}", f"{slot:.3f}", f"{after:.3f}", verdict])
            missed += [f"{task}, {name}: {after:.3f}"] if after >= TARGET else []
            if not made_up:
                views.append([task, name, *(f"{a:.3f} → {b:.3f}" for a, b in seen.values())])
        if made_up:
            continue
        again = [prompt_of(row) for row in carriers[:limit]], [prompt_of(row) for row in others[:limit]]
        controls.append(
            [task, *(f"{auroc([*map(mask, again[0])], [*map(mask, again[1])]):.3f}" for mask in VIEWS.values())]
        )
    for task, other in (("gsm8k", "agnews"), ("agnews", "boolq")):
        wrong = prompts_of(found[other], sets["core"], halves(files[task])[1][: len(sets["core"])])
        row = [f"{auroc([*map(mask, wrong['rendered'])], [*map(mask, wrong['task'])]):.3f}" for mask in VIEWS.values()]
        controls.append([f"{task}, safety rows in the format of {other}", *row])
    return [
        Section(
            "Safety prompts and prompts of the task, words masked",
            "AUROC. `slot`: the bare request in its slot (`blend=0`); `rendered`: the default, among clauses of a "
            "carrier. The target is below .75 where unmimicked prompts are above .95.",
            ["task", "safety rows", "of each", "unmimicked", "slot", "rendered", "target"],
            main,
        ),
        Section(
            "The same, seen otherwise",
            "AUROC, unmimicked → rendered. With function words left, the classifier sees the words of the request, "
            "which are kept: *I*, *my*, *how can I* are rare in news and in word problems. No rendering that "
            "keeps a request word for word can hide that.",
            ["task", "safety rows", *VIEWS],
            views,
        ),
        Section(
            "Controls",
            "AUROC. Two halves of the task's own prompts: .5 is expected. Safety rows in another task's format: 1 is.",
            ["what", *VIEWS],
            controls,
        ),
    ], missed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k_train.jsonl and the others")
    parser.add_argument("--rows", type=int, default=700, help="prompts of each class (default: 700)")
    parser.add_argument("--synthetic-rows", type=int, default=1000, help="rows of made-up tasks (default: 1000)")
    parser.add_argument("--out", type=Path, help=f"a page: what stands behind {MARK!r} in it is written anew")
    options = parser.parse_args(arguments)
    first, missed = formats_section(options.data, options.synthetic_rows)
    rest, also = telling_sections(options.data, options.rows, options.synthetic_rows)
    sections = [first, *rest]
    setting = "Targets missed: " + ("; ".join([*missed, *also]) or "none") + "."
    show(sections, setting, Console())
    if options.out:
        command = shlex.join(["python", "bench/mimicry.py", "--data", "DATA", "--rows", str(options.rows)])
        head, mark, _ = (options.out.read_text("utf-8") if options.out.exists() else "").partition(MARK)
        page = markdown([f"Made by `{command}`.", setting], sections)
        options.out.write_text(f"{head}{mark or MARK}\n\n{page}", "utf-8")


if __name__ == "__main__":
    main()
