"""dual_search NAME: the search of one row of `methods` -> models/aligned/NAME and
reports/search/NAME.json.

    python -m stages.dual_search dualign

Measures the policy at the first multiplier on its own answers, then trains (or merges) and measures
again as the row's rule says. Every step's policy is kept until the search ends, so an interrupted
search goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualign.core.artifacts import replacing, write_json
from dualign.core.errors import ParamsError
from dualign.core.records import SolvedDual, read_record, read_trained
from dualign.core.schema import POOL, PROMPTS, by_prompt, read_table
from dualign.lm.card import model_card
from dualign.lm.publish import publish
from dualign.math.constraints import Price, prices_in
from dualign.math.dual.solution import slater_radius
from dualign.methods import Plan, plan
from dualign.params.search import ROW_SECTIONS, DualSearchParams
from dualign.params.training import LOSS_FIELDS, PairLossParams
from dualign.search import rules
from dualign.search.backend import ModelBackend
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
    params = run.params
    item, spec = run.pick(params.methods, "methods")
    row = plan(item, spec)
    params = with_row(params, row.name)
    start = _metrics(row.start)
    _check_scores(row, start)
    _check_start(row, start)
    reference = _metrics(row.reference)
    _check_losses(row, start, reference)
    models = {
        MODELS / name for name in ("sft", "reward_model", "cost_model", row.reference, row.start)
    }
    measured = {METRICS / f"{name}.json" for name in (row.start, row.reference)}
    scratch = run.scratch(PROMPT_SET, *PAIRS, SCORED, DUAL, *sorted(models), *sorted(measured))
    prompts = read_table(PROMPT_SET, PROMPTS).head(params.prompts)
    pair_loss = PairLossParams(**start["pair_loss"]) if row.method.inner == "lagrangian" else None
    if (
        pair_loss is not None and not row.method.warm
    ):  # from the reference again: as its start was trained
        update = {"learning_rate": start["learning_rate"]}
        params = params.model_copy(update={"training": params.training.model_copy(update=update)})
    loss, clip = _loss(start), reference.get("clip")
    bench = ModelBackend(
        row,
        params,
        run.resources,
        pair_loss,
        prompts,
        scratch,
        loss=loss,
        reward_clip=clip,
        prices=additional_constraints(row),
    )
    known = context(row, start, params)
    steps, stopped = rules.run(row, bench.start, known, params, bench, scratch)
    result = rules.summary(row, steps, stopped, params, known, trainings(row, start))
    chosen = steps[result["chosen"]]
    log.info(
        "%s; the policy of step %d at lambda %.4f is returned", stopped, chosen.step, chosen.lam
    )
    with replacing(MODELS / "aligned" / item) as folder:
        publish(Path(chosen.policy), folder)
        (folder / "README.md").write_text(model_card(row, result, params))
    write_json(Path("reports/search") / f"{item}.json", result)
    run.losses(bench.losses(len(steps)), ("training", "step", "loss"))
    spent = ("feasible", "trainings", "generated_tokens", "labels", "comparisons")
    run.metrics(
        {**numbers(result["steps"][result["chosen"]]), **{key: result[key] for key in spent}}
    )
    finished(scratch)


def numbers(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step of the summary as metrics hold it, which know no lists: additional constraints and
    their prices by name."""
    additional = {
        known["name"]: {"mean": known["mean"], "error": known["error"], "limit": known["limit"]}
        for known in step["additional"]
    }
    prices = zip(additional, step["prices"], strict=False)  # only some searches have any
    return {**step, "additional": additional, "prices": dict(prices)}


def with_row(params: DualSearchParams, name: str) -> DualSearchParams:
    """These params with the sections of one row of `methods` in place."""
    row = params.methods[name]
    return params.model_copy(update={key: getattr(row, key) for key in ROW_SECTIONS})


def context(row: Plan, start: Mapping[str, Any], params: DualSearchParams) -> rules.SearchContext:
    """What the stages before know: the multipliers of pool and start, PD-DPO's Slater radius, the
    kind of merge.

    The reference policy as a start has no multiplier; it counts as where an ascent begins.
    """
    lam, target = goal(row)
    if params.policy_gradient is not None:
        return rules.SearchContext(lam, params.policy_gradient.lambda_init)
    safe = (
        _metrics(row.reference) if row.start.startswith("reward_dpo") else start
    )  # where lambda was spent
    radius = _radius(params) if row.method.rule == "projected_subgradient" else math.inf
    if safe["lam"] > 2 * radius:
        log.warning(
            "%s is at lambda %.4f, above the end of the interval: 2 rho = %.4f",
            row.start,
            safe["lam"],
            2 * radius,
        )
    path = row.reference.startswith("lambda_path/")
    merges = row.method.rule == "merge" and row.method.inner == "safety"
    naive = merges and start["reference"] != row.reference  # the start's tilt holds no reward
    lam_reference = _metrics(row.reference)["lam"] if path else 0.0
    return rules.SearchContext(
        lam, safe["lam"], radius, naive, lam_reference, target, prices_of(row, start)
    )


def goal(row: Plan) -> tuple[float, float | None]:
    """The pool's multiplier and the cost to steer to (None: the limit), with the certificate margin
    where the row says so."""
    known = read_record(DUAL, SolvedDual)
    if row.method.target == "limit":
        return known["lam"], None
    return known["lam_margin"], known["target"]


def additional_constraints(row: Plan) -> list[Price]:
    """The limits beside the one on cost with the pool's prices, 0 for a search whose loss reads no
    scores.

    Such a search has no way to steer to them, but they decide which of its policies are feasible.
    """
    prices = prices_in(read_record(DUAL, SolvedDual))
    if prices and row.method.inner != "lagrangian":
        log.warning(
            "methods.%s does not train on scores of a table: no price steers it to"
            " constraint.additional",
            row.name,
        )
        return [replace(price, lam=0.0) for price in prices]
    return prices


def prices_of(row: Plan, start: Mapping[str, Any]) -> tuple[float, ...]:
    """The prices that Newton's rule begins at: the pool's, or 0 where the start took its multiplier
    by number.
    """
    if row.method.rule != "newton":
        return ()
    return tuple(
        price.lam if start.get("lam_from") == str(DUAL) else 0.0
        for price in prices_in(read_record(DUAL, SolvedDual))
    )


def trainings(row: Plan, start: Mapping[str, Any]) -> int:
    """How many policies were aligned for the start: itself, its reference, those whose log-ratios
    score its pairs.
    """
    needed = {row.start, row.reference, *(start.get(key, "") for key in ("reward", "cost"))}
    return sum("_dpo" in folder or "_path/" in folder for folder in needed)


def _radius(params: DualSearchParams) -> float:
    if params.slater_radius != "pool":
        return params.slater_radius
    pool = read_table(SCORED / "pool.parquet", POOL)
    reward, cost = by_prompt(pool, "reward"), by_prompt(pool, "cost")
    radius = slater_radius(
        reward, cost, limit=params.limit, beta=params.beta, lambda_max=params.lambda_max
    )
    log.info("Slater radius estimated from the pool: %.4f", radius)
    return radius


def _metrics(folder: str) -> Mapping[str, Any]:
    """What the stage that wrote models/FOLDER measured."""
    return read_trained(METRICS, folder)


def _loss(start: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the safety loss that the start was trained with, where they are not plain
    DPO's.
    """
    return {key: start[key] for key in LOSS_FIELDS if start.get(key) not in (None, "dpo")}


def _check_scores(row: Plan, start: Mapping[str, Any]) -> None:
    """A start on log-ratios of policies cannot be retrained here: the tables hold the models'
    scores.
    """
    scores = (start.get("reward", "reward_model"), start.get("cost", "cost_model"))
    if row.method.rule != "one_shot" and scores != ("reward_model", "cost_model"):
        raise ParamsError(
            f"methods.{row.name}.rule: {row.method.rule!r} would train on other scores than"
            f" {row.start}, which took {scores[0]} and {scores[1]}; only one_shot goes with it"
        )


def _check_start(row: Plan, start: Mapping[str, Any]) -> None:
    """A Lagrangian start was trained on the method's data, by the scores of policies for PeCAN and
    for it alone.
    """
    if row.method.inner != "lagrangian":
        return
    data = "pool" if row.method.data == "pool" else "pairs"
    if start["data"] != data:
        raise ParamsError(
            f"methods.{row.name}.start: {row.start} was trained on data {start['data']!r}, but"
            f" {row.method.name} trains on {data!r}; name a run of lagrangian_dpo with data: {data}"
        )
    implicit = (start["reward"], start["cost"]) != ("reward_model", "cost_model")
    if row.method.data == "scored_pairs" and implicit != (row.method.name == "pecan"):
        wanted = (
            "reward and cost from policies"
            if row.method.name == "pecan"
            else "reward_model and cost_model"
        )
        raise ParamsError(
            f"methods.{row.name}.start: {row.start} took the scores of {start['reward']} and"
            f" {start['cost']}, which is not {row.method.name}; name a run of lagrangian_dpo with"
            f" {wanted}"
        )


def _check_losses(row: Plan, start: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Rounds of comparisons add rewards and bonuses, which takes policies of Bradley-Terry's loss,
    DPO.
    """
    for key, metrics in (("start", start), ("reference", reference)):
        loss_type = metrics.get("loss_type", "dpo")
        if row.method.data == "fresh_pairs" and loss_type != "dpo":
            raise ParamsError(
                f"methods.{row.name}.{key}: {getattr(row, key)} was trained by {loss_type}, but"
                f" {row.method.name} goes on by dpo; name a run with loss_type dpo"
            )


if __name__ == "__main__":
    execute(main, DualSearchParams)
