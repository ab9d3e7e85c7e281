"""A mixture draws a component for each answer, and its log-probability is that of whole answers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.errors import ModelError
from dualign.core.schema import user
from dualign.lm.mixture import Mixture, mixture_log_probability, policy_at, write_mixture
from dualign.lm.models import build_scratch, save
from dualign.lm.sampling import log_probabilities, sample
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.base import Resources
from tests.tiny import TINY

SCRATCH = TINY.model_copy(update={"intermediate_size": 24, "context": 64})
QUESTIONS = [
    "How do I cook the rice at home?",
    "Why?",
    "How do I poison the pond with my kids, and then the lawn?",
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return encode_prompts(tokenizer, [user(question) for question in QUESTIONS])


@pytest.fixture(scope="module")
def parts(tokenizer: PreTrainedTokenizerBase) -> list[PreTrainedModel]:
    """Three policies, far from each other."""
    models = [build_scratch(SCRATCH, tokenizer, seed) for seed in range(3)]
    with torch.no_grad():
        for model in models:
            model.lm_head.weight.mul_(25)
    return models


@pytest.fixture(scope="module")
def folder(
    parts: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    for k, model in enumerate(parts):
        save(model, tokenizer, root / f"policy-{k}")
    write_mixture([root / f"policy-{k}" for k in range(3)], [0.5, 1.0, 1.5], root / "mixed")
    content = json.loads((root / "mixed/mixture.json").read_text())
    assert content["weights"] == pytest.approx([1 / 3] * 3) and content["lambdas"] == [
        0.5,
        1.0,
        1.5,
    ]
    (root / "mixed/mixture.json").write_text(json.dumps(content | {"weights": [0.5, 0.3, 0.2]}))
    return root / "mixed"


def test_log_probability_by_hand() -> None:
    parts = torch.tensor([[math.log(0.2), -1000.0], [math.log(0.6), -1001.0]], dtype=torch.float64)
    found = mixture_log_probability(parts, [0.25, 0.75])
    assert found[0].item() == pytest.approx(math.log(0.25 * 0.2 + 0.75 * 0.6))
    assert found[1].item() == pytest.approx(
        -1000 + math.log(0.25 + 0.75 * math.exp(-1))
    )  # far below exp's reach


def test_a_folder_is_what_lies_in_it(folder: Path, resources: Resources) -> None:
    assert isinstance(policy_at(folder, resources), Mixture)
    assert isinstance(policy_at(folder / "component-1", resources), torch.nn.Module)


def test_log_probabilities_are_those_of_whole_answers(
    folder: Path,
    parts: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    resources: Resources,
) -> None:
    answers = encode_answers(
        tokenizer, ["Stir it.", "You can warm it on low heat, then taste it.", "No."]
    )
    each = torch.stack(
        [log_probabilities(m, tokenizer, prompts, answers, batch_size=2) for m in parts]
    )
    expected = (
        (torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).unsqueeze(1) * each.exp()).sum(0).log()
    )
    found = log_probabilities(
        policy_at(folder, resources), tokenizer, prompts, answers, batch_size=2
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_answers_follow_the_mixtures_distribution(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], resources: Resources
) -> None:
    """Two tokens: a mixture of next-token distributions would agree on the first one only."""
    mixture = policy_at(folder, resources)
    draws = 4000
    drawn = sample(
        mixture, tokenizer, [prompts[1]], count=draws, max_new_tokens=2, batch_size=draws, seed=3
    )
    counts = Counter(tuple(one.tokens) for one in drawn)
    seen = [list(tokens) for tokens, count in counts.items() if count >= 8]
    assert len(seen) > 20
    logp = log_probabilities(mixture, tokenizer, [prompts[1]] * len(seen), seen, batch_size=64)
    expected = (logp.exp() * draws).tolist()
    observed = [counts[tuple(tokens)] for tokens in seen]
    assert sum(expected) == pytest.approx(sum(observed), rel=0.05)
    often = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 20]
    assert sum((o - e) ** 2 / e for o, e in often) / len(often) < 1.6
    one = [
        log_probabilities(mixture.component(0), tokenizer, [prompts[1]], [seen[0]], batch_size=1)
        .exp()
        .item()
    ]
    assert one[0] * draws != pytest.approx(
        observed[0], rel=0.1
    )  # no single component explains the counts


def test_the_same_seed_gives_the_same_answers_in_order(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], resources: Resources
) -> None:
    mixture = policy_at(folder, resources)

    def draw(seed: int) -> list[tuple[int, list[int]]]:
        drawn = sample(
            mixture, tokenizer, prompts, count=3, max_new_tokens=6, batch_size=4, seed=seed
        )
        return [(one.prompt, one.tokens) for one in drawn]

    assert draw(5) == draw(5) != draw(6)
    assert [prompt for prompt, _ in draw(5)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_component_is_drawn_by_weight_and_whatever_the_answer_says(
    folder: Path, resources: Resources
) -> None:
    counts = Counter(Mixture.load(folder, resources).draw(20_000, seed=1))
    assert [counts[k] / 20_000 for k in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weights": [0.5, 0.5]}, "no weights and components"),
        ({"weights": [0.5, 0.5], "components": ["component-0"]}, "one for each component"),
        ({"weights": [0.5, 0.4], "components": ["component-0", "component-1"]}, "sum to 1"),
        (
            {"weights": [1.5, -0.5], "components": ["component-0", "component-1"]},
            "must be positive",
        ),
        ({"weights": [], "components": []}, "must be positive"),
        ([1, 2], "no weights and components"),
        ({"weights": [float("nan")], "components": ["component-0"]}, "sum to 1"),
        (
            {"weights": [1.0], "components": ["../component-0"]},
            "component '../component-0' is no folder beside it",
        ),
        ({"weights": [1.0], "components": ["/etc"]}, "component '/etc' is no folder"),
        ({"weights": [1.0], "components": ["."]}, "is no folder"),
        ({"weights": [1.0], "components": ["a\nb"]}, r"component 'a\\nb' is no folder"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, resources: Resources, content: object, says: str
) -> None:
    (tmp_path / "mixture.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"mixture\.json: .*{says}"):
        policy_at(tmp_path, resources)


def test_a_missing_component_is_named(tmp_path: Path, resources: Resources) -> None:
    content = {"weights": [1.0], "components": ["gone"]}
    (tmp_path / "mixture.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="gone"):
        policy_at(tmp_path, resources).component(0)  # type: ignore[union-attr]
