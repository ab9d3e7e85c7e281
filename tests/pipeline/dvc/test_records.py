"""What dvc.lock says without the files, against what DVC says with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.dvc import records
from pipeline.dvc.dag import load_dag
from pipeline.dvc.plan import StageStatus, plan
from pipeline.errors import PipelineError
from pipeline.prefect import artifacts
from tests.pipeline.project import Project, environment, git

# `one` reads a file of a folder that `make` writes, `two` a part of it, `all` a folder in which
# both of them write.
GRAPH = {
    "make": (["raw"], "mkdir -p made/part && cp raw/x made/a && cp raw/x made/part/b", ["made"]),
    "one": (["made/a"], "mkdir -p reports && cp made/a reports/one", ["reports/one"]),
    "two": (["made/part"], "mkdir -p reports && cp -r made/part reports/two", ["reports/two"]),
    "all": (
        ["reports", "notes.txt"],
        "cat reports/one reports/two/b reports/README notes.txt > page",
        ["page"],
    ),
}


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment(), check=True
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository in which all stages have run, and the remote to which its results
    were pushed.
    """
    folder = tmp_path_factory.mktemp("made")
    root = folder / "root"
    root.mkdir()
    git(root, "init", "-q")
    Repo.init(str(root)).close()
    stages = {
        name: {"cmd": command, "deps": deps, "params": [f"{name}.x"], "outs": outs}
        for name, (deps, command, outs) in GRAPH.items()
    }
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (root / "params.yaml").write_text(json.dumps({name: {"x": 1e-5} for name in GRAPH}))
    for name in ("raw/x", "reports/README", "notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("/made\n/reports/*\n!/reports/README\n/page\n")
    dvc(root, "add", "-q", "raw/x")
    dvc(root, "remote", "add", "-q", "-d", "store", "../store")
    dvc(root, "repro", "-q")
    dvc(root, "push", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return folder


@pytest.fixture
def clones(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The repository, and a clone of it that has nothing but what git holds."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    git(tmp_path, "clone", "-q", "root", "clone")
    return tmp_path / "root", tmp_path / "clone"


def statuses(root: Path) -> dict[str, StageStatus]:
    return records.plan(root, load_dag(root))


def test_a_clone_without_outputs_knows_what_is_up_to_date(
    clones: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, clone = clones
    assert statuses(clone) == dict.fromkeys(GRAPH, StageStatus("up to date"))
    assert sorted(
        path.name for path in clone.iterdir() if path.name in ("made", "page", "raw")
    ) == ["raw"]
    assert not (clone / "raw/x").exists()
    for file, text in (("reports/README", "new"), ("notes.txt", "new")):
        before = (clone / file).read_text()
        for place in clones:
            (place / file).write_text(text)
        monkeypatch.chdir(root)
        assert (
            statuses(clone)["all"].prospect == plan(root, load_dag(root))["all"].prospect == "stale"
        )
        for place in clones:
            (place / file).write_text(before)
    params = json.loads((clone / "params.yaml").read_text())
    params["two"]["x"] = 2
    (clone / "params.yaml").write_text(json.dumps(params))
    changed = statuses(clone)
    assert changed["two"] == StageStatus("stale", ("two.x modified",))
    assert {name: changed[name].prospect for name in ("one", "all")} == {
        "one": "up to date",
        "all": "maybe stale",
    }


def test_a_record_that_is_merged_tells_on_those_that_read_it(clones: tuple[Path, Path]) -> None:
    root, clone = clones
    before = records.read(clone, ["make", "never"])
    assert list(before) == ["make"]
    (root / "raw/x").write_text("other")
    dvc(root, "add", "-q", "raw/x")
    dvc(root, "repro", "-q", "one", "make")
    dvc(root, "push", "-q")
    (clone / "raw/x.dvc").write_text((root / "raw/x.dvc").read_text())
    assert statuses(clone)["make"] == StageStatus("stale", ("raw modified",))
    records.merge(clone, records.read(root, ["make"]))
    after = statuses(clone)
    assert after["make"] == StageStatus("up to date")
    assert (after["one"].prospect, after["two"].prospect) == ("stale", "stale")
    records.merge(clone, records.read(root, ["one"]))
    assert statuses(clone)["one"] == StageStatus("up to date")
    text = (clone / "dvc.lock").read_text()
    assert "x: 1e-05" in text and "'1e-05'" not in text, "numbers stay numbers"


def test_what_never_ran_is_stale_and_a_lost_listing_is_no_reason_to_trust(
    clones: tuple[Path, Path],
) -> None:
    _, clone = clones
    for listing in (clone.parent / "store/files/md5").rglob("*.dir"):
        listing.unlink()
    assert statuses(clone)["one"].prospect == "stale"
    (clone / "dvc.lock").unlink()
    assert statuses(clone) == dict.fromkeys(GRAPH, StageStatus("stale", ("never run",)))


def test_metrics_of_the_run_before_are_fetched_alone(project: Project) -> None:
    root = project.root
    spec = load_dag(project.root)["first"]
    project.dvc("remote", "add", "-q", "-d", "store", str(root.parent / f"{root.name}-store"))
    project.dvc("repro", "-q", "first")
    project.dvc("push", "-q", "first")
    shutil.rmtree(root / ".dvc/cache")
    entry = records.read(root, ["first"])["first"]
    cache = root / ".dvc/cache/files/md5"
    assert artifacts.recorded_metrics(cache, spec, entry) == {}
    with Repo(str(root)) as repo:
        records.fetch_metrics(repo, "first")
    assert artifacts.recorded_metrics(cache, spec, entry)["accuracy.mean"] == 0
    assert len([file for file in cache.rglob("*") if file.is_file()]) == 1


def test_damaged_records_are_told_and_left_as_they_are(project: Project) -> None:
    lock = project.root / "dvc.lock"
    lock.write_text("<<<<<<< HEAD\nschema: '2.0'\n=======\n")
    before = lock.read_text()
    for act in (
        lambda: records.read(project.root, ["first"]),
        lambda: records.merge(project.root, {"first": {"cmd": "true"}}),
    ):
        with pytest.raises(PipelineError, match=r"'dvc.lock', .*git checkout --ours dvc\.lock"):
            act()
    assert lock.read_text() == before
