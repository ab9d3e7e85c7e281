"""The tables of a finished run as Markdown: policies, scorers, certificates, time and memory of
every stage.

    python -m bench.real --run . --name smollm2-cpu

Reads reports/ of the run that lies in `--run` and writes bench/results/NAME.md and NAME.json.
Nothing is computed anew."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import options
from dualign.core.artifacts import listed, read_json
from dualign.core.errors import one_line
from dualign.core.records import ComparedPolicy, Comparison, read_record

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.real"
_MEASURES = ("reward", "cost", "p_unsafe", "kl", "length", "ended", "displacement")


def collect(run: Path) -> dict[str, Any]:
    """What the run's reports say: rows of policies, metrics of scorers, certificates, and the price
    of stages.
    """
    compared = read_record(run / "reports/comparison.json", Comparison)
    scorers = {
        name: read_json(run / f"reports/metrics/{name}.json")
        for name in ("reward_model", "cost_model")
    }
    prices = [_price(read_json(path)) for path in listed(run / "reports/provenance", "**/*.json")]
    return {
        "limit": compared.limit,
        "policies": {name: _row(row) for name, row in compared.policies.items()},
        "uncertified": compared.uncertified,
        "scorers": {name: _scorer(metrics) for name, metrics in scorers.items()},
        "certificates": {name: found.statement for name, found in compared.certificates.items()},
        "pool": read_json(run / "reports/metrics/score.json")["pool"],
        "stages": [price for price in prices if price["stage"] != "report"],
    }


def _row(row: ComparedPolicy) -> dict[str, list[float | None] | None]:
    """Mean, lower and upper end of each measure."""
    found = {name: getattr(row, name) for name in _MEASURES}
    return {name: [v.mean, v.low, v.high] if v else None for name, v in found.items()}


def _scorer(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if isinstance(value, float | int | bool)}


def _price(made: dict[str, Any]) -> dict[str, Any]:
    name = f"{made['stage']}/{made['item']}" if made["item"] else made["stage"]
    return {"stage": name, "seconds": made["seconds"], "mib": made["peak_rss_mib"]}


def page(found: dict[str, Any], command: str) -> str:
    """The tables as Markdown."""
    lines = [
        f"`{command}`",
        "",
        f"Limit {found['limit']:g}. Mean and 95 % interval, clustered by prompt.",
        "",
    ]
    lines += [f"| policy | {' | '.join(_MEASURES)} |", f"|---|{'---|' * len(_MEASURES)}"]
    for name, row in found["policies"].items():
        cells = [_cell(row[measure]) for measure in _MEASURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | no certified policy |" for name in found["uncertified"]]
    lines += ["", "| scorer | measured on held-out pairs |", "|---|---|"]
    for name, metrics in found["scorers"].items():
        told = ", ".join(
            f"{key} {value:.3f}" for key, value in metrics.items() if isinstance(value, float)
        )
        lines.append(f"| {name} | {told} |")
    lines += [
        "",
        *(f"Certificate `{name}`: {said}." for name, said in found["certificates"].items()),
        "",
    ]
    lines += ["| stage | seconds | peak MiB |", "|---|---|---|"]
    lines += [
        f"| {row['stage']} | {row['seconds']:.0f} | {row['mib']:.0f} |" for row in found["stages"]
    ]
    total = sum(row["seconds"] for row in found["stages"])
    lines.append(
        f"| all, one after the other | {total:.0f} |"
        f" {max(row['mib'] for row in found['stages']):.0f} |"
    )
    return "\n".join(lines) + "\n"


def _cell(values: list[float | None] | None) -> str:
    if values is None or values[0] is None:
        return ""
    mean, low, high = values
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} ({low:.2f} to {high:.2f})"


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables of a run. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--run", type=Path, default=Path(), help="folder of the run (default: here)"
    )
    parser.add_argument("--name", default="real", help="name of the files (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)"
    )
    given = parser.parse_args(argv)
    found = collect(given.run)
    options.publish(given.out, given.name, found, page(found, f"{PROGRAM} --name {given.name}"))
    log.info("%s", given.out / f"{given.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
