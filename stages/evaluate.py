"""evaluate POLICY: a policy's own answers to held-out prompts -> reports/evaluation/POLICY and its metrics.

python -m stages.evaluate dualign
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.artifacts import replacing, write_parquet
from dualign.core.errors import ParamsError
from dualign.core.params import EvaluateParams
from dualign.core.stage import Run, execute
from dualign.data.schema import ANSWERS, ENUMERATED, POOL, PROMPTS, read_table
from dualign.evaluation import add_truth, against_optimum, finite_problem, summarise
from dualign.lm.mixture import Policy, policy_at
from dualign.measure.rollout import Judges, log_ratios, roll_out
from dualign.tilt import TILT_SAMPLES, tilt_on

PROMPT_SET = Path("data/prepared/eval.parquet")
SCORED = Path("data/scored")
OUT = Path("reports/evaluation")


def main(run: Run[EvaluateParams]) -> None:
    """Run the stage."""
    params = run.params
    if run.item not in params.policies:
        raise ParamsError(f"evaluate.policies has no {run.item!r}; one of {', '.join(params.policies)}")
    prompts = read_table(PROMPT_SET, PROMPTS).head(params.prompts)
    judges = Judges.load(run.resources)
    folder = params.policies[run.item]
    policy = judges.reference if folder == "sft" else policy_at(Path("models") / folder, run.resources)
    started = time.monotonic()
    answers = roll_out(
        policy, prompts, judges,
        count=params.samples_per_prompt, max_new_tokens=params.max_new_tokens, seed=params.seed,
    )  # fmt: skip
    run.throughput["tokens_per_second"] = float(answers["length"].sum() / (time.monotonic() - started))
    world = bool((prompts["source"] == "world").all())
    answers = add_truth(answers) if world else answers
    log_ratio, tilt = on_the_pool(policy, judges)
    metrics = summarise(answers, log_ratio, params.confidence) | {"tilt": tilt}
    if world:
        enumerated = read_table(SCORED / "enumerated.parquet", ENUMERATED)
        kept = enumerated[enumerated["prompt_id"].isin(prompts["prompt_id"])]
        metrics |= against_optimum(metrics, finite_problem(kept, params.beta), params.limit)
    with replacing(OUT / run.item) as out:
        out.mkdir()
        write_parquet(out / "answers.parquet", answers, ANSWERS)
    run.metrics({**metrics, "policy": run.item})


def on_the_pool(policy: Policy, judges: Judges) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What a few reference samples of every pool prompt say of a policy: log(pi / pi_ref) of each, and its tilt.

    The table has columns prompt_id and log_ratio.
    """
    pool = read_table(SCORED / "pool.parquet", POOL)
    pool = pool[pool["sample"] < TILT_SAMPLES]
    ratios = log_ratios(policy, pool, judges)
    table = pd.DataFrame({"prompt_id": pool["prompt_id"].to_numpy(), "log_ratio": ratios})
    return table, tilt_on(pool, ratios).as_dict()


if __name__ == "__main__":
    execute(main, EvaluateParams)
