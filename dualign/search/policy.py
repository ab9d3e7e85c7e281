"""Which step comes next: the rules of all methods, and the merges that save a training.

A rule looks at the steps so far (multiplier, measured cost with its standard error, within-prompt
variance) and says which multiplier, or which merge weight q, to try next, or None to stop. It
steers to the target: the limit, or below it by the certificate margin. Newton's rule and merges go
by the policy's own answers and by the pool, to which a training at its multiplier was solved. A
merge weight is corrected on the cost curve that the pool shows before anything is generated. Where
two policies of a search by Newton's rule lie on both sides of the target, merging them comes before
another training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dualign.evaluation.effective_tilt import Tilt
from dualign.math import updates
from dualign.methods import Plan
from dualign.params.search import DualSearchParams
from dualign.params.search import Rule as RuleName
from dualign.search.journal import Blend, Step
from dualign.search.screening import PoolCost, Screening

#: R^2 from which a policy counts as the tilt that was fitted to it: a tenth of its variance is left
#: out at most.
MIN_TILT_R2 = 0.9
#: Weights that are screened for one merge at most; each takes a forward pass over the pool.
_SCREENINGS = 8
#: Errors of a measurement beyond which a screening's is too large: weights of a merge differ less.
_BLURRED = 3.0


@dataclass(frozen=True)
class SearchContext:
    """What is known before the search.

    The pool's multiplier and the start's, the Slater radius of a projected rule (infinite without
    one), whether a merge is naive, its start having been trained from pi_ref, the multiplier of its
    reference, the cost to steer to (None: the limit), and the prices of additional constraints that
    the start was trained at, where the rule corrects them. `priced`: it was at the pool's."""

    lam_pool: float
    lam_start: float
    radius: float = math.inf
    naive: bool = False
    lam_reference: float = 0.0
    target_cost: float | None = None
    prices: tuple[float, ...] = ()
    priced: bool = False


@dataclass(frozen=True)
class Search:
    """A search: its row of `methods`, its params, and what is known before it."""

    plan: Plan
    params: DualSearchParams
    context: SearchContext

    @property
    def asks_pool(self) -> bool:
        """Whether the pool has a say in what a policy costs: by our rules, on the same scale."""
        method = self.plan.method
        return method.rule in ("newton", "merge") and method.cost == "model"

    @property
    def target(self) -> float:
        """The cost that the rule steers to."""
        known = self.context.target_cost
        return self.params.limit if known is None else known


# --- the rules ------------------------------------------------------------------------------------

#: The next multiplier (or merge weight) of a search after these steps; None to stop.
Rule = Callable[[Search, Sequence[Step]], float | None]


def solved(search: Search, step: Step) -> bool:
    """Whether a step is optimal up to z standard errors: each limit is met, or kept at price 0."""
    m = step.measured
    z = search.params.z
    if not _met(step.cost - search.target, step.cost_se, step.lam, z):
        return False
    if not step.prices:
        return True
    return all(
        _met(known.mean - known.limit, known.error, price, z)
        for known, price in zip(m.additional, step.prices, strict=True)
        if known.mean is not None and known.error is not None
    )


def _met(excess: float, error: float, lam: float, z: float) -> bool:
    return abs(excess) <= z * error or (lam == 0 and excess < 0)


def _grid(search: Search, steps: Sequence[Step]) -> float | None:
    least = search.params.lambda_min if search.plan.method.inner == "safety" else 0.0  # 1 / lambda
    for lam in (max(lam, least) for lam in search.params.grid):
        if all(abs(lam - step.lam) > 1e-9 for step in steps):
            return lam
    return None


def _one_shot(search: Search, steps: Sequence[Step]) -> float | None:
    return None


def _ascent(search: Search, steps: Sequence[Step]) -> float | None:
    """One training, which moves lambda itself from where it begins."""
    return search.context.lam_start if len(steps) == 1 else None


def _dual_gradient(search: Search, steps: Sequence[Step]) -> float | None:
    last = steps[-1]
    params = search.params
    if solved(search, last):
        return None
    cost = last.cost
    proposed = updates.dual_gradient_step(last.lam, cost, search.target, params.step_size)
    return min(proposed, params.lambda_max)


def _projected_subgradient(search: Search, steps: Sequence[Step]) -> float | None:
    """Stops where the projection gives the last multiplier again, unless fresh comparisons make
    another round of it."""
    last = steps[-1]
    params = search.params
    if solved(search, last):
        return None
    proposed = updates.projected_subgradient_step(
        last.lam,
        last.cost,
        search.target,
        params.step_size,
        search.context.radius,
        params.lambda_min,
    )
    return None if proposed == last.lam and params.online is None else proposed


def _newton(search: Search, steps: Sequence[Step]) -> float | None:
    """The line through all trainings, Newton's at first. A start within noise is not corrected."""
    if solved(search, steps[-1]):
        return None
    proposed = corrections(steps, search.target, search.params.beta)
    lam = proposed.newton if proposed.line is None else proposed.line
    return min(lam, search.params.lambda_max)


@dataclass(frozen=True)
class Corrections:
    """The next multiplier by Newton's step, the effective tilt, and the line through trainings."""

    newton: float
    tilt: float | None = None
    line: float | None = None


def corrections(steps: Sequence[Step], target: float, beta: float) -> Corrections:
    """The next multiplier by each estimate; the line is taken where there is one.

    The start was trained elsewhere, longer or less, and from the reference: it is on the line only
    until the search has a training of its own. The line's slope beforehand is Newton's, in nominal
    multipliers where the policy is the tilt that was fitted to it. With prices of additional
    constraints all multipliers move at once, so costs lie on no line in lambda."""
    last = steps[-1]
    m = last.measured
    if last.prices:
        return Corrections(jointly(last, target, beta)[0])
    if m.variance <= 0:
        return Corrections(last.lam)
    slope = m.variance / beta * _response(last.tilt, last.lam, beta)
    alike = [step for step in steps if step.trained] or steps
    line = updates.line_root(
        [step.lam for step in alike],
        [step.cost for step in alike],
        [step.cost_se for step in alike],
        slope,
        target,
    )
    newton = updates.newton_step(last.lam, last.cost, m.variance, target, beta)
    return Corrections(newton, _tilt_step(last, target), line)


def jointly(step: Step, target: float, beta: float) -> list[float]:
    """The next multiplier and prices of additional constraints, by one Newton step for all."""
    m = step.measured
    excess = [0.0 if k.mean is None else k.share * (k.mean - k.limit) for k in m.additional]
    found = updates.joint_newton_step(
        np.array([step.lam, *step.prices]),
        np.array([step.cost - target, *excess]),
        np.array(m.covariance),
        beta,
    )
    return found.tolist()


def _tilt_step(step: Step, target: float) -> float | None:
    tilt = step.tilt
    if tilt is None:
        return None
    m = step.measured
    return updates.tilt_step(step.lam, tilt.beta_eff, tilt.lam_eff, step.cost, m.variance, target)


def _response(tilt: Tilt | None, lam: float, beta: float) -> float:
    """Effective over nominal tilt, (lam_eff / beta_eff) / (lambda / beta); 1 if not believed.

    It is believed where it explains the policy, and tells its multiplier from 0."""
    if tilt is None or tilt.r2 is None or tilt.beta_eff is None:
        return 1.0
    if tilt.lam_eff is None or tilt.lam_eff_se is None or lam <= 0:
        return 1.0
    believed = tilt.r2 >= MIN_TILT_R2 and tilt.lam_eff > 2 * tilt.lam_eff_se
    return tilt.lam_eff / lam * beta / tilt.beta_eff if believed else 1.0


# --- merges ---------------------------------------------------------------------------------------


def _merge(search: Search, steps: Sequence[Step]) -> float | None:
    """The weight of the pool's multiplier first, then secants on (q, C); q = 1 is the start itself.

    A start that was trained at the pool's multiplier is that first policy, and Newton's step comes
    next."""
    ends = search.context
    begins = len(steps) == 1
    tried = not begins or ends.lam_start == ends.lam_pool
    if tried and solved(search, steps[-1]):
        return None
    if not begins:
        return _merge_between(search, [(step.weight, step.cost) for step in steps])
    lam = ends.lam_pool
    if tried:
        lam = corrections(steps, search.target, search.params.beta).newton
    first = updates.first_weight(lam, ends.lam_start, ends.naive, ends.lam_reference)
    return min(first, search.params.merge_max)


def _merge_between(search: Search, points: Sequence[tuple[float, float]]) -> float | None:
    weight = updates.next_weight(points, search.target, search.params.merge_max)
    beyond = weight is not None and search.context.naive and weight >= 1  # it has no multiplier
    return None if beyond else weight


RULES: dict[RuleName, Rule] = {
    "grid": _grid,
    "one_shot": _one_shot,
    "ascent": _ascent,
    "dual_gradient": _dual_gradient,
    "projected_subgradient": _projected_subgradient,
    "newton": _newton,
    "merge": _merge,
}


def screened_weights(
    search: Search, steps: Sequence[Step], proposed: float, screen: Callable[[float], Screening]
) -> list[Screening]:
    """The screenings of a proposed merge weight and of its corrections on the pool's cost curve
    while that can be trusted; the last is the one to make.

    Only forward passes: secants on the screened costs, moved by how far the last policy is known to
    be above its own screening (its own answers are to other prompts), until the cost is nearer to
    the target than a measurement can tell. A weight that the pool cannot tell the cost of (an
    effective sample size below `min_ess`, or an error far above the measurement's) ends it: that
    one is measured next."""
    params = search.params
    last = steps[-1]
    known = next(seen.pool for seen in last.screened if seen.q == last.weight)
    shift = last.cost - known.cost if _tells(known, last, params) else 0.0
    points = [(step.weight, step.cost) for step in steps]
    near = params.z * last.cost_se / 2
    weight: float | None = proposed
    tried: list[Screening] = []
    while weight is not None and len(tried) < _SCREENINGS:
        tried.append(screen(weight))
        seen = tried[-1].pool
        cost = seen.cost + shift
        if not _tells(seen, last, params) or abs(cost - search.target) <= near:
            break
        points.append((weight, cost))
        weight = _merge_between(search, points)
    return tried


def _tells(seen: PoolCost, last: Step, params: DualSearchParams) -> bool:
    """Whether a screening is worth anything beside a measurement."""
    return seen.ess >= params.min_ess and seen.cost_se <= _BLURRED * last.measured.cost_se


def blend_first(search: Search, steps: Sequence[Step]) -> Blend | None:
    """What to merge before a training: by Newton's rule, for one limit and one returned policy."""
    method = search.plan.method
    alone = method.rule == "newton" and not steps[-1].prices and method.returns in ("last", "best")
    left = search.params.merge_steps - sum(step.blend is not None for step in steps)
    return next_blend(steps, search.target) if alone and left > 0 else None


def next_blend(steps: Sequence[Step], target: float) -> Blend | None:
    """The merge that should cost `target`, of the policies nearest above it and below it.

    Where their log-ratios are tilts by r - lambda c, merging them is choosing a multiplier between
    theirs, at the price of a measurement and not of a training. None without such two, or if that
    merge has been measured."""
    own = sorted(
        (step for step in steps if step.blend is None),
        key=lambda step: abs(step.cost - target),
    )
    first = next((step for step in own if step.cost > target), None)
    second = next((step for step in own if not step.cost > target), None)
    if first is None or second is None:
        return None
    points = [(0.0, first.cost), (1.0, second.cost)]
    for step in steps:
        if step.blend and (step.blend.first, step.blend.second) == (first.step, second.step):
            points.append((step.blend.weight, step.cost))
    weight = updates.next_weight(points, target, 1.0)
    return None if weight is None else Blend(first.step, second.step, weight)
