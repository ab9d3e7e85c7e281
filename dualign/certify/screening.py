"""Which weights a certificate tests, and on how many answers, chosen on prompts it does not use.

A sequence of tests may stand in any order that was fixed before its answers were drawn, and be as
dense as one likes. A coarse one stops short of the limit; a dense one from the safe end to the
limit draws most of its answers where nothing is in doubt. So answers to the *search* prompts say
where on the path the bound is expected to cross the limit, and there the sequence is dense. A bad
forecast costs power, never the level: the certify prompts have no part in it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from pydantic import Field, FiniteFloat
from scipy.optimize import isotonic_regression
from scipy.special import logsumexp
from scipy.stats import norm

from dualign.core.records import WholeRecord

Array = np.ndarray

_GRID = 200  # weights are multiples of 1 / _GRID
#: Standard errors by which a candidate must be expected to pass before it is given fewer answers.
_SURE = 4.0
WORTH = 0.95  # least share of answers that weighted ones are expected to be worth
_FAR = 50.0  # an expected excess beyond this, in standard errors, is no more certain


class Seen(WholeRecord):
    """What the answers of one candidate to the screened prompts show of a requirement.

    The mean over `prompts`, and the variance of an answer's value `between` prompts and `within`
    one."""

    requirement: str
    limit: FiniteFloat
    prompts: int = Field(ge=2)
    mean: FiniteFloat
    between: float = Field(ge=0)
    within: float = Field(ge=0)

    def spread(self, samples: int) -> float:
        """The variance of a prompt's mean of so many answers."""
        return self.between + self.within / samples


class Knot(WholeRecord):
    """A candidate that was screened; `q` is its weight, None that of the fallback.

    `bend` is the variance of log(pi_next / pi) of its answers (`parting`) over the squared step to
    the next weight of the path: how fast the policies part. None where nothing is reweighed, and at
    the end of the path."""

    name: str
    q: float | None = Field(gt=0)
    bend: float | None = Field(default=None, ge=0)
    seen: tuple[Seen, ...] = Field(min_length=1)


class Screen(WholeRecord):
    """What was screened, and what was planned for: safest first, as `sequence` reads it.

    `samples` answers to each of `prompts` prompts were drawn; a certificate at `delta` draws up to
    `samples_per_prompt` to each of `certify_prompts`, for about `tests` weights. `thrifty`: where a
    bound is sure to pass, fewer answers. `reweighed`: one draw serves all weights near the
    limit."""

    prompts: int = Field(ge=2)
    samples: int = Field(ge=2)
    certify_prompts: int = Field(ge=2)
    samples_per_prompt: int = Field(ge=1)
    delta: float = Field(gt=0, lt=0.5)
    tests: int = Field(ge=1)
    thrifty: bool
    reweighed: bool
    knots: tuple[Knot, ...] = Field(min_length=1)

    @property
    def path(self) -> tuple[Knot, ...]:
        """The knots with a weight, which falls."""
        return tuple(knot for knot in self.knots if knot.q is not None)


class Planned(NamedTuple):
    """The weights to test, safest first, and the answers a prompt of each candidate.

    The first `own` candidates draw their answers themselves; `drawn` are the positions of those
    whose answers, drawn in equal parts, serve all later ones: the first and the last of these. It
    is empty if they draw their own as well."""

    weights: tuple[float, ...]
    samples: tuple[int, ...]
    own: int
    drawn: tuple[int, ...]


def seen(name: str, limit: float, values: Array) -> Seen:
    """What values [prompts, samples] show by analysis of variance; `between` is at least 0."""
    within = float(values.var(1, ddof=1).mean())
    between = float(values.mean(1).var(ddof=1)) - within / values.shape[1]
    return Seen(
        requirement=name,
        limit=limit,
        prompts=len(values),
        mean=float(values.mean()),
        between=max(between, 0.0),
        within=within,
    )


def parting(log_ratio: Array) -> float:
    """The variance of log(q / p) by the affinity of p and q, -8 log E_p[sqrt(q / p)], from values
    at answers drawn from p.

    Where log-ratios are normal it is theirs. One answer of n that q all but never gives, whose
    log-ratio alone would be most of a variance, costs 8 / n.

    >>> round(parting(np.array([0.0] * 799 + [-60.0])), 3)
    0.01
    """
    half = np.asarray(log_ratio, float).ravel() / 2
    return max(-8.0 * float(logsumexp(half) - math.log(half.size)), 0.0)


def excess(knot: Knot, screen: Screen, samples: int) -> tuple[float, float]:
    """u and sigma of a candidate's test with so many answers, by the requirement of largest u.

        u = (mean - limit) / SE + z_{1-delta},   SE^2 = (between + within / samples) / N,
        sigma^2 = 1 + SE'^2 / SE^2

    The test passes if a normal variable of mean u and standard deviation sigma is at most 0: 1 is
    the certificate's own noise, SE' is the error of the screened mean."""
    excesses = []
    for part in knot.seen:
        asked = screen.certify_prompts * part.prompts / screen.prompts
        error = math.sqrt(part.spread(samples) / asked)
        screened = math.sqrt(part.spread(screen.samples) / part.prompts)
        gap = part.mean - part.limit
        u = gap / error if error > 0 else math.copysign(_FAR, gap)
        ratio = screened / error if error > 0 else 0.0
        excesses.append(
            (
                float(np.clip(u, -_FAR, _FAR)) + float(norm.ppf(1 - screen.delta)),
                math.hypot(1.0, ratio),
            )
        )
    return max(excesses)


def levels(sigma: float, tests: int) -> Array:
    """u_i = sqrt(2) sigma Phi^-1((i - 1/2) / K), i = 1..K: where tests of a normal crossing stand.

    If the test's outcome flips where u + sigma Z = 0, tests of density h lose 1 / (2 h) on average.
    Of K tests the mean loss is least for h in proportion to the square root of the normal density
    (Bennett's integral), which is in proportion to the density of a normal variable of variance 2
    sigma^2: these are its quantiles."""
    return math.sqrt(2) * sigma * norm.ppf((np.arange(tests) + 0.5) / tests)


def sequence(screen: Screen) -> Planned:
    """The weights to test and how many answers each has: a function of the screen alone.

    u is made monotone along the path and read off between the knots. Near the limit each level has
    the last weight that is not expected above it. If one draw is to serve them all, those too far
    from the one nearest to u = 0 are left out (`overlap`), and the two at the ends draw. The knots
    that are safer than all these are tested before them, on answers of their own, of which a sure
    one needs but few (`_samples`): they catch a bad forecast."""
    path = screen.path
    u, sigma = np.array([excess(knot, screen, screen.samples_per_prompt) for knot in path]).T
    knots = np.array([knot.q for knot in path], float)
    grid = _grid(knots)
    expected = np.interp(-grid, -knots, isotonic_regression(u).x)
    below = [
        np.flatnonzero(expected <= level) for level in levels(float(np.median(sigma)), screen.tests)
    ]
    near = sorted({int(found[-1]) for found in below if len(found)} - {0})
    if screen.reweighed and near:
        middle = min(near, key=lambda index: abs(float(expected[index])))
        worth = overlap(path, grid, float(grid[middle]))
        near = [index for index in near if worth[index] >= WORTH]
    net = [knot for knot in path if knot is path[0] or (near and (knot.q or 0) > grid[near[0]])]
    own = [_samples(knot, screen) for knot in screen.knots if knot.q is None or knot in net]
    ends = {len(own), len(own) + len(near) - 1} if screen.reweighed and near else set[int]()
    weights = (*(float(knot.q or 0) for knot in net), *(float(grid[index]) for index in near))
    samples = (*own, *(screen.samples_per_prompt for _ in near))
    return Planned(weights, samples, len(own), tuple(sorted(ends)))


def overlap(path: tuple[Knot, ...], weights: Array, drawn: float) -> Array:
    """The share of answers that those of weight `drawn` should be worth at each of `weights`.

    Were log-ratios normal, their variance (s(q) - s(drawn))^2 with s' = sqrt(bend), it would be
    exp(-variance)."""
    knots = np.array([knot.q for knot in path], float)
    speeds = np.sqrt([knot.bend or 0.0 for knot in path[:-1]])
    way = np.concatenate([[0.0], np.cumsum(speeds * -np.diff(knots))])
    worth: Array = np.exp(
        -((np.interp(-weights, -knots, way) - np.interp(-drawn, -knots, way)) ** 2)
    )
    return worth


def _grid(knots: Array) -> Array:
    """Multiples of 1 / _GRID between the ends, and the ends, from the largest down."""
    inside = np.arange(math.ceil(knots[-1] * _GRID), math.floor(knots[0] * _GRID) + 1) / _GRID
    return np.unique(np.concatenate([knots[[0, -1]], inside.round(6)]))[::-1]


def _samples(knot: Knot, screen: Screen) -> int:
    """The fewest answers a prompt with which a candidate should pass by _SURE standard errors."""
    if not screen.thrifty:
        return screen.samples_per_prompt
    for count in range(1, screen.samples_per_prompt):
        u, sigma = excess(knot, screen, count)
        if u <= -_SURE * sigma:
            return count
    return screen.samples_per_prompt
