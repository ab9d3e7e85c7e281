"""The study of certified policies: what it reads of a run, and what it counts. The runs are those
of bench.world.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import certified, regulated, world
from dualign.core.artifacts import read_json, write_json
from dualign.params.certify import CertifyParams
from dualign.params.loading import load


def lab(root: Path, repo_root: Path, seed: int, *, returned: str | None, cost: float) -> world.Lab:
    """The folder of a finished run at limit -0.3: every stage has its provenance, so none runs."""
    made = world.set_up(seed, repo_root / "params/quick.yaml", root)
    for name in made.dag:
        write_json(made.folder / "reports/provenance" / f"{name.replace('@', '/')}.json", {})
    metrics = made.folder / "reports/metrics"
    tests = [
        {"candidate": "a at 2", "checks": [{"bound": -0.5}, {"bound": -0.4}]},
        {"candidate": "a", "checks": []},
    ]
    write_json(
        metrics / "certify/dualign.json",
        {"returned": returned, "tests": tests if returned else tests[1:]},
    )
    truth: dict[str, float | None] = {"dualign_excess": cost + 0.5, "dualign_share": 0.8}
    for name in (certified.CERTIFIED, certified.BESIDE):
        truth[f"{name}_excess"] = None if returned is None else cost + 0.3
        truth[f"{name}_share"] = None if returned is None else 0.8
    write_json(made.folder / certified.TRUTH, truth)
    grid = made.folder / certified.BESIDE
    for part in ("reports", "params.yaml", "dvc.yaml"):
        copy = shutil.copytree if (made.folder / part).is_dir() else shutil.copy
        grid.mkdir(exist_ok=True)
        copy(made.folder / part, grid / part)
    pair = {
        "seed": seed,
        "pair": "safe, bold",
        "mean_risk": -0.01,
        "above": 0.3,
        "price": 2.5,
        "answers": 40,
    }
    write_json(made.folder / regulated.FILE, [{**pair, "excess": cost + 0.3, "share": 0.6}])
    return made


def test_a_row_says_what_was_certified(repo_root: Path, tmp_path: Path) -> None:
    row = certified.row_of(lab(tmp_path, repo_root, 1, returned="a at 2", cost=-0.35))
    assert row == {
        "seed": 1,
        "returned": "a at 2",
        "tests": 2,
        "bound": pytest.approx(-0.1),
        "answers": None,
    }
    none = certified.row_of(lab(tmp_path, repo_root, 2, returned=None, cost=-0.35))
    assert none["returned"] is none["bound"] is None


def test_the_answers_of_a_certificate_are_those_of_screen_tests_and_one_draw(
    tmp_path: Path,
) -> None:
    tests = [
        {"checks": [{"answers": count}], "ess": ess}
        for count, ess in ((40, None), (80, None), (160, 0.9), (160, 1))
    ]
    write_json(tmp_path / "certificate.json", {"tested": tests})
    assert certified.answers_of(tmp_path) == 280
    write_json(tmp_path / "screen.json", {"prompts": 20, "samples": 2, "knots": [{}, {}, {}]})
    assert certified.answers_of(tmp_path) == 400


def test_the_grid_of_before_has_its_own_folder_on_the_same_models(
    repo_root: Path, tmp_path: Path
) -> None:
    made = world.set_up(4, repo_root / "params/quick.yaml", tmp_path)
    for name in ("models/sft", "models/certified", "data/prepared", "reports/metrics"):
        (made.folder / name).mkdir(parents=True)
    (made.folder / "models/sft/weights").write_text("w")
    grid = certified.beside(made)
    assert (grid.folder / "models/sft/weights").read_text() == "w" and not (
        grid.folder / "models/certified"
    ).exists()
    params, own = (
        load(CertifyParams, folder / "params.yaml") for folder in (grid.folder, made.folder)
    )
    assert own.screen is not None and params.screen is None and params.samples_per_prompt == 4
    assert params.runs["dualign"].weights == certified.COARSE_WEIGHTS and set(grid.dag) == set(
        made.dag
    )
    unlike = {"samples_per_prompt", "screen", "runs"}
    assert (
        params.model_dump(exclude=unlike) == own.model_dump(exclude=unlike)
        and certified.beside(made) == grid
    )


def test_violations_are_counted_over_the_policies_that_there_are() -> None:
    def row(excess: float | None) -> dict[str, Any]:
        return {
            "x_excess": excess,
            "x_share": 0.5,
        }

    found = certified.violations([row(-0.2), row(0.05), row(0.3), row(None)], "x")
    assert found == {
        "runs": 4,
        "policies": 3,
        "above": 2,
        "excess": pytest.approx(0.05),
        "share": pytest.approx(0.5),
    }
    assert certified.violations([row(None)], "x") == {
        "runs": 1, "policies": 0, "above": 0, "excess": None, "share": None,
    }  # fmt: skip


def test_finished_runs_are_read_and_written_up(
    repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    out = tmp_path / "out"
    lab(work, repo_root, 5, returned="a at 2", cost=-0.35)
    lab(work, repo_root, 6, returned=None, cost=-0.35)
    given = ["--seeds", "2", "--first", "5", "--params", str(repo_root / "params/quick.yaml")]
    assert certified.main([*given, "--work", str(work), "--out", str(out)]) == 0
    page = capsys.readouterr().out
    assert (out / "certified.md").read_text() == page
    assert "| of the search alone | 2 of 2 | 2 | 0.150 | 0.80 | – |" in page
    assert "| safe, bold | 2 | -0.010 | 30% | -0.050 | 0 | 0.60 | 2.50 | 40 |" in page
    assert "| certified on the grid of before | 1 of 2 | 0 | -0.050 | 0.80 | – |" in page
    assert (
        "| certified | 1 of 2 | 0 | -0.050 | 0.80 | – |" in page
        and "| 6 | no policy | 1 | – | – | – |" in page
    )
    content = read_json(out / "certified.json")
    assert content["certified"]["policies"] == 1 and len(content["rows"]) == 2
    shutil.rmtree(work)
    assert (
        certified.main(
            ["--seeds", "1", "--params", "missing.yaml", "--work", str(work), "--out", str(out)]
        )
        == 1
    )


def test_seeds_of_an_earlier_run_are_kept_if_its_params_are_the_same(
    repo_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quick = str(repo_root / "params/quick.yaml")
    lab(tmp_path / "first", repo_root, 5, returned="a at 2", cost=-0.35)
    lab(tmp_path / "second", repo_root, 6, returned="a at 2", cost=-0.45)
    out = ["--out", str(tmp_path / "out")]
    first = ["--seeds", "1", "--first", "5", "--params", quick, "--work", str(tmp_path / "first")]
    assert certified.main([*first, *out]) == 0

    known = ["--known", str(tmp_path / "out/certified.json")]
    both = ["--seeds", "2", "--first", "5", "--work", str(tmp_path / "second"), *known, *out]
    assert certified.main([*both, "--params", quick]) == 0
    rows = read_json(tmp_path / "out/certified.json")["rows"]
    assert [(row["seed"], row["certified_excess"]) for row in rows] == [
        (5, pytest.approx(-0.05)),
        (6, pytest.approx(-0.15)),
    ]

    assert certified.main([*both, "--params", str(repo_root / "params.yaml")]) == 1
    assert "quick.yaml" in caplog.text and "leave out --known" in caplog.text
