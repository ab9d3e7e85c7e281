"""report: all that was measured -> reports/index.html, one page, reports/comparison.json, and
tables for `dvc plots`.

python -m stages.report
"""

from __future__ import annotations

from pathlib import Path

from dualign.core.artifacts import write_json
from dualign.core.records import as_row
from dualign.params.report import ReportParams
from dualign.report.comparison import compare
from dualign.report.curves import write_curves
from dualign.report.page import write
from dualign.stage import Run, execute


def main(run: Run[ReportParams]) -> None:
    """Run the stage."""
    root = Path()
    comparison = compare(root, run.params.policies, run.params.certificates, run.params.confidence)
    write_json(root / "reports/comparison.json", as_row(comparison))
    write_curves(root, run.params, root / "reports/plots")
    write(root, run.params, root / "reports/index.html")


if __name__ == "__main__":
    execute(main, ReportParams, alone=True)
