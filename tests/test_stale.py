"""What an edit makes stale: the stages whose dependencies, as DVC resolves them, hold the file."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath
from typing import get_args

import pytest

from dualign.methods import METHODS
from dualign.params.search import MethodName
from pipeline.dvc.dag import StageSpec, load_dag

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stages() -> dict[str, StageSpec]:
    return load_dag(ROOT)


def stale(path: str, stages: dict[str, StageSpec]) -> set[str]:
    """The stages of dvc.yaml that run again once a file is edited; of those fanned out all do."""
    holding = {path, *map(str, PurePosixPath(path).parents)}
    return {name.partition("@")[0] for name, stage in stages.items() if holding & set(stage.deps)}


def with_messages(folder: str) -> list[str]:
    """The modules of a folder that raise, so that a message may be edited there."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        if any(isinstance(node, ast.Raise) for node in nodes):
            found.append(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("folder", ["dualign/params", "pipeline"])
def test_an_edited_message_of_params_or_the_pipeline_makes_nothing_stale(
    folder: str, stages: dict[str, StageSpec]
) -> None:
    edited = with_messages(folder)
    assert len(edited) > 5
    assert {path: stale(path, stages) for path in edited} == {path: set() for path in edited}


def test_an_edited_message_elsewhere_makes_its_users_stale(stages: dict[str, StageSpec]) -> None:
    """So that the test above could fail: DVC sees files, not what in them was edited."""
    edited = with_messages("dualign")
    assert "dualign/methods.py" in edited
    assert all(stale(path, stages) for path in edited if path.startswith("dualign/data/"))
    assert stale("dualign/core/artifacts.py", stages) == {name.partition("@")[0] for name in stages}


def test_a_new_methods_name_makes_nothing_stale_and_its_row_the_searches_alone(
    stages: dict[str, StageSpec],
) -> None:
    """The name stands in params. DVC sees the table as one file, so a new row makes the searches
    stale that do not read it, but nothing that they start from.
    """
    assert tuple(METHODS) == get_args(MethodName)
    assert stale("dualign/params/search.py", stages) == set()
    assert stale("dualign/methods.py", stages) == {"dual_search"}


def test_checks_before_a_run_make_nothing_stale(stages: dict[str, StageSpec]) -> None:
    """Nothing but a check may hide from DVC there: none returns anything."""
    tree = ast.parse((ROOT / "dualign/checks.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions and all(ast.unparse(node.returns or tree) == "None" for node in functions)
    assert stale("dualign/checks.py", stages) == set()


def test_a_new_or_edited_preset_makes_nothing_stale(stages: dict[str, StageSpec]) -> None:
    presets = ["params/new.yaml", *(f"params/{path.name}" for path in ROOT.glob("params/*.yaml"))]
    assert len(presets) > 5
    assert {path for path in presets if stale(path, stages)} == set()


def test_results_of_other_harnesses_make_the_report_stale_alone(
    stages: dict[str, StageSpec],
) -> None:
    assert stale("reports/harness/lm_eval-sft-plain_questions.json", stages) == {"report"}
    assert stale("dualign/evaluation/harness.py", stages) == {"report"}


def test_a_word_about_a_measure_makes_the_report_stale_alone(stages: dict[str, StageSpec]) -> None:
    """What is computed of answers stands elsewhere: a new explanation evaluates no policy anew."""
    assert stale("dualign/evaluation/measures.py", stages) == {"report"}
