"""evaluate POLICY: a policy's own answers to held-out prompts -> reports/evaluation/POLICY and its metrics.

python -m stages.evaluate dualign
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pandas as pd

from dualign.core.artifacts import replacing, write_parquet
from dualign.core.errors import ParamsError
from dualign.core.params import EvaluateParams
from dualign.core.stage import Run, execute
from dualign.data.schema import ANSWERS, ENUMERATED, POOL, PROMPTS, read_table
from dualign.evaluation import add_truth, against_optimum, finite_problem, summarise
from dualign.lm.mixture import Policy, is_policy, policy_at
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.measure.rollout import Judges, roll_out

log = logging.getLogger("dualign")

PROMPT_SET = Path("data/prepared/eval.parquet")
SCORED = Path("data/scored")
OUT = Path("reports/evaluation")


def main(run: Run[EvaluateParams]) -> None:
    """Run the stage."""
    params = run.params
    if run.item not in params.policies:
        raise ParamsError(f"evaluate.policies has no {run.item!r}; one of {', '.join(params.policies)}")
    prompts = read_table(PROMPT_SET, PROMPTS).head(params.prompts)
    folder = params.policies[run.item]
    if not is_policy(Path("models") / folder):  # no candidate was certified
        return absent(run)
    judges = Judges.load(run.resources)
    policy = judges.reference if folder == "sft" else policy_at(Path("models") / folder, run.resources)
    started = time.monotonic()
    answers = roll_out(
        policy, prompts, judges,
        count=params.samples_per_prompt, max_new_tokens=params.max_new_tokens, seed=params.seed,
    )  # fmt: skip
    run.throughput["tokens_per_second"] = float(answers["length"].sum() / (time.monotonic() - started))
    world = bool((prompts["source"] == "world").all())
    answers = add_truth(answers) if world else answers
    metrics = summarise(answers, displacement(policy, judges), params.confidence)
    if world:
        enumerated = read_table(SCORED / "enumerated.parquet", ENUMERATED)
        kept = enumerated[enumerated["prompt_id"].isin(prompts["prompt_id"])]
        metrics |= against_optimum(metrics, finite_problem(kept, params.beta), params.limit)
    with replacing(OUT / run.item) as out:
        out.mkdir()
        write_parquet(out / "answers.parquet", answers, ANSWERS)
    run.metrics({**metrics, "policy": run.item})


def absent(run: Run[EvaluateParams]) -> None:
    """Write down that there is no such policy, in place of its answers and metrics."""
    with replacing(OUT / str(run.item)) as out:
        out.mkdir()
        write_parquet(out / "answers.parquet", [], ANSWERS)
    log.warning("models/%s holds no policy: none was certified", run.params.policies[str(run.item)])
    run.metrics({"policy": run.item, "absent": True})


def displacement(policy: Policy, judges: Judges, samples: int = 2) -> pd.DataFrame:
    """log(pi / pi_ref) of a few reference samples of every pool prompt: columns prompt_id, log_ratio."""
    pool = read_table(SCORED / "pool.parquet", POOL)
    pool = pool[pool["sample"] < samples]
    prompts = encode_prompts(judges.tokenizer, pool["prompt"])
    answers = [[int(token) for token in tokens] for tokens in pool["tokens"]]
    logp = log_probabilities(policy, judges.tokenizer, prompts, answers, batch_size=judges.resources.scoring_batch_size)
    return pd.DataFrame(
        {"prompt_id": pool["prompt_id"].to_numpy(), "log_ratio": logp.numpy() - pool["logp_ref"].to_numpy()}
    )


if __name__ == "__main__":
    execute(main, EvaluateParams)
