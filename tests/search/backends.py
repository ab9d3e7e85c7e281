"""What tests of searches on models share: tiny models, backends on them, looks at policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import write_parquet
from dualign.core.schema import (
    HELPFUL_PAIRS,
    POOL,
    SAFETY_PAIRS,
    SUPPORT,
    prompt_id,
    read_table,
    user,
)
from dualign.data import world
from dualign.evaluation.rollout import Scorers, roll_out
from dualign.evaluation.stats import Measurement
from dualign.lm.models import (
    build_scratch,
    load_policy,
    load_scorer_backbone,
    load_tokenizer,
    save,
    train_tokenizer,
)
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.methods import METHODS, Plan
from dualign.params.base import PessimismParams, Resources
from dualign.params.search import DualSearchParams
from dualign.params.training import PairLossParams
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.search.backend import ModelBackend
from dualign.search.journal import Step
from dualign.search.task import Inputs, PairLosses, SearchTask
from tests.tiny import TINY

SCRATCH = TINY.model_copy(update={"intermediate_size": 24})


PROMPTS = pd.DataFrame(
    [
        {"prompt_id": prompt_id(user(q)), "prompt": user(q), "source": "world"}
        for q in world.prompts()[::700]
    ]
)


PESSIMISTIC = PessimismParams(share=0.4, reward=2.0, cost=0.0)


def scorer(folder: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources) -> Any:
    model = load_scorer_backbone(str(folder), tokenizer, resources)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


def write_pairs(path: Path, label: str, schema: pa.Schema) -> None:
    rows = []
    for i, row in enumerate(world.pku_rows(12, seed=1, sharpness=1.0)):
        chosen = row[label]
        rows.append(
            {
                "pair_id": str(i),
                "prompt_id": prompt_id(user(row["prompt"])),
                "prompt": user(row["prompt"]),
                "chosen": row[f"response_{chosen}"],
                "rejected": row[f"response_{1 - chosen}"],
                "chosen_is_safe": None,
                "rejected_is_safe": None,
                "source": "world",
                "split": "train",
            }
        )
    write_parquet(path, rows, schema)


def bench_of(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path, **options: Any
) -> ModelBackend:
    """PD-DPO's bench with some options changed."""
    method = replace(METHODS["pd_dpo"], **options)
    plan = Plan("row", method, "safety_dpo/one", "reward_dpo/helpful")
    return ModelBackend(SearchTask(plan, params, resources, PROMPTS, scratch, inputs))


def ours(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path
) -> ModelBackend:
    """Our bench on a merge of two policies, any two."""
    plan = Plan(
        "row", replace(METHODS["dualign"], rule="merge"), "safety_dpo/one", "reward_dpo/helpful"
    )
    pair_loss = PairLossParams(labels="soft", normalised=False, anchor=0.3, nll=0.0)
    return ModelBackend(
        SearchTask(plan, params, resources, PROMPTS, scratch, inputs, PairLosses(pair_loss))
    )


def pool_logp(folder: Path | str, resources: Resources, inputs: Inputs) -> np.ndarray:
    """Log-probabilities of the pool's answers under the policy in a folder, [prompts, samples]."""
    pool = read_table(inputs.scored / "pool.parquet", POOL)
    tokenizer = load_tokenizer(inputs.models / "sft")
    prompts, tokens = (
        encode_prompts(tokenizer, pool["prompt"].tolist()),
        [list(ids) for ids in pool["tokens"]],
    )
    logp = log_probabilities(
        load_policy(folder, resources), tokenizer, prompts, tokens, batch_size=9
    )
    return logp.numpy().reshape(pool["prompt_id"].nunique(), -1)


def step(number: int, lam: float, policy: Path) -> Step:
    return Step(
        number, lam, None, str(policy), False, Measurement(0.0, 0.1, 0.0, 0.1, 0.0, 0.5, 0.5, 10)
    )


def distance(first: str, second: Path) -> float:
    left, right = (load_file(Path(folder) / "model.safetensors") for folder in (first, second))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


class Killed(Exception):
    """The machine went away."""


def written_inputs(models: Path, resources: Resources) -> Inputs:
    """A reference, two policies, a reward and a cost model, all random, and some safety pairs."""
    tokenizer = train_tokenizer([answer.text for answer in world.answers(world.prompts()[0])], 300)
    for seed, name in enumerate(("sft", "reward_dpo/helpful", "safety_dpo/one")):
        policy = build_scratch(SCRATCH, tokenizer, seed)
        with torch.no_grad():
            policy.lm_head.weight.mul_(20)
        save(policy, tokenizer, models / name)
    for name in ("reward_model", "cost_model"):
        Scorer(scorer(models / "sft", tokenizer, resources), tokenizer, Platt(1.0, 0.5)).save(
            models / name
        )
    write_pairs(models / "prepared/safety_pairs.parquet", "safer_response_id", SAFETY_PAIRS)
    write_pairs(models / "prepared/helpful_pairs.parquet", "better_response_id", HELPFUL_PAIRS)
    scorers = Scorers.load(resources, models)
    pool = roll_out(scorers.reference, PROMPTS, scorers, count=3, max_new_tokens=8, seed=5)
    write_parquet(models / "scored/pool.parquet", pool, POOL)
    known = pool[pool["sample"] < 2][["length", "logp_ref"]]
    write_parquet(models / "scored/support.parquet", known, SUPPORT)
    return Inputs(models=models, prepared=models / "prepared", scored=models / "scored")
