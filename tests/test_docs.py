"""The site of docs/: it builds without a warning, its links lead somewhere, it asks no other host
for anything, and its notebook runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")

ROOT = Path(__file__).resolve().parents[1]
#: Attributes that lead to another page or fetch a file, by element.
LEADS = {"a": "href", "link": "href", "script": "src", "img": "src", "iframe": "src"}
#: What a browser fetches by itself.
FETCHED = {"link", "script", "img", "iframe"}


class Leads(HTMLParser):
    """The anchors of a page, and what it leads to: (element, target)."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.targets: list[tuple[str, str]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down what the element is called, and where it leads."""
        given = dict(attrs)
        self.anchors |= {given[key] or "" for key in ("id", "name") if key in given}
        target = given.get(LEADS.get(tag, ""))
        if target and given.get("rel") != "canonical":
            self.targets.append((tag, target))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Leads]:
    return {page: Leads(page) for page in sorted(site.rglob("*.html"))}


def leads(pages: dict[Path, Leads]) -> Iterator[tuple[Path, str, str]]:
    for page, found in pages.items():
        yield from ((page, tag, target) for tag, target in found.targets)


def test_links_and_anchors_of_the_site_exist(site: Path, pages: dict[Path, Leads]) -> None:
    lost = []
    for page, _, target in leads(pages):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        base = site if parts.path.startswith("/") else page.parent
        file = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else page
        file = file / "index.html" if file.is_dir() else file
        anchor = unquote(parts.fragment) if file.suffix == ".html" else ""
        if not file.is_file() or (anchor and anchor not in pages[file].anchors):
            lost.append(f"{page.relative_to(site)}: {target}")
    assert not lost, "\n".join(lost)


def test_pages_fetch_nothing_from_another_host(site: Path, pages: dict[Path, Leads]) -> None:
    foreign = [
        f"{page.relative_to(site)}: {target}"
        for page, tag, target in leads(pages)
        if tag in FETCHED and urlsplit(target).netloc
    ]
    elsewhere = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//")
    styles = [path for path in site.rglob("*.css") if elsewhere.search(path.read_text())]
    assert not foreign and not styles


def test_the_site_has_what_it_promises(site: Path, pages: dict[Path, Leads]) -> None:
    equation = (site / "methods" / "sacpo.html").read_text()
    assert '<div class="equation"' in equation and "π<sub>r</sub>" in equation
    assert {"constraint", "dual_search", "resources"} <= pages[
        site / "reference/params.html"
    ].anchors
    assert {"dualign-plan", "dualign-certify"} <= pages[site / "reference/cli.html"].anchors
    python = pages[site / "reference/python.html"].anchors
    assert any(re.fullmatch(r"dualign\.math\.dual\.(\w+\.)?solve", anchor) for anchor in python)
    assert "dualign.core.records.SolvedDual" in pages[site / "reference/records.html"].anchors
    assert (site / "results" / "shipped" / "world.html").is_file()


def test_every_method_has_a_page() -> None:
    from dualign.methods import METHODS

    overview = (ROOT / "docs" / "methods.md").read_text()
    told = "".join(path.read_text() for path in sorted((ROOT / "docs" / "methods").glob("*.md")))
    for name, method in METHODS.items():
        assert f"[{method.title.removesuffix(' (ours)')}](methods/" in overview, name
        assert f"  {name}:" in told, f"no page shows a row of methods.{name}"


def test_the_table_of_the_readme_is_that_of_its_bench() -> None:
    rows = json.loads((ROOT / "bench/results/shipped/world.json").read_text())["rows"]
    found = pd.DataFrame(rows).groupby("policy").mean(numeric_only=True)
    names = {"reference": "sft", "reward DPO": "reward_dpo", "safety DPO": "safety_only"}
    line = re.compile(r"^\| \[?([\w -]+?)(?:\]\(.*\))? \|(.*%.*)\|$", re.MULTILINE)
    table = line.findall((ROOT / "README.md").read_text())
    assert len(table) == 9
    for name, cells in table:
        mean = found.loc[names.get(name, name.lower().replace("-", "_"))]
        told = [float(c.strip(" %").replace("−", "-")) for c in cells.split("|")]
        whole = [mean.excess, 100 * mean.reward_share, 100 * mean.grammatical, abs(mean.kl)]
        assert np.abs(np.subtract(told, whole) / [0.01, 1, 0.1, 0.01]).max() <= 0.501, name


def test_the_notebook_runs_and_prints_what_it_shows() -> None:
    import nbformat
    from nbclient import NotebookClient

    shown = nbformat.read(ROOT / "docs" / "notebooks" / "frontier.ipynb", as_version=4)
    run = nbformat.from_dict(shown)
    NotebookClient(run, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    for before, after in zip(shown.cells, run.cells, strict=True):
        assert printed(before) == printed(after)


def printed(cell: Any) -> str:
    """What a cell prints; a kernel may hand it over in several pieces."""
    outputs = cell.get("outputs", [])
    assert all(output["output_type"] == "stream" for output in outputs)
    return "".join(output["text"] for output in outputs)
