"""The answer: which policy to take, or why none, with the warnings of the run."""

from __future__ import annotations

from dualign.report.diagnosis import cut_in_words
from dualign.report.sections import certificate
from dualign.report.sections.base import FinishedRun, Section


def section(run: FinishedRun) -> Section:
    """Always there."""
    return Section(
        "verdict",
        "",
        {
            "nearest": run.row(run.comparison.nearest),
            "certificates": certificate.cards(run),
            "cut": cut_in_words({row.name: row for row in run.rows}),
            "missing": run.comparison.missing,
            "uncertified": run.comparison.uncertified,
        },
    )
