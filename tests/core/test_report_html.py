"""The HTML report as a file: what is in it, what is not, and that nothing of the data is markup."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from safe_sched.audit.findings import Bad
from safe_sched.audit.inputs import Inputs, opened_sources
from safe_sched.audit.run import audit
from safe_sched.errors import DataError, OptionError
from safe_sched.report import texts
from safe_sched.report.html import write_html
from safe_sched.report.summary import summary_json
from safe_sched.report.terminal import render
from tests.core.reports import NASTY, findings_of

SECRET = "the secret words of the row"
ROWS = [{"prompt": f"{SECRET} {i}?", "completion": f"answer\n{i}", "id": i} for i in range(4)]


class Reader(HTMLParser):
    """All elements of a page with their attributes, and the text in them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.text = ""
        self._tag = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._tag = f"data:{tag}" if ("id", "data") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        self.inside.setdefault(self._tag, []).append(data)
        if self._tag not in ("script", "style", "data:script"):
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads("".join(self.inside["data:script"]))


def written(folder: Path, found: Any, rows: Any = None, **options: Any) -> Reader:
    path = folder / "report.html"
    write_html(found, rows, path, **options)
    return Reader(path.read_text("utf-8"))


# what is in it ------------------------------------------------------------------------------------------------------


def test_the_rows_stand_in_it_with_all_that_is_known_of_them(tmp_path):
    found = findings_of(
        [0.1, 0.9, None, 0.6],
        signals={"a": [1.0, 2.0, float("nan"), 0.5], "b": [0.0, 0.0, 0.0, 1.0]},
        reasons={1: "opens by complying", 2: "not scored: no schema"},
        groups={1: "wrapper"},
    )
    rows = written(tmp_path, found, ROWS).data["rows"]
    assert rows["where"] == ["row 1", "row 3", "row 0", "row 2"]
    assert rows["p"] == [0.9, 0.6, 0.1, None]
    assert rows["low"] == pytest.approx([0.72, 0.48, 0.08, None], abs=1e-4)
    assert rows["flagged"] == [1, 1, 0, 0]
    assert rows["weight"] == [0.1, 0.4, 0.9, None]
    assert rows["reason"] == ["opens by complying", "", "", "not scored: no schema"]
    assert rows["group"] == ["wrapper", "signal: b", "", ""]
    assert rows["values"] == [[2.0, 0.5, 1.0, None], [0.0, 1.0, 0.0, 0.0]]
    assert rows["ranks"] == [[0.75, 0.25, 0.5, 0.0], [0.0, 0.75, 0.0, 0.0]]  # of 4 rows, those that have less


def test_no_probability_is_rounded_to_certainty(tmp_path):
    """But those that are certain stay so."""
    rows = written(tmp_path, findings_of([1.0, 0.9999999, 0.5, 1e-7, 0.0]), ROWS + ROWS[:1]).data["rows"]
    assert rows["p"] == [1.0, 0.9999, 0.5, 0.0001, 0.0]


def test_the_numbers_of_the_summary_stand_in_it(tmp_path):
    found = findings_of([0.9, 0.1, None], signals={"a": [1, 2, 3]}, bad=[Bad("x.jsonl, line 3", "not JSON")], limited=3)
    text = " ".join(written(tmp_path, found).text.split())
    for said in (
        "1 row looks like",
        "of 2 scored rows (50.0 %)",
        "50.0 %",
        "95 % interval 45.0 % to 55.0 %",
        "2 of 4 rows scored",
        "x.jsonl, line 3: not JSON",
        "limited to 3 rows",
        "what a sees",
        "safe-sched audit train.jsonl --out audit --report html --show-text",
    ):
        assert said in text


def test_an_audit_is_reported_as_it_is(tmp_path):
    """No findings made by hand: those of an audit, in all three forms."""
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"What is {i} plus {i + 1}?", "completion": f"It is {2 * i + 1}."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n" + '{"other": 1}\n')
    found = audit(str(path))
    page = written(tmp_path, found, str(path), show_text=True)
    told = summary_json(found)
    assert (told["rows"], told["scored"], told["bad_rows"]) == (61, 60, 2)
    assert "60 of 62 rows scored" in page.text
    assert {one["name"] for one in page.data["signals"]} == {one["name"] for one in told["signals"]}
    shown = page.data["rows"]
    for where, parts in zip(shown["where"], shown["parts"], strict=True):
        line = int(where.rpartition(" ")[2])
        texts_of = None if line == 62 else [rows[line - 1]["prompt"], rows[line - 1]["completion"]]
        assert (None if parts is None else [part[3] for part in parts]) == texts_of
    screen = io.StringIO()
    Console(file=screen, width=120).print(render(found))
    assert "60 of 62 rows" in screen.getvalue()


def test_texts_are_redacted_unless_asked_for(tmp_path):
    """Control: with show_text, the very same search finds them."""
    found = findings_of([0.9] * 4, signals={"a": [1.0] * 4})
    page = written(tmp_path, found, ROWS)
    assert page.data["rows"]["parts"][0] == [["user", len(SECRET) + 3, 1, None], ["assistant", 8, 2, None]]
    assert SECRET not in (tmp_path / "report.html").read_text()
    shown = written(tmp_path, found, ROWS, show_text=True)
    assert shown.data["rows"]["parts"][2] == [
        ["user", len(SECRET) + 3, 1, f"{SECRET} 2?"],
        ["assistant", 8, 2, "answer\n2"],
    ]
    assert SECRET in (tmp_path / "report.html").read_text()


def test_a_role_that_the_data_made_up_is_not_shown(tmp_path):
    rows = [{"messages": [{"role": SECRET, "content": "a"}, {"role": "assistant", "content": "b"}]}]
    page = written(tmp_path, findings_of([0.9]), rows)
    assert page.data["rows"]["parts"][0][0] == ["another role", 1, 1, None]
    assert SECRET not in (tmp_path / "report.html").read_text()


def test_long_texts_are_cut_and_many_of_them_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BUDGET", 2 * texts.LONGEST)
    long = {"prompt": "x" * 3 * texts.LONGEST, "completion": ""}
    many = {"messages": [{"role": "user", "content": "y"}] * (texts.PARTS + 5)}
    parts = written(tmp_path, findings_of([0.9] * 3), [long, long, many], show_text=True).data["rows"]["parts"]
    assert parts[0] == [["user", 3 * texts.LONGEST, 1, "x" * texts.LONGEST], ["assistant", 0, 1, ""]]
    assert parts[1] == [["user", 3 * texts.LONGEST, 1, None], ["assistant", 0, 1, None]]
    assert parts[2][-1] == ["5 more texts", 5, 0, None]
    assert len(parts[2]) == texts.PARTS + 1


def test_rows_come_from_whatever_was_audited(tmp_path):
    """A path, a list of rows, any iterator, and what the audit itself reads: the same report."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]) + "no row\n" + json.dumps(ROWS[2]) + "\n")
    found = findings_of([0.9] * 3, where=[f"{path}, line {n}" for n in (1, 2, 4)])
    pages = []
    for source in (path, [str(path)], ROWS[:3], iter(ROWS[:3]), Inputs(opened_sources(str(path), None))):  # type: ignore
        write_html(found, source, tmp_path / "report.html", show_text=True)
        pages.append((tmp_path / "report.html").read_text())
    assert len(set(pages)) == 1
    assert f"{SECRET} 2?" in pages[0]


def test_rows_that_no_schema_fits_are_shown_as_not_read(tmp_path):
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    rows = [{"prompt": "a", "completion": "b"}, {"other": 1}, {"messages": deep}]
    for source in (rows, iter(rows)):
        page = written(tmp_path, findings_of([0.9] * 3), source, show_text=True)
        assert page.data["rows"]["parts"][1:] == [None, None]


def test_more_rows_than_fit_are_counted(tmp_path):
    """The worst are kept; how many are not, and how many of those are flagged, is said."""
    page = written(tmp_path, findings_of([0.9, 0.8, 0.7, 0.1], reasons={3: "odd"}), max_rows=2)
    assert page.data["rows"]["where"] == ["row 0", "row 1"]
    assert "2 more rows that are flagged or spoken of are not in this table, 1 of them flagged" in " ".join(
        page.text.split()
    )
    assert "not in this table" not in written(tmp_path, findings_of([0.9, 0.1])).text


@pytest.mark.parametrize("p", [[], [None], [0.1], [0.9], [0.0, 1.0], [None, 0.5]])
@pytest.mark.parametrize("signals", [0, 1, 2])
def test_there_is_a_report_of_the_least_that_can_be_found(tmp_path, p, signals):
    found = findings_of(p, signals={name: [1.0] * len(p) for name in "ab"[:signals]})
    assert len(written(tmp_path, found).data["rows"]["p"]) == sum(one is not None for one in p)


# what is not --------------------------------------------------------------------------------------------------------


def everywhere(nasty: str) -> dict[str, Any]:
    return {
        "reasons": {0: nasty},
        "groups": {0: nasty},
        "where": [nasty, "row 1"],
        "bad": [Bad(nasty, nasty)],
        "sources": (nasty,),
        "calibration": nasty,
        "model": nasty,
        "versions": {"a": nasty},
    }


def shape(page: Reader) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(attributes)) for tag, attributes in page.elements]


NASTY_ROW = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def page_of(folder: Path, text: str) -> Reader:
    """A page that has a text wherever the data may put one."""
    found = findings_of([0.9, 0.1], signals={"a": [1.0, 2.0], "b": [2.0, 1.0]}, **everywhere(text))
    rows = [{"prompt": text, "completion": text}, {"messages": [{"role": text, "content": text}]}]
    return written(folder, found, rows, show_text=True)


@pytest.fixture(scope="module")
def plain_shape(tmp_path_factory) -> Any:
    return shape(page_of(tmp_path_factory.mktemp("plain"), "x"))


@settings(max_examples=30, deadline=None)
@given(nasty=NASTY_ROW.filter(lambda text: text.strip()))
def test_the_data_adds_no_element_and_no_attribute(tmp_path_factory, plain_shape, nasty):
    """A page of nasty texts has the elements of the page of plain ones."""
    assert shape(page_of(tmp_path_factory.mktemp("page"), nasty)) == plain_shape


def test_that_test_would_see_markup(tmp_path):
    """Control: the same text where it is not escaped is elements."""
    page = "<p>" + NASTY[3] + "</p>"
    assert ("img", {"src": "x", "onerror": "window.broken = 3"}) in Reader(page).elements


def test_nothing_invisible_and_no_control_character_is_in_it(tmp_path):
    nasty = "".join(NASTY)
    rows = [{"prompt": nasty, "completion": nasty}] * 2
    write_html(findings_of([0.9, 0.1], **everywhere(nasty)), rows, tmp_path / "report.html", show_text=True)
    page = (tmp_path / "report.html").read_text()
    assert not set("\x00\x01\x07\x1b\x9b\u202e\u2066\u200b\u2028\ufeff") & set(page)
    assert "\\u202eevil" in page
    assert all(one not in json.dumps(Reader(page).data, ensure_ascii=False) for one in "\u202e\u2066\u200b\x1b")


def test_the_policy_names_the_hashes_of_the_one_script_and_the_one_style(tmp_path):
    """A browser runs nothing else; `tests/browser` shows that it does run these."""
    page = written(tmp_path, findings_of([0.9], signals={"a": [1.0]}))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in str(policy)
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        (text,) = page.inside[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[directive] == f"'sha256-{digest}'"


def test_the_file_refers_to_nothing_outside(tmp_path):
    page = written(tmp_path, findings_of([0.9], signals={"a": [1.0]}))
    for _, attributes in page.elements:
        assert not {"style", "onclick", "onload", "action", "srcset"} & set(attributes)
        for name in ("src", "href"):
            assert re.fullmatch(r"#\w+|data:,", attributes.get(name) or "data:,")
    assert "url(" not in "".join(page.inside["style"])
    addresses = set(re.findall(r"\w+://[^\s\"']*", (tmp_path / "report.html").read_text()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches
    script = "".join(page.inside["script"])
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "fetch("):
        assert forbidden not in script


def test_the_same_findings_are_the_same_bytes(tmp_path):
    found = findings_of([0.9, 0.2, 0.3], signals={"a": [1.0, 3.0, 2.0], "b": [1.0, 3.0, 2.0]})
    for name in ("a", "b"):
        write_html(found, None, tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# errors -------------------------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path):
    path, found = tmp_path / "report.html", findings_of([0.9, 0.8])
    path.write_text("old")
    for source, options, error, said in (
        (ROWS[:1], {}, DataError, "the rows end before row 1"),
        (None, {"show_text": True}, OptionError, "rows_source is None"),
        (None, {"max_rows": 0}, OptionError, "max_rows is 0; give"),
    ):
        with pytest.raises(error, match=said):
            write_html(found, source, path, **options)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(DataError, match=r"row 0 is .*line 1, but was row 0 in the audit"):
        write_html(found, train, path)
    assert path.read_text() == "old"
    with pytest.raises(OptionError, match="no regular file"):
        write_html(found, None, tmp_path)
    with pytest.raises(OptionError, match="cannot be written: No such file"):
        write_html(found, None, tmp_path / "nowhere" / "report.html")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["report.html", "train.jsonl"]
