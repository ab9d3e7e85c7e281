"""What another seed makes of every policy: this run beside others that differ in their seed
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from markupsafe import Markup

from dualign.core.artifacts import listed
from dualign.core.records import ComparedPolicy, Comparison, Interval, read_record
from dualign.evaluation.measures import OF_RUNS, Measure
from dualign.evaluation.stats import clustered_share, mean_of
from dualign.report.charts import svg
from dualign.report.charts.strip import dots
from dualign.report.comparison import REFERENCE, known_ends
from dualign.report.formatting import stated
from dualign.report.sections.base import FinishedRun, Row, Section

#: How many stages of other params a notice names.
_NAMED = 3
#: The policies of a run by name.
Policies = dict[str, ComparedPolicy]


def section(run: FinishedRun) -> Section | None:
    """None where there is no other run."""
    others, refused = _others(run)
    if not others and not refused:
        return None
    runs = [run.comparison.policies, *(other.policies for other in others.values())]
    measures = [m for m in OF_RUNS if _known(m, runs)]
    names = run.in_order({name for policies in runs for name in policies})
    rows = [_row(run, name, runs, measures) for name in names]
    _draw(run, rows)
    values = {"spread": rows, "measures": measures, "others": [*others], "refused": refused}
    return Section("seeds", "Seeds", values | {"runs": len(runs)})


def _others(run: FinishedRun) -> tuple[dict[str, Comparison], list[str]]:
    """The other runs by name, and why some files are none of them. One that is this run itself is
    passed by: it counts anyway.
    """
    found: dict[str, Comparison] = {}
    refused = []
    paths = listed(run.root / "reports/seeds", "*.json")
    for path in sorted(paths, key=lambda path: (len(path.stem), path.stem)):  # 9 before 11
        other = read_record(path, Comparison)
        wrong = _differs(other, run) or _repeats(other, found)
        if wrong:
            refused.append(f"{path.name} {wrong}")
        elif _costs(other) != _costs(run.comparison):
            found[path.stem] = other
    return found, refused


def _differs(other: Comparison, run: FinishedRun) -> str:
    """In what beside its seed another run differs; empty where in nothing that can be seen."""
    if other.limit != run.comparison.limit:
        return f"has limit {stated(other.limit)}"
    for name, policy in other.policies.items():
        if policy.folder != run.params.policies.get(name):
            return f"has {policy.folder} for policy {name}"
    return _other_params(other.params, run.comparison.params)


def _repeats(other: Comparison, found: Mapping[str, Comparison]) -> str:
    """Which run it is a copy of; empty where of none. Counted twice, seeds would seem to agree."""
    twins = (name for name, known in found.items() if _costs(known) == _costs(other))
    return next((f"has the results of {name}.json" for name in twins), "")


def _other_params(theirs: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Which stages that both runs have ran with other params."""
    differ = [name for name, digest in theirs.items() if own.get(name, digest) != digest]
    if not differ:
        return ""
    more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
    return f"has other params for {', '.join(differ[:_NAMED])}{more}"


def _costs(compared: Comparison) -> dict[str, Interval | None]:
    return {name: policy.cost for name, policy in compared.policies.items()}


def _known(measure: Measure, runs: list[Policies]) -> bool:
    return any(_means(policies.values(), measure.key) for policies in runs)


def _row(run: FinishedRun, name: str, runs: list[Policies], measures: list[Measure]) -> Row:
    """A policy over all runs that have it."""
    there = [policies[name] for policies in runs if name in policies]
    level = run.params.confidence
    spread = {m.key: _over_runs(_means(there, m.key), level, m.unit == "share") for m in measures}
    gains = {key: _over_runs(_gains(runs, name, key), level) for key in ("reward", "cost")}
    return {
        "name": name,
        "mark": run.mark_of(name),
        "there": len(there),
        "within": sum(policy.certified or policy.standing == "within" for policy in there),
        "costs": _means(there, "cost"),
        "spread": spread,
        "gains": {} if name == REFERENCE else gains,
    }


def _means(policies: Iterable[ComparedPolicy], key: str) -> list[float]:
    """What is known of a measure, run by run."""
    values = [getattr(policy, key) for policy in policies]
    return [v.mean if isinstance(v, Interval) else v for v in values if v is not None]


def _gains(runs: list[Policies], name: str, key: str) -> list[float]:
    """By run, the difference from that run's own reference policy."""
    both = [run for run in runs if name in run and REFERENCE in run]
    own = _means((run[name] for run in both), key)
    reference = _means((run[REFERENCE] for run in both), key)
    if len(own) < len(both) or len(reference) < len(both):
        return []
    return [mine - theirs for mine, theirs in zip(own, reference, strict=True)]


def _over_runs(values: list[float], level: float, share: bool = False) -> Interval | None:
    """The mean with its interval over runs, each of which drew everything anew: Student's, since a
    handful shows no tail, or of shares Wilson's.
    """
    if not values:
        return None
    if share:
        return known_ends(clustered_share(np.asarray(values), np.arange(len(values)), level))
    return known_ends(mean_of(values, level, tails=False))


def _draw(run: FinishedRun, rows: list[Row]) -> None:
    """Each row gets the costs of its runs as dots, all on one scale."""
    costs = [cost for row in rows for cost in row["costs"]]
    extent = svg.domain([run.limit_shown, *costs])
    for row in rows:
        row["dots"] = Markup()
        if row["costs"]:
            row["dots"] = dots(row["costs"], run.limit_shown, extent, row["mark"].style)
