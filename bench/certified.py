"""How often a certified policy truly breaks the limit: the whole pipeline, from data to
certificate, over many seeds.

    python -m bench.certified --jobs 2

Runs `params/quick.yaml`, or the file that `--params` names, once for each seed, in a folder of its
own, as far as dualign's certificate. The world's oracle judges the certified policy by each of its
answers to every prompt of the world; beside it the policy that the search alone would have
returned, what the same certificate finds on the coarse grid of before, and Conformal Policy Control
(`bench.conformal`), all on the same models. A run that was interrupted goes on where it stopped."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dvc.repo import Repo

from bench import options, regulated, world
from bench.options import knob
from dualign.core.artifacts import read_json, replacing, write_json
from dualign.core.errors import DualignError
from dualign.evaluation.against_optimum import with_other_text
from dualign.lm.folders import is_policy
from dualign.params.certify import CertifyParams
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load, read_yaml

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.certified"
#: The row of `certify`, and the policies that are judged: what the search returned, and what was
#: certified.
ROW = "dualign"
SEARCHED = "dualign"
CERTIFIED = "certified"
#: The certificate that was the default before: every weight of a grid on answers of its own. Its
#: folder in a run's.
COARSE = {"samples_per_prompt": 4, "screen": None}
COARSE_WEIGHTS = [1.6, 1.4, 1.3, 1.2, 1.15, 1.1, 1.05, 1.0, 0.95]
BESIDE = "coarse"
#: What is kept of the truth in a run's folder.
TRUTH = "truth.json"
#: transformers changes what is global while it loads a model, so one thread at a time does.
_LOADING = threading.Lock()
AGAIN = (f"certify@{ROW}",)


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    seeds: int = knob(20, "runs, each with data and trainings of its own")
    first: int = knob(101, "seed of the first run")
    params: str = knob("params/quick.yaml", "a params file of the embedded world")
    jobs: int = knob(1, "runs at the same time, each on one thread")
    work: str = knob(".scratch/bench-certified", "folder of the runs")
    known: str = knob("", "a certified.json of the same params, whose seeds are not run again")

    def __post_init__(self) -> None:
        if min(self.seeds, self.jobs) < 1:
            raise DualignError("seeds and jobs must be at least 1")


def row_of(lab: world.Lab) -> dict[str, Any]:
    """What a seed's certificate says."""
    params = load(CertifyParams, lab.folder / "params.yaml")
    found = read_json(lab.folder / f"reports/metrics/certify/{ROW}.json")
    last = next((test for test in found["tests"] if test["candidate"] == found["returned"]), None)
    return {
        "seed": lab.seed,
        "returned": found["returned"],
        "tests": len(found["tests"]),
        "bound": (
            None if last is None else max(check["bound"] for check in last["checks"]) - params.limit
        ),
        "answers": answers_of(lab.folder / "reports/certificate" / ROW),
    }


def truth_of(lab: world.Lab, grid: world.Lab) -> dict[str, float | None]:
    """The true cost of each policy less the limit, so that above 0 is a violation, and its way in
    true reward; None where none was certified. Computed once and kept in the folder of the run.
    """
    file = lab.folder / TRUTH
    if not file.is_file():
        write_json(file, _truth(lab, grid))
    found: dict[str, float | None] = read_json(file)
    return found


def _truth(lab: world.Lab, grid: world.Lab) -> dict[str, float | None]:
    truth = world.Truth.of_world(lab, load(EvaluateParams, lab.folder / "params.yaml"))
    policies = {
        SEARCHED: lab.folder / "models/aligned" / ROW,
        CERTIFIED: lab.folder / "models/certified" / ROW,
        BESIDE: grid.folder / "models/certified" / ROW,
    }
    found: dict[str, float | None] = {}
    for name, folder in policies.items():
        found |= {f"{name}_excess": None, f"{name}_share": None}
        if is_policy(folder):
            worth = truth.problem.describe(with_other_text(truth.under(lab, folder)))
            found[f"{name}_excess"] = worth["cost"] - truth.limit
            found[f"{name}_share"] = truth.way(worth["reward"])
    return found


def answers_of(folder: Path) -> int | None:
    """The answers that a certificate was drawn for: those of its screen, of its tests, and of one
    draw for several.
    """
    if not (folder / "certificate.json").is_file():
        return None
    found = read_json(folder / "certificate.json")
    own = sum(test["checks"][0]["answers"] for test in found["tested"] if test.get("ess") is None)
    shared = max(
        (test["checks"][0]["answers"] for test in found["tested"] if test.get("ess") is not None),
        default=0,
    )
    return int(own + shared + _screened(folder / "screen.json"))


def _screened(file: Path) -> int:
    if not file.is_file():
        return 0
    screen = read_json(file)
    return int(screen["prompts"] * screen["samples"] * len(screen["knots"]))


def beside(lab: world.Lab) -> world.Lab:
    """A folder in that of a run, with its data and models, for the certificate that was the default
    before.
    """
    folder = lab.folder / BESIDE
    if not folder.is_dir():
        with replacing(folder) as temporary:
            for name in ("data", "models"):
                (temporary / name).mkdir(parents=True)
                for path in (lab.folder / name).iterdir():
                    if path.name != CERTIFIED:
                        (temporary / name / path.name).symlink_to(path.absolute())
            shutil.copytree(lab.folder / "reports/metrics", temporary / "reports/metrics")
            shutil.copy(lab.folder / "dvc.yaml", temporary)
            write_json(temporary / "params.yaml", before(read_yaml(lab.folder / "params.yaml")))
            Repo.init(str(temporary), no_scm=True).close()
    return world.Lab(lab.seed, folder)


def before(params: dict[str, Any]) -> dict[str, Any]:
    """Params with the certificate of before."""
    runs = {
        name: {**row, "weights": COARSE_WEIGHTS} for name, row in params["certify"]["runs"].items()
    }
    return {**params, "certify": {**params["certify"], **COARSE, "runs": runs}}


def violations(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of a policy over the seeds: in how many it exists and breaks the limit, and where it is."""
    own = [row for row in rows if row[f"{name}_excess"] is not None]
    return {
        "runs": len(rows),
        "policies": len(own),
        "above": sum(row[f"{name}_excess"] > 0 for row in own),
        "excess": fmean(row[f"{name}_excess"] for row in own) if own else None,
        "share": fmean(row[f"{name}_share"] for row in own) if own else None,
    }


def page(settings: Settings, delta: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page in markdown."""
    return options.page(
        "How often a certified policy breaks the limit",
        options.command(PROGRAM, settings),
        (
            f"{len(rows)} runs of `{settings.params}`, each with its own data, models and"
            f" certificate, at δ = {delta:g}."
        ),
        "\n".join(summary(rows)),
        "\n".join(comparison([row for run in rows for row in run.get("conformal", [])])),
        _NOTES,
        "## Every run",
        "\n".join(table(rows)),
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for what the search returned, one for what was certified, and one for what was so
    before.
    """
    heads = (
        "policy",
        "returned",
        "E[c*] above the limit",
        "E[c*] − limit",
        "way in r*",
        "answers",
    )
    lines = options.head(heads)
    for name, title in TITLES.items():
        found = violations(rows, name)
        drawn = [row[PRICES[name]] for row in rows if row.get(PRICES[name]) is not None]
        means = [
            _number(found["excess"], 3),
            _number(found["share"], 2),
            _number(fmean(drawn) if drawn else None, 0),
        ]
        counts = [f"{found['policies']} of {found['runs']}", str(found["above"])]
        lines.append(options.line([title, *counts, *means]))
    return lines


TITLES = {
    SEARCHED: "of the search alone",
    CERTIFIED: "certified",
    BESIDE: "certified on the grid of before",
}
PRICES = {SEARCHED: "none", CERTIFIED: "answers", BESIDE: f"{BESIDE}_answers"}


def comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each pair of policies of Conformal Policy Control; nothing where it was not
    run.
    """
    if not rows:
        return []
    heads = (
        "Conformal Policy Control: pi_0, pi_t",
        "runs",
        "E[c] − limit over draws",
        "draws above the limit",
        "E[c*] − limit",
        "runs with E[c*] above",
        "way in r*",
        "answers for one served, median run",
        "answers to calibrate",
    )
    lines = options.head(heads)
    for pair in dict.fromkeys(row["pair"] for row in rows):
        own = options.where(rows, pair=pair)
        cells = [
            pair,
            str(len(own)),
            _number(options.mean(own, "mean_risk"), 3),
            f"{options.mean(own, 'above'):.0%}",
            _number(options.mean(own, "excess"), 3),
            str(sum(row["excess"] > 0 for row in own)),
            _number(options.mean(own, "share"), 2),
            _number(median(row["price"] for row in own), 2),
            _number(options.mean(own, "answers"), 0),
        ]
        lines.append(options.line(cells))
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a seed."""
    heads = (
        "seed",
        "certified",
        "tests",
        "bound − limit",
        "E[c*] − limit",
        "way in r*",
        "search: E[c*] − limit",
        "way in r*",
    )
    lines = options.head(heads)
    for row in rows:
        numbers = [
            _number(row["bound"], 3),
            _number(row["certified_excess"], 3),
            _number(row["certified_share"], 2),
            _number(row["dualign_excess"], 3),
            _number(row["dualign_share"], 2),
        ]
        lines.append(
            f"| {row['seed']} | {row['returned'] or 'no policy'} | {row['tests']} |"
            f" {' | '.join(numbers)} |"
        )
    return lines


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


_NOTES = """\
How to read it: E[c*] is the true cost of a policy's answers to the prompts of the world, by the
oracle: of every prompt, each answer at its probability, so nothing is left to chance. `way in r*`
is the way in true reward to the exact optimum at the limit, from the policy nearest to the
reference that keeps it. A search aims at the limit, so about every other policy that it returns is
above it; a certificate may be wrong in a share δ of runs. *Answers* are those that the certificate
drew, those of its screen too. *The grid of before* is certified on the same models and prompts.

Conformal Policy Control promises another thing: E[c] within the limit *on average over calibration
draws*, for every
number of prompts, and of a loss with a range; a certificate says of the one policy that it returns
that it is within the limit, in all but a share δ of draws. *Over draws* is by the cost model, of
whose cost that promise is: calibration prompts drawn again with replacement on the same models. No
weights come out: pi_0 and pi_t both run for every answer,
and an answer is drawn until one is kept. That takes without end where every answer to a prompt is
far likelier under pi_t, so one prompt can make the mean of a run huge."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; write certified.json and .md, and the page to stdout. Returns the exit
    status.
    """
    settings, out = options.parse(Settings, PROGRAM, __doc__, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("dvc").setLevel(logging.WARNING)
    seeds = range(settings.first, settings.first + settings.seeds)
    try:
        found = known_rows(settings)
        labs = [
            world.set_up(seed, Path(settings.params), Path(settings.work).absolute())
            for seed in seeds
        ]
        new = [lab for lab in labs if lab.seed not in found]
        with ThreadPoolExecutor(settings.jobs) as pool:
            found |= {row["seed"]: row for row in pool.map(judged, new)}
        rows = [found[seed] for seed in seeds]
        delta = load(CertifyParams, labs[0].folder / "params.yaml").delta
    except (DualignError, OSError) as error:
        log.error("%s", error)
        return 1
    text = page(settings, delta, rows)
    counts = {name: violations(rows, name) for name in TITLES}
    options.tell(out, "certified", PROGRAM, settings, text, **counts, rows=rows)
    return 0


def known_rows(settings: Settings) -> dict[int, dict[str, Any]]:
    """The rows of the file that `known` names, by seed. Raises DualignError where it is of other
    params.
    """
    if not settings.known:
        return {}
    content = read_json(Path(settings.known))
    if content["settings"]["params"] != settings.params:
        raise DualignError(
            f"{settings.known} is of {content['settings']['params']}, not of {settings.params};"
            " leave out --known"
        )
    return {row["seed"]: row for row in content["rows"]}


def judged(lab: world.Lab) -> dict[str, Any]:
    """Run a seed as far as it is needed, and read it."""
    needed = world.stages_for(lab, (SEARCHED, CERTIFIED))
    world.run(lab, 1, [name for name in lab.dag if name in needed])
    grid = world.run(beside(lab), 1, AGAIN)
    found = row_of(grid)
    own = {f"{BESIDE}_{key}": found[key] for key in ("returned", "tests", "answers")}
    with _LOADING:
        truth = truth_of(lab, grid)
        conformal = regulated.rows_of(lab, ROW)
    return {**row_of(lab), **own, **truth, "conformal": conformal}


if __name__ == "__main__":
    sys.exit(main())
