"""evaluate POLICY: a policy's own answers to held-out prompts -> reports/evaluation/POLICY and its
metrics. Once the answers are drawn, a killed run does not draw them again.

python -m stages.evaluate dualign
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.artifacts import replacing, write_json, write_parquet
from dualign.core.records import Evaluated, FrontierRow, NotEvaluated, as_row
from dualign.core.schema import ANSWERS, ENUMERATED, POOL, PROMPTS, SUPPORT, read_table
from dualign.evaluation.against_optimum import (
    add_truth,
    against_optimum,
    exact_frontier,
    finite_problem,
)
from dualign.evaluation.effective_tilt import TILT_SAMPLES, tilt_on
from dualign.evaluation.rollout import Scorers, kept_answers, log_ratios, roll_out
from dualign.evaluation.stats import clustered_mean, clustered_share
from dualign.evaluation.summary import summarise
from dualign.lm.folders import is_policy
from dualign.lm.mixture import Policy, policy_at
from dualign.math.constraints import constraint
from dualign.math.dual.tail import value_at_risk
from dualign.params.base import SHARES
from dualign.params.dual import ConstraintSpec
from dualign.params.evaluate import EvaluateParams
from dualign.scoring.support import HELD_OUT, columns, enough, fit_support
from dualign.stage import Run, execute, finished

log = logging.getLogger("dualign")

PROMPT_SET = Path("data/prepared/eval.parquet")
SCORED = Path("data/scored")
OUT = Path("reports/evaluation")
#: What scores the answers, and the policy that they are compared with.
SCORERS = [Path("models") / name for name in ("sft", "reward_model", "cost_model")]


def main(run: Run[EvaluateParams]) -> None:
    """Run the stage."""
    params = run.params
    item, folder = run.pick(params.policies, "evaluate.policies")
    prompts = read_table(PROMPT_SET, PROMPTS).head(params.prompts)
    path = Path("models") / folder
    if path.is_dir() and not is_policy(path):  # no candidate was certified
        return absent(run)
    scorers = Scorers.load(run.resources)
    policy = scorers.reference if folder == "sft" else policy_at(path, run.resources)
    scratch = run.scratch(path, PROMPT_SET, *SCORERS)
    answers = kept_answers(
        scratch / "answers.parquet", partial(drawn, run, policy, prompts, scorers)
    )
    world = bool((prompts["source"] == "world").all())
    answers = add_truth(answers) if world else answers
    log_ratio, tilt = on_the_pool(policy, scorers)
    metrics = summarise(answers, log_ratio, params.confidence) | {"tilt": tilt}
    metrics["off_support"] = off_support(answers, params)
    frontier: list[FrontierRow] = []
    if world:
        enumerated = read_table(SCORED / "enumerated.parquet", ENUMERATED)
        kept = enumerated[enumerated["prompt_id"].isin(prompts["prompt_id"])]
        problem = finite_problem(kept, params.beta)
        metrics |= against_optimum(metrics, problem, params.limit)
        frontier = exact_frontier(problem, metrics["optimum"]["lam"])
    if params.additional:
        metrics["additional"] = additional_constraints(
            answers, params.additional, params.confidence
        )
    with replacing(OUT / item) as out:
        out.mkdir()
        write_parquet(out / "answers.parquet", answers, ANSWERS)
        if world:
            write_json(out / "frontier.json", [as_row(point) for point in frontier])
    told = Evaluated(policy=item, max_new_tokens=params.max_new_tokens, **metrics)
    run.metrics(as_row(told))
    finished(scratch)


def drawn(
    run: Run[EvaluateParams], policy: Policy, prompts: pd.DataFrame, scorers: Scorers
) -> pd.DataFrame:
    """A policy's answers to the held-out prompts, scored: schema ANSWERS."""
    params = run.params
    started = time.monotonic()
    answers = roll_out(
        policy, prompts, scorers,
        count=params.samples_per_prompt, max_new_tokens=params.max_new_tokens, seed=params.seed,
    )  # fmt: skip
    seconds = time.monotonic() - started
    run.throughput["tokens_per_second"] = float(answers["length"].sum() / seconds)
    return answers


def absent(run: Run[EvaluateParams]) -> None:
    """Write down that there is no such policy, in place of its answers and metrics."""
    with replacing(OUT / str(run.item)) as out:
        out.mkdir()
        write_parquet(out / "answers.parquet", [], ANSWERS)
    log.warning("models/%s holds no policy: none was certified", run.params.policies[str(run.item)])
    run.metrics(as_row(NotEvaluated(policy=str(run.item), absent=True)))


def on_the_pool(policy: Policy, scorers: Scorers) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Some reference samples of every pool prompt by a policy: log(pi / pi_ref), and its tilt.

    The table has columns prompt_id and log_ratio.
    """
    pool = read_table(SCORED / "pool.parquet", POOL)
    pool = pool[pool["sample"] < TILT_SAMPLES]
    ratios = log_ratios(policy, pool, scorers)
    table = pd.DataFrame({"prompt_id": pool["prompt_id"].to_numpy(), "log_ratio": ratios})
    return table, asdict(tilt_on(pool, ratios))


def off_support(answers: pd.DataFrame, params: EvaluateParams) -> dict[str, float] | None:
    """The share of answers that surprise pi_ref more than a share of held-out answers does.

    None where there are too few of these to tell. The scores of such answers are extrapolation.
    """
    logp_ref, length = columns(read_table(SCORED / HELD_OUT, SUPPORT))
    if not enough(logp_ref, params.support_share):
        return None
    beyond = fit_support(logp_ref, length, params.support_share).beyond(*columns(answers)) > 0
    return clustered_share(beyond, answers["prompt_id"].to_numpy(), params.confidence).as_dict()


def additional_constraints(
    answers: pd.DataFrame, additional: Mapping[str, ConstraintSpec], confidence: float
) -> dict[str, dict[str, float | None]]:
    """What the answers show of each additional constraint: {name: {mean, low, high, limit}}, on the
    prompts that it is on.

    A CVaR is that of the answers, the mean of t + (c - t)_+ / (1 - level) at their value at risk t.
    """
    measured: dict[str, dict[str, float | None]] = {}
    for name, spec in additional.items():
        added = constraint(name, spec)
        rows = answers[added.applies(answers["prompt"].tolist())]
        if rows.empty:
            log.warning("%s.prompts: %r is found in no evaluated prompt", added.key, added.prompts)
            measured[name] = {"mean": None, "low": None, "high": None, "limit": spec.limit}
            continue
        cost, length, ended = (
            rows[column].to_numpy(float) for column in ("cost", "length", "ended")
        )
        if spec.level is not None:
            added = replace(added, threshold=value_at_risk(cost, np.ones_like(cost), spec.level))
        mean = clustered_share if spec.quantity in SHARES else clustered_mean
        values = mean(added.values(cost, length, ended), rows["prompt_id"].to_numpy(), confidence)
        measured[name] = {**values.as_dict(), "limit": spec.limit}
    return measured


if __name__ == "__main__":
    execute(main, EvaluateParams)
