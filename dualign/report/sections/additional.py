"""The constraints beside the one on cost: price, prediction, and what became of it by policy."""

from __future__ import annotations

from dualign.report.sections.base import FinishedRun, Section


def section(run: FinishedRun) -> Section | None:
    """None where there is no such constraint."""
    return Section("additional", "Additional constraints", {}) if run.additional else None
