"""Muon against singular values, torch's own, and AdamW; runs of it are in test_training and
test_ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dualign.data import world
from dualign.lm.models import (
    build_scratch,
    load_scorer_backbone,
    save,
    train_tokenizer,
    with_lora,
)
from dualign.params.base import LoraParams
from dualign.training.muon import Muon, hidden_matrices, muon, orthogonal
from tests.tiny import TINY, on_cpu

LORA = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (3, 12, 5)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_an_orthogonal_matrix_keeps_singular_vectors(shape: tuple[int, ...], size: float) -> None:
    """Its product with U and V is diagonal; singular values of 0.01 |M| or more end near 1."""
    given = size * drawn(*shape)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    found = left.mT @ orthogonal(given) @ right.mT
    kept = torch.diagonal(found, dim1=-2, dim2=-1)
    large = values >= 0.01 * given.norm(dim=(-2, -1), keepdim=True).squeeze(-1)
    assert large.any()
    assert kept[large].min() > 0.67
    assert kept[large].max() < 1.14
    assert torch.allclose(found, torch.diag_embed(kept), atol=1e-4)


def test_a_matrix_of_zeros_takes_no_step() -> None:
    """As the gradient of an adapter's first matrix is, while its second one is zero."""
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([answer.text for answer in world.answers(world.prompts()[0])], 300)


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(drawn(*shape)) for shape in shapes]


def stepped(optimiser: torch.optim.Optimizer, weights: Sequence[Tensor], steps: int = 5) -> None:
    for step in range(steps):
        for i, weight in enumerate(weights):
            weight.grad = drawn(*weight.shape, seed=10 * step + i)
        optimiser.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_matrices_step_as_torchs_own_muon_has_it(decay: float) -> None:
    """To the rounding of bf16, in which that one computes."""
    shapes = [(6, 6), (6, 10), (10, 6), (6, 6)]
    ours = parameters(*shapes)
    theirs = parameters(*shapes)
    groups = [{"params": ours, "hidden": True, "weight_decay": decay}]
    stepped(Muon(groups, **OPTIONS), ours)
    named: dict[str, Any] = {"lr": 0.01, "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
    stepped(torch.optim.Muon(theirs, **named), theirs)
    for mine, other, start in zip(ours, theirs, parameters(*shapes), strict=True):
        assert (mine - other).norm() < 0.02 * (mine - start).norm()


def test_all_else_steps_by_adamw() -> None:
    ours = parameters((6,), (6, 10))
    theirs = parameters((6,), (6, 10))
    (matrix,) = parameters((4, 4))
    groups = [
        {"params": [matrix], "hidden": True, "weight_decay": 0.1},
        {"params": ours, "hidden": False, "weight_decay": 0.1},
    ]
    stepped(Muon(groups, **OPTIONS), [*ours, matrix])
    stepped(torch.optim.AdamW(theirs, weight_decay=0.1, **OPTIONS), theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_a_step_is_as_large_as_one_of_adamw() -> None:
    """0.2 of the learning rate in root mean square, whatever the shape (2502.16982)."""
    for shape in [(16, 16), (16, 64), (64, 16)]:
        weight = torch.nn.Parameter(torch.zeros(shape))
        stepped(
            Muon([{"params": [weight], "hidden": True, "weight_decay": 0.0}], **OPTIONS),
            [weight],
            steps=1,
        )
        # A matrix of orthonormal rows has sqrt(1 / max(m, n)) in root mean square.
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.002, rel=0.25)


def test_hidden_matrices_lie_between_embeddings_and_head(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = build_scratch(TINY, tokenizer, 0)
    names = hidden_matrices(policy)
    assert len(names) == 7 * policy.config.num_hidden_layers
    assert all("proj" in name for name in names)
    save(policy, tokenizer, tmp_path / "policy")
    scorer = load_scorer_backbone(str(tmp_path / "policy"), tokenizer, on_cpu())
    assert hidden_matrices(scorer) == {name.replace("lm_head", "score") for name in names}
    adapted = with_lora(policy, LORA, 0)
    assert isinstance(adapted, PeftModel)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained <= hidden_matrices(adapted)


def test_every_trained_weight_is_in_one_group(tokenizer: PreTrainedTokenizerBase) -> None:
    """Those that decay apart from the others, frozen ones in none."""
    policy = build_scratch(TINY, tokenizer, 0)
    policy.model.norm.requires_grad_(False)
    hidden = hidden_matrices(policy)
    built = muon(policy, hidden, 0.1, **OPTIONS)
    decays = {
        id(weight): (group["hidden"], group["weight_decay"])
        for group in built.param_groups
        for weight in group["params"]
    }
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    placed = sum(len(group["params"]) for group in built.param_groups)
    assert len(decays) == len(trained) == placed
    for name, weight in trained.items():
        assert decays[id(weight)] == ((True, 0.1) if name in hidden else (False, 0.0)), name
