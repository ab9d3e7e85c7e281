"""What the pool predicts at other KL weights."""

from __future__ import annotations

from dualign.core.records import Betas, read_optional_record
from dualign.report.diagnosis import other_betas
from dualign.report.sections.base import FinishedRun, Section


def section(run: FinishedRun) -> Section | None:
    """None where no other weight was asked for."""
    table = read_optional_record(run.root / "data/dual/betas.json", Betas)
    betas = other_betas(table) if table else []
    return Section("betas", "Other β", {"betas": betas}) if betas else None
