"""What a search returns, and its summary: the chosen policy, the steps, what they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dualign.core.records import SearchResult, as_row
from dualign.params.search import DualSearchParams
from dualign.search.journal import Step
from dualign.search.loop import out_of_tokens
from dualign.search.policy import Search, corrections


def choose(search: Search, steps: Sequence[Step], stopped: str = "") -> int:
    """The index of the policy that the method returns.

    `best`: the most rewarding of those that keep additional constraints and whose cost is not above
    the target, all up to z standard errors, else of those as near to the limit. If there is none:
    the one whose largest excess over a limit is least, in standard errors, and without additional
    constraints the least costly. Otherwise the last one: of the search, or the one that closed it.
    A search that ran out of tokens before that returns its best so far."""
    params = search.params
    if search.plan.method.returns != "best" and stopped != out_of_tokens(params):
        return len(steps) - 1
    for bound in (search.target, params.limit):
        allowed = [i for i, step in enumerate(steps) if _keeps(step, bound, params.z)]
        if allowed:
            return max(allowed, key=lambda i: steps[i].measured.reward)
    return min(range(len(steps)), key=lambda i: _excess(steps[i], params.limit))


def feasible(step: Step, params: DualSearchParams) -> bool:
    """Whether all limits are kept by the means that are known, up to z standard errors."""
    return _keeps(step, params.limit, params.z)


def _keeps(step: Step, bound: float, z: float) -> bool:
    return all(mean <= limit + z * error for mean, limit, error in _against(step, bound))


def _excess(step: Step, limit: float) -> float:
    """The largest excess over a limit in standard errors; without more constraints the cost."""
    if not step.measured.additional:
        return step.cost
    return max((mean - bound) / max(error, 1e-12) for mean, bound, error in _against(step, limit))


def _against(step: Step, bound: float) -> list[tuple[float, float, float]]:
    """(mean, limit, standard error) of the cost, limited by `bound`, and of known constraints."""
    m = step.measured
    additional = [(k.mean, k.limit, k.error or 0.0) for k in m.additional if k.mean is not None]
    return [(step.cost, bound, step.cost_se), *additional]


def summary(search: Search, steps: Sequence[Step], stopped: str, before: int) -> SearchResult:
    """`reports/search/NAME.json`; `before` counts the trainings that made its start."""
    method = search.plan.method
    params = search.params
    chosen = choose(search, steps, stopped)
    retrains = params.online is not None and params.online.retrain_reward  # pi_r beside the policy
    found: dict[str, Any] = {
        "name": search.plan.name,
        "method": method.name,
        "title": method.title,
        "rule": method.rule,
        "returns": method.returns,
        "cost_source": method.cost,
        "target": search.target,
        "steps": [_row(search, steps[: i + 1]) for i in range(len(steps))],
        "screened": [
            {"q": seen.q, **asdict(seen.pool)} for step in steps for seen in step.screened
        ],
        "chosen": chosen,
        "feasible": feasible(steps[chosen], params),
        "trainings": before + (2 if retrains else 1) * sum(step.trained for step in steps),
        "generated_tokens": sum(step.measured.generated_tokens for step in steps),
        "labels": sum(step.measured.labels for step in steps),
        "comparisons": sum(step.measured.comparisons for step in steps),
        "stopped": stopped,
        "priced": search.context.priced,
    }
    if method.rule == "ascent":
        found["history"] = steps[-1].history
    if method.rule == "merge":
        found["naive"] = search.context.naive
    if method.rule == "projected_subgradient":
        found["slater_radius"] = search.context.radius
        found["slater_from"] = "pool" if params.slater_radius == "pool" else "params"
    return SearchResult.model_validate(found)


def _row(search: Search, steps: Sequence[Step]) -> dict[str, Any]:
    """The last of these steps in a summary; by Newton's rule with what each estimate says next."""
    step = steps[-1]
    row = {
        **asdict(step.measured),
        "step": step.step,
        "lam": step.lam,
        "q": step.q,
        "trained": step.trained,
        "closing": step.closing,
        "tilt": asdict(step.tilt) if step.tilt else None,
        "prices": list(step.prices),
        "blend": asdict(step.blend) if step.blend else None,
        "pool": asdict(step.pool) if step.pool else None,
        "combined_cost": step.cost,
        "combined_cost_se": step.cost_se,
    }
    del row["covariance"]
    if search.plan.method.rule == "newton" and not step.closing:
        row["next"] = asdict(corrections(steps, search.target, search.params.beta))
    return row


def numbers(result: SearchResult) -> dict[str, Any]:
    """The returned step and what the search took, without lists: constraints and prices by name."""
    step = result.steps[result.chosen]
    additional = {
        known.name: {"mean": known.mean, "error": known.error, "limit": known.limit}
        for known in step.additional or ()
    }
    prices = dict(zip(additional, step.prices, strict=False))  # only some searches have any
    spent = {"feasible", "trainings", "generated_tokens", "labels", "comparisons"}
    return {
        **as_row(step),
        "additional": additional,
        "prices": prices,
        **result.model_dump(include=spent),
    }
