"""Nominal and effective multipliers, predictions beside what was measured."""

from __future__ import annotations

from dualign.report.sections.base import FinishedRun, Section


def section(run: FinishedRun) -> Section | None:
    """The policies that were predicted, or whose tilt was read; None where there are none."""
    reached = [row for row in run.rows if row.predicted or (row.tilt and row.kind != "reference")]
    return (
        Section("multipliers", "Nominal and effective", {"reached": reached}) if reached else None
    )
