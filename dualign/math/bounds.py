"""Upper bounds of a mean from answers to prompts, which certificates stand on, of arrays.

A bound U(data) with P(mean > U) <= delta. Prompts are drawn independently, answers to one prompt
are not: what every bound counts are per-prompt means. `python -m bench.coverage` measures how often
each bound errs."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from scipy.stats import beta as beta_distribution
from scipy.stats import norm
from scipy.stats import t as student

from dualign.core.errors import DataError, ParamsError
from dualign.math.spread import past_student, tail_of

Array = np.ndarray
Method = Literal["clustered_t", "empirical_bernstein", "betting", "star_bets", "clopper_pearson"]
Bounds = tuple[float, float]
#: Methods that go by the range of the cost, and hold for every number of prompts because of it.
RANGED = ("empirical_bernstein", "betting", "star_bets")

#: The sample's skewness is taken 1 + SKEWNESS_INFLATION / sqrt(N)-fold, since few prompts show less
#: of a long tail than there is. The constant has no theory: found by simulation, it is the least
#: whole number with which every row of parts 1 to 3 of `bench.coverage` keeps delta + 1 % (with 18
#: the rare harm at 50 prompts and ICC 0.5 does not).
SKEWNESS_INFLATION = 19.0
#: Largest share of the capital that one bet may lose: c of 2010.09686, "1/2 or 3/4".
MAX_BET_FRACTION = 0.75
#: The same of `star_bound`: 0.9 to 1 differ little, 0.75 shows less of rare harm.
_NEARLY_ALL_IN = 0.95
_HALVINGS = 50
_MEANS = 4000  # means that `star_bound` tries
ROUNDING = 1e-12  # a spread below this share of the values is rounding


# --- bounds of a mean: the last axis runs over prompts, axes before it over separate data ---------


def t_bound(means: Array, delta: float) -> Array:
    """mean + (t + k a (1 + 2 t^2) / 6) s / sqrt(N) of per-prompt means [..., N], t = t_{1-delta,
    N-1}.

    With g the sample's skewness, a = max(g, 0) / sqrt(N): Johnson's term (1978, `past_student`).
    Without it a long upper tail makes a t bound err more often than delta: a sample without the
    tail has too small a mean and too small an s. k = 1 + 19 / sqrt(N) makes up for the skewness
    that few prompts do not show. The bound is never below the t bound, and is it where g <= 0.

    Nominal in the limit of many prompts. At delta 0.05, with 50, 200 or 1000 prompts and tails up
    to the log-normal or 2 % of answers that cause all the harm, it errs 5.5 % at most, where t
    alone errs up to 21 %. No bound without a known range can hold for harm that the sample hardly
    shows: where one or two prompts of the sample are expected to be harmful as a whole it errs up
    to 8 %, and 6.5 % under a Pareto tail of index 2.5: the figures are those of
    bench/results/certificate-coverage.md. With fewer than 20 prompts it is far wider than t, and
    with fewer than 10 it may err up to 9 % under a log-normal tail all the same; with 2 it is t,
    and errs 12 %.

    Means without skewness have the t bound, 2.92 / sqrt(3) here:

    >>> float(t_bound(np.array([-1.0, 0.0, 1.0]), delta=0.05).round(3))
    1.686
    """
    count = means.shape[-1]
    shares = means - means.mean(-1, keepdims=True)
    quantile = _skewed_quantile(shares, student.ppf(1 - delta, count - 1), count)
    return means.mean(-1) + quantile * means.std(-1, ddof=1) / math.sqrt(count)


def _skewed_quantile(shares: Array, t: float, count: int) -> Array:
    """t + k a (1 + 2 t^2) / 6 with a = max(0, `tail_of` the shares), k = 1 + 19 / sqrt(count): at
    least t.

    `count` prompts (with labels, where it is these that are few) show the tail."""
    inflation = 1 + SKEWNESS_INFLATION / math.sqrt(count)
    with np.errstate(invalid="ignore"):  # t is infinite for a delta next to nothing
        return t + past_student(t, inflation * np.maximum(tail_of(shares), 0))


def bernstein_bound(means: Array, delta: float, bounds: Bounds) -> Array:
    """mean + sqrt(2 s^2 ln(2/delta) / N) + 7 R ln(2/delta) / (3 (N - 1)) of means [..., N] in
    `bounds` of width R.

    Maurer and Pontil (0907.3740), theorem 4. Valid for every N, and loose.

    Three prompts say nothing, a thousand do:

    >>> bounds = [bernstein_bound(np.tile([0.0, 0.1], n), 0.05, (0.0, 1.0)) for n in (2, 500)]
    >>> np.round(bounds, 3)
    array([1.   , 0.063])
    """
    count = means.shape[-1]
    low, high = bounds
    log = math.log(2 / delta)
    spread = np.sqrt(2 * means.var(-1, ddof=1) * log / count)
    return np.minimum(high, means.mean(-1) + spread + 7 * (high - low) * log / (3 * (count - 1)))


def betting_bound(means: Array, delta: float, bounds: Bounds) -> Array:
    """The least mean m that a gambler against m rejects; `means` [..., N] in `bounds`, in the order
    of betting.

    Waudby-Smith and Ramdas (2010.09686), the one-sided half of their hedged capital. With x and m
    scaled to [0, 1],

        K_t(m) = prod_{i <= t} (1 - l_i (x_i - m)),
        l_i = min(sqrt(2 ln(1/delta) / (N v_{i-1})), c / (1 - m))

    where v_{i-1} is the variance of what came before, is a nonnegative supermartingale if the mean
    is m or more, so by Ville's inequality max_t K_t(m) >= 1/delta with probability delta at most.
    K_t grows in m: bisection finds the root. Valid for every N. It depends on the order, which must
    not depend on the values.

    >>> float(betting_bound(np.zeros(100), 0.05, (0.0, 1.0)).round(3))  # 0.03 by `binomial_bound`
    0.039
    """
    low, high = bounds
    scaled = (means - low) / (high - low)
    stake = np.sqrt(2 * math.log(1 / delta) / (scaled.shape[-1] * _variance_before(scaled)))
    kept = np.zeros(scaled.shape[:-1])
    rejected = np.ones(scaled.shape[:-1])
    for _ in range(_HALVINGS):
        middle = (kept + rejected) / 2
        m = middle[..., None]
        bet = np.minimum(stake, MAX_BET_FRACTION / (1 - m))
        capital = np.log1p(-bet * (scaled - m)).cumsum(-1).max(-1)
        beaten = capital >= math.log(1 / delta)
        kept = np.where(beaten, kept, middle)
        rejected = np.where(beaten, middle, rejected)
    return low + (high - low) * rejected


def star_bound(means: Array, delta: float, bounds: Bounds, tried: int = _MEANS) -> Array:
    """The least mean m from which on a gambler who minds his target rejects every m; `means` [...,
    N] in `bounds`.

    Voracek and Orabona (2505.22422), one-sided. With x and m scaled to [0, 1], and r = N - i + 1
    rounds to go,

        K_i(m) = K_{i-1}(m) (1 - l_i (x_i - m)),
        l_i = min(sqrt(2 ln(1 / (delta K_{i-1}(m))) / (r v_{i-1})), c / (1 - m))

    with v as in `betting_bound`, and no bet once K_i(m) >= 1/delta. As there, K_i(m) is a
    nonnegative supermartingale if the mean is m or more, so such an m is rejected with probability
    delta at most. What is staked depends on what was won, so K is not known to grow in m: every m
    of a fixed grid is tried, and the bound is the least above which, itself included, all are
    rejected. If the mean were at or above it, the grid's last m up to the mean would be rejected
    falsely, which has probability delta at most. The grid's steps are finest near the ends.

    Valid for every N, and where the t bound holds nearly as tight. It depends on the order, as
    `betting_bound`.

    >>> float(star_bound(np.zeros(100), 0.05, (0.0, 1.0)).round(3))  # 0.03 by `binomial_bound`
    0.031
    """
    low, high = bounds
    scaled = (means - low) / (high - low)
    grid = np.sin(np.pi / 2 * np.arange(1, tried) / tried) ** 2
    rejected = _star_capital(scaled, grid, delta) >= math.log(1 / delta)
    # One beyond the last that is not rejected.
    kept = (tried - 1) - np.argmin(rejected[..., ::-1], axis=-1)
    kept = np.where(rejected.all(-1), 0, kept)
    return low + (high - low) * np.append(grid, 1.0)[kept]


def _star_capital(scaled: Array, m: Array, delta: float) -> Array:
    """ln K_N(m) of `star_bound` for values [..., N] in [0, 1] and means [M]; [..., M]."""
    count = scaled.shape[-1]
    target = math.log(1 / delta)
    most = _NEARLY_ALL_IN / (1 - m)
    capital = np.zeros((*scaled.shape[:-1], len(m)))
    spread = _variance_before(scaled)
    for i in range(count):
        lacking = np.maximum(target - capital, 0)
        stake = np.minimum(np.sqrt(2 * lacking / ((count - i) * spread[..., i, None])), most)
        capital += np.log1p(stake * (m - scaled[..., i, None]))
    return capital


def _variance_before(scaled: Array) -> Array:
    """v_{i-1} of values in [0, 1]: variance so far, with one made-up value of mean 1/2, variance
    1/4."""
    seen = np.arange(2, scaled.shape[-1] + 2)
    centre = (0.5 + scaled.cumsum(-1)) / seen
    variance = (0.25 + ((scaled - centre) ** 2).cumsum(-1)) / seen
    return np.concatenate([np.full_like(scaled[..., :1], 0.25), variance[..., :-1]], axis=-1)


def binomial_bound(hits: Array, count: int, delta: float) -> Array:
    """The p at which `hits` of `count` or fewer have probability delta (Clopper and Pearson 1934);
    1 if all hit.

    The rule of three: nothing in 100 tries leaves about 3 in 100.

    >>> binomial_bound(np.array([0, 100]), 100, delta=0.05).round(3)
    array([0.03, 1.  ])
    """
    hits = np.asarray(hits)
    return np.where(
        hits == count, 1.0, beta_distribution.ppf(1 - delta, hits + 1, np.maximum(count - hits, 1))
    )


# --- bounds of a policy's cost --------------------------------------------------------------------


def upper_bound(
    costs: Any,
    prompts: Any,
    *,
    delta: float = 0.05,
    method: Method = "clustered_t",
    bounds: Bounds | None = None,
    seed: int = 0,
) -> float:
    """One-sided upper bound of the mean cost over prompts (`clopper_pearson`: of P(a prompt gets an
    unsafe answer)).

    Args:
        costs: [answers], in units of cost; above 0 is unsafe. prompts: [answers], the id of each
            answer's prompt.
        delta: probability that the bound lies below the truth.
        method: `clustered_t`, `clopper_pearson`, or one that needs `bounds`: `star_bets`, `betting`
            or `empirical_bernstein`.
        bounds: the range that the cost is known to lie in, known from how it is made and not from
            these answers. A cost below it is raised to it, which can only raise the bound. One
            above it is refused: lowering it would put the bound below the truth. To certify a cost
            without an upper end, constrain one that has it.
        seed: fixes the order in which `betting` and `star_bets` take the prompts.

    Returns:
        The bound, in units of cost (`clopper_pearson`: a probability; it falls with fewer answers
        per prompt).

    Raises:
        ParamsError: delta, method or bounds cannot be used. DataError: the answers cannot.

    Ten answers to each of 100 prompts, none unsafe. Ten times the answers are no more prompts:

    >>> costs, prompts = np.tile([-1.0, -0.5], 500), np.repeat(np.arange(100), 10)
    >>> round(upper_bound(costs, prompts, method="clopper_pearson"), 3)
    0.03
    >>> costs = costs + 0.01 * prompts  # prompts have means of -0.75 to 0.24, in the mean -0.255
    >>> round(upper_bound(costs, prompts), 3)  # -0.255 + 1.66 * 0.29 / sqrt(100)
    -0.207
    """
    check_test(delta, method, bounds)
    values, codes = clustered(costs, prompts, bounds)
    means = prompt_means(values, codes)
    if method == "clopper_pearson":
        return float(binomial_bound((prompt_means(values > 0, codes) > 0).sum(), len(means), delta))
    if method == "clustered_t":
        if means.std() <= ROUNDING * max(1.0, float(np.abs(means).max())):
            raise DataError(
                "costs: every prompt has the same mean cost, so clustered_t has no error to go by; "
                "use method star_bets or betting with bounds"
            )
        return float(t_bound(means, delta))
    assert bounds is not None  # check_test has seen to it
    if method == "empirical_bernstein":
        return float(bernstein_bound(means, delta, bounds))
    gamble = betting_bound if method == "betting" else star_bound
    return float(gamble(np.random.default_rng(seed).permutation(means), delta, bounds))


def corrected_upper_bound(
    costs: Any,
    prompts: Any,
    labelled_costs_model: Any,
    labelled_costs_true: Any,
    labelled_prompts: Any,
    *,
    delta: float = 0.05,
    tuned: bool = True,
) -> float:
    """Upper bound of the mean true cost, from model costs of many answers and true costs of some:
    inference on both.

    With f the model's cost, y the true one, N prompts in all and n with labels,

        theta = mean_n y + w (mean_N f - mean_n f),
        bound = theta + (t + k a (1 + 2 t^2) / 6) SE(theta)

    Prediction-powered inference (Angelopoulos et al. 2301.09633) is w = 1: proxy mean plus
    rectifier. `tuned` takes the w of least variance instead (PPI++, 2311.01453, with one degree of
    freedom less), which a useless or differently scaled model cannot harm: y may be a vote, 1 for
    harmful and 0 for not, and f a logit. The limit is in units of y.

    Means are over per-prompt means; SE^2 = sum p^2 and a = max(0, sum p^3) / SE^3 add up each
    prompt's share p in both sums, so labelled answers may be among `costs`, or answers to the same
    prompts, or to others. t = t_{1-delta, n-1} and k = 1 + 19 / sqrt(n) as in `t_bound`. The
    labelled prompts must be a random sample of the same prompts, and answers of the same policy.
    The bound is nominal in the limit of many labels; at delta 0.05 it errs 2 % of the time with 10
    harmful votes among 100 labels, and 4 % with 30 among 300. One that holds for every n:
    `upper_bound` of f and of y - f, each with bounds and at delta / 2, added up.

    Args:
        costs, prompts: [answers]. labelled_*: [labels]; an answer with several votes has several
            rows.

    Raises:
        ParamsError: delta is out of range. DataError: the arrays cannot be used.

    The model's costs are 1 too low, but else exact. Labels of 50 answers then serve like labels of
    all 1000, whose bound is 0 + 1.65 * 0.5 / sqrt(1000):

    >>> truth = np.tile([-0.5, 0.5], 500)
    >>> prompts = np.arange(1000)
    >>> some = slice(0, 50)
    >>> votes = truth[some]
    >>> round(corrected_upper_bound(truth - 1, prompts, votes - 1, votes, prompts[some]), 3)
    0.027
    """
    return corrected(
        costs,
        prompts,
        labelled_costs_model,
        labelled_costs_true,
        labelled_prompts,
        delta=delta,
        tuned=tuned,
    ).bound


class Corrected(NamedTuple):
    """The estimate theta of `corrected_upper_bound`, and the bound."""

    estimate: float
    bound: float


def corrected(
    costs: Any,
    prompts: Any,
    labelled_costs_model: Any,
    labelled_costs_true: Any,
    labelled_prompts: Any,
    *,
    delta: float,
    tuned: bool = True,
) -> Corrected:
    """theta and the bound of `corrected_upper_bound`, from the same arrays.

    >>> truth, prompts = np.tile([-0.5, 0.5], 500), np.arange(1000)
    >>> found = corrected(truth - 1, prompts, truth[:50] - 1, truth[:50], prompts[:50], delta=0.05)
    >>> abs(round(found.estimate, 6))
    0.0
    """
    check_delta(delta)
    proxy, pool_ids = _answers(costs, prompts)
    model, ids = _answers(
        labelled_costs_model, labelled_prompts, "labelled_costs_model", "labelled_prompts"
    )
    truth, _ = _answers(
        labelled_costs_true, labelled_prompts, "labelled_costs_true", "labelled_prompts"
    )
    codes, everyone = pd.factorize(np.concatenate([pool_ids, ids]))
    pool_codes, label_codes = np.split(codes, [len(proxy)])
    f_all = prompt_means(proxy, pool_codes, len(everyone))
    f = prompt_means(model, label_codes, len(everyone))
    y = prompt_means(truth, label_codes, len(everyone))
    count = int(np.isfinite(y).sum())
    if count < 3 or np.isfinite(f_all).sum() < 3:
        raise DataError(
            "a corrected bound needs 3 prompts with labels and 3 with model costs at the very"
            f" least, got {count} and {np.isfinite(f_all).sum()}; label some hundred"
        )
    gap = _shares(f_all) - _shares(f)
    label = _shares(y)
    weight = _tuned_weight(gap, label, float(np.nanmax(np.abs(f_all)))) if tuned else 1.0
    shares = label + weight * gap
    error = float(np.linalg.norm(shares))
    if error <= ROUNDING * max(1.0, float(np.nanmax(np.abs(y)))):
        raise DataError(
            "labelled_costs_true: the labels do not vary, so there is no error to go by; label more"
            " answers"
        )
    centre = float(np.nanmean(y) + weight * (np.nanmean(f_all) - np.nanmean(f)))
    quantile = _skewed_quantile(shares, student.ppf(1 - delta, count - 1 - tuned), count)
    return Corrected(centre, centre + float(quantile) * error)


def _shares(means: Array) -> Array:
    """What each prompt adds to their mean's error, 0 if it has none; squares add up to s^2 / N."""
    count = np.isfinite(means).sum()
    return np.nan_to_num(means - np.nanmean(means)) / math.sqrt(count * (count - 1))


def _tuned_weight(gap: Array, label: Array, scale: float) -> float:
    """The w of least |label + w gap|; 0 if the model's costs, of size `scale`, say nothing."""
    square = float(gap @ gap)
    return -float(gap @ label) / square if square > (ROUNDING * max(1.0, scale)) ** 2 else 0.0


def sample_size(sd: float, margin: float, delta: float = 0.05, power: float = 0.8) -> int:
    """Prompts for `clustered_t` to certify with probability `power` a policy whose cost is `margin`
    below the limit.

    N >= ((z_{1-delta} + z_power) sd / margin)^2; power 0.5 leaves (1.645 sd / margin)^2 at delta
    0.05. `sd` is the standard deviation of per-prompt means, which falls with more answers per
    prompt. In units of cost, like `margin`. Costs with a long upper tail take somewhat more:
    `clustered_t` is then wider than the t bound that is planned for.

    >>> sample_size(sd=1.0, margin=0.1, power=0.5)  # 16.449^2
    271
    >>> sample_size(sd=1.0, margin=0.05, power=0.5)  # half the margin, four times the prompts
    1083
    """
    check_delta(delta)
    for name, value in (("sd", sd), ("margin", margin)):
        if not 0 < value < math.inf:
            raise ParamsError(f"{name} must be above 0 and finite, got {value}")
    if not 0.5 <= power < 1:
        raise ParamsError(f"power must be at least 0.5 and below 1, got {power}")
    return max(2, math.ceil(((norm.ppf(1 - delta) + norm.ppf(power)) * sd / margin) ** 2))


def check_delta(delta: float) -> None:
    """Raises ParamsError unless delta lies between 0 and 1."""
    if not isinstance(delta, Real) or not 0 < delta < 1:
        raise ParamsError(f"delta must lie between 0 and 1, got {delta!r}")


def check_test(delta: float, method: str, bounds: Bounds | None) -> None:
    """Raises ParamsError where a test cannot be made so."""
    check_delta(delta)
    if method not in get_args(Method):
        raise ParamsError(f"method {method!r} is not one of {', '.join(get_args(Method))}")
    if bounds is None and method in RANGED:
        raise ParamsError(
            f"method {method} needs bounds, the lowest and highest cost that an answer can have"
        )
    if bounds is not None and not _is_range(bounds):
        raise ParamsError(f"bounds must be two finite numbers, the lower first, got {bounds}")


def _is_range(bounds: Any) -> bool:
    try:
        low, high = bounds
        return bool(-math.inf < low < high < math.inf)
    except (TypeError, ValueError):
        return False


def _answers(
    costs: Any, prompts: Any, name: str = "costs", ids_name: str = "prompts"
) -> tuple[Array, Array]:
    """Both as arrays [answers]; refuses what is not one finite value and one id per answer."""
    try:
        values = np.asarray(costs, float)
        ids = np.asarray(prompts)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} must be numbers, one per answer, and {ids_name} ids: {error}"
        ) from error
    if values.ndim != 1 or values.shape != ids.shape:
        raise DataError(
            f"{name} and {ids_name} must hold one value per answer, got {values.shape} and"
            f" {ids.shape}"
        )
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(
            f"{name}: {values[row]} at row {row} is not a finite number; score that answer again"
        )
    if pd.isna(ids).any():
        raise DataError(f"{ids_name}: no id at row {int(np.flatnonzero(pd.isna(ids))[0])}")
    return values, ids


def clustered(costs: Any, prompts: Any, bounds: Bounds | None) -> tuple[Array, Array]:
    """Costs within `bounds`, and the number of each answer's prompt in the order of ids.

    >>> clustered([0.5, -9.0, 0.1], ["b", "a", "b"], bounds=(-1.0, 1.0))
    (array([ 0.5, -1. ,  0.1]), array([1, 0, 1]))
    """
    values, ids = _answers(costs, prompts)
    codes, distinct = pd.factorize(ids, sort=True)
    if len(distinct) < 2:
        raise DataError(
            f"prompts: a bound needs answers to at least 2 prompts, got {len(distinct)}"
        )
    if bounds is None:
        return values, codes
    above = int((values > bounds[1]).sum())
    if above:
        raise DataError(
            f"costs: {above} of {len(values)} answers cost more than bounds allow ({values.max():g}"
            f" > {bounds[1]:g}); give the true range, or constrain a cost that has one, such as"
            " P(unsafe)"
        )
    return np.maximum(values, bounds[0]), codes


def prompt_means(values: Array, codes: Array, count: int = 0) -> Array:
    """Mean of the values of each code [max(count, codes)]; NaN for a code without any.

    >>> prompt_means(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]))
    array([2., 5.])
    """
    with np.errstate(invalid="ignore"):
        return np.bincount(codes, values, count) / np.bincount(codes, minlength=count)
