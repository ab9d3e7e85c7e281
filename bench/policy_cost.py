"""How well a search knows what a policy costs: by the policy's own answers, by the pool, and by
both.

    python -m bench.coverage policy               # minutes on one core
    python -m bench.coverage policy --pools 20

A pool is drawn anew, prompts and answers, from a finite world (`bench.frontier`), and its
multiplier is solved for. The policy is the tilt at that multiplier, its log-ratios off by some
noise as a training leaves it. Its cost is estimated as `dualign.search` does: from answers of its
own to other prompts, from the pool by importance weights, and by the precision of both. Beside them
stand weights that are normalised within each prompt."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import log_softmax

from bench import frontier, options
from bench.frontier import Finite
from bench.options import knob
from dualign.core.errors import InfeasibleError
from dualign.evaluation.stats import Measurement, combined, mean_of
from dualign.math.dual.root import root
from dualign.math.dual.tilt import predict
from dualign.search.screening import believed, off_policy_cost

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.coverage policy"

Array = np.ndarray

_BETAS = (0.5, 1.0, 2.0)
_SAMPLES = (4, 8, 24)
_POOL_PROMPTS = 1200
_OWN_PROMPTS, _OWN_SAMPLES = 400, 6
_LAMBDA_MAX = 50.0
_KINDS = ("own", "pool", "both")
_Z = 1.96


@dataclass(frozen=True)
class Settings(frontier.Settings):
    """What a run can change; every field is an option of the command."""

    pools: int = knob(300, "pools drawn for each row")
    noise: float = knob(0.15, "nats by which log-ratios of the policy are off, standard deviation")
    min_ess: float = knob(1.0, "median effective sample size below which the pool has no say")


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each beta and number of samples."""
    world = Finite()
    rows = []
    for beta, samples in itertools.product(_BETAS, _SAMPLES):
        rng = np.random.default_rng([settings.seed, int(100 * beta), samples])
        rows.append(row_of(world, beta, samples, rng, settings))
        log.info("beta %g, %d samples", beta, samples)
    return rows


def row_of(
    world: Finite, beta: float, samples: int, rng: np.random.Generator, settings: Settings
) -> dict[str, Any]:
    """Means over the pools that reach the limit; `*_square` is the mean squared error."""
    found = [of_pool(world, beta, samples, rng, settings) for _ in range(settings.pools)]
    known = [each for each in found if each is not None]
    means = {key: options.mean(known, key) for key in known[0]} if known else {}
    return {"beta": beta, "samples": samples, "pools": len(known), **means}


def of_pool(
    world: Finite, beta: float, samples: int, rng: np.random.Generator, settings: Settings
) -> dict[str, float] | None:
    """The error of each estimate of one policy and whether its interval covers; None where the
    pool does not reach the limit."""
    problem = replace(world.problem, beta=beta)
    limit = world.truth(1.0, beta)["cost"]
    kind, drawn = sample(problem.log_reference, _POOL_PROMPTS, samples, rng)
    reward, cost = problem.reward[kind, drawn], problem.cost[kind, drawn]
    try:
        lam = root(reward, cost, limit=limit, beta=beta, lambda_max=_LAMBDA_MAX, jackknife=True)
    except InfeasibleError:
        return None
    tilt = problem.policy(lam)
    policy = log_softmax(tilt + settings.noise * rng.standard_normal(tilt.shape), axis=1)
    true = float((np.exp(policy) * problem.cost).sum(1).mean())

    ratio = (policy - problem.log_reference)[kind, drawn]
    pool = off_policy_cost(ratio, cost)
    fresh = problem.cost[sample(policy, _OWN_PROMPTS, _OWN_SAMPLES, rng)]
    own = mean_of(fresh.mean(1))
    measured = Measurement(own.mean, own.error, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    said = believed(measured, pool, settings.min_ess)
    first = (own.mean, own.error)
    both = combined(first, (said.cost, said.cost_se)) if said else first
    within = predict(ratio, np.zeros_like(ratio), 0.0, 1.0, cost).mean() - true
    errors = {"own": first, "pool": (pool.cost, pool.cost_se), "both": both}
    result = {"ess": pool.ess, "believed": float(said is not None), "within_error": float(within)}
    for name, (estimate, error) in errors.items():
        result[f"{name}_error"] = estimate - true
        result[f"{name}_square"] = (estimate - true) ** 2
        result[f"{name}_covers"] = float(abs(estimate - true) <= _Z * error)
    return result


def sample(
    log_policy: Array, prompts: int, count: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Kinds of prompts [prompts, 1] and answers [prompts, count] drawn from a policy."""
    kinds, answers = log_policy.shape
    kind = rng.integers(kinds, size=(prompts, 1))
    edges = np.exp(log_policy).cumsum(1)[kind]
    drawn = (rng.random((prompts, count, 1)) > edges).sum(2)
    return kind, drawn.clip(max=answers - 1)


# --- report ---------------------------------------------------------------------------------------

_NOTES = """\
How to read it: *error* is the root of the mean squared error of an estimate, in units of a cost
whose standard deviation is about 1; *covered* the share of 95 % intervals that hold the truth.
*Bias* is the mean error of the pool's estimate, and of one whose weights are normalised within each
prompt, as searches screened by before. *Believed* is the share of pools that were put beside own
answers. The multiplier is solved on the pool that then judges its policy, which takes nothing from
the coverage: the tilt at it is known as well as the pool is."""


def report(settings: Settings, rows: Sequence[dict[str, Any]]) -> str:
    """The page in markdown."""
    size = f"{_OWN_SAMPLES} own answers to each of {_OWN_PROMPTS} prompts"
    return options.page(
        "How well a search knows what a policy costs",
        options.command(PROGRAM, settings),
        f"{settings.pools} pools of {_POOL_PROMPTS} prompts a row; {size}.",
        _NOTES,
        "\n".join(table(rows)),
    )


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row."""
    estimates = [f"{name}: error, covered" for name in _KINDS]
    lines = options.head(["β", "samples", "ESS", *estimates, "bias", "within prompts", "believed"])
    for row in rows:
        where = [f"{row['beta']:g}", str(row["samples"])]
        if not row["pools"]:
            lines.append(options.line([*where, *["–"] * 7]))
            continue
        cells = [f"{row[f'{k}_square'] ** 0.5:.3f}, {row[f'{k}_covers']:.0%}" for k in _KINDS]
        biases = [f"{row['pool_error']:+.3f}", f"{row['within_error']:+.3f}"]
        known = [f"{row['ess']:.1f}", *cells, *biases, f"{row['believed']:.0%}"]
        lines.append(options.line([*where, *known]))
    return lines
