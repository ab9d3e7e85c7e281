"""reward_dpo RUN: a reference policy and helpful pairs -> models/reward_dpo/RUN.

    python -m stages.reward_dpo helpful

From pi_ref the result is pi_r, the first step of SACPO and PD-DPO; from a run on safety preferences
it is SACPO's second step in the order safety, then helpfulness. With an offset it is SafeDPO, with
a margin policy MODPO."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import DataError
from dualign.core.records import RewardMetrics, as_row
from dualign.core.schema import HELPFUL_PAIRS, read_table
from dualign.lm.models import load_policy, load_tokenizer
from dualign.params.training import LOSS_FIELDS, RewardDpoParams, RewardRun
from dualign.stage import Run, execute
from dualign.training.pair_losses import PAIR_LOSSES
from dualign.training.pairs import (
    preference_pairs,
    rows_within_budget,
    safe_first,
    with_margin,
    with_offset,
    with_reference,
)
from dualign.training.pairwise import Pair, PairLossConfig, fit_pairs
from dualign.training.run import Job

PAIRS = Path("data/prepared/helpful_pairs.parquet")
MODELS = Path("models")
OUT = Path("models/reward_dpo")


def main(run: Run[RewardDpoParams]) -> None:
    """Run the stage."""
    params = run.params
    item, spec = run.pick(params.runs, "reward_dpo.runs")
    tokenizer = load_tokenizer("models/sft")
    policy = load_policy(MODELS / spec.reference, run.resources, trained=params.lora.rank == 0)
    pairs = training_pairs(run, spec, policy, tokenizer)
    scratch = run.scratch(
        PAIRS, *sorted({MODELS / name for name in ("sft", spec.reference, spec.margin)})
    )
    job = Job(params.training, run.resources, scratch, params.seed)
    pair_loss = PairLossConfig.of(spec, params.beta, params.beta)
    metrics = fit_pairs(policy, tokenizer, pairs, pair_loss, job, params.lora, OUT / item)
    told = RewardMetrics(
        reference=spec.reference,
        safe_offset=spec.safe_offset,
        margin=spec.margin,
        **spec.model_dump(include=set(LOSS_FIELDS), exclude_unset=True),
    )
    run.trained(metrics | as_row(told), scratch)


def training_pairs(
    run: Run[RewardDpoParams],
    spec: RewardRun,
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Pair]:
    """A run's helpful pairs; SafeDPO's offset and MODPO's margin are in reference columns."""
    params = run.params
    batch = run.resources.scoring_batch_size
    frame = read_table(PAIRS, HELPFUL_PAIRS)
    frame = frame[frame["split"] == "train"]
    if spec.safe_offset is not None:
        frame = safe_first(frame)
        if frame.empty:
            raise DataError(
                f"{PAIRS}: no pair has is-safe flags and a safe answer, which"
                f" reward_dpo.runs.{run.item}.safe_offset needs; list a source with flags under"
                " prepare.helpful, or set safe_offset to null"
            )
    train = rows_within_budget(frame, params.training, params.seed)
    mismatched = "mismatched_ids" in PAIR_LOSSES[spec.loss_type].columns
    pairs = preference_pairs(train, policy, tokenizer, batch, mismatched=mismatched)
    if spec.margin != "sft":
        margin, base = (
            (
                pairs
                if name == spec.reference
                else with_reference(
                    pairs, load_policy(MODELS / name, run.resources), tokenizer, batch
                )
            )
            for name in (spec.margin, "sft")
        )
        pairs = with_margin(pairs, margin, base, spec.margin_weight)
    if spec.safe_offset is not None:
        pairs = with_offset(pairs, train, spec.safe_offset, params.beta)
    return pairs


if __name__ == "__main__":
    execute(main, RewardDpoParams)
