"""What other evaluation harnesses say of the policies (`dualign import-results`)."""

from __future__ import annotations

from dualign.evaluation.harness import read_imported
from dualign.report.sections.base import FinishedRun, Row, Section


def section(run: FinishedRun) -> Section | None:
    """None where nothing was imported."""
    rows: list[Row] = [
        {"record": record, "metric": row}
        for record in read_imported(run.root)
        for row in record.rows
    ]
    return Section("harness", "Other harnesses", {"results": rows}) if rows else None
