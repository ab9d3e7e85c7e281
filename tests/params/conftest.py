from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dualign.params import loading


@pytest.fixture
def content() -> dict[str, Any]:
    """What `params.yaml` holds, to be spoiled."""
    return copy.deepcopy(loading.read_yaml(Path(__file__).resolve().parents[2] / "params.yaml"))
