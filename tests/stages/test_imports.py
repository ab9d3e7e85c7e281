"""What each stage imports: a library that it does not use costs every run of it seconds."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "torch",
    "transformers",
    "transformers.trainer",
    "trl",
    "datasets",
    "accelerate",
    "peft",
    "pandas",
    "scipy.stats",
    "scipy.optimize",
    "sklearn",
    "matplotlib",
    "jinja2",
    "tokenizers",
    "sympy",
    "openai",
    "dvc",
    "prefect",
}
TABLES = {"pandas"}
MODELS = TABLES | {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "jinja2",
    "sympy",
    "scipy.optimize",
}
TRAINS = MODELS | {"transformers.trainer", "trl", "datasets"}
ALLOWED = {
    "prepare": TABLES,
    "dual_init": TABLES | {"scipy.optimize"},
    "report": TABLES | {"jinja2", "scipy.stats", "scipy.optimize"},  # where there are judges
    "score": MODELS,
    "evaluate": MODELS,
    "answer": MODELS,
    "judge": MODELS
    | {"sklearn", "scipy.stats", "openai"},  # one judge needs less, but a stage has all kinds
    "certify": MODELS | {"scipy.stats"},
    **dict.fromkeys(
        (
            "sft",
            "reward_model",
            "cost_model",
            "reward_dpo",
            "safety_dpo",
            "lagrangian_dpo",
            "lambda_path",
            "safety_path",
            "dual_search",
        ),
        TRAINS,
    ),
}


#: Stages that one process imports in turn: each may import what those before it may, and more.
CHAINS = (
    ("report",),
    ("prepare", "dual_init", "score", "evaluate", "answer", "certify", "judge"),
    tuple(sorted(stage for stage, allowed in ALLOWED.items() if allowed == TRAINS)),
)


def imported(stages: Sequence[str]) -> list[set[str]]:
    """The heavy libraries that are loaded once a stage's script has been, for each in turn."""
    code = "import gc, json, sys; gc.disable()\n"
    for stage in stages:
        code += f"import stages.{stage}; print(json.dumps(list(sys.modules)))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()[-len(stages) :]
    return [HEAVY & set(json.loads(line)) for line in lines]


def test_every_stage_is_listed() -> None:
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert scripts == set(ALLOWED) == {stage for chain in CHAINS for stage in chain}


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[0])
def test_a_stage_imports_what_it_uses(chain: tuple[str, ...]) -> None:
    allowed = [ALLOWED[stage] for stage in chain]
    assert all(one <= other for one, other in itertools.pairwise(allowed)), "or a chain says less"
    excess = {
        stage: found - may
        for stage, found, may in zip(chain, imported(chain), allowed, strict=True)
        if found - may
    }
    assert excess == {}
