"""Other training seeds: run once each, gathered, and set beside this run in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.pipeline.project import REPORT, Project, add_report, edit_meanwhile, gathered, git

ROOT = Path(__file__).resolve().parents[2]

# Whoever runs it, in whichever tree.
NOTED = """
import os, sys
with open(os.environ["RUNS"], "a") as runs:
    runs.write(" ".join(sys.argv[1:] or ["report"]) + "\\n")
"""


@pytest.fixture
def seeding(project: Project, server: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a seed, of which `first` and a report make use, and with a commit."""
    monkeypatch.setenv("PREFECT_API_URL", server)
    monkeypatch.setenv("RUNS", str(project.root / "kept" / "runs.txt"))
    (project.root / "kept").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@example.org")
    root = project.root
    add_report(root)
    for name in ("work.py", "report.py"):
        (root / name).write_text((root / name).read_text() + NOTED)
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return project


def ran(project: Project) -> list[str]:
    """The stages that ran since this was asked last."""
    path = project.root / "kept" / "runs.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def ends(out: str) -> list[list[str]]:
    """The table's rows, without the first, which has titles."""
    return [line.split() for line in out.splitlines()[-3:]]


def test_seeds_run_once_and_again_after_a_failure_or_a_change(
    seeding: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """One project, since each call starts flow runs of its own."""
    (seeding.root / "reports/seeds/8.json").write_text("of other params")
    seeding.set(last={"then": "refuse"})
    assert main(["seeds", "8"]) == 1
    assert gathered(seeding.root) == {}, "what is there would be of other params"
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["8", "failed"]

    seeding.set(last={"then": "end"})
    ran(seeding)
    before = (seeding.root / "params.yaml").read_text()
    assert main(["seeds", "8", "9"]) == 0
    assert gathered(seeding.root) == {"8": 3.8, "9": 3.9}
    assert (seeding.root / "reports/index.html").read_text() == "8 9"
    assert (seeding.root / "params.yaml").read_text() == before
    rows = [["7", "this", "run", "3.7"], ["8", "completed", "3.8"], ["9", "completed", "3.9"]]
    assert ends(capsys.readouterr().out) == rows
    once = ["last"]  # what it reads is the same for every seed
    two = ["first", "first"]  # the failed run of seed 8 had come that far
    assert sorted(ran(seeding)) == sorted([*two, *once, *3 * ["report"]])

    assert main(["seeds", "8", "9"]) == 0
    again = [["7", "this", "run", "3.7"], ["8", "up", "to", "date", "3.8"]]
    assert ends(capsys.readouterr().out)[:2] == again
    assert ran(seeding) == []
    assert gathered(seeding.root) == {"8": 3.8, "9": 3.9}
    assert (seeding.root / "reports/index.html").read_text() == "8 9"

    seeding.set(last={"value": 5})
    assert main(["seeds", "8"]) == 0
    assert gathered(seeding.root)["8"] == 5.8
    assert sorted(ran(seeding)) == ["last", "report", "report"], "what is new, once"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7"], "7: the seed of params.yaml, which counts anyway; name other seeds"),
        (["8", "9", "8"], "8: named twice"),
    ],
)
def test_a_slip_is_told_in_one_line(
    seeding: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["seeds", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 1


def test_a_word_is_no_seed(seeding: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["seeds", "8,9"])
    assert "8,9 is not a whole number of 0 or more" in capsys.readouterr().err


def test_a_graph_without_a_report_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["seeds", "8"]) == 2
    assert "params.yaml: seed is no whole number" in capsys.readouterr().err


def test_what_is_edited_while_seeds_run_is_told(
    seeding: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """This run was made by the new params, beside seeds of the old ones."""
    root = seeding.root
    edit_meanwhile(root, "report.py", REPORT)
    assert main(["seeds", "8"]) == 2
    assert "params.yaml: edited while the seeds ran" in capsys.readouterr().err
    assert gathered(root) == {"8": 3.8} and not (root / "reports/index.html").exists()
