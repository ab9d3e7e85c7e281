"""Which step comes next: the rules, and the merges that save a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from dualign.core.records import as_row
from dualign.evaluation.stats import ConstraintEstimate
from dualign.math.updates import line_root, newton_step, secant_step, tilt_step
from dualign.methods import METHODS, Plan
from dualign.params.search import DualSearchParams, OnlineParams
from dualign.search.journal import Blend, Step
from dualign.search.loop import run
from dualign.search.policy import RULES, Search, SearchContext, jointly, next_blend
from dualign.search.screening import PoolCost
from dualign.search.summary import summary
from tests.search.curves import (
    BETA,
    LIMIT,
    ROOT_LAM,
    Curve,
    Swings,
    by_rule,
    go,
    measured,
    spent,
    step,
    tilted,
)


def proposed(
    rule: str, steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> float | None:
    """What the rule says comes next, the limit as the target."""
    return RULES[rule](Search(by_rule(rule), params, context), steps)


@pytest.mark.parametrize("slope", [0.6, 1.0, 1.6])
def test_the_line_beats_the_secant_where_costs_are_noisy(
    slope: float, params: DualSearchParams
) -> None:
    """Searches on the curve with noise, Newton's curvature off by a factor: whose next multiplier
    is nearer?
    """
    rng, noise, known = np.random.default_rng(0), 0.05, SearchContext(0.6, 0.6)
    exact = params.model_copy(update={"z": 0.0})
    errors: dict[str, list[float]] = {"secant": [], "line": []}
    for _ in range(400):
        steps: list[Step] = []
        lam = float(rng.uniform(0.6, 2.4))
        for number in range(4):
            fall = 0.8 * math.exp(-0.7 * lam)
            cost = fall - 0.6 + noise * float(rng.normal())
            steps.append(step(number + 1, lam, cost, se=noise, variance=BETA * 0.7 * fall * slope))
            lam = proposed("newton", steps, exact, known) or 0.0
        (x0, c0), (x1, c1) = ((s.lam, s.measured.cost) for s in steps[-2:])
        secant = secant_step((x0, c0), (x1, c1), LIMIT)
        if secant is not None:
            for name, found in (("secant", secant), ("line", lam)):
                errors[name].append(abs(0.8 * math.exp(-0.7 * found) - 0.3))
    assert len(errors["line"]) > 200 and np.mean(errors["line"]) < 0.75 * np.mean(errors["secant"])


def test_every_rule_of_the_table_is_tested_here() -> None:
    tested = {
        "grid", "one_shot", "dual_gradient", "projected_subgradient", "newton", "merge", "ascent",
    }  # fmt: skip
    assert {method.rule for method in METHODS.values()} <= tested == set(RULES)


def test_newton_needs_two_trainings(bench: Curve, params: DualSearchParams, tmp_path: Path) -> None:
    steps, _ = go("newton", bench, params, tmp_path / "s")
    assert len(steps) <= 4
    first = newton_step(0.6, steps[0].measured.cost, steps[0].measured.variance, LIMIT, BETA)
    assert steps[1].lam == pytest.approx(first)
    second = newton_step(
        steps[1].lam, steps[1].measured.cost, steps[1].measured.variance, LIMIT, BETA
    )
    assert steps[2].lam == pytest.approx(
        second
    )  # the start is of another training, so it tells no slope
    exact = params.model_copy(update={"z": 0.0})
    lams, costs = [s.lam for s in steps[1:3]], [s.measured.cost for s in steps[1:3]]
    line = line_root(lams, costs, [bench.se] * 2, steps[2].measured.variance / BETA, LIMIT)
    assert proposed("newton", steps[:3], exact, SearchContext(0.6, 0.6)) == pytest.approx(line)


def test_a_first_correction_is_told_in_commands_where_the_tilt_is_believed(
    params: DualSearchParams, tmp_path: Path
) -> None:
    """Every training reaches 0.6 of what it is told; Newton alone would go 0.6 of the way."""
    lazy = Curve(tmp_path / "lazy", lam_start=1.0, reach=0.6)
    steps, _ = go("newton", lazy, params, tmp_path / "s")
    m = steps[0].measured
    newton = newton_step(1.0, m.cost, m.variance, LIMIT, BETA)
    assert steps[1].lam == pytest.approx(1.0 + (newton - 1.0) / 0.6)
    assert abs(steps[1].measured.cost - LIMIT) < abs(lazy._cost(0.6 * newton) - LIMIT)
    doubted = replace(steps[0], tilt=tilted(0.6, r2=0.89))
    unclear = replace(steps[0], tilt=tilted(0.6, lam_se=0.31))
    for first in (doubted, unclear, replace(steps[0], tilt=None)):
        assert proposed("newton", [first], params, SearchContext(1.0, 1.0)) == pytest.approx(newton)
    second, later = steps[1], proposed("newton", steps[:2], params, SearchContext(1.0, 1.0))
    assert later == tilt_step(
        second.lam,
        second.tilt.beta_eff,
        second.tilt.lam_eff,
        second.measured.cost,
        second.measured.variance,
        LIMIT,
    )


def test_newton_leaves_a_start_that_meets_the_limit(
    params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go(
        "newton", Curve(tmp_path / "bench", lam_start=ROOT_LAM), params, tmp_path / "s"
    )
    assert [s.lam for s in steps] == [ROOT_LAM] and stopped == "cost within noise of the limit"
    off = Curve(tmp_path / "off", lam_start=0.5 * ROOT_LAM)
    assert len(go("newton", off, params, tmp_path / "t")[0]) > 1


def test_newton_keeps_its_multiplier_where_the_cost_does_not_vary(params: DualSearchParams) -> None:
    flat = replace(step(0, 0.7, 0.5), measured=measured(0.5, variance=0.0))
    assert proposed("newton", [flat], params, SearchContext(0.7, 0.7, 5.0)) == 0.7


def test_newton_stays_below_the_largest_multiplier(params: DualSearchParams) -> None:
    steep = replace(step(0, 0.7, 0.5), measured=measured(0.5, variance=1e-6))
    assert proposed("newton", [steep], params, SearchContext(0.7, 0.7, 5.0)) == params.lambda_max


def test_rounds_of_comparisons_go_on_at_the_end_of_the_interval(params: DualSearchParams) -> None:
    online = OnlineParams(
        labels="models",
        folder="f",
        retrain_reward=True,
        ridge=1.0,
        reward_scale=0.1,
        cost_scale=0.1,
        dimension=None,
    )
    at_the_end, known = [step(3, 1.8, cost=0.5)], SearchContext(0.6, 0.6, radius=0.9)
    assert proposed("projected_subgradient", at_the_end, params, known) is None
    assert (
        proposed(
            "projected_subgradient", at_the_end, params.model_copy(update={"online": online}), known
        )
        == 1.8
    )


def test_the_next_blend_by_hand() -> None:
    above, below = step(0, 0.6, cost=0.1), step(1, 1.8, cost=-0.5)
    assert next_blend([above, below], LIMIT) == Blend(0, 1, pytest.approx(0.4 / 0.6))
    assert next_blend([above], LIMIT) is None and next_blend([below], LIMIT) is None
    nearer = step(2, 1.2, cost=-0.2)
    assert next_blend([above, below, nearer], LIMIT) == Blend(2, 1, pytest.approx(1 / 3))
    known = replace(step(2, 1.4, cost=-0.4), trained=False, blend=Blend(0, 1, 2 / 3))
    assert next_blend([above, below, known], LIMIT) == Blend(
        0, 1, pytest.approx(1 / 3)
    )  # on the line of the two nearest
    met = replace(known, measured=measured(LIMIT))
    assert next_blend([above, below, met], LIMIT) is None  # its root is there


def test_policies_on_both_sides_of_the_limit_are_merged_in_place_of_a_training(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Swings(tmp_path / "bench", lam_start=0.6)
    steps, stopped = go("newton", bench, params, tmp_path / "s")
    assert (
        stopped == "cost within noise of the limit"
        and abs(steps[-1].measured.cost - LIMIT) <= bench.se
    )
    assert [s.trained for s in steps] == [False, True, False, False]
    weights = [
        0.7475,
        0.6426,
    ]  # the secant of start and training, then the one of the start and the first blend
    assert [weight for *_, weight in bench.blended] == pytest.approx(weights, abs=1e-4)
    assert {ends[:2] for ends in bench.blended} == {(steps[0].policy, steps[1].policy)}
    for made, weight in zip(steps[2:], weights, strict=True):
        assert made.lam == pytest.approx(
            (1 - weight) * steps[0].lam + weight * steps[1].lam, abs=1e-4
        )
    rows = summary(
        Search(by_rule("newton"), params, SearchContext(0.6, 0.6)), steps, stopped, before=1
    )
    assert (rows.trainings, rows.chosen) == (2, 3)
    blend = {"first": 0, "second": 1, "weight": bench.blended[1][2]}
    assert as_row(rows.steps[3])["blend"] == blend
    assert as_row(rows.steps[1])["blend"] is None


def test_blends_have_their_budget_and_trainings_theirs(
    params: DualSearchParams, tmp_path: Path
) -> None:
    never = params.model_copy(update={"z": 0.0, "max_trainings": 2, "merge_steps": 3})
    bench = Swings(tmp_path / "bench", lam_start=0.6)
    steps, stopped = go("newton", bench, never, tmp_path / "s")
    assert (len(bench.trained), len(bench.blended), len(steps)) == (2, 3, 6)
    assert stopped == "budget of 2 trainings is spent"
    without = never.model_copy(update={"merge_steps": 0})
    assert all(
        s.blend is None
        for s in go("newton", Swings(tmp_path / "b", 0.6), without, tmp_path / "t")[0]
    )


@pytest.mark.parametrize("returns", ["mixture", "tail_average"])
def test_what_is_made_of_all_steps_is_made_of_trainings(
    returns: str, params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Swings(tmp_path / "bench", lam_start=0.6)
    steps, _ = go("newton", bench, params, tmp_path / "s", returns=returns)
    assert len(steps) > 3 and not bench.blended


def test_merging_begins_at_the_pools_multiplier_and_ends_on_the_limit(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=3.0)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=1.2)
    assert bench.merged[0] == pytest.approx(0.4)
    assert stopped == "cost within noise of the limit"
    assert steps[-1].q == pytest.approx(ROOT_LAM / 3.0, abs=0.02)
    assert all(s.lam == pytest.approx(s.q * 3.0) for s in steps[1:] if s.q is not None)
    assert not bench.trained and not any(s.trained for s in steps)


@pytest.mark.parametrize(
    ("lam", "merges"), [(ROOT_LAM, 0), (1.2, 1), (1.6, 1)], ids=["on it", "above", "below"]
)
def test_a_start_at_the_pools_multiplier_is_corrected_by_newtons_weight(
    lam: float, merges: int, params: DualSearchParams, tmp_path: Path
) -> None:
    """It is the policy of weight 1, so only what it misses is merged away."""
    bench = Curve(tmp_path / "bench", lam_start=lam)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=lam)
    assert stopped == "cost within noise of the limit"
    assert abs(steps[-1].measured.cost - LIMIT) <= bench.se
    if merges:
        m = steps[0].measured
        newton = newton_step(lam, m.cost, m.variance, LIMIT, BETA)
        assert bench.merged[0] == pytest.approx(newton / lam)
    assert bool(bench.merged) is bool(merges) and not bench.trained


def test_merging_extrapolates_no_further_than_allowed(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=0.5)
    _, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=5.0)
    assert bench.merged[0] == params.merge_max == max(bench.merged)
    assert stopped == "rule merge is finished"  # the best it can do was measured already


def test_merging_has_its_own_budget(params: DualSearchParams, tmp_path: Path) -> None:
    bench = Curve(tmp_path / "bench", lam_start=4.0, se=1e-12)
    tight = params.model_copy(update={"merge_steps": 2, "max_trainings": 0})
    steps, stopped = go("merge", bench, tight, tmp_path / "s", lam_pool=1.0)
    assert len(bench.merged) == len(steps) - 1 == 2
    assert stopped == "budget of 2 merges is spent"


def test_a_slack_pool_begins_at_the_helpful_policy(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=0.05, bias=-1.0)
    go("merge", bench, params, tmp_path / "s", lam_pool=0.0)
    assert bench.merged[0] == 0.0


def test_a_naive_merge_keeps_its_own_books(params: DualSearchParams, tmp_path: Path) -> None:
    """Its weight of the pool's multiplier is lam / (lam + lam_start), and no weight reaches 1."""
    bench = Curve(tmp_path / "bench", lam_start=3.0)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=1.0, naive=True)
    assert bench.merged[0] == pytest.approx(0.25)
    assert steps[1].lam == pytest.approx(1.0)
    assert all(s.lam == pytest.approx(s.q * 3.0 / (1 - s.q)) for s in steps[1:] if s.q is not None)
    assert stopped == "cost within noise of the limit"
    short = Curve(tmp_path / "short", lam_start=0.5)  # even its start is above the limit
    steps, stopped = go("merge", short, params, tmp_path / "t", lam_pool=5.0, naive=True)
    assert max(short.merged) < 1 and stopped == "rule merge is finished"


@pytest.mark.parametrize("bias", [0.0, 0.15])
def test_screening_saves_measurements(
    bias: float, params: DualSearchParams, tmp_path: Path
) -> None:
    """The pool's multiplier is far off; without screening the secant finds the weight by
    measuring.
    """
    exact = params.model_copy(update={"z": 0.5})
    blind, seeing = (
        Curve(tmp_path / f"{ess}", lam_start=4.0, bias=bias, ess=ess) for ess in (0.0, 1000.0)
    )
    steps, _ = go("merge", blind, exact, tmp_path / "a", lam_pool=0.4)
    fewer, stopped = go("merge", seeing, exact, tmp_path / "b", lam_pool=0.4)
    assert stopped == "cost within noise of the limit"
    assert len(seeing.measured) == 2 < len(blind.measured) and spent(fewer) < spent(steps)
    assert fewer[1].q == fewer[1].screened[-1].q
    result = summary(
        Search(by_rule("merge"), exact, SearchContext(0.4, 4.0)), fewer, stopped, before=2
    )
    assert [seen.q for seen in result.screened] == [1.0, *seeing.screened]
    assert (
        set(type(result.screened[0]).model_fields) == {"q", *asdict(PoolCost(0, 0, 0))}
        and result.screened[0].q == 1.0
    )


def test_a_weight_that_few_samples_speak_for_is_measured_unscreened(
    params: DualSearchParams, tmp_path: Path
) -> None:
    blind, doubting = (Curve(tmp_path / f"{ess}", lam_start=3.0, ess=ess) for ess in (0.0, 60.0))
    plain, _ = go("merge", blind, params, tmp_path / "a", lam_pool=1.2)
    steps, _ = go("merge", doubting, params, tmp_path / "b", lam_pool=1.2)
    assert [s.q for s in steps] == [s.q for s in plain]
    assert all(seen.pool.ess < params.min_ess for s in steps for seen in s.screened)
    assert all(s.pool is None for s in steps)


def test_screening_stops_where_the_samples_end(params: DualSearchParams, tmp_path: Path) -> None:
    """ESS falls with the weight: 100 is at q = 0.5, the root at 0.70; the secant's guess beyond it
    is measured.
    """
    bench = Curve(tmp_path / "b", lam_start=2.0, ess=100.0)
    steps, stopped = go("merge", bench, params, tmp_path / "s", lam_pool=0.4)
    assert bench.screened[0] == pytest.approx(0.2)
    trusted = [seen for seen in steps[1].screened if seen.pool.ess >= params.min_ess]
    assert (
        trusted
        and steps[1].q == steps[1].screened[-1].q
        and steps[1].screened[-1].pool.ess < params.min_ess
    )
    assert stopped == "cost within noise of the limit"


@pytest.mark.parametrize("rule", ["merge", "newton"])
def test_the_pool_has_a_say_in_what_a_policy_costs(
    rule: str, params: DualSearchParams, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A start at the limit whose own answers err by more than the search takes for noise; the pool
    knows it better, and only while it speaks for the policy.
    """
    caplog.set_level("INFO")
    exact = params.model_copy(update={"z": 0.5})
    knowing, ignorant = (
        Curve(tmp_path / f"{ess}", lam_start=ROOT_LAM, se=0.05, bias=0.03, ess=ess)
        for ess in (1000.0, 0.0)
    )
    steps, stopped = go(rule, knowing, exact, tmp_path / "a", lam_pool=ROOT_LAM)
    assert len(steps) == 1 and stopped == "cost within noise of the limit"
    assert knowing.asked_pool == [knowing.start]
    assert steps[0].measured.cost == pytest.approx(LIMIT + 0.03)
    assert steps[0].cost == pytest.approx(LIMIT + 0.03 * 0.05**-2 / (0.05**-2 + 0.02**-2))
    assert "no say" not in caplog.text
    others, _ = go(rule, ignorant, exact, tmp_path / "b", lam_pool=ROOT_LAM)
    assert "step 0: the pool has no say in its cost: -0.3 +- 0.02 by 0.0" in caplog.text
    assert len(others) > 1 and others[0].cost == others[0].measured.cost
    found = summary(
        Search(by_rule(rule), exact, SearchContext(ROOT_LAM, ROOT_LAM)), steps, stopped, before=1
    ).steps[0]
    assert found.pool is not None and found.pool.cost == pytest.approx(LIMIT)
    assert (found.combined_cost, found.combined_cost_se) == (steps[0].cost, steps[0].cost_se)
    assert found.cost == pytest.approx(LIMIT + 0.03) and found.cost_se == 0.05


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"merge", "newton"}))
def test_published_rules_go_by_own_answers_alone(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "b", lam_start=1.0, ess=1000.0)
    steps, _ = go(rule, bench, params, tmp_path / "s")
    assert not bench.asked_pool and all(s.pool is None for s in steps)


def test_an_additional_constraint_is_steered_with_the_combined_cost(
    params: DualSearchParams,
) -> None:
    """One Newton step for all prices, from where pool and own answers put the cost."""
    covariance = ((0.5, 0.1), (0.1, 0.2))
    own = replace(measured(LIMIT + 0.03, se=0.05), covariance=covariance)
    limits = (ConstraintEstimate("rare", 0.1, 1.0, 0.1, 0.01),)
    last = replace(step(1, 1.0, 0.0), measured=replace(own, additional=limits), prices=(0.5,))
    both = replace(last, pool=PoolCost(LIMIT, 0.02, 9.0))
    moves = [jointly(each, LIMIT, BETA)[0] - 1.0 for each in (last, both)]
    assert moves[1] == pytest.approx(moves[0] * 0.05**-2 / (0.05**-2 + 0.02**-2), rel=1e-6)


def test_labels_are_not_screened(params: DualSearchParams, tmp_path: Path) -> None:
    bench = Curve(tmp_path / "b", lam_start=3.0, ess=1000.0)
    (tmp_path / "s").mkdir()
    plan = Plan("row", replace(METHODS["p_sacpo"], cost="feedback"), "start", "reference")
    run(Search(plan, params, SearchContext(1.2, 3.0)), bench.start, bench, tmp_path / "s")
    assert bench.merged and not bench.screened and not bench.asked_pool


def test_a_merge_between_two_multipliers_keeps_its_books(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "b", lam_start=3.0)
    (tmp_path / "s").mkdir()
    known = SearchContext(1.2, 3.0, lam_reference=0.3)
    steps, _ = run(Search(by_rule("merge"), params, known), bench.start, bench, tmp_path / "s")
    assert steps[1].q == pytest.approx(1 / 3) and steps[1].lam == pytest.approx(1.2)
