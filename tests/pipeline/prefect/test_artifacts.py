"""Cards and summaries hold what DVC recorded."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dualign.evaluation.measures import MEASURES
from pipeline.dvc import records
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.prefect.artifacts import (
    COMPARED,
    Result,
    card,
    counts,
    current_metrics,
    duration,
    flatten,
    key_of,
    metrics_table,
    pictures,
    policies_table,
    recorded_metrics,
    size,
    summary_page,
)
from tests.pipeline.project import Project

LOSSES = "reports/curves/left.json"


def test_a_card_tells_metrics_their_change_and_the_outputs(project: Project) -> None:
    root, spec = project.root, load_dag(project.root)["left"]
    cache = root / ".dvc/cache/files/md5"
    assert records.read(root, ["left"]) == {} and recorded_metrics(cache, spec, {}) == {}
    project.dvc("repro", "--quiet", "left")
    before = recorded_metrics(cache, spec, records.read(root, ["left"])["left"])
    project.set(left={"value": 1.25})
    project.dvc("repro", "--quiet", "left")
    write_losses(root, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    result = Result("Completed", "Completed in 2.0 s")
    page = card(root, trained(spec), result, before, current_metrics(root, spec))
    assert "## left: Completed in 2.0 s" in page
    assert "| accuracy | 1.25 | +0.25 |" in page
    md5 = next(
        out["md5"]
        for out in records.read(root, ["left"])["left"]["outs"]
        if out["path"] == "out/left"
    )
    assert f"| out/left | 4 B | 1 | `{md5[:12]}` |" in page
    picture = re.search(r"base64,([^)]+)\)", page)
    assert picture is not None and b"training loss" in base64.b64decode(picture[1])


def test_a_card_compares_policies_by_the_headline_measures() -> None:
    """`pipeline` imports nothing of `dualign`, so that the two lists are one is held here."""
    headline = {f"{measure.key}.mean" for measure in MEASURES if measure.headline}
    assert set(COMPARED) == headline


def trained(spec: StageSpec) -> StageSpec:
    """The stage, with the losses of a training among its outputs."""
    return dataclasses.replace(spec, outs=(*spec.outs, LOSSES))


def write_losses(root: Path, rows: list[dict[str, Any]]) -> None:
    (root / LOSSES).parent.mkdir(parents=True, exist_ok=True)
    (root / LOSSES).write_text(json.dumps(rows))


def test_every_training_of_a_stage_is_a_line_of_its_chart(project: Project) -> None:
    spec = trained(load_dag(project.root)["left"])
    rows = [
        {"training": f"step-{i}/policy", "step": s, "loss": 1 / s} for i in (1, 2) for s in (1, 2)
    ]
    write_losses(project.root, [*rows, {"training": "step-2/policy", "step": 3, "loss": None}])
    (chart,) = pictures(project.root, spec, {})
    assert {curve.name: curve.points for curve in chart.curves} == {
        f"step-{i}/policy": [(1, 1.0), (2, 0.5)] for i in (1, 2)
    }
    write_losses(project.root, [{"step": None, "loss": None}])
    assert pictures(project.root, spec, {}) == []


def test_changes_of_metrics() -> None:
    after = {
        "new": 1,
        "same": 2.5,
        "more": 1200,
        "cost.mean": -0.5,
        "cost.low": -1.0,
        "name": "x",
        "flag": True,
    }
    table = metrics_table({"same": 2.5, "more": 1000, "cost.mean": -0.25}, after)
    assert table.splitlines()[2:] == [
        "| new | 1 | new |",
        "| same | 2.5 |  |",
        "| more | 1,200 | +200 |",
        "| cost | -0.5 | -0.25 |",
    ]
    assert metrics_table({}, {"text": "only"}) == ""


def test_a_comparison_has_a_row_for_each_policy() -> None:
    policies = {
        "a": {"cost": {"mean": 0.1, "low": 0.0}, "odd": 3},
        "b-v1.1": {"cost": {"mean": 0.2}, "reward": {"mean": 1}},
    }
    after = flatten({"policies": policies, "limit": -0.3})
    assert policies_table({"policies.a.cost.mean": 0.3}, after).splitlines() == [
        "| policy | reward | cost |",
        "|---|---:|---:|",
        "| a |  | 0.1 (-0.2) |",
        "| b-v1.1 | 1 | 0.2 |",
    ]
    assert "policies" not in metrics_table({}, after)
    assert policies_table({}, {"limit": 1.0}) == ""


def test_a_comparison_is_drawn_beside_the_predicted_frontier(project: Project) -> None:
    spec = load_dag(project.root)["left"]
    (project.root / "data/dual").mkdir(parents=True)
    rows = [
        {"cost": 0.5, "reward": 1.0, "lam": 0.0},
        {"cost": -0.5, "reward": 0.5, "lam": 1.0},
        {"cost": None},
    ]
    (project.root / "data/dual/frontier.json").write_text(json.dumps({"rows": rows}))
    policies = {
        "a": {"cost": {"mean": 0.1}, "reward": {"mean": 0.9}},
        "b": {"cost": {"mean": 0.2}, "reward": None},
    }
    (chart,) = pictures(project.root, spec, flatten({"policies": policies, "limit": -0.3}))
    assert chart.points == {"a": (0.1, 0.9)} and chart.limit == -0.3
    assert chart.curves[0].points == [(-0.5, 0.5), (0.5, 1.0)]
    assert pictures(project.root, spec, {"accuracy": 1.0}) == []


def test_a_summary_names_each_stage_and_what_failed(project: Project) -> None:
    results = {
        "first": Result("Unchanged", "up to date", 0.01),
        "left": Result("Failed", "left: no space (exit 1)", 3.0),
        "right": Result("Restored", "from the cache", 0.2),
    }
    dag = load_dag(project.root)
    page = summary_page(project.root, "here", dag, results)
    assert (
        page.startswith("## 1 restored, 1 unchanged, 1 failed\n")
        and "**left: no space (exit 1)**" in page
    )
    for row in (
        "| first | unchanged |  |",
        "| left | failed | 3.0 s |",
        f"| [right](/artifacts/key/{key_of('right', 'here')}) |",
    ):
        assert row in page


def test_a_summary_says_where_the_report_is(project: Project) -> None:
    dag = load_dag(project.root)
    dag["last"] = dataclasses.replace(dag["last"], outs=("reports/index.html",))
    made = {"last": Result("Completed", "ran", 1.0)}
    page = project.root / "reports/index.html"
    assert f"Report: `dvc pull last` puts it here: `{page}`" in summary_page(
        project.root, "here", dag, made
    ), "workers have it"
    assert "Report" not in summary_page(
        project.root, "here", dag, {"last": Result("Failed", "last: no")}
    )
    page.parent.mkdir()
    page.write_text("")
    assert f"(file://{page}), a file" in summary_page(project.root, "here", dag, made)


def test_each_stage_has_a_key_of_its_own_in_each_workspace() -> None:
    names = ["run@a_b", "run@a-b", "run@a.b", "run@A_b", "run_a@b", "run"]
    keys = [key_of(name, place) for name in names for place in ("here", "Here", "a_b here")]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", key) for key in [*keys, key_of("a", "é")])
    found = key_of("dual_search@p_SACPO", "Al.node1-3f")
    assert re.fullmatch("stage-dual-search-p-sacpo-al-node1-3f-[0-9a-f]{6}", found)


def test_words() -> None:
    assert (
        counts(["Unchanged", "Completed", "Unchanged", "NotStarted"])
        == "1 completed, 2 unchanged, 1 not started"
    )
    assert [size(value) for value in (0, 1023, 1536, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.21, "3.2 s"), (59.99, "60.0 s"), (245, "4 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
