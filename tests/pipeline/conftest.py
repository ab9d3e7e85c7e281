"""A fresh project for each test, and one Prefect server for all."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import get_current_settings
from prefect.testing import utilities

from tests.pipeline.project import Project, create


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A fresh project, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return create(tmp_path)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a Prefect server that has not run yet. A server that makes its own works for
    longer on that than on all else before it answers, so it is made once, for every process of the
    tests.
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made = folder / "prefect.db"
    with (folder / "prefect.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not made.exists():
            new = folder / "prefect-new.db"
            _upgrade(new)
            new.rename(made)
    return made


def _upgrade(database: Path) -> None:
    """Make Prefect's tables in a new database."""
    address = f"sqlite+aiosqlite:///{database}"
    subprocess.run(
        [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"],
        env={**os.environ, "PREFECT_SERVER_DATABASE_CONNECTION_URL": address},
        stdout=subprocess.DEVNULL,
        check=True,
    )


@pytest.fixture(scope="session")
def server(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server with an empty database."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(database, folder / "prefect-test.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "mkdtemp", lambda: str(folder))  # where the harness has it
        with utilities.prefect_test_harness(server_startup_timeout=600):
            yield str(get_current_settings().api.url)
