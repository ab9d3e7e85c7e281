"""The answer: which policy to take, or why none, with the warnings of the run."""

from __future__ import annotations

from dualign.report.comparison import certified_by
from dualign.report.diagnosis import cut_in_words
from dualign.report.sections import certificate
from dualign.report.sections.base import FinishedRun, Section


def section(run: FinishedRun) -> Section:
    """Always there."""
    best = run.row(run.comparison.recommended)
    issued = certified_by(best.folder, run.comparison.certificates) if best else None
    cards = certificate.cards(run)
    return Section(
        "verdict",
        "",
        {
            "nearest": run.row(run.comparison.nearest),
            "certificates": cards,
            "certificate": next((card for card in cards if card.name == issued), None),
            "cut": cut_in_words({row.name: row for row in run.rows}),
            "missing": run.comparison.missing,
            "uncertified": run.comparison.uncertified,
        },
    )
