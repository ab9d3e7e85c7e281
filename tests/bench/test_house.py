"""The measures of style, on code whose values are plain, and the import picture of this one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bench.house import FOLDERS, Source, complexity, imports, measures, nesting, picture, rooms

ROOT = Path(__file__).resolve().parents[2]
CODE = '''
def first(a: int, b: int) -> int:
    """Doc."""
    x, y = a, b
    return [z for z in [w for w in range(x)] if z][y]


def second(self, c):
    if c:
        for d in c:
            return d if d else None
'''


def source(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))


def test_measures_by_hand() -> None:
    found = measures([source("dualign/a.py", CODE)])
    assert found["function median / p90 / longest"] == "4 / 4 / 4"
    assert (found["docstrings"], found["annotated"]) == ("50%", "50%")
    assert (found["most parameters"], found["nesting"]) == ("2", "2")
    assert found["packed assignments / kLOC"] == found["nested comprehensions / kLOC"] == "90.9"


def test_complexity_counts_branches() -> None:
    first, second = ast.parse(CODE).body
    assert (complexity(first), complexity(second)) == (4, 4)
    assert (nesting(first), nesting(second)) == (0, 2)


def test_circles_are_found() -> None:
    files = [
        source("dualign/a/one.py", "from dualign.b import two"),
        source("dualign/b/two.py", "import dualign.a.one"),
        source("dualign/c.py", "from dualign.a.one import name"),
    ]
    assert set(imports(files).edges) == {
        ("dualign.a.one", "dualign.b.two"),
        ("dualign.b.two", "dualign.a.one"),
        ("dualign.c", "dualign.a.one"),
    }
    assert picture(imports(files))[0].startswith(
        "Circles between modules: 1; between rooms: 1 (dualign.a, dualign.b)."
    )


@pytest.fixture(scope="module")
def here() -> list[Source]:
    paths = [path for name in FOLDERS[:3] for path in sorted((ROOT / name).rglob("*.py"))]
    return [source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def test_modules_and_rooms_build_on_each_other_without_a_circle(here: list[Source]) -> None:
    assert picture(imports(here))[0].startswith("Circles between modules: 0; between rooms: 0.")


def test_mathematics_and_params_stand_on_errors_and_names_alone(here: list[Source]) -> None:
    between = rooms(imports(here))
    assert set(between.successors("dualign.params")) == {"dualign.core"}
    assert set(between.successors("dualign.math")) <= {"dualign.core", "dualign.params"}
