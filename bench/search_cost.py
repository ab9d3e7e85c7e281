"""What a search costs: policy trainings, tokens and seconds from scored answers to a policy at the
limit.

    python -m bench.search_cost --jobs 2

Runs the pipeline of the embedded world once for each seed as far as the scored answers, in a folder
of its own. From there every method searches each limit from nothing, by the rules of
`dualign.search` on the same trainer with the same number of steps, until one test is met. The
world's oracle judges the policy that ended the search. A run that was interrupted goes on where it
stopped."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import pandas as pd
import torch
from ruamel.yaml import YAML
from transformers.utils import logging as transformers_logging

from bench import options, world
from bench.options import knob
from dualign.core.artifacts import read_json, replacing, write_json
from dualign.core.errors import DualignError
from dualign.core.schema import ENUMERATED, POOL, PROMPTS, by_prompt, read_table
from dualign.evaluation.against_optimum import add_truth, against_optimum, finite_problem
from dualign.evaluation.rollout import Scorers, measure, roll_out
from dualign.evaluation.stats import Measurement, clustered_mean
from dualign.lm.mixture import policy_at
from dualign.math import tabular
from dualign.math.dual.root import root
from dualign.math.dual.solution import slater_radius
from dualign.methods import Plan, plan
from dualign.params.base import Resources, TrainingParams
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load, load_resources
from dualign.params.search import DualSearchParams
from dualign.params.training import LagrangianDpoParams, PairLossParams, SafetyDpoParams
from dualign.search.backend import ModelBackend
from dualign.search.journal import Step
from dualign.search.loop import SearchBackend, run
from dualign.search.policy import Search, SearchContext
from dualign.search.task import Inputs, PairLosses, SearchTask
from pipeline.dvc.overlay import whole

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.search_cost"
PARAMS = world.ROOT / "params/every-method.yaml"

#: Our training at two multipliers for all limits of a seed; the row `path` merges them.
PATH: dict[str, Any] = {
    name: {
        "lam": lam,
        "begin": begin,
        "learning_rate": 8e-3,
        "pair_loss": {"labels": "soft", "normalised": False, "anchor": 0.3, "nll": 2.0},
    }
    for name, lam, begin in (("slack", 0.0, "sft"), ("strict", 3.0, "lambda_path/slack"))
}
#: What every search starts from, and what only some do: pi_r for PD-DPO, two policies for merges.
SCORED = ("prepare", "sft", "reward_model", "cost_model", "score")
SHARED = {
    "reward_dpo/helpful": ("reward_dpo@helpful",),
    "lambda_path/slack": tuple(f"lambda_path@{name}" for name in PATH),
}
STAGES = (*SCORED, *(stage for stages in SHARED.values() for stage in stages))
#: What differs from `PARAMS`: measurements are smaller, one thread each, and no search ends before
#: the test.
SMALLER: dict[str, Any] = {
    "prepare.eval_prompts": 300,
    "dual_search.prompts": 300,
    "dual_search.samples_per_prompt": 2,
    "dual_search.max_trainings": 11,
    "dual_search.merge_steps": 11,
    "evaluate.prompts": 300,
    "evaluate.samples_per_prompt": 2,
    "resources.checkpoint_steps": 10_000,
    "resources.threads": 1,
    "lambda_path.runs": PATH,
    "methods.path": {
        "method": "dualign",
        "rule": "merge",
        "start": "lambda_path/strict",
        "reference": "lambda_path/slack",
    },
}
#: Sections whose trainings are all of the same size.
TRAININGS = ("reward_dpo", "safety_dpo", "lagrangian_dpo", "lambda_path", "dual_search")

TOLERANCE = 0.05  # in units of cost; a cost nearer than this below the limit is not too safe


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command.

    The limits lie at one to five sixths of the way from C(0) to C(3) that the pool of seed 7
    predicts, rounded."""

    seeds: tuple[int, ...] = knob((7, 8, 9), "seeds of data and trainings")
    limits: tuple[float, ...] = knob((0.0, -0.2, -0.4, -0.55, -0.75), "limits of the expected cost")
    steps: int = knob(
        600, "gradient steps of each training; as many as shipped params take to train ours at λ̂"
    )
    pairs: int = knob(32, "pairs of each step")
    jobs: int = knob(1, "seeds that run at the same time, each on one thread")
    work: str = knob(".scratch/bench-search-cost", "folder of the runs")

    def __post_init__(self) -> None:
        if min(self.steps, self.pairs, self.jobs) < 1:
            raise DualignError("steps, pairs and jobs must be at least 1")


# --- searches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A search: its row of `methods` in the params, its first multiplier, and what is changed.

    `first` is the multiplier of the pool, none (the least that the loss takes, 0 or `lambda_min`),
    or that of a policy that is there for all limits."""

    name: str
    title: str
    method: str
    first: Literal["pool", "none", "path"]
    step_size: float | None = None


ROWS = (
    Row("dualign", "dualign from λ̂", "dualign", "pool"),
    Row("path", "dualign, merges between λ = 0 and 3", "path", "path"),
    Row("c_dpo_1", "C-DPO from 0, η = 1", "c_dpo", "none", 1.0),  # the step size of the params
    Row("caid", "CAID from λ̂, η = 1", "caid", "pool"),
    Row("pd_dpo_2", "PD-DPO from λ_min, η = 2", "pd_dpo", "none", 2.0),
    Row("c_dpo_2", "C-DPO from 0, η = 2", "c_dpo", "none", 2.0),
    Row("pd_dpo_1", "PD-DPO from λ_min, η = 1", "pd_dpo", "none", 1.0),
    Row("c_dpo_pool", "C-DPO from λ̂, η = 1", "c_dpo", "pool"),
    Row("c_dpo_4", "C-DPO from 0, η = 4", "c_dpo", "none", 4.0),
    Row("pd_dpo_4", "PD-DPO from λ_min, η = 4", "pd_dpo", "none", 4.0),
)


@dataclass(frozen=True)
class Scored:
    """A seed's run as far as the scored answers, and what the searches read of it."""

    seed: int
    folder: Path

    @functools.cached_property
    def params(self) -> DualSearchParams:
        """The params of a search."""
        return load(DualSearchParams, self.folder / "params.yaml")

    @functools.cached_property
    def evaluation(self) -> EvaluateParams:
        """The params of the evaluation."""
        return load(EvaluateParams, self.folder / "params.yaml")

    @functools.cached_property
    def resources(self) -> Resources:
        """How to run."""
        return load_resources(self.folder / "params.yaml")

    @functools.cached_property
    def inputs(self) -> Inputs:
        """The folders that a search reads."""
        return Inputs(
            self.folder / "models", self.folder / "data/prepared", self.folder / "data/scored"
        )

    @functools.cached_property
    def scorers(self) -> Scorers:
        """Reference, reward and cost model."""
        return Scorers.load(self.resources, self.inputs.models)

    @functools.cached_property
    def pool(self) -> pd.DataFrame:
        """The scored samples of the reference."""
        return read_table(self.inputs.scored / "pool.parquet", POOL)

    @functools.cached_property
    def reference(self) -> Step:
        """What comes before the first training: pi_ref, measured on the pool."""
        measured = measure(self.pool.assign(logp=self.pool["logp_ref"]))
        return Step(0, 0.0, None, str(self.inputs.models / "sft"), False, measured)

    @functools.cached_property
    def problem(self) -> tabular.Problem:
        """The exact problem on the prompts of the evaluation."""
        answers = read_table(self.inputs.scored / "enumerated.parquet", ENUMERATED)
        return finite_problem(
            answers[answers["prompt_id"].isin(self.prompts("eval")["prompt_id"])], self.params.beta
        )

    def prompts(self, name: Literal["search", "eval"]) -> pd.DataFrame:
        """The prompts of the searches' own estimates, or of the evaluation."""
        count = self.params.prompts if name == "search" else self.evaluation.prompts
        return read_table(self.inputs.prepared / f"{name}.parquet", PROMPTS).head(count)

    def context(self, row: Row, start: str, limit: float) -> SearchContext:
        """The multiplier of the pool, the first one, and PD-DPO's Slater radius, at a limit."""
        reward = by_prompt(self.pool, "reward")
        cost = by_prompt(self.pool, "cost")
        beta = self.params.beta
        most = self.params.lambda_max
        pool = root(reward, cost, limit=limit, beta=beta, lambda_max=most)
        if row.first == "pool":
            return SearchContext(pool, pool)
        if row.first == "path":
            return SearchContext(pool, PATH["strict"]["lam"], lam_reference=PATH["slack"]["lam"])
        if start.startswith("lagrangian_dpo"):
            return SearchContext(pool, 0.0)
        radius = slater_radius(reward, cost, limit=limit, beta=beta, lambda_max=most)
        return SearchContext(pool, self.params.lambda_min, radius)

    def first_training(self, start: str) -> tuple[PairLossParams | None, TrainingParams]:
        """PairLossConfig loss (None for the safety loss) and training of the stage that writes
        models/START.
        """
        stage, _, run = start.partition("/")
        if stage == "safety_dpo":
            return None, load(SafetyDpoParams, self.folder / "params.yaml").training
        section = load(LagrangianDpoParams, self.folder / "params.yaml")
        rate = section.runs[run].learning_rate or section.training.learning_rate
        return section.runs[run].pair_loss, section.training.model_copy(
            update={"learning_rate": rate}
        )

    def bench(
        self,
        row: Plan,
        params: DualSearchParams,
        pair_loss: PairLossParams | None,
        training: TrainingParams,
        scratch: Path,
    ) -> ModelBackend:
        """The backend of a search whose trainings are as `training` says."""
        task = SearchTask(
            row,
            params.model_copy(update={"training": training}),
            self.resources,
            self.prompts("search"),
            scratch,
            self.inputs,
            PairLosses(pair_loss),
        )
        return ModelBackend(task)


def first_policy(scored: Scored, row: Plan, lam: float) -> tuple[Path, float]:
    """The folder of a search's step 0, trained from the reference and measured, and the CPU seconds
    that it took.

    It is the same for all searches that start there, so it is made once and counted for each.
    """
    folder = scored.folder / "first" / f"{row.start.replace('/', '-')}-{lam:.6f}"
    if not folder.is_dir():
        pair_loss, training = scored.first_training(row.start)
        params = scored.params.model_copy(
            update={"refresh_prompts": 0}
        )  # nothing has been trained to answer afresh
        with replacing(folder) as scratch:
            started = time.process_time()
            bench = scored.bench(row, params, pair_loss, training, scratch)
            bench.measure(0, bench.train(0, lam, scored.reference))
            write_json(scratch / "seconds.json", time.process_time() - started)
    return folder, read_json(folder / "seconds.json")


def met(lam: float, measured: Measurement, limit: float, z: float) -> bool:
    """The test that ends every search: the cost is within the limit, and not needlessly below it.

    C <= d + z SE, and |C - d| <= max(z SE, TOLERANCE) unless lambda is 0, where the limit is slack.
    """
    noise = z * measured.cost_se
    near = abs(measured.cost - limit) <= max(noise, TOLERANCE)
    return measured.cost <= limit + noise and (near or lam == 0)


def seek(search: Search, start: str, bench: SearchBackend, scratch: Path) -> list[Step]:
    """Search policy by policy from `start`, until the test is met, the rule stops or the budget is
    spent.
    """
    params = search.params

    def enough(step: Step) -> bool:
        return met(step.lam, step.measured, params.limit, params.z)

    return run(search, start, bench, scratch, enough)[0]


def begin(
    scored: Scored, row: Row, chosen: Plan, params: DualSearchParams, lam: float, scratch: Path
) -> tuple[ModelBackend, str, float]:
    """The backend of a search in `scratch`, its first policy and the CPU seconds that this took
    for it alone.
    """
    pair_loss, training = (
        (None, params.training) if row.first == "path" else scored.first_training(chosen.start)
    )
    bench = scored.bench(
        chosen, params, pair_loss, params.training if chosen.method.warm else training, scratch
    )
    if row.first == "path":
        scratch.mkdir(parents=True)
        return bench, str(scored.inputs.models / chosen.start), 0.0
    first, seconds = first_policy(scored, chosen, lam)
    shutil.copytree(first, scratch)
    return bench, str(scratch / "step-0/policy"), seconds


def run_row(scored: Scored, row: Row, limit: float) -> dict[str, Any]:
    """One search and what it cost, its own first policy included; the policy that ended it, judged
    by the oracle.
    """
    chosen = plan(row.method, scored.params.methods[row.method])
    known = scored.context(row, chosen.start, limit)
    params = scored.params.model_copy(
        update={"limit": limit, "step_size": row.step_size or scored.params.step_size}
    )
    scratch = scored.folder / "searches" / f"{limit:g}-{row.name}"
    shutil.rmtree(scratch, ignore_errors=True)  # of an interrupted run, whose seconds nobody knows
    bench, start, seconds = begin(scored, row, chosen, params, known.lam_start, scratch)
    started = time.process_time()
    steps = seek(Search(chosen, params, known), start, bench, scratch)
    seconds += time.process_time() - started
    last = steps[-1]
    trainings = sum(step.trained for step in steps) + (row.first != "path")
    found = {
        "seed": scored.seed,
        "limit": limit,
        "row": row.name,
        "lam_pool": known.lam_pool,
        "met": met(last.lam, last.measured, limit, params.z),
        "trainings": trainings,
        "policies": len(steps),
        "before": len(SHARED.get(chosen.reference, ())),
        "gradient_steps": trainings * (params.training.max_steps or 0),
        "generated_tokens": sum(step.measured.generated_tokens for step in steps),
        "seconds": seconds,
        "steps": [{"lam": step.lam, **asdict(step.measured)} for step in steps],
        **judge(scored, last.policy, limit),
    }
    shutil.rmtree(scratch)
    return found


def judge(scored: Scored, policy: str, limit: float) -> dict[str, float]:
    """What the oracle says of a policy's answers to held-out prompts: E[c*] - limit and J* - J."""
    params = scored.evaluation
    answers = add_truth(
        roll_out(
            policy_at(policy, scored.resources), scored.prompts("eval"), scored.scorers,
            count=params.samples_per_prompt, max_new_tokens=params.max_new_tokens, seed=params.seed,
        )
    )  # fmt: skip
    columns = {name: answers[name] for name in ("true_reward", "true_cost", "grammatical")}
    columns["kl"] = answers["logp"] - answers["logp_ref"]
    ids = answers["prompt_id"].to_numpy()
    summary = {
        name: clustered_mean(column.to_numpy(float), ids).as_dict()
        for name, column in columns.items()
    }
    return {
        "excess": summary["true_cost"]["mean"] - limit,
        "gap": against_optimum(summary, scored.problem, limit)["value_gap"],
        "grammatical": summary["grammatical"]["mean"],
    }


# --- running --------------------------------------------------------------------------------------


def smaller(settings: Settings) -> dict[str, Any]:
    """`PARAMS` with what differs from it here."""
    content: dict[str, Any] = YAML().load(whole(PARAMS))
    sizes = {"max_steps": settings.steps, "batch_size": settings.pairs}
    trainings = {
        f"{name}.training.{key}": size for name in TRAININGS for key, size in sizes.items()
    }
    for path, value in {**SMALLER, **trainings}.items():
        *sections, leaf = path.split(".")
        functools.reduce(lambda part, name: part[name], sections, content)[leaf] = value
    return content


@functools.lru_cache
def scored_at(seed: int, params: Path) -> Scored:
    """The run of a seed, its stages done as far as the scored answers."""
    return Scored(seed, world.run(world.set_up(seed, params, params.parent), 1, STAGES).folder)


def rows_of(row: Row, limits: Sequence[float], params: Path, seed: int) -> list[dict[str, Any]]:
    """One search for each limit, kept in a file of its own as it ends."""
    scored = scored_at(seed, params)
    rows = []
    for limit in limits:
        path = scored.folder / "rows" / f"{limit:g}-{row.name}.json"
        if not path.is_file():
            write_json(path, run_row(scored, row, limit))
        rows.append(read_json(path))
        log.info(
            "seed %d, limit %g: %s, %d trainings", seed, limit, row.title, rows[-1]["trainings"]
        )
    return rows


def shared(scored: Scored) -> dict[str, Any]:
    """What serves all searches of a seed: the tokens of the pool, and the seconds of each stage."""
    seconds = {name: read_json(world.ended(scored.folder, name))["seconds"] for name in STAGES}
    return {
        "seed": scored.seed,
        "pool_tokens": int(scored.pool["length"].sum()),
        "seconds": seconds,
    }


def _quiet() -> None:
    """One thread and our own lines alone, in every process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("dvc", "dualign"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


# --- the page -------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each search: over seeds and limits, the median, mean and largest number of
    trainings, and means.
    """
    heads = (
        "search",
        "test met",
        "trainings, median",
        "mean",
        "most",
        "policies",
        "gradient steps",
        "tokens",
        "CPU seconds",
        "E[c*] − limit",
        "J* − J",
        "grammatical",
    )
    lines = options.head(heads)
    for row, own in _by_row(rows):
        trainings = [found["trainings"] for found in own]
        means = {key: options.mean(own, key) for key in _MEANS}
        cells = [
            row.title + (f" (and {own[0]['before']} for all limits)" if own[0]["before"] else ""),
            f"{sum(found['met'] for found in own)}/{len(own)}",
            f"{median(trainings):g}", f"{fmean(trainings):.1f}", f"{max(trainings)}",
            *(f"{means[key]:.{digits}f}" for key, digits in _MEANS.items()),
        ]  # fmt: skip
        lines.append(options.line(cells))
    return lines


_MEANS = {
    "policies": 1,
    "gradient_steps": 0,
    "generated_tokens": 0,
    "seconds": 0,
    "excess": 3,
    "gap": 3,
    "grammatical": 3,
}


def by_limit(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trainings of every seed at each limit."""
    limits = sorted({found["limit"] for found in rows}, reverse=True)
    lines = options.head(["search", *(f"d = {limit:g}" for limit in limits)])
    for row, own in _by_row(rows):
        cells = [_trainings(options.where(own, limit=limit)) for limit in limits]
        lines.append(options.line([row.title, *cells]))
    return lines


def _trainings(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['trainings']}{'' if row['met'] else '+'}" for row in rows)


def best_step_sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The step size with the fewest trainings for each method that was given several, in
    hindsight.
    """
    means = {row: options.mean(own, "trainings") for row, own in _by_row(rows) if row.step_size}
    lines = []
    for method in dict.fromkeys(row.method for row in means):
        tried = [row for row in means if row.method == method]
        best = min(tried, key=means.__getitem__)
        if len(tried) > 1:
            lines.append(
                f"Best step size in hindsight: {best.title}, {means[best]:.1f} trainings on"
                " average."
            )
    return lines


def _by_row(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Row, list[Mapping[str, Any]]]]:
    """The searches that have been made, in the order of `ROWS`."""
    found = [(row, options.where(rows, row=row.name)) for row in ROWS]
    return [(row, own) for row, own in found if own]


def page(
    settings: Settings, common: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> str:
    """The page in markdown."""
    tokens = options.mean(common, "pool_tokens")
    seconds = [found["seconds"] for found in common]

    def shared(*stages: str) -> float:
        return sum(options.mean(seconds, stage) for stage in stages)

    score = shared("score")
    helpful, path = (shared(*stages) for stages in SHARED.values())
    return options.page(
        "What a search costs",
        options.command(PROGRAM, settings),
        (
            f"{len(settings.seeds)} seeds × {len(settings.limits)} limits; trainings of"
            f" {settings.steps} steps of {settings.pairs} pairs. Once for all searches of a seed:"
            f" the pool, {tokens:.0f} tokens, drawn and scored with the pairs in {score:.0f} s; for"
            f" PD-DPO alone π_r, one training of {helpful:.0f} s; for the merges alone two"
            f" trainings of {path:.0f} s."
        ),
        "\n".join(table(rows)),
        "\n".join(f"- {line}" for line in best_step_sizes(rows)),
        _NOTES,
        "## Trainings by limit",
        "One number for each seed; `+` means that the test was not met.",
        "\n".join(by_limit(rows)),
    )


_NOTES = f"""\
How to read it: every search starts from nothing, its first policy counts, and it goes on by its own
rule until the cost
of the policy's own answers to the search prompts is at most z standard errors above the limit and
at most {TOLERANCE:g} (or z standard errors) from it, z as in the params, or 12 policies are
trained. λ̂ is the multiplier of the pool. Merges train nothing for a limit; *policies* counts what
was measured. The shipped start of dualign also trains on its own answers, as a soup of two, and its
search merges; that is left out here. Tokens are those that the policies generate to be measured or
trained on; seconds are the processor's. `E[c*] − limit` and `J* − J` are those of the policy that
ended the search, by the oracle on held-out prompts: what the scorers misjudge is in them."""


def publish(
    settings: Settings,
    out: Path,
    common: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """Write search-cost.json and search-cost.md of the rows so far; returns the page."""
    content = {
        "command": options.command(PROGRAM, settings),
        "settings": asdict(settings),
        "shared": common,
    }
    text = page(settings, common, rows)
    options.publish(out, "search-cost", {**content, "rows": rows}, text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; its files hold the rows that have ended, and the page goes to stdout.
    Returns the status.
    """
    settings, out = options.parse(Settings, PROGRAM, __doc__, argv)
    _quiet()
    params = Path(settings.work).absolute() / "search-cost.yaml"
    rows: list[dict[str, Any]] = []
    text = ""
    try:
        with replacing(params) as temporary:
            YAML().dump(smaller(settings), temporary)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(settings.jobs, mp_context=context, initializer=_quiet) as pool:
            for row in ROWS:
                task = functools.partial(rows_of, row, settings.limits, params)
                rows += [found for own in pool.map(task, settings.seeds) for found in own]
                common = [shared(scored_at(seed, params)) for seed in settings.seeds]
                text = publish(settings, out, common, rows)
    except (DualignError, OSError) as error:
        log.error("%s", error)
        return 1
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
