"""Predictions between the rows of a frontier and at other KL weights, tilts in words, additional
limits.
"""

from __future__ import annotations

from typing import Any

import pytest

from dualign.core.records import (
    Betas,
    CandidateTest,
    CheckRow,
    ComparedPolicy,
    FrontierRow,
    Interval,
    PriceRow,
    RequirementRow,
    SearchStep,
    SolvedDual,
    TiltRow,
    as_row,
)
from dualign.report.diagnosis import (
    additional_by_step,
    additional_constraints,
    cut_in_words,
    is_tilt,
    other_betas,
    predicted,
    prompts_gain,
    required_in_words,
    tilt_in_words,
)
from tests.written import solved

ROWS = [
    FrontierRow(
        lam=lam,
        cost=cost[1],
        cost_low=cost[0],
        cost_high=cost[2],
        reward=reward[1],
        reward_low=reward[0],
        reward_high=reward[2],
    )
    for lam, cost, reward in [
        (2.0, (-1.4, -1.0, -0.8), (-0.2, 0.0, 0.2)),
        (0.0, (0.6, 1.0, 1.2), (1.0, 2.0, 3.0)),
        (1.0, (-0.2, 0.0, 0.2), (0.8, 1.0, 1.2)),
    ]
]
TILT = {
    "reward_slope": 0.625,
    "cost_slope": -0.7375,
    "length_slope": 0.02,
    "length_slope_se": 0.002,
    "beta_eff": 1.6,
    "beta_eff_se": 0.02,
    "lam_eff": 1.18,
    "lam_eff_se": 0.05,
    "r2": 0.91,
}


def test_predictions_are_linear_between_the_two_nearest_rows() -> None:
    found = predicted(ROWS, 1.25)
    assert found is not None
    assert as_row(found.cost) == pytest.approx({"mean": -0.25, "low": -0.5, "high": -0.05})
    assert as_row(found.reward) == pytest.approx({"mean": 0.75, "low": 0.55, "high": 0.95})
    at_a_row = predicted(ROWS, 2.0)
    assert at_a_row is not None and at_a_row.cost.mean == -1.0 and at_a_row.reward.high == 0.2


@pytest.mark.parametrize(("rows", "lam"), [([], 1.0), (ROWS, None), (ROWS, -0.1), (ROWS, 2.1)])
def test_nothing_is_predicted_beyond_the_rows(rows: list[FrontierRow], lam: float | None) -> None:
    assert predicted(rows, lam) is None


def test_a_frontier_without_bands_predicts_without_one() -> None:
    bare = [FrontierRow(lam=row.lam, cost=row.cost, reward=row.reward) for row in ROWS]
    found = predicted(bare, 0.5)
    assert found is not None and found.cost == Interval(mean=0.5, low=None, high=None)


def test_other_betas_mark_the_one_in_use_guesses_and_what_is_out_of_reach() -> None:
    means = {
        "lam": 0.7,
        "reward": 1.0,
        "kl": 2.0,
        "p_unsafe": 0.1,
        "p_unsafe_low": 0.05,
        "p_unsafe_high": 0.2,
    }
    out = {"beta": 3.0, "lam": None, "infeasible": "too far"}
    rows = [{"beta": 0.5, "ess": 3.9, **means}, {"beta": 1.5, "ess": 4.0, **means}, out]
    few, own, far = other_betas(Betas(rows=rows, beta=1.5, min_ess=4.0))
    assert [(row["in_use"], row["guess"]) for row in (few, own, far)] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    assert few["p_unsafe"] == {"mean": 0.1, "low": 0.05, "high": 0.2}
    assert own["lam"] == {"mean": 0.7, "low": None, "high": None} and own["infeasible"] == ""
    assert (far["beta"], far["lam"], far["infeasible"]) == (3.0, None, "too far")
    assert other_betas(Betas(rows=[], beta=1.5, min_ess=4.0)) == []


@pytest.mark.parametrize(
    ("lam", "changes", "words"),
    [
        (
            1.32,
            {},
            "At a nominal λ of 1.32 it has an effective λ of 1.18 ± 0.05 at β 1.60, and 0.02 nats a"
            " token of length. 91% of it is such",
        ),
        (None, {"lam_eff_se": None}, "It has an effective λ of 1.18 at β 1.60"),
        (
            1.32,
            {"r2": 0.31},
            "At a nominal λ of 1.32 it became no tilt: reward, cost and length explain only 31% of"
            " it.",
        ),
        (
            1.32,
            {"lam_eff": None, "beta_eff": None},
            "not tilt towards reward. Reward, cost and length explain 91%",
        ),
        (
            1.32,
            {"r2": None, "lam_eff": None},
            "At a nominal λ of 1.32 it stayed the reference policy.",
        ),
    ],
)
def test_a_tilt_in_words(lam: float | None, changes: dict[str, Any], words: str) -> None:
    assert words in tilt_in_words(lam, TiltRow(**TILT | changes))


def test_no_words_for_a_tilt_that_was_not_read() -> None:
    assert tilt_in_words(1.0, None) == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"r2": 0.5}, True),
        ({"r2": 0.49}, False),
        ({"r2": None}, False),
        ({"lam_eff": None}, False),
    ],
)
def test_what_counts_as_a_tilt(changes: dict[str, Any], expected: bool) -> None:
    assert is_tilt(TiltRow(**TILT | changes)) is expected


def price(name: str, quantity: str, **more: Any) -> PriceRow:
    known = {"level": None, "prompts": None, "threshold": None} | more
    return PriceRow(name=name, quantity=quantity, limit=1.0, lam=0.2, predicted=0.9, **known)


def policy(**known: Any) -> ComparedPolicy:
    """A policy of which no more is known."""
    row = dict.fromkeys(ComparedPolicy.model_fields)
    row |= {"folder": "sft", "kind": "reference", "certified": False, "prompts": 1, "answers": 1}
    row |= {
        "max_new_tokens": 1024,
        "additional": {},
        "on_curve": False,
        "tilts": False,
        "priced": False,
    }
    return ComparedPolicy(**row | known)


def test_additional_constraints_say_what_they_are_on_and_for() -> None:
    prices = [
        price("worst", "cvar", level=0.9),
        price("short", "length"),
        price("rare", "p_unsafe", prompts="poison"),
        price("whole", "unended"),
    ]
    found = additional_constraints(prices, [])
    assert [(limit.name, limit.what) for limit in found] == [
        ("worst", "mean cost of the worst 10%"),
        ("short", "tokens"),
        ("rare", "P(unsafe), prompts with poison"),
        ("whole", "answers cut"),
    ]
    assert [limit.share for limit in found] == [False, False, True, True]
    assert found[0].lam == 0.2 and found[0].predicted == 0.9


def test_limits_without_a_price_come_from_the_policies() -> None:
    known = {"mean": 3.0, "low": None, "high": None, "standing": "within"}
    additional = {"short": known | {"limit": 4.0}, "late": known | {"limit": 2.0}}
    rows = [policy(), policy(additional=additional)]
    found = additional_constraints([price("short", "length")], rows)
    assert [(limit.name, limit.limit) for limit in found] == [("short", 1.0), ("late", 2.0)]
    assert found[1].lam is found[1].predicted is None
    assert additional_constraints([], [policy()]) == []


# --- answers that were cut ------------------------------------------------------------------------


def test_policies_of_which_more_than_a_fifth_was_cut_are_warned_of_in_one_line() -> None:
    def ended(mean: float, tokens: int = 1024) -> ComparedPolicy:
        interval = Interval(mean=mean, low=None, high=None)
        return policy(ended=interval, max_new_tokens=tokens)

    found = {"sft": ended(0.65), "whole": ended(0.81), "sacpo": ended(0.25)}
    assert (
        cut_in_words(found)
        == "Answers were cut at 1,024 tokens, and their scores are those of unfinished text: 35% of"
        " sft, 75% of sacpo; raise generation.max_new_tokens."
    )
    assert "cut at 64 or 1,024 tokens" in cut_in_words(found | {"sacpo": ended(0.25, 64)})
    assert cut_in_words({"whole": ended(0.81), "sft": policy()}) == cut_in_words({}) == ""


# --- requirements of a certificate ----------------------------------------------------------------


def required(
    quantity: str, name: str, limit: float, method: str = "clustered_t", **more: Any
) -> RequirementRow:
    return RequirementRow(name=name, quantity=quantity, limit=limit, method=method, **more)


def outcome(*checks: CheckRow) -> CandidateTest:
    known = Interval(mean=0.9, low=None, high=None)
    return CandidateTest(
        candidate="it", certified=False, checks=list(checks), policy="it", partner="it", q=1.0,
        reward=known, ended=known, prompts_needed=None,
    )  # fmt: skip


def check(estimate: float, bound: float, prompts: int = 400) -> CheckRow:
    return CheckRow(estimate=estimate, bound=bound, prompts=prompts, kept=False)


@pytest.mark.parametrize(
    ("given", "what", "share"),
    [
        (required("cost", "c", 0.0), "expected cost", False),
        (
            required("p_unsafe", "rare", 0.1, prompts="child"),
            "share of unsafe answers on prompts with child",
            True,
        ),
        (required("unended", "whole", 0.1), "share of answers that do not end", True),
        (
            required("cvar", "tail", 1.0, level=0.95),
            "mean cost of the worst 5% of answers",
            False,
        ),
        (required("truth", "true c", 0.0), "true cost", False),
        (required("harm", "called unsafe", 0.1), "share of answers that people call unsafe", True),
        (
            required("cost", "c", 0.1, "clopper_pearson"),
            "share of prompts with an unsafe answer",
            True,
        ),
    ],
)
def test_a_requirement_in_words(given: RequirementRow, what: str, share: bool) -> None:
    found = required_in_words(given)
    assert (found.required, found.what, found.share) == (given, what, share)


DUAL = SolvedDual(**solved(lam=2.0, prices=[{"name": "rare", "quantity": "p_unsafe", "lam": 5.0}]))


def test_more_prompts_help_the_bound_that_is_nearest_to_its_limit() -> None:
    """By hand: reach 0.04 at 400 prompts; one more takes 0.04 / 800 off it, twice as many 1 - 1 /
    sqrt(2) of it.
    """
    limits = [required("cost", "c", 1.0), required("p_unsafe", "rare", 0.1)]
    found = prompts_gain(outcome(check(-0.3, -0.2), check(0.05, 0.09)), limits, DUAL)
    assert found is not None and found.promise.what == "share of unsafe answers"
    assert found.one == pytest.approx(0.00005) and found.twice == pytest.approx(
        0.04 * (1 - 0.5**0.5)
    )
    assert found.worth == pytest.approx(5.0 * found.twice)
    exact = (
        0.04 - 0.04 * (400 / 401) ** 0.5
    )  # what the law of 1 / sqrt(N) takes off with one prompt more
    assert found.one == pytest.approx(exact, rel=0.01)
    failed = prompts_gain(outcome(check(0.9, 1.01), check(0.05, 0.09)), limits, DUAL)
    assert (
        failed is not None
        and failed.promise.what == "expected cost"
        and failed.worth == pytest.approx(2.0 * 0.11 * (1 - 0.5**0.5))
    )


def test_a_gain_on_some_prompts_is_worth_their_share_and_one_on_votes_is_not_priced() -> None:
    on_some = [required("cost", "c", 1.0), required("p_unsafe", "rare", 0.1, prompts="child")]
    found = prompts_gain(outcome(check(-0.3, -0.2), check(0.05, 0.09, prompts=100)), on_some, DUAL)
    assert found is not None and found.worth == pytest.approx(5.0 * 0.25 * found.twice)
    one_of_all = 0.04 - 0.04 * (100 / 100.25) ** 0.5  # of one more prompt a quarter is of these
    assert found.one == pytest.approx(one_of_all, rel=0.01)
    people = [required("cost", "c", 1.0), required("harm", "called unsafe", 0.1)]
    voted = prompts_gain(outcome(check(-0.3, -0.2), check(0.05, 0.09)), people, DUAL)
    assert voted is not None and voted.worth is None and voted.labelled
    truth = [required("cost", "c", 1.0), required("truth", "true c", 0.1)]
    true = prompts_gain(outcome(check(-0.3, -0.2), check(0.05, 0.09)), truth, DUAL)
    assert true is not None and true.worth == pytest.approx(2.0 * true.twice)


def test_a_bound_without_reach_gains_nothing() -> None:
    assert prompts_gain(outcome(check(0.5, 0.5)), [required("cost", "c", 1.0)], DUAL) is None


def test_additional_constraints_by_step() -> None:
    def step(prices: list[float], *means: float | None) -> SearchStep:
        known = [
            {"name": "rare", "limit": 0.1, "share": 1.0, "mean": m, "error": 0.01} for m in means
        ]
        row = dict.fromkeys(("q", "cost", "cost_se", "reward", "kl", "tilt"))
        return SearchStep(step=0, lam=0.5, prices=prices, additional=known, **row)

    (rare,) = additional_by_step([step([5.4], 0.16), step([6.2], 0.1)])
    assert (rare.means, rare.prices, rare.last.limit) == ([0.16, 0.1], [5.4, 6.2], 0.1)
    assert additional_by_step([step([], 0.16), step([], 0.1)])[0].prices == []
    assert additional_by_step([step([]), step([])]) == additional_by_step([]) == []
    assert additional_by_step([step([], None)]) == []
