"""lagrangian_dpo RUN: pi_ref and scored answers at a fixed multiplier -> models/lagrangian_dpo/RUN.

    python -m stages.lagrangian_dpo anchored

The inner problem of C-DPO and MoCAN (scored pairs, labels drawn afresh), of PeCAN (the same, scored
by policies), and ours (the pool, exact labels, anchor). With `refresh` the policy then trains on
its own answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.errors import InfeasibleError
from dualign.core.records import (
    LagrangianMetrics,
    SolvedDual,
    as_row,
    read_record,
    solved_for,
    solved_multiplier,
)
from dualign.core.schema import by_prompt
from dualign.evaluation.rollout import Scorers, kept_answers, roll_out
from dualign.lm.models import load_policy, load_tokenizer
from dualign.lm.tokens import answer_lengths
from dualign.math.constraints import Price, prices_in, with_priced_rewards
from dualign.math.dual.solution import Bootstrap, solve
from dualign.math.dual.tilt import soft_value
from dualign.math.losses import lagrangian_scale
from dualign.params.training import LagrangianDpoParams, LagrangianRun
from dualign.scoring.support import doubt, doubted
from dualign.stage import Run, execute
from dualign.training.implicit_scores import Sources, scored_tables
from dualign.training.lagrangian import pairs_at, train_at
from dualign.training.pairs import fresh_pairs, samples_of
from dualign.training.run import Job, Metrics, trained_once
from dualign.training.soup import soup

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
    chosen = multiplier(item, spec, tables.pool, params)
    off_support = doubt(SCORED, tables.pool, params.pessimism) if wary(spec) else None
    prices = prices_of(item, spec)

    def charged(frame: pd.DataFrame) -> pd.DataFrame:
        """A table as the training reads it: prices are on doubted costs, as in the dual."""
        lengths = partial(answer_lengths, tokenizer)
        return with_priced_rewards(doubted(frame, off_support), prices, lengths)

    frame = charged(tables.pool if spec.data == "pool" else tables.pairs)
    scorers = (MODELS / spec.reward, MODELS / spec.cost, METRICS / f"{spec.cost}.json")
    scores = implicit(spec) or spec.refresh is not None
    scratch = run.scratch(SCORED, DUAL, REFERENCE, *(scorers if scores else ()))
    job = Job(params.training, run.resources, scratch, params.seed)

    def draw(policy: Path, job: Job) -> pd.DataFrame:
        """Its own answers, as the training reads them."""
        return charged(own_answers(policy, tables.pool, spec, params, job))

    def train(job: Job, out: Path) -> Metrics:
        """One policy."""
        if spec.refresh is not None:
            return train_twice(chosen["lam"], frame, draw, spec, params, job, out)
        pairs = pairs_at(chosen["lam"], frame, spec.data, spec, params, tokenizer)
        return train_at(chosen["lam"], pairs, REFERENCE, spec, params, job, out)

    metrics = soup(spec.soup, train, job, OUT / item)

    # A search that starts here looks at these, and takes the rest over.
    told = LagrangianMetrics(
        reward=spec.reward, cost=spec.cost, data=spec.data, **chosen, **metrics
    )
    run.trained(as_row(told), scratch)


def train_twice(
    lam: float,
    frame: pd.DataFrame,
    draw: Callable[[Path, Job], pd.DataFrame],
    spec: LagrangianRun,
    params: LagrangianDpoParams,
    job: Job,
    out: Path,
) -> Metrics:
    """Train on the pool, then on the policy's own answers, which `draw` has scored. What an
    interrupted run has of it is taken up again.
    """
    assert spec.refresh is not None
    tokenizer = load_tokenizer(REFERENCE)
    first = job.scratch / "first"

    def begin() -> Metrics:
        """The training on the pool."""
        pairs = pairs_at(lam, frame, "pool", spec, params, tokenizer)
        begun = replace(job, scratch=job.scratch / "pool")
        return train_at(lam, pairs, REFERENCE, spec, params, begun, first)

    before = trained_once(job.scratch / "first.json", begin)
    fresh = draw(first, job)
    scale = lagrangian_scale(lam, spec.pair_loss.normalised)
    value = soft_value(by_prompt(frame, "reward"), by_prompt(frame, "cost"), lam, params.beta)
    answers = samples_of(fresh, tokenizer)
    own = fresh_pairs(value, answers, lam, params.beta, job.seed + 1, scale)
    changed = spec.refresh.model_dump(include={"max_steps", "learning_rate"})
    again = spec.model_copy(update=changed)
    name = f"{job.name.removesuffix('training')}refresh"
    gone_on = replace(job, scratch=job.scratch / "own", seed=job.seed + 1, name=name)
    metrics = train_at(lam, own, first, again, params, gone_on, out)

    steps = before["losses"][-1]["step"] if before["losses"] else 0
    after = [{**row, "step": steps + row["step"]} for row in metrics["losses"]]
    return {
        **metrics,
        "losses": [*before["losses"], *after],
        "learning_rate": before["learning_rate"],  # what a training from the reference takes over
        "trainings": before["trainings"] + metrics["trainings"],
        "generated_tokens": int(fresh["length"].sum()),
    }


def own_answers(
    policy: Path, pool: pd.DataFrame, spec: LagrangianRun, params: LagrangianDpoParams, job: Job
) -> pd.DataFrame:
    """Scored answers of a policy to the first prompts of the pool, drawn once; schema ANSWERS."""
    options = spec.refresh
    assert options is not None

    def drawn() -> pd.DataFrame:
        asked = pool.drop_duplicates("prompt_id")[["prompt_id", "prompt"]].head(options.prompts)
        return roll_out(
            load_policy(policy, job.resources), asked, Scorers.load(job.resources),
            count=options.samples_per_prompt, max_new_tokens=params.max_new_tokens,
            seed=job.seed + 1,
        )  # fmt: skip

    return kept_answers(job.scratch / "answers.parquet", drawn)


def multiplier(
    item: str, spec: LagrangianRun, pool: pd.DataFrame, params: LagrangianDpoParams
) -> dict[str, Any]:
    """The multiplier and its origin: params, the pool's dual, or that of its implicit scores.

    The last is solved here, so its 95 % interval `lam_low`, `lam_high` comes with it. `margin`
    stays below the limit by the pool's certificate margin."""
    if not isinstance(spec.lam, str):
        return {"lam": spec.lam, "lam_from": "params.yaml"}
    solved = dual_of(spec)
    if not implicit(spec):
        return {"lam": solved_multiplier(solved, spec.lam), "lam_from": str(DUAL)}
    try:
        solution = solve(
            by_prompt(pool, "reward"), by_prompt(pool, "cost"),
            limit=solved.limit if spec.lam == "dual" else solved.target, beta=params.beta,
            lambda_max=solved.lambda_max, bootstrap=Bootstrap(seed=params.seed),
            jackknife=solved.jackknife,
        )  # fmt: skip
    except InfeasibleError as error:
        raise InfeasibleError(f"lagrangian_dpo.runs.{item}, scored by policies: {error}") from error
    low, high = solution.lam_interval
    log.info("lambda %.4f on implicit scores, 95 %% interval %.4f to %.4f", solution.lam, low, high)
    return {"lam": solution.lam, "lam_from": "implicit scores", "lam_low": low, "lam_high": high}


def implicit(spec: LagrangianRun) -> bool:
    """Whether a policy stands in for a scorer."""
    return (spec.reward, spec.cost) != ("reward_model", "cost_model")


def wary(spec: LagrangianRun) -> bool:
    """Whether a run doubts scores off the support: those of scorers on the pool. Methods that train
    on pairs are as published.
    """
    return spec.data == "pool" and not implicit(spec)


def dual_of(spec: LagrangianRun) -> SolvedDual:
    """The pool's dual of the scores that a run reads."""
    return solved_for(read_record(DUAL, SolvedDual), doubted=wary(spec))


def prices_of(item: str, spec: LagrangianRun) -> list[Price]:
    """Prices of additional constraints, which are charged to rewards.

    A multiplier given as a number has none beside it, and prices of scorers mean nothing on
    implicit scores."""
    prices = prices_in(dual_of(spec).prices) if isinstance(spec.lam, str) else []
    if prices and implicit(spec):
        log.warning(
            "lagrangian_dpo.runs.%s is scored by policies and ignores constraint.additional", item
        )
        return []
    return prices


if __name__ == "__main__":
    execute(main, LagrangianDpoParams)
