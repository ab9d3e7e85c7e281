"""Where the Prefect server is, as Prefect's own settings have it, and what is said where it does
not answer.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.pipeline.project import Project, environment

DEAD = "http://127.0.0.1:9/api"


def told(project: Project, home: Path, *command: str, **settings: str) -> tuple[int, str]:
    """The exit status and the words of a Python module, with Prefect's settings in `home` and
    nowhere else.
    """
    bare = {name: value for name, value in environment().items() if not name.startswith("PREFECT_")}
    here = {**bare, "PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": "9", **settings}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project.root,
        env=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Path:
    made = tmp_path_factory.mktemp("prefect")
    shutil.copy(database, made / "prefect.db")
    return made


def test_without_an_address_a_server_is_optional(project: Project, home: Path) -> None:
    code, said = told(project, home, "pipeline", "doctor")
    assert (
        code == 0
        and f"note   Prefect server: none at {DEAD}; `prefect server start` gives you the pages"
        in said
    )
    code, said = told(project, home, "pipeline", "serve")
    assert code == 2 and "start one in another terminal: prefect server start" in said


def test_a_dead_address_of_the_profile_is_wrong_and_told_as_such(
    project: Project, home: Path
) -> None:
    assert told(project, home, "prefect", "config", "set", f"PREFECT_API_URL={DEAD}")[0] == 0
    line = (
        f"no Prefect server answers at {DEAD}, which is from PREFECT_API_URL of Prefect's profile"
        " ephemeral "
    )
    line += "(prefect config unset PREFECT_API_URL); start that server, or take the address back"
    code, said = told(project, home, "pipeline", "doctor")
    assert code == 1 and f"wrong  Prefect server: {line}" in said
    assert told(project, home, "pipeline", "run") == (2, f"{line}\n")
    assert told(project, home, "prefect", "config", "unset", "--yes", "PREFECT_API_URL")[0] == 0
    assert told(project, home, "pipeline", "doctor")[0] == 0


def test_a_dead_address_of_the_shell_or_of_a_file_is_told_too(project: Project, home: Path) -> None:
    code, said = told(project, home, "pipeline", "run", PREFECT_API_URL=DEAD)
    assert code == 2 and "of this shell (unset PREFECT_API_URL)" in said
    (project.root / "prefect.toml").write_text(f'[api]\nurl = "{DEAD}"\n')
    code, said = told(project, home, "pipeline", "run")
    assert code == 2 and "PREFECT_API_URL of .env, prefect.toml or pyproject.toml here" in said


def test_a_proxy_is_not_asked_for_this_machine_and_told_of_where_it_is_asked(
    project: Project, home: Path, server: str
) -> None:
    """Nodes of a cluster have one for the way out; a run's own server did not come up with it."""
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "example.org"}
    assert told(project, home, "pipeline", "status", PREFECT_API_URL=server, **proxy)[0] == 0
    away = "http://login.invalid:4200/api"
    code, said = told(project, home, "pipeline", "status", PREFECT_API_URL=away, **proxy)
    assert code == 2 and "http_proxy is asked for it, export no_proxy=login.invalid," in said


@pytest.mark.parametrize("command", ["run", "status"])
def test_a_home_that_cannot_be_written_is_one_line(project: Project, command: str) -> None:
    """`status` ended with a traceback, `run` with the advice to wait longer."""
    home = Path("/proc/nowhere")  # read-only for root too
    code, said = told(project, home, "pipeline", command)
    assert code == 2 and "Traceback" not in said
    assert f"{home}: Prefect's server cannot keep its records there" in said.splitlines()[-1]


def test_a_server_of_ones_own_that_does_not_come_up_is_one_line(
    project: Project, home: Path
) -> None:
    late = {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "0",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    }
    code, said = told(project, home, "pipeline", "run", "--stage", "first", **late)
    assert (
        code == 2
        and "\nPrefect's own server did not come up; start one in another terminal" in said
    )
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_of_ones_own_outlives_no_run_and_hears_no_ctrl_c(
    project: Project, home: Path, number: signal.Signals
) -> None:
    """A terminal sends it to all processes; without its server the run would ask for minutes.
    SIGTERM goes to the run alone.
    """
    project.set(first={"then": "wait"})
    bare = {name: value for name, value in environment().items() if not name.startswith("PREFECT_")}
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "--stage", "first"],
        cwd=project.root,
        env={**bare, "PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": "9"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stderr is not None
    assert any("step 1 of 2" in line for line in run.stderr)
    below = psutil.Process(run.pid).children(recursive=True)  # the stage, and the server
    assert any("uvicorn" in process.cmdline() for process in below)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        os.kill(run.pid, number)
    rest = run.stderr.read()
    run.stderr.close()
    assert run.wait() == (130 if number == signal.SIGINT else -number), rest
    assert "Cancelled" in rest and "Unable to connect" not in rest and "Traceback" not in rest
    assert psutil.wait_procs(below, timeout=30)[1] == []
