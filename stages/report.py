"""report: all that was measured -> reports/index.html, one page, reports/comparison.json, and
tables for `dvc plots`.

python -m stages.report
"""

from __future__ import annotations

from pathlib import Path

from dualign.core.artifacts import write_json
from dualign.core.records import as_row
from dualign.params.report import ReportParams
from dualign.report.curves import write_curves
from dualign.report.page import write
from dualign.report.sections.base import FinishedRun
from dualign.stage import Run, execute


def main(run: Run[ReportParams]) -> None:
    """Run the stage."""
    root = Path()
    finished = FinishedRun(root, run.params)
    write_json(root / "reports/comparison.json", as_row(finished.comparison))
    write_curves(root, run.params, root / "reports/plots")
    write(finished, root / "reports/index.html")


if __name__ == "__main__":
    execute(main, ReportParams, alone=True)
