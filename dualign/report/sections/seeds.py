"""What another seed makes of every policy: this run beside others that differ in their seed
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from dualign.core.artifacts import listed
from dualign.core.records import Record, as_row, read_record
from dualign.evaluation.measures import MEASURES, Measure
from dualign.evaluation.shares import clustered_share
from dualign.evaluation.stats import clustered_mean
from dualign.report.charts import svg
from dualign.report.charts.strip import dots
from dualign.report.comparison import REFERENCE
from dualign.report.formatting import number
from dualign.report.judged import known_ends
from dualign.report.sections.base import FinishedRun, Row, Section

#: Measures beside those of a summary: what the embedded world knows.
_TRUE = ("true_reward", "true_cost")
#: How many stages of other params a notice names.
_NAMED = 3


class ComparedRun(Record):
    """reports/comparison.json of a run, as far as others are set beside it."""

    limit: float | None
    policies: dict[str, dict[str, Any]]
    params: dict[str, str] | None = None


def section(run: FinishedRun) -> Section | None:
    """None where there is no other run."""
    others, refused = _others(run)
    if not others and not refused:
        return None
    runs = [run.comparison["policies"], *(other["policies"] for other in others.values())]
    measures = [m for m in MEASURES if (m.headline or m.key in _TRUE) and _known(m, runs)]
    names = run.in_order({name for policies in runs for name in policies})
    rows = [_row(run, name, runs, measures) for name in names]
    _draw(run, rows, runs)
    values = {"spread": rows, "measures": measures, "others": [*others], "refused": refused}
    return Section("seeds", "Seeds", values | {"runs": len(runs)})


def _others(run: FinishedRun) -> tuple[dict[str, Row], list[str]]:
    """The other runs by name, and why some files are none of them. One that is this run itself is
    passed by: it counts anyway.
    """
    found: dict[str, Row] = {}
    refused = []
    paths = listed(run.root / "reports/seeds", "*.json")
    for path in sorted(paths, key=lambda path: (len(path.stem), path.stem)):  # 9 before 11
        other = as_row(read_record(path, ComparedRun))
        wrong = _differs(other, run)
        if wrong:
            refused.append(f"{path.name} {wrong}")
        elif _costs(other) != _costs(run.comparison):
            found[path.stem] = other
    return found, refused


def _differs(other: Row, run: FinishedRun) -> str:
    """In what beside its seed another run differs; empty where in nothing that can be seen."""
    if other["limit"] != run.comparison["limit"]:
        return f"has limit {number(other['limit'])}"
    for name, policy in other["policies"].items():
        if policy.get("folder") != run.params.policies.get(name):
            return f"has {policy.get('folder')} for policy {name}"
    return _other_params(other["params"], run.comparison["params"])


def _other_params(theirs: Mapping[str, str] | None, own: Mapping[str, str]) -> str:
    """Which stages that both runs have ran with other params."""
    if theirs is None:
        return "does not tell its params: run `dualign seeds` again"
    differ = [name for name, digest in theirs.items() if own.get(name, digest) != digest]
    if not differ:
        return ""
    more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
    return f"has other params for {', '.join(differ[:_NAMED])}{more}"


def _costs(compared: Mapping[str, Any]) -> Row:
    return {name: policy.get("cost") for name, policy in compared["policies"].items()}


def _known(measure: Measure, runs: list[Row]) -> bool:
    return any(row.get(measure.key) is not None for policies in runs for row in policies.values())


def _row(run: FinishedRun, name: str, runs: list[Row], measures: list[Measure]) -> Row:
    """A policy over all runs that have it."""
    there = [policies[name] for policies in runs if name in policies]
    spread = {m.key: _over_runs(_means(there, m.key), m.unit == "share") for m in measures}
    gains = {key: _over_runs(_gains(runs, name, key)) for key in ("reward", "cost")}
    return {
        "name": name,
        **run.mark_of(name),
        "there": len(there),
        "within": sum(row["certified"] or row["standing"] == "within" for row in there),
        "spread": spread,
        "gains": {} if name == REFERENCE else gains,
    }


def _means(rows: Iterable[Row], key: str) -> list[float]:
    """What is known of a measure, run by run."""
    values = [row.get(key) for row in rows]
    return [v["mean"] if isinstance(v, dict) else v for v in values if v is not None]


def _gains(runs: list[Row], name: str, key: str) -> list[float]:
    """By run, the difference from that run's own reference policy."""
    both = [run for run in runs if name in run and REFERENCE in run]
    own = _means((run[name] for run in both), key)
    reference = _means((run[REFERENCE] for run in both), key)
    if len(own) < len(both) or len(reference) < len(both):
        return []
    return [mine - theirs for mine, theirs in zip(own, reference, strict=True)]


def _over_runs(values: list[float], share: bool = False) -> Row | None:
    """The mean with its interval over runs, each of which drew everything anew: Student's, or of
    shares Wilson's.
    """
    if not values:
        return None
    mean = clustered_share if share else clustered_mean
    found = mean(np.asarray(values), np.arange(len(values)))
    return {**known_ends(found), "values": values}


def _draw(run: FinishedRun, rows: list[Row], runs: list[Row]) -> None:
    """Each row gets the costs of its runs as dots, all on one scale."""
    costs = [cost for policies in runs for cost in _means(policies.values(), "cost")]
    extent = svg.domain([run.limit_shown, *costs])
    for row in rows:
        cost = row["spread"].get("cost")
        row["dots"] = (
            dots(cost["values"], run.limit_shown, extent, row["style"]) if cost else Markup()
        )
