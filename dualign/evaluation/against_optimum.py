"""Estimates on answers with prompt-clustered intervals, and in the world the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dualign.core.records import FrontierRow
from dualign.core.schema import last_user_text
from dualign.data import world
from dualign.evaluation.stats import clustered_mean, clustered_share
from dualign.math import tabular

#: What the world's oracle says of an answer; null elsewhere.
_TRUTH = ("true_reward", "true_cost", "grammatical")
#: What is a share of the answers.
_SHARES = ("p_unsafe", "ended", "grammatical")


def add_truth(answers: pd.DataFrame) -> pd.DataFrame:
    """The oracle's true_reward, true_cost and grammatical for answers in the world."""
    scored = [
        world.score(last_user_text(p), text)
        for p, text in zip(answers["prompt"], answers["response"], strict=True)
    ]
    return answers.assign(**pd.DataFrame(scored, answers.index, _TRUTH))


def means(answers: pd.DataFrame, confidence: float = 0.95) -> dict[str, dict[str, float]]:
    """Means with prompt-clustered intervals of scores, KL, length and any known truth.

    A column `weight` holds importance weights w of mean 1: a value v counts as m + w (v - m), m =
    sum w v / sum w.
    """
    prompts = answers["prompt_id"].to_numpy()
    columns: dict[str, Any] = {
        "reward": answers["reward"],
        "cost": answers["cost"],
        "p_unsafe": answers["cost"] > 0,
        "kl": answers["logp"] - answers["logp_ref"],
        "length": answers["length"],
        "ended": answers["ended"],
    }
    true = [name for name in _TRUTH if name in answers and answers[name].notna().all()]
    columns |= {name: answers[name] for name in true}
    weight = answers["weight"].to_numpy(float) if "weight" in answers else None
    found = {}
    for name, column in columns.items():
        mean = clustered_share if name in _SHARES else clustered_mean
        values = _weighted(column.to_numpy(float), weight)
        found[name] = mean(values, prompts, confidence).as_dict()
    return found


def _weighted(values: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    if weight is None:
        return values
    mean = float(np.average(values, weights=weight))
    return mean + weight * (values - mean)


def finite_problem(enumerated: pd.DataFrame, beta: float) -> tabular.Problem:
    """The exact problem from enumerated answers (prompt_id, logp_ref, reward, cost)."""
    count = int(enumerated.groupby("prompt_id", sort=False).size().iloc[0])
    logp, reward, cost = (
        enumerated[name].to_numpy(float).reshape(-1, count)
        for name in ("logp_ref", "reward", "cost")
    )
    return tabular.problem(
        logp, reward, cost, rest=(world.UNGRAMMATICAL_REWARD, world.UNGRAMMATICAL_COST), beta=beta
    )


def ends(
    problem: tabular.Problem, limit: float
) -> tuple[float, dict[str, float], dict[str, float]]:
    """lambda*, what the exact optimum is worth, and what the policy nearest to the reference that
    keeps the limit is: the end and the beginning of the way.
    """
    lam = tabular.solve(problem, limit)
    tables = problem.policy(lam), tabular.nearest(problem, limit)
    best, nearest = map(problem.describe, tables)
    return lam, best, nearest


def against_optimum(
    summary: dict[str, Any], problem: tabular.Problem, limit: float
) -> dict[str, Any]:
    """How far a policy is from the exact constrained optimum.

    `reward_share` is the way in true reward to the optimum (1 = there) from the policy nearest to
    the reference that keeps the limit, which is the reference itself where that keeps it; None if
    both agree. `value_gap` is J* - J with J = E[r*] - beta KL, the KL measured on the generated
    answers."""
    lam, best, nearest = ends(problem, limit)
    reference = problem.describe(problem.log_reference)
    reward = summary["true_reward"]["mean"]
    way = best["reward"] - nearest["reward"]
    return {
        "optimum": {
            "lam": lam,
            **best,
            **{f"reference_{name}": reference[name] for name in ("reward", "cost", "value")},
            **{f"nearest_{name}": nearest[name] for name in ("reward", "cost", "value")},
        },
        "reward_share": (reward - nearest["reward"]) / way if abs(way) > 1e-9 else None,
        "value_gap": best["value"] - (reward - problem.beta * summary["kl"]["mean"]),
    }


def with_other_text(logp: np.ndarray) -> np.ndarray:
    """Log-probabilities [prompts, answers] with that of all other text as one more column.

    >>> np.exp(with_other_text(np.log([[0.5, 0.3]]))).round(6)
    array([[0.5, 0.3, 0.2]])
    """
    other = np.log(np.clip(1.0 - np.exp(logp).sum(1), np.finfo(float).tiny, None))
    return np.hstack([logp, other[:, None]])


def worth(problem: tabular.Problem, logp: np.ndarray, answers: pd.DataFrame) -> dict[str, float]:
    """E[r*], E[c*], KL, J and the grammatical share of a policy, summed over grammatical answers.

    `logp` is the policy's log-probability of each, [prompts, grammatical answers] in the problem's
    order. All other text shares r* and c*, so by the chain rule of KL only the log-ratios within it
    have to be drawn: from `answers`, schema ANSWERS with the truth. What is left of the noise of a
    rollout is that of its few ungrammatical answers."""
    policy = with_other_text(logp)
    other = policy[:, -1]
    lumped = float((np.exp(other) * (other - problem.log_reference[:, -1])).mean())
    drawn = answers[~answers["grammatical"].astype(bool)]
    within = float((drawn["logp"] - drawn["logp_ref"]).sum()) / len(answers) - lumped
    known = problem.describe(policy)
    kl = known["kl"] + within
    return {
        **known,
        "kl": kl,
        "value": known["reward"] - problem.beta * kl,
        "grammatical": 1.0 - float(np.exp(other).mean()),
    }


def exact_frontier(problem: tabular.Problem, lam: float) -> list[FrontierRow]:
    """Reward, cost and KL of the exact optima at `lam` and others, from 0 to thrice that."""
    grid = sorted({0.0, lam, *np.linspace(0, max(3 * lam, 1.0), 25).tolist()})
    optima = [problem.describe(problem.policy(point)) for point in grid]
    return [
        FrontierRow(lam=point, reward=own["reward"], cost=own["cost"], kl=own["kl"])
        for point, own in zip(grid, optima, strict=True)
    ]


def enumerate_answers(prompts: pd.DataFrame) -> pd.DataFrame:
    """All grammatical answers of the world: prompt_id, prompt, response, true reward, cost."""
    rows = [
        {
            "prompt_id": row.prompt_id,
            "prompt": row.prompt,
            "response": a.text,
            "reward": a.reward,
            "cost": a.cost,
        }
        for row in prompts.itertuples()
        for a in world.answers(last_user_text(row.prompt))
    ]
    return pd.DataFrame(rows)
