"""The search for the multiplier: the rules of all methods as pure functions, and one loop that runs
any of them.

A rule looks at the steps so far (multiplier, measured cost with its standard error, within-prompt
variance) and says which multiplier, or which merge weight q, to try next, or None to stop. It
steers to the target: the limit, or below it by the certificate margin. A merge weight is corrected
on the
cost curve that the pool shows before anything is generated. Where two policies of a search by
Newton's rule lie on both sides of the limit, merging them comes before another training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError
from dualign.evaluation.effective_tilt import Tilt
from dualign.evaluation.stats import ConstraintEstimate, Measurement
from dualign.methods import ITERATIVE, Plan
from dualign.params.search import DualSearchParams
from dualign.search.additional import joint_newton_step
from dualign.search.screening import Screening

log = logging.getLogger(__name__)

#: R^2 from which a policy counts as the tilt that was fitted to it: a tenth of its variance is left
#: out at most.
MIN_TILT_R2 = 0.9
#: Standard deviation of what trained policies answer to a multiplier, in units of the slope that
#: theory gives.
SLOPE_ERROR = 0.25
#: Units of cost; a measurement is not taken to be more exact.
_EXACT = 1e-6
#: Weights that are screened for one merge at most; each takes a forward pass over the pool.
_SCREENINGS = 8


@dataclass(frozen=True)
class Blend:
    """A merge of two policies of the search itself: (1 - weight) first + weight second, the numbers
    of their steps.
    """

    first: int
    second: int
    weight: float


@dataclass(frozen=True)
class Step:
    """One policy of a search: its multiplier (for a merge the one it stands for), folder and
    measurement.

    `closing` marks the policy made after the search from all its steps: their mixture (its
    multiplier is their mean), or the one trained at the tail average. `history` is that of an
    ascent; see `Ascent`. `tilt` is what the policy reached on the pool; `screened` are the merges
    that were looked at there before this one was made. `prices` are the multipliers of additional
    limits that it was trained at, in the order of `measured.additional`. `q` is the weight of a
    merge of start and reference; `blend` says which policies of the search were merged in place of
    a training."""

    step: int
    lam: float
    q: float | None
    policy: str
    trained: bool
    measured: Measurement
    closing: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    tilt: Tilt | None = None
    screened: list[Screening] = field(default_factory=list)
    prices: tuple[float, ...] = ()
    blend: Blend | None = None

    @property
    def weight(self) -> float:
        """The merge weight: q, and 1 for the start of a merge."""
        return 1.0 if self.q is None else self.q


@dataclass(frozen=True)
class Ascent:
    """A policy whose training moved lambda itself: its folder, the last lambda, and its history.

    The history has a row for each stretch of the training: its last `step`, and the means of `lam`,
    `cost`, `reward` and
    `kl` (nats an answer) over it.
    """

    policy: str
    lam: float
    history: list[dict[str, float]]


class SearchBackend(Protocol):
    """What a search needs done: training at a multiplier, merging, mixing, measuring. Folders are
    given as strings.
    """

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        """Train a policy at `lam` and these prices of additional constraints (None: the pool's);
        return its folder."""
        ...

    def ascend(self, step: int) -> Ascent:
        """Train a policy and lambda by turns, from the start."""
        ...

    def merge(self, step: int, q: float) -> str:
        """Merge the reference and the start at weight q; return the folder."""
        ...

    def blend(self, step: int, first: str, second: str, weight: float) -> str:
        """Merge two policies, (1 - weight) first + weight second; return the folder."""
        ...

    def screen(self, q: float) -> Screening:
        """The cost of the merge of weight q on the pool, without generation."""
        ...

    def mix(self, step: int, steps: Sequence[Step]) -> str:
        """Make the mixture of all steps' policies, in equal parts; return the folder."""
        ...

    def measure(self, step: int, policy: str) -> Measurement:
        """Sample the policy on the search prompts and score the answers."""
        ...

    def tilt(self, policy: str) -> Tilt:
        """The effective tilt of the policy on the pool."""
        ...


# --- rules ----------------------------------------------------------------------------------------


def dual_gradient_step(lam: float, cost: float, limit: float, step_size: float) -> float:
    """lambda <- [lambda + eta (C - d)]_+, C-DPO (2403.02475).

    >>> dual_gradient_step(1.0, cost=0.5, limit=0.0, step_size=2.0)
    2.0
    >>> dual_gradient_step(1.0, cost=-2.0, limit=0.0, step_size=2.0)
    0.0
    """
    return max(0.0, lam + step_size * (cost - limit))


def projected_subgradient_step(
    lam: float, cost: float, limit: float, step_size: float, radius: float, lambda_min: float
) -> float:
    """lambda <- Proj_[lambda_min, 2 rho](lambda + eta (C - d)), PD-DPO (2510.05703, alg. 1).

    The paper's interval starts at 0, where its loss divides by zero; lambda_min > 0 keeps off it.

    >>> projected_subgradient_step(1.0, 0.5, 0.0, step_size=10.0, radius=2.0, lambda_min=0.1)
    4.0
    """
    return max(min(lam + step_size * (cost - limit), 2 * radius), lambda_min)


def newton_step(lam: float, cost: float, variance: float, limit: float, beta: float) -> float:
    """lambda <- [lambda + beta (C - d) / E_x Var(c|x)]_+ with the curvature of the on-policy
    samples.

    >>> newton_step(1.0, cost=0.5, variance=0.25, limit=0.0, beta=0.5)
    2.0
    """
    return max(0.0, lam + beta * (cost - limit) / variance)


def tilt_step(lam: float, tilt: Tilt, cost: float, variance: float, limit: float) -> float | None:
    """Newton's step for what the policy reached, told in what it was told: lambda <- lambda
    (lam_req / lam_eff).

    A policy trained at `lam` whose effective tilt is (beta_eff, lam_eff) has dC / dlam_eff = -V /
    beta_eff, so it needs lam_req = lam_eff + beta_eff (C - d) / V; and it answers to a command as
    lam_eff / lam did. A training that reaches its target exactly makes this `newton_step`. None
    where the policy has no effective multiplier above 0.

    A policy that was told 1 and reached half of that is told twice what it needs, 0.5 + 0.5 * 0.5 /
    0.5:

    >>> from dualign.evaluation.effective_tilt import effective_tilt
    >>> reward, cost, length = np.random.default_rng(0).normal(size=(3, 9, 4))
    >>> # beta_eff and lam_eff are 0.5.
    >>> reached = effective_tilt(2 * reward - cost, reward, cost, length)
    >>> round(tilt_step(1.0, reached, cost=0.5, variance=0.5, limit=0.0), 6)
    2.0
    """
    if tilt.beta_eff is None or tilt.lam_eff is None or tilt.lam_eff <= 0 or variance <= 0:
        return None
    required = tilt.lam_eff + tilt.beta_eff * (cost - limit) / variance
    return max(0.0, lam * required / tilt.lam_eff)


def secant_step(
    previous: tuple[float, float], last: tuple[float, float], limit: float
) -> float | None:
    """The root of the line through two points (x, C); None where the line does not fall.

    >>> secant_step((0.0, 1.0), (1.0, 0.5), limit=0.0)
    2.0
    >>> secant_step((0.0, 0.5), (1.0, 1.0), limit=0.0) is None  # the cost rises
    True
    """
    (x0, c0), (x1, c1) = previous, last
    if x0 == x1 or (c1 - c0) / (x1 - x0) >= 0:
        return None
    return max(0.0, x1 + (limit - c1) * (x1 - x0) / (c1 - c0))


def line_root(
    lams: Sequence[float],
    costs: Sequence[float],
    errors: Sequence[float],
    slope: float,
    limit: float,
) -> float:
    """The root of the line C = a - s lambda through all steps, where theory says s = `slope` > 0
    beforehand.

    a and s minimise sum_k (C_k - a + s lambda_k)^2 / error_k^2 + (s - slope)^2 / (`SLOPE_ERROR`
    slope)^2. With one step it is Newton's; with steps far apart, or many, the regression of all of
    them, which averages multipliers in place of policies; steps that noise does not tell apart keep
    the slope of theory, where a secant would be thrown far off or stand still. A line that falls
    less than a quarter of that is not believed.

    >>> line_root([1.0], [0.5], [0.1], slope=0.5, limit=0.0)
    2.0
    >>> line_root([1.0, 3.0], [0.5, -0.5], [0.1, 0.1], slope=0.5, limit=0.0)
    2.0
    """
    x, y = np.asarray(lams, float), np.asarray(costs, float)
    weight = 1 / np.maximum(np.asarray(errors, float), _EXACT) ** 2
    centre, level = float(np.average(x, weights=weight)), float(np.average(y, weights=weight))
    along, across = float(weight @ (x - centre) ** 2), float(weight @ ((x - centre) * (y - level)))
    prior = 1 / (SLOPE_ERROR * slope) ** 2
    found = (prior * slope - across) / (prior + along)
    return max(0.0, centre + (level - limit) / max(found, slope / 4))


def first_weight(
    lam_pool: float, lam_start: float, naive: bool, lam_reference: float = 0.0
) -> float:
    """The merge weight q >= 0 whose multiplier is that of the pool; inverts `merge_multiplier`.

    >>> first_weight(lam_pool=1.0, lam_start=4.0, naive=False), first_weight(1.0, 4.0, naive=True)
    (0.25, 0.2)
    """
    if naive:
        return lam_pool / (lam_pool + lam_start)
    return max(0.0, (lam_pool - lam_reference) / (lam_start - lam_reference))


def merge_multiplier(q: float, lam_start: float, naive: bool, lam_reference: float = 0.0) -> float:
    """The multiplier that a merge of weight q on the start stands for, to first order (P-SACPO,
    2404.11049).

    log pi = (1 - q) log pi_1 + q log pi_2. Where the start's tilt is (r - lambda c) / beta and the
    other's (r - lambda_1 c) / beta, lambda_1 = 0 for pi_r, the merge's is that of (1 - q) lambda_1
    + q lambda at the same beta. Where the start is safety DPO from pi_ref (a naive merge), the
    merge's tilt is ((1 - q) r - q lambda c) / beta: multiplier q lambda / (1 - q) at KL weight beta
    / (1 - q), for q < 1.

    >>> merge_multiplier(0.25, lam_start=4.0, naive=False), merge_multiplier(0.2, 4.0, naive=True)
    (1.0, 1.0)
    """
    return q * lam_start / (1 - q) if naive else (1 - q) * lam_reference + q * lam_start


def next_weight(
    points: Sequence[tuple[float, float]], limit: float, largest: float
) -> float | None:
    """The merge weight, at most `largest`, of the secant through the two points (q, C) nearest to
    the limit.

    Where points lie on both sides of the limit and that secant leaves the interval between the
    nearest of each side, it is the one through these two. None where the line does not fall, or its
    root is a point already.

    >>> next_weight([(0.0, 1.0), (1.0, -1.0)], limit=0.5, largest=1.0)
    0.25
    """
    ordered = sorted(points, key=lambda point: abs(point[1] - limit))
    found = secant_step(ordered[1], ordered[0], limit)
    over, under = (
        [point for point in ordered if (point[1] > limit) is side] for side in (True, False)
    )
    if over and under and (found is None or not over[0][0] <= found <= under[0][0]):
        found = secant_step(over[0], under[0], limit)
    if found is None:
        return None
    found = min(found, largest)
    return None if any(abs(found - q) < 1e-3 for q, _ in points) else found


def next_blend(steps: Sequence[Step], limit: float) -> Blend | None:
    """The merge that should cost `limit`, of the two policies nearest to it, one above it and one
    below.

    Where their log-ratios are tilts by r - lambda c, merging them is choosing a multiplier between
    theirs, at the price of a measurement and not of a training. None without such two, or if that
    merge has been measured."""
    own = [step for step in steps if step.blend is None]
    over, under = (
        [step for step in own if (step.measured.cost > limit) is side] for side in (True, False)
    )
    if not over or not under:
        return None
    first, second = (
        min(side, key=lambda step: abs(step.measured.cost - limit)) for side in (over, under)
    )
    points = [(0.0, first.measured.cost), (1.0, second.measured.cost)]
    for step in steps:
        if step.blend is not None and (step.blend.first, step.blend.second) == (
            first.step,
            second.step,
        ):
            points.append((step.blend.weight, step.measured.cost))
    weight = next_weight(points, limit, 1.0)
    return None if weight is None else Blend(first.step, second.step, weight)


def tail(lams: Sequence[float]) -> Sequence[float]:
    """The last half of the multipliers, the middle one included; PD-DPO's tail average is its mean.

    >>> tail([1.0, 2.0, 3.0, 4.0, 5.0])
    [3.0, 4.0, 5.0]
    """
    return lams[len(lams) // 2 :]


@dataclass(frozen=True)
class SearchContext:
    """What is known before the search.

    The pool's multiplier and the start's, the Slater radius of a projected rule (infinite without
    one), whether a merge is naive, its start having been trained from pi_ref, the multiplier of its
    reference, the cost to steer to (None: the limit), and the prices of additional constraints that
    the start was trained at, where the rule corrects them."""

    lam_pool: float
    lam_start: float
    radius: float = math.inf
    naive: bool = False
    lam_reference: float = 0.0
    target_cost: float | None = None
    prices: tuple[float, ...] = ()

    def target(self, params: DualSearchParams) -> float:
        """The cost that a rule steers to."""
        return params.limit if self.target_cost is None else self.target_cost


Rule = Callable[[Sequence[Step], DualSearchParams, SearchContext], float | None]


def _solved(step: Step, params: DualSearchParams, context: SearchContext) -> bool:
    """Whether a step meets the conditions of optimality up to noise: each limit is met, or kept at
    multiplier 0.
    """
    m = step.measured
    met = [_met(m.cost - context.target(params), m.cost_se, step.lam, params)]
    if step.prices:
        met += [
            _met(known.mean - known.limit, known.error, price, params)
            for known, price in zip(m.additional, step.prices, strict=True)
            if known.mean is not None and known.error is not None
        ]
    return all(met)


def _met(excess: float, error: float, lam: float, params: DualSearchParams) -> bool:
    return abs(excess) <= params.z * error or (lam == 0 and excess < 0)


def _grid(steps: Sequence[Step], params: DualSearchParams, context: SearchContext) -> float | None:
    left = [lam for lam in params.grid if all(abs(lam - step.lam) > 1e-9 for step in steps)]
    return left[0] if left else None


def _one_shot(
    steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> float | None:
    return None


def _ascent(
    steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> float | None:
    """One training, which moves lambda itself from where it begins."""
    return context.lam_start if len(steps) == 1 else None


def _dual_gradient(
    steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> float | None:
    last = steps[-1]
    if _solved(last, params, context):
        return None
    found = dual_gradient_step(
        last.lam, last.measured.cost, context.target(params), params.step_size
    )
    return min(found, params.lambda_max)


def _projected_subgradient(
    steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> float | None:
    """Stops where the projection gives the last multiplier again, unless fresh comparisons make
    another round of it.
    """
    last = steps[-1]
    if _solved(last, params, context):
        return None
    proposed = projected_subgradient_step(
        last.lam,
        last.measured.cost,
        context.target(params),
        params.step_size,
        context.radius,
        params.lambda_min,
    )
    return None if proposed == last.lam and params.online is None else proposed


def _newton(
    steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> float | None:
    """The line through all trainings, Newton's at first. A start within noise of the target is not
    corrected.

    Its multiplier is that of the whole pool, which says more than the fewer prompts of one
    measurement do."""
    if _solved(steps[-1], params, context):
        return None
    found = corrections(steps, params, context)
    proposed = found["newton"] if found["line"] is None else found["line"]
    assert proposed is not None
    return min(proposed, params.lambda_max)


def corrections(
    steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> dict[str, float | None]:
    """The next multiplier by each reckoning: `newton`, `tilt`, and the `line` through all
    trainings, which is taken.

    The start was trained elsewhere, longer or less, and from the reference: it is on the line only
    until the search has a training of its own. The line's slope beforehand is Newton's, told in
    commands where the policy is the tilt that was fitted to it. With prices of additional
    constraints all multipliers move at once, so costs lie on no line in lambda."""
    last, target, beta = steps[-1], context.target(params), params.beta
    m = last.measured
    if last.prices:
        return {"newton": jointly(last, params, context)[0], "tilt": None, "line": None}
    if m.variance <= 0:
        return {"newton": last.lam, "tilt": None, "line": None}
    newton = newton_step(last.lam, m.cost, m.variance, target, beta)
    tilt = tilt_step(last.lam, last.tilt, m.cost, m.variance, target) if last.tilt else None
    slope = m.variance / beta * _answer(last.tilt, last.lam, beta)
    alike = [step for step in steps if step.trained] or steps
    lams, costs, errors = zip(
        *((step.lam, step.measured.cost, step.measured.cost_se) for step in alike), strict=True
    )
    return {"newton": newton, "tilt": tilt, "line": line_root(lams, costs, errors, slope, target)}


def jointly(step: Step, params: DualSearchParams, context: SearchContext) -> list[float]:
    """The next multiplier and the next prices of additional constraints, by Newton's step for all
    of them at once."""
    m = step.measured
    excess = [0.0 if k.mean is None else k.share * (k.mean - k.limit) for k in m.additional]
    lams, over = (
        np.array([step.lam, *step.prices]),
        np.array([m.cost - context.target(params), *excess]),
    )
    return joint_newton_step(lams, over, np.array(m.covariance), params.beta).tolist()


def _answer(tilt: Tilt | None, lam: float, beta: float) -> float:
    """What a policy makes of its command, (lam_eff / beta_eff) / (lambda / beta); 1 where the fit
    is not believed.
    """
    if not _believed(tilt) or lam <= 0:
        return 1.0
    assert tilt is not None and tilt.lam_eff is not None and tilt.beta_eff is not None
    return tilt.lam_eff / lam * beta / tilt.beta_eff


def _believed(tilt: Tilt | None) -> bool:
    """Whether the fit explains the policy, and tells its multiplier from 0."""
    if tilt is None or tilt.r2 is None or tilt.lam_eff is None or tilt.lam_eff_se is None:
        return False
    return tilt.r2 >= MIN_TILT_R2 and tilt.lam_eff > 2 * tilt.lam_eff_se


def _merge(steps: Sequence[Step], params: DualSearchParams, context: SearchContext) -> float | None:
    """The weight of the pool's multiplier first, then secants on (q, C); q = 1 is the start itself.

    A start that was trained at the pool's multiplier is that first policy, and Newton's step comes
    next."""
    begins = len(steps) == 1
    tried = not begins or context.lam_start == context.lam_pool
    if tried and _solved(steps[-1], params, context):
        return None
    if begins:
        lam = corrections(steps, params, context)["newton"] if tried else context.lam_pool
        assert lam is not None
        first = first_weight(lam, context.lam_start, context.naive, context.lam_reference)
        return min(first, params.merge_max)
    return _merge_between([(step.weight, step.measured.cost) for step in steps], params, context)


def _merge_between(
    points: Sequence[tuple[float, float]], params: DualSearchParams, context: SearchContext
) -> float | None:
    found = next_weight(points, context.target(params), params.merge_max)
    beyond = (
        found is not None and context.naive and found >= 1
    )  # there a naive merge has no multiplier
    return None if beyond else found


_RULES: dict[str, Rule] = {
    "grid": _grid,
    "one_shot": _one_shot,
    "ascent": _ascent,
    "dual_gradient": _dual_gradient,
    "projected_subgradient": _projected_subgradient,
    "newton": _newton,
    "merge": _merge,
}


# --- the pool's cost curve ------------------------------------------------------------------------


def screened_weight(
    steps: Sequence[Step],
    proposed: float,
    params: DualSearchParams,
    context: SearchContext,
    bench: SearchBackend,
) -> tuple[float, list[Screening]]:
    """A proposed merge weight, corrected on the pool's cost curve while that can be trusted; and
    what was screened.

    Only forward passes: secants on the screened costs, moved by what the last policy measured above
    its own screening
    (the pool holds other prompts, and its answers may have been trained on), until the cost is
    nearer to the target than a measurement can tell. A weight whose effective sample size is below
    `min_ess` ends it: that one is measured next."""
    last, target = steps[-1], context.target(params)
    known = next((seen for seen in last.screened if seen.q == last.weight), None)
    tried = [known or bench.screen(last.weight)]
    shift = last.measured.cost - tried[0].cost if tried[0].ess >= params.min_ess else 0.0
    points = [(step.weight, step.measured.cost) for step in steps]
    q = proposed
    for _ in range(_SCREENINGS):
        tried.append(bench.screen(q))
        cost = tried[-1].cost + shift
        if (
            tried[-1].ess < params.min_ess
            or abs(cost - target) <= params.z * last.measured.cost_se / 2
        ):
            break
        points.append((q, cost))
        better = _merge_between(points, params, context)
        if better is None:
            break
        q = better
    return q, tried


# --- the loop -------------------------------------------------------------------------------------


def run(
    plan: Plan,
    start: str,
    context: SearchContext,
    params: DualSearchParams,
    bench: SearchBackend,
    scratch: Path,
    enough: Callable[[Step], bool] = lambda step: False,
) -> tuple[list[Step], str]:
    """Measure the start, train (or merge) and measure until the rule stops or a budget is spent,
    then close.

    Every finished step is recorded in `scratch`, so an interrupted search goes on where it stopped.
    The first step that is `enough` ends it before its rule does. Returns the steps and why the
    search stopped."""
    recorded = _restore(scratch)
    if not recorded:
        recorded = _record(
            scratch, [_measured(bench, 0, context.lam_start, start, prices=context.prices)]
        )
    steps, stopped = _iterate(
        plan, [s for s in recorded if not s.closing], context, params, bench, scratch, enough
    )
    averages = plan.method.returns == "tail_average" and len(tail([step.lam for step in steps])) > 1
    closes = averages or plan.method.returns == "mixture"
    if not closes or recorded[-1].closing:
        return recorded if recorded[-1].closing else steps, stopped
    if _unaffordable(plan, steps, params, trains=averages):
        return steps, _out_of_tokens(params)
    return _record(scratch, [*steps, _close(plan, steps, bench)]), stopped


def _iterate(
    plan: Plan,
    steps: list[Step],
    context: SearchContext,
    params: DualSearchParams,
    bench: SearchBackend,
    scratch: Path,
    enough: Callable[[Step], bool],
) -> tuple[list[Step], str]:
    """Take the steps that the rule asks for, or the blends that save them, and say why they end."""
    rule = plan.method.rule
    if plan.method.inner == "safety":  # its loss divides by lambda
        params = params.model_copy(
            update={"grid": [max(lam, params.lambda_min) for lam in params.grid]}
        )
    budget = {"merge": params.merge_steps, "grid": len(params.grid)}.get(rule, params.max_trainings)
    while True:
        _log_step(steps[-1], params)
        if enough(steps[-1]):
            return steps, "it was enough"
        proposed = _RULES[rule](steps, params, context)
        if proposed is None:
            return steps, _reason(rule, steps[-1], params, context)
        blend = _blend_first(plan, steps, params, context)
        if blend is None and sum(step.blend is None for step in steps) > budget:
            what = "merge" if rule == "merge" else "training"
            return steps, f"budget of {budget} {what}{'' if budget == 1 else 's'} is spent"
        if _unaffordable(plan, steps, params, trains=rule != "merge" and blend is None):
            return steps, _out_of_tokens(params)
        made = (
            _blended(steps, blend, bench)
            if blend
            else _advance(plan, steps, proposed, params, context, bench)
        )
        steps = _record(scratch, [*steps, made])


def _blend_first(
    plan: Plan, steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> Blend | None:
    """What to merge before another training: by Newton's rule, for one limit alone and where one
    policy is returned.
    """
    alone = (
        plan.method.rule == "newton"
        and not steps[-1].prices
        and plan.method.returns in ("last", "best")
    )
    left = params.merge_steps - sum(step.blend is not None for step in steps)
    return next_blend(steps, context.target(params)) if alone and left > 0 else None


def _reason(rule: str, last: Step, params: DualSearchParams, context: SearchContext) -> str:
    """Why a rule proposes nothing more after this step."""
    if rule in (*ITERATIVE, "merge") and _solved(last, params, context):
        if last.prices:
            return "all limits are met within noise, or kept at price 0"
        if abs(last.measured.cost - context.target(params)) > params.z * last.measured.cost_se:
            return "the limit is kept at lambda 0"
        return (
            "cost within noise of the"
            f" {'limit' if context.target(params) == params.limit else 'target'}"
        )
    return (
        "lambda is at the end of its interval"
        if rule == "projected_subgradient"
        else f"rule {rule} is finished"
    )


def answers_drawn(plan: Plan, params: DualSearchParams, trained: bool) -> int:
    """How many answers a step generates: to be measured and, where it is trained on its own, to be
    trained.
    """
    drawn = params.prompts * params.samples_per_prompt
    if trained and plan.method.data in ("pool", "fresh_pairs"):
        drawn += params.refresh_prompts * params.refresh_samples
    if trained and params.policy_gradient is not None:
        drawn += params.policy_gradient.steps * params.policy_gradient.batch_size
    return drawn


def _unaffordable(
    plan: Plan, steps: Sequence[Step], params: DualSearchParams, trains: bool
) -> bool:
    """Whether the next step would exceed `max_tokens`, if its answers are as long as those of the
    last one.
    """
    if params.max_tokens is None:
        return False
    last = steps[-1]
    length = last.measured.generated_tokens / answers_drawn(plan, params, last.trained)
    spent = sum(step.measured.generated_tokens for step in steps)
    return spent + length * answers_drawn(plan, params, trains) > params.max_tokens


def _out_of_tokens(params: DualSearchParams) -> str:
    return f"budget of {params.max_tokens} generated tokens is spent"


def _close(plan: Plan, steps: Sequence[Step], bench: SearchBackend) -> Step:
    """The step that makes what the method returns from all steps of the search."""
    number, lams = len(steps), [step.lam for step in steps]
    if plan.method.returns == "mixture":
        return _measured(bench, number, sum(lams) / number, bench.mix(number, steps), closing=True)
    lam = sum(tail(lams)) / len(tail(lams))
    return _measured(
        bench, number, lam, bench.train(number, lam, steps[-1]), trained=True, closing=True
    )


def choose(
    plan: Plan,
    steps: Sequence[Step],
    params: DualSearchParams,
    target: float | None = None,
    stopped: str = "",
) -> int:
    """The index of the policy that the method returns.

    `best`: the most rewarding of those that keep additional constraints and whose cost is not above
    the target (None: the limit), all up to z standard errors, else of those as near to the limit.
    If there is
    none: the one whose largest excess over a limit is least, in standard errors, and without
    additional constraints the least costly. Otherwise the last one: of the search, or the one that
    closed it. A search that ran out of tokens before that returns its best so far."""
    if plan.method.returns != "best" and stopped != _out_of_tokens(params):
        return len(steps) - 1
    for bound in (params.limit if target is None else target, params.limit):
        allowed = [i for i, step in enumerate(steps) if _keeps(step, bound, params)]
        if allowed:
            return max(allowed, key=lambda i: steps[i].measured.reward)
    return min(range(len(steps)), key=lambda i: _excess(steps[i], params.limit))


def _excess(step: Step, limit: float) -> float:
    """The largest excess over a limit in standard errors; without additional constraints the
    cost.
    """
    if not step.measured.additional:
        return step.measured.cost
    return max((mean - bound) / max(error, 1e-12) for mean, bound, error in _against(step, limit))


def feasible(step: Step, params: DualSearchParams) -> bool:
    """Whether all limits are kept by the measured means, up to z standard errors."""
    return _keeps(step, params.limit, params)


def _keeps(step: Step, bound: float, params: DualSearchParams) -> bool:
    return all(mean <= limit + params.z * error for mean, limit, error in _against(step, bound))


def _against(step: Step, bound: float) -> list[tuple[float, float, float]]:
    """(mean, limit, standard error) of the cost, with `bound` as its limit, and of each additional
    limit that is known.
    """
    m = step.measured
    additional = [(k.mean, k.limit, k.error or 0.0) for k in m.additional if k.mean is not None]
    return [(m.cost, bound, m.cost_se), *additional]


def summary(
    plan: Plan,
    steps: Sequence[Step],
    stopped: str,
    params: DualSearchParams,
    context: SearchContext,
    before: int,
) -> dict[str, Any]:
    """The search as `reports/search/NAME.json` holds it; `before` counts the trainings that made
    its start.
    """
    chosen, method = choose(plan, steps, params, context.target_cost, stopped), plan.method
    each = (
        2 if params.online is not None and params.online.retrain_reward else 1
    )  # pi_r beside the policy
    found = {
        "name": plan.name,
        "method": method.name,
        "title": method.title,
        "rule": method.rule,
        "returns": method.returns,
        "cost_source": method.cost,
        "target": context.target(params),
        "steps": [_row(plan, steps[: i + 1], params, context) for i in range(len(steps))],
        "screened": [seen.as_dict() for step in steps for seen in step.screened],
        "chosen": chosen,
        "feasible": feasible(steps[chosen], params),
        "trainings": before + each * sum(step.trained for step in steps),
        "generated_tokens": sum(step.measured.generated_tokens for step in steps),
        "labels": sum(step.measured.labels for step in steps),
        "comparisons": sum(step.measured.comparisons for step in steps),
        "stopped": stopped,
    }
    if method.rule == "ascent":
        return found | {"history": steps[-1].history}
    if method.rule == "merge":
        return found | {"naive": context.naive}
    if method.rule != "projected_subgradient":
        return found
    return found | {
        "slater_radius": context.radius,
        "slater_from": "pool" if params.slater_radius == "pool" else "params",
    }


def _row(
    plan: Plan, steps: Sequence[Step], params: DualSearchParams, context: SearchContext
) -> dict[str, Any]:
    """The last of these steps as a summary holds it; after Newton's rule with what each reckoning
    says comes next.
    """
    s = steps[-1]
    row = {
        "step": s.step,
        "lam": s.lam,
        "q": s.q,
        "trained": s.trained,
        "closing": s.closing,
        **asdict(s.measured),
    }
    row |= {"tilt": s.tilt.as_dict() if s.tilt else None, "prices": list(s.prices)}
    row |= {"blend": asdict(s.blend) if s.blend else None}
    del row["covariance"]
    if plan.method.rule == "newton" and not s.closing:
        row["next"] = corrections(steps, params, context)
    return row


def _advance(
    plan: Plan,
    steps: Sequence[Step],
    proposed: float,
    params: DualSearchParams,
    context: SearchContext,
    bench: SearchBackend,
) -> Step:
    number = len(steps)
    if plan.method.rule == "merge":
        q, seen = proposed, list[Screening]()
        if plan.method.cost == "model":  # labels are on another scale than the pool's costs
            q, seen = screened_weight(steps, proposed, params, context, bench)
        lam = merge_multiplier(q, context.lam_start, context.naive, context.lam_reference)
        return _measured(bench, number, lam, bench.merge(number, q), q=q, screened=seen)
    if plan.method.rule == "ascent":
        made = bench.ascend(number)
        return _measured(bench, number, made.lam, made.policy, trained=True, history=made.history)
    last = steps[-1]
    prices = (
        tuple(jointly(last, params, context)[1:]) if last.prices else ()
    )  # only Newton's rule begins with any
    policy = bench.train(number, proposed, last, prices or None)
    return _measured(bench, number, proposed, policy, trained=True, prices=prices)


def _blended(steps: Sequence[Step], blend: Blend, bench: SearchBackend) -> Step:
    first, second, number = steps[blend.first], steps[blend.second], len(steps)
    log.info(
        "merging steps %d and %d, weight %.3f, in place of a training",
        blend.first,
        blend.second,
        blend.weight,
    )
    lam = merge_multiplier(blend.weight, second.lam, False, first.lam)
    return _measured(
        bench,
        number,
        lam,
        bench.blend(number, first.policy, second.policy, blend.weight),
        blend=blend,
    )


def _measured(
    bench: SearchBackend,
    number: int,
    lam: float,
    policy: str,
    q: float | None = None,
    trained: bool = False,
    **more: Any,
) -> Step:
    """A step of the search: the policy, measured on its own answers, and its tilt."""
    return Step(
        number,
        lam,
        q,
        policy,
        trained,
        bench.measure(number, policy),
        tilt=bench.tilt(policy),
        **more,
    )


def _log_step(step: Step, params: DualSearchParams) -> None:
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
    try:
        steps = [_step(row) for row in read_json(path)]
    except DualignError as error:
        log.warning(
            "%s: the search begins again, with what its steps have trained and drawn", error
        )
        return []
    missing = [step.policy for step in steps if not Path(step.policy).is_dir()]
    if missing:
        raise DualignError(
            f"{missing[0]}: the policy of an earlier step is gone; delete {scratch} and run again"
        )
    log.info("resuming the search after step %d", steps[-1].step)
    return steps


def _step(row: dict[str, Any]) -> Step:
    """A step as `_record` wrote it."""
    tilt, screened, measured = (
        row["tilt"],
        [Screening(**seen) for seen in row["screened"]],
        row["measured"],
    )
    measured |= {
        "additional": tuple(ConstraintEstimate(**known) for known in measured["additional"]),
        "covariance": tuple(tuple(line) for line in measured["covariance"]),
    }
    return replace(
        Step(**row),
        measured=Measurement(**measured),
        tilt=Tilt(**tilt) if tilt else None,
        screened=screened,
        prices=tuple(row["prices"]),
        blend=Blend(**row["blend"]) if row["blend"] else None,
    )
