"""Additional constraints beside the one on the mean cost: P(unsafe), CVaR, length, unended answers,
or cost on some prompts.

Every quantity is the mean of a function f_k of an answer, so the optimum stays in closed form,

    pi ~ pi_ref exp((r - lambda c - sum_k lambda_k m_k f_k) / beta),

with m_k(x) = 1 on the prompts that limit k is on, and multipliers from one convex dual
(`dual.solve_many`). The prices
lambda_k can therefore be charged to the reward of a method that trains on r and c: r' = r - sum_k
lambda_k m_k f_k.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.errors import InfeasibleError, ParamsError
from dualign.core.schema import Message, last_user_text
from dualign.math import dual
from dualign.params.base import SHARES, Quantity
from dualign.params.dual import ConstraintSpec

Array = np.ndarray
#: Thresholds that are tried for a CVaR, first over the whole range and then in rounds around the
#: best.
_GRID, _ZOOM, _ROUNDS = 25, 9, 3


@dataclass(frozen=True)
class Constraint:
    """A limit on the mean of one quantity over the prompts that `prompts` matches (None: all).

    `cost`: c. `p_unsafe`: 1{c > 0}. `length`: tokens. `unended`: 1{cut at the most tokens that are
    drawn, before EOS}. `cvar`: t + (c - t)_+ / (1 - level) with t = `threshold`, whose mean bounds
    CVaR_level(c) from above for every t and is equal to it at the best one (Rockafellar and Uryasev
    2000)."""

    name: str
    quantity: Quantity
    limit: float
    level: float | None = None
    prompts: str | None = None
    threshold: float | None = None

    @property
    def key(self) -> str:
        """Where it stands in the parameter file."""
        return f"constraint.additional.{self.name}"

    def values(self, cost: Array, length: Array, ended: Array) -> Array:
        """The quantity of each answer, of any shape, from its cost, its length in tokens, and
        whether it ended.
        """
        if self.quantity == "cvar":
            assert self.threshold is not None and self.level is not None
            return dual.shortfall(cost, self.threshold, self.level)
        known = {
            "cost": cost,
            "p_unsafe": cost > 0,
            "length": length,
            "unended": np.logical_not(ended),
        }
        return np.asarray(known[self.quantity], float)

    def bounds(self, cost: tuple[float, float] | None, longest: int) -> tuple[float, float] | None:
        """The range of the quantity, from that of the cost (None: not known) and the longest answer
        in tokens.
        """
        if self.quantity in ("cost", "cvar"):
            if cost is None:
                return None
            low, high = self.values(np.array(cost), np.zeros(2), np.ones(2)).tolist()
            return low, high
        return (0.0, 1.0) if self.quantity in SHARES else (0.0, float(longest))

    def applies(self, prompts: Sequence[Sequence[Message]]) -> Array:
        """Whether the limit is on each prompt: its pattern is found in the last user text; shape
        [prompts], bool.
        """
        if self.prompts is None:
            return np.ones(len(prompts), bool)
        pattern = re.compile(self.prompts)
        return np.array(
            [pattern.search(last_user_text(prompt)) is not None for prompt in prompts], bool
        )


def constraint(name: str, spec: ConstraintSpec) -> Constraint:
    """A row of `constraint.additional`; a CVaR's threshold is not known yet."""
    return Constraint(name, spec.quantity, spec.limit, spec.level, spec.prompts)


@dataclass(frozen=True)
class Price:
    """A constraint with its multiplier, in units of reward for one unit of its quantity, and the
    mean it predicts.
    """

    constraint: Constraint
    lam: float
    predicted: float

    def as_dict(self) -> dict[str, Any]:
        """As `prices` in data/dual/dual.json holds it."""
        return {**asdict(self.constraint), "lam": self.lam, "predicted": self.predicted}


def prices_in(solved: Mapping[str, Any]) -> list[Price]:
    """The prices of a solved dual, the content of data/dual/dual.json."""
    rows = [dict(row) for row in solved.get("prices", [])]
    return [
        Price(lam=row.pop("lam"), predicted=row.pop("predicted"), constraint=Constraint(**row))
        for row in rows
    ]


# --- from limits to prices ------------------------------------------------------------------------


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
) -> list[Price]:
    """Prices of the limits `additional`, solved together with E[c] <= limit.

    The threshold of a CVaR is searched for, on a grid that is refined three times, to make the
    optimum largest; of several CVaRs each in turn, with the thresholds before it held. `lambda_max`
    as in `dual.solve_many`.

    Raises:
        InfeasibleError: the limits cannot be kept together.
        ParamsError: a limit's `prompts` matches no prompt of the pool.
    """
    if not additional:
        return []
    limits = [constraint(name, spec) for name, spec in additional.items()]
    for added in limits:
        _check(added, pool)
    dual.root(
        pool.reward, pool.cost, limit=limit, beta=beta, lambda_max=lambda_max
    )  # alone it must be within reach

    def solved(chosen: Sequence[Constraint]) -> dual.JointSolution:
        members = [
            np.ones(len(pool.cost), bool),
            *(added.applies(pool.prompts) for added in chosen),
        ]
        return dual.solve_many(
            pool.reward,
            [
                pool.cost,
                *(added.values(pool.cost, pool.length, pool.ended) for added in chosen),
            ],
            limits=[limit, *(added.limit for added in chosen)],
            beta=beta,
            members=members,
            names=["constraint.limit", *(f"{added.key}.limit" for added in chosen)],
            lambda_max=lambda_max,
        )

    placed = [added for added in limits if added.quantity != "cvar"]
    for added in limits:
        if added.quantity == "cvar":
            placed.append(_with_threshold(added, pool, lambda tried: solved([*placed, tried])))
    found = solved(placed)
    by_name = {
        added.name: Price(added, float(lam), float(mean))
        for added, lam, mean in zip(placed, found.lams[1:], found.predicted[1:], strict=True)
    }
    return [by_name[name] for name in additional]


def _check(added: Constraint, pool: Scored) -> None:
    """Raises where a limit is on no prompt of the pool, or where too many have no sample that
    ended.
    """
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
    added: Constraint, pool: Scored, solved: Callable[[Constraint], dual.JointSolution]
) -> Constraint:
    """The CVaR with the threshold at which the optimum is largest, between the lowest cost and the
    limit.

    Above the limit t alone breaks it. An optimal t is the value at risk of the optimal policy,
    hence the cost of a sample; the first grid is made of quantiles of these."""

    def worth(threshold: float) -> float:
        try:
            return solved(replace(added, threshold=threshold)).value
        except InfeasibleError:
            return -np.inf

    cost = pool.cost[added.applies(pool.prompts)]
    least = cost.min(1)
    floor = replace(
        added, threshold=dual.value_at_risk(least, np.ones(len(least)), added.level or 0.0)
    )
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


# --- from prices to scores ------------------------------------------------------------------------


def with_priced_rewards(
    frame: pd.DataFrame,
    prices: Sequence[Price],
    lengths: Callable[[Sequence[str]], Sequence[int]] | None = None,
) -> pd.DataFrame:
    """A table with r' = r - sum_k lambda_k f_k in place of its rewards, on the prompts that each
    limit is on.

    `frame` is of schema POOL, ANSWERS or SCORED_PAIRS, with the cost model's costs. Pairs hold no
    lengths: `lengths` counts the tokens of answers, EOS included, and is called only if a price is
    on length. The answers of pairs all ended. Without prices the table is returned as it is."""
    if not prices:
        return frame
    prompts = frame["prompt"].tolist()
    on_length = any(found.constraint.quantity == "length" for found in prices)
    columns = {}
    for side in [""] if "reward" in frame else ["_chosen", "_rejected"]:
        cost = frame[f"cost{side}"].to_numpy(float)
        length = _lengths(frame, side, lengths) if on_length else np.zeros_like(cost)
        ended = np.ones_like(cost) if side else frame["ended"].to_numpy(float)
        charge = sum(
            found.lam
            * found.constraint.applies(prompts)
            * found.constraint.values(cost, length, ended)
            for found in prices
        )
        columns[f"reward{side}"] = frame[f"reward{side}"].to_numpy(float) - charge
    return frame.assign(**columns)


def _lengths(
    frame: pd.DataFrame, side: str, count: Callable[[Sequence[str]], Sequence[int]] | None
) -> Array:
    if not side:
        return frame["length"].to_numpy(float)
    if count is None:
        raise ValueError(
            "a price on length needs `lengths`, which counts the tokens of the pairs' answers"
        )
    return np.asarray(count(frame[side.removeprefix("_")].tolist()), float)
