"""dual_init: the pool -> the multiplier and the predicted frontier, before any policy is trained ->
data/dual.

    python -m stages.dual_init

Seconds on a CPU: a new `constraint.limit` reruns from here. Additional constraints
(`constraint.additional`) are solved together with the limit, and their prices charged to the
reward. The same is done at other KL weights (`dual_init.betas`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from dualign.core.artifacts import replacing, write_json, write_parquet
from dualign.core.errors import InfeasibleError
from dualign.core.records import (
    BetaRow,
    Betas,
    CostModelMetrics,
    Frontier,
    FrontierRow,
    Multipliers,
    Pessimism,
    PriceRow,
    SolvedDual,
    Standardised,
    as_row,
    read_record,
)
from dualign.core.schema import DUAL_PROMPTS, POOL, by_prompt, read_table
from dualign.math.constraints import Price, with_priced_rewards
from dualign.math.dual.advice import beta_for_ess, samples_for_ess
from dualign.math.dual.margin import (
    MarginSolution,
    certificate_margin,
    solve_with_margin,
    spread_of_means,
)
from dualign.math.dual.root import root
from dualign.math.dual.solution import Bootstrap, DualSolution, solve
from dualign.math.dual.tilt import divergence, mean_cost, predict
from dualign.math.pricing import Scored, price
from dualign.params.dual import DualInitParams
from dualign.scoring.support import Doubt, doubt, doubted
from dualign.stage import Run, execute

log = logging.getLogger("dualign")

SCORED = Path("data/scored")
COST_MODEL = Path("reports/metrics/cost_model.json")
OUT = Path("data/dual")

#: A solved dual with the prices that its reward was charged.
Solved = tuple[DualSolution, list[Price]]
#: More samples a prompt than this are no advice.
_AFFORDABLE = 1024


def main(run: Run[DualInitParams]) -> None:
    """Run the stage."""
    params = run.params
    raw = read_table(SCORED / "pool.parquet", POOL)
    doubtful = doubt(SCORED, raw, params.pessimism)
    pool = doubted(raw, doubtful)
    prompts = pool.drop_duplicates("prompt_id")
    reward, cost, length, ended = (
        by_prompt(pool, name) for name in ("reward", "cost", "length", "ended")
    )
    scored = Scored(reward, cost, length, ended, prompts["prompt"].tolist())
    own = solve_at(params.beta, pool, scored, params)
    solution, prices = own
    margin = with_margin(solution, params)
    error = read_record(COST_MODEL, CostModelMetrics).zero_error
    result = describe(solution, params, margin, prices, error, doubts(doubtful, raw))
    if doubtful is not None:
        result = result.model_copy(update={"as_scored": as_scored(raw, scored, params)})
    grid = sorted({*params.grid, solution.lam})
    believed = by_prompt(raw, "reward")  # what is shown is never lowered
    rows = solution.frontier(grid, length, reward=believed, level=params.cvar_level)
    frontier = Frontier(
        rows=[FrontierRow.model_validate(row) for row in rows], cvar_level=params.cvar_level
    )
    betas = by_beta(pool, scored, believed, params, own)
    with replacing(OUT) as folder:
        folder.mkdir()
        write_json(folder / "dual.json", as_row(result))
        write_json(folder / "frontier.json", as_row(frontier))
        write_json(folder / "betas.json", as_row(betas))
        write_parquet(folder / "prompts.parquet", by_prompts(solution, prompts), DUAL_PROMPTS)
    _tell(solution, result, prices)
    numbers = result.model_dump(exclude={"messages": True, "prices": True, "as_scored": {"prices"}})
    run.metrics(numbers | {"prices": {price.constraint.name: price.lam for price in prices}})


def solve_at(beta: float, pool: pd.DataFrame, scored: Scored, params: DualInitParams) -> Solved:
    """The dual at a KL weight and the prices of additional constraints, solved together.

    Raises InfeasibleError where the limits cannot be kept.
    """
    prices = price(
        scored,
        params.additional,
        limit=params.limit,
        beta=beta,
        lambda_max=params.lambda_max,
        jackknife=params.jackknife,
    )
    solution = solve(
        by_prompt(with_priced_rewards(pool, prices), "reward"),
        scored.cost,
        limit=params.limit,
        beta=beta,
        lambda_max=params.lambda_max,
        bootstrap=Bootstrap(params.bootstrap, params.seed),
        jackknife=params.jackknife,
    )
    return solution, prices


def as_scored(pool: pd.DataFrame, scored: Scored, params: DualInitParams) -> Multipliers:
    """The dual of a pool with its scores as they are: of methods that train on pairs, which doubt
    none. `scored` is the rest of the pool.
    """
    believed = replace(scored, reward=by_prompt(pool, "reward"), cost=by_prompt(pool, "cost"))
    solution, prices = solve_at(params.beta, pool, believed, params)
    return multipliers(solution, with_margin(solution, params), prices)


def multipliers(
    solution: DualSolution, margin: MarginSolution, prices: Sequence[Price]
) -> Multipliers:
    """What trainings and searches take of a solved dual."""
    return Multipliers(
        lam=solution.lam,
        lam_low=solution.lam_interval[0],
        lam_high=solution.lam_interval[1],
        lam_margin=margin.lam,
        target=margin.target,
        prices=[PriceRow(**price.as_dict()) for price in prices],
    )


def by_beta(
    pool: pd.DataFrame, scored: Scored, reward: np.ndarray, params: DualInitParams, own: Solved
) -> Betas:
    """What the pool predicts of the policy that meets the limits, at `betas` and `beta`.

    A row is that of the frontier at the multiplier for this `beta`, with its interval `lam_low`,
    `lam_high` and the `prices` of additional constraints, in their order. Limits out of reach
    within `lambda_max` leave `lam` None and say why in `infeasible`. `own` is solved at `beta`
    itself, `reward` is the one that is shown. Empty without `betas`."""
    rows: list[BetaRow] = []
    for beta in sorted({*params.betas, params.beta}) if params.betas else ():
        try:
            solution, prices = own if beta == params.beta else solve_at(beta, pool, scored, params)
        except InfeasibleError as error:
            rows.append(BetaRow(beta=beta, lam=None, infeasible=str(error)))
            continue
        [measures] = solution.frontier(
            [solution.lam], scored.length, reward=reward, level=params.cvar_level
        )
        low, high = solution.lam_interval
        found = {"lam_low": low, "lam_high": high, "prices": [each.lam for each in prices]}
        rows.append(BetaRow.model_validate({**measures, **found, "beta": beta}))
    return Betas(rows=rows, beta=params.beta, min_ess=params.min_ess)


def with_margin(solution: DualSolution, params: DualInitParams) -> MarginSolution:
    """The multiplier with room for a certificate; the solution's own without a power."""
    if params.power is None:
        return MarginSolution(solution.lam, params.limit, 0.0, True)
    reward = solution.reward
    cost = solution.cost
    beta = solution.beta
    power = params.power

    def margin(lam: float) -> float:
        sd = spread_of_means(reward, cost, lam, beta, params.certify_samples)
        return certificate_margin(sd, params.certify_prompts, delta=params.delta, power=power)

    return solve_with_margin(
        reward,
        cost,
        limit=params.limit,
        beta=beta,
        lambda_max=params.lambda_max,
        margin=margin,
        jackknife=params.jackknife,
    )


def describe(
    solution: DualSolution,
    params: DualInitParams,
    margin: MarginSolution,
    prices: Sequence[Price],
    error: float | None,
    pessimism: Pessimism | None,
) -> SolvedDual:
    """The solved dual with its diagnostics, as data/dual/dual.json holds it.

    `error` is the standard error of the cost's zero, None where it is not known."""
    cost = solution.cost
    half_drift, half_drift_cost = drift(solution.reward, cost, solution.lam, params)
    zero_low, zero_high = at_zero_error(solution, params, error)
    return SolvedDual(
        **dict(multipliers(solution, margin, prices)),
        lam_slope=solution.slope,
        zero_error=error,
        lam_zero_low=zero_low,
        lam_zero_high=zero_high,
        limit=params.limit,
        certificate_margin=margin.margin,
        lambda_max=params.lambda_max,
        beta=solution.beta,
        slack=solution.slack,
        jackknife=params.jackknife,
        cost_reference=float(cost.mean()),
        cost_unconstrained=mean_cost(solution.reward, cost, 0.0, solution.beta, params.jackknife),
        reachable_minimum=mean_cost(
            solution.reward, cost, params.lambda_max, solution.beta, jackknife=False
        ),
        prompts=cost.shape[0],
        samples=cost.shape[1],
        ess_median=float(np.median(solution.ess)),
        ess_low=float(np.quantile(solution.ess, 0.1)),
        half_drift=half_drift,
        half_drift_cost=half_drift_cost,
        newton_steps=solution.steps,
        standardised=standardised(solution),
        pessimism=pessimism,
        messages=messages(solution, params, margin, prices),
    )


def standardised(solution: DualSolution) -> Standardised:
    """The dual in units of the scores' standard deviations."""
    scales = solution.scales
    return Standardised(
        reward_sd=scales.reward,
        cost_sd=scales.cost,
        beta=solution.beta / scales.reward,
        lam=solution.lam * scales.cost / scales.reward,
    )


def doubts(found: Doubt | None, pool: pd.DataFrame) -> Pessimism | None:
    """Off-support answers of the pool, the mean of their g, what g = 1 costs; or None."""
    if found is None:
        return None
    beyond = found.beyond(pool)
    off = beyond > 0
    degree = float(beyond[off].mean()) if off.any() else 0.0
    return Pessimism(answers=int(off.sum()), degree=degree, reward=found.reward, cost=found.cost)


def drift(
    reward: np.ndarray, cost: np.ndarray, lam: float, params: DualInitParams
) -> tuple[float | None, float]:
    """What half of each prompt's samples change: lambda, and the cost at `lam`.

    Means over both halves, less the value of all samples. Few samples bias both, so drift says that
    more are needed."""
    half = cost.shape[1] // 2
    beta = params.beta
    roots = []
    costs = []
    for part in (slice(0, half), slice(half, 2 * half)):
        r = reward[:, part]
        c = cost[:, part]
        costs.append(mean_cost(r, c, lam, beta, params.jackknife))
        if mean_cost(r, c, params.lambda_max, beta, jackknife=False) <= params.limit:
            roots.append(multiplier(params.limit, r, c, params))
    half_drift = float(np.mean(roots) - lam) if roots else None
    whole = mean_cost(reward, cost, lam, beta, params.jackknife)
    return half_drift, float(np.mean(costs)) - whole


def multiplier(limit: float, reward: np.ndarray, cost: np.ndarray, params: DualInitParams) -> float:
    """The multiplier at a limit by scores [prompts, samples]; InfeasibleError as `root` raises."""
    return root(
        reward,
        cost,
        limit=limit,
        beta=params.beta,
        lambda_max=params.lambda_max,
        jackknife=params.jackknife,
    )


def at_zero_error(
    solution: DualSolution, params: DualInitParams, error: float | None
) -> tuple[float | None, float | None]:
    """Lambda where the cost's zero is a standard error lower and higher.

    `error` is that standard error in units of cost, None where it is not known. A multiplier out of
    reach is None too."""

    def at(limit: float) -> float | None:
        try:
            return multiplier(limit, solution.reward, solution.cost, params)
        except InfeasibleError:
            return None

    if error is None:
        return None, None
    return at(params.limit + error), at(params.limit - error)


def messages(
    solution: DualSolution,
    params: DualInitParams,
    margin: MarginSolution,
    prices: Sequence[Price],
) -> list[str]:
    """What a user should know about this dual, with the remedy."""
    advice = []
    if solution.slack and any(price.lam > 0 for price in prices):
        advice.append(
            "constraint.limit is slack: with the limits of constraint.additional it is kept, so"
            " lambda"
            " is 0"
        )
    elif solution.slack:
        advice.append("the limit is slack: the optimum without it keeps it, so lambda is 0")
    if not margin.reached:
        advice.append(
            "the target that leaves room for a certificate is out of the samples' reach: lam_margin"
            f" takes the lowest cost that is not, {margin.target:.4g}; raise certify.prompts or"
            " constraint.limit, or lower constraint.power"
        )
    if float(np.median(solution.ess)) < params.min_ess:
        advice.append(_low_ess(solution, params))
    return advice


def _low_ess(solution: DualSolution, params: DualInitParams) -> str:
    """How few effective samples there are, and the beta or samples for `dual_init.min_ess`."""
    reward = solution.reward
    cost = solution.cost
    count = solution.cost.shape[1]
    beta = beta_for_ess(
        reward,
        cost,
        limit=params.limit,
        beta=params.beta,
        lambda_max=params.lambda_max,
        ess=params.min_ess,
    )
    wanted = samples_for_ess(reward, cost, solution.lam, params.beta, params.min_ess)
    by_beta = (
        f"raise beta from {params.beta:g} to {beta:.2g}; "
        if beta is not None
        else "no beta gives as many at this limit, so raise constraint.limit; "
        if count >= params.min_ess or wanted > _AFFORDABLE  # no limit makes more of fewer count
        else ""
    )
    by_samples = (
        f"draw {wanted:.0f} samples a prompt or more (now {count}, score.samples_per_prompt)"
        if wanted <= _AFFORDABLE
        else f"more samples than {count} a prompt will hardly do"
    )
    return (
        f"median effective sample size {np.median(solution.ess):.1f} of {count} is below"
        f" {params.min_ess:g}, so predictions lean on few samples: {by_beta}{by_samples}"
    )


def by_prompts(solution: DualSolution, prompts: pd.DataFrame) -> pd.DataFrame:
    """A row for each prompt at the solution's multiplier: schema DUAL_PROMPTS."""
    given = (solution.reward, solution.cost, solution.lam, solution.beta)
    return pd.DataFrame(
        {
            "prompt_id": prompts["prompt_id"].to_numpy(),
            "ess": solution.ess,
            "value": solution.value,
            "kl": divergence(*given),
            "cost": predict(*given, solution.cost),
        }
    )


def _tell(solution: DualSolution, result: SolvedDual, prices: list[Price]) -> None:
    for message in result.messages:
        log.warning("%s", message)
    log.info(
        "lambda %.4f, 95 %% interval %.4f to %.4f, median ESS %.1f of %d, %d Newton steps",
        solution.lam,
        *solution.lam_interval,
        result.ess_median,
        result.samples,
        solution.steps,
    )
    for found in prices:
        log.info("%s: price %.4g, predicted %.4g", found.constraint.key, found.lam, found.predicted)


if __name__ == "__main__":
    execute(main, DualInitParams, alone=True)
