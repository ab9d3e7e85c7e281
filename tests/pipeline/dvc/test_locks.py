"""DVC's locks, each written by DVC: who works, who was killed, and what stands in the way of every
command.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from pipeline.__main__ import main
from pipeline.doctor import examine
from pipeline.dvc import locks
from pipeline.dvc.dag import load_dag
from pipeline.dvc.plan import plan
from pipeline.errors import PipelineError, StageFailed
from pipeline.prefect.flow import chosen
from pipeline.run.runner import LocalRunner, exclusive
from tests.pipeline.project import Project, environment

NOWHERE = "http://127.0.0.1:9/api"


def told(project: Project) -> dict[str, list[str]]:
    """What doctor says about locks, by level."""
    found: dict[str, list[str]] = {"ok": [], "note": [], "wrong": []}
    for finding in examine(project.root, NOWHERE):
        if finding.what.startswith("locks: "):
            found[finding.level].append(finding.what.removeprefix("locks: "))
    return found


@pytest.fixture(params=["/bin/sh", "/bin/bash"])
def at_work(
    project: Project, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[str]]:
    """A `dvc repro first` whose stage is under way, started by a shell that stays (dash) and by one
    that does not.
    """
    monkeypatch.setenv("SHELL", request.param)
    project.set(first={"then": "wait"})
    with project.start("repro", "first") as dvc:
        assert dvc.stdout is not None
        assert any("step 1" in line for line in dvc.stdout)
        yield dvc
        for process in project.processes():
            process.kill()


def test_a_dvc_at_work_is_told_from_one_that_was_killed(
    project: Project, at_work: subprocess.Popen[str]
) -> None:
    said = (
        f"`dvc repro first` (process {at_work.pid}) uses this workspace; wait for it, then run"
        " again"
    )
    assert told(project) == {"ok": [], "note": [said], "wrong": []}
    before = (project.root / "params.yaml").read_text()
    with (
        pytest.raises(PipelineError, match=re.escape(said)),
        chosen(project.root, "", {"last.value": 9}),
    ):
        pass
    assert (project.root / "params.yaml").read_text() == before
    stages = [
        process for process in project.processes() if "work.py" in " ".join(process.cmdline())
    ]
    at_work.kill()
    at_work.wait()
    found = told(project)
    assert found["note"] == ["`dvc repro first` was killed; DVC passes over its locks by itself"]
    (wrong,) = found["wrong"]
    named = re.search(r"kill ([\d ]+) before the next run", wrong)
    assert named and {int(number) for number in named[1].split()} == {stage.pid for stage in stages}
    for stage in stages:
        stage.send_signal(signal.SIGTERM)
    psutil.wait_procs(stages, timeout=10)
    assert told(project)["wrong"] == []
    project.dvc("repro", "--quiet", "first")
    assert not told(project)["wrong"]


def test_a_number_that_another_program_has_now_keeps_dvc_waiting(
    project: Project, at_work: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for process in project.processes():
        process.kill()
    at_work.wait()
    path = project.root / locks.RWLOCK
    path.write_text(path.read_text().replace(str(at_work.pid), str(os.getpid())))
    (wrong,) = told(project)["wrong"]
    assert f"DVC takes another program, process {os.getpid()}, for it" in wrong and wrong.endswith(
        "rm .dvc/tmp/rwlock"
    )
    assert main(["plan"]) == 2
    assert wrong in capsys.readouterr().err
    path.unlink()
    assert told(project)["ok"] and main(["plan"]) == 0


@pytest.mark.parametrize(
    "left", ["", '{"read": ', '{"out/first": {"write": {"pid": 1, "cmd": "dvc"}}}']
)
def test_a_damaged_list_is_wrong_and_every_refusal_names_the_remedy(
    project: Project, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    project.dvc("repro", "--quiet", "first")
    (project.root / locks.RWLOCK).write_text(left)
    assert told(project)["wrong"] == [locks.DAMAGED] and "rm .dvc/tmp/rwlock" in locks.DAMAGED
    assert main(["plan"]) == 2
    refused = capsys.readouterr().err
    assert locks.DAMAGED in refused and len(refused.splitlines()) == 1
    with exclusive(project.root) as lock, pytest.raises(StageFailed) as failed:
        LocalRunner(project.root, lock).run("left", lambda *_: None, {})
    assert failed.value.reason == locks.DAMAGED
    (project.root / locks.RWLOCK).unlink()
    assert told(project)["ok"] and main(["plan"]) == 0


@pytest.mark.parametrize("hardlink", [False, True])
def test_whoever_holds_the_whole_workspace_is_told(project: Project, hardlink: bool) -> None:
    project.dvc("config", "core.hardlink_lock", str(hardlink).lower())
    code = (
        "from dvc.repo import Repo\nwith Repo() as repo, repo.lock:\n    print('held',"
        " flush=True)\n    input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=project.root, env=environment(), text=True, **pipes
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        (note,) = told(project)["note"]
        assert (
            note == locks.BUSY
            if hardlink
            else f"(process {holder.pid}) looks at the whole workspace" in note
        )
        holder.communicate("\n")
    assert told(project)["ok"]


def test_dvc_s_list_is_read_as_dvc_writes_it(
    project: Project, at_work: subprocess.Popen[str]
) -> None:
    content = json.loads((project.root / locks.RWLOCK).read_text())
    assert set(content) == {"read", "write"}
    (holder,) = locks.holders(project.root)
    assert (holder.pid, holder.name) == (at_work.pid, "dvc repro first")
    assert not holder.killed and not holder.replaced
    with pytest.raises(
        PipelineError, match=rf"`dvc repro first` \(process {at_work.pid}\) uses this workspace"
    ):
        plan(project.root, load_dag(project.root))
