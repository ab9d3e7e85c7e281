"""How often each bound of `dualign.math.bounds` certifies falsely, on answers whose mean
cost is exactly at the limit.

    python -m bench.coverage              # minutes on one core
    python -m bench.coverage --repeats 2000
    python -m bench.coverage shares       # of quantities of known range, such as P(unsafe)
    python -m bench.coverage frontier     # of the bands of the predicted frontier
    python -m bench.coverage multiplier   # of the interval of the pool's multiplier
    python -m bench.coverage policy       # of what a search knows of a policy's cost
    python -m bench.coverage dense        # of a dense sequence of tests along a path

Three parts: one candidate, a sequence of five, and costs corrected by labels. A false certificate
is one for a candidate at or above the limit; nominally delta of the repeats have one. Power is the
share of repeats that certify when the limit lies some standard errors above the mean. Three
procedures that the library does not offer stand beside for comparison: t without the term in the
skewness, a t bound that takes answers for independent, and testing every candidate. A fourth part
has costs that clustered t does not hold for.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from bench import dense, frontier, multiplier, options, policy_cost, shares
from bench.options import knob
from bench.rates import measured, percent
from dualign.core.errors import DataError
from dualign.math.bounds import (
    Bounds,
    bernstein_bound,
    betting_bound,
    binomial_bound,
    corrected_upper_bound,
    t_bound,
    upper_bound,
)

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.coverage"

Array = np.ndarray
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]

_PROMPTS = (50, 200, 1000)
_LABELLED = (100, 300)
_ICC = (0.0, 0.5)
_MARGINS = (2.5, 5.0, 10.0)  # in standard errors of the mean; 2.5 is 80 % power for a normal mean
_UNSAFE = float(
    norm.ppf(0.98)
)  # the flag of clopper_pearson: a normal cost above this, 2 % of answers
_MODEL = {
    "slope": 0.8,
    "noise": 0.4,
    "bias": -0.3,
}  # the model's cost of an answer, given the true one
_VOTES = 0.1  # share of answers that a vote calls harmful
_OFFERED = ("clustered_t", "empirical_bernstein", "betting", "clopper_pearson")
_MANY = (50, 100, 200, 1000)  # prompts of part 4


@dataclass(frozen=True)
class Settings(shares.Settings):
    """The same that `bench.shares` can change, with more repeats."""

    repeats: int = knob(5000, "data sets for each row")


# --- worlds: costs of mean 0 in a known range -----------------------------------------------------


@dataclass(frozen=True)
class World:
    """A distribution of mean 0 within `bounds`."""

    name: str
    title: str
    draw: Draw
    bounds: Bounds

    def costs(self, rng: np.random.Generator, shape: tuple[int, ...], icc: float) -> Array:
        """Answers [..., prompts, answers]: a draw for the prompt and one for the answer, of
        variance icc to 1 - icc.
        """
        return math.sqrt(icc) * self.draw(rng, (*shape[:-1], 1)) + math.sqrt(1 - icc) * self.draw(
            rng, shape
        )

    def range(self, icc: float) -> Bounds:
        """The range of such answers."""
        scale = math.sqrt(icc) + math.sqrt(1 - icc)
        return scale * self.bounds[0], scale * self.bounds[1]


def _lognormal(end: float) -> World:
    """min(exp(Z), e^end) less its mean, which is sqrt(e) Phi(end - 1) + e^end Phi(-end)."""
    mean = math.exp(0.5) * norm.cdf(end - 1) + math.exp(end) * norm.cdf(-end)

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return np.exp(np.minimum(rng.standard_normal(shape), end)) - mean

    return World("lognormal", f"log-normal, cut at e^{end:g}", draw, (-mean, math.exp(end) - mean))


def _rare(share: float, name: str = "rare") -> World:
    """1 with probability `share`, else 0, less the mean."""
    return World(
        name,
        f"{share:.0%} of answers cost 1, others 0",
        lambda rng, shape: (rng.random(shape) < share) - share,
        (-share, 1 - share),
    )


WORLDS = (
    World(
        "normal",
        "normal, cut at ± 4",
        lambda rng, shape: rng.standard_normal(shape).clip(-4, 4),
        (-4, 4),
    ),
    World(
        "student",
        "Student t of 3 d.o.f., cut at ± 10",
        lambda rng, shape: rng.standard_t(3, shape).clip(-10, 10),
        (-10, 10),
    ),
    _lognormal(4),
    _rare(0.02),
)

BEYOND = (
    _rare(0.01, "rarer"),
    _rare(0.03, "less rare"),
    World(
        "pareto",
        "Pareto of index 2.5",
        lambda rng, shape: rng.pareto(2.5, shape) - 1 / 1.5,
        (-1 / 1.5, math.inf),
    ),
)


def unsafe_prompts(icc: float, answers: int) -> float:
    """P(a normal cost of any of the answers is above _UNSAFE), by Gauss-Hermite quadrature over the
    prompt's draw.
    """
    nodes, weight = np.polynomial.hermite_e.hermegauss(101)
    safe = norm.cdf((_UNSAFE - math.sqrt(icc) * nodes) / math.sqrt(1 - icc)) ** answers
    return float(1 - safe @ weight / weight.sum())


# --- what each bound says -------------------------------------------------------------------------


def all_bounds(
    costs: Array, world: World, icc: float, settings: Settings, mean: Any = 0.0
) -> dict[str, Array]:
    """Each method's bounds [...] less the limit, from costs [..., prompts, answers] of mean 0.

    `mean` [...] moves the costs and their range. The limit is a mean cost of 0; for
    clopper_pearson, the share of unsafe prompts that goes with it."""
    means = costs.mean(-1)
    bounds = world.range(icc)
    found = {
        **{name: bound + mean for name, bound in t_bounds(means, settings.delta).items()},
        "empirical_bernstein": bernstein_bound(means, settings.delta, bounds) + mean,
        "betting": betting_bound(means, settings.delta, bounds) + mean,
        "independent_t": t_bound(costs.reshape(*costs.shape[:-2], -1), settings.delta) + mean,
    }
    if world.name == "normal":
        unsafe = (costs + np.asarray(mean)[..., None, None] > _UNSAFE).any(-1).sum(-1)
        limit = unsafe_prompts(icc, costs.shape[-1])
        found["clopper_pearson"] = binomial_bound(unsafe, costs.shape[-2], settings.delta) - limit
    return found


def t_bounds(means: Array, delta: float) -> dict[str, Array]:
    """The t bound [...] of means [..., prompts] with its term in the skewness and without; infinite
    without spread.
    """
    count = means.shape[-1]
    spread = np.ptp(means, -1) > 1e-9
    plain = means.mean(-1) + student.ppf(1 - delta, count - 1) * means.std(-1, ddof=1) / math.sqrt(
        count
    )
    return {
        "clustered_t": np.where(
            spread, t_bound(means, delta), np.inf
        ),  # the library refuses such data
        "plain_t": np.where(spread, plain, np.inf),
    }


# --- part 1: one candidate ------------------------------------------------------------------------


def one_candidate(settings: Settings) -> list[dict[str, Any]]:
    """Every bound on every world."""
    rows: list[dict[str, Any]] = []
    for index, world in enumerate(WORLDS):
        for icc in _ICC:
            for prompts in _PROMPTS:
                rng = np.random.default_rng([settings.seed, 1, index, int(100 * icc), prompts])
                costs = world.costs(rng, (settings.repeats, prompts, settings.answers), icc)
                where = {"world": world.name, "icc": icc, "prompts": prompts}
                rows += [{**where, **row} for row in _rows(costs, world, icc, settings)]
        log.info("one candidate: %s", world.title)
    return rows


def _rows(costs: Array, world: World, icc: float, settings: Settings) -> list[dict[str, Any]]:
    prompts = costs.shape[-2]
    share = unsafe_prompts(icc, settings.answers)
    flag_error = math.sqrt(share * (1 - share) / prompts)
    error = costs.mean(-1).std() / math.sqrt(prompts)
    return [
        {
            "method": method,
            **measured(bound <= 0, settings.delta),
            **_power(bound, flag_error if method == "clopper_pearson" else float(error)),
        }
        for method, bound in all_bounds(costs, world, icc, settings).items()
    ]


def _power(bound: Array, error: float) -> dict[str, float]:
    return {f"power_{margin:g}": float((bound <= margin * error).mean()) for margin in _MARGINS}


# --- part 2: five candidates in sequence ----------------------------------------------------------

_SEQUENCES = {
    "all at the limit": (0.0,) * 5,
    "two below, then at and above": (-10.0, -5.0, 0.0, 0.5, 1.0),
}


def sequences(settings: Settings, prompts: int = 200) -> list[dict[str, Any]]:
    """Five candidates on the same prompts; their means are standard errors away from the limit,
    0.
    """
    rows: list[dict[str, Any]] = []
    for name, steps in _SEQUENCES.items():
        for index in (0, 2):
            for icc in _ICC:
                rng = np.random.default_rng([settings.seed, 2, index, int(100 * icc), len(rows)])
                where = {
                    "sequence": name,
                    "world": WORLDS[index].name,
                    "icc": icc,
                    "prompts": prompts,
                }
                rows += [
                    {**where, **row}
                    for row in _sequence(WORLDS[index], icc, steps, prompts, rng, settings)
                ]
        log.info("sequence: %s", name)
    return rows


def _sequence(
    world: World,
    icc: float,
    steps: Sequence[float],
    prompts: int,
    rng: np.random.Generator,
    settings: Settings,
) -> list[dict[str, Any]]:
    shared = world.draw(rng, (settings.repeats, 1, prompts, 1))
    own = world.draw(rng, (settings.repeats, len(steps), prompts, settings.answers))
    costs = math.sqrt(icc) * shared + math.sqrt(1 - icc) * own
    mean = np.array(steps) * float(costs.mean(-1).std()) / math.sqrt(prompts)
    false = mean >= 0
    rows: list[dict[str, Any]] = []
    passed = {
        method: bound <= 0
        for method, bound in all_bounds(costs, world, icc, settings, mean).items()
    }
    for method in (method for method in (*_OFFERED, "plain_t") if method in passed):
        certified = in_sequence(passed[method])
        best = (certified == ~false).all(-1)
        row = {"method": method, **measured((certified & false).any(-1), settings.delta)}
        rows.append(row if false.all() else {**row, "best": float(best.mean())})
    rows.append(
        {"method": "test_all", **measured((passed["clustered_t"] & false).any(-1), settings.delta)}
    )
    return rows


def in_sequence(passed: Array) -> Array:
    """What `fixed_sequence` certifies, given who would pass [..., candidates]: those before the
    first failure.
    """
    return np.logical_and.accumulate(passed, axis=-1)


# --- part 3: costs corrected by labels ------------------------------------------------------------


def corrected(settings: Settings, prompts: int = 1000, icc: float = 0.5) -> list[dict[str, Any]]:
    """A model's costs of two answers to every prompt; true costs, or votes, for one answer to some
    of the prompts.
    """
    rows = []
    for index, kind in enumerate(("true cost", "vote")):
        for labelled in _LABELLED:
            rng = np.random.default_rng([settings.seed, 3, index, labelled])
            draws = [
                _labelled_draw(kind, prompts, labelled, icc, rng, settings.delta)
                for _ in range(settings.repeats)
            ]
            error = float(np.std([draw["mean"] for draw in draws]))
            where = {"labels": kind, "labelled": labelled, "icc": icc, "prompts": prompts}
            for method in ("model_only", "labels_only", "corrected", "corrected_tuned"):
                if method in draws[0]:
                    bound = np.array([draw[method] for draw in draws])
                    measure = {**measured(bound <= 0, settings.delta), **_power(bound, error)}
                    rows.append({**where, "method": method, **measure})
            log.info("corrected: %d labels, %s", labelled, kind)
    return rows


def _labelled_draw(
    kind: str, prompts: int, labelled: int, icc: float, rng: np.random.Generator, delta: float
) -> dict[str, float]:
    """One data set: the mean label and every bound, all less the true mean."""
    shape = (prompts, 2)
    ids = np.arange(prompts)
    truth = math.sqrt(icc) * rng.standard_normal((prompts, 1)) + math.sqrt(
        1 - icc
    ) * rng.standard_normal(shape)
    model = _MODEL["slope"] * truth + _MODEL["noise"] * rng.standard_normal(shape) + _MODEL["bias"]
    label = (
        truth[:labelled, 0]
        if kind == "true cost"
        else (truth[:labelled, 0] > norm.ppf(1 - _VOTES)) - _VOTES
    )
    data = (model.ravel(), ids.repeat(2), model[:labelled, 0], label, ids[:labelled])
    try:
        bounds = {
            "labels_only": upper_bound(label, ids[:labelled], delta=delta),
            "corrected": corrected_upper_bound(*data, delta=delta, tuned=False),
            "corrected_tuned": corrected_upper_bound(*data, delta=delta),
        }
    except DataError:  # all votes alike: refused, so nothing is certified
        bounds = dict.fromkeys(("labels_only", "corrected", "corrected_tuned"), math.inf)
    if kind == "true cost":  # a logit and a vote have no common limit
        bounds["model_only"] = upper_bound(model.ravel(), ids.repeat(2), delta=delta)
    return {"mean": float(label.mean()), **bounds}


# --- part 4: costs beyond clustered t -------------------------------------------------------------


def beyond(settings: Settings, icc: float = 0.5) -> list[dict[str, Any]]:
    """The t bounds where few prompts are expected to hold the harm, or the tail has no third
    moment.
    """
    rows: list[dict[str, Any]] = []
    for index, world in enumerate(BEYOND):
        for prompts in _MANY:
            rng = np.random.default_rng([settings.seed, 4, index, prompts])
            means = world.costs(rng, (settings.repeats, prompts, settings.answers), icc).mean(-1)
            where = {"world": world.name, "icc": icc, "prompts": prompts}
            for method, bound in t_bounds(means, settings.delta).items():
                rows.append({**where, "method": method, **measured(bound <= 0, settings.delta)})
    log.info("beyond clustered t")
    return rows


# --- report ---------------------------------------------------------------------------------------

_TITLES = {
    "clustered_t": "clustered t",
    "plain_t": "*clustered t without its term in the skewness*",
    "empirical_bernstein": "empirical Bernstein",
    "betting": "betting",
    "clopper_pearson": "Clopper–Pearson",
    "independent_t": "*the formula of clustered t, answers as independent*",
    "test_all": "*clustered t, every candidate tested*",
    "model_only": "*clustered t on the model's costs*",
    "labels_only": "clustered t on the labels",
    "corrected": "corrected",
    "corrected_tuned": "corrected, tuned",
}
_COMPARISON = ("plain_t", "independent_t", "test_all", "model_only")

_NOTES = """\
How to read it: *false* is the share of repeats with a certificate for a candidate whose mean cost
is at the limit or
above, ± its Monte-Carlo standard error; in bold where it is more than delta + 1 %. *Power at k* is
the share that
certify when the limit lies k standard errors above the mean: of the mean over prompts (part 1), of
the mean label
(part 3). Rows in italics are no bounds of the library; they show what it avoids. ICC is the
correlation of two answers to one prompt.

- Clustered t is t with a term in the skewness of the prompts' means. Without the term a long upper
  tail (log-normal; rare answers that cost much) makes t err more often than delta, most with few
  prompts; a symmetric tail does not. The term costs little power for normal costs. For such tails
  it costs more: at 2.5, with 50 prompts a third of it under the log-normal and half or more where
  harm is rare, with 1000 a tenth or less.
- Empirical Bernstein and betting hold for every N and every distribution in the range, at a price
  in power that grows with the range over the standard deviation. Betting is never the weaker of the
  two.
- Clopper–Pearson bounds P(a prompt gets an unsafe answer), another quantity; its errors are of that
probability.
- Part 2: testing from the safest on costs nothing in false certificates; testing all and taking the
best does.
- Part 3: the model's costs are too low by 0.3 standard deviations; labels put that right, and the
  model's costs make the labels go further. Without tuning the model's units must be those of the
  labels: a logit beside votes is not. One vote in ten says harmful.
- Part 4: the term cannot make up for what the sample does not show. With 1 % or 3 % of answers that
  cause all the harm and as few prompts that one or two of them are expected to be harmful as a
  whole, or with a tail that has no third moment (Pareto), clustered t errs too often. Where such
  costs are possible take more prompts, or a bound with a
  range."""


def _table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """One line a row: where it stands (`keys`), the method, the rate of false certificates, and
    power.
    """
    shown = set().union(*rows)
    measured = ["best", *(f"power_{margin:g}" for margin in _MARGINS)]
    powers = [key for key in measured if key in shown]
    heads = [
        key.replace("power_", "power at ").replace("best", "returns the best") for key in powers
    ]
    lines = options.head([*keys, "bound", "false", *heads])
    for row in rows:
        cells = [*(str(row[key]) for key in keys), _TITLES[row["method"]], percent(row)]
        cells += [f"{row[key]:.1%}" if key in row else "–" for key in powers]
        lines.append(options.line(cells))
    return "\n".join(lines)


def findings(parts: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The worst rate of each bound over parts 1 to 3, and where it fails; that of clustered t in
    part 4.
    """
    lines = []
    rows = [row for name, part in parts.items() if name != "beyond" for row in part]
    for method in (method for method in _TITLES if method not in _COMPARISON):
        own = [row for row in rows if row["method"] == method]
        failing = sum(not row["holds"] for row in own)
        worst = max(own, key=lambda row: row["rate"])
        where = ", ".join(
            f"{key} {worst[key]}"
            for key in ("world", "labels", "labelled", "icc", "prompts")
            if key in worst
        )
        verdict = (
            f"more than delta + 1 % in {failing} of {len(own)} rows"
            if failing
            else f"holds in all {len(own)} rows"
        )
        lines.append(f"- {_TITLES[method]}: at worst {percent(worst)} ({where}); {verdict}.")
    worst = max(
        (row for row in parts["beyond"] if row["method"] == "clustered_t"),
        key=lambda row: row["rate"],
    )
    where = f"world {worst['world']}, icc {worst['icc']}, prompts {worst['prompts']}"
    return [
        *lines,
        f"- clustered t, beyond what it holds for (part 4): at worst {percent(worst)} ({where}).",
    ]


def report(settings: Settings, parts: dict[str, list[dict[str, Any]]]) -> str:
    """The page in markdown."""
    titles = {world.name: world.title for world in (*WORLDS, *BEYOND)}

    def titled(part: str) -> list[dict[str, Any]]:
        return [{**row, "cost": titles[row["world"]]} for row in parts[part]]

    one = titled("one")
    sequence = titled("sequence")
    outside = titled("beyond")
    return options.page(
        "How often a certificate is false",
        options.command(PROGRAM, settings),
        (
            f"{settings.repeats} repeats, {settings.answers} answers a prompt, delta"
            f" {settings.delta:g}."
        ),
        "\n".join(findings(parts)),
        _NOTES,
        "## 1. One candidate, its mean cost at the limit",
        _table(one, ("cost", "icc", "prompts")),
        "## 2. Five candidates in sequence",
        _table(sequence, ("sequence", "cost", "icc", "prompts")),
        "## 3. Costs corrected by labels",
        _table(parts["corrected"], ("labels", "labelled", "icc", "prompts")),
        "## 4. Beyond clustered t",
        _table(outside, ("cost", "icc", "prompts")),
    )


def run(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """All four parts."""
    return {
        "one": one_candidate(settings),
        "sequence": sequences(settings),
        "corrected": corrected(settings),
        "beyond": beyond(settings),
    }


#: Simulations that this command runs as well, and the names of their files.
_OTHERS: dict[str, tuple[ModuleType, str]] = {
    "frontier": (frontier, "frontier-coverage"),
    "multiplier": (multiplier, "multiplier-coverage"),
    "policy": (policy_cost, "policy-coverage"),
    "shares": (shares, "share-coverage"),
    "dense": (dense, "dense-coverage"),
}


def _run_other(other: ModuleType, name: str, argv: Sequence[str]) -> None:
    """Run another simulation; write its rows, NAME.json, and its page, NAME.md and stdout."""
    settings, out = options.parse(other.Settings, other.PROGRAM, other.__doc__, argv)
    rows = other.run(settings)
    page = other.report(settings, rows)
    options.tell(out, name, other.PROGRAM, settings, page, rows=rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the simulation; write certificate-coverage.json and certificate-coverage.md, and the page
    to stdout.

    With one of `_OTHERS` as first argument run that with the rest instead."""
    given = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given and given[0] in _OTHERS:
        _run_other(*_OTHERS[given[0]], given[1:])
        return
    settings, out = options.parse(Settings, PROGRAM, __doc__, given)
    parts = run(settings)
    options.tell(out, "certificate-coverage", PROGRAM, settings, report(settings, parts), **parts)


if __name__ == "__main__":
    main()
