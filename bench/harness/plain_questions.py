"""The same questions for Inspect: the model answers freely, and an answer that holds the right
words is right (docs/evaluation.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

QUESTIONS = Path(__file__).with_name("questions.jsonl")


def sample(row: dict[str, Any]) -> Sample:
    """A row of the file: what is asked, and the words that are looked for."""
    return Sample(input=row["question"], target=row["choices"][row["answer"]].split()[-1])


@task
def plain_questions() -> Task:
    """The questions of the file, each asked once."""
    return Task(dataset=json_dataset(str(QUESTIONS), sample), solver=generate(), scorer=includes())
