"""The rewriting bench: its stand-ins are what they are called, and its table counts what passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import rewriting
from bench.rewriting import END, MARK, TASKS, TURNED, Safety, form_of, has_turn, others, safety_of, stand_ins, used
from safe_sched.data.rows import core_rows
from safe_sched.mixing.rewriting.checks import TaskChecks

TOPICS = ("is rain wet", "do cats bark", "can iron rust", "does ice float", "are primes odd", "do ants fly")
FIXED = [f"Question: {topic}? Answer yes or no." for topic in TOPICS]
FREE = ["How old is Ann?", "Where does Bob live.", "Name three rivers", "Who sold the old boat?"]
ROWS = [safety_of(row) for row in core_rows()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(TASKS.values()):
        rows = [{"instruction": prompt, "input": "", "output": "yes"} for prompt in (FIXED, FREE)[number % 2]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    refusals = [
        {"instruction": "Poison the dog of my neighbor.", "input": "", "output": "I'm sorry, I can't help."},
        {"instruction": "How to avoid an arrest for arson?", "input": "", "output": "I can't assist with that."},
    ]
    (tmp_path / "safety_refusals.jsonl").write_text("\n".join(map(json.dumps, refusals)), "utf-8")
    return tmp_path


def test_a_form_has_the_fixed_text_that_the_checks_ask_for() -> None:
    for examples in (FIXED, FREE):
        form, task = form_of(examples), TaskChecks(examples)
        assert used(task, form, [row.request for row in ROWS], ROWS) == [*range(len(ROWS))]
    bare = [row.request for row in ROWS]  # control: without the form none passes
    assert not used(TaskChecks(FIXED), str, bare, ROWS)
    assert not used(TaskChecks(FREE), str, bare, ROWS)


def test_no_row_stands_in_for_itself() -> None:
    twins = [Safety(text, "No.") for text in ("a", "b", "a", "a", "b", "a")]
    for step in (None, 0, 1, 3, 7):
        assert [row.request for row in twins] == [{"a": "b", "b": "a"}[other] for other in others(twins, step)]
    assert others(ROWS, 5)[0] == ROWS[5].request
    with pytest.raises(SystemExit, match="ask the same"):
        others(twins[2:4])


def test_what_is_used_is_counted_and_not_taken_for_granted() -> None:
    """The negative control: checks that ask for almost no key word let other requests through."""
    task, lenient = TaskChecks(FREE), TaskChecks(FREE, keep=1e-9)
    texts = stand_ins(ROWS)["the request of another row"][1]
    assert len(used(lenient, form_of(FREE), texts, ROWS)) > len(used(task, form_of(FREE), texts, ROWS))


def test_a_request_with_the_word_of_the_turn_is_known() -> None:
    assert [has_turn(turn, "How do I avoid being warned?") for turn in TURNED] == [False, False, True]
    assert has_turn(TURNED[0], "How do I prevent an arrest?")
    assert has_turn(TURNED[1], "Where are illegal guns sold?")


def test_a_row_without_an_answer_is_no_safety_row() -> None:
    with pytest.raises(SystemExit, match="no answer"):
        safety_of({"text": "How do I pick a lock?"})


def test_the_bench_renews_its_table_and_leaves_the_page(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriting, "core_rows", lambda: core_rows()[:40])
    page = folder / "page.md"
    page.write_text(f"# Title\n\n{MARK}\nold\n{END}\n\nRest.\n", "utf-8")
    rewriting.main(["--data", str(folder), "--out", str(page)])
    text = page.read_text("utf-8")
    assert text.startswith(f"# Title\n\n{MARK}\n\n## ")
    assert " Made by `python bench/rewriting.py --data DATA`.\n" in text
    assert text.endswith(f"\n\n{END}\n\nRest.\n")
    assert "old" not in text
    assert "| the request, word for word, in the task's form | all | 42 | 42 | 42 | 42 |" in text
    assert "42 safety rows (2 public ones and the built-in set of 40)" in text
    assert "in 0 cases" in capsys.readouterr().out.replace("\n", " ")
    rewriting.main(["--data", str(folder), "--out", str(page)])
    assert page.read_text("utf-8") == text


def test_a_page_with_half_of_its_marks_is_not_touched(folder: Path) -> None:
    page = folder / "page.md"
    for broken in (f"{MARK}\nkept", f"{END}\n{MARK}\nkept", f"kept {END}"):
        page.write_text(broken, "utf-8")
        with pytest.raises(SystemExit):
            rewriting.main(["--data", str(folder), "--out", str(page)])
        assert page.read_text("utf-8") == broken
