"""How far the pool's multiplier is from the true one, and how often its interval covers that, with
the jackknife and without.

    python -m bench.coverage multiplier             # an hour on one core
    python -m bench.coverage multiplier --pools 10

A pool is drawn anew, prompts and answers, from a world whose frontier is known (those of
`bench.frontier`). The limit is the cost of pi_1 there, so the true multiplier is 1. `solve` finds
it from the pool by the plain estimate of the papers and by the jackknifed one, on the same
resamples of the same pool; what the policy at the found multiplier truly costs tells how far from
the limit it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from bench import frontier, options
from bench.frontier import World, designs
from bench.options import knob
from dualign.core.errors import InfeasibleError
from dualign.math.dual.solution import Bootstrap, DualSolution, solve

PROGRAM = "python -m bench.coverage multiplier"

_PROMPTS = (100, 1000)
_SAMPLES = (4, 8, 16, 32)
_TRUTH = 1.0
_KINDS = ("plain", "jackknifed")
_NOMINAL = 0.92


@dataclass(frozen=True)
class Settings(frontier.Settings):
    """The same that `bench.frontier` can change, with fewer pools and resamples."""

    pools: int = knob(100, "pools drawn for each row")
    bootstrap: int = knob(100, "resamples of the prompts for each interval")


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each world, beta and size of pool."""
    return [row_of(*each, settings) for each in designs(settings.seed, _PROMPTS, _SAMPLES)]


def row_of(
    world: World,
    beta: float,
    prompts: int,
    samples: int,
    rng: np.random.Generator,
    settings: Settings,
) -> dict[str, Any]:
    """Shares and mean errors over the pools that reach the limit."""
    limit = world.truth(_TRUTH, beta)["cost"]
    found: list[dict[str, float]] = []
    for pool in range(settings.pools):
        reward, cost = world.draw(rng, prompts, samples)
        resampled = Bootstrap(settings.bootstrap, pool)
        try:
            solutions = {
                kind: solve(
                    reward,
                    cost,
                    limit=limit,
                    beta=beta,
                    bootstrap=resampled,
                    jackknife=kind == "jackknifed",
                )
                for kind in _KINDS
            }
        except InfeasibleError:
            continue
        found.append(of_pool(world, limit, solutions))
    where = {"world": world.name, "beta": beta, "prompts": prompts, "samples": samples}
    means = {key: options.mean(found, key) for key in found[0]} if found else {}
    return {**where, "pools": len(found), **means}


def of_pool(world: World, limit: float, solutions: dict[str, DualSolution]) -> dict[str, float]:
    """Of one pool by each kind: lambda's error, what its policy costs above the limit, and whether
    its interval covers the truth.
    """
    found = {"ess": float(np.median(solutions["plain"].ess))}
    for kind, solution in solutions.items():
        low, high = solution.lam_interval
        found[f"{kind}_error"] = solution.lam - _TRUTH
        found[f"{kind}_excess"] = world.truth(solution.lam, solution.beta)["cost"] - limit
        found[f"{kind}_covers"] = float(low <= _TRUTH <= high)
    return found


# --- report ---------------------------------------------------------------------------------------

_NOTES = """\
How to read it: means over the pools of a row, plain / jackknifed. *λ̂ − λ* is the error of the
multiplier, whose truth is 1; *E[c] − limit* what the policy at λ̂ truly costs above the limit, in
units of a cost whose standard deviation is about 1; *covered* the share of 95 % intervals that
hold the truth, in bold below 92 %. The interval resamples prompts, so it does not know the bias
that few samples a prompt leave: the more prompts, the surer it is of a wrong multiplier."""


def findings(rows: Sequence[dict[str, Any]], prompts: int = max(_PROMPTS)) -> list[str]:
    """For each world, with the most prompts: how far from the limit policies end."""
    lines = []
    for world in dict.fromkeys(row["world"] for row in rows):
        own = [r for r in rows if r["world"] == world and r["prompts"] == prompts and r["pools"]]
        plain, jackknifed = (_off(own, f"{kind}_excess") for kind in _KINDS)
        before, covers = (options.mean(own, f"{kind}_covers") for kind in _KINDS)
        lines.append(
            f"{world}, {prompts} prompts: policies end {plain:.3f} off the limit by the plain"
            f" multiplier and {jackknifed:.3f} by the jackknifed one; {before:.0%} and"
            f" {covers:.0%} of the intervals cover the truth."
        )
    return lines


def _off(rows: Sequence[dict[str, Any]], key: str) -> float:
    return fmean(abs(row[key]) for row in rows)


def report(settings: Settings, rows: Sequence[dict[str, Any]]) -> str:
    """The page in markdown."""
    return options.page(
        "How far the pool's multiplier is from the truth",
        options.command(PROGRAM, settings),
        f"{settings.pools} pools a row, {settings.bootstrap} resamples an interval.",
        "\n".join(f"- {line}" for line in findings(rows)),
        _NOTES,
        "\n".join(table(rows)),
    )


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row."""
    titles = ["world", "β", "prompts", "samples", "ESS", "λ̂ − λ", "E[c] − limit", "covered"]
    lines = options.head(titles)
    for row in rows:
        where = [row["world"], f"{row['beta']:g}", str(row["prompts"]), str(row["samples"])]
        if not row["pools"]:
            lines.append(options.line([*where, "–", "out of reach", "–", "–"]))
            continue
        error, excess = (_pair(row, name) for name in ("error", "excess"))
        covered = " / ".join(_share(row[f"{kind}_covers"]) for kind in _KINDS)
        lines.append(options.line([*where, f"{row['ess']:.1f}", error, excess, covered]))
    return lines


def _pair(row: dict[str, Any], name: str) -> str:
    return " / ".join(f"{row[f'{kind}_{name}']:+.3f}" for kind in _KINDS)


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= _NOMINAL else f"**{value:.0%}**"
