"""An earlier run, taken from git and DVC and set beside this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualign.core.records import EarlierRun, read_record
from pipeline.__main__ import main
from pipeline.earlier import KEPT, keep
from pipeline.errors import PipelineError
from tests.pipeline.project import Project, git

# Compares one policy, whose cost is `value`, and says what it ran with.
REPORT = """
import json, pathlib
params = json.loads(pathlib.Path("params.yaml").read_text().split("# ", 1)[0])["last"]
compared = {
    "reference": "sft", "confidence": 0.95, "limit": params["value"], "recommended": None,
    "nearest": None, "missing": [], "uncertified": [], "certificates": {}, "params": {},
    "policies": {},
}
ran = {
    "stage": "sft", "item": None, "params": params, "versions": {}, "seconds": 1.0,
    "peak_rss_mib": 1.0, "throughput": {},
}
pathlib.Path("reports/provenance").mkdir(exist_ok=True, parents=True)
pathlib.Path("reports/comparison.json").write_text(json.dumps(compared))
pathlib.Path("reports/provenance/sft.json").write_text(json.dumps(ran))
"""


@pytest.fixture
def committed(project: Project) -> Project:
    """A project with a report, whose first run is a commit."""
    root = project.root
    graph = json.loads((root / "dvc.yaml").read_text())
    graph["stages"] = {
        "report": {
            "cmd": "python report.py",
            "deps": ["report.py"],
            "params": ["last"],
            "outs": ["reports/provenance/sft.json"],
            "metrics": ["reports/comparison.json"],
        }
    }
    (root / "dvc.yaml").write_text(json.dumps(graph))
    (root / "report.py").write_text(REPORT)
    (root / "reports").mkdir()
    (root / ".gitignore").write_text("/reports/*\n__pycache__\n")
    run(project, 1)
    commit(project, "one")
    return project


def run(project: Project, value: float) -> None:
    """A run with this value."""
    project.set(last={"value": value})
    project.dvc("repro", "--quiet")


def commit(project: Project, message: str) -> None:
    """A commit of everything."""
    git(project.root, "add", ".")
    git(project.root, "commit", "-qm", message)


def limit(root: Path) -> float | None:
    """That of the run that is kept."""
    return read_record(root / KEPT, EarlierRun).comparison.limit


def test_the_newest_commit_of_other_results_is_kept(
    committed: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    root = committed.root
    with pytest.raises(PipelineError, match="no commit has the results of another run"):
        keep(root, None)
    assert not (root / KEPT).exists()

    run(committed, 2)
    assert main(["since"]) == 0
    assert f"{KEPT}: the run of" in capsys.readouterr().out
    kept = read_record(root / KEPT, EarlierRun)
    assert kept.comparison.limit == 1 and kept.stages[0].params["value"] == 1
    assert kept.commit == git(root, "rev-parse", "HEAD").strip() and kept.name == kept.commit[:10]
    assert kept.date == git(root, "show", "-s", "--format=%cs").strip()

    commit(committed, "two")
    (root / "notes.txt").write_text("of the results nothing changed")
    commit(committed, "three")
    keep(root, None)
    assert limit(root) == 1, "the last commit has the results of the workspace"


def test_a_revision_or_an_experiment_is_named(committed: Project) -> None:
    root = committed.root
    run(committed, 2)
    committed.dvc("exp", "save", "--name", "tried")
    run(committed, 3)
    commit(committed, "three")
    for name, found in {"HEAD~1": 1, "HEAD": 3, "tried": 2}.items():
        assert keep(root, name).startswith(f"{name}, ")
        assert limit(root) == found


def test_what_cannot_be_had_is_told_and_nothing_is_replaced(
    committed: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    root = committed.root
    keep(root, "HEAD")
    before = (root / KEPT).read_text()
    assert main(["since", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("nowhere: neither a revision of git nor an exp")

    git(root, "rm", "-q", "dvc.lock")
    commit(committed, "no run")
    with pytest.raises(PipelineError, match=r"HEAD: reports/comparison\.json: no run is committed"):
        keep(root, "HEAD")
    committed.dvc("gc", "--force", "--workspace")
    with pytest.raises(PipelineError, match="neither DVC's cache nor its remote has this"):
        keep(root, "HEAD~1")
    assert (root / KEPT).read_text() == before


def test_a_shallow_clone_may_lack_what_is_asked_for(committed: Project) -> None:
    root = committed.root
    (root / ".git/shallow").write_text(git(root, "rev-parse", "HEAD"))
    for revision in (None, "HEAD~1"):
        with pytest.raises(PipelineError, match="git fetch --unshallow brings older commits"):
            keep(root, revision)


def test_half_a_merge_in_dvc_lock_is_told_and_one_of_an_earlier_commit_is_passed_over(
    committed: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    root = committed.root
    whole = (root / "dvc.lock").read_text()
    run(committed, 2)
    other = (root / "dvc.lock").read_text()
    (root / "dvc.lock").write_text(f"<<<<<<< HEAD\n{whole}=======\n{other}>>>>>>> two\n")
    assert main(["since"]) == 2
    assert "take one side of a merge" in capsys.readouterr().err
    commit(committed, "half a merge")
    with pytest.raises(PipelineError, match="HEAD: "):
        keep(root, "HEAD")
    (root / "dvc.lock").write_text(other)
    keep(root, None)
    assert limit(root) == 1
