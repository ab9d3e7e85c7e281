"""The command line: what it says, and its exit status."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main, parser
from pipeline.errors import fault
from pipeline.prefect import identity
from tests.pipeline.project import Project


def test_plan(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "first  stale  never run",
        "left   stale  never run",
        "right  stale  never run",
        "last   stale  never run",
        "0 of 4 stages are up to date",
    ]
    project.dvc("repro", "--quiet")
    assert main(["plan"]) == 0
    assert capsys.readouterr().out == "4 of 4 stages are up to date\n"


def test_the_plan_with_its_cost(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo_root)
    assert main(["plan", "--cost", "--gpu", "l4", "--price", "2", "--parameters", "1.5e9"]) == 0
    _, _, table = capsys.readouterr().out.partition("stages are up to date\n\n")
    head, *rows = table.splitlines()
    assert head.split()[:3] == ["stage", "tokens", "trained"]
    found = {row.split()[0]: row.split() for row in rows}
    *_, hours, money = found["all"]
    assert float(money) == pytest.approx(2 * float(hours), abs=0.02)
    told = "\n".join(rows)
    assert "1.5e+09 weights" in told and "l4, 121 TFLOP/s in bf16" in told and "40%" in told
    assert "not reckoned: prepare, dual_init, report" in told
    assert "more than the 24 GiB of l4: sft" in told


def test_a_plan_whose_cost_cannot_be_told(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--cost"]) == 2
    assert "params.yaml: a key is missing" in capsys.readouterr().err


def test_run_and_status(
    project: Project,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    assert main(["run", "--stage", "right", "--set", "right.value=5", "--jobs", "1"]) == 0
    assert (project.root / "out/right").read_text() == "5"
    capsys.readouterr()
    assert main(["status", "--last", "1"]) == 0
    title, run, _, _, *stages = capsys.readouterr().out.splitlines()
    mine = identity.name(project.root)
    assert title == f"runs of workspace {mine}:" and "right right.value=5: 2 completed" in run
    assert [line.split()[:2] for line in stages] == [["first", "Completed"], ["right", "Completed"]]
    monkeypatch.setenv("DUALIGN_WORKSPACE", "others")
    assert main(["status"]) == 0
    assert "none yet; start one" in capsys.readouterr().out
    assert main(["status", "--all", "--last", "1"]) == 0
    assert f"{mine}: right right.value=5: 2 completed" in capsys.readouterr().out
    project.set(right={"then": "refuse"})
    assert main(["run", "--stage", "right"]) == 1
    project.set(right={"then": "ask"})
    assert main(["run", "--stage", "right"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--stage", "lft"], "lft: no such stage; did you mean left?"),
        (["run", "--set", "left.valu=1"], "did you mean left.value?"),
        (["run", "--set", "left"], "left: write key=value"),
        (["run", "--set", "left.value="], "left.value=: write key=value"),
    ],
)
def test_a_slip_is_told_in_one_line(
    project: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 1


def test_an_address_without_its_end(
    project: Project,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = server.removesuffix("/api")
    monkeypatch.setattr("pipeline.prefect.server.address", lambda: short)
    assert main(["deploy"]) == 2
    assert (
        f"PREFECT_API_URL={short} lacks its end: PREFECT_API_URL={short}/api"
        in capsys.readouterr().err
    )


def test_doctor(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "4 stages" in capsys.readouterr().out
    (project.root / "dvc.yaml").write_text("stages: {a: {}}")
    assert main(["doctor"]) == 1


def test_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan"]) == 2
    assert "run this in the root of the repository" in capsys.readouterr().err


def test_the_guide_names_commands_that_exist(repo_root: Path) -> None:
    pages = [
        (repo_root / "docs" / page).read_text().splitlines()
        for page in ("prefect.md", "cluster.md")
    ]
    found = [
        re.match(r"(?:\w+=\S+ |exec )*python -m pipeline (.*)", line)
        for page in pages
        for line in page
    ]
    commands = [shlex.split(match[1], comments=True) for match in found if match]
    told = {
        "plan", "run", "serve", "status", "doctor", "deploy", "work", "sweep", "seeds", "since",
    }  # fmt: skip
    assert {command[0] for command in commands} == told
    for command in commands:
        assert callable(parser().parse_args(command).command)


def test_help_and_the_graph_do_without_prefect(repo_root: Path) -> None:
    code = (
        "import pipeline.__main__, pipeline.dvc.dag, pipeline.dvc.plan, sys; sys.exit('prefect' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=False).returncode == 0
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline", "-h"], cwd=repo_root, capture_output=True, text=True
    )
    assert "docs/prefect.md" in shown.stdout and "130  interrupted" in shown.stdout


def test_prefect_takes_its_settings_from_the_repository(repo_root: Path) -> None:
    code = (
        "import sys; from prefect.settings import get_current_settings; server ="
        " get_current_settings().server\ntold = server.analytics_enabled, server.ui.v2_enabled,"
        " server.ephemeral.startup_timeout_seconds\nsys.exit(told != (False, False, 120))"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=repo_root, env=bare, check=False
        ).returncode
        == 0
    )


def test_a_file_of_dvc_that_cannot_be_had_is_told_in_one_line(
    project: Project, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(project.root / ".dvc/tmp")
    (project.root / ".dvc/tmp").write_text("")
    for command in (["plan"], ["run", "--stage", "first"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert ".dvc/tmp" in said and said.endswith("; mend that and run again\n")


def test_a_full_disk_is_told_though_the_system_names_no_file() -> None:
    full = fault(OSError(errno.ENOSPC, "No space left on device"))
    assert full == f"{Path.cwd()}: No space left on device; free space there and run again"
    assert fault(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) == ""


def test_a_name_that_is_no_utf_8_is_told(
    project: Project, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC and its database know no other; a folder of somebody's rows may hold one."""
    graph = project.root / "dvc.yaml"
    graph.write_text(
        graph.read_text().replace('"deps": ["work.py"]', '"deps": ["work.py", "rows"]')
    )
    (project.root / "rows").mkdir()
    (project.root / os.fsdecode(b"rows/caf\xe9.txt")).write_text("1")
    for command in (["plan"], ["run", "--stage", "first"]):
        assert main(command) == 2
        assert "caf\\udce9.txt': a name that is no UTF-8" in capsys.readouterr().err


def test_a_server_tells_of_200_runs_at_most(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["status", "--last", "201"])
    assert "201 is more than the 200" in capsys.readouterr().err


def test_a_key_is_set_once(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    before = (project.root / "params.yaml").read_text()
    assert main(["run", "--set", "first.value=3", "--set", "first.value=4"]) == 2
    assert capsys.readouterr().err == "first.value: set twice; set it once\n"
    assert (project.root / "params.yaml").read_text() == before
