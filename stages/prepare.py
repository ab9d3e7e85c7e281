"""prepare: data sources -> validated, deduplicated, prompt-disjoint tables and prompt sets.

    python -m stages.prepare

Reads the sources of `prepare.sft`, `.helpful`, `.safety`; writes data/prepared and reports/metrics/prepare.json.
"""

from __future__ import annotations

from pathlib import Path

from dualign.core.artifacts import replacing
from dualign.core.params import PrepareParams
from dualign.core.stage import Run, execute
from dualign.data.prepare import prepare


def main(run: Run[PrepareParams]) -> None:
    """Run the stage."""
    with replacing(Path("data/prepared")) as folder:
        folder.mkdir()
        metrics = prepare(run.params, folder)
    run.metrics(metrics)


if __name__ == "__main__":
    execute(main, PrepareParams)
