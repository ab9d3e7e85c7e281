"""What every section of the page is, and what all of them may show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.records import Frontier, SolvedDual, as_row, read_optional_record
from dualign.params.report import ReportParams
from dualign.report.charts import svg
from dualign.report.comparison import REFERENCE, compare, read_answers
from dualign.report.diagnosis import additional_constraints, predicted
from dualign.report.formatting import percent
from dualign.report.judged import read_verdicts

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page: `sections/ANCHOR.html` rendered with these values.

    `contents` is what the table of contents calls it; empty where it is not listed."""

    anchor: str
    contents: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """What the stages left under a repository root, as far as several sections read it."""

    root: Path
    params: ReportParams

    @cached_property
    def comparison(self) -> dict[str, Any]:
        """Every evaluated policy: see `dualign.report.comparison`."""
        return compare(self.root, self.params.policies, self.params.confidence, self.params.limit)

    @cached_property
    def answers(self) -> dict[str, pd.DataFrame]:
        """The generated answers of every policy that has any."""
        return read_answers(self.root, self.params.policies)

    @cached_property
    def dual(self) -> Row:
        """data/dual/dual.json, empty where the pool's dual was not solved."""
        solved = read_optional_record(self.root / "data/dual/dual.json", SolvedDual)
        return as_row(solved) if solved else {}

    @cached_property
    def curve(self) -> list[Row]:
        """The frontier that the pool predicts."""
        frontier = read_optional_record(self.root / "data/dual/frontier.json", Frontier)
        return [as_row(row) for row in frontier.rows] if frontier else []

    @cached_property
    def rows(self) -> list[Row]:
        """The policies as the table shows them, numbered: methods, those within the limit first."""
        rows = [{"name": name, **row} for name, row in self.comparison["policies"].items()]
        rows.sort(key=_rank)
        for number, row in enumerate(rows, 1):
            row["number"] = number
            row["recommended"] = row["name"] == self.comparison["recommended"]
            row["style"] = _style(row)
            row["how"] = _how(row)
            row["predicted"] = predicted(self.curve, row["lam"]) if row["on_curve"] else None
        return rows

    def row(self, name: str | None) -> Row | None:
        """The row of a policy; None where it was not evaluated."""
        return next((row for row in self.rows if row["name"] == name), None)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """What judges said of answers to suites: see `dualign.report.judged`."""
        return read_verdicts(self.root, self.params)

    def judged_suites(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """The suites that anything is known of, in the order of params, each with its verdicts."""
        for name in self.params.suites:
            verdicts = self.verdicts[self.verdicts["suite"] == name]
            if len(verdicts):
                yield name, verdicts

    def in_order(self, policies: Iterable[str]) -> list[str]:
        """Names of policies in the order of the table; those that were not evaluated come last."""
        order = [row["name"] for row in self.rows] + list(self.params.policies)
        return sorted(policies, key=order.index)

    def mark_of(self, policy: str) -> Row:
        """How the page marks a policy in tables and charts."""
        row = self.row(policy)
        keys = ("number", "style", "recommended")
        if row is None:
            return {"number": None, "style": "method unknown", "recommended": False}
        return {key: row[key] for key in keys}

    @cached_property
    def additional(self) -> list[Row]:
        """The constraints beside the one on cost."""
        return additional_constraints(self.dual.get("prices", []), self.rows)

    @cached_property
    def limit_shown(self) -> float | None:
        """The limit on cost, if charts can show it beside all costs; None for one far off."""
        keys = ("cost_reference", "cost_unconstrained", "reachable_minimum")
        return svg.near(self.params.limit, [*map(self.dual.get, keys), *self.costs()])

    def costs(self) -> list[float | None]:
        """The means and ends of all costs."""
        return [end for row in self.rows if row["cost"] for end in row["cost"].values()]

    def shared(self) -> dict[str, Any]:
        """What every template part may use."""
        return {
            "params": self.params,
            "rows": self.rows,
            "best": self.row(self.comparison["recommended"]),
            "reference": self.row(REFERENCE),
            "dual": self.dual,
            "additional": self.additional,
            "limit_shown": self.limit_shown is not None,
            "level": percent(self.params.confidence),
        }


def _rank(row: Row) -> tuple[int, bool, int, float]:
    standings = ("within", "unproven", "over", None)
    kinds = ("method", "reference", "baseline")
    reward = row["reward"]["mean"] if row["reward"] else float("-inf")
    return (
        kinds.index(row["kind"]),
        not row["certified"],
        standings.index(row["standing"]),
        -reward,
    )


def _style(row: Row) -> str:
    standing = "within" if row["certified"] else row["standing"] or "unknown"
    return f"{row['kind']} {standing}" + (" recommended" if row["recommended"] else "")


def _how(row: Row) -> str:
    """How a search went: the method where the name does not say it, the rule, what is unusual."""
    if not row.get("rule"):
        return ""
    parts = [row["rule"].replace("_", " ")]
    if row.get("returns") in ("mixture", "tail_average"):
        parts.append(row["returns"].replace("_", " "))
    if row.get("cost_source") == "feedback":
        parts.append("by labels")
    own = row.get("title") and Path(row["folder"]).name != row["method"]
    return (f"{row['title']}: " if own else "") + ", ".join(parts)
