"""A folder in which the stages on preferences can run: tiny models of different weights, eight
pairs of each kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import write_json, write_parquet
from dualign.core.schema import HELPFUL_PAIRS, SAFETY_PAIRS, SUPPORT, pair_id, prompt_id, user
from dualign.data import world
from dualign.lm.models import build_scratch, save, train_tokenizer
from dualign.params.base import Resources
from dualign.params.loading import load_resources
from tests.tiny import TINY
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


def rows(label: str) -> list[dict[str, Any]]:
    """Seven pairs with flags and one without, by the label of the world's annotators; one more row
    is held out.
    """
    found = []
    for i, row in enumerate(world.pku_rows(9, seed=1, sharpness=1.0)):
        prompt = user(row["prompt"])
        winner = row[label]
        chosen = row[f"response_{winner}"]
        rejected = row[f"response_{1 - winner}"]
        flags = FLAGS[i] if i < len(FLAGS) else (None, None)
        found.append(
            {
                "pair_id": pair_id(prompt, chosen, rejected),
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "source": "world",
                "split": "train" if i < 8 else "heldout",
                "chosen_is_safe": flags[0],
                "rejected_is_safe": flags[1],
            }
        )
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


@pytest.fixture
def resources() -> Resources:
    update = {"device": "cpu", "precision": "fp32", "micro_batch_size": None, "log_steps": 1}
    return load_resources(ROOT / "params.yaml").model_copy(update=update)
