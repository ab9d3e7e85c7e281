"""The whole graph on a tiny world: from a clean copy of the repository to a report, then resume and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bench import world as laboratory

CODE = ("dualign", "stages", "pipeline", "dvc.yaml", "data/raw", "models/base/README.md", "reports/search")

# The whole graph at its smallest: every stage and method runs for real, on models that learn next to nothing.
TINY: dict[str, Any] = {
    "generation.max_new_tokens": 12,
    "prepare.world.sft_rows": 300,
    "prepare.world.helpful_pairs": 300,
    "prepare.world.safety_pairs": 300,
    "prepare.pool_prompts": 12,
    "prepare.search_prompts": 8,
    "prepare.certify_prompts": 8,
    "prepare.eval_prompts": 8,
    "sft.scratch.hidden_size": 16,
    "sft.scratch.layers": 1,
    "sft.scratch.heads": 2,
    "sft.scratch.intermediate_size": 32,
    "cost_model.calibrate": "none",
    "score.samples_per_prompt": 4,
    "score.pairs": 40,
    "constraint.limit": 0.5,
    "dual_search.prompts": 8,
    "dual_search.samples_per_prompt": 2,
    "dual_search.refresh_prompts": 4,
    "dual_search.refresh_samples": 2,
    "dual_search.z": 0.0,
    "certify.prompts": 8,
    "certify.samples_per_prompt": 2,
    "certify.labels": None,
    "evaluate.prompts": 8,
    "evaluate.samples_per_prompt": 2,
    "resources.threads": 1,
    "resources.log_steps": 2,
    "resources.checkpoint_steps": 2,
}
#: Rows on answers of their own policies, beside those of params.yaml.
ONLINE = {
    "o_pd_dpo": {
        "start": "safety_dpo/stepwise",
        "reference": "reward_dpo/helpful",
        "online": {
            "labels": "models", "folder": "data/labels", "retrain_reward": True, "ridge": 1.0, "reward_scale": 0.1,
            "cost_scale": 0.1, "dimension": None,
        },
    },
    "safe_rlhf": {
        "start": "sft",
        "reference": "sft",
        "policy_gradient": {
            "samples": 4, "batch_size": 8, "steps": 4, "learning_rate": 2e-3, "lambda_init": 1.0, "lambda_rate": 0.1,
            "window": 128,
        },
    },
}  # fmt: skip
TRAININGS = ("sft", "reward_model", "cost_model", "reward_dpo", "safety_dpo", "lagrangian_dpo", "dual_search")


def copy_repository(source: Path, target: Path) -> None:
    """A clean copy with its own DVC repository and the tiny params."""
    for name in CODE:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, place)
    yaml = YAML()
    params = yaml.load((source / "params.yaml").read_text())
    steps = {f"{stage}.training.max_steps": 4 for stage in TRAININGS}
    for key, value in {**TINY, **steps}.items():
        *folders, leaf = key.split(".")
        section = params
        for folder in folders:
            section = section[folder]
        assert leaf in section, key
        section[leaf] = value
    for name, row in ONLINE.items():
        params["methods"][name] = row
        params["evaluate"]["policies"][name] = f"aligned/{name}"
    with (target / "params.yaml").open("w") as handle:
        yaml.dump(params, handle)
    run(target, "git", "init", "-q")
    run(target, sys.executable, "-m", "dvc", "init", "-q")


def environment() -> dict[str, str]:
    """The environment of a stage: this interpreter first on PATH, because dvc.yaml says `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(argv, cwd=root, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def fails(root: Path, *argv: str) -> str:
    """Run a stage that must refuse: exit 2, one line of error. Returns the line."""
    done = subprocess.run([sys.executable, "-m", *argv], cwd=root, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if " E " in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return errors[0]


@pytest.fixture(scope="module")
def finished(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which `dvc repro` has run to the end."""
    root = tmp_path_factory.mktemp("repository")
    copy_repository(repo_root, root)
    run(root, sys.executable, "-m", "dvc", "repro")
    return root


@pytest.mark.slow
def test_the_graph_ends_in_a_report_of_every_policy(finished: Path) -> None:
    params = YAML(typ="safe").load((finished / "params.yaml").read_text())
    page = (finished / "reports/index.html").read_text()
    comparison = json.loads((finished / "reports/comparison.json").read_text())
    assert set(comparison["policies"]) == set(params["evaluate"]["policies"])
    for method in params["methods"]:
        search = json.loads((finished / f"reports/search/{method}.json").read_text())
        assert search["steps"][search["chosen"]]["generated_tokens"] > 0
        assert method in page
    assert not (finished / ".scratch").exists() or not list((finished / ".scratch").rglob("checkpoint-*"))


@pytest.mark.slow
def test_rows_on_their_own_answers_say_what_they_took(finished: Path) -> None:
    rounds, ascent = (json.loads((finished / f"reports/search/{name}.json").read_text()) for name in ONLINE)
    assert rounds["trainings"] == 2 + 2 and 0 < rounds["comparisons"] <= 4 * 2
    assert rounds["steps"][0]["comparisons"] == 0 < rounds["steps"][1]["comparisons"]
    assert ascent["trainings"] == 1 and [row["step"] for row in ascent["course"]] == [1, 2, 3, 4]
    assert ascent["steps"][1]["lam"] == pytest.approx(ascent["course"][-1]["lam"])


@pytest.mark.slow
def test_the_laboratory_reads_what_every_policy_is_worth_and_what_it_took(finished: Path) -> None:
    rows = {row["policy"]: row for row in laboratory.rows_of(laboratory.Lab(7, finished))}
    comparison = json.loads((finished / "reports/comparison.json").read_text())
    assert rows.keys() == comparison["policies"].keys() - {"certified"}  # dualign's policy once more
    assert {name: rows[name]["trainings"] for name in ("sft", "reward_dpo", "safety_only")} == {
        "sft": 0,
        "reward_dpo": 1,
        "safety_only": 1,
    }
    search = json.loads((finished / "reports/search/dualign.json").read_text())
    assert rows["dualign"]["trainings"] == search["trainings"] and rows["sft"]["generated_tokens"] == 0
    assert rows["sacpo"]["trainings"] == json.loads((finished / "reports/search/sacpo.json").read_text())["trainings"]
    assert rows["sacpo"]["seconds"] > rows["reward_dpo"]["seconds"] > rows["sft"]["seconds"] == 0
    for row in rows.values():
        assert row["excess"] == pytest.approx(row["true_cost"] - 0.5) and row["excess"] >= row["least_excess"]
    assert rows["sft"]["kl"] == 0 and rows["sft"]["displacement"] == 0


@pytest.mark.slow
def test_a_second_run_does_nothing(finished: Path) -> None:
    assert "Data and pipelines are up to date" in run(finished, sys.executable, "-m", "dvc", "repro").stdout
    up_to_date, total = re.findall(r"\d+", run(finished, sys.executable, "-m", "pipeline", "plan").stdout)
    assert up_to_date == total


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        ("reward_dpo", "helpful"),
        ("lagrangian_dpo", "bernoulli"),
        ("dual_search", "dualign"),
        ("dual_search", "o_pd_dpo"),
        ("dual_search", "safe_rlhf"),
    ],
)
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(finished: Path, stage: tuple[str, ...]) -> None:
    folder = f"aligned/{stage[1]}" if stage[0] == "dual_search" else "/".join(stage)
    weights = finished / "models" / folder / "model.safetensors"
    expected = weights.read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage[0]}", *stage[1:]],
        cwd=finished, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((finished / ".scratch").rglob("checkpoint-2/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    weights.unlink()
    resumed = run(finished, sys.executable, "-m", f"stages.{stage[0]}", *stage[1:])
    assert "resuming" in resumed.stderr
    assert weights.read_bytes() == expected


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(finished: Path) -> None:
    assert "did you mean" in fails_with(finished, "constraint.limit", "constraint.limt")
    assert "nobody" in fails(finished, "stages.evaluate", "nobody")
    assert "nobody" in fails(finished, "stages.dual_search", "nobody")


def fails_with(root: Path, key: str, typo: str) -> str:
    """The error of `prepare` when a key is misspelt; the params file is put back."""
    path = root / "params.yaml"
    before = path.read_text()
    old, new = key.rpartition(".")[2], typo.rpartition(".")[2]
    path.write_text(before.replace(f"{old}:", f"{new}:", 1))
    try:
        return fails(root, "stages.prepare")
    finally:
        path.write_text(before)
