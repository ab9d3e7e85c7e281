"""The stage score: tables whose columns are what reference policy and scorers say of their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.schema import (
    ENUMERATED,
    POOL,
    PROMPTS,
    SCORED_PAIRS,
    SUPPORT,
    prompt_id,
    read_table,
    user,
)
from dualign.data import world
from dualign.evaluation.stats import clustered_mean
from dualign.lm.models import load_policy
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.base import Resources
from dualign.params.loading import load
from dualign.params.models import ScoreParams
from dualign.scoring.scorers import Scorer
from dualign.stage import Run
from stages import score
from tests.stages.conftest import save_scorers

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("data/scored")
SAMPLES = 3
PAIRS = 10

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def scored(workspace: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources) -> Path:
    """The folder of the stages with scorers, four questions of the world for the pool, two of it
    and one of elsewhere to evaluate on, after a run of the stage.
    """
    save_scorers(tokenizer, resources)
    questions = world.prompts()[::700]
    for name, texts in (("pool", questions[:4]), ("eval", [*questions[4:6], "Is tea hot?"])):
        prompts = [
            {
                "prompt_id": prompt_id(user(text)),
                "prompt": user(text),
                "source": "world" if text in questions else "elsewhere",
            }
            for text in texts
        ]
        write_parquet(workspace / f"data/prepared/{name}.parquet", prompts, PROMPTS)
    run(resources)
    return workspace


def run(resources: Resources) -> None:
    update = {"samples_per_prompt": SAMPLES, "max_new_tokens": 6, "pairs": PAIRS}
    params = load(ScoreParams, ROOT / "params.yaml").model_copy(update=update)
    score.main(Run("score", None, params, resources))


def logp(
    prompts: pd.Series,
    answers: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
) -> np.ndarray:
    """The reference policy's log-probabilities, read one by one."""
    reference = load_policy("models/sft", resources)
    ids = encode_prompts(tokenizer, prompts.tolist())
    return log_probabilities(reference, tokenizer, ids, answers, batch_size=1).numpy()


def scores(name: str, rows: pd.DataFrame, answer: str, resources: Resources) -> np.ndarray:
    scorer = Scorer.load(f"models/{name}_model", resources)
    ended = rows["ended"].tolist() if "ended" in rows else None
    return scorer.score(rows["prompt"].tolist(), rows[answer].tolist(), batch_size=1, ended=ended)


def test_the_pool_has_samples_of_every_prompt_with_what_is_said_of_them(
    scored: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    pool = read_table(OUT / "pool.parquet", POOL)
    prompts = read_table("data/prepared/pool.parquet", PROMPTS)
    assert pool["prompt_id"].tolist() == np.repeat(prompts["prompt_id"], SAMPLES).tolist()
    assert pool["sample"].tolist() == [*range(SAMPLES)] * len(prompts)
    tokens = [list(map(int, ids)) for ids in pool["tokens"]]
    assert pool["length"].tolist() == list(map(len, tokens))
    expected = logp(pool["prompt"], tokens, tokenizer, resources)
    assert pool["logp_ref"].to_numpy() == pytest.approx(expected, abs=1e-4)
    told = read_json("reports/metrics/score.json")
    for name in ("reward", "cost"):
        assert pool[name].to_numpy() == pytest.approx(
            scores(name, pool, "response", resources), abs=1e-5
        )
        mean = clustered_mean(pool[name].to_numpy(), pool["prompt_id"].to_numpy())
        assert told[name] == pytest.approx(mean.as_dict())
        within = pool[name].to_numpy().reshape(4, SAMPLES).var(1).mean()  # as in dual.json
        assert told[f"{name}_within_sd"] == pytest.approx(np.sqrt(within))
    assert (told["pool"]["prompts"], told["pool"]["answers"]) == (4, 4 * SAMPLES)


def test_training_pairs_are_scored_on_both_sides_and_held_out_ones_tell_the_support(
    scored: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    pairs = read_table(OUT / "scored_pairs.parquet", SCORED_PAIRS)
    assert len(pairs) == PAIRS and set(pairs["kind"]) == {"helpful", "safety"}
    assert set(pairs["split"]) == {"train"}
    for side in ("chosen", "rejected"):
        answers = encode_answers(tokenizer, pairs[side].tolist())
        expected = logp(pairs["prompt"], answers, tokenizer, resources)
        assert pairs[f"logp_ref_{side}"].to_numpy() == pytest.approx(expected, abs=1e-4)
        for name in ("reward", "cost"):
            found = pairs[f"{name}_{side}"].to_numpy()
            assert found == pytest.approx(scores(name, pairs, side, resources), abs=1e-5)
    support = read_table(OUT / "support.parquet", SUPPORT)
    held = score.preference_pairs().query("split == 'heldout'")
    answers = encode_answers(tokenizer, [*held["chosen"], *held["rejected"]])
    assert len(held) == 2 and support["length"].tolist() == list(map(len, answers))
    expected = logp(pd.concat([held["prompt"]] * 2), answers, tokenizer, resources)
    assert support["logp_ref"].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_answers_are_enumerated_for_questions_of_the_world_alone(
    scored: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    rows = read_table(OUT / "enumerated.parquet", ENUMERATED)
    asked = rows["prompt"].map(lambda turns: turns[0]["content"])
    assert rows["response"].tolist() == [
        answer.text for text in dict.fromkeys(asked) for answer in world.answers(text)
    ]
    assert asked.nunique() == 2 and "Is tea hot?" not in set(asked)
    answers = encode_answers(tokenizer, rows["response"].tolist())
    expected = logp(rows["prompt"], answers, tokenizer, resources)
    assert rows["logp_ref"].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_the_same_params_give_the_same_bytes(scored: Path, resources: Resources) -> None:
    files = sorted(OUT.iterdir())
    before = [file.read_bytes() for file in files]
    run(resources)
    assert len(files) == 4 and [file.read_bytes() for file in files] == before


def test_pairs_are_drawn_at_random_and_stay_in_order() -> None:
    pairs = pd.DataFrame({"split": ["train", "heldout"] * 20, "row": range(40)})
    every = score.drawn_of(pairs, "train", None, 0)
    assert every["row"].tolist() == list(range(0, 40, 2))
    one, other = (score.drawn_of(pairs, "train", 8, seed)["row"].tolist() for seed in (0, 1))
    assert len(one) == 8 and one == sorted(set(one)) and one != other
