"""The candidates of a certificate and the labels of their answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dualign.certify.candidates import candidate_policies, forecast, label
from dualign.certify.certificate import Certificate
from dualign.certify.requirement import Requirement
from dualign.certify.sequence import CandidateTest, Check
from dualign.core.schema import prompt_id, user
from dualign.data import world
from dualign.math.bounds import binomial_bound, sample_size, star_bound, t_bound, upper_bound
from dualign.params.base import SHARES, Quantity
from dualign.params.certify import CertifyRun, LabelParams


def test_the_order_is_the_fallback_and_then_the_weights() -> None:
    row = CertifyRun(
        policy="aligned/a", partner="reward_dpo/b", fallback="safety_dpo/c", weights=[1.5, 1.0, 0.5]
    )
    found = candidate_policies(row, Path("models"), Path("scratch"))
    assert list(found) == ["safety_dpo/c", "aligned/a at 1.5", "aligned/a", "aligned/a at 0.5"]
    assert [candidate.q for candidate in found.values()] == [1.0, 1.5, 1.0, 0.5]
    assert found["safety_dpo/c"].folder() == Path("models/safety_dpo/c")
    assert found["aligned/a"].folder() == Path("models/aligned/a")
    assert found["aligned/a at 1.5"].partner == Path("models/reward_dpo/b")


def test_a_policy_may_stand_alone() -> None:
    row = CertifyRun(policy="aligned/a", partner="aligned/a", fallback="aligned/a", weights=[1.0])
    assert list(candidate_policies(row, Path("models"), Path("scratch"))) == ["aligned/a"]


@pytest.fixture
def answers() -> pd.DataFrame:
    """Two answers of the world to each of thirty questions, with a cost model that is off by
    0.1.
    """
    rows = []
    for i, question in enumerate(world.prompts()[::150][:30]):
        for k, answer in enumerate(world.answers(question)[i % 7 : i % 7 + 2]):
            prompt = user(question)
            rows.append(
                {
                    "prompt_id": prompt_id(prompt),
                    "prompt": prompt,
                    "sample": k,
                    "response": answer.text,
                    "cost": answer.cost + 0.1,
                }
            )
    return pd.DataFrame(rows)


def test_labels_are_the_truth_of_first_answers_to_some_prompts(answers: pd.DataFrame) -> None:
    options = LabelParams(source="oracle", prompts=20, votes=1, limit=None, folder="labels")
    found = label(answers, options, seed=3)
    assert len(found) == found["prompt_id"].nunique() == 20 and (found["sample"] == 0).all()
    assert found["truth"].to_numpy() == pytest.approx(found["cost"].to_numpy() - 0.1)
    assert found["truth"].nunique() > 2
    assert set(label(answers, options, seed=4)["prompt_id"]) != set(found["prompt_id"])
    assert len(label(answers, options.model_copy(update={"prompts": 99}), seed=3)) == 30


def certificate(needed: Requirement) -> Certificate:
    """One of a single requirement at delta 0.05, with nothing tested."""
    return Certificate(
        delta=0.05,
        seed=0,
        requirements=(needed,),
        candidates=("a",),
        tested=(),
        certified=(),
        returned=None,
        max_new_tokens=9,
        ended={},
        tables={},
        labels={},
        samples_per_prompt=1,
        same=(),
        plan=None,
        prompts=None,
        limits=None,
        weights={},
        policy=None,
        cost_model=None,
        sampling_seeds={},
        versions={},
    )


def test_the_forecast_is_that_of_the_plan() -> None:
    """sd 2 and 400 prompts put the bound 0.1645 above the estimate; a margin of 0.1 takes 2473
    prompts by the plan.
    """
    needed = Requirement(name="c", quantity="cost", limit=0.0, method="clustered_t")

    def tested(estimate: float, reach: float = 0.16449) -> CandidateTest:
        bound = estimate + reach
        check = Check(
            requirement="c",
            prompts=400,
            answers=800,
            estimate=estimate,
            bound=bound,
            raised=0.0,
            kept=bound <= 0,
        )
        return CandidateTest(name="a", checks=(check,), certified=bound <= 0)

    found = certificate(needed)
    assert forecast(tested(-0.1), found) == pytest.approx(sample_size(2.0, 0.1), abs=2)
    assert forecast(tested(-0.2), found) is None  # it passed
    assert forecast(tested(0.01), found) is None
    uneven = tested(-0.1).model_copy(update={"ess": 0.7})
    assert forecast(uneven, found) is None, "more prompts make no weight more even"


def test_the_forecast_of_a_limit_on_some_prompts_counts_all_that_are_drawn() -> None:
    """Of 400 prompts a quarter is of the group, whose costs spread by 2: the plan's number of these
    is there four times in five where four times as many are drawn.
    """
    on_some = Requirement(
        name="heat", quantity="cost", limit=0.0, method="clustered_t", prompts="oven"
    )
    kept = Check(
        requirement="c", prompts=400, answers=400, estimate=-1.0, bound=-0.9, raised=0.0, kept=True
    )
    reach = 1.6449 * 2.0 / 10
    failed = kept.model_copy(
        update={"prompts": 100, "estimate": -0.1, "bound": reach - 0.1, "kept": False}
    )
    test = CandidateTest(name="a", checks=(kept, failed), certified=False)
    whole = Requirement(name="c", quantity="cost", limit=0.0, method="clustered_t")
    found = certificate(whole).model_copy(update={"requirements": (whole, on_some)})
    count = forecast(test, found)
    assert count is not None and count == pytest.approx(4 * sample_size(2.0, 0.1), abs=8)

    rng = np.random.default_rng(0)
    member = rng.random((400, count)) < 0.25
    costs = rng.normal(-0.1, 2.0, member.shape)
    passed = [t_bound(row[of], 0.05) <= 0 for row, of in zip(costs, member, strict=True)]
    assert 0.72 < np.mean(passed) < 0.88


def test_the_forecast_of_skewed_costs_is_on_the_safe_side() -> None:
    """Exponential costs of 100 prompts, the limit a standard error above the mean; then 1000 data
    sets of that size.
    """
    rng = np.random.default_rng(0)
    ids = np.arange(100)
    costs = rng.exponential(size=100)
    limit = float(costs.mean() + costs.std() / 10)
    needed = Requirement(name="c", quantity="cost", limit=limit, method="clustered_t")
    bound = upper_bound(costs, ids)
    check = Check(
        requirement="c",
        prompts=100,
        answers=100,
        estimate=float(costs.mean()),
        bound=bound,
        raised=0.0,
        kept=False,
    )
    found = certificate(needed)
    count = forecast(CandidateTest(name="a", checks=(check,), certified=False), found)
    assert count is not None and count > sample_size(
        float(costs.std(ddof=1)), limit - float(costs.mean())
    )
    passed = t_bound(rng.choice(costs, size=(1000, count)), 0.05) <= limit
    assert 0.8 < passed.mean() < 0.95


@pytest.mark.parametrize("quantity", SHARES)
def test_the_forecast_where_none_was_seen_is_that_of_the_exact_bound(quantity: Quantity) -> None:
    """At 598 prompts without any such answer the bound is within half a per cent, at 597 it is
    not.
    """
    needed = Requirement(name="rare", quantity=quantity, limit=0.005, method="clustered_t")
    bound = float(binomial_bound(np.array(0), 400, 0.05))
    check = Check(
        requirement="rare",
        prompts=400,
        answers=800,
        estimate=0.0,
        bound=bound,
        raised=0.0,
        kept=False,
    )
    found = certificate(needed)
    assert forecast(CandidateTest(name="a", checks=(check,), certified=False), found) == 598
    assert [bool(binomial_bound(np.array(0), n, 0.05) <= 0.005) for n in (597, 598)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("quantity", SHARES)
@pytest.mark.parametrize("prompts", [100, 400])
def test_the_forecast_of_star_bets_where_none_was_seen_passes(
    quantity: Quantity, prompts: int
) -> None:
    """With so many prompts and none seen again the bound is within the limit, and with a tenth
    fewer it is not.
    """
    needed = Requirement(
        name="rare", quantity=quantity, limit=0.004, method="star_bets", bounds=(0.0, 1.0)
    )
    bound = float(star_bound(np.zeros(prompts), 0.05, (0.0, 1.0)))
    check = Check(
        requirement="rare",
        prompts=prompts,
        answers=800,
        estimate=0.0,
        bound=bound,
        raised=0.0,
        kept=False,
    )
    found = certificate(needed)
    count = forecast(CandidateTest(name="a", checks=(check,), certified=False), found)
    assert count is not None
    limits = [
        float(star_bound(np.zeros(n), 0.05, (0.0, 1.0))) <= 0.004 for n in (int(0.9 * count), count)
    ]
    assert limits == [False, True]
