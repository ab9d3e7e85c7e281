"""The loop on policies whose cost is a known function of lambda: every rule, budget, ending."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dualign.core.records import as_row
from dualign.methods import METHODS, Plan
from dualign.params.search import DualSearchParams
from dualign.search.loop import answers_drawn, run
from dualign.search.policy import Search, SearchContext
from dualign.search.summary import choose, feasible, summary
from tests.search.curves import (
    HISTORY,
    LIMIT,
    ROOT_LAM,
    Curve,
    Tilts,
    by_rule,
    go,
    jointly,
    spent,
)


@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient", "newton"])
def test_iterative_rules_end_on_the_limit(
    rule: str, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    generous = params.model_copy(update={"max_trainings": 50, "step_size": 2.0})
    steps, stopped = go(rule, bench, generous, tmp_path / "s")
    assert stopped == "cost within noise of the limit"
    assert abs(steps[-1].measured.cost - LIMIT) <= bench.se
    assert steps[-1].lam == pytest.approx(ROOT_LAM, abs=0.06)
    assert [s.step for s in steps] == list(range(len(steps)))
    assert [s.trained for s in steps] == [False] + [True] * (len(steps) - 1)
    assert all(s.q is None for s in steps)


@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient", "newton", "merge"])
def test_a_rule_ends_on_the_target_below_the_limit(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    generous = params.model_copy(update={"max_trainings": 50, "step_size": 2.0})
    bench = Curve(tmp_path / "bench", lam_start=3.0 if rule == "merge" else 0.6)
    steps, stopped = go(
        rule, bench, generous, tmp_path / "s", lam_pool=1.2, target_cost=LIMIT - 0.1
    )
    assert stopped == "cost within noise of the target"
    assert abs(steps[-1].measured.cost - (LIMIT - 0.1)) <= bench.se
    known = SearchContext(1.2, 0.6, target_cost=LIMIT - 0.1)
    found = summary(Search(by_rule(rule), generous, known), steps, stopped, before=1)
    assert found.target == pytest.approx(LIMIT - 0.1)


@pytest.mark.parametrize(
    "rule", ["grid", "dual_gradient", "projected_subgradient", "newton", "merge"]
)
def test_no_search_spends_more_tokens_than_it_may(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    def curve(name: str) -> Curve:
        return Curve(tmp_path / name, lam_start=3.0 if rule == "merge" else 0.6, se=1e-12)

    even = params.model_copy(
        update={"refresh_prompts": 0, "grid": [0.5, 1.0, 2.0, 3.0]}
    )  # every step takes 100
    for budget, count in ((250, 2), (299, 2), (300, 3)):
        tight = even.model_copy(update={"max_tokens": budget})
        steps, stopped = go(rule, curve(f"{budget}"), tight, tmp_path / f"s{budget}", lam_pool=1.2)
        assert len(steps) == count and spent(steps) <= budget
        assert stopped == f"budget of {budget} generated tokens is spent"


def test_answers_for_the_next_training_are_foreseen(
    params: DualSearchParams, tmp_path: Path
) -> None:
    """100 tokens for the start's answers foretell 150 where half as many are drawn to be trained
    on.
    """
    update = {"prompts": 10, "samples_per_prompt": 2, "refresh_prompts": 5, "refresh_samples": 2}
    for budget, count in ((249, 1), (250, 2)):
        tight = params.model_copy(update={**update, "max_tokens": budget, "max_trainings": 1})
        steps, _ = go("newton", Curve(tmp_path / f"{budget}", 0.6), tight, tmp_path / f"s{budget}")
        assert len(steps) == count
    assert answers_drawn(by_rule("newton"), params.model_copy(update=update), trained=False) == 20
    assert answers_drawn(by_rule("grid"), params.model_copy(update=update), trained=True) == 20


@pytest.mark.parametrize("returns", ["last", "mixture", "tail_average"])
def test_a_search_out_of_tokens_returns_its_best_so_far(
    returns: str, params: DualSearchParams, tmp_path: Path
) -> None:
    wide = params.model_copy(update={"max_tokens": 320, "step_size": 8.0, "refresh_prompts": 0})
    steps, stopped = go(
        "dual_gradient", Curve(tmp_path / "b", 0.6), wide, tmp_path / "s", returns=returns
    )
    assert (
        len(steps) == 3
        and not any(s.closing for s in steps)
        and stopped.startswith("budget of 320 generated")
    )
    plan = by_rule("dual_gradient", returns)
    result = summary(Search(plan, wide, SearchContext(0.6, 0.6)), steps, stopped, before=0)
    allowed = [i for i, s in enumerate(steps) if feasible(s, wide)]
    assert allowed and result.chosen == max(allowed, key=lambda i: steps[i].measured.reward)
    assert result.chosen == 1 and result.feasible


def test_a_search_that_cannot_pay_for_its_closing_says_so(
    params: DualSearchParams, tmp_path: Path
) -> None:
    free = params.model_copy(update={"refresh_prompts": 0})
    whole, reason = go(
        "newton", Curve(tmp_path / "a", 0.6), free, tmp_path / "s", returns="mixture"
    )
    assert whole[-1].closing and reason == "cost within noise of the limit"
    tight = free.model_copy(update={"max_tokens": spent(whole) - 1})
    steps, stopped = go(
        "newton", Curve(tmp_path / "b", 0.6), tight, tmp_path / "t", returns="mixture"
    )
    assert (
        len(steps) == len(whole) - 1
        and stopped == f"budget of {spent(whole) - 1} generated tokens is spent"
    )


@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient"])
def test_a_start_on_the_limit_is_the_answer(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=ROOT_LAM)
    steps, stopped = go(rule, bench, params, tmp_path / "s")
    assert len(steps) == 1 and not bench.trained
    assert stopped == "cost within noise of the limit"


@pytest.mark.parametrize("rule", ["dual_gradient", "newton", "merge"])
def test_a_limit_that_is_kept_at_multiplier_0_ends_the_search(
    rule: str, params: DualSearchParams, tmp_path: Path
) -> None:
    start = 1.2 if rule == "merge" else 0.0  # a merge has its multiplier 0 at weight 0
    bench = Curve(
        tmp_path / "bench", lam_start=start, bias=-0.9
    )  # cost -0.7 at multiplier 0, limit -0.3
    steps, stopped = go(rule, bench, params, tmp_path / "s", lam_pool=0.0)
    assert stopped == "the limit is kept at lambda 0" and steps[-1].lam == 0.0
    assert len(steps) == {"dual_gradient": 1, "newton": 1, "merge": 2}[rule]
    over = Curve(tmp_path / "over", lam_start=start)  # 0.2 at multiplier 0
    assert len(go(rule, over, params, tmp_path / "t", lam_pool=0.0)[0]) > 2


def test_a_wider_error_stops_earlier(params: DualSearchParams, tmp_path: Path) -> None:
    lengths = []
    for se in (0.001, 0.1):
        bench = Curve(tmp_path / f"bench-{se}", lam_start=0.6, se=se)
        steps, _ = go(
            "dual_gradient",
            bench,
            params.model_copy(update={"max_trainings": 40}),
            tmp_path / f"s-{se}",
        )
        lengths.append(len(steps))
    assert lengths[1] < lengths[0]


def test_one_shot_measures_its_start_and_stops(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go("one_shot", bench, params, tmp_path / "s")
    assert len(steps) == 1 and stopped == "rule one_shot is finished"


def test_an_ascent_trains_once_and_tells_its_own_multiplier_and_course(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go("ascent", bench, params, tmp_path / "s")
    assert bench.ascended == [1] and not bench.trained and stopped == "rule ascent is finished"
    assert [(s.lam, s.trained, s.history) for s in steps] == [
        (0.6, False, []),
        (ROOT_LAM, True, HISTORY),
    ]
    result = summary(
        Search(by_rule("ascent"), params, SearchContext(0.6, 0.6)), steps, stopped, before=0
    )
    assert (
        result.history == HISTORY
        and result.trainings == 1
        and "history" not in result.steps[1].model_fields_set
    )
    again = Curve(tmp_path / "again", lam_start=0.6)
    assert go("ascent", again, params, tmp_path / "s") == (steps, stopped) and not again.ascended
    none = params.model_copy(update={"max_trainings": 0})
    assert (
        go("ascent", again, none, tmp_path / "t")[1] == "budget of 0 trainings is spent"
        and not again.ascended
    )


def test_grid_tries_every_multiplier_once_and_not_the_starts(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=1.0)
    steps, stopped = go("grid", bench, params, tmp_path / "s")
    assert [s.lam for s in steps] == [1.0, 0.5, 2.0]
    assert stopped == "rule grid is finished"


def test_a_grid_is_its_own_budget_and_its_end_is_its_reason(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(
        tmp_path / "bench", lam_start=0.6, se=10.0
    )  # always within noise, which a grid does not go by
    steps, stopped = go(
        "grid", bench, params.model_copy(update={"max_trainings": 1}), tmp_path / "s"
    )
    assert [s.lam for s in steps] == [0.6, 0.5, 1.0, 2.0] and stopped == "rule grid is finished"


@pytest.mark.parametrize(("method", "least"), [("c_dpo", 0.0), ("sacpo", 0.05)])
def test_a_grid_starts_at_zero_where_the_loss_allows(
    method: str, least: float, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    plan = Plan("row", replace(METHODS[method], rule="grid"), "start", "reference")
    given = params.model_copy(update={"grid": [0.0, 1.0]})
    (tmp_path / "s").mkdir()
    steps, _ = run(Search(plan, given, SearchContext(0.6, 0.6)), bench.start, bench, tmp_path / "s")
    assert [s.lam for s in steps] == [0.6, least, 1.0]
    assert [lam for _, lam, _ in bench.trained] == [least, 1.0]


def test_a_projection_that_moves_no_more_ends_the_search(
    params: DualSearchParams, tmp_path: Path
) -> None:
    for name, bias, end in (("high", 1.0, 1.8), ("low", -1.0, params.lambda_min)):
        bench = Curve(tmp_path / name, lam_start=0.6, bias=bias)
        steps, stopped = go(
            "projected_subgradient", bench, params, tmp_path / f"s-{name}", radius=0.9
        )
        assert [s.lam for s in steps].count(end) == 1 and steps[-1].lam == end
        assert stopped == "lambda is at the end of its interval"


def test_projection_keeps_to_its_interval(params: DualSearchParams, tmp_path: Path) -> None:
    high = Curve(tmp_path / "high", lam_start=0.6, bias=1.0)  # no multiplier is enough
    steps, _ = go("projected_subgradient", high, params, tmp_path / "a", radius=0.9)
    assert [s.lam for s in steps][-1] == pytest.approx(1.8) and max(
        s.lam for s in steps
    ) == pytest.approx(1.8)
    low = Curve(tmp_path / "low", lam_start=0.6, bias=-1.0)  # none is needed
    steps, _ = go("projected_subgradient", low, params, tmp_path / "b")
    assert steps[-1].lam == params.lambda_min


def test_dual_gradient_stays_between_nothing_and_the_largest(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bold = params.model_copy(update={"step_size": 1e3})
    steps, _ = go("dual_gradient", Curve(tmp_path / "high", 0.6, bias=1.0), bold, tmp_path / "a")
    assert steps[1].lam == params.lambda_max
    steps, _ = go("dual_gradient", Curve(tmp_path / "low", 0.6, bias=-1.0), bold, tmp_path / "b")
    assert steps[1].lam == 0.0


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("rule", ["dual_gradient", "projected_subgradient", "newton"])
def test_no_search_trains_more_than_its_budget(
    rule: str, budget: int, params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Curve(tmp_path / "bench", lam_start=0.6, se=1e-12, bias=1.0)  # never within noise
    tight = params.model_copy(update={"max_trainings": budget})
    steps, stopped = go(rule, bench, tight, tmp_path / "s")
    assert len(bench.trained) == len(steps) - 1 == budget
    assert stopped == f"budget of {budget} training{'' if budget == 1 else 's'} is spent"


def test_every_training_is_told_the_step_before(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, _ = go("grid", bench, params, tmp_path / "s")
    assert [warm for _, _, warm in bench.trained] == [s.policy for s in steps[:-1]]
    assert [(n, lam) for n, lam, _ in bench.trained] == [(s.step, s.lam) for s in steps[1:]]


def test_a_search_ends_at_the_first_step_that_is_enough(
    bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = run(
        Search(by_rule("grid"), params, SearchContext(0.6, 0.6)),
        bench.start,
        bench,
        tmp_path,
        lambda step: step.lam >= 1.0,
    )
    assert ([s.lam for s in steps], stopped) == ([0.6, 0.5, 1.0], "it was enough")


ITERATIVE = ["dual_gradient", "projected_subgradient", "newton"]


@pytest.mark.parametrize("rule", ITERATIVE)
def test_a_mixture_is_of_all_steps_and_measured_itself(
    rule: str, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, stopped = go(rule, bench, params, tmp_path / "s", returns="mixture")
    plain, reason = go(rule, Curve(tmp_path / "plain", 0.6), params, tmp_path / "t")
    assert [s.lam for s in steps[:-1]] == [s.lam for s in plain] and stopped == reason
    assert bench.mixed == [[s.lam for s in plain]]
    last = steps[-1]
    assert last.closing and not last.trained and not any(s.closing for s in steps[:-1])
    assert last.lam == pytest.approx(np.mean([s.lam for s in plain]))
    assert bench.measured[-1] == last.step == len(plain)
    assert (
        choose(Search(by_rule(rule, "mixture"), params, SearchContext(0.6, 0.6)), steps)
        == last.step
    )


@pytest.mark.parametrize("rule", ITERATIVE)
def test_the_tail_average_is_trained_once_more(
    rule: str, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    steps, _ = go(rule, bench, params, tmp_path / "s", returns="tail_average")
    before, last = steps[:-1], steps[-1]
    assert last.closing and last.trained
    assert last.lam == pytest.approx(np.mean([s.lam for s in before[len(before) // 2 :]]))
    assert bench.trained[-1] == (last.step, last.lam, before[-1].policy)
    result = summary(
        Search(by_rule(rule, "tail_average"), params, SearchContext(0.6, 0.6)),
        steps,
        "because",
        before=1,
    )
    assert result.trainings == 1 + len(before) and result.chosen == last.step


@pytest.mark.parametrize("budget", [0, 1])
def test_a_tail_of_one_step_is_that_step(
    budget: int, bench: Curve, params: DualSearchParams, tmp_path: Path
) -> None:
    tight = params.model_copy(update={"max_trainings": budget})
    steps, _ = go("dual_gradient", bench, tight, tmp_path / "s", returns="tail_average")
    assert len(bench.trained) == budget == len(steps) - 1 and not steps[-1].closing


def test_newton_moves_all_multipliers_until_all_limits_are_met(
    params: DualSearchParams, tmp_path: Path
) -> None:
    bench = Tilts(tmp_path / "bench", 0.2, (0.6,), lam_start=0.4, reach=0.7)
    steps, stopped = jointly(bench, params, tmp_path / "s", -0.3)
    assert stopped == "all limits are met within noise, or kept at price 0"
    last = steps[-1]
    assert (last.lam, *last.prices) == bench.asked[-1] and len(steps) <= 5
    (rare,) = last.measured.additional
    assert rare.mean is not None
    for price, excess in ((last.lam, last.measured.cost + 0.3), (last.prices[0], rare.mean - 0.2)):
        assert abs(excess) <= 0.004 or (price == 0 and excess < 0)
    assert not all(
        abs(e) <= 0.004 for e in (steps[0].measured.cost + 0.3, steps[0].measured.p_unsafe - 0.2)
    )


def test_p_unsafe_as_the_only_limit_moves_its_price_and_leaves_lambda_at_0(
    params: DualSearchParams, tmp_path: Path
) -> None:
    """One training and one correction take P(unsafe) from twice its noise above the limit to the
    limit.
    """
    bench = Tilts(tmp_path / "bench", 0.2, (1.5,), lam_start=0.0, reach=0.8)
    steps, stopped = jointly(bench, params, tmp_path / "s", 100.0)
    assert stopped == "all limits are met within noise, or kept at price 0"
    assert {step.lam for step in steps} == {0.0} and steps[1].prices > steps[0].prices
    assert abs(steps[-1].measured.p_unsafe - 0.2) <= 0.004 < steps[0].measured.p_unsafe - 0.2
    found = summary(
        Search(
            by_rule("newton"), params.model_copy(update={"limit": 100.0}), SearchContext(0.0, 0.0)
        ),
        steps,
        stopped,
        before=1,
    )
    assert found.chosen == len(steps) - 1 and found.feasible
    assert found.steps[-1].prices == list(steps[-1].prices) and "covariance" not in as_row(
        found.steps[-1]
    )
