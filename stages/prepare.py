"""prepare: data sources -> validated, deduplicated, prompt-disjoint tables and prompt sets.

    python -m stages.prepare

Reads the sources of `prepare.sft`, `.helpful`, `.safety`; writes data/prepared and
reports/metrics/prepare.json."""

from __future__ import annotations

from pathlib import Path

from dualign.core.artifacts import replacing
from dualign.data.prepare import FAILED, prepare
from dualign.params.data import PrepareParams
from dualign.stage import Run, execute

OUT = Path("data/prepared")


def main(run: Run[PrepareParams]) -> None:
    """Run the stage."""
    with replacing(OUT) as folder:
        folder.mkdir()
        metrics = prepare(run.params, folder, OUT.with_name(FAILED))
    run.metrics(metrics)


if __name__ == "__main__":
    execute(main, PrepareParams)
