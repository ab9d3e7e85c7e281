"""Outputs from the remote: what arrives, what is left alone, and what is said where it cannot be
had.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from pipeline.errors import StageFailed
from pipeline.run.runner import LocalRunner, exclusive
from tests.pipeline.project import Project


@pytest.fixture
def pushed(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has run, whose results are in the remote and no more here."""
    store = tmp_path_factory.mktemp("store")
    project.dvc("remote", "add", "-q", "-d", "store", str(store))
    project.dvc("repro", "-q")
    project.dvc("push", "-q")
    for folder in (".dvc/cache", "out"):
        shutil.rmtree(project.root / folder)
    return project


def pull(root: Path, *paths: str) -> list[str]:
    told: list[str] = []
    with exclusive(root) as lock:
        LocalRunner(root, lock).pull(
            "any", paths, lambda level, line: told.append(f"{logging.getLevelName(level)} {line}")
        )
    return told


def test_what_is_asked_for_arrives_or_is_told_and_nothing_else_changes(pushed: Project) -> None:
    root = pushed.root
    assert pull(root, "out/first", "out/left") == [
        "INFO 2 outputs fetched, 2 files of them from the remote"
    ]
    assert (root / "out/first").read_text() == "0" and not (root / "out/right").exists()
    assert pull(root, "out/first") == ["INFO 1 outputs fetched, 0 files of them from the remote"]
    assert pull(root) == []

    (root / "out/first").unlink()
    (root / "out/first").write_text("of mine")
    with pytest.raises(StageFailed, match="out/first"):
        pull(root, "out/first")
    assert (root / "out/first").read_text() == "of mine"
    for file in Path(pushed.dvc("config", "remote.store.url").strip()).rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(StageFailed, match="out/right"):
        pull(root, "out/right")


def test_what_a_remote_lacks_here_is_told(pushed: Project) -> None:
    """A worker without the package of its kind of storage: what DVC raises then is none of its own
    errors."""
    pushed.dvc("config", "remote.store.url", "hdfs://nowhere/store")
    with pytest.raises(StageFailed, match=r"the DVC remote does not do: .*'dvc-hdfs'"):
        pull(pushed.root, "out/right")
