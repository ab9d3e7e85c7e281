"""Training on r - lambda c at a fixed multiplier: `lagrangian_dpo` and `lambda_path` share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from transformers import PreTrainedTokenizerBase

from dualign.lm.models import load_policy, load_tokenizer
from dualign.math.losses import lagrangian_scale
from dualign.params.training import LagrangianParams, LagrangianSpec
from dualign.training.pairs import lagrangian_pairs, pool_pairs, pool_values, samples_of
from dualign.training.pairwise import Pair, PairLossConfig, fit_pairs
from dualign.training.run import Job


def pairs_at(
    lam: float,
    frame: pd.DataFrame,
    data: Literal["pool", "pairs"],
    spec: LagrangianSpec,
    params: LagrangianParams,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Pair]:
    """Training pairs at a multiplier, of a table of schema POOL or SCORED_PAIRS."""
    scale = lagrangian_scale(lam, spec.pair_loss.normalised)
    if data == "pairs":
        return lagrangian_pairs(frame, tokenizer, lam, scale)
    samples = samples_of(frame, tokenizer)
    return pool_pairs(
        samples, pool_values(samples, lam, params.beta), lam, params.beta, params.seed, scale
    )


def train_at(
    lam: float,
    pairs: list[Pair],
    begin: Path,
    spec: LagrangianSpec,
    params: LagrangianParams,
    job: Job,
    out: Path,
) -> dict[str, Any]:
    """Train the policy in folder `begin` on pairs at `lam` and save it in `out`.

    A learning rate or number of steps that `spec` names takes the place of the job's. Returns the
    training's metrics, with the learning rate and the pair loss that a search from there takes
    over; it counts as one of `trainings`."""
    rate = spec.learning_rate or job.training.learning_rate
    steps = spec.max_steps or job.training.max_steps
    training = job.training.model_copy(update={"learning_rate": rate, "max_steps": steps})
    pair_loss = PairLossConfig.lagrangian(spec.pair_loss, lam, params.beta)
    tokenizer = load_tokenizer(begin)
    policy = load_policy(begin, job.resources, trained=params.lora.rank == 0)
    job = replace(job, training=training)
    metrics = fit_pairs(policy, tokenizer, pairs, pair_loss, job, params.lora, out)
    taken_over = {"pair_loss": spec.pair_loss.model_dump(), "learning_rate": rate}
    return {**metrics, **taken_over, "trainings": 1}
