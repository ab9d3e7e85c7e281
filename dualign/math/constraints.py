"""Additional constraints beside the one on the mean cost: P(unsafe), CVaR, length, unended answers,
or cost on some prompts.

Every quantity is the mean of a function f_k of an answer, so the optimum stays in closed form,

    pi ~ pi_ref exp((r - lambda c - sum_k lambda_k m_k f_k) / beta),

with m_k(x) = 1 on the prompts that limit k is on, and multipliers from one convex dual
(`dualign.math.pricing`). The prices lambda_k can therefore be charged to the reward of a method
that trains on r and c: r' = r - sum_k lambda_k m_k f_k."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.records import PriceRow
from dualign.core.schema import Message, last_user_text
from dualign.math.dual.tail import shortfall
from dualign.params.base import SHARES, Quantity
from dualign.params.dual import ConstraintSpec

Array = np.ndarray


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
        """The quantity of answers, any shape, by cost, length in tokens, and whether they ended."""
        if self.quantity == "cvar":
            assert self.threshold is not None and self.level is not None
            return shortfall(cost, self.threshold, self.level)
        known = {
            "cost": cost,
            "p_unsafe": cost > 0,
            "length": length,
            "unended": np.logical_not(ended),
        }
        return np.asarray(known[self.quantity], float)

    def bounds(self, cost: tuple[float, float] | None, longest: int) -> tuple[float, float] | None:
        """The quantity's range, by that of cost (None: unknown) and the longest answer's tokens."""
        if self.quantity in ("cost", "cvar"):
            if cost is None:
                return None
            low, high = self.values(np.array(cost), np.zeros(2), np.ones(2)).tolist()
            return low, high
        return (0.0, 1.0) if self.quantity in SHARES else (0.0, float(longest))

    def applies(self, prompts: Sequence[Sequence[Message]]) -> Array:
        """Whether the limit is on each prompt, whose last user text has its pattern; bool
        [prompts]."""
        if self.prompts is None:
            return np.ones(len(prompts), bool)
        pattern = re.compile(self.prompts)
        return np.array(
            [pattern.search(last_user_text(prompt)) is not None for prompt in prompts], bool
        )


def constraint(name: str, spec: ConstraintSpec) -> Constraint:
    """A row of `constraint.additional`; a CVaR's threshold is not known yet.

    >>> short = constraint("short", ConstraintSpec(quantity="length", limit=80))
    >>> short.key, short.applies([]).tolist()
    ('constraint.additional.short', [])
    """
    return Constraint(name, spec.quantity, spec.limit, spec.level, spec.prompts)


@dataclass(frozen=True)
class Price:
    """A constraint, its multiplier in reward per unit of its quantity, and the mean it predicts."""

    constraint: Constraint
    lam: float
    predicted: float

    def as_dict(self) -> dict[str, Any]:
        """As `prices` in data/dual/dual.json holds it."""
        return {**asdict(self.constraint), "lam": self.lam, "predicted": self.predicted}


def prices_in(rows: Iterable[PriceRow]) -> list[Price]:
    """The prices of a solved dual by its rows in data/dual/dual.json.

    >>> one = Price(Constraint("short", "length", limit=80.0), lam=0.01, predicted=80.0)
    >>> prices_in([PriceRow(**one.as_dict())]) == [one]
    True
    """
    return [
        Price(Constraint(**row.model_dump(exclude={"lam", "predicted"})), row.lam, row.predicted)
        for row in rows
    ]


def with_priced_rewards(
    frame: pd.DataFrame,
    prices: Sequence[Price],
    lengths: Callable[[Sequence[str]], Sequence[int]] | None = None,
) -> pd.DataFrame:
    """A table with r' = r - sum_k lambda_k f_k in place of its rewards, on the prompts that each
    limit is on.

    `frame` is of schema POOL, ANSWERS or SCORED_PAIRS, with the cost model's costs. Pairs hold no
    lengths: `lengths` counts the tokens of answers, EOS included, and is called only if a price is
    on length. The answers of pairs all ended. Without prices the table is returned as it is.

    A token costs 0.01 of reward:

    >>> one = Price(Constraint("short", "length", limit=80.0), lam=0.01, predicted=80.0)
    >>> answers = {"prompt": [[], []], "cost": 0.0, "ended": True, "reward": 1.0}
    >>> with_priced_rewards(pd.DataFrame(answers | {"length": [10, 50]}), [one])["reward"].tolist()
    [0.9, 0.5]
    """
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
