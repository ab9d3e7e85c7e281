"""The laboratory of costs: what it asks the system for, and the same bytes of both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cost
from bench.tiny import copy_over
from dualign.core.errors import DualignError
from pipeline.dvc.parameters import assign

BURN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"
SMALL = {f"prepare.world.{name}": 3000 for name in ("sft_rows", "helpful_pairs", "safety_pairs")}
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"


def test_processor_seconds_are_those_of_the_process_and_its_children(tmp_path: Path) -> None:
    waited = cost.spent(["-c", "import time; time.sleep(0.6)"], tmp_path)
    burnt = cost.spent(["-c", CHILD.format(code=BURN.format(seconds=0.5))], tmp_path)
    assert waited["clock"] >= 0.6 > waited["processor"]
    assert burnt["processor"] >= 0.5


def test_a_stage_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(DualignError, match=r"-m stages\.nothing ended with 1; see log\.txt there"):
        cost.spent(["-m", "stages.nothing"], tmp_path)


def test_a_stage_runs_without_the_threads_that_the_caller_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cost.spent(
        [
            "-c",
            (
                "import os, pathlib;"
                " pathlib.Path('seen').write_text(str(os.environ.get('OMP_NUM_THREADS')))"
            ),
        ],
        tmp_path,
    )
    assert (tmp_path / "seen").read_text() == "None"


def side_costs(processor: float) -> dict[str, float]:
    return {"processor": processor, "importing": 2.0, "clock": 9.0, "peak_mib": 100.0}


def test_the_page_sums_both_sides() -> None:
    rows = {
        "sft": {"before": side_costs(40.0), "now": side_costs(15.5), "same": True},
        "evaluate@sft": {"before": side_costs(10.0), "now": side_costs(5.0), "same": False},
    }
    found = {**rows, "idle": {"before": 3.0, "now": 1.5, "one stage": 1.0}}
    page = cost.page("python -m bench.cost", ["before", "now"], found)
    assert "| sft | 40.0 | 2.0 | 9.0 | 15.5 | 2.0 | 9.0 | yes |" in page
    assert "| all | 50.0 | 4.0 | 18.0 | 20.5 | 4.0 | 18.0 |  |" in page
    assert "before 3.00 s (3.0 ×), now 1.50 s (1.5 ×); a project of one stage 1.00 s." in page


def test_stages_alone_need_the_inputs_of_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cost.main(["--stages", "sft", "--work", str(tmp_path), "--out", str(tmp_path)])


@pytest.mark.bench
@pytest.mark.slow
def test_a_stage_is_measured_on_both_sides_and_compared(tmp_path: Path) -> None:
    """`prepare` on two small copies of this checkout, whose worlds have other seeds."""
    sides = []
    for name, seed in (("before", 8), ("now", 7)):
        root = tmp_path / f"checkout-{seed}"
        for path in cost.CODE:
            copy_over(cost.ROOT / path, root / path)
        params = root / "params.yaml"
        params.write_text(assign(params.read_text(), {**SMALL, "seed": seed}))
        sides.append(cost.set_up(name, root, tmp_path, None))
    found = cost.measure(sides, ["prepare"], tmp_path, whole=False)
    assert found["prepare"]["same"] is False
    assert all(
        0 < found["prepare"][side.name]["importing"] < found["prepare"][side.name]["processor"]
        for side in sides
    )
    assert (
        cost.measure(sides, ["prepare"], tmp_path, whole=False) == found
    )  # kept, not measured again
    with pytest.raises(DualignError, match="no stage nothing"):
        cost.measure(sides, ["nothing"], tmp_path, whole=False)
