"""What rules and searches are tested on: params, a backend on a known curve, and tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dualign.params.base import PessimismParams, Resources
from dualign.params.loading import load
from dualign.params.search import DualSearchParams, FeedbackParams
from tests.search.curves import BETA, LIMIT, ROOT, Curve
from tests.tiny import on_cpu

if TYPE_CHECKING:
    from dualign.search.task import Inputs


@pytest.fixture(scope="module")
def params() -> DualSearchParams:
    """The shipped section with every knob that a rule reads set here."""
    return load(DualSearchParams, ROOT / "params.yaml").model_copy(
        update={
            "beta": BETA,
            "limit": LIMIT,
            "z": 1.0,
            "lambda_min": 0.05,
            "lambda_max": 20.0,
            "max_trainings": 6,
            "merge_steps": 6,
            "merge_max": 1.25,
            "min_ess": 100.0,
            "max_tokens": None,
            "step_size": 1.0,
            "grid": [0.5, 1.0, 2.0],
        }
    )


@pytest.fixture
def bench(tmp_path: Path) -> Curve:
    return Curve(tmp_path / "bench", lam_start=0.6)


# --- tiny models ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def resources() -> Resources:
    return on_cpu()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, resources: Resources) -> Inputs:
    """A reference, two policies, a reward and a cost model, all random, and some safety pairs."""
    from tests.search.backends import written_inputs  # rules are tested without torch

    return written_inputs(tmp_path_factory.mktemp("models"), resources)


@pytest.fixture
def tiny(tmp_path: Path) -> DualSearchParams:
    """The shipped section for models of a few thousand weights."""
    shipped = load(DualSearchParams, ROOT / "params.yaml")
    feedback = FeedbackParams(
        prompts=4, labels=20, smoothing=0.5, source="cost_model", folder=str(tmp_path / "labels")
    )
    update = {
        "max_new_tokens": 8,
        "samples_per_prompt": 3,
        "feedback": feedback,
        "pessimism": PessimismParams(share=0.4, reward=0.0, cost=0.0),
    }
    return shipped.model_copy(update=update)
