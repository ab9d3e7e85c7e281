"""The commands that run a part of it again, and that tell what changed."""

from __future__ import annotations

from dualign.report.sections.base import FinishedRun, Section


def section(run: FinishedRun) -> Section:
    """Always there."""
    return Section("rerun", "Run it again", {})
