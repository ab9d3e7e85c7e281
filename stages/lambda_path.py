"""lambda_path RUN: pi_ref and the pool at a multiplier given by number -> models/lambda_path/RUN.

    python -m stages.lambda_path strict

Our own training (exact labels, anchor), as in lagrangian_dpo, but nothing here depends on the dual
or the limit: a row of `methods` that merges two of these policies has a new policy for a new limit
without training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dualign.core.records import LagrangianMetrics, as_row
from dualign.core.schema import POOL, read_table
from dualign.lm.models import load_tokenizer
from dualign.params.training import LambdaPathParams
from dualign.scoring.support import HELD_OUT, doubt, doubted
from dualign.stage import Run, execute
from dualign.training.lagrangian import pairs_at, train_at
from dualign.training.run import Job
from dualign.training.soup import soup

SCORED = Path("data/scored")
SAMPLES = SCORED / "pool.parquet"
MODELS = Path("models")
OUT = Path("models/lambda_path")


def main(run: Run[LambdaPathParams]) -> None:
    """Run the stage."""
    params = run.params
    item, spec = run.pick(params.runs, "lambda_path.runs")
    begin = MODELS / spec.begin
    scratch = run.scratch(SAMPLES, SCORED / HELD_OUT, *sorted({MODELS / "sft", begin}))
    tokenizer = load_tokenizer(MODELS / "sft")
    pool = read_table(SAMPLES, POOL)
    pool = doubted(pool, doubt(SCORED, pool, params.pessimism))
    pairs = pairs_at(spec.lam, pool, "pool", spec, params, tokenizer)

    job = Job(params.training, run.resources, scratch, params.seed)
    train = partial(train_at, spec.lam, pairs, begin, spec, params)
    metrics = soup(spec.soup, train, job, OUT / item)

    # What a search from here looks at, as it would in the metrics of lagrangian_dpo.
    told = LagrangianMetrics(
        lam=spec.lam,
        reward="reward_model",
        cost="cost_model",
        data="pool",
        begin=spec.begin,
        **metrics,
    )
    run.trained(as_row(told), scratch)


if __name__ == "__main__":
    execute(main, LambdaPathParams)
