"""Temporaries of processes that are gone are removed, those of others never; in a workspace they
lie in its scratch.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dualign.core.artifacts import _put, replacing, write_json
from dualign.core.reporting import tracking_root
from dualign.core.temporaries import room_for, scratch_root, sweep, temporary_folder

WRITER = """
import sys, time
from dualign.core.artifacts import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.mkdir()
    (temporary / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DUALIGN_SCRATCH", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    return tmp_path


def test_an_empty_variable_names_no_folder(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints would lie in the root of the workspace."""
    monkeypatch.setenv("DUALIGN_SCRATCH", "")
    monkeypatch.setenv("DUALIGN_TRACKING", "")
    assert scratch_root() == Path(".scratch") and tracking_root() == Path("tracking")
    assert room_for(workspace) == Path(".scratch/tmp")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()


def writing(path: str) -> subprocess.Popen[str]:
    """A process that is half way through a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def temporaries(root: Path) -> list[Path]:
    return sorted(root.rglob(".tmp-*"))


def test_what_a_killed_process_was_writing_goes_with_the_next_write_and_what_another_writes_stays(
    workspace: Path,
) -> None:
    dead = writing("models/sft")
    alive = writing("models/other")
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(temporaries(workspace)) == 4 and not (workspace / "models/sft").exists()
    write_json("reports/a.json", {})
    left = temporaries(workspace)
    assert len(left) == 2 and (left[0] / "other" / "weights").read_text() == "half"
    alive.send_signal(signal.SIGTERM)  # no handler here: as dead as the other
    alive.wait()
    write_json("reports/b.json", {})
    assert not temporaries(workspace)


def test_outputs_of_a_workspace_hold_nothing_but_what_is_whole(workspace: Path) -> None:
    process = writing("models/sft")
    assert list((workspace / "models").iterdir()) == []
    assert len(list((workspace / ".scratch/tmp").iterdir())) == 2
    process.kill()
    process.wait()


def test_elsewhere_temporaries_lie_beside_and_are_removed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUALIGN_SCRATCH", raising=False)
    monkeypatch.chdir(tmp_path)
    process = writing("out/model")
    assert len(temporaries(tmp_path / "out")) == 2 and not (tmp_path / ".scratch").exists()
    process.kill()
    process.wait()
    write_json("out/report.json", {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_another_file_system_and_a_scratch_folder_that_cannot_be_used_are_done_without(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert room_for(workspace) == Path(".scratch/tmp")
    memory = Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != workspace.stat().st_dev:
        assert room_for(memory) == memory
    (workspace / "file").touch()
    monkeypatch.setenv("DUALIGN_SCRATCH", str(workspace / "file"))
    assert room_for(workspace) == Path(".scratch/tmp") and scratch_root() == workspace / "file"
    (workspace / "dvc.yaml").unlink()
    assert room_for(workspace) == workspace


def test_a_rename_that_crosses_mounts_ends_whole_all_the_same(workspace: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == workspace.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    (workspace / "model").mkdir()
    (workspace / "model" / "old").touch()
    with temporary_folder(memory) as place:
        (place / "model").mkdir()
        (place / "model" / "weights").write_text("new")
        _put(place / "model", workspace / "model")
    assert [file.name for file in (workspace / "model").iterdir()] == ["weights"]
    assert not temporaries(workspace) and not place.exists()


def test_a_lock_without_its_folder_is_debris_and_what_is_not_ours_is_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1.lock").touch()
    for name in (".tmp-2", ".hidden", "a.lock"):
        (tmp_path / name).touch()
    with temporary_folder(tmp_path) as folder:
        sweep(tmp_path)
        assert folder.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-2", ".hidden", "a.lock"}


def test_an_old_folder_is_never_half_removed(tmp_path: Path) -> None:
    """A kill while the old folder goes: whatever lies there is whole, or nothing does."""
    files = 20_000
    path = tmp_path / "model"
    path.mkdir()
    for number in range(files):
        (path / str(number)).touch()
    code = (
        "import sys; from dualign.core.artifacts import replacing\nwith replacing(sys.argv[1]) as"
        " temporary: temporary.mkdir(); (temporary / 'new').touch(); print(1, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()

    until(lambda: not path.exists() or len(list(path.glob("*"))) < files)
    process.kill()
    process.wait()
    left = [file.name for file in path.glob("*")]
    assert left in ([], ["new"]) or len(left) == files
    shutil.rmtree(tmp_path)


def test_nested_writes_each_have_a_place(workspace: Path) -> None:
    with replacing("data/scored") as folder:
        write_json(folder / "a.json", {"a": 1})
        write_json(folder / "b.json", {"b": 1})
    assert {path.name for path in (workspace / "data/scored").iterdir()} == {"a.json", "b.json"}
    assert not temporaries(workspace)
