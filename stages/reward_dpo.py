"""reward_dpo: pi_ref and helpful pairs -> models/reward_dpo, the helpful policy pi_r.

python -m stages.reward_dpo
"""

from __future__ import annotations

from pathlib import Path

from dualign.core.artifacts import replacing
from dualign.core.params import RewardDpoParams
from dualign.core.stage import Run, execute, finished
from dualign.data.schema import HELPFUL_PAIRS, read_table
from dualign.lm.models import load_policy, load_tokenizer, save, with_lora
from dualign.pairs import preference_pairs, visited
from dualign.training.pairwise import Inner, train_pairwise
from dualign.training.run import Job

PAIRS = Path("data/prepared/helpful_pairs.parquet")
REFERENCE = Path("models/sft")
OUT = Path("models/reward_dpo")


def main(run: Run[RewardDpoParams]) -> None:
    """Run the stage."""
    params = run.params
    frame = read_table(PAIRS, HELPFUL_PAIRS)
    tokenizer, policy = load_tokenizer(REFERENCE), load_policy(REFERENCE, run.resources)
    train = visited(frame[frame["split"] == "train"], params.training, params.seed)
    pairs = preference_pairs(train, policy, tokenizer, run.resources.scoring_batch_size)
    policy = with_lora(policy, params.lora)
    scratch = run.scratch(PAIRS, REFERENCE)
    job = Job(params.training, run.resources, scratch, params.seed)
    metrics = train_pairwise(policy, tokenizer, pairs, Inner(scale=params.beta, beta=params.beta), job)
    with replacing(OUT) as folder:
        save(policy, tokenizer, folder)
    run.metrics(metrics)
    finished(scratch)


if __name__ == "__main__":
    execute(main, RewardDpoParams)
