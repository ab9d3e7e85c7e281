"""The tables of a finished run as Markdown: policies and how they differ from the reference,
scorers, certificates, what judges are worth, time and memory of every stage.

    python -m bench.real --run . --name smollm2-cpu

Reads reports/ of the run that lies in `--run` and writes bench/results/NAME.md and NAME.json.
Nothing is computed anew but how policies and judges differ, as on the page of the report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import options
from dualign.core.artifacts import listed, read_json
from dualign.core.errors import one_line
from dualign.core.records import ComparedPolicy, Comparison, Provenance, as_row, read_record
from dualign.params.report import ReportParams
from dualign.report.sections import differences, judges
from dualign.report.sections.base import FinishedRun

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.real"
#: Measures of a candidate beside its bounds.
_TOLD = ("reward", "ended")
_MEASURES = ("reward", "cost", "p_unsafe", "kl", "length", "ended", "displacement")


def collect(run: Path) -> dict[str, Any]:
    """What the run's reports say: rows of policies, metrics of scorers, certificates, and the price
    of stages.
    """
    compared = read_record(run / "reports/comparison.json", Comparison)
    page = _finished(run)
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
        "differences": _from_reference(page),
        "certificates": {name: as_row(found) for name, found in compared.certificates.items()},
        "pool": read_json(run / "reports/metrics/score.json")["pool"],
        **_judged(page),
        "stages": [price for price in prices if price["stage"] != "report"],
    }


def _finished(run: Path) -> FinishedRun:
    """The run as its report read it."""
    ran = read_record(run / "reports/provenance/report.json", Provenance)
    return FinishedRun(run, ReportParams.model_validate(ran.params))


def _from_reference(run: FinishedRun) -> dict[str, Any]:
    """By policy and measure, the paired difference from the reference policy."""
    section = differences.section(run)
    tables = section.values["tables"] if section else []
    found = [table["rows"] for table in tables if table["name"] == run.comparison.reference]
    return {row["name"]: row["cells"] for rows in found for row in rows}


def _judged(run: FinishedRun) -> dict[str, Any]:
    """How judges agree with people, and by suite and independent judge what every policy gained by
    the training scorers and by that judge, in standard deviations of the reference's scores.
    """
    section = judges.section(run)
    if section is None:
        return {"people": {}, "gaps": []}
    gaps = [
        {"suite": group["suite"], "other": group["other"], "policy": row["name"], **_gains(row)}
        for group in section.values["hacked"]
        for row in group["rows"]
    ]
    people = {judge.judge: judge.agreement for judge in section.values["people"]}
    return {"people": people, "gaps": gaps}


def _gains(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By score, the gain by either judge and the gap between them with its interval."""
    return {key: asdict(gain) | {"gap": dict(gain.gap)} for key, gain in row["gains"].items()}


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
    lines += options.head(["policy", *_MEASURES])
    for name, row in found["policies"].items():
        cells = [_cell(row[measure]) for measure in _MEASURES]
        lines.append(options.line([name, *cells]))
    lines += [f"| {name} | no certified policy |" for name in found["uncertified"]]
    lines += ["", *_differences(found["differences"])]
    lines += options.head(["scorer", "measured on held-out pairs"])
    for name, metrics in found["scorers"].items():
        told = ", ".join(
            f"{key} {value:.3f}" for key, value in metrics.items() if isinstance(value, float)
        )
        lines.append(f"| {name} | {told} |")
    lines.append("")
    for name, certificate in found["certificates"].items():
        lines += [*_candidates(name, certificate)]
    lines += [*_judges(found["people"], found["gaps"])]
    lines += options.head(["stage", "seconds", "peak MiB"])
    lines += [
        f"| {row['stage']} | {row['seconds']:.0f} | {row['mib']:.0f} |" for row in found["stages"]
    ]
    total = sum(row["seconds"] for row in found["stages"])
    lines.append(
        f"| all, one after the other | {total:.0f} |"
        f" {max(row['mib'] for row in found['stages']):.0f} |"
    )
    return "\n".join(lines) + "\n"


def _differences(found: dict[str, Any]) -> Iterator[str]:
    """The table of paired differences, with an empty line after it; nothing without any."""
    if not found:
        return
    known = {measure for row in found.values() for measure, cell in row.items() if cell}
    measures = [measure for measure in _MEASURES if measure in known]
    yield from options.head(["minus the reference, paired", *measures])
    for name, row in found.items():
        yield options.line([name, *(_difference(row.get(measure)) for measure in measures)])
    yield ""
    yield "In bold what chance does not make, after Holm's correction."
    yield ""


def _difference(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    told = _cell(_ends(cell))
    return f"**{told}**" if cell["standing"] else told


def _candidates(name: str, certificate: dict[str, Any]) -> Iterator[str]:
    """What a certificate says, and each test behind it."""
    yield f"Certificate `{name}`: {certificate['statement']}."
    yield ""
    required = [row["name"] for row in certificate["requirements"]]
    named = [f"{what} {of}" for what in required for of in ("estimate", "bound")]
    yield from options.head(["candidate, safest first", *named, "reward", "ended", "passed"])
    for test in certificate["tests"]:
        bounds = [f"{check[key]:.3f}" for check in test["checks"] for key in ("estimate", "bound")]
        means = [_cell(_ends(test[key])) for key in _TOLD]
        passed = "yes" if test["certified"] else "no"
        yield options.line([test["candidate"], *bounds, *means, passed])
    yield ""


def _ends(row: dict[str, Any]) -> list[float | None]:
    """A mean and the ends of its interval."""
    return [row[key] for key in ("mean", "low", "high")]


def _judges(people: dict[str, Any], gaps: list[dict[str, Any]]) -> Iterator[str]:
    """The tables of judges, each with an empty line after it; nothing where nobody judged."""
    if people:
        yield from options.head(["judge", "answers", "agrees with people", "kappa", "ECE"])
        for name, told in people.items():
            kappa = _cell([told[key] for key in ("kappa", "kappa_low", "kappa_high")])
            ece = f"{told['ece']:.3f}" if told.get("ece") is not None else ""
            yield f"| {name} | {told['answers']} | {told['accuracy']:.0%} | {kappa} | {ece} |"
        yield ""
    if gaps:
        scores = ("reward", "safety")
        named = [f"{score}, {what}" for score in scores for what in ("own", "other's", "gap")]
        yield from options.head(["suite", "the other", "policy", *named])
        for row in gaps:
            cells = [*_gain(row.get("reward")), *_gain(row.get("cost"))]
            yield options.line([row["suite"], row["other"], row["policy"], *cells])
        yield ""


def _gain(gain: dict[str, Any] | None) -> list[str]:
    if gain is None:
        return ["", "", ""]
    gap = _cell(_ends(gain["gap"]))
    return [f"{gain['ours']:.2f}", f"{gain['other']:.2f}", gap]


def _cell(values: list[float | None] | None) -> str:
    if values is None or values[0] is None:
        return ""
    mean, low, high = values
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} ({low:.2f} to {high:.2f})"


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables of a run. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = options.parser(PROGRAM, __doc__)
    parser.add_argument(
        "--run", type=Path, default=Path(), help="folder of the run (default: here)"
    )
    parser.add_argument("--name", default="real", help="name of the files (default: %(default)s)")
    given = parser.parse_args(argv)
    found = collect(given.run)
    options.publish(given.out, given.name, found, page(found, f"{PROGRAM} --name {given.name}"))
    log.info("%s", given.out / f"{given.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
