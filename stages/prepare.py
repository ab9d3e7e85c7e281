"""prepare: data sources -> validated, deduplicated, prompt-disjoint tables and prompt sets.

    python -m stages.prepare

Reads the sources of `prepare.sft`, `.helpful`, `.safety`; writes data/prepared and reports/metrics/prepare.json.
"""

from __future__ import annotations

from pathlib import Path

from dualign.artifacts import replacing
from dualign.data.prepare import prepare
from dualign.params import PrepareParams
from dualign.stage import Run, execute


def main(run: Run[PrepareParams]) -> None:
    """Run the stage."""
    with replacing(Path("data/prepared")) as folder:
        folder.mkdir()
        metrics = prepare(run.params, folder)
    run.metrics(metrics)


if __name__ == "__main__":
    execute(main, PrepareParams)
