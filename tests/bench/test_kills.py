"""Kills at random moments: two of the quickest stage, and that the laboratory would see what went
wrong.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from bench import cluster, kills
from bench.tiny import World, differs
from dualign.core.artifacts import read_json
from dualign.core.errors import DualignError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.mark.bench
@pytest.mark.slow
def test_a_stage_that_is_killed_ends_with_the_same_bytes_when_it_is_run_again(work: Path) -> None:
    options = ["--count", "2", "--stages", "prepare", "--work", str(work), "--out", str(work)]
    assert kills.main(options) == 0
    trials = read_json(work / "kills.json")["KILL"]["trials"]
    assert len(trials) == 2 and all(trial["same"] and not trial["debris"] for trial in trials)
    assert "| all (KILL) | 2 |" in (work / "kills.md").read_text()


@pytest.mark.bench
@pytest.mark.slow
def test_a_stage_whose_worker_is_killed_goes_to_the_next_and_ends_with_the_same_bytes(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At a random moment the stage may have ended.
    monkeypatch.setattr(kills, "_moment", lambda *_: ("at once", lambda _: True))
    options = [
        "--count",
        "1",
        "--stages",
        "prepare",
        "--worker",
        "--work",
        str(work),
        "--out",
        str(work),
    ]
    assert kills.main(options) == 0
    (trial,) = read_json(work / "kills.json")["worker"]["trials"]
    assert (
        trial["stopped"] == -signal.SIGKILL
        and trial["same"]
        and trial["told"]
        and not trial["debris"]
    )


@pytest.mark.slow
def test_what_a_cluster_has_lost_or_left_is_seen_and_put_right(work: Path, tmp_path: Path) -> None:
    world = World(work, ["prepare"])
    spec = world.dag["prepare"]
    cluster.publish(world, tmp_path)
    made = cluster.Cluster(world, tmp_path, "http://127.0.0.1:9/api")
    assert made.fetch(spec) == [] == made.debris()
    pool = tmp_path / "coordinator/data/prepared/pool.parquet"
    content = pool.read_bytes()
    pool.unlink()
    pool.write_bytes(content[:-1])
    (tmp_path / "cpu/.dvc/tmp/stages/prepare-1").mkdir(parents=True)
    (tmp_path / "gpu/models/.tmp-1").mkdir()
    (tmp_path / "gpu/params.yaml").unlink()
    (tmp_path / "tmp/of-a-stage").mkdir()
    assert differs(tmp_path / "coordinator", world.kept, [spec]) == ["data/prepared"]
    assert made.debris() == [
        "cpu/prepare-1",
        "gpu/ D params.yaml",
        "gpu/models/.tmp-1",
        "tmp/of-a-stage",
    ]
    for _ in range(2):
        made.forget(spec)
        assert "dvc pull" in made.fetch(spec)[0]
    made.restore()
    assert made.fetch(spec) == []


@pytest.mark.slow
def test_other_bytes_and_what_is_left_behind_are_seen_and_put_right(work: Path) -> None:
    world = World(work, ["prepare"])
    assert world.differs() == [] == world.debris()
    pool = world.folder / "data/prepared/pool.parquet"
    pool.write_bytes(pool.read_bytes()[:-1])
    for name in (
        "models/.tmp-1/sft/weights",
        ".scratch/sft/0/checkpoint-2/weights",
        "reports/.x.1.tmp",
    ):
        (world.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (world.folder / name).touch()
    assert world.differs() == ["data/prepared"]
    left = [".scratch/sft/0/checkpoint-2/weights", "models/.tmp-1", "reports/.x.1.tmp"]
    assert world.debris() == left
    trial = kills.killed(world, world.dag["prepare"], random.Random(1), signal.SIGTERM)
    assert trial.status == 0 and trial.same and trial.debris == left
    assert not world.debris()


def test_an_unknown_stage_is_refused(work: Path) -> None:
    with pytest.raises(DualignError, match="no stage nobody; one of prepare, sft"):
        World(work, ["nobody"])


def test_the_page_counts_by_stage_and_mode() -> None:
    one = {
        "stage": "sft",
        "how": "",
        "stopped": -9,
        "status": 0,
        "same": True,
        "told": True,
        "debris": [],
    }
    bad = {**one, "stage": "score", "same": False, "told": False, "debris": ["a", "b"]}
    lines = kills.page({"KILL": {"command": "c", "trials": [one, one, bad]}}).splitlines()
    assert "| sft | 2 | 2 | 2 | 2 | 0 |" in lines and "| score | 1 | 1 | 0 | 0 | 2 |" in lines
    assert "| all (KILL) | 3 | 3 | 2 | 2 | 2 |" in lines
