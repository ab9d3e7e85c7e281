"""What tests of models share: how to run on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualign.params.base import Resources
from dualign.params.loading import load_resources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def resources() -> Resources:
    """A CPU and fp32."""
    return load_resources(ROOT / "params.yaml").model_copy(
        update={"device": "cpu", "precision": "fp32"}
    )
