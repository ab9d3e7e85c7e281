"""The laboratory, part (b): real language models of the embedded world, every method, against the
exact optimum.

    python -m bench.world --seeds 7 8 9 --jobs 2

Runs the pipeline once for each seed, in a folder of its own, and judges every policy by the world's
oracle on generated answers to held-out prompts. A run that was interrupted goes on where it
stopped; a finished one is only read."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from dvc.repo import Repo

from bench import options
from dualign.core.artifacts import read_json, replacing
from dualign.core.errors import DualignError
from dualign.core.schema import ANSWERS, ENUMERATED, POOL, read_table, user
from dualign.data import world
from dualign.evaluation.against_optimum import (
    add_truth,
    ends,
    enumerate_answers,
    finite_problem,
    worth,
)
from dualign.lm.mixture import policy_at
from dualign.lm.models import load_tokenizer
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import answer_lengths, encode_answers, encode_prompts
from dualign.math import tabular
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load, load_resources
from dualign.params.training import LagrangianDpoParams
from dualign.scoring.scorers import Scorer
from dualign.scoring.support import doubt
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.dvc.overlay import whole
from pipeline.dvc.parameters import assign, settings_of
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PROG = "python -m bench.world"
ALLOWED = "(what the scorers allow)"
DOUBTED = "(the same, doubted off their support)"
_EFFORT = ("trainings", "generated_tokens", "seconds")
#: Stages that serve every method alike; their time is nobody's.
SHARED = {"prepare", "sft", "reward_model", "cost_model", "score", "dual_init"}


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """One seed's run: its folder holds params.yaml, dvc.yaml and everything that the stages
    write.
    """

    seed: int
    folder: Path

    @functools.cached_property
    def dag(self) -> dict[str, StageSpec]:
        """The stages by name, in order."""
        return load_dag(self.folder)


def folder_of(seed: int, params: Path, work: Path) -> Path:
    """Where the run of a seed lies."""
    return work / f"{params.stem}-{seed}"


def set_up(
    seed: int, params: Path, work: Path, settings: Mapping[str, Any] = MappingProxyType({})
) -> Lab:
    """Make the folder of a seed; `settings` take the place of values of params. Raises DualignError
    if it holds a run of other params.
    """
    folder = folder_of(seed, params, work)
    text = _settled(params, {"seed": seed, **settings})
    if not folder.is_dir():
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / "data/raw").mkdir(parents=True)
            (temporary / "params.yaml").write_text(text)
            shutil.copy(ROOT / "dvc.yaml", temporary)
            Repo.init(str(temporary), no_scm=True).close()
    elif (folder / "params.yaml").read_text() != text:
        raise DualignError(
            f"{folder} holds the run of other params; delete it, or choose another --work"
        )
    return Lab(seed, folder)


def _settled(params: Path, settings: Mapping[str, Any]) -> str:
    try:
        return assign(whole(params), settings)
    except PipelineError as error:
        raise DualignError(f"{params}: {error}") from error


def run(lab: Lab, threads: int, stages: Collection[str] | None = None) -> Lab:
    """Run the stages of a seed (default: all) that have not ended, in order; output goes to log.txt
    in the folder.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "0",
    }
    for name, spec in lab.dag.items():
        if (stages is not None and name not in stages) or ended(lab.folder, name).is_file():
            continue
        log.info("seed %d: %s", lab.seed, name)
        command = [sys.executable, *spec.by_hand.split()[1:]]
        with (lab.folder / "log.txt").open("a") as output:
            done = subprocess.run(
                command, cwd=lab.folder, env=environment, stdout=output, stderr=output, check=False
            )
        if done.returncode:
            raise DualignError(
                f"{lab.folder}: stage {name} failed with status {done.returncode}; see its log.txt"
            )
    return lab


def ended(folder: Path, name: str) -> Path:
    """The file that a stage of the run in `folder` writes last."""
    return folder / "reports/provenance" / f"{name.replace('@', '/')}.json"


# --- reading --------------------------------------------------------------------------------------


def stages_for(lab: Lab, policies: Sequence[str]) -> set[str]:
    """The stages that the evaluation of these policies needs. Raises DualignError for one that the
    params do not evaluate.
    """
    known = [name.partition("@")[2] for name in lab.dag if name.startswith("evaluate@")]
    for name in policies:
        if name not in known:
            raise DualignError(f"--policies: {name} is not evaluated; choose of {', '.join(known)}")
    return set[str]().union(*(_upstream(lab.dag, f"evaluate@{name}") for name in policies))


def rows_of(lab: Lab, policies: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """One row for each evaluated policy of a seed (None: all): what the oracle says of it, and what
    it took.
    """
    params = load(EvaluateParams, lab.folder / "params.yaml")
    truth = Truth.of(lab, params)
    for name, folder in params.policies.items():
        if policies is not None and name not in policies:
            continue
        measured = read_json(lab.folder / "reports/metrics/evaluate" / f"{name}.json")
        if measured.get("absent"):
            continue
        found = truth.worth(lab, name, folder)
        lowest = measured["true_cost"]["low"]
        certified = folder.startswith("certified/")  # a method's policy once more, made safer
        yield {
            "seed": lab.seed,
            "policy": f"{folder.partition('/')[2]}, certified" if certified else name,
            **truth.judged(found),
            "least_excess": None if lowest is None else lowest - params.limit,
            "displacement": measured["displacement"]["mean"],
            **(dict.fromkeys(_EFFORT) if certified else _effort(lab, folder)),
        }


@dataclass(frozen=True)
class Truth:
    """The exact problem on some prompts, its optimum and where the way begins."""

    problem: tabular.Problem
    enumerated: pd.DataFrame
    limit: float
    price: float
    best: dict[str, float]
    nearest: dict[str, float]

    @classmethod
    def of(cls, lab: Lab, params: EvaluateParams) -> Truth:
        """That of the prompts of a run's evaluation."""
        return cls.on(read_table(lab.folder / "data/scored/enumerated.parquet", ENUMERATED), params)

    @classmethod
    def of_world(cls, lab: Lab, params: EvaluateParams) -> Truth:
        """That of every prompt of the world, so without the chance that draws some of them."""
        return cls.of_prompts(lab, params, world.prompts())

    @classmethod
    def of_prompts(cls, lab: Lab, params: EvaluateParams, texts: Sequence[str]) -> Truth:
        """That of these questions of the world."""
        prompts = pd.DataFrame({"prompt_id": texts, "prompt": list(map(user, texts))})
        answers = enumerate_answers(prompts)
        logp = log_probabilities_of(lab, lab.folder / "models/sft", answers)
        return cls.on(answers.assign(logp_ref=logp), params)

    @classmethod
    def on(cls, enumerated: pd.DataFrame, params: EvaluateParams) -> Truth:
        """That of grammatical answers with their log-probabilities under the reference."""
        problem = finite_problem(enumerated, params.beta)
        return cls(problem, enumerated, params.limit, *ends(problem, params.limit))

    def under(self, lab: Lab, policy: Path) -> np.ndarray:
        """Log-probabilities of the grammatical answers under a policy, [prompts, answers]."""
        logp = log_probabilities_of(lab, policy, self.enumerated)
        return logp.reshape(len(self.problem.cost), -1)

    def worth(self, lab: Lab, name: str, folder: str) -> dict[str, float]:
        """What a policy is worth, every grammatical answer under it read."""
        drawn = read_table(lab.folder / "reports/evaluation" / name / "answers.parquet", ANSWERS)
        return worth(self.problem, self.under(lab, lab.folder / "models" / folder), drawn)

    def way(self, reward: float) -> float:
        """How far a true reward is on the way to that of the optimum."""
        return (reward - self.nearest["reward"]) / (self.best["reward"] - self.nearest["reward"])

    def share(self, value: float) -> float:
        """A difference in J as a share of the way J* - J_0."""
        return value / (self.best["value"] - self.nearest["value"])

    def judged(self, found: Mapping[str, float]) -> dict[str, float]:
        """How far what a policy is worth is from the optimum."""
        gap = self.best["value"] - found["value"]
        excess = found["cost"] - self.limit
        return {
            "gap": gap,
            "relative_gap": self.share(gap),
            "priced_gap": self.share(gap + self.price * excess),
            "excess": excess,
            "reward_share": self.way(found["reward"]),
            "true_reward": found["reward"],
            "true_cost": found["cost"],
            "grammatical": found["grammatical"],
            "kl": found["kl"],
        }


def log_probabilities_of(lab: Lab, policy: Path, answers: pd.DataFrame) -> np.ndarray:
    """log pi of answers under a policy in a folder, [rows]."""
    resources = load_resources(lab.folder / "params.yaml")
    tokenizer = load_tokenizer(lab.folder / "models/sft")
    return log_probabilities(
        policy_at(policy, resources),
        tokenizer,
        encode_prompts(tokenizer, answers["prompt"].tolist()),
        encode_answers(tokenizer, answers["response"].tolist()),
        batch_size=resources.scoring_batch_size,
    ).numpy()


def allowed(lab: Lab) -> Iterator[dict[str, Any]]:
    """What the learned scores allow: the exact tilt of pi_ref by them, at the multiplier where they
    meet the limit; as they are, and with the doubt that the training has off their support.

    No training and no sampling: how far these are from the optimum is the error of reward and cost
    model alone.
    """
    params = load(EvaluateParams, lab.folder / "params.yaml")
    truth = Truth.of(lab, params)
    for name, learned in believed(lab, truth).items():
        policy = learned.policy(tabular.solve(learned, params.limit))
        grammatical = 1 - float(np.exp(policy[:, -1]).mean())
        judged = truth.judged({**truth.problem.describe(policy), "grammatical": grammatical})
        yield {
            "seed": lab.seed,
            "policy": name,
            **judged,
            "least_excess": judged["excess"],
            "displacement": None,
            **dict.fromkeys(_EFFORT, 0),
        }


def believed(lab: Lab, truth: Truth) -> dict[str, tabular.Problem]:
    """The problem by the learned scores: as they are, and doubted off their support, where doubt is
    asked for. Other text has the mean of their scores on what pi_ref wrote of it.
    """
    pool = add_truth(read_table(lab.folder / "data/scored/pool.parquet", POOL))
    scored = {name: _scores(lab, name, truth.enumerated) for name in ("reward", "cost")}
    lengths = answer_lengths(
        load_tokenizer(lab.folder / "models/sft"), truth.enumerated["response"]
    )
    answers = truth.enumerated.assign(**scored, length=lengths)
    pessimism = load(LagrangianDpoParams, lab.folder / "params.yaml").pessimism
    found = doubt(lab.folder / "data/scored", pool, pessimism)
    kinds = {ALLOWED: (answers, pool)}
    if found is not None:
        kinds[DOUBTED] = (found.scores(answers), found.scores(pool))
    other = ~pool["grammatical"].astype(bool)
    return {
        name: _learned(truth.problem, scores, drawn[other])
        for name, (scores, drawn) in kinds.items()
    }


def _learned(truth: tabular.Problem, answers: pd.DataFrame, other: pd.DataFrame) -> tabular.Problem:
    """The problem by learned scores of each grammatical answer, and by their mean of other text."""

    def tabled(name: str) -> np.ndarray:
        known = answers[name].to_numpy(float).reshape(len(truth.cost), -1)
        last = other[name].mean() if len(other) else 0.0
        return np.hstack([known, np.full((len(known), 1), last)])

    return replace(truth, reward=tabled("reward"), cost=tabled("cost"))


def _scores(lab: Lab, name: str, answers: pd.DataFrame) -> np.ndarray:
    """What the reward or cost model says of answers, [rows]."""
    resources = load_resources(lab.folder / "params.yaml")
    scorer = Scorer.load(lab.folder / "models" / f"{name}_model", resources)
    return scorer.score(
        answers["prompt"].tolist(),
        answers["response"].tolist(),
        batch_size=resources.scoring_batch_size,
    )


def _effort(lab: Lab, folder: str) -> dict[str, float]:
    """Policy trainings, generated tokens and seconds that a policy took, beside what serves every
    method.
    """
    writer = next(name for name, spec in lab.dag.items() if f"models/{folder}" in spec.outs)
    own = sorted(_upstream(lab.dag, writer) - SHARED)
    seconds = sum(read_json(ended(lab.folder, name))["seconds"] for name in own)
    aligned = [name for name in own if name.partition("@")[0].endswith(("_dpo", "_path"))]
    metrics = lab.folder / "reports/metrics"
    measured = [read_json(metrics / f"{name.replace('@', '/')}.json") for name in aligned]
    trained = sum(row.get("trainings", 1) for row in measured)
    tokens = sum(row.get("generated_tokens", 0) for row in measured)  # own answers of a start
    if writer.startswith("dual_search@"):
        search = read_json(lab.folder / "reports/search" / f"{writer.partition('@')[2]}.json")
        trained = search["trainings"]
        tokens += search["generated_tokens"]
    return {"trainings": trained, "generated_tokens": tokens, "seconds": seconds}


def _upstream(dag: Mapping[str, StageSpec], name: str) -> set[str]:
    return {name}.union(*(_upstream(dag, source) for source in dag[name].upstream))


# --- the page -------------------------------------------------------------------------------------

_COLUMNS = (
    ("(J* − J) / (J* − J_0)", "relative_gap", 2),
    ("the same at the price of the limit", "priced_gap", 2),
    ("J* − J", "gap", 3),
    ("E[c*] − limit", "excess", 3),
    ("way in r*", "reward_share", 2),
    ("grammatical", "grammatical", 3),
    ("displacement", "displacement", 2),
    ("KL", "kl", 2),
    ("trainings", "trainings", 1),
    ("tokens", "generated_tokens", 0),
    ("seconds", "seconds", 0),
)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over the seeds, ± their standard deviation, best policies within the limit first."""
    heads = ["policy", "mean within", "within its interval", *(title for title, _, _ in _COLUMNS)]
    lines = options.head(heads)
    names = {row["policy"] for row in rows}
    by_policy = {name: options.where(rows, policy=name) for name in names}
    for name, own in sorted(
        by_policy.items(), key=lambda item: (item[0] not in (ALLOWED, DOUBTED), *_rank(item[1]))
    ):
        cells = [_cell(own, key, digits) for _, key, digits in _COLUMNS]
        counts = [f"{sum(map(rule, own))}/{len(own)}" for rule in (mean_within, within)]
        lines.append(options.line([name, *counts, *cells]))
    return lines


def mean_within(row: Mapping[str, Any]) -> bool:
    """Whether the mean true cost of the answers is within the limit."""
    return bool(row["excess"] <= 0)


def within(row: Mapping[str, Any]) -> bool:
    """Whether the limit lies in the confidence interval of the true cost, or above it: a breach is
    not shown.
    """
    least = row["least_excess"]
    return least is None or bool(least <= 0)


def _rank(own: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    return -fmean(within(row) for row in own), fmean(row["gap"] for row in own)


def _cell(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    known = [row[key] for row in rows if row[key] is not None]
    if not known:
        return "–"
    spread = f" ± {pstdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{spread}"


def page(command: str, params: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page in markdown."""
    seeds = sorted({row["seed"] for row in rows})
    return options.page(
        "Language models of the world against the exact optimum",
        command,
        (
            f"{len(seeds)} seeds ({', '.join(map(str, seeds))}) of `{params}`; numbers are means"
            " over the seeds, ± their standard deviation."
        ),
        "\n".join(table(rows)),
        _NOTES,
    )


_NOTES = """\
How to read it: a policy is worth what every grammatical answer to the held-out prompts is
worth, by the world's oracle, at its probability under the policy. Nothing of that is drawn but
the KL of other text, all of which has one score. `J* − J` is what a policy falls short of the
exact constrained optimum in J = E[r*] − β KL; below 0 it buys reward by breaking the limit. *At
the price of the limit* adds λ* (E[c*] − limit), so that a breach earns nothing and distance
costs nothing. J_0 is that of the policy nearest to the reference that keeps the limit: the
reference itself where that keeps it. `mean within` counts the seeds whose mean true cost is
within the limit, `within its interval` those where the limit is not below the 95 % interval
around the mean of the generated answers: there a breach is not shown, which is no proof that
there is none, and a mean somewhat above the limit counts. `way in r*` is the way from that
nearest policy to the optimum in true reward. `displacement` is the mean log-ratio of reference
samples: it falls as mass leaves what the reference says. Trainings, tokens and seconds are
those of the policy's own steps and of those that it starts from; data, reference, reward and
cost models and the pool serve all alike. *What the scorers allow* is no policy but arithmetic:
the exact tilt of the reference by the learned scores, so its distance is the scorers' error
alone; *doubted* lowers the reward of answers off their support, as the training of dualign
does. A certified policy's effort is not counted."""


def run_parser(
    program: str, about: str | None, seeds: Sequence[int], params: Path
) -> argparse.ArgumentParser:
    """Options that say which runs of the laboratory are meant."""
    parser = options.parser(program, about)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--params", type=Path, default=params, help="of the embedded world")
    parser.add_argument("--limit", type=float, help="in place of that of params")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values for keys of params"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".scratch/bench-world"), help="folder of the runs"
    )
    return parser


def settings_from(given: argparse.Namespace) -> dict[str, Any]:
    """The values in place of those of params. Raises PipelineError."""
    limit = {} if given.limit is None else {"constraint.limit": given.limit}
    return {**settings_of(given.set), **limit}


def command_of(program: str, given: argparse.Namespace) -> str:
    """The command that was given, but for how and where its runs are made."""
    command = f"{program} --seeds {' '.join(map(str, given.seeds))} --params {given.params}"
    command += "" if given.limit is None else f" --limit {given.limit:g}"
    command += f" --set {' '.join(given.set)}" if given.set else ""
    command += f" --policies {' '.join(given.policies)}" if given.policies else ""
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write world.json and world.md, and the page to stdout. Returns the exit
    status.
    """
    parser = run_parser(PROG, __doc__, [7, 8, 9], Path("params/every-method.yaml"))
    parser.add_argument(
        "--policies", nargs="+", help="those alone are run and judged; all if nothing is said"
    )
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("dvc").setLevel(logging.WARNING)
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    try:
        settings = settings_from(given)
        work = given.work.absolute()
        labs = [set_up(seed, given.params, work, settings) for seed in given.seeds]
        chosen = given.policies and stages_for(labs[0], given.policies)
        with ThreadPoolExecutor(given.jobs) as pool:
            done = list(pool.map(lambda lab: run(lab, threads, chosen), labs))
    except (DualignError, PipelineError, OSError) as error:
        log.error("%s", error)
        return 1
    rows = [row for lab in done for row in (*rows_of(lab, given.policies), *allowed(lab))]
    command = command_of(PROG, given)
    text = page(command, given.params, rows)
    options.publish(given.out, "world", {"command": command, "rows": rows}, text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
