"""The plan agrees with what DVC then does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.dvc.dag import load_dag
from pipeline.dvc.plan import StageStatus, plan, select, with_upstream
from pipeline.errors import PipelineError
from pipeline.run.runner import LocalRunner, exclusive
from tests.pipeline.project import Project


def prospects(root: Path) -> dict[str, str]:
    return {name: status.prospect for name, status in plan(root, load_dag(root)).items()}


def test_the_plan_is_what_then_happens(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    root, dag = project.root, load_dag(project.root)
    assert plan(root, dag) == dict.fromkeys(dag, StageStatus("stale", ("never run",)))
    project.dvc("repro", "--quiet")
    assert plan(root, dag) == dict.fromkeys(dag, StageStatus("up to date"))

    project.set(left={"value": 7})
    assert plan(root, dag)["left"] == StageStatus("stale", ("left modified",))
    assert prospects(root) == {
        "first": "up to date",
        "left": "stale",
        "right": "up to date",
        "last": "maybe stale",
    }
    assert set(json.loads(project.dvc("status", "--json"))) == {"left"}
    project.dvc("repro", "--quiet")

    project.set(left={"value": 1})
    capsys.readouterr()
    assert prospects(root)["left"] == "restorable"
    assert not capsys.readouterr().out
    with exclusive(root) as lock:
        assert LocalRunner(root, lock).run("left", lambda *_: None, {}) == "Restored"
    assert plan(root, dag, ["last"]) == {"last": StageStatus("restorable", ("out/left modified",))}

    project.dvc("repro", "--quiet")
    (root / "metrics-right.json").unlink()
    assert plan(root, dag)["right"] == StageStatus("restorable", ("metrics-right.json deleted",))
    shutil.rmtree(root / ".dvc/cache/runs")
    project.set(last={"value": 9})
    assert prospects(root)["last"] == "stale"


def test_a_changed_command_is_a_reason(project: Project) -> None:
    project.dvc("repro", "--quiet", "first")
    path = project.root / "dvc.yaml"
    path.write_text(path.read_text().replace("work.py first", "-u work.py first"))
    assert plan(project.root, load_dag(project.root))["first"].reasons == ("changed command",)


def test_stages_are_chosen_by_name_or_family(repo_root: Path) -> None:
    dag = load_dag(repo_root)
    assert select(dag, ["sft"]) == ["sft"]
    assert select(dag, ["evaluate@sft", "score", "sft"]) == ["sft", "score", "evaluate@sft"]
    assert select(dag, ["dual_search"]) == [name for name in dag if name.startswith("dual_search@")]
    assert with_upstream(dag, ["score"]) == [
        "prepare",
        "sft",
        "reward_model",
        "cost_model",
        "score",
    ]
    assert with_upstream(dag, ["report"]) == list(dag)
    with pytest.raises(PipelineError, match="dual_int: no such stage; did you mean dual_init"):
        select(dag, ["dual_int"])
    with pytest.raises(PipelineError, match="zzz: no such stage; one of prepare, sft"):
        select(dag, ["zzz"])


def test_a_stage_that_is_gone_since_the_run_began_is_told(project: Project) -> None:
    dag = load_dag(project.root)
    path = project.root / "dvc.yaml"
    graph = json.loads(path.read_text())
    del graph["stages"]["last"]
    path.write_text(json.dumps(graph))
    with pytest.raises(PipelineError, match=r"have no stage last any more; run again$"):
        plan(project.root, dag, ["last"])
