"""The examples in docstrings of the mathematics, and on the page for those who use it as a library."""

from __future__ import annotations

import doctest
import importlib
import inspect
from types import ModuleType

import pytest

#: The public mathematics; of a module in which other things are public too, what is.
MODULES = {
    "dualign.dual": None,
    "dualign.bounds": None,
    "dualign.losses": None,
    "dualign.exact": None,
    "dualign.scoring.calibration": None,
    "dualign.certificate": ["fixed_sequence", "Requirement.weighted"],
    "dualign.search.rules": [
        "dual_gradient_step",
        "projected_subgradient_step",
        "newton_step",
        "tilt_step",
        "secant_step",
        "line_root",
        "first_weight",
        "merge_multiplier",
        "next_weight",
        "tail",
    ],
}
#: Public for their neighbours alone: they check arguments.
PLAIN = {"dualign.bounds.check_delta", "dualign.bounds.check_test"}


def functions(module: ModuleType) -> list[str]:
    """The public functions that a module defines itself."""
    found = inspect.getmembers(module, inspect.isfunction)
    return [name for name, function in found if function.__module__ == module.__name__ and not name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_every_function_has_an_example_that_holds(name: str) -> None:
    module = importlib.import_module(name)
    examples = {found.name.removeprefix(f"{name}."): found for found in doctest.DocTestFinder().find(module)}
    for function in MODULES[name] or functions(module):
        assert f"{name}.{function}" in PLAIN or examples[function].examples, f"{name}.{function} has no example"
    said: list[str] = []
    for example in examples.values():
        doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
