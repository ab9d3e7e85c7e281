"""A folder in which the stages on preferences can run: tiny models of different weights, eight
pairs of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import write_json, write_parquet
from dualign.core.schema import HELPFUL_PAIRS, SAFETY_PAIRS, SUPPORT, pair_id, prompt_id, user
from dualign.data import world
from dualign.lm.models import build_scratch, load_scorer_backbone, save, train_tokenizer
from dualign.params.base import Resources
from dualign.scoring.calibration import Calibration, Platt
from dualign.scoring.scorers import Scorer
from tests.tiny import TINY, on_cpu
from tests.written import held_out, solved

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("sft", "reward_dpo/helpful", "safety_dpo/alone")
#: Flags of chosen and rejected answer: every combination, and more safe answers than unsafe ones.
FLAGS = [
    (True, True),
    (True, False),
    (False, True),
    (False, False),
    (True, True),
    (True, True),
    (True, False),
]


def pairs_of(label: str, count: int, seed: int, sharpness: float = 4.0) -> list[dict[str, Any]]:
    """Pairs of the world with flags by the label of its annotators, every other one held out."""
    found = []
    for i, row in enumerate(world.pku_rows(count, seed, sharpness)):
        prompt = user(row["prompt"])
        winner = row[label]
        chosen = row[f"response_{winner}"]
        rejected = row[f"response_{1 - winner}"]
        found.append(
            {
                "pair_id": pair_id(prompt, chosen, rejected),
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "source": "world",
                "split": ("train", "heldout")[i % 2],
                "chosen_is_safe": row[f"is_response_{winner}_safe"],
                "rejected_is_safe": row[f"is_response_{1 - winner}_safe"],
            }
        )
    return found


def rows(label: str) -> list[dict[str, Any]]:
    """Seven pairs with `FLAGS` and one without; one more row is held out."""
    found = pairs_of(label, 9, seed=1, sharpness=1.0)
    for row, flags in zip(found, [*FLAGS, *[(None, None)] * 2], strict=True):
        row["chosen_is_safe"], row["rejected_is_safe"] = flags
        row["split"] = "train"
    found[-1]["split"] = "heldout"
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([row["chosen"] for row in rows("better_response_id")], 300)


@pytest.fixture
def workspace(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The working directory, with all that the stages read."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(POLICIES):
        save(build_scratch(TINY, tokenizer, seed), tokenizer, tmp_path / "models" / name)
    write_parquet(
        tmp_path / "data/prepared/helpful_pairs.parquet", rows("better_response_id"), HELPFUL_PAIRS
    )
    write_parquet(
        tmp_path / "data/prepared/safety_pairs.parquet", rows("safer_response_id"), SAFETY_PAIRS
    )
    write_json(tmp_path / "data/dual/dual.json", solved())
    write_parquet(tmp_path / "data/scored/support.parquet", held_out(), SUPPORT)
    return tmp_path


def save_scorers(
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources,
    calibration: Calibration = Platt(1.0, 0.0),  # noqa: B008 (frozen)
    names: Sequence[str] = ("reward_model", "cost_model"),
) -> None:
    """Scorers of random heads on `models/sft`, beside it."""
    for name in names:
        model = load_scorer_backbone("models/sft", tokenizer, resources)
        torch.nn.init.normal_(model.score.weight, std=0.5)
        Scorer(model, tokenizer, calibration).save(Path("models") / name)


@pytest.fixture
def resources() -> Resources:
    return on_cpu(micro_batch_size=None, log_steps=1)
