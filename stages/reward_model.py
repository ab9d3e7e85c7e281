"""reward_model: pi_ref or another backbone, and helpful pairs -> models/reward_model.

    python -m stages.reward_model

Bradley-Terry on the training pairs; its zero is set so that held-out answers average 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dualign.core.artifacts import replacing
from dualign.core.params import RewardModelParams
from dualign.core.schema import HELPFUL_PAIRS, read_table
from dualign.core.stage import Run, execute, finished
from dualign.lm.models import load_scorer_backbone, load_tokenizer, merged, with_lora
from dualign.scoring.calibration import Platt, expected_calibration_error, sigmoid
from dualign.scoring.scorers import Scorer, conversations
from dualign.training.run import Job
from dualign.training.scorer import ScoredPair, train_scorer

PAIRS = Path("data/prepared/helpful_pairs.parquet")
REFERENCE = Path("models/sft")
OUT = Path("models/reward_model")


def main(run: Run[RewardModelParams]) -> None:
    """Run the stage."""
    params = run.params
    pairs = read_table(PAIRS, HELPFUL_PAIRS)
    train, heldout = (pairs[pairs["split"] == split] for split in ("train", "heldout"))
    backbone = str(REFERENCE) if params.backbone == "sft" else params.backbone
    tokenizer = load_tokenizer(backbone)
    whole = params.lora.rank == 0
    model = load_scorer_backbone(backbone, tokenizer, run.resources, params.seed, trained=whole)
    model = with_lora(model, params.lora, params.seed, head=True)
    high, low = (conversations(tokenizer, train["prompt"], train[side]) for side in ("chosen", "rejected"))
    scratch = run.scratch(PAIRS, REFERENCE)
    job = Job(params.training, run.resources, scratch, params.seed)
    rows = [ScoredPair(a, b) for a, b in zip(high, low, strict=True)]
    metrics = train_scorer(model, tokenizer, rows, job, regularisation=params.score_regularisation)

    scorer = Scorer(merged(model), tokenizer, Platt())
    chosen, rejected = (
        scorer.score(heldout["prompt"], heldout[side], batch_size=run.resources.scoring_batch_size)
        for side in ("chosen", "rejected")
    )
    scorer = scorer.calibrated(Platt(1.0, -float(np.mean([chosen, rejected]))))
    with replacing(OUT) as folder:
        scorer.save(folder)
    confident = sigmoid(np.abs(chosen - rejected))
    run.metrics(
        {
            **metrics,
            "pairs": {"train": len(train), "heldout": len(heldout)},
            "accuracy": float((chosen > rejected).mean()),
            "ece": expected_calibration_error(confident, chosen > rejected),
            "mean_gap": float((chosen - rejected).mean()),
        }
    )
    finished(scratch)


if __name__ == "__main__":
    execute(main, RewardModelParams)
