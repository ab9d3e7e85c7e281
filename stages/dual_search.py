"""dual_search METHOD: the outer loop of a method -> models/aligned/METHOD and reports/search/METHOD.json.

    python -m stages.dual_search dualign

Measures the policy at the first multiplier on its own answers, then trains (or merges) and measures again as the
method's rule says. Every step's policy is kept until the search ends, so an interrupted search goes on.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from dualign import search
from dualign.card import model_card
from dualign.core.artifacts import read_json, replacing, write_json
from dualign.core.errors import ParamsError
from dualign.core.params import DualSearchParams, InnerParams
from dualign.core.stage import Run, execute, finished
from dualign.data.schema import POOL, PROMPTS, by_prompt, read_table
from dualign.dual import slater_radius
from dualign.methods import method
from dualign.workbench import PolicyBench

log = logging.getLogger("dualign")

PROMPT_SET = Path("data/prepared/search.parquet")
SCORED = Path("data/scored")
DUAL = Path("data/dual/dual.json")
MODELS = Path("models")
METRICS = Path("reports/metrics")


def main(run: Run[DualSearchParams]) -> None:
    """Run the stage."""
    params = run.params
    if run.item not in params.methods:
        raise ParamsError(f"methods has no {run.item!r}; one of {', '.join(params.methods)}")
    row = method(run.item, params.methods[run.item])
    models = {MODELS / name for name in ("sft", "reward_model", "cost_model", row.reference, row.start)}
    scratch = run.scratch(PROMPT_SET, SCORED, DUAL, *sorted(models))
    prompts = read_table(PROMPT_SET, PROMPTS).head(params.prompts)
    start = read_json(METRICS / f"{row.start}.json")
    inner = InnerParams(**start["inner"]) if row.inner == "lagrangian" else None
    if inner is not None and not row.warm:  # from the reference again: as its start was trained
        update = {"learning_rate": start["learning_rate"]}
        params = params.model_copy(update={"training": params.training.model_copy(update=update)})
    bench = PolicyBench(row, params, run.resources, inner, prompts, scratch)
    steps, stopped = search.run(row, bench.start, outlook(start, params), params, bench, scratch)
    chosen = search.choose(row, steps, params)
    result = search.summary(row, steps, chosen, stopped, params)
    log.info("%s; the policy of step %d at lambda %.4f is returned", stopped, chosen, steps[chosen].lam)
    with replacing(MODELS / "aligned" / run.item) as folder:
        shutil.copytree(steps[chosen].policy, folder)
        (folder / "README.md").write_text(model_card(row, result, params))
    write_json(Path("reports/search") / f"{run.item}.json", result)
    run.metrics({**result["steps"][chosen], **{k: result[k] for k in ("feasible", "trainings", "generated_tokens")}})
    finished(scratch)


def outlook(start: dict[str, Any], params: DualSearchParams) -> search.Outlook:
    """What the stages before know: the multipliers of pool and start, and PD-DPO's Slater radius."""
    radius = params.slater_radius
    if radius == "pool":
        pool = read_table(SCORED / "pool.parquet", POOL)
        reward, cost = by_prompt(pool, "reward"), by_prompt(pool, "cost")
        radius = slater_radius(reward, cost, limit=params.limit, beta=params.beta, lambda_max=params.lambda_max)
        log.info("Slater radius estimated from the pool: %.4f", radius)
    return search.Outlook(read_json(DUAL)["lam"], start["lam"], radius)


if __name__ == "__main__":
    execute(main, DualSearchParams)
