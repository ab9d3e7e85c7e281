"""answer SUITE: every evaluated policy's answers to a suite of prompts -> reports/answers/SUITE.

    python -m stages.answer xstest

`_suite.parquet` holds the prompts, `POLICY.parquet` the answers of a policy; of a multiple-choice
suite the log-likelihood of each choice. What a policy has answered is kept in the scratch folder
by all that it depends on (the policy's files, the prompts, this suite's params, seed and code):
another policy or suite makes no answer anew, and a kill loses the part of the prompts at hand."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dualign.core.artifacts import SUITE_PROMPTS, listed, replacing, write_parquet
from dualign.core.schema import CHOICES, SFT, SUITE, SUITE_ANSWERS, family_id, read_table
from dualign.evaluation.stats import clustered_mean
from dualign.evaluation.suites import before_stop, read_suite
from dualign.evaluation.truthful import choice_log_probabilities, mc1, mc2
from dualign.lm.engines.interface import Decoding
from dualign.lm.folders import is_policy
from dualign.lm.mixture import Policy, policy_at
from dualign.lm.models import load_tokenizer
from dualign.lm.sampling import Draws, draw
from dualign.lm.tokens import encode_prompts
from dualign.params.evaluate import SuiteSpec
from dualign.params.judging import AnswerParams
from dualign.stage import Run, execute

log = logging.getLogger("dualign")

OUT = Path("reports/answers")
#: What trainings read, and the columns of all of it that say which questions.
TRAINED = [
    Path("data/prepared/sft.parquet"),
    Path("data/prepared/helpful_pairs.parquet"),
    Path("data/prepared/safety_pairs.parquet"),
]
QUESTIONS = pa.schema([SFT.field(name) for name in ("prompt_id", "prompt", "split")])
MODELS = Path("models")
#: Whose tokenizer all policies have.
REFERENCE = MODELS / "sft"
#: How many prompts are answered before their answers are kept.
PART = 256


def main(run: Run[AnswerParams]) -> None:
    """Run the stage."""
    name, spec = run.pick(run.params.suites, "suites")
    suite = read_suite(spec, Path(run.params.folder))
    known = seen(suite)
    if known:
        log.warning(
            "%s: %d of %d prompts begin with a question of a training row (data/prepared): how"
            " policies answer these is no evidence of how they answer others",
            name, known, len(suite),
        )  # fmt: skip
    schema = SUITE_ANSWERS if suite["choices"].isna().all() else CHOICES
    metrics: dict[str, Any] = {}
    with replacing(OUT / name) as out:
        out.mkdir()
        write_parquet(out / SUITE_PROMPTS, suite, SUITE)
        for policy, folder in run.params.policies.items():
            if not is_policy(MODELS / folder):
                log.warning("models/%s holds no policy: none was certified", folder)
                metrics[policy] = {"absent": True}
                continue
            answers = kept_or_made(run, policy, out / SUITE_PROMPTS, schema)
            write_parquet(out / f"{policy}.parquet", answers, schema)
            metrics[policy] = told(answers)
    run.metrics({"prompts": len(suite), "seen": known, "policies": metrics})


def seen(suite: pd.DataFrame) -> int:
    """How many prompts of a suite begin with a question that a training row begins with."""
    questions: set[str] = set()
    for file in TRAINED:
        rows = read_table(file, QUESTIONS).drop_duplicates("prompt_id")
        questions.update(map(family_id, rows[rows["split"] == "train"]["prompt"]))
    return sum(family_id(prompt) in questions for prompt in suite["prompt"])


def kept_or_made(
    run: Run[AnswerParams], policy: str, suite: Path, schema: pa.Schema
) -> pd.DataFrame:
    """A policy's answers to a suite in a file: those kept if nothing differs, else new ones."""
    name, spec = run.pick(run.params.suites, "suites")
    folder = run.params.policies[policy]
    alone = {"suites": {name: spec}, "policies": {policy: folder}}
    narrowed = replace(run, params=run.params.model_copy(update=alone))
    kept = narrowed.scratch(MODELS / folder, suite, *tokenizer_files()) / "answers.parquet"
    if kept.is_file():
        log.info("%s: answered by %s before", name, policy)
        return read_table(kept, schema)
    rows = in_parts(run, policy, read_table(suite, SUITE), schema, kept.parent)
    write_parquet(kept, rows, schema)
    for part in listed(kept.parent, "part-*.parquet"):
        part.unlink(missing_ok=True)  # another process may be ahead
    return read_table(kept, schema)


def in_parts(
    run: Run[AnswerParams], policy: str, suite: pd.DataFrame, schema: pa.Schema, folder: Path
) -> pd.DataFrame:
    """A policy's answers to a suite, made and kept in `folder` part by part; those of a part that a
    run before this one has left are taken as they are.
    """
    name, spec = run.pick(run.params.suites, "suites")
    model = policy_at(MODELS / run.params.policies[policy], run.resources)
    make = chosen if schema is CHOICES else answered
    started = time.monotonic()
    made = 0
    parts = []
    for start in range(0, len(suite), PART):
        kept = folder / f"part-{start}.parquet"
        if not kept.is_file():
            rows = make(run, model, spec, suite.iloc[start : start + PART], start)
            write_parquet(kept, rows, schema)
            made += len(rows)
        parts.append(read_table(kept, schema))
    rate = made / (time.monotonic() - started)
    run.throughput[f"{policy}_rows_per_second"] = rate
    log.info("%s: %s answers, %.1f a second", name, policy, rate)
    return pd.concat(parts, ignore_index=True)


def tokenizer_files() -> list[Path]:
    """What of the reference policy's folder its tokenizer is made of, and no weights."""
    return [path for path in listed(REFERENCE, "*") if path.suffix in (".json", ".jinja", ".model")]


def answered(
    run: Run[AnswerParams], policy: Policy, spec: SuiteSpec, suite: pd.DataFrame, start: int
) -> pd.DataFrame:
    """Answers to the prompts of a part, whole and cut at the suite's stop words: schema
    SUITE_ANSWERS. A part that starts elsewhere draws by another seed.
    """
    tokenizer = load_tokenizer(REFERENCE)
    count = spec.samples_per_prompt
    drawn = draw(
        policy, tokenizer, encode_prompts(tokenizer, suite["prompt"].tolist()),
        wanted(run, spec, run.params.seed + start), run.resources,
    )  # fmt: skip
    rows = suite.iloc[[answer.prompt for answer in drawn]][["prompt_id", "prompt"]]
    return rows.assign(
        sample=[place % count for place in range(len(drawn))],
        response=[answer.text for answer in drawn],
        length=[len(answer.tokens) for answer in drawn],
        ended=[answer.ended for answer in drawn],
        cut=[before_stop(answer.text, spec.stop) if spec.stop else None for answer in drawn],
    ).reset_index(drop=True)


def wanted(run: Run[AnswerParams], spec: SuiteSpec, seed: int) -> Draws:
    """How the answers to this suite are made."""
    longest = run.params.max_new_tokens
    draws = Draws(spec.samples_per_prompt, longest, seed, Decoding.of(spec))
    if spec.max_new_tokens is None:
        return draws
    key = f"suites.{run.item}.max_new_tokens"
    return replace(draws, max_new_tokens=spec.max_new_tokens, key=key)


def chosen(
    run: Run[AnswerParams], policy: Policy, spec: SuiteSpec, suite: pd.DataFrame, start: int
) -> pd.DataFrame:
    """The log-likelihood of every choice, and the score of the suite's kind: schema CHOICES. They
    are the same wherever a part starts.
    """
    logp = choice_log_probabilities(
        policy, load_tokenizer(REFERENCE), suite,
        batch_size=run.resources.scoring_batch_size,
    )  # fmt: skip
    score = mc1 if spec.suite == "truthfulqa_mc1" else mc2
    scores = [score(row, correct) for row, correct in zip(logp, suite["correct"], strict=True)]
    return suite[["prompt_id"]].assign(logp=[row.tolist() for row in logp], score=scores)


def told(answers: pd.DataFrame) -> dict[str, float | int]:
    """What there is of a policy's answers, and how it chooses."""
    prompts = answers["prompt_id"].to_numpy()
    if "score" in answers:
        score = clustered_mean(answers["score"].to_numpy(), prompts).mean
        return {"questions": len(answers), "score": score}
    means = {name: float(np.mean(answers[name])) for name in ("length", "ended")}
    if answers["cut"].notna().any():
        means["cut"] = float(np.mean(answers["cut"] != answers["response"].str.strip()))
    return {"answers": len(answers), **means}


if __name__ == "__main__":
    execute(main, AnswerParams)
