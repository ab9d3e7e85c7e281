"""prepare: data sources -> validated, deduplicated, prompt-disjoint tables and prompt sets.

    python -m stages.prepare

Reads the sources of `prepare.sft`, `.helpful`, `.safety`; writes data/prepared and
reports/metrics/prepare.json. A row of `methods` that does not fit is refused here, before anything
is trained."""

from __future__ import annotations

from pathlib import Path

from dualign.checks import check_methods
from dualign.core.artifacts import replacing
from dualign.core.records import PreparedMetrics, as_row
from dualign.data.prepare import FAILED, prepare
from dualign.params.data import PrepareParams
from dualign.params.loading import load
from dualign.params.search import DualSearchParams
from dualign.stage import Run, execute

OUT = Path("data/prepared")


def main(run: Run[PrepareParams]) -> None:
    """Run the stage."""
    check_methods(load(DualSearchParams))
    with replacing(OUT) as folder:
        folder.mkdir()
        metrics = prepare(run.params, folder, OUT.with_name(FAILED))
    run.metrics(as_row(PreparedMetrics.model_validate(metrics)))


if __name__ == "__main__":
    execute(main, PrepareParams, alone=True)
