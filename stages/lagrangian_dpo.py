"""lagrangian_dpo RUN: pi_ref and scored answers at a fixed multiplier -> models/lagrangian_dpo/RUN.

    python -m stages.lagrangian_dpo anchored

The inner problem of C-DPO and MoCAN (scored pairs, labels drawn afresh), of PeCAN (the same, scored
by policies), and ours (the pool, exact labels, anchor)."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import InfeasibleError
from dualign.core.records import SolvedDual, read_record, solved_multiplier
from dualign.core.schema import by_prompt
from dualign.lm.models import load_tokenizer
from dualign.lm.tokens import answer_lengths
from dualign.math.constraints import prices_in, with_priced_rewards
from dualign.math.dual.solution import solve
from dualign.params.training import LagrangianDpoParams, LagrangianRun
from dualign.scoring.support import doubt, doubted
from dualign.stage import Run, execute, finished
from dualign.training.implicit_scores import Sources, Tables, scored_tables
from dualign.training.lagrangian import pairs_at, train_at
from dualign.training.run import Job

log = logging.getLogger("dualign")

SCORED = Path("data/scored")
DUAL = Path("data/dual/dual.json")
MODELS = Path("models")
REFERENCE = Path("models/sft")
METRICS = Path("reports/metrics")
OUT = Path("models/lagrangian_dpo")


def main(run: Run[LagrangianDpoParams]) -> None:
    """Run the stage."""
    params = run.params
    item, spec = run.pick(params.runs, "lagrangian_dpo.runs")
    tokenizer = load_tokenizer(REFERENCE)
    sources = Sources(spec.reward, spec.cost, MODELS, METRICS)
    tables = scored_tables(SCORED, sources, params.beta, tokenizer, run.resources)
    found = multiplier(item, spec, tables.pool, params)
    wary = spec.data == "pool" and not implicit(spec)
    off_support = doubt(SCORED, tables.pool, params.pessimism) if wary else None
    tables = with_prices(item, spec, tables, tokenizer)
    frame = doubted(tables.pool, off_support) if spec.data == "pool" else tables.pairs
    pairs = pairs_at(found["lam"], frame, spec.data, spec, params, tokenizer)

    policies = (MODELS / spec.reward, MODELS / spec.cost, METRICS / f"{spec.cost}.json")
    scratch = run.scratch(SCORED, DUAL, REFERENCE, *(policies if implicit(spec) else ()))
    job = Job(params.training, run.resources, scratch, params.seed)
    metrics = train_at(found["lam"], pairs, REFERENCE, spec, params, job, OUT / item)

    run.losses(metrics.pop("losses"))
    # A search that starts here looks at these, and takes the rest over.
    run.metrics({**metrics, **found, **spec.model_dump(include={"reward", "cost", "data"})})
    finished(scratch)


def implicit(spec: LagrangianRun) -> bool:
    """Whether a policy stands in for a scorer."""
    return (spec.reward, spec.cost) != ("reward_model", "cost_model")


def multiplier(
    item: str, spec: LagrangianRun, pool: pd.DataFrame, params: LagrangianDpoParams
) -> dict[str, Any]:
    """The multiplier and where it is from: params, the dual of the pool, or the dual of the pool's
    implicit scores.

    The last is solved here, so its 95 % interval `lam_low`, `lam_high` comes with it. `margin`
    stays below the limit by the pool's certificate margin."""
    if not isinstance(spec.lam, str):
        return {"lam": spec.lam, "lam_from": "params.yaml"}
    known = read_record(DUAL, SolvedDual)
    if not implicit(spec):
        return {"lam": solved_multiplier(known, spec.lam), "lam_from": str(DUAL)}
    try:
        solution = solve(
            by_prompt(pool, "reward"), by_prompt(pool, "cost"),
            limit=known["limit" if spec.lam == "dual" else "target"], beta=params.beta,
            lambda_max=known["lambda_max"], seed=params.seed,
        )  # fmt: skip
    except InfeasibleError as error:
        raise InfeasibleError(f"lagrangian_dpo.runs.{item}, scored by policies: {error}") from error
    low, high = solution.lam_interval
    log.info("lambda %.4f on implicit scores, 95 %% interval %.4f to %.4f", solution.lam, low, high)
    return {"lam": solution.lam, "lam_from": "implicit scores", "lam_low": low, "lam_high": high}


def with_prices(
    item: str, spec: LagrangianRun, tables: Tables, tokenizer: PreTrainedTokenizerBase
) -> Tables:
    """The tables with the prices of additional constraints in their rewards.

    A multiplier given as a number has none beside it, and prices of scorers mean nothing on
    implicit scores."""
    prices = prices_in(read_record(DUAL, SolvedDual)) if isinstance(spec.lam, str) else []
    if prices and implicit(spec):
        log.warning(
            "lagrangian_dpo.runs.%s is scored by policies and ignores constraint.additional", item
        )
        return tables
    return Tables(
        *(
            with_priced_rewards(table, prices, partial(answer_lengths, tokenizer))
            for table in tables
        )
    )


if __name__ == "__main__":
    execute(main, LagrangianDpoParams)
