"""Rules that hold for the whole repository: who imports whom, what is declared, what is ignored,
what links lead to.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML
from ruamel.yaml.parser import Parser

from bench.house import holds_another
from dualign.params import yaml_text
from dualign.params.loading import check, read_yaml
from pipeline.dotted import value_at
from pipeline.dvc.dag import load_dag
from pipeline.dvc.overlay import TABLES, merged
from tests.params.mistakes import put
from tests.shipped import SHIPPED, preset, written

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("dualign", "stages", "pipeline", "bench")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
PAGES = [
    path
    for folder in (
        ".",
        "docs",
        "docs/methods",
        "docs/reference",
        "data",
        "models",
        "reports",
        "bench",
    )
    for path in sorted((ROOT / folder).glob("*.md"))
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


#: What pages say for a module of the reader's choice.
MADE_UP = {"stages/NAME"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=named)
every_page = pytest.mark.parametrize("page", PAGES, ids=named)


def imports(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


# --- layers ---------------------------------------------------------------------------------------

FORBIDDEN = {
    "dualign": {"stages", "pipeline", "bench", "dvc", "prefect"},
    "stages": {"pipeline", "bench", "dvc", "prefect"},
    "bench": {"stages", "prefect"},
    "pipeline": {"dualign", "stages", "torch", "transformers", "trl", "peft"},
}


@every_file
def test_arrows_run_one_way(path: Path) -> None:
    room = named(path).split("/")[0]
    assert not set(imports(path)) & FORBIDDEN[room]


@every_file
def test_only_the_training_package_touches_trl(path: Path) -> None:
    assert "trl" not in imports(path) or path.is_relative_to(ROOT / "dualign" / "training")


def test_pipeline_loads_neither_torch_nor_dualign() -> None:
    modules = [
        named(path)[:-3].replace("/", ".").removesuffix(".__init__")
        for path in FILES
        if path.is_relative_to(ROOT / "pipeline")
    ]
    code = (
        f"import {', '.join(modules)}; import sys; sys.exit(str([m for m in ('torch', 'dualign') if"
        " m in sys.modules]))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert loaded.stderr.strip().splitlines()[-1] == "[]"


# --- what is declared -----------------------------------------------------------------------------


def declared(*extras: str) -> list[Requirement]:
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    return [
        requirement for line in lines if (requirement := Requirement(line)).name != PROJECT["name"]
    ]


def test_every_import_is_declared() -> None:
    extras = ("gpu", "vllm", "harness", "tracking", "qlora")
    names = {canonicalize_name(requirement.name) for requirement in declared(*extras)}
    names.add("mlflow")  # which mlflow-skinny holds too
    providers = packages_distributions()
    used = (
        {name for path in FILES for name in imports(path)}
        - set(sys.stdlib_module_names)
        - set(ROOMS)
    )
    undeclared = {
        name
        for name in used
        if names.isdisjoint(map(canonicalize_name, providers.get(name, [name])))
    }
    assert not undeclared, f"pyproject.toml: dependencies lack {sorted(undeclared)}"


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    halves = [line.split("==") for line in lines]
    pins = {canonicalize_name(name): version for name, version in halves}
    for requirement in declared("test", "dev"):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), (
            requirement
        )


# --- code -----------------------------------------------------------------------------------------


@every_file
def test_functions_are_short_and_nothing_prints(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 80, (
                f"{named(path)}:{node.lineno}: {node.name} is too long to read"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{named(path)}:{node.lineno}: use logging"


def nested(path: Path) -> list[int]:
    """Lines at which a comprehension begins that holds another."""
    tree = ast.parse(path.read_text())
    return [node.lineno for node in ast.walk(tree) if holds_another(node)]  # type: ignore[attr-defined]


def test_no_comprehension_holds_another() -> None:
    found = {}
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        if lines := nested(path):
            found[named(path)] = lines
    assert not found, f"a comprehension inside a comprehension: {found}; give the inner one a name"


# --- files ----------------------------------------------------------------------------------------


def test_libyaml_reads_yaml() -> None:
    """ruamel.yaml does without it, in four times the time, and says nothing."""
    assert YAML(typ="safe").Parser is not Parser


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_parameter_files_are_valid(path: Path, tmp_path: Path) -> None:
    check(read_yaml(written(path, tmp_path)), path)


def test_git_ignores_outputs_and_keeps_their_descriptions() -> None:
    outputs = [path for stage in load_dag(ROOT).values() for path in (*stage.outs, *stage.metrics)]
    private = [
        "data/raw/rows.jsonl",
        "params.yaml.saved",
        ".scratch/sft/state.json",
        ".venv/bin/python",
    ]
    kept = [
        "data/README.md",
        "data/raw/README.md",
        "models/README.md",
        "reports/README.md",
        "reports/search/README.md",
        "reports/answers/README.md",
        "reports/judgements/README.md",
        "reports/seeds/README.md",
        "reports/earlier/README.md",
        "reports/harness/README.md",
        "dvc.lock",
    ]
    asked = "\n".join([*outputs, *private, *kept])
    git = ["git", "check-ignore", "--no-index", "--stdin"]
    answer = subprocess.run(git, cwd=ROOT, input=asked, capture_output=True, text=True, check=False)
    if answer.returncode == 128:
        pytest.skip(f"no git repository here: {answer.stderr.strip()}")
    assert set(answer.stdout.split("\n")) - {""} == {*outputs, *private}
    assert all((ROOT / path).is_file() for path in kept if path.endswith(".md"))


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "make test" in script.read_text()


# --- pages ----------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            place = page.parent / file if file else page
            assert place.exists(), f"{named(page)}: {target} does not exist"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", place.read_text(), flags=re.MULTILINE)
                assert anchor in {slug(heading) for heading in headings}, (
                    f"{named(page)}: no heading for {target}"
                )


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every_page
def test_make_targets_that_pages_name_exist(page: Path) -> None:
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    )
    named_here = set(
        re.findall(r"(?:^|`|&& )\s*make ([a-z0-9-]+)", page.read_text(), flags=re.MULTILINE)
    )
    assert named_here <= targets


@every_page
def test_files_and_modules_that_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    rooms = "|".join(ROOMS)
    file = rf"(?:^|[`( ])((?:{rooms}|tests|params)/[\w/.-]+\.(?:py|yaml))"
    files = re.findall(file, text, flags=re.MULTILINE)
    modules = re.findall(rf"python -m ((?:{rooms})(?:\.\w+)*)", text)
    places = [ROOT / module.replace(".", "/") for module in modules]
    lost = [file for file in files if not (ROOT / file).is_file()]
    lost += [
        named(place)
        for place in places
        if not (place.is_dir() or place.with_suffix(".py").is_file())
    ]
    assert not set(lost) - MADE_UP, f"{named(page)} names {sorted(set(lost))}"


def shown_params(page: Path) -> list[dict[str, Any]]:
    """The sections of params.yaml that a page shows; its other YAML is left out."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    sections = preset("default")
    blocks = [block for block in blocks if block.partition(":")[0] in sections]
    return [yaml_text.load(block, named(page)) for block in blocks]


@every_page
def test_params_that_pages_show_are_ones_that_load(page: Path) -> None:
    """They stand in the shipped file, rows of a table beside those that are there."""
    for shown in shown_params(page):
        content = preset("default")
        for table in TABLES:
            if rows := value_at(shown, table, missing=None):
                put(shown, table, {**value_at(content, table), **rows})
        check(merged(content, shown), page)


def test_changelog_has_a_place_for_what_is_new() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()
