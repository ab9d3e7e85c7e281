"""safety_dpo RUN: a reference policy and safety pairs at a fixed multiplier ->
models/safety_dpo/RUN.

    python -m stages.safety_dpo stepwise

SACPO's second step, which is PD-DPO's phase 2: DPO with coefficient beta / lambda to the reference
(pi_r for `stepwise`, pi_ref for the safety-only baseline `alone`), or IPO or KTO in its place. To
KTO an answer is desirable if its flag says safe."""

from __future__ import annotations

import logging
from pathlib import Path

from dualign.core.records import SolvedDual, read_record, solved_for, solved_multiplier
from dualign.core.schema import SAFETY_PAIRS, read_table
from dualign.params.training import SafetyDpoParams, SafetyRun
from dualign.stage import Run, execute
from dualign.training.run import Job
from dualign.training.safety import train_at

log = logging.getLogger("dualign")

PAIRS = Path("data/prepared/safety_pairs.parquet")
DUAL = Path("data/dual/dual.json")
MODELS = Path("models")
OUT = Path("models/safety_dpo")


def main(run: Run[SafetyDpoParams]) -> None:
    """Run the stage."""
    params = run.params
    item, spec = run.pick(params.runs, "safety_dpo.runs")
    lam = max(spec.factor * multiplier(item, spec), params.lambda_min)
    reference = MODELS / spec.reference
    frame = read_table(PAIRS, SAFETY_PAIRS)
    scratch = run.scratch(PAIRS, DUAL, *sorted({MODELS / "sft", reference}))
    job = Job(params.training, run.resources, scratch, params.seed)
    metrics = train_at(lam, frame, reference, spec, params, job, OUT / item)
    run.trained(metrics, scratch)


def multiplier(item: str, spec: SafetyRun) -> float:
    """The multiplier before `factor`: a number, or the solved dual's.

    Preferences have no scores that the prices of additional constraints could be charged to; they
    are not kept here."""
    if not isinstance(spec.lam, str):
        return spec.lam
    solved = solved_for(read_record(DUAL, SolvedDual), doubted=False)
    if solved.prices:
        log.warning(
            "safety_dpo.runs.%s trains on preferences and ignores constraint.additional", item
        )
    lam = solved_multiplier(solved, spec.lam)
    if lam == 0:
        log.warning(
            "safety_dpo.runs.%s: the multiplier is 0, since constraint.limit is slack, and at"
            " lambda_min this policy hardly differs from its reference. Give lam as a number if it"
            " is to be a safe one",
            item,
        )
    return lam


if __name__ == "__main__":
    execute(main, SafetyDpoParams)
