"""The search for the multiplier: the rules of all methods as pure functions, and one loop that runs any of them.

A rule looks at the steps so far (multiplier, measured cost with its standard error, within-prompt variance) and says
which multiplier, or which merge weight q, to try next, or None to stop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError
from dualign.core.params import DualSearchParams
from dualign.measure.stats import Measurement
from dualign.methods import ITERATIVE, Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One policy of a search: its multiplier (for a merge the one it stands for), folder and measurement.

    `closing` marks the policy made after the search from all its steps: their mixture (its multiplier is their mean),
    or the one trained at the tail average. `course` is that of an ascent; see `Ascent`.
    """

    step: int
    lam: float
    q: float | None
    policy: str
    trained: bool
    measured: Measurement
    closing: bool = False
    course: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Ascent:
    """A policy whose training moved lambda itself: its folder, the last lambda, and its course.

    The course has a row for each stretch of the training: its last `step`, and the means of `lam`, `cost`, `reward` and
    `kl` (nats an answer) over it.
    """

    policy: str
    lam: float
    course: list[dict[str, float]]


class Workbench(Protocol):
    """What a search needs done: training at a multiplier, merging, mixing, measuring. Folders are given as strings."""

    def train(self, step: int, lam: float, warm: Step) -> str:
        """Train a policy at `lam`; return its folder."""
        ...

    def ascend(self, step: int) -> Ascent:
        """Train a policy and lambda by turns, from the start."""
        ...

    def merge(self, step: int, q: float) -> str:
        """Merge pi_r and the start at weight q; return the folder."""
        ...

    def mix(self, step: int, steps: Sequence[Step]) -> str:
        """Make the mixture of all steps' policies, in equal parts; return the folder."""
        ...

    def measure(self, step: int, policy: str) -> Measurement:
        """Sample the policy on the search prompts and score the answers."""
        ...


# --- rules ------------------------------------------------------------------------------------------------------------


def dual_gradient_step(lam: float, cost: float, limit: float, step_size: float) -> float:
    """lambda <- [lambda + eta (C - d)]_+, C-DPO (2403.02475)."""
    return max(0.0, lam + step_size * (cost - limit))


def projected_subgradient_step(
    lam: float, cost: float, limit: float, step_size: float, radius: float, lambda_min: float
) -> float:
    """lambda <- Proj_[lambda_min, 2 rho](lambda + eta (C - d)), PD-DPO (2510.05703, alg. 1).

    The paper's interval starts at 0, where its loss divides by zero; lambda_min > 0 keeps off it.
    """
    return max(min(lam + step_size * (cost - limit), 2 * radius), lambda_min)


def newton_step(lam: float, cost: float, variance: float, limit: float, beta: float) -> float:
    """lambda <- [lambda + beta (C - d) / E_x Var(c|x)]_+ with the curvature of the on-policy samples."""
    return max(0.0, lam + beta * (cost - limit) / variance)


def secant_step(previous: tuple[float, float], last: tuple[float, float], limit: float) -> float | None:
    """The root of the line through two points (x, C); None where the line does not fall."""
    (x0, c0), (x1, c1) = previous, last
    if x0 == x1 or (c1 - c0) / (x1 - x0) >= 0:
        return None
    return max(0.0, x1 + (limit - c1) * (x1 - x0) / (c1 - c0))


def first_weight(lam_pool: float, lam_start: float, naive: bool) -> float:
    """The merge weight q whose multiplier is that of the pool; inverts `merge_multiplier`."""
    return lam_pool / (lam_pool + lam_start) if naive else lam_pool / lam_start


def merge_multiplier(q: float, lam_start: float, naive: bool) -> float:
    """The multiplier that a merge of weight q on the start stands for, to first order (P-SACPO, 2404.11049).

    log pi = (1 - q) log pi_1 + q log pi_2. Where the start goes on from pi_r, its tilt is (r - lambda c) / beta, and
    the merge's (r - q lambda c) / beta. Where it is safety DPO from pi_ref (a naive merge), the merge's tilt is
    ((1 - q) r - q lambda c) / beta: multiplier q lambda / (1 - q) at KL weight beta / (1 - q), for q < 1.
    """
    return q * lam_start / (1 - q) if naive else q * lam_start


def tail(lams: Sequence[float]) -> Sequence[float]:
    """The last half of the multipliers, the middle one included; PD-DPO's tail average is its mean."""
    return lams[len(lams) // 2 :]


@dataclass(frozen=True)
class Outlook:
    """What is known before the search: the pool's multiplier and the start's, the Slater radius of a projected rule
    (infinite without one), and whether a merge is naive, its start having been trained from pi_ref."""

    lam_pool: float
    lam_start: float
    radius: float = math.inf
    naive: bool = False


Rule = Callable[[Sequence[Step], DualSearchParams, Outlook], float | None]


def _within_noise(step: Step, params: DualSearchParams) -> bool:
    return abs(step.measured.cost - params.limit) <= params.z * step.measured.cost_se


def _grid(steps: Sequence[Step], params: DualSearchParams, outlook: Outlook) -> float | None:
    left = [lam for lam in params.grid if all(abs(lam - step.lam) > 1e-9 for step in steps)]
    return left[0] if left else None


def _one_shot(steps: Sequence[Step], params: DualSearchParams, outlook: Outlook) -> float | None:
    return None


def _ascent(steps: Sequence[Step], params: DualSearchParams, outlook: Outlook) -> float | None:
    """One training, which moves lambda itself from where it begins."""
    return outlook.lam_start if len(steps) == 1 else None


def _dual_gradient(steps: Sequence[Step], params: DualSearchParams, outlook: Outlook) -> float | None:
    last = steps[-1]
    if _within_noise(last, params):
        return None
    return min(dual_gradient_step(last.lam, last.measured.cost, params.limit, params.step_size), params.lambda_max)


def _projected_subgradient(steps: Sequence[Step], params: DualSearchParams, outlook: Outlook) -> float | None:
    """Stops where the projection gives the last multiplier again, unless fresh comparisons make another round of it."""
    last = steps[-1]
    if _within_noise(last, params):
        return None
    proposed = projected_subgradient_step(
        last.lam, last.measured.cost, params.limit, params.step_size, outlook.radius, params.lambda_min
    )
    return None if proposed == last.lam and params.online is None else proposed


def _newton(steps: Sequence[Step], params: DualSearchParams, outlook: Outlook) -> float | None:
    """Newton from the first policy, then secants; a correction is always made, since it also trains on-policy."""
    last = steps[-1]
    if len(steps) > 1 and _within_noise(last, params):
        return None
    m = last.measured
    proposed = newton_step(last.lam, m.cost, m.variance, params.limit, params.beta) if m.variance > 0 else last.lam
    if len(steps) > 1:
        secant = secant_step((steps[-2].lam, steps[-2].measured.cost), (last.lam, m.cost), params.limit)
        proposed = secant if secant is not None and secant < 2 * proposed + 1 else proposed
    return min(proposed, params.lambda_max)


def _merge(steps: Sequence[Step], params: DualSearchParams, outlook: Outlook) -> float | None:
    """The weight of the pool's multiplier first, then secants on (q, C); q = 1 is the start itself."""
    last = steps[-1]
    if len(steps) > 1 and _within_noise(last, params):
        return None
    if len(steps) == 1:
        return min(first_weight(outlook.lam_pool, outlook.lam_start, outlook.naive), params.merge_max)
    points = sorted((abs(step.measured.cost - params.limit), step.step) for step in steps)
    by_step = {step.step: (float(step.q if step.q is not None else 1.0), step.measured.cost) for step in steps}
    proposed = secant_step(by_step[points[1][1]], by_step[points[0][1]], params.limit)
    if proposed is None or (outlook.naive and proposed >= 1):  # a naive merge beyond its start has no multiplier
        return None
    proposed = min(proposed, params.merge_max)
    return None if any(abs(proposed - q) < 1e-3 for q, _ in by_step.values()) else proposed


_RULES: dict[str, Rule] = {
    "grid": _grid,
    "one_shot": _one_shot,
    "ascent": _ascent,
    "dual_gradient": _dual_gradient,
    "projected_subgradient": _projected_subgradient,
    "newton": _newton,
    "merge": _merge,
}


# --- the loop ---------------------------------------------------------------------------------------------------------


def run(
    plan: Plan, start: str, outlook: Outlook, params: DualSearchParams, bench: Workbench, scratch: Path
) -> tuple[list[Step], str]:
    """Measure the start, train (or merge) and measure until the rule stops or the budget is spent, then close.

    Every finished step is recorded in `scratch`, so an interrupted search goes on where it stopped.
    Returns the steps and why the search stopped.
    """
    recorded = _restore(scratch)
    if not recorded:
        first = Step(0, outlook.lam_start, None, start, False, bench.measure(0, start))
        recorded = _record(scratch, [first])
    steps, stopped = _iterate(plan, [s for s in recorded if not s.closing], outlook, params, bench, scratch)
    if recorded[-1].closing:
        return recorded, stopped
    return _record(scratch, [*steps, *_close(plan, steps, bench)]), stopped


def _iterate(
    plan: Plan, steps: list[Step], outlook: Outlook, params: DualSearchParams, bench: Workbench, scratch: Path
) -> tuple[list[Step], str]:
    """Take the steps that the rule asks for, and say why they end."""
    rule = plan.method.rule
    if plan.method.inner == "safety":  # its loss divides by lambda
        params = params.model_copy(update={"grid": [max(lam, params.lambda_min) for lam in params.grid]})
    budget = {"merge": params.merge_steps, "grid": len(params.grid)}.get(rule, params.max_trainings)
    while True:
        _tell(steps[-1], params)
        proposed = _RULES[rule](steps, params, outlook)
        if proposed is None:
            return steps, _reason(rule, steps[-1], params)
        if len(steps) > budget:
            return steps, f"budget of {budget} {'merges' if rule == 'merge' else 'trainings'} is spent"
        steps = _record(scratch, [*steps, _advance(plan, steps, proposed, outlook, bench)])


def _reason(rule: str, last: Step, params: DualSearchParams) -> str:
    """Why a rule proposes nothing more after this step."""
    if rule in (*ITERATIVE, "merge") and _within_noise(last, params):
        return "cost within noise of the limit"
    return "lambda is at the end of its interval" if rule == "projected_subgradient" else f"rule {rule} is finished"


def _close(plan: Plan, steps: Sequence[Step], bench: Workbench) -> list[Step]:
    """The step that makes what the method returns, if no step of the search is that already."""
    number, lams = len(steps), [step.lam for step in steps]
    if plan.method.returns == "mixture":
        policy, lam = bench.mix(number, steps), sum(lams) / number
    elif plan.method.returns == "tail_average" and len(tail(lams)) > 1:
        lam = sum(tail(lams)) / len(tail(lams))
        policy = bench.train(number, lam, steps[-1])
    else:
        return []
    trained = plan.method.returns == "tail_average"
    return [Step(number, lam, None, policy, trained, bench.measure(number, policy), closing=True)]


def choose(plan: Plan, steps: Sequence[Step], params: DualSearchParams) -> int:
    """The index of the policy that the method returns.

    `best`: the most rewarding of those whose cost is not above the limit by more than z standard errors; the least
    costly if there is none. Otherwise the last one: of the search, or the one that closed it.
    """
    if plan.method.returns != "best":
        return len(steps) - 1
    allowed = [i for i, step in enumerate(steps) if feasible(step, params)]
    if allowed:
        return max(allowed, key=lambda i: steps[i].measured.reward)
    return min(range(len(steps)), key=lambda i: steps[i].measured.cost)


def feasible(step: Step, params: DualSearchParams) -> bool:
    """Whether the measured cost is within the limit, up to z standard errors."""
    return step.measured.cost <= params.limit + params.z * step.measured.cost_se


def summary(
    plan: Plan, steps: Sequence[Step], stopped: str, params: DualSearchParams, outlook: Outlook, before: int
) -> dict[str, Any]:
    """The search as `reports/search/NAME.json` holds it; `before` counts the trainings that made its start."""
    rows = [
        {"step": s.step, "lam": s.lam, "q": s.q, "trained": s.trained, "closing": s.closing, **asdict(s.measured)}
        for s in steps
    ]
    chosen, method = choose(plan, steps, params), plan.method
    each = 2 if params.online is not None and params.online.retrain_reward else 1  # pi_r beside the policy
    found = {
        "name": plan.name,
        "method": method.name,
        "title": method.title,
        "rule": method.rule,
        "returns": method.returns,
        "cost_source": method.cost,
        "steps": rows,
        "chosen": chosen,
        "feasible": feasible(steps[chosen], params),
        "trainings": before + each * sum(step.trained for step in steps),
        "generated_tokens": sum(step.measured.generated_tokens for step in steps),
        "labels": sum(step.measured.labels for step in steps),
        "comparisons": sum(step.measured.comparisons for step in steps),
        "stopped": stopped,
    }
    if method.rule == "ascent":
        return found | {"course": steps[-1].course}
    if method.rule != "projected_subgradient":
        return found
    return found | {
        "slater_radius": outlook.radius,
        "slater_from": "pool" if params.slater_radius == "pool" else "params",
    }


def _advance(plan: Plan, steps: Sequence[Step], proposed: float, outlook: Outlook, bench: Workbench) -> Step:
    number = len(steps)
    if plan.method.rule == "merge":
        policy, lam = bench.merge(number, proposed), merge_multiplier(proposed, outlook.lam_start, outlook.naive)
        return Step(number, lam, proposed, policy, False, bench.measure(number, policy))
    if plan.method.rule == "ascent":
        made = bench.ascend(number)
        measured = bench.measure(number, made.policy)
        return Step(number, made.lam, None, made.policy, True, measured, course=made.course)
    policy = bench.train(number, proposed, steps[-1])
    return Step(number, proposed, None, policy, True, bench.measure(number, policy))


def _tell(step: Step, params: DualSearchParams) -> None:
    m = step.measured
    log.info(
        "step %d: lambda %.4f, cost %.4f +- %.4f (limit %g), reward %.4f, KL %.3f",
        step.step, step.lam, m.cost, m.cost_se, params.limit, m.reward, m.kl,
    )  # fmt: skip


def _record(scratch: Path, steps: list[Step]) -> list[Step]:
    write_json(scratch / "steps.json", [asdict(step) for step in steps])
    return steps


def _restore(scratch: Path) -> list[Step]:
    path = scratch / "steps.json"
    if not path.is_file():
        return []
    rows = read_json(path)
    steps = [replace(Step(**row), measured=Measurement(**row["measured"])) for row in rows]
    missing = [step.policy for step in steps if not Path(step.policy).is_dir()]
    if missing:
        raise DualignError(f"{missing[0]}: the policy of an earlier step is gone; delete {scratch} and run again")
    log.info("resuming the search after step %d", steps[-1].step)
    return steps
