"""What makes no stage stale must compute nothing: types, validators and the reading of the file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "dualign/params"
#: The modules that read and check the file.
READERS = ("loading.py", "consistency.py", "renamed.py", "yaml_text.py")
TYPES = sorted(path for path in FOLDER.glob("*.py") if path.name not in READERS)
VALIDATORS = {"model_validator", "field_validator"}


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def decorators(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(node).partition("(")[0] for node in function.decorator_list}


@pytest.mark.parametrize("path", TYPES, ids=lambda path: path.name)
def test_types_of_params_hold_no_function_but_validators(path: Path) -> None:
    own = [
        function.name
        for function in functions(ast.parse(path.read_text()))
        if not decorators(function) & VALIDATORS
    ]
    assert not own


def test_there_are_validators_for_this_to_find() -> None:
    assert any(functions(ast.parse(path.read_text())) for path in TYPES)
