"""The loop of any search: measure, ask the rule, train or merge, until rule or budget ends it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dualign.core.records import HistoryRow
from dualign.core.reporting import report
from dualign.evaluation.effective_tilt import Tilt
from dualign.evaluation.stats import Measurement
from dualign.math.updates import merge_multiplier, tail
from dualign.methods import ITERATIVE, Plan
from dualign.params.search import DualSearchParams
from dualign.search.journal import Blend, Step, record, restore
from dualign.search.policy import RULES, Search, blend_first, jointly, screened_weights, solved
from dualign.search.screening import PoolCost, Screening, believed

log = logging.getLogger(__name__)

#: What trackers are told of every step's policy, beside its multiplier and cost.
_REPORTED = ("reward", "kl", "generated_tokens")


@dataclass(frozen=True)
class Ascent:
    """A policy whose training moved lambda itself: its folder, the last lambda, and its history."""

    policy: str
    lam: float
    history: list[HistoryRow]


class SearchBackend(Protocol):
    """What a search needs done. Folders are given as strings."""

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        """Train at `lam` and these prices of constraints (None: the pool's); return the folder."""
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

    def on_pool(self, policy: str) -> PoolCost:
        """The cost of a policy on the pool, without generation."""
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


def run(
    search: Search,
    start: str,
    backend: SearchBackend,
    scratch: Path,
    enough: Callable[[Step], bool] = lambda step: False,
) -> tuple[list[Step], str]:
    """Measure the start, train (or merge) and measure until the rule stops or a budget is spent,
    then close.

    Every finished step is recorded in `scratch`, so an interrupted search goes on where it stopped.
    The first step that is `enough` ends it before its rule does. Returns the steps and why the
    search stopped."""
    recorded = restore(scratch)
    if not recorded:
        recorded = record(scratch, [_first(search, start, backend)])

    before = [step for step in recorded if not step.closing]
    steps, stopped = _iterate(search, before, backend, scratch, enough)
    if recorded[-1].closing:
        return recorded, stopped
    returns = search.plan.method.returns
    averages = returns == "tail_average" and len(tail([step.lam for step in steps])) > 1
    if not averages and returns != "mixture":
        return steps, stopped
    if _unaffordable(search, steps, trains=averages):
        return steps, out_of_tokens(search.params)
    return record(scratch, [*steps, _close(search, steps, backend)]), stopped


def _iterate(
    search: Search,
    steps: list[Step],
    backend: SearchBackend,
    scratch: Path,
    enough: Callable[[Step], bool],
) -> tuple[list[Step], str]:
    """Take the steps that the rule asks for, or the blends that save them, and say why they end."""
    rule = RULES[search.plan.method.rule]
    while True:
        _log_step(steps[-1], search.params)
        if enough(steps[-1]):
            return steps, "it was enough"
        proposed = rule(search, steps)
        if proposed is None:
            return steps, _reason(search, steps[-1])
        blend = blend_first(search, steps)
        spent = _spent(search, steps, blend)
        if spent:
            return steps, spent
        if blend:
            made = _blended(search, steps, blend, backend)
        else:
            made = _advance(search, steps, proposed, backend)
        steps = record(scratch, [*steps, made])


def _reason(search: Search, last: Step) -> str:
    """Why a rule proposes nothing more after this step."""
    rule = search.plan.method.rule
    params = search.params
    if rule in (*ITERATIVE, "merge") and solved(search, last):
        if last.prices:
            return "all limits are met within noise, or kept at price 0"
        if abs(last.cost - search.target) > params.z * last.cost_se:
            return "the limit is kept at lambda 0"
        return f"cost within noise of the {'limit' if search.target == params.limit else 'target'}"
    if rule == "projected_subgradient":
        return "lambda is at the end of its interval"
    return f"rule {rule} is finished"


# --- the budget -----------------------------------------------------------------------------------


def answers_drawn(plan: Plan, params: DualSearchParams, trained: bool) -> int:
    """How many answers a step draws: to be measured and, if it is trained on its own, for that."""
    drawn = params.prompts * params.samples_per_prompt
    if trained and plan.method.data in ("pool", "fresh_pairs"):
        drawn += params.refresh_prompts * params.refresh_samples
    if trained and params.policy_gradient is not None:
        drawn += params.policy_gradient.steps * params.policy_gradient.batch_size
    return drawn


def out_of_tokens(params: DualSearchParams) -> str:
    """Why a search stopped whose next step would exceed `max_tokens`."""
    return f"budget of {params.max_tokens} generated tokens is spent"


def _spent(search: Search, steps: Sequence[Step], blend: Blend | None) -> str | None:
    """The budget that the next step would exceed, if any."""
    rule = search.plan.method.rule
    params = search.params
    budget = {"merge": params.merge_steps, "grid": len(params.grid)}.get(rule, params.max_trainings)
    if blend is None and sum(step.blend is None for step in steps) > budget:
        what = "merge" if rule == "merge" else "training"
        return f"budget of {budget} {what}{'' if budget == 1 else 's'} is spent"
    trains = rule != "merge" and blend is None
    return out_of_tokens(params) if _unaffordable(search, steps, trains) else None


def _unaffordable(search: Search, steps: Sequence[Step], trains: bool) -> bool:
    """Whether the next step, with answers as long as the last's, would exceed `max_tokens`."""
    params = search.params
    if params.max_tokens is None:
        return False
    last = steps[-1]
    length = last.measured.generated_tokens / answers_drawn(search.plan, params, last.trained)
    spent = sum(step.measured.generated_tokens for step in steps)
    return spent + length * answers_drawn(search.plan, params, trains) > params.max_tokens


# --- steps ----------------------------------------------------------------------------------------


def _first(search: Search, start: str, backend: SearchBackend) -> Step:
    """The start; by a merge rule it is the merge of weight 1, so that its screening is one."""
    context = search.context
    known: dict[str, Any] = {"prices": context.prices}
    pool = None
    if search.asks_pool and search.plan.method.rule == "merge":
        pool = backend.on_pool(start)
        known["screened"] = [Screening(1.0, pool)]
    return _measured(search, backend, 0, context.lam_start, start, pool, **known)


def _advance(
    search: Search, steps: Sequence[Step], proposed: float, backend: SearchBackend
) -> Step:
    """The step that the rule asks for: a merge, an ascent, or a training."""
    number = len(steps)
    rule = search.plan.method.rule
    if rule == "merge":
        return _merged(search, steps, proposed, backend)
    if rule == "ascent":
        made = backend.ascend(number)
        history = made.history
        return _measured(
            search, backend, number, made.lam, made.policy, trained=True, history=history
        )
    last = steps[-1]
    prices: tuple[float, ...] = ()
    if last.prices:  # only Newton's rule begins with any
        prices = tuple(jointly(last, search.target, search.params.beta)[1:])
    policy = backend.train(number, proposed, last, prices or None)
    return _measured(search, backend, number, proposed, policy, trained=True, prices=prices)


def _merged(search: Search, steps: Sequence[Step], proposed: float, backend: SearchBackend) -> Step:
    context = search.context
    number = len(steps)
    q, pool, screened = proposed, None, list[Screening]()
    if search.asks_pool:
        screened = screened_weights(search, steps, proposed, backend.screen)
        q, pool = screened[-1].q, screened[-1].pool
    lam = merge_multiplier(q, context.lam_start, context.naive, context.lam_reference)
    policy = backend.merge(number, q)
    return _measured(search, backend, number, lam, policy, q=q, screened=screened, pool=pool)


def _blended(search: Search, steps: Sequence[Step], blend: Blend, backend: SearchBackend) -> Step:
    number = len(steps)
    first = steps[blend.first]
    second = steps[blend.second]
    log.info(
        "merging steps %d and %d, weight %.3f, in place of a training",
        blend.first,
        blend.second,
        blend.weight,
    )
    lam = merge_multiplier(blend.weight, second.lam, False, first.lam)
    policy = backend.blend(number, first.policy, second.policy, blend.weight)
    return _measured(search, backend, number, lam, policy, blend=blend)


def _close(search: Search, steps: Sequence[Step], backend: SearchBackend) -> Step:
    """The step that makes what the method returns from all steps of the search."""
    number = len(steps)
    lams = [step.lam for step in steps]
    if search.plan.method.returns == "mixture":
        mean = sum(lams) / number
        policy = backend.mix(number, steps)
        return _measured(search, backend, number, mean, policy, closing=True)
    mean = sum(tail(lams)) / len(tail(lams))
    policy = backend.train(number, mean, steps[-1])
    return _measured(search, backend, number, mean, policy, trained=True, closing=True)


def _measured(
    search: Search,
    backend: SearchBackend,
    number: int,
    lam: float,
    policy: str,
    pool: PoolCost | None = None,
    **more: Any,
) -> Step:
    """A step of the search: the policy, measured on its own answers and, where the pool has a say,
    on that, and its tilt."""
    known: dict[str, Any] = {"q": None, "trained": False, **more}
    measured = backend.measure(number, policy)
    if search.asks_pool:
        pool = _believed(number, measured, pool or backend.on_pool(policy), search.params)
    tilt = backend.tilt(policy)
    return Step(number, lam, policy=policy, measured=measured, tilt=tilt, pool=pool, **known)


def _believed(
    number: int, measured: Measurement, pool: PoolCost, params: DualSearchParams
) -> PoolCost | None:
    """What the pool says of a step's cost, if it has a say; the log tells where it has none."""
    said = believed(measured, pool, params.min_ess)
    if said is None:
        log.info(
            "step %d: the pool has no say in its cost: %.4g +- %.4g by %.1f effective samples a"
            " prompt that have %.4g +- %.4g of its mass, beside %.4f +- %.4f by its own answers",
            number, pool.cost, pool.cost_se, pool.ess, pool.mass, pool.mass_se,
            measured.cost, measured.cost_se,
        )  # fmt: skip
    return said


def _log_step(step: Step, params: DualSearchParams) -> None:
    m = step.measured
    log.info(
        "step %d: lambda %.4f, cost %.4f +- %.4f (limit %g), reward %.4f, KL %.3f",
        step.step, step.lam, step.cost, step.cost_se, params.limit, m.reward, m.kl,
    )  # fmt: skip
    numbers = {name: getattr(m, name) for name in _REPORTED}
    known = {"lambda": step.lam, "limit": params.limit, "cost": step.cost, "cost_se": step.cost_se}
    report({**known, **numbers}, step.step, "search")
