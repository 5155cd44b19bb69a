"""The table in docs/compatibility.md, from what the test suite has run.

A test says what it shows with ``@pytest.mark.compat("packing", "sft")``, or is named in `FEATURES` below, in the order
of the table. While tests run, their outcomes are kept in pytest's cache, by the versions they ran with::

    python -m pytest tests/hf -m "slow or not slow" --compat     # the tests of the table, and no others
    python -m tests.compat                                       # writes the table

`make compat` does both, and runs tests with Axolotl and the versions it pins besides.

What is refused is marked ``@pytest.mark.compat("prompt tuning", "refused", reason="...")``, or named in `REFUSED`.

A feature has a tick where every test of it that ran has passed, and a blank where none ran.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

COLUMNS = {
    "hf": "HF Trainer",
    "sft": "TRL SFTTrainer",
    "trl": "`safe-sched trl sft`",
    "axolotl": "Axolotl",
}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "axolotl")
_REFUSED = "refused"
CACHE = "safe_sched/compat"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- compat: written by tests/compat.py -->", "<!-- compat: end -->"

_HF, _SFT = "test_gradients.py::test_hf_*", "test_gradients.py::test_sft_*"
_TRL = "test_trl_cli.py::test_a_yaml_does_what*"

_ADAPTERS = (
    "DoRA",
    "rsLoRA",
    "IA3",
    "VeRA",
    "AdaLoRA",
    "LoHa",
    "LoKr",
    "OFT",
    "LN tuning",
    "prefix tuning",
    "trained tokens",
    "QLoRA (4 bits)",
    "LoRA on 8 bits",
)

# tests by feature and column, as patterns of their names without the folder; a marker adds to them
FEATURES: dict[str, dict[str, list[str]]] = {
    "full fine-tuning": {"hf": [_HF + ".plain?"], "sft": [_SFT + ".fused head?"], "trl": [_TRL + "full?"]},
    "LoRA": {"sft": [_SFT + "LoRA*"], "trl": [_TRL + "lora?"]},
    # adapters: the place in the table; the tests are marked
    **{name: {} for name in _ADAPTERS},
    "tied output embedding": {"hf": [_HF + "tied*"], "sft": [_SFT + "tied*"]},
    "gradient accumulation": {"hf": [_HF + "accumulation*"], "sft": [_SFT + "accumulation*"]},
    "a last step that is smaller": {"sft": [_SFT + "last step smaller?"]},
    "gradient checkpointing": {"hf": [_HF + "checkpointing*"], "sft": [_SFT + "checkpointing*"]},
    "bfloat16": {
        "hf": ["test_gradients.py::test_bf16*make_hf?", "test_untouched.py::*hf*bf16?"],
        "sft": ["test_gradients.py::test_bf16*make_sft?", "test_untouched.py::*sft*bf16?"],
    },
    "label smoothing": {"hf": [_HF + "label smoothing?"], "sft": [_SFT + "label smoothing?"]},
    '`loss_type="dft"`': {"sft": [_SFT + "dft?"]},
    "padding on the left": {"hf": [_HF + "padding left*"]},
    "padding to a multiple": {"sft": [_SFT + "padded to a multiple?"]},
    "packing": {"sft": [_SFT + "packing*"], "trl": [_TRL + "packed?"]},
    "padding-free batches": {"sft": [_SFT + "padding-free?"]},
    "TRL's loss with `loss_type: nll` (a fused head in 1.16)": {"sft": [_SFT + ".fused head*"]},
    "loss inside the model, from logits": {"hf": [_HF + ".plain?"], "sft": [_SFT + "in-model loss*"]},
    "fused loss without logits, output embedding frozen (`Fixed`, `Antibody`)": {
        "hf": [_HF + "fused in-model loss, head frozen?"]
    },
    "equal weights: the untouched run, bit for bit": {
        "hf": ["test_untouched.py::test_equal_weights_leave_hf*"],
        "sft": ["test_untouched.py::test_equal_weights_leave_sft*"],
        "trl": ["test_trl_cli.py::test_equal_weights_change_nothing"],
    },
    "streamed training sets": {"sft": ["test_setup.py::test_a_stream_is_defended_row_by_row"]},
    "conversations": {"sft": ["test_setup.py::test_conversations_are_trained_and_told_apart"]},
    "rows mixed in": {
        "sft": ["test_mix.py::test_trl_trains_on_every_row_of_a_mix*"],
        "trl": ["test_trl_cli.py::test_mixed_rows_are_trained_on"],
    },
    "`BDS`: the probe leaves no trace": {
        "hf": ["test_probe.py::test_measuring_leaves_no_trace_in_hf*"],
        "sft": ["test_probe.py::test_measuring_leaves_no_trace_in_sft*"],
    },
    "`NeuralBDS`: features from hidden states": {
        "hf": ["test_features.py::test_a_trainer_shows*.hf?"],
        "sft": ["test_features.py::test_a_trainer_shows*.sft*"],
    },
    "`Antibody`: the ratios leave no trace": {
        "hf": ["test_antibody.py::test_taking_ratios_leaves_no_trace_in_hf*"],
        "sft": ["test_antibody.py::test_taking_ratios_leaves_no_trace_in_sft*"],
    },
    "`Lisa`": {
        "hf": ["test_lisa.py::test_a_run_is_the_slow_loop_of_the_paper*hf*"],
        "sft": ["test_lisa.py::test_a_run_is_the_slow_loop_of_the_paper*sft*"],
    },
    '`act="sample"`': {
        "hf": ["test_sampling.py::test_a_step_teaches*make_hf*"],
        "sft": ["test_sampling.py::test_a_step_teaches*make_sft*"],
    },
    "`FlatAlignmentCallback`": {
        "hf": ["test_alignment.py::test_gradients_are_those_of_the_equations.hf*"],
        "sft": ["test_alignment.py::test_gradients_are_those_of_the_equations.sft*"],
    },
    "evaluation during training": {
        "hf": ["test_untouched.py::test_evaluation_is_untouched.make_hf?"],
        "sft": ["test_untouched.py::test_evaluation_is_untouched.make_sft?"],
    },
    "save and resume, bit for bit": {
        "hf": ["test_resume.py::test_a_resumed_run_equals*hf*"],
        "sft": [
            "test_resume.py::test_a_resumed_run_equals*sft*",
            "test_faults.py::test_a_fault_stops*",
            "test_faults.py::test_every_method_goes_on*",
        ],
        "trl": ["test_trl_cli.py::test_a_resume_goes_on"],
    },
    "kill -9, then resume": {"sft": ["test_faults.py::test_a_killed_run_goes_on_where_it_was"]},
    "two trainers in one process": {"sft": ["test_setup.py::test_two_trainers_in_one_process_do_not_meet"]},
    "started by `accelerate launch`": {"trl": ["test_trl_cli.py::test_processes_that_accelerate_starts*"]},
}

# what is refused, why, and the tests that show it
REFUSED: dict[str, tuple[str, str]] = {
    "a fused loss with a trainable output embedding": (
        "the weights could not reach the embedding's gradient",
        "test_setup.py::test_a_fused_loss_with_a_trainable_head_is_refused",
    ),
    "a fused loss with a method that reads row losses": (
        "the loss of a single row is never computed",
        "test_setup.py::test_a_fused_loss_is_refused_where_row_losses_are_needed",
    ),
    "TRL's chunked loss before its fused head (the default of 1.9; name `loss_type: nll`)": (
        "it never shows logits",
        "test_setup.py::test_the_default_loss_of_older_trl_is_refused_with_its_name",
    ),
    "collators that change rows at run time": (
        "a row that cannot be recognised cannot be weighed",
        "test_setup.py::test_a_row_that_changes_at_run_time_stops_the_run",
    ),
    "a loss that does not come from the model's outputs": (
        "the weights would not reach it",
        "test_setup.py::test_a_loss_that_bypasses_the_gate_stops_the_run",
    ),
    "`Lisa` with an optimiser that steps within the backward": (
        "its pull must be added before the step",
        "test_lisa.py::test_an_optimiser_that_steps_within_the_backward_is_refused*",
    ),
}


def shown_by(name: str, marks: Iterable[tuple[str, str]] = ()) -> set[tuple[str, str]]:
    """Which cells of the table a test stands for.

    Example:
        >>> sorted(shown_by("tests/hf/test_untouched.py::test_evaluation_is_untouched[make_hf]"))
        [('evaluation during training', 'hf')]
    """
    plain = name.rpartition("/")[2].replace("[", ".", 1)
    found = {
        (feature, column)
        for feature, columns in FEATURES.items()
        for column, patterns in columns.items()
        if any(fnmatch.fnmatchcase(plain, pattern) for pattern in patterns)
    }
    refused = {(what, _REFUSED) for what, (_, pattern) in REFUSED.items() if fnmatch.fnmatchcase(plain, pattern)}
    return found | refused | set(marks)


class Collector:
    """Keeps the outcomes of the tests that stand for a cell."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.marks: dict[str, list[tuple[str, str]]] = {}
        self.outcomes: dict[str, bool] = {}
        self.reasons: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Note which tests count; with --compat, leave the others out."""
        for item in items:
            marks = []
            for mark in item.iter_markers("compat"):
                feature, column = mark.args
                if column not in COLUMNS and not (column == _REFUSED and "reason" in mark.kwargs):
                    allowed = ", ".join([*COLUMNS, "refused with reason=..."])
                    raise pytest.UsageError(f"{item.nodeid}: compat column {column!r}; allowed: {allowed}")
                marks.append((feature, column))
                if column == _REFUSED:
                    self.reasons[feature] = mark.kwargs["reason"]
            if shown_by(item.nodeid, marks):
                self.marks[item.nodeid] = marks
        if config.getoption("--compat", default=False):
            left = [item for item in items if item.nodeid not in self.marks]
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item.nodeid in self.marks]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts as passed where its call did, and as failed where anything of it did."""
        if report.nodeid in self.marks:
            if report.failed:
                self.outcomes[report.nodeid] = False
            elif report.when == "call" and report.passed:
                self.outcomes.setdefault(report.nodeid, True)

    def pytest_sessionfinish(self) -> None:
        """Put this session's outcomes beside those of earlier ones with the same versions."""
        cache = getattr(self.config, "cache", None)
        if cache is None or not self.outcomes:
            return
        found = versions()
        key = f"{CACHE}/{'_'.join(f'{name}-{version}' for name, version in found.items())}".replace("+", "-")
        kept = cache.get(key, None) or {"versions": found, "tests": {}}
        for name, passed in self.outcomes.items():
            told = {feature: self.reasons[feature] for feature, column in self.marks[name] if column == _REFUSED}
            kept["tests"][name] = {"passed": passed, "marks": self.marks[name], "reasons": told}
        cache.set(key, kept)


def versions() -> dict[str, str]:
    """Of the packages that matter and are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(runs: Iterable[Mapping[str, Any]]) -> str:
    """The tables of some sets of versions, in Markdown.

    Example:
        >>> test = {"passed": True, "marks": [["packing", "sft"]]}
        >>> print(table([{"versions": {"trl": "1.16.0"}, "tests": {"a": test, "b": test}}]))
        With trl 1.16.0:
        <BLANKLINE>
        | | TRL SFTTrainer |
        |---|---|
        | packing | ✓ 2 |
    """
    parts, refused = [], {}
    for run in runs:
        counts: dict[tuple[str, str], list[int]] = {}
        for name, test in run["tests"].items():
            for feature, column in shown_by(name, [(feature, column) for feature, column in test.get("marks", [])]):
                if column == _REFUSED and test["passed"]:
                    refused[feature] = test["reasons"].get(feature) or REFUSED[feature][0]
                counts.setdefault((feature, column), []).append(bool(test["passed"]))
        columns = [column for column in COLUMNS if any(column == one for _, one in counts)]
        features = [*FEATURES, *sorted({one for one, column in counts if column != _REFUSED} - FEATURES.keys())]
        lines = [
            f"With {', '.join(f'{name} {version}' for name, version in run['versions'].items())}:",
            "",
            f"| | {' | '.join(COLUMNS[column] for column in columns)} |",
            "|---|" + "---|" * len(columns),
        ]
        for feature in features:
            cells = [counts.get((feature, column)) for column in columns]
            if any(cells):
                said = ["" if not cell else f"✓ {len(cell)}" if all(cell) else f"✗ {cell.count(0)}" for cell in cells]
                lines.append(f"| {feature} | {' | '.join(said)} |")
        parts.append("\n".join(lines))
    if refused:
        lines = ["Refused:", "", "| what | why |", "|---|---|"]
        order = [*REFUSED, *sorted(refused.keys() - REFUSED.keys())]
        parts.append("\n".join(lines + [f"| {what} | {refused[what]} |" for what in order if what in refused]))
    return "\n\n".join(parts)


def written(page: str, text: str) -> str:
    """A page with another table between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no lines {BEGIN!r} and {END!r} to write between")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(folder: Path, page: Path) -> None:
    """Write the table from pytest's cache."""
    files = [path for path in sorted((folder / "v" / CACHE).glob("*")) if path.is_file()]
    if not files:
        raise SystemExit(f'nothing in {folder} yet: run python -m pytest tests/hf -m "slow or not slow" --compat first')
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    runs.sort(key=lambda run: "axolotl" in run["versions"])
    page.write_text(written(page.read_text(encoding="utf-8"), table(runs)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE.parent.parent / ".pytest_cache", PAGE)
