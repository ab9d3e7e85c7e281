"""What judges said of a policy's answers to suites, as its model card shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dualign.core.records import Interval
from dualign.params.report import ReportParams
from dualign.report.comparison import REFERENCE
from dualign.report.judged import (
    LIKELIHOOD,
    SCORES,
    JudgeMetrics,
    calibrated_on_people,
    means,
    read_judges,
    read_verdicts,
)

_HEADINGS = {measure.key: measure.heading for measure in SCORES}


def judged_suites(root: Path, params: ReportParams, policy: str) -> str:
    """A table of the policy beside the reference, a row for each score by suite, kind of prompts
    and judge, and how far the judges of harm agree with people; empty where nothing was judged.

    `params` are those that the report ran with, `policy` is a name of theirs.
    """
    verdicts = read_verdicts(root, params)
    own = verdicts[verdicts["policy"] == policy]
    if not len(own):
        return ""
    head = (
        "By other prompts, each judge's verdicts of the answers; intervals by prompt. A score that"
        " is no share has its judge's own zero and unit."
    )
    reference = verdicts[verdicts["policy"] == REFERENCE]
    table = [
        "| prompts | judge | | this policy | reference |",
        "|---|---|---|---|---|",
        *_rows(own, reference, params),
    ]
    people = [_with_people(root, judge) for judge in read_judges(root, params) if judge.agreement]
    return "\n".join(["## Suites and judges", "", head, "", *table, *people])


def _rows(own: pd.DataFrame, reference: pd.DataFrame, params: ReportParams) -> Iterator[str]:
    by = ["suite", "label", "judge"]
    theirs = dict(tuple(reference.groupby(by)))
    for (suite, label, judge), rows in own.groupby(by, sort=False):
        met = theirs.get((suite, label, judge))
        beside = {} if met is None else means(met, params.confidence)
        prompts = f"{suite}, {_in_a_cell(label)}" if label else suite
        who = _who(judge, params)
        for key, mean in means(rows, params.confidence).items():
            texts = f"{interval(mean)} | {interval(beside.get(key))}"
            yield f"| {prompts} | {who} | {_HEADINGS[key]} | {texts} |"


def _who(judge: str, params: ReportParams) -> str:
    if judge == LIKELIHOOD:
        return "log-likelihood"
    return f"{judge} ({params.judges[judge].kind})"


def _in_a_cell(text: str) -> str:
    """Labels are text of files."""
    return " ".join(text.replace("|", "/").split())


def _with_people(root: Path, judge: JudgeMetrics) -> str:
    told = judge.agreement or {}
    kappa = ""
    if told["kappa"] is not None:  # unknown where people call all answers alike
        ends = Interval(mean=told["kappa"], low=told["kappa_low"], high=told["kappa_high"])
        kappa = f" (Cohen's kappa {interval(ends)})"
    calibrated = calibrated_on_people(root, judge)
    fitted = " Its cost was calibrated on such answers." if calibrated else ""
    return (
        f"\nOf {told['answers']} held-out answers that people called safe or unsafe, {judge.judge}"
        f" says the same of {100 * told['accuracy']:.0f} %{kappa}.{fitted}"
    )


def interval(found: Interval | None) -> str:
    """A mean and the ends of its interval, as a cell of a table."""
    if found is None:
        return "–"
    if found.low is None:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"
