"""safety_path RUN: a reference policy and safety pairs at a multiplier given by number ->
models/safety_path/RUN.

    python -m stages.safety_path lam_10

Safety DPO with coefficient beta / lambda to its reference, as in safety_dpo, but nothing here
depends on a scorer, the dual or the limit: SACPO's second step as it was published."""

from __future__ import annotations

from pathlib import Path

from dualign.core.schema import SAFETY_PAIRS, read_table
from dualign.params.training import SafetyPathParams
from dualign.stage import Run, execute
from dualign.training.run import Job
from dualign.training.safety import train_at

PAIRS = Path("data/prepared/safety_pairs.parquet")
MODELS = Path("models")
OUT = Path("models/safety_path")


def main(run: Run[SafetyPathParams]) -> None:
    """Run the stage."""
    params = run.params
    item, spec = run.pick(params.runs, "safety_path.runs")
    reference = MODELS / spec.reference
    scratch = run.scratch(PAIRS, *sorted({MODELS / "sft", reference}))
    frame = read_table(PAIRS, SAFETY_PAIRS)
    job = Job(params.training, run.resources, scratch, params.seed)
    metrics = train_at(spec.lam, frame, reference, spec, params, job, OUT / item)
    run.trained(metrics, scratch)


if __name__ == "__main__":
    execute(main, SafetyPathParams)
