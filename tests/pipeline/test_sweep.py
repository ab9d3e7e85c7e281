"""A grid of params: its points, their runs, the experiments that they become, and the table."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dvc.repo.experiments.refs import ExpRefInfo
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort

from pipeline.__main__ import main
from pipeline.dvc import checkout
from pipeline.dvc.checkout import committed
from pipeline.errors import PipelineError
from pipeline.sweep import Point, grid, save_point, table, unmatched
from tests.pipeline.project import WORK, Project, edit_meanwhile, environment, git, until

ROOT = Path(__file__).resolve().parents[2]


def test_points_are_the_product_of_the_values() -> None:
    points = grid(["a.b=1e-5,0.5", "c=x,[1, 2]"])
    assert [list(point.settings.values()) for point in points] == [
        [1e-5, "x"], [1e-5, [1, 2]], [0.5, "x"], [0.5, [1, 2]],
    ]  # fmt: skip
    assert [point.name for point in points[:2]] == ["a.b=1e-05,c=-x", "a.b=1e-05,c=-1,-2"]
    for wrong in ("a", "a=", "=1"):
        with pytest.raises(PipelineError, match="write key=value"):
            grid([wrong])
    for wrong in ("a=[1", "a=1,,2"):
        with pytest.raises(PipelineError, match=r"^a: the values:\d: not valid YAML"):
            grid([wrong])
    for twice in (["a=1", "b=2", "a=3"], ["a=1,1"], ['a="x/y","x?y"']):
        with pytest.raises(PipelineError, match=r"set twice|two points have this name"):
            grid(twice)


def test_no_value_is_one_of_the_values() -> None:
    points = grid(["lora.quantise=null,nf4"])
    assert [point.name for point in points] == ["lora.quantise=null", "lora.quantise=-nf4"]
    assert points[0].settings == {"lora.quantise": None}


@pytest.mark.parametrize(
    ("value", "key"), [("2026-11-29,b", "report.title"), ("0x10,7", "seed"), ("1_000", "seed")]
)
def test_a_value_means_what_it_means_in_the_file(value: str, key: str) -> None:
    """YAML makes a date of three numbers, which a title may begin with."""
    with pytest.raises(PipelineError, match=f"^{key}: the values:1: .* is no decimal number"):
        grid([f"{key}={value}"])
    assert [point.settings for point in grid(['report.title="2026-11-29"'])] == [
        {"report.title": "2026-11-29"}
    ]


def test_a_name_fits_into_that_of_a_file_and_stays_its_own() -> None:
    many = [f"a=[{'x, ' * 100}{last}]" for last in "yz"]
    names = [grid([one])[0].name for one in many]
    assert all(len(name) < 250 for name in names) and names[0] != names[1]


@pytest.mark.parametrize("value", ["uv.lock", "a..b", ".x.", "a@{b", "~^:?*[\\\\", "ü/日本", "-"])
def test_git_takes_every_name(value: str) -> None:
    """It was asked after the run, and refused one that ends in `.lock`."""
    (point,) = grid([f"a={json.dumps(value)}"])
    ref = str(ExpRefInfo("0" * 40, point.name))
    assert subprocess.run(["git", "check-ref-format", ref], check=False).returncode == 0


def test_a_table_shows_what_differs_or_what_is_asked_for() -> None:
    points = [
        Point({"a": 1}, "completed", {"m.x": 0.25, "m.same": 3, "m.flag": True, "m.curve": [1]}),
        Point({"a": 2}, "completed", {"m.x": 1 / 3, "m.same": 3, "m.flag": True, "m.curve": [2]}),
        Point({"a": 3}, "failed"),
    ]
    assert table(points, []) == [
        ["a", "", "m.x"],
        ["1", "completed", "0.25"],
        ["2", "completed", "0.3333"],
        ["3", "failed", ""],
    ]
    assert table(points, ["m.y"])[0] == ["a", ""]
    (told,) = unmatched(points, ["m.y", "m.x", "m.*"])
    assert told.startswith("--metric m.y: no number among the metrics of these runs")
    assert table(points[:1], [])[0] == [
        "a",
        "",
        "m.x",
        "m.same",
    ], "where nothing differs, what there is"
    assert table(points, ["m.s*"])[:2] == [["a", "", "m.same"], ["1", "completed", "3"]]


@pytest.fixture
def sweeping(project: Project, server: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a commit, and rows that git ignores."""
    monkeypatch.setenv("PREFECT_API_URL", server)
    monkeypatch.setenv(
        "PYTHONPATH", str(ROOT)
    )  # a point runs the pipeline of its own tree; this project has none
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@example.org")
    graph, rows = json.loads((project.root / "dvc.yaml").read_text()), project.root / "rows"
    graph["stages"]["first"]["deps"].append("rows")
    (project.root / "dvc.yaml").write_text(json.dumps(graph))
    rows.mkdir()
    (rows / ".gitignore").write_text("*.txt\n")
    (rows / "mine.txt").write_text(" and my rows")
    git(project.root, "add", ".")
    git(project.root, "commit", "-qm", "first")
    return project


def test_a_point_that_waits_for_people_leaves_its_question_and_reads_the_answer(
    sweeping: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeping.set(first={"then": "ask"})
    assert main(["sweep", "first.value=7", "--stage", "first"]) == 1
    assert "awaits labels" in capsys.readouterr().out
    question = sweeping.root / "labels/to-label-1.jsonl"
    question.with_name("labelled-1.jsonl").write_text(question.read_text().replace("null", "1"))
    assert main(["sweep", "first.value=7", "--stage", "first"]) == 0


def test_a_sweep_leaves_the_workspace_alone_and_its_points_as_experiments(
    sweeping: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project = sweeping
    before = (project.root / "params.yaml").read_text()
    assert main(["sweep", "first.value=7,8", "--stage", "first"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["first.value", "accuracy.mean"],
        ["7", "completed", "7"],
        ["8", "completed", "8"],
    ]
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(limit=2, sort=FlowRunSort.START_TIME_DESC)
    assert {run.name for run in runs} == {"first first.value=7", "first first.value=8"}
    assert (project.root / "params.yaml").read_text() == before
    assert not [path for path in (project.root / ".dvc/tmp/stages").iterdir() if path.is_dir()]
    assert sorted(project.dvc("exp", "list", "--name-only").split()) == [
        "first.value=7",
        "first.value=8",
    ]
    project.set(first={"value": 8})
    assert "is cached" in project.dvc("repro", "first"), (
        "git ignores the rows, and the points read them"
    )
    assert (project.root / "out/first").read_text() == "8 and my rows"
    project.dvc("get", ".", "metrics-first.json", "--rev", "first.value=7", "-o", "seven.json")
    assert json.loads((project.root / "seven.json").read_text())["accuracy"]["mean"] == 7
    shown = json.loads(project.dvc("exp", "show", "--json"))
    kept = {
        row["name"]: row["data"]
        for found in shown
        for entry in found["experiments"] or []
        for row in entry["revs"]
    }
    assert kept["first.value=8"]["metrics"]["metrics-first.json"]["data"]["accuracy"]["mean"] == 8


def test_what_is_edited_meanwhile_is_no_points(sweeping: Project) -> None:
    """Later points of a sweep took over params that somebody edited for the next run, unsaid."""
    root = sweeping.root
    edit_meanwhile(root, "work.py", WORK)
    assert main(["sweep", "first.value=7,8", "--stage", "first"]) == 0
    assert '"value": 33' in (root / "params.yaml").read_text()
    for value in (7, 8):
        ref = ExpRefInfo(git(root, "rev-parse", "HEAD").strip(), f"first.value={value}")
        assert '"last": {"value": 3,' in git(root, "show", f"{ref}:params.yaml")


def test_a_point_that_another_sweep_runs_is_waited_for(
    sweeping: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sweep ended after a minute, with its later points not run."""
    monkeypatch.setattr(checkout, "PAUSE", 0.1)
    root = sweeping.root
    sweeping.set(first={"then": "meet"})
    words = ["sweep", "first.value=7,8", "--stage", "first"]
    command = [sys.executable, "-m", "pipeline", *words]
    with subprocess.Popen(command, cwd=root, env=environment()) as first:
        until(lambda: (root / ".scratch/first").exists())
        with subprocess.Popen(command, cwd=root, env=environment(), stderr=subprocess.PIPE) as last:
            assert last.stderr is not None
            told = next(line for line in last.stderr if b"runs here" in line)
            assert told.startswith(b"sweep-first.value=7 runs here already (process ")
            last.send_signal(signal.SIGINT)
            assert last.wait(20) == 130, "Ctrl-C ends the waiting"
        threading.Timer(3.0, (root / ".scratch/second").touch).start()
        assert main(words) == 0
        assert first.wait(60) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:-1] for row in rows if row[0] == "7"] == [["7", "up", "to", "date"]]


def test_the_run_of_a_sweep_that_was_killed_keeps_its_tree(sweeping: Project) -> None:
    """The next sweep took it away from below the stage."""
    root = sweeping.root
    sweeping.set(first={"then": "meet"})
    command = [sys.executable, "-m", "pipeline", "sweep", "first.value=7", "--stage", "first"]
    with subprocess.Popen(command, cwd=root, env=environment()) as first:
        until(lambda: (root / ".scratch/first").exists())
        first.kill()
    (root / ".scratch/first").unlink()
    with subprocess.Popen(command, cwd=root, env=environment(), stderr=subprocess.PIPE) as last:
        assert last.stderr is not None
        lines = iter(last.stderr.readline, b"")
        told = next(line for line in lines if b"runs here" in line or b"starts" in line)
        (root / ".scratch/second").touch()
        (root / ".scratch/third").touch()
        last.stderr.read()
    assert b"sweep-first.value=7 runs here already" in told and last.returncode == 0


def test_an_experiment_of_other_params_is_not_replaced_without_a_word(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """A point's name says what it sets, and not what params.yaml held beside."""
    git(project.root, "add", ".")
    git(project.root, "commit", "-qm", "first")
    commit = committed(project.root)
    (project.root / "dvc.lock").write_text("{}")
    ref = str(ExpRefInfo(commit, "left.value=5"))
    save_point(project.root, commit, "left.value=5")
    before = git(project.root, "rev-parse", ref).strip()
    save_point(project.root, commit, "left.value=5")
    assert not caplog.records and git(project.root, "rev-parse", ref).strip() == before
    project.set(right={"value": 9})
    save_point(project.root, commit, "left.value=5")
    (told,) = caplog.messages
    assert told.startswith("left.value=5: replaces") and told.endswith(
        f"git branch NAME {before[:10]}"
    )


def test_a_sweep_is_refused_before_anything_runs(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    git(project.root, "add", ".")
    git(project.root, "commit", "-qm", "first")
    assert main(["sweep", "left.valu=1,2"]) == 2
    assert "did you mean left.value?" in capsys.readouterr().err
    (project.root / "work.py").write_text("")
    assert main(["sweep", "left.value=1,2"]) == 2
    assert "1 files differ from the last commit, first work.py" in capsys.readouterr().err


def test_a_sweep_whose_experiments_git_could_not_commit_is_refused_before_anything_runs(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git tells it by itself when the first point has run, hours later perhaps."""
    git(project.root, "add", ".")
    git(project.root, "commit", "-qm", "first")
    for who, what in itertools.product(("AUTHOR", "COMMITTER"), ("NAME", "EMAIL")):
        monkeypatch.delenv(f"GIT_{who}_{what}", raising=False)
    monkeypatch.delenv("EMAIL", raising=False)
    for file in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(file, os.devnull)
    git(project.root, "config", "user.useConfigOnly", "true")
    assert main(["sweep", "left.value=1,2"]) == 2
    assert "git config user.email ADDRESS" in capsys.readouterr().err
