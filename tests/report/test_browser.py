"""The page in a real browser: sorting, filtering, and hostile rows that run nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualign.core.artifacts import read_json
from dualign.params.report import ReportParams
from dualign.report.page import write
from dualign.report.sections.base import FinishedRun
from tests.report.browser import CHROMIUM, Tab, chromium
from tests.report.conftest import judge_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

NAMES = "[...document.querySelectorAll('#methods .sortable tbody:first-of-type tr:not(.group) th')]"
ORDER = f"{NAMES}.map(cell => cell.childNodes[1].textContent)"
ALIGNED = ("dualign", "sacpo", "p_sacpo", "c_dpo", "pd_dpo", "mocan", "caid", "safe_dpo")
HOSTILE = "</title><script>window.ran = true; alert(1)</script><img src=x onerror='window.ran = 1'>"


@pytest.fixture(scope="module")
def page(
    finished: tuple[Path, ReportParams], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The page of a run of which one answer is hostile, and its policies."""
    root, params = finished
    out = tmp_path_factory.mktemp("page") / "index.html"
    write(
        FinishedRun(root, params.model_copy(update={"sample_prompts": 96, "title": HOSTILE})), out
    )
    return out, {
        name: read_json(root / f"reports/metrics/evaluate/{name}.json") for name in ALIGNED
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, page: tuple[Path, dict[str, Any]]) -> Iterator[Tab]:
    """The page, freshly opened; it may neither complain nor ask for anything, whatever is done."""
    browser.events.clear()
    browser.open(page[0])
    yield browser
    assert browser.complaints() == [] and browser.requests() == []
    assert browser.run("window.ran") is None


@pytest.fixture(scope="module")
def judged_page(
    finished: tuple[Path, ReportParams], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The page of a run whose policies also answered suites that were judged."""
    root = tmp_path_factory.mktemp("judged") / "run"
    shutil.copytree(finished[0], root)
    write(FinishedRun(root, judge_run(root)), root / "index.html")
    return root / "index.html"


@pytest.fixture
def judged(browser: Tab, judged_page: Path) -> Iterator[Tab]:
    """That page, freshly opened, under the same conditions."""
    browser.events.clear()
    browser.open(judged_page)
    yield browser
    assert browser.complaints() == [] and browser.requests() == []


def click(tab: Tab, heading: str) -> None:
    tab.run(
        "[...document.querySelectorAll('#methods .sortable thead button')]"
        f".find(button => button.textContent.trim().startsWith({heading!r})).click()"
    )


def choose(tab: Tab, control: str, value: str) -> None:
    tab.run(
        f"(() => {{ const c = document.getElementById({control!r}); c.value = {value!r};"
        " c.dispatchEvent(new Event('input')); })()"
    )


def visible(tab: Tab) -> list[list[str]]:
    """Policies and kinds of the answers that are not hidden."""
    return tab.run(
        "[...document.querySelectorAll('.question:not([hidden]) article:not([hidden])')]"
        ".map(a => [a.dataset.policy, a.dataset.kinds])"
    )


def test_a_click_on_a_heading_sorts_the_best_first_and_another_the_worst(
    tab: Tab, page: tuple[Path, dict[str, Any]]
) -> None:
    by_cost = sorted(ALIGNED, key=lambda name: page[1][name]["cost"]["mean"])
    before = tab.run(ORDER)
    assert sorted(before) == sorted(ALIGNED) and before != by_cost
    click(tab, "cost")
    assert tab.run(ORDER) == by_cost
    assert tab.run("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"
    click(tab, "cost")
    assert tab.run(ORDER) == by_cost[::-1]
    click(tab, "reward")
    by_reward = sorted(ALIGNED, key=lambda name: -page[1][name]["reward"]["mean"])
    assert tab.run(ORDER) == by_reward
    assert tab.run("document.querySelectorAll('[aria-sort]').length") == 1
    click(tab, "policy")
    assert tab.run(ORDER) == before


def test_every_line_of_every_chart_is_drawn(tab: Tab) -> None:
    """A class without a rule in the style sheet would leave it out in silence."""
    assert tab.run(
        "[...document.querySelectorAll('svg.chart line')].filter("
        "line => getComputedStyle(line).stroke === 'none').map(line => line.outerHTML)"
    ) == []  # fmt: skip


def test_one_policy_at_a_time_is_compared_with_and_its_table_is_sorted(tab: Tab) -> None:
    tables = "[...document.querySelectorAll('#differences details')]"
    opened = f"{tables}.filter(d => d.open).map(d => d.querySelector('summary').textContent)"
    recommended = tab.run(opened)
    assert len(recommended) == 1 and tab.run(f"{tables}.length") == len(ALIGNED) + 3
    tab.run(
        f"{tables}.find(d => d.textContent.startsWith('compared with sft'))"
        ".querySelector('summary').click()"
    )
    assert tab.run(opened) == ["compared with sft"]
    rows = (
        f"[...{tables}.find(d => d.open).querySelectorAll('tbody tr')]"
        ".map(row => +row.cells[1].dataset.value)"
    )
    before = tab.run(rows)
    tab.run(f"{tables}.find(d => d.open).querySelectorAll('thead button')[1].click()")
    assert tab.run(rows) == sorted(before, reverse=True) != before


JUDGED = "document.querySelectorAll('#suites table')[0]"


def test_a_suite_is_sorted_by_any_judge(judged: Tab) -> None:
    names = f"[...{JUDGED}.tBodies[0].rows].map(row => row.cells[0].childNodes[1].textContent)"
    heading = "reward\N{NO-BREAK SPACE}↑ours, safe prompts"
    values = (
        f"(() => {{ const column = [...{JUDGED}.tHead.rows[0].cells].findIndex("
        f"cell => cell.textContent === {heading!r});"
        f" return [...{JUDGED}.tBodies[0].rows].map(row => +row.cells[column].dataset.value); }})()"
    )
    before = judged.run(names)
    assert set(before) == {"sft", "dualign", "reward_dpo", "safety_only"}
    judged.run(
        f"[...{JUDGED}.querySelectorAll('button')]"
        f".find(button => button.textContent === {heading!r}).click()"
    )
    assert judged.run(names) != before and judged.run(names)[0] == "reward_dpo"
    assert judged.run(values) == sorted(judged.run(values), reverse=True)


def test_folded_tables_open_by_a_click_and_are_sorted(judged: Tab) -> None:
    closed = "document.querySelectorAll('#ranking details:not([open])')"
    count = judged.run(f"{closed}.length")
    assert count > 0
    judged.run(f"{closed}[0].querySelector('summary').click()")
    assert judged.run(f"{closed}.length") == count - 1
    first = "[...document.querySelectorAll('#ranking details')].filter(d => d.open)[1]"
    rows = f"[...{first}.querySelectorAll('tbody tr')].map(row => +row.cells[1].dataset.value)"
    judged.run(f"{first}.querySelectorAll('thead button')[1].click()")
    judged.run(f"{first}.querySelectorAll('thead button')[1].click()")
    assert judged.run(rows) == sorted(judged.run(rows)) != []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_of_judges_is_no_wider_than_the_window(
    judged: Tab, width: int, scheme: str
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    judged.call("Emulation.setDeviceMetricsOverride", **size)
    media = {"name": "prefers-color-scheme", "value": scheme}
    judged.call("Emulation.setEmulatedMedia", features=[media])
    assert judged.run("document.documentElement.scrollWidth") <= width
    assert judged.run("getComputedStyle(document.querySelector('.apart.worse')).color") == {
        "light": "rgb(178, 64, 44)", "dark": "rgb(238, 136, 115)"
    }[scheme]  # fmt: skip
    judged.call("Emulation.clearDeviceMetricsOverride")
    judged.call("Emulation.setEmulatedMedia", features=[])


def test_answers_are_searched_and_filtered(tab: Tab) -> None:
    everything = visible(tab)
    assert len(everything) == 96 * 11
    choose(tab, "which", "cut")
    cut = visible(tab)
    assert 0 < len(cut) < len(everything) and all("cut" in kinds for _, kinds in cut)
    choose(tab, "which", "over")
    over = visible(tab)
    assert {kinds.split()[-1] for _, kinds in over} == {"over", "unsafe"}
    choose(tab, "which", "")
    choose(tab, "find", "BLEACH in house 2?")
    assert len(visible(tab)) == 11, "one prompt"
    assert (
        tab.run("document.getElementById('shown').textContent") == "11 answers to 1 of 96 prompts"
    )
    choose(tab, "find", "no such words")
    assert visible(tab) == []
    choose(tab, "find", "")
    assert visible(tab) == everything


def test_a_chosen_policy_stands_beside_the_reference(tab: Tab) -> None:
    reference = tab.run("document.querySelector('.browse').dataset.reference")
    choose(tab, "policy", "1")
    choose(tab, "which", "unsafe")
    shown = visible(tab)
    assert {policy for policy, _ in shown} == {"1", reference}
    own = [kinds for policy, kinds in shown if policy == "1"]
    assert 0 < len(own) == len(shown) / 2 and all("unsafe" in kinds for kinds in own)
    choose(tab, "policy", reference)
    assert {policy for policy, _ in visible(tab)} == {reference}


def test_unsafe_answers_stay_folded_while_they_are_searched(tab: Tab) -> None:
    choose(tab, "find", "nobody notices")
    assert visible(tab)
    assert tab.run("document.querySelectorAll('article details[open]').length") == 0


def test_without_scripts_everything_is_there_but_the_controls(
    browser: Tab, page: tuple[Path, dict[str, Any]]
) -> None:
    browser.events.clear()
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page[0])
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert len(visible(browser)) == 96 * 11
    assert browser.run("document.querySelector('.browse').hidden") is True
    assert browser.run("document.querySelectorAll('.sortable button').length") == 0


def test_the_browser_runs_no_script_but_the_pages_own(
    browser: Tab, page: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Even if the escaping failed: the policy of the page names its one script by hash."""
    planted = page[0].read_text().replace("<main>", "<main><script>window.ran = true</script>", 1)
    (tmp_path / "planted.html").write_text(planted)
    browser.events.clear()
    browser.open(tmp_path / "planted.html")
    assert browser.run("window.ran") is None
    (complaint,) = browser.complaints()
    assert "Content Security Policy" in complaint
