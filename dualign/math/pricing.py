"""Prices of additional constraints: the multipliers of all limits, solved together on a pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dualign.core.errors import InfeasibleError, ParamsError
from dualign.core.schema import Message
from dualign.math.constraints import Constraint, Price, constraint
from dualign.math.dual.joint import JointSolution, joint_bias, solve_many
from dualign.math.dual.root import root
from dualign.math.dual.tail import value_at_risk
from dualign.params.dual import ConstraintSpec

Array = np.ndarray
#: Thresholds that are tried for a CVaR, first over the whole range and then in rounds around the
#: best.
_GRID = 25
_ZOOM = 9
_ROUNDS = 3
#: Times that limits are moved by the bias at the multipliers before; some ten do.
_CORRECTIONS = 50


@dataclass(frozen=True)
class Scored:
    """A pool as arrays [prompts, samples], with its prompts: what limits are solved on."""

    reward: Array
    cost: Array
    length: Array
    ended: Array
    prompts: Sequence[Sequence[Message]]


def price(
    pool: Scored,
    additional: Mapping[str, ConstraintSpec],
    *,
    limit: float,
    beta: float,
    lambda_max: float,
    jackknife: bool = False,
) -> list[Price]:
    """Prices of the limits `additional`, solved together with E[c] <= limit.

    The threshold of a CVaR is searched for, on a grid that is refined three times, to make the
    optimum largest; of several CVaRs each in turn, with the thresholds before it held. `lambda_max`
    as in `solve_many`. `jackknife` takes the bias of few samples out of the means that are held to
    the limits, once the thresholds stand.

    Raises:
        InfeasibleError: the limits cannot be kept together.
        ParamsError: a limit's `prompts` matches no prompt of the pool.

    A safe and an unsafe answer, and the unsafe one is longer; what the cost's limit keeps is free:

    >>> zeros, longer = np.zeros((4, 2)), np.tile([0.0, 1.0], (4, 1))
    >>> pool = Scored(zeros, cost=longer, length=10 * longer, ended=zeros == 0, prompts=[[]] * 4)
    >>> short = {"short": ConstraintSpec(quantity="length", limit=4)}
    >>> found = price(pool, short, limit=0.25, beta=1.0, lambda_max=10.0)
    >>> found[0].lam, round(found[0].predicted, 6)
    (0.0, 2.5)
    """
    if not additional:
        return []
    limits = [constraint(name, spec) for name, spec in additional.items()]
    for added in limits:
        _check(added, pool)
    # Alone the limit must be within reach: `root` says what would do.
    root(pool.reward, pool.cost, limit=limit, beta=beta, lambda_max=lambda_max)

    def solved(chosen: Sequence[Constraint], shift: Array | None = None) -> JointSolution:
        own = np.array([limit, *(added.limit for added in chosen)])
        costs, members = _quantities(pool, chosen)
        return solve_many(
            pool.reward,
            costs,
            limits=(own if shift is None else own + shift).tolist(),
            beta=beta,
            members=members,
            names=["constraint.limit", *(f"{added.key}.limit" for added in chosen)],
            lambda_max=lambda_max,
        )

    placed = [added for added in limits if added.quantity != "cvar"]
    for added in limits:
        if added.quantity == "cvar":
            placed.append(_with_threshold(added, pool, lambda tried: solved([*placed, tried])))
    joint = solved(placed)
    if jackknife:
        joint = _corrected(joint, pool, placed, beta, lambda shift: solved(placed, shift))
    by_name = {
        added.name: Price(added, float(lam), float(mean))
        for added, lam, mean in zip(placed, joint.lams[1:], joint.predicted[1:], strict=True)
    }
    return [by_name[name] for name in additional]


def _quantities(pool: Scored, chosen: Sequence[Constraint]) -> tuple[Array, Array]:
    """The cost and the quantities of these limits [K, prompts, samples], and the prompts that each
    is on [K, prompts].
    """
    everywhere = np.ones(len(pool.cost), bool)
    values = [added.values(pool.cost, pool.length, pool.ended) for added in chosen]
    members = [added.applies(pool.prompts) for added in chosen]
    return np.array([pool.cost, *values]), np.array([everywhere, *members])


def _corrected(
    joint: JointSolution,
    pool: Scored,
    chosen: Sequence[Constraint],
    beta: float,
    solved: Callable[[Array], JointSolution],
) -> JointSolution:
    """The solution whose means keep the limits once their bias of few samples is taken off.

    Each limit is moved by the bias at the multipliers before, until these stay where they are.
    Where that leads out of the samples' reach, too few of them count for a correction, and the
    solution stays as it was."""
    costs, members = _quantities(pool, chosen)
    found = joint
    for _ in range(_CORRECTIONS):
        before = found.lams
        shift = joint_bias(pool.reward, costs, before, beta=beta, members=members)
        try:
            found = solved(shift)
        except InfeasibleError:
            return joint
        found = found._replace(predicted=found.predicted - shift)
        if np.allclose(found.lams, before, rtol=1e-10, atol=1e-12):
            break
    return found


def _check(added: Constraint, pool: Scored) -> None:
    """Raises where a limit is on no prompt of the pool, or too many have no sample that ended."""
    members = added.applies(pool.prompts)
    if not members.any():
        raise ParamsError(
            f"{added.key}.prompts: {added.prompts!r} is found in no prompt of the pool; change it"
        )
    never = 1 - float(pool.ended[members].any(1).mean())
    if added.quantity == "unended" and never > added.limit:
        raise InfeasibleError(
            f"{added.key}.limit {added.limit:g} is out of the samples' reach: {100 * never:.3g}"
            " % of the prompts have no sample that ended; raise generation.max_new_tokens, or the"
            " limit above that"
        )


def _with_threshold(
    added: Constraint, pool: Scored, solved: Callable[[Constraint], JointSolution]
) -> Constraint:
    """The CVaR with the best threshold for the optimum, between the lowest cost and the limit.

    Above the limit t alone breaks it. An optimal t is the value at risk of the optimal policy,
    hence the cost of a sample; the first grid is made of quantiles of these."""

    def worth(threshold: float) -> float:
        try:
            return solved(replace(added, threshold=threshold)).value
        except InfeasibleError:
            return -np.inf

    cost = pool.cost[added.applies(pool.prompts)]
    least = cost.min(1)
    floor = replace(added, threshold=value_at_risk(least, np.ones(len(least)), added.level or 0.0))
    reached = float(floor.values(least, np.zeros_like(least), np.ones_like(least)).mean())
    if reached > added.limit:
        raise InfeasibleError(
            f"{added.key}.limit {added.limit:g} is out of the samples' reach: the least costly"
            f" samples of the prompts have a CVaR of {reached:.4g}; raise it above that, or draw"
            " more (score.samples_per_prompt)"
        )
    gains: dict[float, float] = {}
    grid = np.quantile(cost[cost <= added.limit], np.linspace(0, 1, _GRID))
    for _ in range(1 + _ROUNDS):
        gains |= {float(t): worth(float(t)) for t in grid if float(t) not in gains}
        tried = sorted(gains)
        best = max(range(len(tried)), key=lambda i: gains[tried[i]])
        grid = np.linspace(tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)], _ZOOM)
    if np.isfinite(gains[tried[best]]):
        return replace(added, threshold=tried[best])
    solved(floor)  # says what is in conflict
    return floor
