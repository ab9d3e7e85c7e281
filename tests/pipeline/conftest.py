"""A fresh project for each test, and one Prefect server for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness

from tests.pipeline.project import Project, create


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A fresh project, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return create(tmp_path)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a Prefect server with an empty database."""
    with prefect_test_harness(server_startup_timeout=600):
        yield str(get_current_settings().api.url)
