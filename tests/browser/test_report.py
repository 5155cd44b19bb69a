"""The HTML report in a real browser: it sorts, filters and expands, runs nothing of the data, and asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_sched.audit.findings import Bad
from safe_sched.report.html import MOST, write_html
from tests.browser.devtools import CHROMIUM, Page, browser
from tests.core.reports import NASTY, findings_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")

ROWS = 250
P = [i / ROWS for i in range(ROWS)]
PLACES = "#rows-table > tbody > tr:not(.detail) > td:nth-child(2)"
SEEN = f"[...document.querySelectorAll({PLACES!r})].map((one) => one.textContent)"
COUNT = "document.getElementById('count').textContent"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


def plain(path: Path, **options: Any) -> None:
    """A report on 250 rows: row i has p_harmful i / 250, and every third one is in a group."""
    rng = np.random.default_rng(0)
    found = findings_of(
        P,
        signals={"first": P, "second": [i if i % 2 else float("nan") for i in range(ROWS)], "third": rng.random(ROWS)},
        groups={i: f"group {i % 2}" for i in range(0, ROWS, 3)},
        reasons={i: "opens by complying" for i in range(0, ROWS, 5)},
        bad=[Bad("train.jsonl, line 9", "not JSON")],
    )
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(ROWS)]
    write_html(found, rows, path, **options)


@pytest.fixture
def report(page: Page, tmp_path: Path) -> Page:
    plain(tmp_path / "report.html", show_text=True)
    page.open(tmp_path / "report.html")
    return page


def names(rows: Any) -> list[str]:
    return [f"row {i}" for i in rows]


def choose(page: Page, field: str, value: Any) -> None:
    """As a user does: the field gets the value, and says so."""
    page.run(
        f"""(() => {{
            const field = document.getElementById({field!r});
            if (field.type === "checkbox") field.checked = {json.dumps(bool(value))};
            else field.value = {json.dumps(str(value))};
            field.dispatchEvent(new Event("input", {{ bubbles: true }}));
            field.dispatchEvent(new Event("change", {{ bubbles: true }}));
        }})()"""
    )


def sort(page: Page, column: str) -> str | None:
    """Click the head of a column; how it says it is sorted."""
    return page.run(
        f"""(() => {{
            const all = [...document.querySelectorAll("#rows-table th button")];
            const button = all.find((one) => one.textContent.startsWith({column!r}));
            button.click();
            return button.closest("th").getAttribute("aria-sort");
        }})()"""
    )


# it works -----------------------------------------------------------------------------------------------------------


def test_the_report_complains_of_nothing_and_asks_for_nothing_but_itself(report, tmp_path):
    assert report.complaints() == []
    assert report.requests() == [(tmp_path / "report.html").resolve().as_uri()]
    assert report.run("document.querySelectorAll('svg').length") >= 4
    assert report.run("getComputedStyle(document.querySelector('.figure')).fontSize") == "36px"  # the style is in force


def test_that_test_would_see_complaints_and_requests(page, tmp_path):
    """Control: a page that logs, throws, and loads."""
    other = tmp_path / "other.html"
    other.write_text(
        "<meta http-equiv=Content-Security-Policy content=\"img-src 'none'\"><img src=x.png>"
        "<link rel=stylesheet href=missing.css><script>console.log('a')</script><script>throw new Error('b')</script>"
    )
    page.open(other)
    told = " ".join(page.complaints())
    assert all(
        one in told for one in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Content Security Policy")
    )
    assert any(address.endswith("missing.css") for address in page.requests())


def test_rows_come_worst_first_a_hundred_at_a_time(report):
    worst = names(reversed(range(125, ROWS)))
    assert report.run(SEEN) == worst[:100]
    assert "100 shown" in report.run(COUNT)
    report.run("document.getElementById('more').click()")
    assert report.run(SEEN)[: len(worst)] == worst


def test_columns_sort_both_ways(report):
    """Names by the numbers in them; what is not there comes last either way."""
    assert sort(report, "row") == "ascending"
    assert report.run(SEEN)[:3] == names([0, 5, 10])
    assert sort(report, "row") == "descending"
    assert report.run(SEEN)[:3] == names([249, 248, 247])
    assert sort(report, "p_harmful") == "descending"
    assert report.run(SEEN)[0] == "row 249"
    assert sort(report, "p_harmful") == "ascending"
    assert report.run(SEEN)[:2] == names([0, 5])
    for _ in range(2):
        sort(report, "group")
        found = report.run(SEEN)
        assert int(found[0].split()[1]) % 3 == 0 or int(found[0].split()[1]) >= 125
    assert report.run("document.querySelectorAll('#rows-table th[aria-sort]').length") == 1
    assert report.complaints() == []


def test_filters_leave_the_rows_that_fit(report):
    choose(report, "filter-p", 0.9)
    assert report.run(SEEN) == names(reversed(range(225, ROWS)))
    choose(report, "filter-text", "QUESTION 23")
    assert report.run(SEEN) == names(reversed(range(230, 240)))
    choose(report, "filter-text", "opens by")
    assert report.run(SEEN) == names([245, 240, 235, 230, 225])
    report.run("document.querySelector('#filters button[type=reset]').click()")
    report.run("new Promise((done) => setTimeout(done, 50))")
    choose(report, "filter-flagged", True)
    assert report.run(COUNT).startswith("125 of ")
    choose(report, "filter-signal", 1)  # of which even rows have nothing; sorts by it
    assert report.run(SEEN) == names(range(249, 124, -2))
    choose(report, "filter-text", "nobody wrote this")
    assert report.run(SEEN) == []
    assert report.run(COUNT).startswith("0 of ")
    assert report.complaints() == []


def test_a_group_shows_its_rows(report):
    shown = report.run(
        """(() => {
            const button = [...document.querySelectorAll("button.show")].find((one) => one.dataset.group === "group 1");
            button.click();
            return new Promise((done) => setTimeout(done, 50));
        })().then(() => """
        + SEEN
        + ")"
    )
    expected = [i for i in range(0, ROWS, 3) if i % 2 and (i >= 125 or i % 5 == 0 or i >= 50)]
    assert sorted(shown) == sorted(names(expected))


def test_a_row_expands_and_closes_by_keyboard(report):
    """Tab reaches it, Enter opens it, and again closes it; who does not see it is told."""
    button = "document.querySelector('button.open')"
    report.run(f"{button}.focus()")
    assert report.run(f"{button}.getAttribute('aria-expanded')") == "false"
    report.press("Enter", 13, "\r")
    assert report.run(f"{button}.getAttribute('aria-expanded')") == "true"
    text = report.run("document.querySelector('.detail').innerText")
    for said in ("question 249", "answer 249", "user", "assistant", "first", "second", "third", "0.996"):
        assert said in text
    report.press("Tab", 9)
    assert report.run("document.activeElement.tagName") == "PRE"  # long texts scroll
    report.run(f"{button}.focus()")
    report.press("Enter", 13, "\r")
    assert report.run("document.querySelectorAll('.detail').length") == 0
    assert report.complaints() == []


def test_redacted_rows_show_how_long_they_are(page, tmp_path):
    plain(tmp_path / "report.html")
    page.open(tmp_path / "report.html")
    page.run("document.querySelector('button.open').click()")
    text = page.run("document.querySelector('.detail').innerText")
    assert "12 characters, 1 line" in text
    assert page.run("document.querySelectorAll('.detail .redacted').length") == 2
    assert "question" not in page.run("document.documentElement.outerHTML")


def test_two_signals_stand_against_each_other(report):
    dots = "document.querySelectorAll('#scatter-plot circle').length"
    choose(report, "scatter-x", 1)
    choose(report, "scatter-y", 0)
    assert report.run(dots) == ROWS
    choose(report, "scatter-y", 2)
    assert report.run(dots) == ROWS
    places = "[...document.querySelectorAll('#scatter-plot circle')].map((one) => Number(one.getAttribute('cy')))"
    found = report.run(places)
    assert found.count(max(found)) == ROWS // 2  # of which the signal says nothing
    choose(report, "scatter-ranks", False)
    assert report.run(dots) == ROWS // 2  # they have no value
    assert report.complaints() == []


def test_every_field_has_a_label_and_every_picture_a_name(report):
    """Asked of the browser's own accessibility tree."""
    report.run("document.querySelector('button.open').click()")
    nodes = report.ask("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "textbox", "searchbox", "spinbutton", "combobox", "checkbox", "image", "link", "table", "region"}
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in named
    ]
    assert {"button", "searchbox", "spinbutton", "combobox", "checkbox", "image"} <= {role for role, _ in seen}
    assert [role for role, name in seen if not name.strip() and role not in ("table", "region")] == []
    unlabelled = report.run(
        """[...document.querySelectorAll("input, select")]
            .filter((field) => ![...field.labels].some((label) => label.firstChild.textContent.trim()
                || label.lastChild.textContent.trim())).map((field) => field.id)"""
    )
    assert unlabelled == []  # a placeholder alone goes away when one types


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(report, scheme):
    """Contrast of text and background as WCAG 2 has it: at least 4.5 wherever there is text."""
    report.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    report.run("document.querySelector('button.open').click()")
    poor = report.run(
        """(() => {
            const lights = (text) => text.match(/[\\d.]+/g).map(Number);
            const shine = ([r, g, b]) => [r, g, b].map((one) => one / 255)
                .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
                .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
            const behind = (element) => {
                for (let one = element; one; one = one.parentElement) {
                    const color = lights(getComputedStyle(one).backgroundColor);
                    if (color.length === 3 || color[3] === 1) return color;
                }
                return [255, 255, 255];
            };
            const poor = new Set();
            const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walk.nextNode()) {
                const element = walk.currentNode.parentElement;
                if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue;
                if (element.closest("script, option, title")) continue;
                const style = getComputedStyle(element);
                const ink = element.closest("svg") ? style.fill : style.color;
                const [a, b] = [shine(lights(ink)), shine(behind(element))];
                const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                if (contrast < 4.5) poor.add(`${walk.currentNode.data.trim()} ${contrast.toFixed(2)}`);
            }
            return [...poor];
        })()"""
    )
    report.ask("Emulation.setEmulatedMedia", features=[])
    assert poor == []


def test_on_a_narrow_screen_only_tables_and_charts_scroll_sideways(report):
    report.ask("Emulation.setDeviceMetricsOverride", width=380, height=800, deviceScaleFactor=1, mobile=False)
    wide = report.run("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    report.ask("Emulation.clearDeviceMetricsOverride")
    assert not wide


# it is safe ---------------------------------------------------------------------------------------------------------


def test_nothing_of_the_data_runs_or_loads(page, tmp_path):
    """Every field of the findings and of the rows is an attack, all of it is opened, sorted and searched."""
    attacks = NASTY * 3
    found = findings_of(
        [0.9] * len(attacks),
        signals={"a": np.arange(len(attacks)).tolist(), "b": [1.0] * len(attacks)},
        reasons=dict(enumerate(attacks)),
        groups=dict(enumerate(attacks)),
        where=attacks,
        bad=[Bad(one, one) for one in attacks],
        sources=tuple(attacks),
        calibration=" ".join(NASTY),
        model=NASTY[0],
        versions=dict(zip(NASTY, NASTY, strict=True)),
    )
    rows = [
        {
            "messages": [
                {"role": one, "content": one},
                {"role": "user", "content": one},
                {"role": "assistant", "content": one},
            ]
        }
        for one in attacks
    ]
    write_html(found, rows, tmp_path / "report.html", show_text=True, then=" ".join(NASTY))
    page.open(tmp_path / "report.html")
    for column in ("row", "p_harmful", "flagged", "weight", "reason", "group"):
        sort(page, column)
    page.run("document.querySelectorAll('button.open').forEach((button) => button.click())")
    page.run("document.querySelectorAll('button.show').forEach((button) => button.click())")
    page.run("document.querySelector('#filters button[type=reset]').click()")
    page.run("new Promise((done) => setTimeout(done, 100))")
    for text in NASTY:
        choose(page, "filter-text", text)
    choose(page, "filter-text", "window.broken = 1")
    assert len(page.run(SEEN)) == 3 * sum("window.broken = 1" in one for one in NASTY)
    assert page.run("window.broken") is None
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('img, iframe, base, object, embed, form[action]').length") == 0
    assert page.run("Object.prototype.x") is None
    assert page.complaints() == []
    assert page.requests() == [(tmp_path / "report.html").resolve().as_uri()]


def test_the_policy_stops_what_the_escaping_might_miss(page, tmp_path):
    """A report into which markup was put by force: no script of it runs, nothing loads, and innerHTML is refused."""
    plain(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    forced = (
        "<script>window.broken = 1</script><img src=x.png onerror='window.broken = 2'><link rel=stylesheet href=y.css>"
    )
    (tmp_path / "forced.html").write_text(text.replace("<main>", f"<main>{forced}"))
    page.open(tmp_path / "forced.html")
    assert "Content Security Policy" in " ".join(page.complaints())
    assert page.run("window.broken") is None
    assert not any("y.css" in one.get("params", {}).get("response", {}).get("url", "") for one in page.events)
    with pytest.raises(AssertionError, match="TrustedHTML"):
        page.run("document.body.innerHTML = '<b>x</b>'")


@pytest.mark.slow
@pytest.mark.slow_sample
def test_ten_thousand_rows_are_still_quick(page, tmp_path):
    """Sorting and searching 10,000 rows with texts takes less than a second each."""
    rng = np.random.default_rng(0)
    chances = (0.5 + rng.random(MOST) / 2).tolist()
    found = findings_of(
        chances,
        signals={f"signal_{i}": rng.random(MOST) for i in range(12)},
        reasons={i: "why " * 20 for i in range(MOST)},
    )
    rows = [{"prompt": "words and more words " * 20, "completion": f"answer {i}"} for i in range(MOST)]
    write_html(found, rows, tmp_path / "report.html", show_text=True)
    page.open(tmp_path / "report.html")
    assert page.run(COUNT).startswith("10,000 of 10,000")
    took = page.run(
        """(() => {
            const start = performance.now();
            document.querySelector("#rows-table th button").click();
            document.querySelector("#rows-table").offsetHeight;
            return performance.now() - start;
        })()"""
    )
    assert took < 1000
    start = page.run("performance.now()")
    choose(page, "filter-text", "answer 9999")
    assert page.run("performance.now()") - start < 1000
    assert page.run(SEEN) == ["row 9999"]
    assert page.complaints() == []
