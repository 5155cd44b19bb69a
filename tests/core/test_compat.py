"""The table in docs/compatibility.md: what fills it, and that the page has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.compat import BEGIN, CACHE, END, FEATURES, PAGE, main, shown_by, table, written


def run(**tests: Any) -> dict[str, Any]:
    told = {name: {"passed": passed, "marks": cells, "reasons": {}} for name, (passed, cells) in tests.items()}
    return {"versions": {"trl": "1.0"}, "tests": told}


def test_one_test_that_fails_takes_the_tick() -> None:
    good, bad = (True, [["packing", "sft"], ["LoRA", "hf"]]), (False, [["packing", "sft"]])
    assert "| packing | ✓ 2 |" in table([run(a=(True, [["packing", "sft"]]), b=(True, [["packing", "sft"]]))])
    found = table([run(a=good, b=bad, c=good)])
    assert "| LoRA | ✓ 2 |  |" in found
    assert "| packing |  | ✗ 1 |" in found
    assert "tied" not in found  # it did not run


def test_a_marker_adds_a_line() -> None:
    assert shown_by("tests/axolotl/test_x.py::test_a", [("another feature", "axolotl")]) == {
        ("another feature", "axolotl")
    }
    assert "| another feature | ✓ 1 |" in table([run(a=(True, [["another feature", "axolotl"]]))])
    assert shown_by("tests/hf/test_gradients.py::test_hf_gradients_are_those[tied]") == {
        ("tied output embedding", "hf")
    }


def test_what_is_refused_is_said_with_its_reason() -> None:
    (cell,) = shown_by("tests/hf/test_setup.py::test_a_row_that_changes_at_run_time_stops_the_run")
    assert cell == ("collators that change rows at run time", "refused")
    told = run(a=(True, [["packing", "sft"], ["prompt tuning", "refused"]]), b=(False, [["LoRA", "refused"]]))
    told["tests"]["a"]["reasons"] = {"prompt tuning": "because"}
    told["tests"]["b"]["reasons"] = {"LoRA": "it is not refused: the test has failed"}
    found = table([told])
    assert "| prompt tuning | because |" in found
    assert "LoRA" not in found
    assert found.count("prompt tuning") == 1


def test_the_page_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    (tmp_path / "v" / CACHE).mkdir(parents=True)
    (tmp_path / "v" / CACHE / "x").write_text(json.dumps(run(a=(True, [["packing", "sft"]]))))
    main(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("\n\nafter\n")
    assert "| packing | ✓ 1 |" in text
    assert "old" not in text
    with pytest.raises(SystemExit, match="nothing in"):
        main(tmp_path / "none", page)
    with pytest.raises(SystemExit, match="no lines"):
        written("a page without marks", "")


def test_the_page_has_every_feature() -> None:
    """Whoever adds a feature runs its tests and writes the page anew."""
    page = PAGE.read_text(encoding="utf-8")
    missing = [feature for feature in FEATURES if f"| {feature} |" not in page]
    assert not missing
    assert "✗" not in page
