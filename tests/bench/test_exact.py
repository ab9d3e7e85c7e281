"""The tabular laboratory: with exact data each method ends where theory says, and the command
writes its files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import exact
from bench.tabular import Laboratory, Settings, bonus
from dualign.core.errors import DualignError
from dualign.math.tabular import solve

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Settings(seeds=1, prompts=4, answers=5)
CLAIMING = {
    *"sacpo sacpo_swapped p_sacpo modpo c_dpo c_dpo_rescaled pd_dpo pd_dpo_folded o_pd_dpo mocan"
    " pecan caid".split(),
    *"safe_rlhf squared huber anchor dualign".split(),
}


@pytest.fixture(scope="module")
def ran() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return exact.run(TINY)


@pytest.fixture(scope="module")
def rows(ran: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The row of each method."""
    return {row["method"]: row for row in ran[0]}


@pytest.fixture(scope="module")
def points(ran: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The points of all paths."""
    return ran[1]


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return Laboratory(TINY, 0)


def test_the_optimum_is_inside_the_problem(lab: Laboratory) -> None:
    """lambda* is neither 0 nor at the cap, and no feasible policy found at random is better."""
    assert 0.05 < lab.lam < 20
    rng = np.random.default_rng(0)
    tried = [lab.problem.log_reference + rng.normal(size=lab.share.shape) for _ in range(2000)]
    tried += [
        lab.problem.policy(lab.lam) + 0.05 * rng.normal(size=lab.share.shape) for _ in range(2000)
    ]
    found = [lab.problem.describe(torch.tensor(table).log_softmax(1).numpy()) for table in tried]
    feasible = [each["value"] for each in found if each["cost"] <= lab.limit]
    assert len(feasible) > 100 and max(feasible) <= lab.optimum


def test_the_claiming_methods_are_those_of_the_table() -> None:
    assert {method.name for method in exact.METHODS if method.claims} == CLAIMING


@pytest.mark.parametrize("name", sorted(CLAIMING))
def test_who_claims_the_optimum_reaches_it(rows: dict[str, dict[str, Any]], name: str) -> None:
    assert abs(rows[name]["gap"]) <= 1e-3
    assert abs(rows[name]["excess"]) <= 1e-3


@pytest.mark.parametrize("method", [m for m in exact.METHODS if m.predicted], ids=lambda m: m.name)
def test_every_trained_policy_is_the_predicted_one(
    rows: dict[str, dict[str, Any]], method: exact.Method
) -> None:
    row = rows[method.name]
    assert row["deviation"] < 1e-4
    assert row["gap"] == pytest.approx(row["predicted_gap"], abs=1e-4)
    assert row["excess"] == pytest.approx(row["predicted_excess"], abs=1e-4)


def test_every_policy_of_a_path_is_the_predicted_one(points: list[dict[str, Any]]) -> None:
    predicted = [point for point in points if "deviation" in point]
    assert len(predicted) == 4 * sum(
        group[0].predicted is not None for group in exact.shared_losses().values()
    )
    for point in predicted:
        assert point["deviation"] < 1e-4, (point["methods"], point["ratio"])


def test_methods_of_one_loss_are_predicted_alike() -> None:
    """They share a path, which is compared to the prediction of the first."""
    for group in exact.shared_losses().values():
        assert len({method.predicted for method in group}) == 1


def test_distance_is_the_divergence_from_the_optimal_policy(lab: Laboratory) -> None:
    policy = lab.helpful
    optimal = torch.tensor(lab.problem.policy(lab.lam))
    divergence = float((policy.exp() * (policy - optimal)).sum(1).mean())
    assert exact.against_optimum(lab, policy)["distance"] == pytest.approx(lab.beta * divergence)


@pytest.mark.parametrize(
    "name",
    [
        "sacpo_ipo_dpo",
        "sacpo_dpo_ipo",
        "sacpo_kto_dpo",
        "sacpo_dpo_kto",
        "c_dpo_normalised_given",
        "safe_dpo",
    ],
)
def test_other_problems_miss_the_optimum(rows: dict[str, dict[str, Any]], name: str) -> None:
    assert max(abs(rows[name]["gap"]), abs(rows[name]["excess"])) > 0.01


def test_normalised_labels_with_plain_beta_pay_for_the_limit_in_value(
    rows: dict[str, dict[str, Any]],
) -> None:
    row = rows["c_dpo_normalised"]
    assert abs(row["excess"]) <= 1e-3 and row["gap"] > 0.01


@pytest.mark.parametrize(
    ("name", "least"), [("naive_merge", 5e-4), ("o_pd_dpo_kept", 2e-3), ("safe_rlhf_kept", 1e-2)]
)
def test_other_tilts_that_meet_the_limit_pay_in_value(
    rows: dict[str, dict[str, Any]], name: str, least: float
) -> None:
    assert abs(rows[name]["excess"]) <= 1e-4 and rows[name]["gap"] > least


def test_a_naive_merge_has_the_weaker_kl_of_its_weight(
    rows: dict[str, dict[str, Any]], lab: Laboratory
) -> None:
    """The merge that meets the limit is the optimum of beta / (1 - q), of which q lambda-bar / (1 -
    q) is lambda*.
    """
    lam = rows["naive_merge"]["lam"]
    q = lam / (lam + lab.settings.lambda_bar)
    other = dataclasses.replace(lab.problem, beta=lab.beta / (1 - q))
    assert solve(other, lab.limit) == pytest.approx(lam, rel=1e-3)
    assert q * lab.settings.lambda_bar / (1 - q) == pytest.approx(lam)


def test_safe_rlhf_with_beta_kept_ends_where_c_dpo_with_normalised_labels_does(
    rows: dict[str, dict[str, Any]],
) -> None:
    assert rows["safe_rlhf_kept"]["lam"] == pytest.approx(rows["c_dpo_normalised"]["lam"], rel=2e-3)
    assert rows["safe_rlhf_kept"]["gap"] == pytest.approx(rows["c_dpo_normalised"]["gap"], abs=1e-3)


def test_the_best_of_a_grid_is_the_best_policy_on_it_within_the_limit(
    rows: dict[str, dict[str, Any]], lab: Laboratory
) -> None:
    found = [lab.problem.describe(lab.problem.policy(lam)) for lam in exact._GRID]
    best = max(
        (each for each in found if each["cost"] <= lab.limit), key=lambda each: each["reward"]
    )
    row = rows["sacpo_swapped_grid"]
    assert (
        row["excess"] == pytest.approx(best["cost"] - lab.limit, abs=1e-4) and row["excess"] < -1e-3
    )
    assert row["gap"] == pytest.approx(lab.optimum - best["value"], abs=1e-4) and row["gap"] > 1e-3


def test_a_grid_without_a_policy_within_the_limit_returns_the_least_costly(lab: Laboratory) -> None:
    (method,) = (m for m in exact.METHODS if m.name == "sacpo_swapped_grid")
    steps = [
        (lam, torch.tensor(lab.problem.policy(lam)))
        for lam in (0.1 * lab.lam, 0.3 * lab.lam, 0.2 * lab.lam)
    ]
    assert [lam for lam, _ in exact.returned(method, lab, steps)] == [0.3 * lab.lam]


def test_pecan_as_coded_tilts_too_far(rows: dict[str, dict[str, Any]]) -> None:
    """At one and the same lambda, beta in the labels decides."""
    assert rows["pecan_as_coded"]["lam"] == pytest.approx(rows["pecan"]["lam"])
    assert abs(rows["pecan_as_coded"]["excess"]) > 0.01 > 1e-3 > abs(rows["pecan"]["excess"])


@pytest.mark.parametrize("name", ["sacpo_kto_dpo", "sacpo_dpo_kto", "safe_dpo"])
def test_outvoted_and_unsafe_answers_lose_their_mass(
    rows: dict[str, dict[str, Any]], name: str
) -> None:
    assert rows[name]["emptied_reference"] > 0.1
    assert rows[name]["emptied"] < 0.01


def test_cost_falls_along_the_path(points: list[dict[str, Any]]) -> None:
    costs = [point["excess"] for point in points if "dualign" in point["methods"]]
    assert costs == sorted(costs, reverse=True) and costs[0] > 0 > costs[-1]


def test_trainings_are_counted(rows: dict[str, dict[str, Any]]) -> None:
    counts = {
        name: rows[name]["trainings"]
        for name in ("sacpo", "sacpo_swapped", "p_sacpo", "mocan", "pecan")
    }
    assert counts == {"sacpo": 2, "sacpo_swapped": 2, "p_sacpo": 2, "mocan": 1, "pecan": 3}
    assert (
        rows["dualign"]["trainings"]
        == 1
        < rows["c_dpo"]["trainings"]
        == rows["pd_dpo"]["trainings"] - 1
    )
    others = {
        name: rows[name]["trainings"] for name in ("sacpo_swapped_grid", "naive_merge", "safe_rlhf")
    }
    assert others == {"sacpo_swapped_grid": 8, "naive_merge": 2, "safe_rlhf": 1}
    assert rows["o_pd_dpo"]["trainings"] == 2 * (rows["pd_dpo"]["trainings"] - 1)


def test_finite_data_have_the_exact_data_as_their_limit() -> None:
    exactly, drawn = (
        Laboratory(Settings(prompts=2, answers=3, pairs=n, samples=n), 1) for n in (0, 200_000)
    )
    assert torch.allclose(exactly.share, drawn.share, atol=5e-3)
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    for one, other in ((exactly.more_helpful, drawn.more_helpful), (exactly.safer, drawn.safer)):
        assert torch.allclose(one[:, off_diagonal], other[:, off_diagonal], atol=5e-3)
    for one, other in zip(exactly.safe_marks(), drawn.safe_marks(), strict=True):
        assert torch.allclose(one, other, atol=5e-3)
    assert exact._pool(exactly) == pytest.approx(exact._pool(drawn), rel=0.05)


def test_answers_outside_the_pool_keep_their_proportions_and_the_search_stays_short() -> None:
    lab = Laboratory(Settings(prompts=4, answers=6, samples=8), 0)
    (method,) = (m for m in exact.METHODS if m.name == "dualign")
    steps = exact.run_rule(method, lab)
    assert 1 < len(steps) <= 8
    unseen = lab.share == 0
    assert (unseen.sum(1) > 1).any()
    ratio = (steps[-1][1] - lab.reference).masked_fill(~unseen, torch.nan)
    for row in ratio:
        values = row[~row.isnan()]
        assert torch.allclose(values, values.mean(), atol=1e-9)


# --- O-PD-DPO -------------------------------------------------------------------------------------


def test_bonus_is_the_norm_by_the_inverse_covariance() -> None:
    """Sigma = I + the sum of 2 pairs (0, 1) and 5 pairs (1, 2), by hand."""
    met = torch.zeros(1, 3, 3, dtype=torch.float64)
    met[0, 0, 1] = met[0, 1, 0] = 2
    met[0, 1, 2] = met[0, 2, 1] = 5
    sigma = np.array([[1 + 2, -2, 0], [-2, 1 + 2 + 5, -5], [0, -5, 1 + 5]])
    assert bonus(met)[0].numpy() == pytest.approx(np.sqrt(np.diag(np.linalg.inv(sigma))))


def test_bonuses_are_large_for_what_was_seldom_compared_and_shrink_with_the_rounds() -> None:
    lab = Laboratory(Settings(prompts=4, answers=5, pairs=40, fresh=200), 0)
    offline = lab.safer
    first = lab.optimism(offline, offline)
    seen = (offline + offline.mT).sum(2)
    for row, count in zip(first, seen, strict=True):
        assert row[count.argmin()] > row[count.argmax()]
    gap = (
        torch.triu(offline + offline.mT, 1) * (first[:, :, None] - first[:, None, :]).abs()
    ).sum() / offline.sum()
    assert float(gap) == pytest.approx(lab.settings.bonus)
    fresh = lab.wins(-lab.cost, lab._draw_pairs(np.random.default_rng(0), lab.reference.exp(), 200))
    later = lab.optimism(offline + fresh, offline)
    assert (later <= first + 1e-12).all() and float(
        (later.max() - later.min()) / (first.max() - first.min())
    ) < 0.7


def test_fresh_pairs_hold_an_answer_of_the_policy_and_one_of_the_reference() -> None:
    lab = Laboratory(Settings(prompts=3, answers=4, pairs=50), 0)
    policy = torch.zeros(3, 4, dtype=torch.float64)
    policy[:, 2] = 1.0
    pairs = lab._draw_pairs(np.random.default_rng(0), policy, 20_000)
    assert (pairs.first == 2).all()
    drawn = torch.stack([(pairs.second == answer).double().mean(1) for answer in range(4)], 1)
    assert torch.allclose(drawn, lab.reference.exp(), atol=0.02)
    assert torch.allclose(pairs.design[:, 2], lab.reference.exp())
    assert float(lab.wins(lab.reward, pairs).sum()) == pytest.approx(
        3 * 20_000 / 50
    )  # in units of offline pairs


def test_a_round_trains_on_the_pairs_of_all_rounds_before() -> None:
    """With finitely many labels fresh ones move both phases; a thousand times as many bring the
    policy to pi_lambda.
    """
    few, many = (
        Laboratory(Settings(prompts=3, answers=4, pairs=30, fresh=n), 0) for n in (30, 30_000)
    )
    optimal = torch.tensor(few.problem.policy(few.lam))
    alone = few.o_pd_dpo(few.lam, [])
    steps = [alone, few.reference]
    one, three = (lab.o_pd_dpo(lab.lam, steps) for lab in (few, many))
    errors = [float((policy.exp() - optimal.exp()).abs().max()) for policy in (alone, one, three)]
    assert errors[2] < 0.05 < min(errors[:2])
    assert float((alone - one).abs().max()) > 0.05


def test_a_search_passes_the_policies_before_to_an_online_method() -> None:
    lab = Laboratory(Settings(prompts=3, answers=4, pairs=30, rounds=3, tolerance=0.0), 0)
    (method,) = (m for m in exact.METHODS if m.name == "o_pd_dpo")
    steps = exact.run_rule(method, lab)
    assert len(steps) == 3
    again = lab.o_pd_dpo(steps[2][0], [policy for _, policy in steps[:2]])
    assert torch.allclose(steps[2][1], again)


def test_score_noise_misleads_a_search_but_not_the_given_multiplier() -> None:
    lab = Laboratory(Settings(prompts=4, answers=5, noise=0.5), 0)
    found = {m.name: exact.measure(m, lab) for m in exact.METHODS if m.name in ("sacpo", "dualign")}
    assert abs(found["sacpo"]["excess"]) <= 1e-3  # human labels and the true lambda*
    assert abs(found["dualign"]["excess"]) > 1e-2


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = [
        "--seeds",
        "1",
        "--prompts",
        "2",
        "--answers",
        "3",
        "--pairs",
        "50",
        "--samples",
        "8",
        "--noise",
        "0.1",
    ]
    exact.main([*size, "--rounds", "3", "--out", str(tmp_path)])
    page = (tmp_path / "exact-tabular.md").read_text()
    content = json.loads((tmp_path / "exact-tabular.json").read_text())
    assert capsys.readouterr().out == page
    assert (
        content["command"] in page
        and "--samples 8" in content["command"]
        and str(tmp_path) not in page
    )
    assert [row["method"] for row in content["methods"]] == [
        method.name for method in exact.METHODS
    ]
    assert all(f"| {method.title} |" in page for method in exact.METHODS)


def test_bad_options_are_refused() -> None:
    with pytest.raises(DualignError, match="samples must be 0 or at least 2"):
        Settings(samples=1)
    with pytest.raises(SystemExit):
        exact.main(["--answers", "1"])
