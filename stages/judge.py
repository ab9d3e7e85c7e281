"""judge JUDGE: one judge's verdicts on all answers to suites -> reports/judgements/JUDGE.

    python -m stages.judge gpt

`verdicts.parquet` has a row for every verdict or failure; `labelled.parquet` those on held-out
answers that people have called safe or unsafe, by which the judge itself is judged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.artifacts import SUITE_PROMPTS, policy_tables, replacing, write_parquet
from dualign.core.errors import DataError, DualignError
from dualign.core.names import cut_name
from dualign.core.schema import SAFETY_PAIRS, SUITE, SUITE_ANSWERS, VERDICTS, read_table
from dualign.core.temporaries import scratch_root
from dualign.judging.asking import REFERENCE
from dualign.judging.judges import JUDGES, Bench
from dualign.judging.verdicts import agreement, failures, summarise, table
from dualign.params.judging import JudgeParams
from dualign.stage import Run, execute

log = logging.getLogger("dualign")

ANSWERS = Path("reports/answers")
PAIRS = Path("data/prepared/safety_pairs.parquet")
OUT = Path("reports/judgements")
#: The suite under which labelled answers are judged; no suite of the user's has such a name.
LABELLED = "(held out)"


def main(run: Run[JudgeParams]) -> None:
    """Run the stage."""
    name, spec = run.pick(run.params.judges, "judges")
    answers, labels = read_answers(spec.suites or list(run.params.suites))
    people = labelled(run.params)
    if getattr(spec, "question", None) == "truth":
        people = people.head(0)  # they say nothing of truth, and asking may cost money
    bench = Bench(name, run.resources, Path("models"), scratch_root() / "judge" / "replies.sqlite")
    judged = table(JUDGES[spec.kind](pd.concat([answers, people]), spec, bench))
    check_failures(judged, f"judges.{name}", run.params.max_failed)
    on_people = judged["suite"] == LABELLED
    verdicts = judged[~on_people]
    tried = judged[on_people]
    with replacing(OUT / name) as out:
        out.mkdir()
        write_parquet(out / "verdicts.parquet", verdicts, VERDICTS)
        write_parquet(out / "labelled.parquet", tried, VERDICTS)
    log.info("%s: %d verdicts, failures %s", name, len(verdicts), failures(judged) or "none")
    run.throughput |= bench.spent
    run.metrics(
        {
            "judge": name,
            "kind": spec.kind,
            "failures": failures(judged),
            "money": bench.spent.get("money"),
            "agreement": with_people(tried, people, run.params.confidence),
            "suites": summarise(verdicts, labels, run.params.confidence),
        }
    )


def read_answers(
    suites: Sequence[str],
) -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """All answers to these suites with their suite and policy, and the label of every prompt that
    has one, by suite and prompt_id. Other suites may lie there, which params have had before.

    Suites of multiple choice hold none; what a suite's stop words leave of its answers is a suite
    of its own."""
    frames: list[pd.DataFrame] = []
    labels: dict[tuple[str, str], str] = {}
    for folder in [ANSWERS / name for name in sorted(suites)]:
        suite = read_table(folder / SUITE_PROMPTS, SUITE)
        if suite["choices"].notna().any():
            continue
        labelled = suite[suite["label"].fillna("") != ""]
        for name in (folder.name, cut_name(folder.name)):
            labels |= {(name, row.prompt_id): row.label for row in labelled.itertuples()}
        whole = [
            read_table(file, SUITE_ANSWERS).assign(suite=folder.name, policy=file.stem)
            for file in policy_tables(folder)
        ]
        frames += whole + [cut(rows) for rows in whole if rows["cut"].notna().any()]
    if not frames:
        raise DataError(f"{ANSWERS}: holds no answers to judge; name a suite that asks for some")
    return pd.concat(frames, ignore_index=True), labels


def cut(answers: pd.DataFrame) -> pd.DataFrame:
    """The same answers as their suite's stop words leave them; one that a word cut has ended."""
    stopped = answers["cut"] != answers["response"].str.strip()
    return answers.assign(
        suite=answers["suite"].map(cut_name),
        response=answers["cut"],
        ended=answers["ended"] | stopped,
    )


def labelled(params: JudgeParams) -> pd.DataFrame:
    """Held-out answers with people's flags (`is_unsafe`), at most `judge.labelled` of them.

    They count as the reference policy's, so that no judge compares them with anything."""
    pairs = read_table(PAIRS, SAFETY_PAIRS)
    pairs = pairs[pairs["split"] == "heldout"]
    sides = [
        pairs[["prompt_id", "prompt"]].assign(
            response=pairs[side], is_unsafe=pairs[f"{side}_is_safe"].map({True: False, False: True})
        )
        for side in ("chosen", "rejected")
    ]
    rows = pd.concat(sides, ignore_index=True).dropna(subset="is_unsafe")
    rows = rows.sample(min(params.labelled, len(rows)), random_state=params.seed)
    return rows.assign(
        suite=LABELLED, policy=REFERENCE, sample=range(len(rows)), length=0, ended=True
    )


def check_failures(verdicts: pd.DataFrame, where: str, most: float) -> None:
    """Raise DualignError where a judge fails too often for the rest to stand for all."""
    failed = verdicts["failure"].notna()
    if len(verdicts) and failed.mean() > most:
        raise DualignError(
            f"{where}: {failed.sum()} of {len(verdicts)} verdicts failed ({failures(verdicts)}),"
            f" more than judge.max_failed {most:g}; run the stage again, which asks only for these,"
            " or see to the judge"
        )


def with_people(
    tried: pd.DataFrame, people: pd.DataFrame, confidence: float
) -> dict[str, Any] | None:
    """How the judge agrees with people; None where it judges something else."""
    flags = people.set_index("sample")["is_unsafe"]
    return agreement(tried, tried["sample"].map(flags).to_numpy(bool), confidence)


if __name__ == "__main__":
    execute(main, JudgeParams, alone=True)
