"""The whole graph on a tiny world: from a clean copy of the repository to a report, then resume and
bad input.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from bench import fit, tiny
from bench import world as laboratory
from dualign.command import main as dualign
from dualign.evaluation.against_optimum import with_other_text
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load
from tests.e2e.warm import warm

# The whole graph at its smallest: every stage and method runs for real, on models that learn next
# to nothing.
TINY: dict[str, Any] = {
    **tiny.TINY,
    "prepare.pool_prompts": 12,
    **dict.fromkeys(tiny.LENGTHS, 4),
}
#: Rows on answers of their own policies, beside those of params.yaml.
ONLINE = {
    "o_pd_dpo": {
        "start": "safety_dpo/stepwise",
        "reference": "reward_dpo/helpful",
        "online": {
            "labels": "models",
            "folder": "data/labels",
            "retrain_reward": True,
            "ridge": 1.0,
            "reward_scale": 0.1,
            "cost_scale": 0.1,
            "dimension": None,
        },
    },
    "safe_rlhf": {
        "start": "sft",
        "reference": "sft",
        "policy_gradient": {
            "samples": 4,
            "batch_size": 8,
            "steps": 4,
            "learning_rate": 2e-3,
            "lambda_init": 1.0,
            "lambda_rate": 0.1,
            "window": 128,
        },
    },
}


#: Stages that train one policy for each of their runs.
TRAININGS = ("reward_dpo", "safety_dpo", "lagrangian_dpo", "lambda_path", "safety_path")
#: Policies that are evaluated: one or two for each way to come by a policy.
EVALUATED = ("sft", "reward_dpo", "safety_only", "sacpo", "dualign", "certified")
#: A search on the pool that trains although the limit of this world is slack; nothing but a test of
#: it reads it.
BY_GRID = {
    "method": "dualign",
    "start": "lagrangian_dpo/anchored",
    "reference": "sft",
    "rule": "grid",
}


def copy_repository(target: Path) -> None:
    """A clean copy with its own DVC repository and the tiny params."""
    tiny.copy(target, TINY)
    yaml = YAML()
    params = yaml.load((target / "params.yaml").read_text())
    policies = params["evaluate"]["policies"]
    params["evaluate"]["policies"] = {name: policies[name] for name in EVALUATED}
    for name, row in ONLINE.items():
        params["methods"][name] = row
        params["evaluate"]["policies"][name] = f"aligned/{name}"
    params["methods"]["by_grid"] = BY_GRID
    with (target / "params.yaml").open("w") as handle:
        yaml.dump(params, handle)


def read(path: Path) -> Any:
    """The content of a YAML file."""
    return YAML(typ="safe").load(path.read_text())


def environment(python: Path | None = None) -> dict[str, str]:
    """The environment of a stage: this interpreter first on PATH, because dvc.yaml says
    `python`; before it the folder of another, if that is given.
    """
    folders = [Path(sys.executable).parent, os.environ["PATH"]]
    if python is not None:
        folders.insert(0, python)
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, folders)),
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(root: Path, *argv: str, python: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed; with the `python` of a folder, if that is given."""
    own = environment(python)
    done = subprocess.run(argv, cwd=root, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def fails(root: Path, python: Path, *argv: str) -> str:
    """Run a stage that must refuse: exit 2, one line of error. Returns the line."""
    own = environment(python)
    done = subprocess.run(
        ["python", "-m", *argv], cwd=root, env=own, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if " E " in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return errors[0]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a `python` that has imported the libraries."""
    with warm(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """A repository in which `dvc repro` has run to the end."""
    root = tmp_path_factory.mktemp("repository")
    copy_repository(root)
    run(root, sys.executable, "-m", "dvc", "repro", python=python)
    return root


@pytest.mark.slow
def test_the_graph_ends_in_a_report_of_every_policy(finished: Path) -> None:
    params = read(finished / "params.yaml")
    page = (finished / "reports/index.html").read_text()
    comparison = json.loads((finished / "reports/comparison.json").read_text())
    assert set(comparison["policies"]) == set(params["evaluate"]["policies"])
    for method in params["methods"]:
        search = json.loads((finished / f"reports/search/{method}.json").read_text())
        assert search["steps"][search["chosen"]]["generated_tokens"] > 0
        assert method in page
    assert not (finished / ".scratch").exists() or not list(
        (finished / ".scratch").rglob("checkpoint-*")
    )


@pytest.mark.slow
def test_rows_on_their_own_answers_say_what_they_took(finished: Path) -> None:
    rounds, ascent = (
        json.loads((finished / f"reports/search/{name}.json").read_text()) for name in ONLINE
    )
    assert rounds["trainings"] == 2 + 2 and 0 < rounds["comparisons"] <= 4 * 2
    assert rounds["steps"][0]["comparisons"] == 0 < rounds["steps"][1]["comparisons"]
    assert ascent["trainings"] == 1 and [row["step"] for row in ascent["history"]] == [1, 2, 3, 4]
    assert ascent["steps"][1]["lam"] == pytest.approx(ascent["history"][-1]["lam"])


@pytest.mark.slow
def test_the_truth_of_the_world_is_that_of_its_prompts(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the world has no prompts but those of the evaluation, both truths are one."""
    lab = laboratory.Lab(7, finished)
    params = load(EvaluateParams, finished / "params.yaml")
    known = laboratory.Truth.of(lab, params)
    texts = [turns[-1]["content"] for turns in known.enumerated["prompt"]]
    only = SimpleNamespace(prompts=lambda: tuple(dict.fromkeys(texts)))
    monkeypatch.setattr(laboratory, "world", only)
    found = laboratory.Truth.of_world(lab, params)
    assert found.problem.log_reference == pytest.approx(known.problem.log_reference, abs=1e-4)
    assert found.best == pytest.approx(known.best, rel=1e-4)

    logp = with_other_text(found.under(lab, finished / "models/sft"))
    assert found.problem.describe(logp)["cost"] == pytest.approx(
        known.problem.describe(known.problem.log_reference)["cost"], abs=1e-4
    )


def test_what_a_policy_misses_of_its_tilt_is_read_on_both_kinds_of_prompts(finished: Path) -> None:
    lab = laboratory.Lab(7, finished)
    rows = list(fit.rows_of(lab, ["lagrangian_dpo/anchored", "sft"]))
    assert [(row["prompts"], row["policy"]) for row in rows] == [
        ("held-out", "lagrangian_dpo/anchored"), ("held-out", "sft"),
        ("pool", "lagrangian_dpo/anchored"), ("pool", "sft"),
    ]  # fmt: skip
    assert all(row["kl"] > 0 and 0 < row["other_text"] < 1 for row in rows)

    # The reference misses the whole tilt, which the limit alone may ask for little of.
    params = load(EvaluateParams, finished / "params.yaml")
    problem = laboratory.believed(lab, laboratory.Truth.of(lab, params))[laboratory.DOUBTED]
    tilt = problem.policy(rows[1]["multiplier"])[:, :-1]
    reference = problem.log_reference[:, :-1]
    assert rows[1]["kl"] == pytest.approx(fit.divergence(reference, tilt), rel=1e-3)
    assert "| 7 | sft | pool |" in fit.page("python -m bench.fit", rows)


def test_the_laboratory_reads_what_every_policy_is_worth_and_what_it_took(finished: Path) -> None:
    rows = {row["policy"]: row for row in laboratory.rows_of(laboratory.Lab(7, finished))}
    comparison = json.loads((finished / "reports/comparison.json").read_text())
    assert rows.keys() - {"dualign, certified"} == comparison["policies"].keys() - {"certified"}
    assert {name: rows[name]["trainings"] for name in ("sft", "reward_dpo", "safety_only")} == {
        "sft": 0,
        "reward_dpo": 1,
        "safety_only": 1,
    }
    search = json.loads((finished / "reports/search/dualign.json").read_text())
    start = json.loads((finished / "reports/metrics/lagrangian_dpo/anchored.json").read_text())
    tokens = search["generated_tokens"] + start["generated_tokens"]
    # Its start has trained twice, on the pool and on its own answers; its reference is one more.
    assert start["trainings"] == 2
    assert rows["dualign"]["trainings"] == search["trainings"] >= 3
    assert rows["dualign"]["generated_tokens"] == tokens > search["generated_tokens"]
    assert rows["sft"]["generated_tokens"] == 0
    assert (
        rows["sacpo"]["trainings"]
        == json.loads((finished / "reports/search/sacpo.json").read_text())["trainings"]
    )
    assert rows["sacpo"]["seconds"] > rows["reward_dpo"]["seconds"] > rows["sft"]["seconds"] == 0
    for row in rows.values():
        assert row["excess"] == pytest.approx(row["true_cost"] - 0.5)
    assert rows["sft"]["kl"] == pytest.approx(0, abs=1e-6) and rows["sft"]["displacement"] == 0


@pytest.mark.slow
def test_every_plot_draws_columns_of_files_that_stages_wrote(finished: Path) -> None:
    plots = {
        name: plot for item in read(finished / "dvc.yaml")["plots"] for name, plot in item.items()
    }
    told = json.loads(run(finished, sys.executable, "-m", "dvc", "plots", "show", "--json").stdout)
    assert told["data"].keys() == plots.keys() and not told.get("errors")
    drawn = {name: parts[0]["content"] for name, parts in told["data"].items()}
    for name, plot in plots.items():
        ((file, columns),) = plot["y"].items()
        content = json.loads((finished / file).read_text())
        rows = content["rows"] if isinstance(content, dict) else content
        columns = columns if isinstance(columns, list) else [columns]
        assert all(
            math.isfinite(row[column]) for row in rows for column in (plot["x"], *columns)
        ), name
        assert len(drawn[name]["data"]["values"]) == len(columns) * len(rows) > 1, name
        assert drawn[name]["encoding"]["x"]["field"] == plot["x"], name


@pytest.mark.slow
def test_every_training_and_every_search_is_a_line(finished: Path) -> None:
    losses, searches = (
        json.loads((finished / f"reports/plots/{of}.json").read_text()) for of in ("loss", "search")
    )
    params = read(finished / "params.yaml")
    runs = {f"{stage}/{name}" for stage in TRAININGS for name in params[stage]["runs"]}
    trained = {"sft", "reward_model", "cost_model", *runs}
    again = {row["run"] for row in losses} - trained
    assert trained <= {row["run"] for row in losses} and all(
        name.startswith("dual_search/") for name in again
    )
    assert {"dual_search/by_grid/step-1/policy", "dual_search/o_pd_dpo/step-1/helpful"} <= again
    assert {row["run"] for row in searches} == params["methods"].keys()
    assert [row["step"] for row in losses if row["run"] == "reward_dpo/helpful"] == [2, 4]


@pytest.mark.slow
def test_metrics_of_stages_are_single_values(finished: Path) -> None:
    """Curves are tables of their own. A certificate's metrics list its tests, which are no
    curve.
    """
    for path in (finished / "reports/metrics").rglob("*.json"):
        if path.parent.name != "certify":
            assert not lists_in(json.loads(path.read_text())), path


def lists_in(content: Any, key: str = "") -> list[str]:
    """The keys of all lists in nested mappings."""
    if not isinstance(content, dict):
        return [key] if isinstance(content, list) else []
    return [found for name, value in content.items() for found in lists_in(value, f"{key}.{name}")]


@pytest.mark.slow
def test_a_second_run_does_nothing(finished: Path) -> None:
    assert (
        "Data and pipelines are up to date"
        in run(finished, sys.executable, "-m", "dvc", "repro").stdout
    )
    up_to_date, total = re.findall(
        r"\d+", run(finished, sys.executable, "-m", "pipeline", "plan").stdout
    )
    assert up_to_date == total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "cold"),
    [
        (("reward_dpo", "helpful"), True),
        (("lagrangian_dpo", "bernoulli"), False),
        (("dual_search", "by_grid"), False),
        (("dual_search", "o_pd_dpo"), False),
        (("dual_search", "safe_rlhf"), False),
    ],
)
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(
    finished: Path, python: Path, stage: tuple[str, ...], cold: bool
) -> None:
    """One of them starts `cold`, from its imports on, as on a user's machine."""
    started = None if cold else python
    folder = f"aligned/{stage[1]}" if stage[0] == "dual_search" else "/".join(stage)
    weights = finished / "models" / folder / "model.safetensors"
    expected = weights.read_bytes()
    command = ["python", "-m", f"stages.{stage[0]}", *stage[1:]]
    process = subprocess.Popen(
        command, cwd=finished, env=environment(started), stderr=subprocess.PIPE, process_group=0
    )
    deadline = time.monotonic() + 120
    second = f"{finished}/.scratch/**/checkpoint-2/manifest.json"
    while not glob.glob(second, recursive=True):  # passes over what vanishes meanwhile
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # which ends with the last of the group
    weights.unlink()
    resumed = run(finished, *command, python=started)
    assert "resuming" in resumed.stderr
    assert weights.read_bytes() == expected


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(finished: Path, python: Path) -> None:
    assert "did you mean" in fails_with(finished, python, "constraint.limit", "constraint.limt")
    assert "nobody" in fails(finished, python, "stages.evaluate", "nobody")
    assert "nobody" in fails(finished, python, "stages.dual_search", "nobody")


def fails_with(root: Path, python: Path, key: str, typo: str) -> str:
    """The error of `prepare` when a key is misspelt; the params file is put back."""
    path = root / "params.yaml"
    before = path.read_text()
    old = key.rpartition(".")[2]
    new = typo.rpartition(".")[2]
    path.write_text(before.replace(f"{old}:", f"{new}:", 1))
    try:
        return fails(root, python, "stages.prepare")
    finally:
        path.write_text(before)


def test_a_policy_is_pushed_whole_with_a_card_that_the_hub_reads(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    out = tmp_path / "given/sacpo"
    assert dualign(["push", "aligned/sacpo", "--to", f"file://{out}"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (finished / "models/aligned/sacpo", out)
    )
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name])
    card = ModelCard.load(out / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    cost = json.loads((finished / "reports/metrics/evaluate/sacpo.json").read_text())["cost"]
    assert results["cost"] == pytest.approx(cost["mean"], abs=1e-4)
    assert card.data.license == "apache-2.0" and "base_model" not in card.data.to_dict()
    for heading in ("Evaluation", "Certificate", "Data and licences", "Limits", "How to load"):
        assert f"## {heading}" in card.text
    assert "95 % intervals, by prompt" in card.text
    assert dualign(["push", "certified/dualign", "--to", "me/it", "--card"]) == 0
    certified = capsys.readouterr().out
    found = json.loads((finished / "reports/metrics/certify/dualign.json").read_text())
    assert found["statement"] in certified and "`vllm serve me/it`." in certified


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("aligned/nobody", "--to", "me/it"), "models/aligned/nobody: holds no policy"),
        (("aligned/sacpo", "--to", "not a name"), "neither owner/name nor file://FOLDER"),
        (("aligned/sacpo", "--to", "file://models"), "models: exists already; name a new folder"),
        (("aligned/sacpo", "--to", "me/it", "--adapter"), "its base is models/sft of this run"),
        (
            ("aligned/sacpo", "--to", "file://new", "--adapter", "--base", "owner/sft"),
            "has no adapter",
        ),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_one_line(
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(finished)
    assert dualign(["push", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not (finished / "new").exists()
