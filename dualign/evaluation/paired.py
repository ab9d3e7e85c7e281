"""Two policies on the same prompts: what differs, and whether that could be chance.

The prompt is the unit, as in `dualign.evaluation.stats`: a policy's answers to a prompt count as
their mean, and differences are taken within the prompt, which removes what all policies find hard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.special import bdtr, stdtr, stdtrit

from dualign.core.errors import DataError
from dualign.evaluation.stats import Estimate, mean_of

Array = np.ndarray

#: Columns of the table of `differences`.
DIFFERENCES = ("first", "second", "prompts", "mean", "error", "low", "high", "p_value", "p_holm")

#: Standard errors below this share of their mean are the rounding of equal values.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Discordance:
    """Prompts on which the answer of one policy alone has a property, and how likely so uneven a
    split is by chance."""

    only_first: int
    only_second: int
    p_value: float


def prompt_differences(first: pd.DataFrame, second: pd.DataFrame, column: str) -> pd.Series:
    """Mean of `column` by prompt, first minus second, for the prompts that both have a value of.

    A row is an answer; one whose value is null, such as a failed judgement, does not count.

    >>> one = pd.DataFrame({"prompt_id": ["a", "a", "b"], "cost": [1.0, 3.0, 0.0]})
    >>> prompt_differences(one, one.assign(cost=one.cost - 1), "cost").tolist()
    [1.0, 1.0]
    """
    means = [_prompt_means(rows, column) for rows in (first, second)]
    return (means[0] - means[1]).dropna()


def _prompt_means(rows: pd.DataFrame, column: str) -> pd.Series:
    known = rows.dropna(subset=[column])
    return known[column].astype(float).groupby(known["prompt_id"]).mean()


def no_difference(estimate: Estimate, prompts: int) -> float:
    """Two-sided p-value of a mean of 0 by the paired t-test over prompts; where all differ alike
    there is no spread to go by, and it is the sign test's, 2^(1 - prompts).

    >>> round(no_difference(mean_of([1.0, 2.0, 3.0]), 3), 4)
    0.0742
    """
    if prompts < 2:
        return float("nan")
    if estimate.error <= _ROUNDING * abs(estimate.mean):
        return 1.0 if estimate.mean == 0 else 2.0 ** (1 - prompts)
    return float(2 * stdtr(prompts - 1, -abs(estimate.mean) / estimate.error))


def holm(p_values: Sequence[float] | Array) -> Array:
    """Holm's adjusted p-values (1979): those up to alpha err together with at most alpha; [tests].

    The k-th smallest of n is the largest of (n - j + 1) p_(j), j <= k, and at most 1; nan stays.
    Written out, since statsmodels' collects all garbage at each call, most of a report's time.

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=float)
    adjusted = values.copy()
    known = np.flatnonzero(~np.isnan(values))
    order = known[values[known].argsort(kind="stable")]
    tests = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(tests * values[order]).clip(max=1)
    return adjusted


def mean_difference(
    values: Sequence[float] | Array, confidence: float = 0.95, most: float | None = None
) -> Estimate:
    """The mean of differences by prompt with its interval: `mean_of`'s, or of shares, which differ
    by `most` at most, Bonett and Price's (2012).

    That is Student's of these and two made-up prompts, which differ by most and by -most. So it has
    a width even where no prompts differ, as where neither of two policies gave an unsafe answer,
    and covers where few do: Student's alone as rarely as one time in ten. It stays within -most and
    most.

    Source: British Journal of Mathematical and Statistical Psychology 65 (2012), 479-488.

    >>> none = mean_difference([0.0] * 400, most=1.0)
    >>> round(none.low, 4), round(none.high, 4)
    (-0.0069, 0.0069)
    """
    found = mean_of(values, confidence)
    if most is None or len(values) < 2:
        return found
    wider = mean_of([*values, most, -most], confidence)
    low = max(min(wider.low, found.mean), -most)
    high = min(max(wider.high, found.mean), most)
    return Estimate(found.mean, found.error, low, high)


def differences(
    scores: pd.DataFrame,
    column: str,
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    confidence: float = 0.95,
    most: float | None = None,
) -> pd.DataFrame:
    """Paired differences of policies in `column`, a row for each of `pairs` (default: all pairs).

    `scores` has a row for each answer: columns `policy`, `prompt_id` and `column`. The table has
    the columns `DIFFERENCES`: the mean over prompts of first minus second with its standard error
    and interval, the p-value of the paired t-test, and that with Holm's correction for all of the
    table's rows. The intervals are those of single comparisons; `most` is what shares can differ by
    (`mean_difference`), None for what has no bounds.

    Raises:
        DataError: a pair names a policy without scores, or two that share no prompt.

    >>> rows = pd.DataFrame({"policy": ["a"] * 3 + ["b"] * 3, "prompt_id": [1, 2, 3] * 2})
    >>> differences(rows.assign(cost=[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]), "cost")["mean"].tolist()
    [2.0]
    """
    values = _by_policy(scores, column)
    named = list(combinations(values, 2)) if pairs is None else list(pairs)
    found = [_paired(values, first, second, column) for first, second in named]
    rows = [
        (*pair, len(gap), *_tested(gap, confidence, most))
        for pair, gap in zip(named, found, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(DIFFERENCES[:-1]))
    return table.assign(p_holm=holm(table["p_value"].to_numpy(float)))


def _by_policy(scores: pd.DataFrame, column: str) -> dict[str, Array]:
    """Each policy's means by prompt, in the same order of all prompts; nan where it has none."""
    known = scores.dropna(subset=[column])
    means = known[column].astype(float).groupby([known["prompt_id"], known["policy"]]).mean()
    table = means.unstack()
    names = sorted(scores["policy"].unique())
    return {
        name: table[name].to_numpy() if name in table else np.full(len(table), np.nan)
        for name in names
    }


def _paired(by_policy: dict[str, Array], first: str, second: str, column: str) -> Array:
    """First minus second on the prompts that both have a value of."""
    missing = [name for name in (first, second) if name not in by_policy]
    if missing:
        raise DataError(f"policy {missing[0]!r} has no scores; it has {', '.join(by_policy)}")
    values = by_policy[first] - by_policy[second]  # nan where one has none
    values = values[~np.isnan(values)]
    if not len(values):
        raise DataError(f"policies {first!r} and {second!r} share no prompt with a {column}")
    return values


def _tested(values: Array, confidence: float, most: float | None) -> tuple[float, ...]:
    """Mean, error, ends and p-value of differences by prompt."""
    estimate = mean_difference(values, confidence, most)
    return *astuple(estimate), no_difference(estimate, len(values))


def mcnemar(first: Sequence[bool] | Array, second: Sequence[bool] | Array) -> Discordance:
    """McNemar's exact test (1947) that two policies have a property, as refusing, equally often:
    2 P(Bin(b + c, 1/2) <= min(b, c)) with b and c the prompts on which one of them alone has it.

    One answer of each to every prompt, in the same order, shape [prompts]. Several answers to a
    prompt are not independent: use `differences`.

    >>> mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
    Discordance(only_first=6, only_second=0, p_value=0.03125)
    """
    one = np.asarray(first, dtype=bool)
    other = np.asarray(second, dtype=bool)
    only_first = int((one & ~other).sum())
    only_second = int((~one & other).sum())
    tail = float(bdtr(min(only_first, only_second), only_first + only_second, 0.5))
    return Discordance(only_first, only_second, min(2 * tail, 1.0))


def over_seeds(values: Array, confidence: float = 0.95) -> Estimate:
    """The mean of a table of training seeds and prompts, which are both drawn: shape [seeds,
    prompts], of values or of paired differences.

    The error is that of a random-effects analysis of variance with both as crossed factors,
    SE^2 = (MS_seeds + MS_prompts - MS_rest) / (seeds prompts), with Satterthwaite's degrees of
    freedom. It is at least the larger of the errors that come of seeds alone and of prompts alone.
    Where all values are equal the ends are infinite, as in `mean_of`.

    >>> over_seeds(np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])).mean
    2.5
    """
    table = np.asarray(values, dtype=float)
    seeds, prompts = table.shape
    if seeds < 2 or prompts < 2:
        raise DataError(f"{seeds} seeds and {prompts} prompts say nothing of their spread; needs 2")
    if np.ptp(table) <= _ROUNDING * np.abs(table).max():
        return mean_of(table.ravel(), confidence)
    mean = float(table.mean())
    by_seed = table.mean(1, keepdims=True)
    by_prompt = table.mean(0, keepdims=True)
    squares = np.array(
        [
            prompts * ((by_seed - mean) ** 2).sum() / (seeds - 1),
            seeds * ((by_prompt - mean) ** 2).sum() / (prompts - 1),
            ((table - by_seed - by_prompt + mean) ** 2).sum() / ((seeds - 1) * (prompts - 1)),
        ]
    )
    freedom = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    total = squares[0] + squares[1] - squares[2]
    if total > squares[:2].max():
        degrees = total**2 / (squares**2 / freedom).sum()
    else:
        total = squares[:2].max()
        degrees = freedom[squares[:2].argmax()]
    error = float(np.sqrt(total / (seeds * prompts)))
    reach = float(stdtrit(degrees, 0.5 + confidence / 2)) * error
    return Estimate(mean, error, mean - reach, mean + reach)
