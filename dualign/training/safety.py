"""DPO on safety preferences at a fixed multiplier: what `safety_dpo` and `safety_path` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dualign.core.records import SafetyMetrics, as_row
from dualign.lm.models import load_policy, load_tokenizer
from dualign.params.training import LOSS_FIELDS, SafetyParams, SafetySpec
from dualign.training.pairs import rows_within_budget, safety_training_pairs
from dualign.training.pairwise import PairLossConfig, fit_pairs
from dualign.training.run import Job


def train_at(
    lam: float,
    frame: pd.DataFrame,
    reference: Path,
    spec: SafetySpec,
    params: SafetyParams,
    job: Job,
    out: Path,
) -> dict[str, Any]:
    """Train the policy in folder `reference` on SAFETY_PAIRS at coefficient beta / `lam` to itself;
    save it in `out`.

    Returns the training's metrics, with the multiplier and the loss that a search from there takes
    over."""
    tokenizer = load_tokenizer("models/sft")
    policy = load_policy(reference, job.resources, trained=params.lora.rank == 0)
    train = rows_within_budget(frame[frame["split"] == "train"], params.training, params.seed)
    pairs = safety_training_pairs(
        train, policy, tokenizer, job.resources.scoring_batch_size, spec.loss_type
    )
    pair_loss = PairLossConfig.of(spec, params.beta / lam, params.beta)
    metrics = fit_pairs(policy, tokenizer, pairs, pair_loss, job, params.lora, out)
    told = SafetyMetrics(
        lam=lam,
        coefficient=params.beta / lam,
        reference=spec.reference,
        **spec.model_dump(include=set(LOSS_FIELDS), exclude_unset=True),
    )
    return metrics | as_row(told)
