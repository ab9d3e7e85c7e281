"""What stop words do to a judge's scores: whole and cut answers of one generation, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from dualign.core.artifacts import read_optional_json
from dualign.core.names import cut_name
from dualign.report.sections.base import FinishedRun, Row, Section


def section(run: FinishedRun) -> Section | None:
    """None where no suite has stop words. What is left of judges, suites and policies that params
    no longer name is passed by.
    """
    metrics = run.root / "reports/metrics/judge"
    told = {name: read_optional_json(metrics / f"{name}.json") for name in run.params.judges}
    rows = [
        {"judge": judge, **row}
        for judge, content in told.items()
        for row in _rows(content.get("suites", {}))
        if row["suite"] in run.params.suites and row["policy"] in run.params.policies
    ]
    rows.sort(key=itemgetter("suite", "judge", "score", "policy"))
    return Section("stopped", "Stop words", {"stopped": rows}) if rows else None


def _rows(suites: dict[str, Any]) -> Iterator[Row]:
    """The scores of each suite that was judged whole and cut, by policy."""
    for suite, policies in suites.items():
        cut = suites.get(cut_name(suite), {})
        for policy in policies.keys() & cut.keys():
            for score in _scores(policies[policy]):
                if score in cut[policy]:
                    yield {
                        "suite": suite,
                        "policy": policy,
                        "score": score,
                        "whole": policies[policy][score],
                        "cut": cut[policy][score],
                    }


def _scores(rates: dict[str, Any]) -> list[str]:
    """The scores that a judge gave, each with mean and interval."""
    return [name for name, value in rates.items() if isinstance(value, dict) and "mean" in value]
