"""Which policy a search returns, and what its summary says of it."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from dualign.core.records import SearchResult, as_row
from dualign.evaluation.stats import ConstraintEstimate
from dualign.methods import METHODS, Plan
from dualign.params.search import DualSearchParams, OnlineParams
from dualign.search.journal import Step
from dualign.search.policy import Search, SearchContext, corrections
from dualign.search.summary import choose, feasible, numbers, summary
from tests.search.curves import (
    BETA,
    LIMIT,
    by_rule,
    measured,
    step,
    tilted,
)
from tests.written import searched

STEPS = [
    step(0, 0.5, cost=0.1, reward=2.0),
    step(1, 1.0, cost=-0.295, reward=1.5),  # above the limit by half a standard error
    step(2, 2.0, cost=-0.6, reward=1.0),
    step(3, 1.5, cost=-0.4, reward=1.2),
]


SWINGING = [step(0, 0.6, -0.05), step(1, 1.7, -0.36), step(2, 1.2, -0.24), step(3, 1.5, -0.33)]


def test_every_reckoning_is_on_record(params: DualSearchParams) -> None:
    steps = [replace(s, tilt=tilted(0.5 * s.lam)) for s in SWINGING]
    found = summary(
        Search(by_rule("newton"), params, SearchContext(0.6, 0.6)), steps, "b", before=1
    )
    rows = [as_row(step) for step in found.steps]
    assert all(row["next"].keys() == {"newton", "tilt", "line"} for row in rows)
    assert rows[0]["next"]["line"] == pytest.approx(rows[0]["next"]["tilt"])
    assert rows[3]["next"] == asdict(corrections(steps, LIMIT, BETA))
    assert len(set(rows[3]["next"].values())) == 3
    assert rows[2]["tilt"]["lam_eff"] == pytest.approx(0.6)
    grid = summary(Search(by_rule("grid"), params, SearchContext(0.6, 0.6)), steps, "b", before=1)
    assert "next" not in as_row(grid.steps[0])


def test_the_best_keeps_the_target_else_the_limit_else_costs_least(
    params: DualSearchParams,
) -> None:
    plan = by_rule("newton", "best")
    assert (
        choose(Search(plan, params, SearchContext(0.6, 0.6, target_cost=-0.45)), STEPS) == 2
    )  # the only one below it
    assert (
        choose(Search(plan, params, SearchContext(0.6, 0.6, target_cost=-0.9)), STEPS) == 1
    )  # none: the most rewarding within the limit
    assert choose(Search(plan, params, SearchContext(0.6, 0.6, target_cost=-0.4)), STEPS) == 3
    assert choose(Search(plan, params, SearchContext(0.6, 0.6, target_cost=-0.4)), STEPS[:1]) == 0
    result = summary(
        Search(plan, params, SearchContext(0.6, 0.5, target_cost=-0.9)), STEPS, "b", before=1
    )
    assert result.chosen == 1 and result.feasible  # feasible is a matter of the limit


def test_the_best_is_the_most_rewarding_within_the_limit(params: DualSearchParams) -> None:
    assert choose(Search(by_rule("newton", "best"), params, SearchContext(0.6, 0.6)), STEPS) == 1
    assert (
        choose(
            Search(
                by_rule("newton", "best"),
                params.model_copy(update={"z": 0.0}),
                SearchContext(0.6, 0.6),
            ),
            STEPS,
        )
        == 3
    )


def test_without_a_policy_within_the_limit_the_least_costly_is_returned(
    params: DualSearchParams,
) -> None:
    strict = params.model_copy(update={"limit": -5.0})
    assert choose(Search(by_rule("newton", "best"), strict, SearchContext(0.6, 0.6)), STEPS) == 2
    assert not feasible(STEPS[2], strict)


def test_the_last_is_the_last_whatever_it_costs(params: DualSearchParams) -> None:
    assert (
        choose(Search(by_rule("one_shot", "last"), params, SearchContext(0.6, 0.6)), STEPS[:1]) == 0
    )
    assert choose(Search(by_rule("one_shot", "last"), params, SearchContext(0.6, 0.6)), STEPS) == 3


@pytest.mark.parametrize(
    ("cost", "within"), [(-0.31, True), (-0.3, True), (-0.29, True), (-0.2899, False)]
)
def test_feasible_allows_z_standard_errors(
    params: DualSearchParams, cost: float, within: bool
) -> None:
    exact = replace(STEPS[0], measured=replace(STEPS[0].measured, cost=cost, cost_se=0.01 + 1e-12))
    assert feasible(exact, params) == within


def test_summary_counts_trainings_and_tokens(params: DualSearchParams) -> None:
    result = summary(
        Search(by_rule("newton"), params, SearchContext(0.6, 0.5)), STEPS, "because", before=2
    )
    assert result.trainings == 2 + 3
    assert result.generated_tokens == 400
    assert (result.chosen, result.feasible, result.stopped) == (1, True, "because")
    assert result.steps[2].lam == 2.0 and result.steps[2].cost == -0.6
    assert "policy" not in as_row(result.steps[0])  # folders of scratch mean nothing to a reader


def test_the_slater_radius_and_its_source_are_on_record(params: DualSearchParams) -> None:
    for given, source in (("pool", "pool"), (2.0, "params")):
        chosen = params.model_copy(update={"slater_radius": given})
        result = summary(
            Search(by_rule("projected_subgradient"), chosen, SearchContext(0.6, 0.5, 2.0)),
            STEPS,
            "b",
            before=2,
        )
        assert (result.slater_radius, result.slater_from) == (2.0, source)
    assert "slater_radius" not in summary(
        Search(by_rule("grid"), params, SearchContext(0.6, 0.5)), STEPS, "b", before=2
    )


@pytest.mark.parametrize(("retrain", "count"), [(True, 2 + 2 * 3), (False, 2 + 3)])
def test_a_round_counts_its_comparisons_and_both_its_trainings(
    retrain: bool, count: int, params: DualSearchParams
) -> None:
    online = OnlineParams(
        labels="models",
        folder="f",
        retrain_reward=retrain,
        ridge=1.0,
        reward_scale=0.1,
        cost_scale=0.1,
        dimension=None,
    )
    asked = [
        replace(s, measured=replace(s.measured, comparisons=30 if s.trained else 0)) for s in STEPS
    ]
    plan = Plan("row", METHODS["o_pd_dpo"], "start", "reference")
    given = params.model_copy(update={"online": online})
    result = summary(Search(plan, given, SearchContext(0.6, 0.5, 2.0)), asked, "b", before=2)
    assert (result.comparisons, result.trainings) == (90, count)
    offline = summary(
        Search(by_rule("projected_subgradient"), params, SearchContext(0.6, 0.5, 2.0)),
        asked,
        "b",
        before=2,
    )
    assert offline.trainings == 5


def test_labels_are_counted(params: DualSearchParams) -> None:
    labelled = [
        replace(s, measured=replace(s.measured, labels=40, model_cost=0.1, model_cost_se=0.2))
        for s in STEPS
    ]
    result = summary(
        Search(by_rule("newton"), params, SearchContext(0.6, 0.5)), labelled, "b", before=1
    )
    assert result.labels == 160 and result.steps[0].model_cost == 0.1


def limited(number: int, cost: float, reward: float, mean: float | None) -> Step:
    additional = (ConstraintEstimate("rare", 0.2, 1.0, mean, 0.01),)
    return replace(
        step(number, 1.0, cost), measured=replace(measured(cost, reward), additional=additional)
    )


def test_the_best_keeps_additional_constraints_too(params: DualSearchParams) -> None:
    """Up to z standard errors; where none keeps all, the one that is nearest in them."""
    plan = by_rule("newton")
    steps = [limited(0, -0.5, 3.0, 0.3), limited(1, -0.5, 1.0, 0.209), limited(2, -0.1, 2.0, 0.1)]
    assert choose(Search(plan, params, SearchContext(0.6, 0.6)), steps) == 1
    assert [feasible(s, params) for s in steps] == [False, True, False]
    assert (
        choose(
            Search(plan, params, SearchContext(0.6, 0.6)),
            [limited(0, -0.9, 3.0, 0.3), limited(1, -0.27, 1.0, 0.24)],
        )
        == 1
    )
    assert feasible(limited(0, -0.5, 1.0, None), params), "nothing is known of it"


@pytest.mark.parametrize("naive", [True, False])
def test_a_merge_tells_whether_it_is_naive(naive: bool, params: DualSearchParams) -> None:
    """A naive merge has another KL weight, so that the predicted frontier is not about it."""
    steps = [step(0, 1.0, 0.0), step(1, 0.5, -0.3, q=0.5)]
    found = summary(
        Search(by_rule("merge"), params, SearchContext(0.6, 1.0, naive=naive)), steps, "", before=2
    )
    assert found.naive is naive
    assert "naive" not in summary(
        Search(by_rule("newton"), params, SearchContext(0.6, 1.0)), steps, "", before=2
    )


def test_metrics_of_a_step_hold_no_list() -> None:
    """They are those of the step that is returned, and what the search took."""
    counts = {"trainings": 2, "generated_tokens": 9, "labels": 0, "comparisons": 0}
    spent = {**counts, "feasible": True}
    rare = {"name": "short", "limit": 9.0, "share": 1.0, "mean": 8.5, "error": 0.2}
    steps = [{"additional": [rare], "prices": []}, {"additional": [rare], "prices": [0.1]}]
    found = SearchResult(**searched(*steps, **spent))
    metrics = numbers(found)
    assert metrics["additional"] == {"short": {"mean": 8.5, "error": 0.2, "limit": 9.0}}
    assert metrics["prices"] == {"short": 0.1}
    assert spent.items() <= metrics.items() and metrics["step"] == 1
    first = SearchResult(**searched(*steps, **spent, chosen=0))
    assert numbers(first)["prices"] == {}
