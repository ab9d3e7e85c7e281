"""What stop words do to a judge's scores: whole and cut answers of one generation, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from dualign.core.artifacts import listed, read_optional_json
from dualign.core.names import cut_name
from dualign.report.sections.base import FinishedRun, Row, Section


def section(run: FinishedRun) -> Section | None:
    """None where no suite has stop words."""
    files = listed(run.root / "reports/metrics/judge", "*.json")
    rows = [
        {"judge": file.stem, **row}
        for file in files
        for row in _rows(read_optional_json(file).get("suites", {}))
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
