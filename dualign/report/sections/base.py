"""What every section of the page is, and what all of them may show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.records import (
    ComparedPolicy,
    Comparison,
    Frontier,
    FrontierRow,
    Provenance,
    SolvedDual,
    read_optional_record,
    read_provenance,
)
from dualign.params.report import ReportParams
from dualign.params.stages import STAGES
from dualign.report.charts import svg
from dualign.report.comparison import REFERENCE, compare, read_answers
from dualign.report.diagnosis import AdditionalLimit, Predicted, additional_constraints, predicted
from dualign.report.formatting import stated
from dualign.report.judged import read_verdicts
from dualign.report.multipliers import solved_dual
from dualign.report.named import named

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page: `sections/ANCHOR.html` rendered with these values.

    `contents` is what the table of contents calls it; empty where it is not listed."""

    anchor: str
    contents: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Mark:
    """How the page marks a policy in tables and charts; without a number it was not evaluated."""

    number: int | None
    style: str
    recommended: bool


class ShownPolicy(ComparedPolicy):
    """A policy as the table shows it: `how` its search went, and what was `predicted` of it."""

    name: str
    mark: Mark
    how: str
    predicted: Predicted | None


@dataclass(frozen=True)
class FinishedRun:
    """What the stages left under a repository root, as far as several sections read it."""

    root: Path
    params: ReportParams

    @cached_property
    def comparison(self) -> Comparison:
        """Every evaluated policy."""
        return compare(self.root, self.params)

    @cached_property
    def answers(self) -> dict[str, pd.DataFrame]:
        """The generated answers of every policy that has any."""
        return read_answers(self.root, self.params.policies)

    @cached_property
    def provenance(self) -> list[Provenance]:
        """What each stage took, in the order of the pipeline; not the report, which has not ended,
        and no instance that params no longer name.
        """
        order = list(STAGES)
        made = [
            stage
            for stage in read_provenance(self.root)
            if stage.stage != "report" and named(self.params, stage.stage, stage.item)
        ]
        return sorted(made, key=lambda stage: (order.index(stage.stage), stage.item or ""))

    @cached_property
    def dual(self) -> SolvedDual | None:
        """data/dual/dual.json; None where the pool's dual was not solved."""
        return solved_dual(self.root)

    @cached_property
    def curve(self) -> list[FrontierRow]:
        """The frontier that the pool predicts."""
        frontier = read_optional_record(self.root / "data/dual/frontier.json", Frontier)
        return frontier.rows if frontier else []

    @cached_property
    def rows(self) -> list[ShownPolicy]:
        """The policies as the table shows them, numbered: methods, those within the limit first."""
        ranked = sorted(self.comparison.policies.items(), key=lambda item: _rank(item[1]))
        return [self._shown(number, *named) for number, named in enumerate(ranked, 1)]

    def _shown(self, number: int, name: str, policy: ComparedPolicy) -> ShownPolicy:
        recommended = name == self.comparison.recommended
        return ShownPolicy(
            **dict(policy),
            name=name,
            mark=Mark(number, _style(policy, recommended), recommended),
            how=_how(policy),
            predicted=predicted(self.curve, policy.lam) if policy.on_curve else None,
        )

    def row(self, name: str | None) -> ShownPolicy | None:
        """The row of a policy; None where it was not evaluated."""
        return next((row for row in self.rows if row.name == name), None)

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
        order = [row.name for row in self.rows] + list(self.params.policies)
        return sorted(policies, key=order.index)

    def mark_of(self, policy: str) -> Mark:
        """How the page marks a policy in tables and charts."""
        row = self.row(policy)
        return row.mark if row else Mark(None, "method unknown", False)

    @cached_property
    def additional(self) -> list[AdditionalLimit]:
        """The constraints beside the one on cost."""
        return additional_constraints(self.dual.prices if self.dual else [], self.rows)

    @cached_property
    def limit_shown(self) -> float | None:
        """The limit on cost, if charts can show it beside all costs; None for one far off."""
        costs = self.costs()
        if self.dual is not None:
            costs += [self.dual.cost_reference, self.dual.cost_unconstrained]
            costs.append(self.dual.reachable_minimum)
        return svg.near(self.params.limit, costs)

    def costs(self) -> list[float | None]:
        """The means and ends of all costs."""
        return svg.ends(*(row.cost for row in self.rows if row.cost))

    def shared(self) -> dict[str, Any]:
        """What every template part may use."""
        return {
            "params": self.params,
            "rows": self.rows,
            "best": self.row(self.comparison.recommended),
            "reference": self.row(REFERENCE),
            "dual": self.dual,
            "additional": self.additional,
            "limit_shown": self.limit_shown is not None,
            "level": stated(self.params.confidence, share=True),
        }


def _rank(policy: ComparedPolicy) -> tuple[int, bool, int, float]:
    standings = ("within", "unproven", "over", None)
    kinds = ("method", "reference", "baseline")
    reward = policy.reward.mean if policy.reward else float("-inf")
    return (
        kinds.index(policy.kind),
        not policy.certified,
        standings.index(policy.standing),
        -reward,
    )


def _style(policy: ComparedPolicy, recommended: bool) -> str:
    standing = "within" if policy.certified else policy.standing or "unknown"
    return f"{policy.kind} {standing}" + (" recommended" if recommended else "")


def _how(policy: ComparedPolicy) -> str:
    """How a search went: the method where the name does not say it, the rule, what is unusual."""
    if not policy.rule:
        return ""
    parts = [policy.rule.replace("_", " ")]
    if policy.returns in ("mixture", "tail_average"):
        parts.append(policy.returns.replace("_", " "))
    if policy.cost_source == "feedback":
        parts.append("by labels")
    own = policy.title and Path(policy.folder).name != policy.method
    return (f"{policy.title}: " if own else "") + ", ".join(parts)
