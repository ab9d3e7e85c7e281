"""The model card says what the policy is, what its cost was measured by, and how it loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dualign.evaluation.stats import Measurement
from dualign.lm.card import model_card
from dualign.methods import METHODS, Plan
from dualign.params.loading import load
from dualign.params.search import DualSearchParams
from dualign.search.journal import Step
from dualign.search.policy import Search, SearchContext
from dualign.search.summary import summary

PARAMS = load(DualSearchParams, Path(__file__).resolve().parents[2] / "params.yaml").model_copy(
    update={"limit": -0.3}
)
STEP = Step(0, 0.75, None, "folder", False, Measurement(-0.5, 0.02, 1.5, 0.03, 0.4, 0.1, 0.5, 1000))


def card(plan: Plan, *steps: Step) -> str:
    search = Search(plan, PARAMS, SearchContext(0.6, 0.75, 2.0))
    result = summary(search, steps, "because", before=2)
    return model_card(plan, result, PARAMS)


def test_a_model_loads_by_itself() -> None:
    text = card(Plan("sacpo", METHODS["sacpo"], "safety_dpo/one", "reward_dpo/helpful"), STEP)
    assert "# SACPO\n" in text and "2404.11049" in text and "| multiplier lambda | 0.7500 |" in text
    assert "| cost | -0.5000 (standard error 0.0200), feasible: no limit is" in text
    assert "Load with `AutoModelForCausalLM.from_pretrained`" in text and "mixture" not in text


def test_a_mixture_says_how_it_is_loaded() -> None:
    plan = Plan(
        "pd_dpo_mixture",
        replace(METHODS["pd_dpo"], returns="mixture"),
        "safety_dpo/one",
        "reward_dpo/helpful",
    )
    text = card(plan, STEP, replace(STEP, step=1, closing=True))
    assert "# PD-DPO (pd_dpo_mixture)\n" in text
    assert (
        "mixture.json" in text
        and "policy_at" in text
        and "mean multiplier of the components | 0.7500" in text
    )


def test_both_estimates_of_a_cost_by_labels_are_shown() -> None:
    measured = replace(STEP.measured, cost=-0.2, labels=60, model_cost=-0.5, model_cost_se=0.02)
    text = card(
        Plan("x", METHODS["pd_dpo"], "safety_dpo/one", "reward_dpo/helpful"),
        replace(STEP, measured=measured),
    )
    assert "| cost by 60 safety labels | -0.2000 (standard error 0.0200), NOT feasible: a" in text
    assert "| cost by the cost model | -0.5000 (standard error 0.0200) |" in text
