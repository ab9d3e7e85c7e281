"""dual_init: the pool -> the multiplier and the predicted frontier, before any policy is trained -> data/dual.

    python -m stages.dual_init

Seconds on a CPU: a new `constraint.limit` reruns from here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from dualign import dual
from dualign.core.artifacts import replacing, write_json
from dualign.core.params import DualInitParams
from dualign.core.stage import Run, execute
from dualign.data.schema import POOL, by_prompt, read_table

log = logging.getLogger("dualign")

SAMPLES = Path("data/scored/pool.parquet")
OUT = Path("data/dual")


def main(run: Run[DualInitParams]) -> None:
    """Run the stage."""
    params = run.params
    pool = read_table(SAMPLES, POOL)
    reward, cost, length = (by_prompt(pool, name) for name in ("reward", "cost", "length"))
    solution = dual.solve(
        reward, cost, limit=params.limit, beta=params.beta,
        lambda_max=params.lambda_max, bootstrap=params.bootstrap, seed=params.seed,
    )  # fmt: skip
    result = describe(solution, params)
    grid = sorted({*params.grid, solution.lam})
    with replacing(OUT) as folder:
        folder.mkdir()
        write_json(folder / "dual.json", result)
        write_json(folder / "frontier.json", {"rows": solution.frontier(grid, length)})
    for message in result["messages"]:
        log.warning("%s", message)
    log.info(
        "lambda %.4f, 95 %% interval %.4f to %.4f, median ESS %.1f of %d",
        solution.lam,
        *solution.lam_interval,
        result["ess_median"],
        result["samples"],
    )
    run.metrics({key: value for key, value in result.items() if key != "messages"})


def describe(solution: dual.DualSolution, params: DualInitParams) -> dict[str, Any]:
    """The solved dual with its diagnostics, as data/dual/dual.json holds it."""
    reward, cost, beta = solution.reward, solution.cost, solution.beta
    half = cost.shape[1] // 2
    halves = [
        dual.root(reward[:, part], cost[:, part], limit=params.limit, beta=beta, lambda_max=params.lambda_max)
        for part in (slice(0, half), slice(half, 2 * half))
        if dual.predict(reward[:, part], cost[:, part], params.lambda_max, beta, cost[:, part]).mean() <= params.limit
    ]
    return {
        "lam": solution.lam,
        "lam_low": solution.lam_interval[0],
        "lam_high": solution.lam_interval[1],
        "limit": params.limit,
        "lambda_max": params.lambda_max,
        "beta": beta,
        "cost_reference": float(cost.mean()),
        "cost_unconstrained": float(dual.predict(reward, cost, 0.0, beta, cost).mean()),
        "reachable_minimum": float(dual.predict(reward, cost, params.lambda_max, beta, cost).mean()),
        "ess_median": float(np.median(solution.ess)),
        "ess_low": float(np.quantile(solution.ess, 0.1)),
        "half_drift": float(np.mean(halves) - solution.lam) if halves else None,
        "prompts": cost.shape[0],
        "samples": cost.shape[1],
        "slack": solution.slack,
        "messages": messages(solution, params),
    }


def messages(solution: dual.DualSolution, params: DualInitParams) -> list[str]:
    """What a user should know about this dual, with the remedy."""
    found = []
    if solution.slack:
        found.append("the limit is slack: the unconstrained optimum keeps it, so lambda is 0")
    ess = float(np.median(solution.ess))
    if ess < params.min_ess:
        spread = float((solution.reward - solution.lam * solution.cost).std(1).mean())
        wanted = params.min_ess / ess * solution.cost.shape[1]
        found.append(
            f"median effective sample size {ess:.1f} is below {params.min_ess:g}, so predictions lean on few samples: "
            f"draw about {wanted:.0f} samples a prompt (score.samples_per_prompt), or raise beta (now {params.beta:g}; "
            f"r - lambda c has a within-prompt sd of {spread:.2f})"
        )
    return found


if __name__ == "__main__":
    execute(main, DualInitParams)
