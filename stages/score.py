"""score: the two tables that everything later reads -> data/scored.

    python -m stages.score

`pool.parquet`: samples of pi_ref at T = 1 on the pool prompts; `scored_pairs.parquet`: training
pairs; both with reference log-probability, reward and cost. `support.parquet`: how likely pi_ref
finds answers of held-out pairs. In the embedded world also every grammatical answer to the eval
prompts."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd

from dualign.core.artifacts import replacing, write_parquet
from dualign.core.schema import (
    ENUMERATED,
    HELPFUL_PAIRS,
    POOL,
    PROMPTS,
    SAFETY_PAIRS,
    SCORED_PAIRS,
    SUPPORT,
    by_prompt,
    read_table,
)
from dualign.evaluation.against_optimum import enumerate_answers
from dualign.evaluation.rollout import Scorers, roll_out
from dualign.evaluation.stats import clustered_mean, clustered_share
from dualign.lm.sampling import check_prompts
from dualign.lm.tokens import encode_answers, encode_prompts, retokenised_share
from dualign.math.spread import within_sd
from dualign.params.models import ScoreParams
from dualign.scoring.support import HELD_OUT
from dualign.stage import Run, execute

DATA = Path("data/prepared")
OUT = Path("data/scored")

#: Held-out pairs that show what the scorers' data cover; their answers tell a share of a tenth of a
#: percent.
_SUPPORT_PAIRS = 2000


def main(run: Run[ScoreParams]) -> None:
    """Run the stage."""
    params = run.params
    scorers = Scorers.load(run.resources)
    check_prompts(scorers.reference, scorers.tokenizer, DATA, params.max_new_tokens)
    prompts = read_table(DATA / "pool.parquet", PROMPTS)
    started = time.monotonic()
    pool = roll_out(
        scorers.reference, prompts, scorers,
        count=params.samples_per_prompt, max_new_tokens=params.max_new_tokens, seed=params.seed,
    )  # fmt: skip
    run.throughput["pool_tokens_per_second"] = float(
        pool["length"].sum() / (time.monotonic() - started)
    )
    preferences = preference_pairs()
    pairs = score_pairs(drawn_of(preferences, "train", params.pairs, params.seed), scorers)
    support = support_rows(drawn_of(preferences, "heldout", _SUPPORT_PAIRS, params.seed), scorers)
    evaluated = read_table(DATA / "eval.parquet", PROMPTS)
    enumerated = enumerate_world(evaluated[evaluated["source"] == "world"], scorers)
    with replacing(OUT) as folder:
        write_parquet(folder / "pool.parquet", pool, POOL)
        write_parquet(folder / "scored_pairs.parquet", pairs, SCORED_PAIRS)
        write_parquet(folder / HELD_OUT, support, SUPPORT)
        write_parquet(folder / "enumerated.parquet", enumerated, ENUMERATED)
    ids = pool["prompt_id"].to_numpy()
    whole = pool[pool["ended"]]
    other = retokenised_share(
        scorers.tokenizer, whole["response"].tolist(), whole["tokens"].tolist()
    )
    drawn = {"prompts": len(prompts), "answers": len(pool), "ended": float(pool["ended"].mean())}
    run.metrics(
        {
            "pool": {**drawn, "retokenised": other},
            "pairs": len(pairs),
            "support_answers": len(support),
            "reward": clustered_mean(pool["reward"].to_numpy(), ids).as_dict(),
            "cost": clustered_mean(pool["cost"].to_numpy(), ids).as_dict(),
            "p_unsafe": clustered_share((pool["cost"] > 0).to_numpy(), ids).as_dict(),
            "reward_within_sd": within_sd(by_prompt(pool, "reward")),
            "cost_within_sd": within_sd(by_prompt(pool, "cost")),
        }
    )


def preference_pairs() -> pd.DataFrame:
    """The pairs of both kinds, with their `kind`."""
    tables = {"helpful": HELPFUL_PAIRS, "safety": SAFETY_PAIRS}
    frames = [
        read_table(DATA / f"{kind}_pairs.parquet", schema).assign(kind=kind)
        for kind, schema in tables.items()
    ]
    return pd.concat(frames, ignore_index=True)


def drawn_of(pairs: pd.DataFrame, split: str, most: int | None, seed: int) -> pd.DataFrame:
    """The pairs of a split, at most `most` of them (None: all), drawn at random."""
    pairs = pairs[pairs["split"] == split]
    if most is not None and len(pairs) > most:
        pairs = pairs.sample(most, random_state=seed).sort_index()
    return pairs.reset_index(drop=True)


def score_pairs(pairs: pd.DataFrame, scorers: Scorers) -> pd.DataFrame:
    """The pairs with logp_ref, reward and cost of both answers."""
    prompts = encode_prompts(scorers.tokenizer, pairs["prompt"])
    for side in ("chosen", "rejected"):
        answers = encode_answers(scorers.tokenizer, pairs[side])
        pairs[f"logp_ref_{side}"] = scorers.log_probabilities(scorers.reference, prompts, answers)
        for score, values in scorers.scores(pairs["prompt"], pairs[side]).items():
            pairs[f"{score}_{side}"] = values
    return pairs


def support_rows(pairs: pd.DataFrame, scorers: Scorers) -> pd.DataFrame:
    """Length and logp_ref of both answers of each pair: schema SUPPORT."""
    prompts = encode_prompts(scorers.tokenizer, [*pairs["prompt"], *pairs["prompt"]])
    answers = encode_answers(scorers.tokenizer, [*pairs["chosen"], *pairs["rejected"]])
    logp = scorers.log_probabilities(scorers.reference, prompts, answers)
    return pd.DataFrame({"length": list(map(len, answers)), "logp_ref": logp})


def enumerate_world(prompts: pd.DataFrame, scorers: Scorers) -> pd.DataFrame:
    """Every grammatical answer with its truth and logp_ref; empty outside the world."""
    rows = enumerate_answers(prompts)
    if rows.empty:
        return rows
    encoded = encode_prompts(scorers.tokenizer, rows["prompt"])
    answers = encode_answers(scorers.tokenizer, rows["response"])
    return rows.assign(logp_ref=scorers.log_probabilities(scorers.reference, encoded, answers))


if __name__ == "__main__":
    execute(main, ScoreParams)
