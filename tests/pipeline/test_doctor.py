"""Each thing that may be wrong is found and named with its remedy."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

from bench.nodes import serving
from pipeline import doctor
from pipeline.doctor import examine
from pipeline.prefect.server import admitted, reachable
from pipeline.run.runner import exclusive
from tests.pipeline.project import Project

NOWHERE = "http://127.0.0.1:9/api"


def findings(project: Project, level: str) -> str:
    return "\n".join(
        finding.what for finding in examine(project.root, NOWHERE) if finding.level == level
    )


def test_a_workspace_in_order(project: Project) -> None:
    project.dvc("config", "cache.type", "hardlink,symlink,copy")
    (project.root / "constraints.txt").write_text(
        f"# pins\ndvc=={doctor.importlib.metadata.version('dvc')}\n"
    )
    subprocess.run(["git", "add", "."], check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "-qm", "first"], check=True)
    assert not findings(project, "wrong")
    found = findings(project, "ok")
    assert all(
        text in found
        for text in ("4 stages", "as in constraints.txt", "as committed", "no run is going on")
    )


def test_what_is_not_as_it_should_be(project: Project) -> None:
    (project.root / "constraints.txt").write_text("dvc==0.1\nnot-installed==1.0\n")
    notes = findings(project, "note")
    for text in (
        "(tested with 0.1)",
        "differ from the last commit",
        "remote: none",
        "outputs are kept twice",
        f"none at {NOWHERE}",
    ):
        assert text in notes
    assert "not-installed" not in notes
    with exclusive(project.root):
        assert "another run uses this workspace" in findings(project, "note")


def test_what_an_interrupted_pip_left_is_no_package(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip renames what it replaces, and a kill leaves it there: a folder without METADATA."""
    (tmp_path / "~orch-2.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    version = doctor.importlib.metadata.version("dvc")
    (project.root / "constraints.txt").write_text(f"dvc=={version}\n")
    assert "as in constraints.txt" in findings(project, "ok")


def test_a_remote_that_answers_or_does_not(project: Project) -> None:
    project.dvc(
        "remote", "add", "-q", "-d", "store", str(project.root.parent / "made-by-the-first-push")
    )
    assert "DVC remote: store" in findings(project, "ok")
    project.dvc("remote", "modify", "-q", "store", "url", str(project.root / "work.py" / "store"))
    assert "DVC remote: store cannot be reached: " in findings(project, "wrong")
    assert "work.py is no folder to write to" in findings(project, "wrong")
    (project.root / ".dvc/config").write_text("[core]\n    remote = gone\n")
    told = findings(project, "wrong")
    assert "DVC remote: gone is the default and has no settings here; `dvc remote add" in told


def test_what_keeps_a_run_from_working(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "dvc.yaml").write_text("stages: {a: {cmd: 'x ${gone}'}}")
    monkeypatch.setattr(doctor, "ROOM", 2**62)
    wrong = findings(project, "wrong")
    assert "dvc.yaml" in wrong and "'gone'" in wrong and "dvc gc --workspace" in wrong


def test_a_cache_that_cannot_be_made_is_one_finding_of_all(project: Project) -> None:
    """Of a disk that is not mounted, say; it ended the examination."""
    (project.root / "taken").write_text("")
    project.dvc("cache", "dir", "-q", str(project.root / "taken/cache"))
    wrong = findings(project, "wrong")
    assert "taken/cache/files/md5 cannot be made (Not a directory); mount it" in wrong
    assert "disk: " in findings(project, "ok")


def test_no_remedy_takes_what_is_there(project: Project) -> None:
    """`dvc init -f`, which is what `dvc init` asks for then, removes the cache."""
    config = project.root / ".dvc/config"
    config.write_text(config.read_text() + "[corex]\n    a = b\n")
    wrong = findings(project, "wrong")
    assert "data['corex']; mend .dvc/config" in wrong and "dvc init" not in wrong


@pytest.mark.slow
def test_a_server_with_a_password(
    project: Project, tmp_path_factory: pytest.TempPathFactory, database: Path
) -> None:
    home = tmp_path_factory.mktemp("guarded")
    shutil.copy(database, home / "prefect.db")
    with serving(home, PREFECT_SERVER_API_AUTH_STRING="team:secret") as api:
        for told, level in (("", "wrong"), ("team:guess", "wrong"), ("team:secret", "ok")):
            with temporary_settings({PREFECT_API_AUTH_STRING: told}):
                (found,) = [
                    finding
                    for finding in examine(project.root, api)
                    if "Prefect server" in finding.what
                ]
            assert found.level == level and ("PREFECT_API_AUTH_STRING" in found.what) == (
                level == "wrong"
            )


def test_a_server_is_reached_or_not(server: str) -> None:
    assert (
        reachable(server)
        and admitted(server)
        and not reachable(NOWHERE)
        and not reachable("nonsense")
    )


def test_locks_that_cannot_be_written_keep_no_other_finding_back(project: Project) -> None:
    """As on a full disk, or one that is for reading only."""
    (project.root / ".dvc/tmp/run.lock").mkdir(parents=True)
    found = list(examine(project.root, NOWHERE))
    (locks,) = [finding for finding in found if finding.what.startswith("locks: ")]
    assert locks.level == "wrong" and locks.what.endswith("Is a directory; mend that and run again")
    assert any(finding.what.startswith("disk: ") for finding in found)
