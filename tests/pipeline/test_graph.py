"""The flow over the graph of this repository: its first stage, on little data."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.dvc import records
from pipeline.dvc.parameters import assign
from pipeline.prefect.flow import alignment

LITTLE = {
    "prepare.world.sft_rows": 300,
    "prepare.world.helpful_pairs": 300,
    "prepare.world.safety_pairs": 300,
    "prepare.pool_prompts": 12,
    "prepare.search_prompts": 8,
    "prepare.certify_prompts": 8,
    "prepare.eval_prompts": 8,
    "dual_search.prompts": 8,
    "dual_search.refresh_prompts": 4,
    "certify.prompts": 8,
    "certify.labels": None,
    "evaluate.prompts": 8,
}


@pytest.mark.slow
def test_the_first_stage_runs_and_says_what_it_does_not_take(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    kept = [f"reports/{name}" for name in ("search", "answers", "judgements", "seeds", "earlier")]
    for name in ("dualign", "stages", "data/raw", *kept):
        shutil.copytree(repo_root / name, tmp_path / name, ignore=ignored)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(repo_root / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init(str(tmp_path)).close()

    params = Path("params.yaml")
    before = params.read_text()
    wrong = {**LITTLE, "prepare.heldout_share": 3.0}
    refused = alignment(stages=["prepare"], set=wrong, return_state=True)
    assert str(refused.message).startswith("params.yaml: prepare.heldout_share: input should be")
    assert params.read_text() == before

    params.write_text(assign(before, wrong))
    refused = alignment(stages=["prepare"], return_state=True)
    assert str(refused.message).startswith("prepare: params.yaml: prepare.heldout_share"), (
        refused.message
    )
    assert "(exit 2)" in str(refused.message)

    done = alignment(stages=["prepare"], set={"prepare.heldout_share": 0.1}, return_state=True)
    assert done.message == "1 completed"
    assert json.loads(Path("reports/metrics/prepare.json").read_text())["prompts"]["pool"] == 12
    assert {out["path"] for out in records.read(tmp_path, ["prepare"])["prepare"]["outs"]} >= {
        "data/prepared"
    }
    assert alignment(stages=["prepare"], return_state=True).message == "1 unchanged"
