"""How much of what a tilt gains by the scores that choose it is there by other scores: pure
functions, and their page.

With n answers of pi_ref to each prompt, scores r, c of the pair that chooses and r', c' of the pair
that scorers,

    w = softmax((r - lambda c) / beta),   mean of sum_i w_i c_i = limit,
    share = sum w_i r'_i / sum w_i r_i over all

where every score is taken less its prompt's mean and in its own within-prompt standard deviations.
Were r' = a r + noise that knows nothing of the answers, the share would be their correlation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench import options
from dualign.core.schema import by_prompt
from dualign.math.dual.root import root
from dualign.math.dual.tilt import divergence, weights
from dualign.scoring.support import Doubt, columns
from dualign.training.fitting import crosswise

Array = np.ndarray

BELIEVED = "scores believed"
#: Change of reward and cost by the own pair's word, then by the other's; KL; the shares of both
#: changes that survive.
MEASURES = ("own_reward", "own_cost", "reward", "cost", "kl", "reward_share", "cost_share")


@dataclass(frozen=True)
class Side:
    """What one pair says of the pool, all [prompts, samples] less the prompt's mean.

    `doubted` holds the pessimistic reward by `pessimism.share`, `second` the reward of a model of
    the same half and another seed; the slope fitted to half of the held-out pairs is `halves` times
    that of all, that of training `raw`."""

    reward: Array
    cost: Array
    doubted: dict[float, Array]
    second: Array | None
    halves: tuple[float, ...]
    raw: float


@dataclass(frozen=True)
class Plan:
    """What is asked of the pool: answers of a large and of a small tilt, and the limit, `room`
    standard deviations of cost below the pool's mean; weights of a spread; the tilt's beta; and the
    resamples of the intervals."""

    samples: int
    few: int
    room: float
    weights: tuple[float, ...]
    beta: float
    lambda_max: float
    resamples: int
    seed: int


class Rule(NamedTuple):
    """A tilt: the reward it goes by, how many answers it chooses from, its own word for the reward,
    and its limit.
    """

    reward: Array
    samples: int
    own: Array
    room: float


def rules_of(side: Side, plan: Plan) -> dict[str, list[Rule]]:
    """The ways to choose; where one name has several rules, their mean is meant. The first is the
    yardstick.
    """
    many = plan.samples
    few = plan.few
    room = plan.room
    plain = side.reward
    asked, *further = side.doubted

    def by(reward: Array, samples: int = many, own: Array = plain, room: float = room) -> Rule:
        return Rule(reward, samples, own, room)

    pessimist = side.doubted[asked]
    return {
        BELIEVED: [by(plain)],
        "pessimism as in the params": [by(pessimist)],
        **{f"pessimism, share {share:g}": [by(side.doubted[share])] for share in further},
        f"believed, {few} answers": [by(plain, few)],
        f"pessimism, {few} answers": [by(pessimist, few)],
        "believed, slope of training": [by(plain * side.raw)],
        "believed, slope by half of the held-out pairs": [by(plain * half) for half in side.halves],
        f"before: believed, slope by half, {few} answers": [
            by(plain * half, few) for half in side.halves
        ],
        "believed, no limit": [by(plain, room=-np.inf)],
        "pessimism, no limit": [by(pessimist, room=-np.inf)],
        **(_ensembles(side, side.second, pessimist, plan) if side.second is not None else {}),
    }


def _ensembles(side: Side, second: Array, pessimist: Array, plan: Plan) -> dict[str, list[Rule]]:
    """Ways to choose by two reward models: their mean, less their standard deviation, or less the
    pessimism.
    """
    mean = (side.reward + second) / 2
    spread = np.abs(side.reward - second) / 2
    rewards = {
        "mean of two reward models": mean,
        **{
            f"the same less {weight:g} x their spread": mean - weight * spread
            for weight in plan.weights
        },
        "the same, pessimism": mean + pessimist - side.reward,
    }
    return {name: [Rule(reward, plan.samples, mean, plan.room)] for name, reward in rewards.items()}


def changes(rule: Rule, side: Side, other: Side, plan: Plan, share: Array) -> Array:
    """What a rule changes by its own pair's word and by the other's: [reward, cost, reward, cost,
    KL; prompts].

    Scores in within-prompt standard deviations of who speaks, KL in nats. `share` [prompts] weighs
    the prompts. The multiplier for every other prompt is chosen on the rest. A tilt of n answers is
    a policy of its own, which draws n and takes one by its weight, so its mean over the answers has
    no bias. Answers beyond are further blocks of n."""
    said = np.stack([_in_units(score) for score in (rule.own, side.cost, other.reward, other.cost)])
    limit = -rule.room * float(np.sqrt((side.cost**2).mean()))
    found = np.zeros((5, len(share)))
    starts = range(0, said.shape[2], rule.samples)
    for start in starts:
        block = slice(start, start + rule.samples)
        reward = rule.reward[:, block]
        cost = side.cost[:, block]
        for fit, judge in crosswise(pd.Series(np.arange(len(share)))):
            lam = root(
                reward[fit],
                cost[fit],
                limit=limit,
                beta=plan.beta,
                lambda_max=plan.lambda_max,
                share=share[fit],
            )
            given = (reward[judge], cost[judge], lam, plan.beta)
            found[:4, judge] += (weights(*given) * said[:, judge, block]).sum(-1)
            found[4, judge] += divergence(*given)
    return found / len(starts)


def _in_units(score: Array) -> Array:
    found: Array = score / np.sqrt((score**2).mean())
    return found


def measures(sides: Sequence[Side], plan: Plan, share: Array) -> Array:
    """Numbers of every way to choose, in the order of MEASURES; [ways, both roles and their mean,
    measures].

    `share` [prompts] weighs the prompts. A share that survives is a ratio of means, so that a small
    gain weighs little."""
    roles = [
        _role(side, other, plan, share) for side, other in zip(sides, reversed(sides), strict=True)
    ]
    found = np.stack([*roles, np.mean(roles, axis=0)], axis=1)
    return np.concatenate(
        [found, found[..., 2:3] / found[..., 0:1], found[..., 3:4] / found[..., 1:2]], axis=-1
    )


def _role(side: Side, other: Side, plan: Plan, share: Array) -> Array:
    """What the ways to choose change where `side` chooses; [ways, 5]."""
    table = []
    for rules in rules_of(side, plan).values():
        each = [changes(rule, side, other, plan, share) for rule in rules]
        table.append(np.mean(each, axis=0) @ (share / share.sum()))
    return np.array(table)


def judged(sides: Sequence[Side], plan: Plan) -> list[dict[str, Any]]:
    """A row for each way to choose: means over both roles with 95 % intervals, and differences from
    the yardstick.

    The intervals resample prompts, and choose the multipliers anew.
    """
    count = len(sides[0].reward)
    whole = measures(sides, plan, np.full(count, 1 / count))
    rng = np.random.default_rng(plan.seed)
    drawn = np.zeros((plan.resamples, count))
    for half, _ in crosswise(
        pd.Series(np.arange(count))
    ):  # each half is resampled by itself: none is left empty
        drawn[:, half] = (
            rng.multinomial(half.sum(), np.full(half.sum(), 1 / half.sum()), size=plan.resamples)
            / count
        )
    resampled = np.array([measures(sides, plan, share)[:, -1] for share in drawn])
    rows = []
    for i, name in enumerate(rules_of(sides[0], plan)):
        row = {
            key: _estimate(whole[i, -1, j], resampled[:, i, j]) for j, key in enumerate(MEASURES)
        }
        against = (whole[i, -1] - whole[0, -1], resampled[:, i] - resampled[:, 0])
        more = {key: _estimate(against[0][j], against[1][:, j]) for j, key in enumerate(MEASURES)}
        roles = [dict(zip(MEASURES, map(float, role), strict=True)) for role in whole[i, :-1]]
        rows.append({"rule": name, **row, "more": more, "roles": roles})
    return rows


def _estimate(mean: float, resampled: Array) -> list[float]:
    return [float(mean), *map(float, np.quantile(resampled, [0.025, 0.975]))]


def centred(frame: pd.DataFrame, name: str) -> Array:
    """A column of the pool as [prompts, samples], less the prompt's mean, to which no tilt and no
    change is open.
    """
    values = by_prompt(frame, name)
    found: Array = values - values.mean(1, keepdims=True)
    return found


def unlike(pool: pd.DataFrame, sides: Sequence[Side], found: Doubt) -> list[dict[str, Any]]:
    """What the answers beyond the edge of the support look like, beside the others; rewards in
    standard deviations.
    """
    off = found.beyond(pool) > 0
    rewards = np.stack([(side.reward / side.reward.std()).ravel() for side in sides])
    surprise = found.support.surprise(*columns(pool))
    values = pool.assign(
        z=surprise, a=rewards[0], b=rewards[1], nats=-pool["logp_ref"] / pool["length"]
    )
    rows = []
    for name, chosen in (("off the support", off), ("on it", ~off)):
        own = values[chosen]
        numbers = {
            "prompts": own["prompt_id"].nunique(),
            "tokens": own["length"].median(),
            "ended": own["ended"].mean(),
            "nats a token": own["nats"].mean(),
            "z": own["z"].mean(),
            "reward by A": own["a"].mean(),
            "reward by B": own["b"].mean(),
        }
        known = {key: float(value) if len(own) else None for key, value in numbers.items()}
        rows.append({"answers": name, "count": len(own), **known})
    return rows


def agreement(sides: Sequence[Side]) -> dict[str, float]:
    """Correlations of scores within prompts."""
    first, second = sides
    pairs = {
        "reward of A and of B": (first.reward, second.reward),
        "cost of A and of B": (first.cost, second.cost),
        "reward and cost of A": (first.reward, first.cost),
        "reward and cost of B": (second.reward, second.cost),
    }
    for name, side in zip("AB", sides, strict=True):
        if side.second is not None:
            pairs[f"reward of {name} and of its second model"] = (side.reward, side.second)
    return {
        name: float(np.corrcoef(one.ravel(), other.ravel())[0, 1])
        for name, (one, other) in pairs.items()
    }


# --- the page -------------------------------------------------------------------------------------

_COLUMNS = {
    "reward, own word": ("own_reward", False),
    "reward, the other's": ("reward", False),
    "share that survives": ("reward_share", False),
    "cost, own word": ("own_cost", False),
    "cost, the other's": ("cost", False),
    "share": ("cost_share", False),
    "KL": ("kl", False),
    "more reward, the other's": ("reward", True),
    "more share": ("reward_share", True),
}


def page(command: str, found: dict[str, Any]) -> str:
    """The page in markdown."""
    lines = options.head(["the tilt goes by", *_COLUMNS])
    for row in found["rules"]:
        cells = [_cell((row["more"] if more else row)[key]) for key, more in _COLUMNS.values()]
        lines.append(options.line([row["rule"], *cells]))
    pool = [list(row.values()) for row in found["pool"]]
    return options.page(
        "What an independent pair of scorers sees of the tilt's gain",
        command,
        found["about"],
        "\n".join(lines),
        _NOTES,
        (
            "\n".join([*options.head(list(found["pool"][0])), *map(_line, pool)])
            if pool
            else "No pessimism is asked for."
        ),
        "\n".join(
            [*options.head(["scorers", *found["scorers"]]), *map(_line, _across(found["scorers"]))]
        ),
        "\n".join(
            [
                *options.head(["correlation within prompts", ""]),
                *map(_line, found["agreement"].items()),
            ]
        ),
    )


def _across(table: dict[str, dict[str, float]]) -> list[list[Any]]:
    return [[key, *map(itemgetter(key), table.values())] for key in table["A"]]


def _line(cells: Iterable[Any]) -> str:
    words = [
        f"{cell:.3g}" if isinstance(cell, float) else str("–" if cell is None else cell)
        for cell in cells
    ]
    return options.line(words)


def _cell(estimate: Sequence[float]) -> str:
    mean, low, high = estimate
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


_NOTES = """\
How to read it: each pair of scorers chooses once and judges once, and the numbers are means over
both roles, with 95 %
intervals over resampled prompts. Changes of reward and cost are those from the base, in
within-prompt standard deviations of the pair that speaks. Own word is what the scores of the pair
that chooses say, without a penalty. The share that survives is the other's change over it. `more`
is the difference from the first row, on the same resamples. The multiplier for every other prompt
is found on the rest. Slope of training is the reward without a calibration; the calibrations are
lines, so at a limit that is relative to the pool that of the cost changes nothing. Both pairs begin
from one base: an error that they inherit from it counts as surviving."""
