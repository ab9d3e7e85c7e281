"""Minutes on a machine with a GPU: parts that fail, run over their time or lack something are rows;
the parts to carry are checked.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import Part, Place, Settings, measure, page

SCRIPT = Path(__file__).resolve().parents[2] / "bench/gpu.sh"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(Settings(seconds=10.0), tmp_path, tmp_path / "no-rows", tmp_path)


def part(name: str, code: str, **given: bool) -> Part:
    return Part(name, 1, lambda place: ["-c", code], lambda place: [("what", "found")], **given)


def test_a_fault_is_a_row_and_stops_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        part("fails", "import sys; print('the reason'); sys.exit(3)"),
        part("rows", "", from_rows=True),
        part("half done", "import sys; sys.exit(3)", partial=True),
        part("runs", ""),
        part("sleeps", "import time; time.sleep(100)"),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    found = {row["part"]: row for row in measure(place)}
    assert found["fails"]["fault"] == "status 3: the reason" and not found["fails"]["rows"]
    assert found["half done"]["fault"] and found["half done"]["rows"] == [("what", "found")]
    assert found["rows"]["fault"] == "needs rows; pack with --data"
    assert found["runs"]["fault"] == "" and found["runs"]["rows"] == [("what", "found")]
    assert found["sleeps"]["fault"].startswith("stopped after its ")
    assert sum(row["seconds"] for row in found.values()) < 20
    text = page(
        {"device": "none", "torch": "2", "seconds": 1.0, "short": False, "parts": [*found.values()]}
    )
    assert "| runs | 0 | what | found |" in text and "| fails | 0 |  | status 3: the" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tests_for_a_gpu_are_told_apart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS[:2])
    assert [row["fault"] for row in measure(place)] == ["needs a GPU"] * 2


def test_files_with_tests_for_a_gpu_are_found(place: Place) -> None:
    named = {Path(file).name for file in gpu.PARTS[0].command(place) if file.endswith(".py")}
    assert {"test_numerics.py", "test_devices.py", "test_ranks.py", "test_vllm.py"} <= named
    assert "test_slots.py" not in named, "which says CUDA_VISIBLE_DEVICES"


def said(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip()


def test_parts_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    status, told = said("run", str(tmp_path))
    assert (status, told.splitlines()[-1]) == (
        2,
        f"bench/gpu.sh: {tmp_path}: its parts are not all there, or not whole",
    )
    (tmp_path / "part.000").write_text("torn")
    (tmp_path / "sums.txt").write_text(f"{'0' * 64}  part.000\n")
    assert said("run", str(tmp_path))[0] == 2
    status, told = said("pack", str(tmp_path), "--size", "64")
    assert (status, told) == (2, "bench/gpu.sh: --size 64: parts must be below 64 MiB")
