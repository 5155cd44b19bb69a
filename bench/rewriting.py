"""How often do the checks of rewritten prompts let a wrong prompt through, and do they let the right one?

    python bench/rewriting.py --data FOLDER --out docs/rewriting.md

No model writes anything. Texts that are known to be right or wrong stand where a rewritten prompt would: the request
itself, the row's own refusal, the request of another row, and the request behind words that turn it into its opposite.
Each is put into the task's form and given to `mixing.rewriting.checks.TaskChecks`, which is told the format by
64 prompts of the task, as in `rewrite`.

The form is the text that all examples begin and end with. Where they share none, a stand-in gets "Think about it."
behind it: a request that comes back unchanged is refused, whatever it says.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run as a script: python bench/rewriting.py
from bench.report import Section, markdown, show
from safe_sched.data.rows import core_rows, read_rows
from safe_sched.data.schemas import read
from safe_sched.mixing import task_prompts
from safe_sched.mixing.rewriting.checks import TaskChecks, turns_of

TASKS = {"gsm8k": "gsm8k_train", "agnews": "agnews_train", "boolq": "boolq_train", "dolly": "dolly"}
MARK, END = "<!-- results of bench/rewriting.py -->", "<!-- end of results -->"
EXAMPLES = 64
FIXED = 6  # characters that all examples share at an end: fewer may be chance
NEUTRAL = " Think about it."
TURNED = ("How can one prevent this: ", "Why is it illegal: ", "Warn me about this: ")


@dataclass(frozen=True)
class Safety:
    """A safety row: what it asks, and its refusal."""

    request: str
    refusal: str


def safety_of(row: Mapping[str, Any]) -> Safety:
    """The two texts of a row; its request is the text that `rewrite` would have rewritten."""
    example = read(row)
    if example.answer is None:
        raise SystemExit(f"a safety row has no answer, only {', '.join(map(repr, row))}; give rows with refusals")
    return Safety(task_prompts([row])[0], example.parts[example.answer].text)


def form_of(examples: Sequence[str]) -> Callable[[str], str]:
    """Puts a text into the form of a task.

    Example:
        >>> form_of(["Question: is rain wet? Yes or no.", "Question: do cats bark? Yes or no."])("Can iron rust?")
        'Question: Can iron rust? Yes or no.'
        >>> form_of(["How old is Ann?", "Where is Bob?"])("Can iron rust?")
        'Can iron rust? Think about it.'
    """
    start = commonprefix(examples)
    end = commonprefix([example[len(start) :][::-1] for example in examples])[::-1]
    start, end = (fixed if len(fixed.strip()) >= FIXED else "" for fixed in (start, end))
    if not start and not end:
        return lambda text: text + NEUTRAL
    # the sign that ends the last sentence may be a part of the form
    return lambda text: start + (text.rstrip("?.! ") if end[:1] in tuple("?.!") else text) + end


def others(rows: Sequence[Safety], step: int | None = None) -> list[str]:
    """For each row the request of another: ``step`` rows further on (half a file), or the next that asks otherwise."""
    first = len(rows) // 2 if step is None else step
    found = []
    for number, row in enumerate(rows):
        requests = (rows[(number + first + more) % len(rows)].request for more in range(len(rows)))
        other = next((request for request in requests if request != row.request), None)
        if other is None:
            raise SystemExit(f"all {len(rows)} safety rows ask the same; give rows with different requests")
        found.append(other)
    return found


def stand_ins(rows: Sequence[Safety], step: int | None = None) -> dict[str, tuple[str, list[str]]]:
    """Texts in the place of rewritten prompts by what they are: how many should be used, and one for each row."""
    found = {
        "the request, word for word, in the task's form": ("all", [row.request for row in rows]),
        "the row's own refusal": ("none", [row.refusal for row in rows]),
        "the request of another row": ("none", others(rows, step)),
    }
    turned = {f'"{turn}" and the request': ("none", [turn + row.request for row in rows]) for turn in TURNED}
    return found | turned


def used(task: TaskChecks, form: Callable[[str], str], texts: Sequence[str], rows: Sequence[Safety]) -> list[int]:
    """Numbers of the rows whose stand-in passes the checks."""
    return [
        number
        for number, (text, row) in enumerate(zip(texts, rows, strict=True))
        if task.problem(form(text), row.request) is None
    ]


def has_turn(turn: str, request: str) -> bool:
    """Whether the request has the word of the turn itself, so that the word brings nothing new."""
    return turns_of(turn) <= turns_of(request)


def measured(data: Path, step: int | None = None) -> tuple[Section, str]:
    """The table, and what was measured on."""
    public, core = read_rows(data / "safety_refusals.jsonl"), core_rows()
    rows = [safety_of(row) for row in [*public, *core]]
    texts = stand_ins(rows, step)
    counts: dict[str, list[str]] = {name: [] for name in texts}
    formats, unexplained = [], 0
    for task, name in TASKS.items():
        examples = task_prompts(read_rows(data / f"{name}.jsonl"), EXAMPLES)
        checks, form = TaskChecks(examples), form_of(examples)
        formats.append(f"{task}: {checks.described.replace(chr(10), ' ')}")
        for stand_in, (_, made) in texts.items():
            passed = used(checks, form, made, rows)
            counts[stand_in].append(f"{len(passed):,}")
            turn = next((turn for turn in TURNED if stand_in.startswith(f'"{turn}"')), None)
            unexplained += sum(turn is not None and not has_turn(turn, rows[number].request) for number in passed)
    note = (
        f"Measured on {len(rows):,} safety rows ({len(public):,} public ones and the built-in set of {len(core)}), "
        f"with {EXAMPLES} prompts each of {len(TASKS)} tasks as examples: how many of the texts that stand for a "
        "rewritten prompt pass the checks."
    )
    lines = [[name, should, *counts[name]] for name, (should, _) in texts.items()]
    section = Section(
        "How often a wrong prompt gets through",
        note,
        ["instead of a rewritten prompt", "used, should be", *TASKS],
        lines,
    )
    setting = (
        "Of what gets through in the last three, over all tasks, the request does not have the word of the turn in "
        f"{unexplained} cases."
    )
    return section, "\n".join([setting, *formats])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k_train.jsonl and the others")
    parser.add_argument("--step", type=int, help="how many rows away the other row is (default: half of them)")
    parser.add_argument("--out", type=Path, help=f"a page: what stands between {MARK!r} and {END!r} is written anew")
    options = parser.parse_args(arguments)
    page = options.out.read_text("utf-8") if options.out and options.out.exists() else ""
    if (page.count(MARK), page.count(END)) not in ((0, 0), (1, 1)) or page.find(END) < page.find(MARK):
        parser.error(f"{options.out} needs one {MARK!r} and, behind it, one {END!r}, or neither")
    section, setting = measured(options.data, options.step)
    show([section], setting, Console())
    if options.out:
        step = [] if options.step is None else ["--step", str(options.step)]
        command = shlex.join(["python", "bench/rewriting.py", "--data", "DATA", *step])
        head, _, rest = page.partition(MARK)
        tail = rest.partition(END)[2] or "\n"
        table = markdown([], [replace(section, note=f"{section.note} Made by `{command}`.")])
        options.out.write_text(f"{head}{MARK}\n\n{table}\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    main()
