"""Four tiny stages in one process: python -m tests.lm.seeded_runs FOLDER, which holds what they
read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from dualign.params.base import LoraParams
from dualign.params.loading import load, load_resources
from dualign.params.models import SftParams
from dualign.params.training import RewardDpoParams, SafetyDpoParams
from dualign.stage import Run
from stages import reward_dpo, safety_dpo, sft

ROOT = Path(__file__).resolve().parents[2]
LORA = LoraParams(rank=4, alpha=8.0, dropout=0.1, target_modules="all-linear", quantise=None)
STEPS = {"batch_size": 4, "max_steps": 3, "max_length": 128, "learning_rate": 2e-3, "warmup": 0.0}


def run_of(cls: Any, item: str | None, **changes: Any) -> Run[Any]:
    """A run of a stage for three steps, with these changes of its section."""
    params = load(cls, ROOT / "params.yaml")
    training = params.training.model_copy(update=STEPS)
    resources = load_resources(ROOT / "params.yaml").model_copy(
        update={"device": "cpu", "precision": "fp32"}
    )
    return Run(
        cls.section, item, params.model_copy(update={"training": training, **changes}), resources
    )


def main(folder: Path) -> None:
    """The models go to models/..., those of sft to models/lora and models/grown first."""
    torch.set_num_threads(1)
    os.chdir(folder)
    for name, lora in (("lora", LORA), ("grown", LORA.model_copy(update={"rank": 0}))):
        sft.main(run_of(SftParams, None, base=f"base/{name}", lora=lora))
        Path("models/sft").rename(f"models/{name}")
    Path("models/sft").symlink_to("lora")
    reward_dpo.main(run_of(RewardDpoParams, "helpful", lora=LORA))
    safety_dpo.main(run_of(SafetyDpoParams, "alone", lora=LORA))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
