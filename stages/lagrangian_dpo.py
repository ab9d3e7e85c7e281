"""lagrangian_dpo RUN: pi_ref and scored answers at a fixed multiplier -> models/lagrangian_dpo/RUN.

    python -m stages.lagrangian_dpo anchored

The inner problem of C-DPO and MoCAN (scored pairs, labels drawn afresh), and ours (the pool, exact labels, anchor).
"""

from __future__ import annotations

from pathlib import Path

from dualign.core.artifacts import read_json, replacing
from dualign.core.errors import ParamsError
from dualign.core.params import LagrangianDpoParams
from dualign.core.stage import Run, execute, finished
from dualign.data.schema import POOL, SCORED_PAIRS, read_table
from dualign.lm.models import load_policy, load_tokenizer, save, with_lora
from dualign.pairs import lagrangian_pairs, pool_pairs, pool_values, samples_of
from dualign.training.pairwise import Inner, train_pairwise
from dualign.training.run import Job

SCORED = Path("data/scored")
DUAL = Path("data/dual/dual.json")
REFERENCE = Path("models/sft")
OUT = Path("models/lagrangian_dpo")


def main(run: Run[LagrangianDpoParams]) -> None:
    """Run the stage."""
    params = run.params
    if run.item not in params.runs:
        raise ParamsError(f"lagrangian_dpo.runs has no {run.item!r}; one of {', '.join(params.runs)}")
    spec = params.runs[run.item]
    lam = read_json(DUAL)["lam"] if spec.lam == "dual" else spec.lam
    tokenizer, policy = load_tokenizer(REFERENCE), load_policy(REFERENCE, run.resources)
    if spec.data == "pool":
        samples = samples_of(read_table(SCORED / "pool.parquet", POOL), tokenizer)
        pairs = pool_pairs(samples, pool_values(samples, lam, params.beta), lam, params.beta, params.seed)
    else:
        pairs = lagrangian_pairs(read_table(SCORED / "scored_pairs.parquet", SCORED_PAIRS), tokenizer, lam)
    policy = with_lora(policy, params.lora)
    scratch = run.scratch(SCORED, DUAL, REFERENCE)
    training = params.training.model_copy(update={"learning_rate": spec.learning_rate})
    job = Job(training, run.resources, scratch, params.seed)
    inner = Inner(params.beta, params.beta, spec.inner.labels, spec.inner.anchor, spec.inner.nll)
    metrics = train_pairwise(policy, tokenizer, pairs, inner, job)
    with replacing(OUT / run.item) as folder:
        save(policy, tokenizer, folder)
    run.metrics({**metrics, "lam": lam, "inner": spec.inner.model_dump(), "learning_rate": spec.learning_rate})
    finished(scratch)


if __name__ == "__main__":
    execute(main, LagrangianDpoParams)
