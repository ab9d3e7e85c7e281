"""Two policies on the same prompts: what differs, and whether that could be chance.

The prompt is the unit, as in `dualign.evaluation.stats`: a policy's answers to a prompt count as
their mean, and differences are taken within the prompt, which removes what all policies find hard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.special import bdtr, stdtr, stdtrit

from dualign.core.errors import DataError
from dualign.evaluation.stats import Estimate, likely_tail, mean_of

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


def no_difference(values: Sequence[float] | Array, *, tails: bool = True) -> float:
    """Two-sided p-value of a mean of 0 of differences by prompt: 1 - c with c the confidence at
    which the interval of `mean_of` ends at 0. Without a long tail on that side, or without `tails`,
    it is the paired t-test's; where all differ alike there is no spread to go by, and it is the
    sign test's, 2^(1 - prompts).

    >>> round(no_difference([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    gaps = np.asarray(values, dtype=float)
    prompts = len(gaps)
    if prompts < 2:
        return float("nan")
    found = mean_of(gaps, tails=False)
    if found.error <= _ROUNDING * abs(found.mean):
        return 1.0 if found.mean == 0 else 2.0 ** (1 - prompts)
    towards_0 = -math.copysign(1.0, found.mean)
    tail = max(0.0, likely_tail(towards_0 * gaps)) if tails else 0.0
    return float(2 * stdtr(prompts - 1, -_t_that_ends_at(abs(found.mean) / found.error, tail)))


def _t_that_ends_at(errors: float, tail: float) -> float:
    """t of t + `past_student`(t, tail) = errors, which is a quadratic equation; at least 0."""
    c = tail / 3
    beyond = max(0.0, errors - c / 2)
    return 2 * beyond / (1 + math.sqrt(1 + 4 * c * beyond))


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
    wider = mean_of([*values, most, -most], confidence, tails=False)
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
    and interval, the p-value of `no_difference`, and that with Holm's correction for all of the
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
    return *astuple(estimate), no_difference(values, tails=most is None)


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
    SE^2 = (MS_seeds + MS_prompts - MS_rest) / (seeds prompts), and at least the larger of the
    errors that come of seeds alone and of prompts alone.

    Few seeds tell their spread badly, so what comes of them counts with their own Student's t:
    reach^2 = (t_seeds^2 max(MS_seeds - MS_rest, 0) + t_prompts^2 MS_prompts) / (seeds prompts), and
    at least that of the larger alone. One t for both, by Satterthwaite's degrees of freedom, covers
    too rarely with 2 or 3 seeds. Where all values are equal the ends are infinite, as in `mean_of`.

    Source: Cochran, Biometrics 20 (1964), 191-195, who weighs t by variances; here it is t^2.

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
    by_seed = table.mean(1)
    by_prompt = table.mean(0)
    left = table - by_seed[:, None] - by_prompt + mean
    rest = float((left**2).sum() / ((seeds - 1) * (prompts - 1)))
    squares = np.array([prompts * by_seed.var(ddof=1), seeds * by_prompt.var(ddof=1)])
    larger = int(squares.argmax())
    t = stdtrit(np.array([seeds, prompts]) - 1, 0.5 + confidence / 2)
    total = max(float(squares.sum()) - rest, float(squares[larger]))
    of_both = t[0] ** 2 * max(squares[0] - rest, 0) + t[1] ** 2 * squares[1]
    squared_reach = max(of_both, t[larger] ** 2 * squares[larger])
    error, reach = (math.sqrt(one / (seeds * prompts)) for one in (total, squared_reach))
    return Estimate(mean, error, mean - reach, mean + reach)
