"""The examples in docstrings of the mathematics, and on the page for those who use it as a
library.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dualign.data import world
from dualign.lm.models import build_scratch, load_scorer_backbone, save, train_tokenizer
from dualign.params.loading import load_resources
from tests.tiny import WIDER

DUAL = sorted((Path(__file__).parents[1] / "dualign/math/dual").glob("[a-z]*.py"))
#: The public mathematics; of a module in which other things are public too, what is.
MODULES = {
    **dict.fromkeys(f"dualign.math.dual.{path.stem}" for path in DUAL),
    "dualign.math.bounds": None,
    "dualign.math.constraints": None,
    "dualign.math.pricing": None,
    "dualign.math.losses": None,
    "dualign.math.spread": None,
    "dualign.math.tabular": None,
    "dualign.math.updates": None,
    "dualign.scoring.calibration": None,
    "dualign.evaluation.agreement": None,
    "dualign.evaluation.paired": None,
    "dualign.evaluation.power": None,
    "dualign.evaluation.ranking": None,
    "dualign.evaluation.stats": ["clustered_share", "share_of", "mean_of", "redrawn"],
    "dualign.evaluation.suites": ["before_stop"],
    "dualign.evaluation.truthful": ["mc1", "mc2"],
    "dualign.evaluation.refusals": ["refuses_by_rules"],
    "dualign.certify.certificate": ["order"],
    "dualign.certify.requirement": ["Requirement.__str__", "Requirement.weighted"],
    "dualign.certify.sequence": ["fixed_sequence"],
    "bench.losses": None,
    "pipeline.cost.base": ["typical"],
    "pipeline.cost.machine": ["card_of"],
    "pipeline.cost.page": ["amount"],
    "pipeline.cost.work": ["steps_of"],
}
#: Public for their neighbours alone: they check arguments.
PLAIN = {
    "dualign.math.bounds.check_delta",
    "dualign.math.bounds.check_test",
    "dualign.math.dual.root.check_numbers",
}


def functions(module: ModuleType) -> list[str]:
    """The public functions that a module defines itself."""
    found = inspect.getmembers(module, inspect.isfunction)
    return [
        name
        for name, function in found
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_function_has_an_example_that_holds(name: str) -> None:
    module = importlib.import_module(name)
    examples = {
        found.name.removeprefix(f"{name}."): found for found in doctest.DocTestFinder().find(module)
    }
    for function in MODULES[name] or functions(module):
        assert f"{name}.{function}" in PLAIN or examples[function].examples, (
            f"{name}.{function} has no example"
        )
    said: list[str] = []
    for example in examples.values():
        doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)


@pytest.fixture
def shelf(tmp_path: Path, repo_root: Path) -> Path:
    """A folder with the models that the page names: a base, and a classifier whose weights say
    something.
    """
    texts = [answer.text for answer in world.answers(world.prompts()[0])]
    tokenizer = train_tokenizer(texts, 300)
    size = WIDER
    save(build_scratch(size, tokenizer, 0), tokenizer, tmp_path / "models" / "base")
    resources = load_resources(repo_root / "params.yaml").model_copy(
        update={"device": "cpu", "precision": "fp32"}
    )
    guard = load_scorer_backbone(str(tmp_path / "models" / "base"), tokenizer, resources)
    with torch.no_grad():
        for weight in guard.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    save(guard, tokenizer, tmp_path / "models" / "guard")
    return tmp_path


@pytest.mark.usefixtures("one_thread")
def test_the_snippets_for_users_of_the_library_run_as_they_stand(
    repo_root: Path,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (repo_root / "docs" / "api.md").read_text()
    monkeypatch.chdir(shelf)
    known: dict[str, Any] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        exec(compile(snippet, "docs/api.md", "exec"), known)
    told = capsys.readouterr().out
    low, high = known["solution"].lam_interval
    assert low < known["solution"].lam < high and "at 0.000: reward" in told
    assert known["decision"].certified == ("safe", "middling")
    assert known["bound"] < -0.4
    assert (known["joint"].predicted <= [-0.3 + 1e-6, 0.03 + 1e-6]).all()
    assert known["raw"].shape == (4,) and (shelf / "models" / "cost" / "scorer.json").is_file()
    assert (known["label"] > 0.5).all() and (
        shelf / "models" / "policy" / "model.safetensors"
    ).is_file()
