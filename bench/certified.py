"""How often a certified policy truly breaks the limit: the whole pipeline, from data to certificate, over many seeds.

    python -m bench.certified --jobs 2

Runs `params/quick.yaml` once for each seed, in a folder of its own, as far as the certificate, and lets the world's
oracle judge the certified policy on prompts that neither it nor the certificate has seen; beside it the policy that the
search alone would have returned. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import options, world
from bench.options import knob
from dualign.core.artifacts import read_json
from dualign.core.errors import DualignError
from dualign.core.loading import load
from dualign.core.params import CertifyParams

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.certified"
#: The row of `certify`, and the policies that are judged: what the search returned, and what was certified.
ROW, SEARCHED, CERTIFIED = "dualign", "dualign", "certified"
UNUSED = ("evaluate@sft", "report")


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    seeds: int = knob(20, "runs, each with data and trainings of its own")
    first: int = knob(101, "seed of the first run")
    params: str = knob("params/quick.yaml", "a params file of the embedded world")
    jobs: int = knob(1, "runs at the same time, each on one thread")
    work: str = knob(".scratch/bench-certified", "folder of the runs")

    def __post_init__(self) -> None:
        if min(self.seeds, self.jobs) < 1:
            raise DualignError("seeds and jobs must be at least 1")


def row_of(lab: world.Lab) -> dict[str, Any]:
    """What a seed's certificate says, and the truth: costs less the limit, so that above 0 is a violation."""
    params = load(CertifyParams, lab.folder / "params.yaml")
    found = read_json(lab.folder / f"reports/metrics/certify/{ROW}.json")
    last = next((test for test in found["tests"] if test["candidate"] == found["returned"]), None)
    row = {
        "seed": lab.seed,
        "returned": found["returned"],
        "tests": len(found["tests"]),
        "bound": None if last is None else max(check["bound"] for check in last["checks"]) - params.limit,
    }
    for name in (SEARCHED, CERTIFIED):
        truth = read_json(lab.folder / f"reports/metrics/evaluate/{name}.json")
        cost = None if truth.get("absent") else truth["true_cost"]
        row |= {
            f"{name}_excess": None if cost is None else cost["mean"] - params.limit,
            f"{name}_least": None if cost is None else cost["low"] - params.limit,
            f"{name}_share": None if cost is None else truth["reward_share"],
        }
    return row


def violations(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of a policy over the seeds: in how many it exists, breaks the limit, and does so beyond the oracle's interval."""
    own = [row for row in rows if row[f"{name}_excess"] is not None]
    return {
        "runs": len(rows),
        "policies": len(own),
        "above": sum(row[f"{name}_excess"] > 0 for row in own),
        "surely": sum(row[f"{name}_least"] > 0 for row in own),
        "excess": fmean(row[f"{name}_excess"] for row in own) if own else None,
        "share": fmean(row[f"{name}_share"] for row in own) if own else None,
    }


def page(settings: Settings, delta: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page in markdown."""
    parts = [
        "# How often a certified policy breaks the limit",
        f"    {options.command(PROGRAM, settings)}",
        f"{len(rows)} runs of `{settings.params}`, each with its own data, models and certificate, at δ = {delta:g}.",
        "\n".join(summary(rows)),
        _NOTES,
        "## Every run",
        "\n".join(table(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for what the search returned, one for what was certified."""
    lines = [
        "| policy | returned | E[c*] above the limit | beyond the interval | E[c*] − limit | way in r* |",
        "|---" * 6 + "|",
    ]
    for name, title in ((SEARCHED, "of the search alone"), (CERTIFIED, "certified")):
        found = violations(rows, name)
        means = [_number(found["excess"], 3), _number(found["share"], 2)]
        counts = [f"{found['policies']} of {found['runs']}", *(f"{found[key]}" for key in ("above", "surely"))]
        lines.append(f"| {' | '.join([title, *counts, *means])} |")
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
            _number(row["bound"], 3), _number(row["certified_excess"], 3), _number(row["certified_share"], 2),
            _number(row["dualign_excess"], 3), _number(row["dualign_share"], 2),
        ]  # fmt: skip
        lines.append(f"| {row['seed']} | {row['returned'] or 'no policy'} | {row['tests']} | {' | '.join(numbers)} |")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


_NOTES = """\
How to read it: E[c*] is the true cost of a policy's answers to held-out prompts, by the oracle; *above* counts the runs
where its mean is above the limit, *beyond the interval* those where even its 95 % confidence interval is. `way in r*`
is the way from the reference to the exact optimum at the limit, in true reward. A search aims at the limit, so about
every other policy that it returns is above it; a certificate may be wrong in a share δ of runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; write certified.json and .md, and the page to stdout. Returns the exit status."""
    settings, out = options.parse(Settings, PROGRAM, __doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("dvc").setLevel(logging.WARNING)
    seeds = range(settings.first, settings.first + settings.seeds)
    try:
        labs = [world.set_up(seed, Path(settings.params), Path(settings.work).absolute()) for seed in seeds]
        with ThreadPoolExecutor(settings.jobs) as pool:
            rows = list(pool.map(judged, labs))
        delta = load(CertifyParams, labs[0].folder / "params.yaml").delta
    except (DualignError, OSError) as error:
        log.error("%s", error)
        return 1
    text = page(settings, delta, rows)
    counts = {name: violations(rows, name) for name in (SEARCHED, CERTIFIED)}
    content = {"command": options.command(PROGRAM, settings), "settings": asdict(settings), **counts, "rows": rows}
    options.publish(out, "certified", content, text)
    sys.stdout.write(text)
    return 0


def judged(lab: world.Lab) -> dict[str, Any]:
    """Run a seed as far as it is needed, and read it."""
    world.run(lab, 1, [name for name in lab.dag if name not in UNUSED])
    return row_of(lab)


if __name__ == "__main__":
    sys.exit(main())
