"""Policies ranked by battles: Bradley-Terry and Elo, win rates, and those at equal length.

A battle is a row: `first` and `second` (policies), `prompt_id`, and `score`, 1 where the answer of
the first won, 0 where that of the second did, 1/2 for a tie. A judgement that failed is no battle
and no tie. Prompts are drawn, so intervals draw them with replacement, with all their battles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from dualign.core.errors import DataError
from dualign.evaluation.stats import (
    Estimate,
    clustered_share,
    drawn_ends,
    redrawn,
    share_of,
)

Array = np.ndarray

#: Elo's scale: 400 points are odds of 10 to 1, and the mean of all policies is here.
_ELO_MEAN = 1000.0
_ELO_SCALE = 400.0 / math.log(10)
#: Wins that are added to both sides of every pair that met, so that a strength stays finite where
#: one side won all (Haldane's correction of log-odds).
_PRIOR = 0.5
#: Newton's steps, none above 1, until all are below the last.
_STEPS = 100
#: Ratings of draws that differ by less are the rounding of equal ones.
_ROUNDING = 1e-6
_CLOSE = 1e-10
#: How often all prompts are drawn again for draws in which all policies met.
_ROUNDS = 20
#: Inverse weight of the ridge on the slope in length, which is of order 1: weak, and finite where
#: lengths part wins from losses.
_SLOPE_FREEDOM = 10.0


@dataclass(frozen=True)
class WinRate:
    """How often a policy beats another: `rate` by prompt with its interval, ties as half a win; the
    share of ties; and the number of battles."""

    rate: Estimate
    ties: float
    battles: int


# --- Bradley-Terry --------------------------------------------------------------------------------


def bradley_terry(wins: Array) -> Array:
    """Log-strengths s of mean 0 in P(i beats j) = sigma(s_i - s_j) (Bradley and Terry 1952).

    `wins[..., i, j]` counts wins of i over j, a tie as half a win of both; shape [..., policies,
    policies], one ranking for each of the first dimensions.

    Raises:
        DataError: the policies fall into groups that never met.

    >>> strengths = bradley_terry(np.array([[0, 3], [1, 0]]))
    >>> round(float(np.exp(strengths[0] - strengths[1])), 3)
    2.333
    """
    table = np.asarray(wins, dtype=float)
    met = table + table.swapaxes(-1, -2) > 0
    if not _linked(met.reshape(-1, *met.shape[-2:])).all():
        raise DataError("some policies never met the others, so no ranking holds them all")
    table = table + _PRIOR * met
    count = table.shape[-1]
    strengths = np.zeros(table.shape[:-1])
    for _ in range(_STEPS):
        gap = strengths[..., :, None] - strengths[..., None, :]
        pull = table * expit(-gap)
        slope = pull.sum(-1) - pull.sum(-2)
        weight = (table + table.swapaxes(-1, -2)) * expit(gap) * expit(-gap)
        curvature = np.eye(count) * weight.sum(-1)[..., None] - weight + 1 / count
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        strengths = strengths + step.clip(-1, 1)
        if np.abs(step).max() < _CLOSE:
            break
    return strengths - strengths.mean(-1, keepdims=True)


def _linked(met: Array) -> Array:
    """Whether each table [tables, policies, policies] of who met whom holds together."""
    reach = met | np.eye(met.shape[-1], dtype=bool)
    for _ in range(met.shape[-1].bit_length()):  # each time as far again
        reach = reach @ reach
    return np.asarray(reach.all((-1, -2)))


def elo(strengths: Array) -> Array:
    """Log-strengths on Elo's scale: 400 points for odds of 10 to 1, 1000 for the mean.

    >>> elo(np.log([10.0, 1.0])).round().tolist()
    [1400.0, 1000.0]
    """
    return _ELO_MEAN + _ELO_SCALE * np.asarray(strengths, dtype=float)


def wins_by_prompt(battles: pd.DataFrame, policies: list[str]) -> Array:
    """Wins of the first index over the second by prompt; [prompts, policies, policies].

    >>> rows = pd.DataFrame({"first": ["a"], "second": ["b"], "prompt_id": ["x"], "score": [0.5]})
    >>> wins_by_prompt(rows, ["a", "b"]).tolist()
    [[[0.0, 0.5], [0.5, 0.0]]]
    """
    prompts, names = pd.factorize(battles["prompt_id"])
    index = pd.Index(policies)
    first, second = (index.get_indexer(battles[side]) for side in ("first", "second"))
    score = battles["score"].to_numpy(float)
    table = np.zeros((len(names), len(policies), len(policies)))
    np.add.at(table, (prompts, first, second), score)
    np.add.at(table, (prompts, second, first), 1 - score)
    return table


def groups(battles: pd.DataFrame) -> list[pd.DataFrame]:
    """The battles of each group of policies that met, also by way of others: `rank` takes one
    group, since nothing sets two beside each other.

    >>> rows = {"first": ["a", "c"], "second": ["b", "d"], "prompt_id": [1, 2], "score": [1.0, 0.0]}
    >>> [group["first"].tolist() for group in groups(pd.DataFrame(rows))]
    [['a'], ['c']]
    """
    names = pd.Index(sorted({*battles["first"], *battles["second"]}))
    first, second = (names.get_indexer(battles[side]) for side in ("first", "second"))
    met = coo_array((np.ones(len(battles)), (first, second)), shape=(len(names), len(names)))
    count, group = connected_components(met, directed=False)
    return [battles[group[first] == number] for number in range(count)]


def rank(
    battles: pd.DataFrame, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Policies in order of strength: columns `policy`, `elo`, `low`, `high` and `battles`.

    Elo is relative: `low` and `high` are those of a policy's lead on the mean of all over draws of
    prompts (`drawn_ends`). To tell two apart take their own battles (`win_rate`). Draws tell
    nothing of a policy that won or lost all its battles, nor of one that they all rate alike, nor
    of any where there are few prompts, or where in most draws some never met: their ends are
    infinite.

    Raises:
        DataError: a battle has no score in [0, 1], or is a policy's with itself, or some policies
            never met the others (`groups`).

    >>> rows = pd.DataFrame({"first": "a", "second": "b", "prompt_id": [1, 2], "score": [1.0, 1.0]})
    >>> rank(rows)["policy"].tolist()
    ['a', 'b']
    """
    _check(battles)
    policies = sorted({*battles["first"], *battles["second"]})
    table = wins_by_prompt(battles, policies)
    ratings = elo(bradley_terry(table.sum(0)))
    low, high = _ends(table, confidence, draws, seed)
    fought = (table + table.transpose(0, 2, 1)).sum((0, 2)).round().astype(int)
    rows = {"policy": policies, "elo": ratings, "low": low, "high": high, "battles": fought}
    return pd.DataFrame(rows).sort_values("elo", ascending=False, ignore_index=True)


def _ends(table: Array, confidence: float, draws: int, seed: int) -> tuple[Array, Array]:
    """The ends of every policy's interval; infinite where draws tell nothing of it."""
    known = np.minimum(table.sum((0, 1)), table.sum((0, 2))) > 0
    drawn = _redrawn(table, draws, seed)
    if len(drawn) < draws:
        return np.full(len(known), -np.inf), np.full(len(known), np.inf)
    ratings = elo(bradley_terry(drawn))
    low, high = drawn_ends(ratings, len(table), confidence)
    known &= np.ptp(ratings, axis=0) > _ROUNDING
    return np.where(known, low, -np.inf), np.where(known, high, np.inf)


def _redrawn(table: Array, draws: int, seed: int) -> Array:
    """Wins of prompts drawn with replacement; a draw in which some never met is drawn again, and
    where most are such, fewer come."""
    generator = np.random.default_rng(seed)
    kept = np.zeros((0, *table.shape[1:]))
    for _ in range(_ROUNDS):
        wins = np.tensordot(redrawn(generator, len(table), draws), table, 1)
        whole = _linked(wins + wins.transpose(0, 2, 1) > 0)
        kept = np.concatenate([kept, wins[whole]])[:draws]
        if len(kept) == draws:
            break
    return kept


def _check(battles: pd.DataFrame) -> None:
    score = battles["score"].to_numpy(float)
    wrong = ~((score >= 0) & (score <= 1))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"battle {row + 1}: score is {score[row]:g}, expected 0 to 1; drop failures"
        )
    alone = (battles["first"] == battles["second"]).to_numpy()
    if alone.any():
        raise DataError(f"battle {int(alone.argmax()) + 1}: a policy against itself; drop the row")


# --- win rates ------------------------------------------------------------------------------------


def battles_against(verdicts: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The verdicts of a judge that compared answers with those of a policy `reference`, as battles.

    `verdicts` has columns `policy`, `prompt_id`, `sample` and `win` (1, 0, 1/2, or null for a
    failure, which is no battle).

    >>> rows = pd.DataFrame({"policy": "a", "prompt_id": [1, 2], "sample": 0, "win": [1.0, None]})
    >>> battles_against(rows, "ref")["score"].tolist()
    [1.0]
    """
    good = verdicts.dropna(subset=["win"])
    columns = {"policy": "first", "win": "score"}
    return good.rename(columns=columns).assign(second=reference).reset_index(drop=True)


def battles_by_score(scores: pd.DataFrame, column: str, *, more: bool = True) -> pd.DataFrame:
    """All policies against each other by a judge's scores of single answers: those to the same
    prompt with the same `sample` meet, and the higher `column` wins, or the lower unless `more`.

    `scores` has columns `policy`, `prompt_id`, `sample` and `column`, null for a failure, which
    meets nobody.

    >>> rows = pd.DataFrame({"policy": ["a", "b"], "prompt_id": 1, "sample": 0, "cost": [2.0, 1.0]})
    >>> battles_by_score(rows, "cost", more=False)[["first", "second", "score"]].values.tolist()
    [['a', 'b', 0.0]]
    """
    known = scores.dropna(subset=[column])[["policy", "prompt_id", "sample", column]]
    met = known.merge(known, on=["prompt_id", "sample"], suffixes=("_first", "_second"))
    met = met[met["policy_first"] < met["policy_second"]].reset_index(drop=True)
    lead = np.sign(met[f"{column}_first"].astype(float) - met[f"{column}_second"].astype(float))
    return pd.DataFrame(
        {
            "first": met["policy_first"],
            "second": met["policy_second"],
            "prompt_id": met["prompt_id"],
            "sample": met["sample"],
            "score": 0.5 + lead / 2 if more else 0.5 - lead / 2,
        }
    )


def with_lengths(battles: pd.DataFrame, lengths: pd.DataFrame) -> pd.DataFrame:
    """Battles with the length of both answers; `lengths` has that of each by `policy`, `prompt_id`
    and `sample`.

    >>> battle = pd.DataFrame({"first": ["a"], "second": ["b"], "prompt_id": [1], "sample": [0]})
    >>> rows = pd.DataFrame({"policy": ["a", "b"], "prompt_id": 1, "sample": 0, "length": [7, 9]})
    >>> with_lengths(battle, rows)[["length_first", "length_second"]].values.tolist()
    [[7.0, 9.0]]
    """
    by_answer = lengths.set_index(["policy", "prompt_id", "sample"])["length"]
    for side in ("first", "second"):
        keys = zip(battles[side], battles["prompt_id"], battles["sample"], strict=True)
        found = by_answer.reindex(list(keys)).to_numpy(float)
        battles = battles.assign(**{f"length_{side}": found})
    return battles


def battles_of(battles: pd.DataFrame, policy: str, against: str) -> pd.DataFrame:
    """The battles of two policies, turned so that `policy` is the first.

    >>> rows = pd.DataFrame({"first": ["a"], "second": ["b"], "prompt_id": ["x"], "score": [1.0]})
    >>> battles_of(rows, "b", "a")["score"].tolist()
    [0.0]
    """
    straight = battles[(battles["first"] == policy) & (battles["second"] == against)]
    turned = battles[(battles["first"] == against) & (battles["second"] == policy)]
    swapped = {"first": "second", "second": "first"} | {
        "length_first": "length_second",
        "length_second": "length_first",
    }
    turned = turned.rename(columns=swapped).assign(score=1 - turned["score"])
    own = pd.concat([straight, turned], ignore_index=True)
    if own.empty:
        raise DataError(f"policies {policy!r} and {against!r} never met")
    _check(own)
    return own


def win_rate(battles: pd.DataFrame, policy: str, against: str, confidence: float = 0.95) -> WinRate:
    """How often `policy` beats `against`: the mean over prompts of its score, ties as half.

    >>> rows = pd.DataFrame({"first": "a", "second": "b", "prompt_id": [1, 2], "score": [1.0, 0.5]})
    >>> win_rate(rows, "a", "b").rate.mean
    0.75
    """
    own = battles_of(battles, policy, against)
    score = own["score"].to_numpy(float)
    rate = clustered_share(score, own["prompt_id"].to_numpy(), confidence)
    return WinRate(rate, float((score == 0.5).mean()), len(own))


def length_controlled_win_rate(
    battles: pd.DataFrame, policy: str, against: str, confidence: float = 0.95
) -> Estimate:
    """The win rate that answers of equal length would have (Dubois et al., 2404.04475):
    P(win) = sigma(theta + phi tanh(d / sd(d))), d the difference of lengths; it is sigma(theta).

    Battles also have `length_first` and `length_second`, in characters or tokens. AlpacaEval 2 adds
    a term for how hard its own instructions are, known from its leaderboard, and weighs in two
    gamed baselines; neither is there for prompts of another suite. phi has a weak ridge. The
    interval is that of a share with this error (`share_of`).

    >>> rows = pd.DataFrame({"first": "a", "second": "b", "prompt_id": range(4)})
    >>> rows = rows.assign(score=[1.0, 1.0, 0.0, 0.0], length_first=[9, 9, 1, 1], length_second=5)
    >>> round(length_controlled_win_rate(rows, "a", "b").mean, 3)
    0.5
    """
    own = battles_of(battles, policy, against)
    longer = (own["length_first"] - own["length_second"]).to_numpy(float)
    if np.isnan(longer).any():
        raise DataError(f"{policy!r} against {against!r}: some answers have no length; give all")
    score = own["score"].to_numpy(float)
    if np.ptp(score) == 0:
        return clustered_share(score, own["prompt_id"].to_numpy(), confidence)
    spread = longer.std()
    feature = np.tanh(longer / spread) if spread > 0 else np.zeros(len(longer))
    prompts, names = pd.factorize(own["prompt_id"])
    theta, error = _at_equal_length(feature, score, prompts)
    rate = float(expit(theta))
    return share_of(rate, rate * (1 - rate) * error, len(names), confidence)


def _at_equal_length(feature: Array, score: Array, prompts: Array) -> tuple[float, float]:
    """theta of the logistic regression of the score on the feature, and its standard error; all
    [battles], a score between 0 and 1 is that much of a win and the rest of a loss.

    The error is the larger of two: that by prompt (Liang and Zeger, 1986), which knows how battles
    at a prompt go together, and that of independent battles, which holds where few are lost. There
    E (s - p)^2 = p (1 - p) - E s (1 - s), so that ties add nothing."""
    design = np.stack([np.ones_like(feature), feature], axis=1)
    ridge = np.array([0.0, 1 / _SLOPE_FREEDOM])
    point = np.zeros(2)
    for _ in range(_STEPS):
        chance = expit(design @ point)
        pull = design * (score - chance)[:, None]
        spread = chance * (1 - chance)
        inverse = np.linalg.inv((design * spread[:, None]).T @ design + np.diag(ridge))
        step = (inverse @ (pull.sum(0) - ridge * point)).clip(-1, 1)
        point = point + step
        if np.abs(step).max() < _CLOSE:
            break
    influence = np.bincount(prompts, pull @ inverse[0])
    count = len(influence)
    by_prompt = (influence**2).sum() * count / max(count - 1, 1)
    alone = inverse[0, 0] * (1 - (score * (1 - score)).sum() / spread.sum())
    return float(point[0]), math.sqrt(max(by_prompt, alone))
