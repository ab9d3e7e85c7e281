"""What each stage imports: a library that it does not use costs every run of it seconds."""

from __future__ import annotations

import json
import subprocess
import sys
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


def imported(stage: str) -> set[str]:
    """The heavy libraries that are loaded once a stage's script has been."""
    code = (
        f"import gc; gc.disable(); import stages.{stage}, sys, json;"
        " print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def test_every_stage_is_listed() -> None:
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert scripts == set(ALLOWED)


@pytest.mark.parametrize(
    "stage", sorted(stage for stage, allowed in ALLOWED.items() if allowed != TRAINS)
)
def test_a_stage_that_trains_nothing_imports_what_it_uses(stage: str) -> None:
    assert imported(stage) <= ALLOWED[stage]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", sorted(stage for stage, allowed in ALLOWED.items() if allowed == TRAINS)
)
def test_a_stage_that_trains_imports_what_it_uses(stage: str) -> None:
    assert imported(stage) <= ALLOWED[stage]
