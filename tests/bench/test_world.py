"""The laboratory of language models: its folders, and how its numbers become a table. tests/e2e
reads a real run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import world
from dualign.core.errors import DualignError
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load


def row(policy: str, seed: int, **numbers: Any) -> dict[str, Any]:
    columns = {key: 0.0 for _, key, _ in world._COLUMNS}
    return {"policy": policy, "seed": seed, "least_excess": -0.1, **columns, **numbers}


def test_each_seed_has_a_folder_of_its_own_that_differs_in_the_seed_alone(
    repo_root: Path, tmp_path: Path
) -> None:
    params = repo_root / "params.yaml"
    labs = [world.set_up(seed, params, tmp_path) for seed in (3, 4)]
    texts = [(lab.folder / "params.yaml").read_text().splitlines() for lab in labs]
    differ = [pair for pair in zip(*texts, strict=True) if pair[0] != pair[1]]
    assert [(old.split()[:2], new.split()[:2]) for old, new in differ] == [
        (["seed:", "3"], ["seed:", "4"])
    ]
    assert list(labs[0].dag)[:2] == ["prepare", "sft"] and "report" in labs[0].dag


def test_a_value_may_be_given_in_place_of_that_of_params(repo_root: Path, tmp_path: Path) -> None:
    lab = world.set_up(3, repo_root / "params.yaml", tmp_path, {"constraint.limit": -0.3})
    assert load(EvaluateParams, lab.folder / "params.yaml").limit == -0.3


def test_a_folder_of_other_params_is_refused_and_one_of_the_same_is_taken_up(
    repo_root: Path, tmp_path: Path
) -> None:
    params = tmp_path / "mine.yaml"
    params.write_text((repo_root / "params.yaml").read_text())
    first = world.set_up(3, params, tmp_path)
    assert world.set_up(3, params, tmp_path).folder == first.folder
    params.write_text(params.read_text().replace("limit: -0.8", "limit: -0.7"))
    with pytest.raises(DualignError, match=r"mine-3 holds the run of other params"):
        world.set_up(3, params, tmp_path)


def test_chosen_policies_need_the_stages_before_them_alone(repo_root: Path, tmp_path: Path) -> None:
    lab = world.set_up(3, repo_root / "params.yaml", tmp_path)
    needed = world.stages_for(lab, ["sft", "certified"])
    assert {"prepare", "lagrangian_dpo@anchored", "certify@dualign", "evaluate@sft"} <= needed
    assert not {"dual_search@sacpo", "evaluate@dualign", "report"} & needed
    with pytest.raises(
        DualignError, match=r"--policies: dualing is not evaluated; choose of sft, "
    ):
        world.stages_for(lab, ["dualing"])


def test_params_without_a_seed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("beta: 1.0\n")
    with pytest.raises(DualignError, match=r"bad\.yaml: .*seed"):
        world.set_up(1, tmp_path / "bad.yaml", tmp_path)


def test_a_stage_that_fails_is_named(
    repo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = tmp_path / "bad.yaml"
    params.write_text(
        (repo_root / "params.yaml").read_text().replace("sft_rows: 36000", "sft_rows: none")
    )
    options = [
        "--params",
        str(params),
        "--seeds",
        "1",
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert world.main(options) == 1
    assert "stage prepare failed with status 2" in caplog.text and not (tmp_path / "out").exists()
    assert "prepare.world.sft_rows" in (tmp_path / "bad-1/log.txt").read_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_policies_within_the_limit_come_first_then_the_smaller_gap() -> None:
    rows = [
        *(row("over", seed, gap=-1.0, least_excess=0.1) for seed in (1, 2)),
        *(row("near", seed, gap=0.1 * seed, reward_share=None) for seed in (1, 2)),
        *(row("far", seed, gap=0.9) for seed in (1, 2)),
    ]
    lines = world.table(rows)
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["near", "far", "over"]
    near = cells(lines[2])
    assert near[1:3] == ["2/2", "2/2"] and near[5] == "0.150 ± 0.050" and near[7] == "–"


def test_a_mean_above_the_limit_is_counted_apart_from_a_breach_that_is_shown() -> None:
    rows = [row("near", seed, excess=0.04, least_excess=-0.01) for seed in (1, 2)]
    rows += [row("near", 3, excess=-0.04), row("over", 3, excess=0.2, least_excess=0.1)]
    near, over = map(cells, world.table(rows)[2:])
    assert near[:3] == ["near", "1/3", "3/3"] and over[:3] == ["over", "0/1", "0/1"]
