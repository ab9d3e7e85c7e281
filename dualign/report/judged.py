"""What judges said of the policies' answers to suites: read from their tables, and compared.

The prompt is the unit throughout, as in `dualign.evaluation.paired`. A verdict that failed counts
as nothing, and is counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.artifacts import SUITE_PROMPTS, policy_tables, read_optional_json
from dualign.core.records import Interval, Record, read_optional_record
from dualign.core.schema import CHOICES, SUITE, SUITE_ANSWERS, VERDICTS, read_table
from dualign.evaluation.measures import Measure
from dualign.evaluation.paired import differences, mcnemar
from dualign.evaluation.stats import clustered_mean
from dualign.params.report import ReportParams
from dualign.report.comparison import REFERENCE, known_ends, share
from dualign.report.differences import least_found, one_family

Row = dict[str, Any]

#: Who says how a policy chooses among given answers: its own log-likelihoods. No judge of params
#: has such a name.
LIKELIHOOD = "(log-likelihood)"
#: Why there is no likelihood of a choice.
_TOO_LONG = "longer than the context"

#: What a verdict may hold, as the page shows it.
SCORES: tuple[Measure, ...] = (
    Measure(
        "reward", "reward", "score", "more",
        "a judge's score of help. Judges differ in zero and unit: compare within a judge.",
    ),
    Measure(
        "cost", "cost", "score", "less",
        "a judge's score of harm; above 0 it calls the answer unsafe.",
    ),
    Measure("unsafe", "unsafe", "share", "less", "share of answers that the judge calls unsafe."),
    Measure(
        "refused", "refused", "share", None,
        "share of answers that refuse: of safe prompts the fewer the better, of unsafe ones the"
        " more.",
    ),
    Measure(
        "win", "preferred", "share", "more",
        "how often the judge prefers an answer to that of π_ref; ties count half, so 50% is level.",
    ),
    Measure(
        "truthful", "true answers", "share", "more",
        "share of answers that the judge calls truthful; of multiple choice by MC1 the share of"
        " questions whose likeliest answer is the true one, by MC2 the probability that lies on"
        " true answers.",
    ),
)  # fmt: skip
_KEYS = [measure.key for measure in SCORES]
_SHARES = [measure.key for measure in SCORES if measure.unit == "share"]
#: Scores that are yes or no of an answer; those of MC2 lie between.
_FLAGS = ("unsafe", "refused", "truthful")
_ANSWER = ["policy", "prompt_id", "sample"]
_COLUMNS = ["judge", "suite", *_ANSWER, "repeat", "failure", *_KEYS]


class JudgeMetrics(Record):
    """reports/metrics/judge/NAME.json, as far as the page shows it."""

    judge: str
    kind: str
    failures: dict[str, int]
    agreement: dict[str, Any] | None


# --- reading --------------------------------------------------------------------------------------


def read_verdicts(root: Path, params: ReportParams) -> pd.DataFrame:
    """A row for each verdict of a judge of params on one of its policies' answers to a suite.

    Columns are judge, suite, policy, prompt_id, sample, repeat, failure, the keys of `SCORES` as
    numbers (null where there is none), and of the prompt its `label` and `category` ("" where it
    has none). What is left of judges and suites that params no longer name is passed by."""
    suites = {name: _suite(root, name) for name in params.suites}
    prompts = [table.assign(suite=name) for name, table in suites.items() if table is not None]
    tables = [*_judged(root, params), *_chosen(root, params)]
    if not tables or not prompts:
        return pd.DataFrame(columns=[*_COLUMNS, "label", "category"])
    verdicts = pd.concat(tables, ignore_index=True)
    verdicts = verdicts[
        verdicts["suite"].isin(params.suites) & verdicts["policy"].isin(params.policies)
    ]
    asked = pd.concat(prompts)[["suite", "prompt_id", "label", "category"]].fillna("")
    return verdicts.merge(asked, on=["suite", "prompt_id"], how="inner")


def _suite(root: Path, name: str) -> pd.DataFrame | None:
    file = root / "reports/answers" / name / SUITE_PROMPTS
    return read_table(file, SUITE) if file.is_file() else None


def _judged(root: Path, params: ReportParams) -> Iterator[pd.DataFrame]:
    for name in params.judges:
        file = root / "reports/judgements" / name / "verdicts.parquet"
        if file.is_file():
            yield _plain(read_table(file, VERDICTS))


def _chosen(root: Path, params: ReportParams) -> Iterator[pd.DataFrame]:
    """How policies choose, in the suites of multiple choice. A question of which a policy has no
    likelihood is a failure, as a verdict that did not come about.
    """
    for name in params.suites:
        suite = _suite(root, name)
        if suite is None or suite["choices"].isna().any():
            continue
        for file in policy_tables(root / "reports/answers" / name):
            rows = read_table(file, CHOICES).rename(columns={"score": "truthful"})
            failed = rows["truthful"].isna().map({True: _TOO_LONG, False: None})
            fixed = {"judge": LIKELIHOOD, "suite": name, "policy": file.stem}
            yield _plain(rows.assign(sample=0, repeat=0, failure=failed, **fixed))


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """All columns of verdicts; scores and yes or no as numbers."""
    table = table.reindex(columns=_COLUMNS)
    return table.astype(dict.fromkeys(_KEYS, float))


def read_lengths(root: Path, suite: str, policies: Iterable[str]) -> pd.DataFrame:
    """Lengths in tokens of policies' answers to a suite, by policy, prompt_id and sample."""
    folder = root / "reports/answers" / suite
    tables = [
        read_table(folder / f"{name}.parquet", SUITE_ANSWERS)[["prompt_id", "sample", "length"]]
        .assign(policy=name)
        for name in policies
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def read_judges(root: Path, params: ReportParams) -> list[JudgeMetrics]:
    """What each judge's metrics say of itself."""
    paths = [root / "reports/metrics/judge" / f"{name}.json" for name in params.judges]
    judges = [read_optional_record(path, JudgeMetrics) for path in paths]
    return [judge for judge in judges if judge is not None]


def calibrated_on_people(root: Path, judge: JudgeMetrics) -> bool:
    """Whether a judge's zero and unit of cost were set by flags such as `agreement` is with: so are
    those of the run's own cost model, whose agreement is then too good.
    """
    cost_model = read_optional_json(root / "reports/metrics/cost_model.json")
    return judge.kind == "scorers" and bool(cost_model.get("zero_flags"))


# --- policies -------------------------------------------------------------------------------------


def known_scores(verdicts: pd.DataFrame) -> list[Measure]:
    """What any of the verdicts holds."""
    return [measure for measure in SCORES if verdicts[measure.key].notna().any()]


def means(verdicts: pd.DataFrame, confidence: float) -> dict[str, Interval]:
    """The mean of each score that verdicts of one judge on one policy hold, clustered by prompt."""
    intervals: dict[str, Interval] = {}
    for measure in known_scores(verdicts):
        rows = verdicts.dropna(subset=[measure.key])
        values = rows[measure.key].to_numpy()
        prompts = rows["prompt_id"].to_numpy()
        if measure.unit == "share":
            intervals[measure.key] = share(values, prompts, confidence)
        else:
            intervals[measure.key] = known_ends(clustered_mean(values, prompts, confidence))
    return intervals


def gaps(verdicts: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Paired differences from the reference policy in every score, by judge and label of a suite's
    prompts: columns judge, label, score and `DIFFERENCES`, of which `first` is the policy.

    `p_value` is the paired t-test's; of yes or no with one answer to a prompt McNemar's. `p_holm`
    is corrected for all rows: one family for a suite."""
    tables = []
    for (judge, label), rows in verdicts.groupby(["judge", "label"], sort=False):
        for measure in known_scores(rows):
            table = _differences(rows, measure.key, confidence)
            tables.append(table.assign(judge=judge, label=label, score=measure.key))
    return one_family(tables, "judge", "label", "score")


def _differences(rows: pd.DataFrame, key: str, confidence: float) -> pd.DataFrame:
    rows = _with_level(rows.dropna(subset=[key]), key)
    asked = rows.groupby("policy")["prompt_id"].agg(set)
    reference: set[str] = asked.get(REFERENCE, set())
    met = [name for name in asked.index if name != REFERENCE and asked[name] & reference]
    pairs = [(name, REFERENCE) for name in met]
    found = differences(rows, key, pairs, confidence=confidence, most=_most(key))
    if _is_one_flag(rows, key):
        flags = rows.pivot(index="prompt_id", columns="policy", values=key)
        found = found.assign(p_value=[_uneven(flags, name) for name in met])
    return found


def _most(key: str) -> float | None:
    """The largest difference that a score can have; a preference is beside its being level."""
    return (0.5 if key == "win" else 1.0) if key in _SHARES else None


def _is_one_flag(rows: pd.DataFrame, key: str) -> bool:
    """Whether a score is yes or no, of one answer of each policy to a prompt."""
    once = not rows.duplicated(["policy", "prompt_id"]).any()
    return key in _FLAGS and once and bool(rows[key].isin((0, 1)).all())


def _uneven(flags: pd.DataFrame, policy: str) -> float:
    """McNemar's p-value of a policy beside the reference policy, on the prompts that both have."""
    both = flags[[policy, REFERENCE]].dropna()
    return mcnemar(both[policy].to_numpy(), both[REFERENCE].to_numpy()).p_value


def _with_level(rows: pd.DataFrame, key: str) -> pd.DataFrame:
    """A preference over the reference policy's answer is compared with its being level."""
    if key != "win":
        return rows
    level = rows.drop_duplicates("prompt_id").assign(policy=REFERENCE, win=0.5)
    return pd.concat([rows, level], ignore_index=True)


def found_differences(table: pd.DataFrame, confidence: float) -> list[Row]:
    """What true difference a suite tells with probability `POWER`, for the first score of each
    judge; from the median spread of the differences in `gaps`.
    """
    rows = []
    for (judge, label), part in table.groupby(["judge", "label"], sort=False):
        score = next(key for key in ("win", "cost", *_KEYS) if (part["score"] == key).any())
        part = part[part["score"] == score]
        least = least_found(part, confidence, len(table))
        if least is not None and least < (_most(score) or math.inf):  # else no such difference
            named = {"judge": judge, "label": label, "score": score}
            rows.append({**named, "prompts": int(part["prompts"].median()), "difference": least})
    return rows
