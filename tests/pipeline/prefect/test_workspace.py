"""The workspace as a place of stages."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.dvc.dag import load_dag
from pipeline.dvc.plan import StageStatus
from pipeline.prefect.workspace import Workspace
from pipeline.run.runner import LocalRunner, exclusive
from pipeline.run.slots import Slots
from pipeline.run.turn import Turn
from tests.pipeline.project import Project


def test_a_stage_that_ended_well_stays_so_though_its_card_cannot_be_made(
    project: Project,
) -> None:
    """Somebody pulls while a run goes, say, and a merge is left open in dvc.lock."""
    lines: list[tuple[int, str]] = []
    dag = load_dag(project.root)

    class Merged(LocalRunner):
        def run(self, *arguments: Any, **options: Any) -> Any:
            outcome = super().run(*arguments, **options)
            (project.root / "dvc.lock").write_text("<<<<<<< HEAD\nschema: 2\n=======\n")
            return outcome

    with exclusive(project.root) as lock:
        place = Workspace(project.root, dag, Merged(project.root, lock), Slots((), 1), "x")

        def log(level: int, line: str) -> None:
            lines.append((level, line))

        assert place.run(dag["first"], log, StageStatus("stale"), False, Turn(log)) == "Completed"
    level, told = lines[-1]
    assert level == logging.WARNING and told.startswith("an artifact is missing: unable to read")
