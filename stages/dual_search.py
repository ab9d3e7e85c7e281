"""dual_search NAME: the search of one row of `methods` -> models/aligned/NAME and
reports/search/NAME.json.

    python -m stages.dual_search dualign

Measures the policy at the first multiplier on its own answers, then trains (or merges) and measures
again as the row's rule says. Every step's policy is kept until the search ends, so an interrupted
search goes on."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from dualign.core.artifacts import replacing, write_json
from dualign.core.records import SolvedDual, as_row, read_record, solved_for, took_prices
from dualign.core.schema import POOL, PROMPTS, by_prompt, read_table
from dualign.lm.card import model_card
from dualign.lm.publish import publish
from dualign.math.constraints import prices_in
from dualign.math.dual.solution import slater_radius
from dualign.methods import Plan, plan
from dualign.params.search import ROW_SECTIONS, DualSearchParams
from dualign.search.backend import ModelBackend
from dualign.search.loop import run as search_policies
from dualign.search.policy import Search, SearchContext
from dualign.search.start import (
    TrainedPolicy,
    as_started,
    check,
    goal,
    start_prices,
    steerable,
    trainings,
)
from dualign.search.summary import numbers, summary
from dualign.search.task import Inputs, PairLosses, SearchTask
from dualign.stage import Run, execute, finished

log = logging.getLogger("dualign")

PROMPT_SET = Path("data/prepared/search.parquet")
PAIRS = (Path("data/prepared/helpful_pairs.parquet"), Path("data/prepared/safety_pairs.parquet"))
SCORED = Path("data/scored")
DUAL = Path("data/dual/dual.json")
MODELS = Path("models")
METRICS = Path("reports/metrics")


def main(run: Run[DualSearchParams]) -> None:
    """Run the stage."""
    item, spec = run.pick(run.params.methods, "methods")
    row = plan(item, spec)
    start = TrainedPolicy.read(METRICS, row.start)
    reference = TrainedPolicy.read(METRICS, row.reference)
    check(row, start, reference)
    params = as_started(row, start, with_row(run.params, item))

    models = {MODELS / name for name in ("sft", "reward_model", "cost_model")}
    models |= {MODELS / row.reference, MODELS / row.start}
    measured = {METRICS / f"{name}.json" for name in (row.start, row.reference)}
    scratch = run.scratch(PROMPT_SET, *PAIRS, SCORED, DUAL, *sorted(models), *sorted(measured))

    search = Search(row, params, context(row, start, reference, params))
    task = SearchTask(
        row,
        params,
        run.resources,
        prompts=read_table(PROMPT_SET, PROMPTS).head(params.prompts),
        scratch=scratch,
        inputs=Inputs(MODELS, PROMPT_SET.parent, SCORED),
        losses=PairLosses.of(row, start, reference),
        prices=steerable(row, prices_in(dual_of(row).prices)),
    )
    backend = ModelBackend(task)
    steps, stopped = search_policies(search, backend.start, backend, scratch)

    result = summary(search, steps, stopped, before=trainings(row, start, reference))
    chosen = steps[result.chosen]
    log.info(
        "%s; the policy of step %d at lambda %.4f is returned", stopped, chosen.step, chosen.lam
    )
    with replacing(MODELS / "aligned" / item) as folder:
        publish(Path(chosen.policy), folder)
        (folder / "README.md").write_text(model_card(row, result, params))
    write_json(Path("reports/search") / f"{item}.json", as_row(result))
    run.losses([as_row(row) for row in backend.losses(len(steps))], ("training", "step", "loss"))
    run.metrics(numbers(result))
    finished(scratch)


def with_row(params: DualSearchParams, name: str) -> DualSearchParams:
    """These params with the sections of one row of `methods` in place."""
    row = params.methods[name]
    return params.model_copy(update={key: getattr(row, key) for key in ROW_SECTIONS})


def context(
    row: Plan, start: TrainedPolicy, reference: TrainedPolicy, params: DualSearchParams
) -> SearchContext:
    """What earlier stages know: multipliers of pool and start, Slater radius, kind of merge.

    The reference policy as a start has no multiplier; it counts as where an ascent begins.
    """
    solved = dual_of(row)
    lam, target = goal(row, solved)
    if params.policy_gradient is not None:
        return SearchContext(lam, params.policy_gradient.lambda_init)

    first = reference if row.start.startswith("reward_dpo") else start  # where lambda was spent
    assert first.lam is not None  # `methods.plan` saw to it
    radius = _radius(params) if row.method.rule == "projected_subgradient" else math.inf
    if first.lam > 2 * radius:
        log.warning(
            "%s is at lambda %.4f, above the end of the interval: 2 rho = %.4f",
            row.start,
            first.lam,
            2 * radius,
        )
    path = row.reference.startswith("lambda_path/")
    merges = row.method.rule == "merge" and row.method.inner == "safety"
    return SearchContext(
        lam,
        first.lam,
        radius,
        naive=merges and start.reference != row.reference,  # the start's tilt holds no reward
        lam_reference=reference.lam or 0.0 if path else 0.0,
        target_cost=target,
        prices=start_prices(row, start, prices_in(solved.prices), DUAL),
        priced=took_prices(start.lam_from, DUAL),
    )


def dual_of(row: Plan) -> SolvedDual:
    """The pool's dual of the scores that a method trains on: doubted in a training on the pool."""
    return solved_for(read_record(DUAL, SolvedDual), doubted=row.method.data == "pool")


def _radius(params: DualSearchParams) -> float:
    if params.slater_radius != "pool":
        return params.slater_radius
    pool = read_table(SCORED / "pool.parquet", POOL)
    reward = by_prompt(pool, "reward")
    cost = by_prompt(pool, "cost")
    radius = slater_radius(
        reward, cost, limit=params.limit, beta=params.beta, lambda_max=params.lambda_max
    )
    log.info("Slater radius estimated from the pool: %.4f", radius)
    return radius


if __name__ == "__main__":
    execute(main, DualSearchParams)
