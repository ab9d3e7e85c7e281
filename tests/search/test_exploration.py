"""Features whatever the batch, covariances and bonuses against sums by hand, and where optimism
leads phase 2.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.schema import user
from dualign.data import world
from dualign.lm.models import build_scratch, train_tokenizer, with_lora
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.math import losses
from dualign.params.base import LoraParams
from dualign.search.exploration import bonus, features, precision, projection, spread
from tests.tiny import TINY

QUESTIONS = [world.prompts()[0], world.prompts()[3000]]
SCRATCH = TINY.model_copy(update={"layers": 2})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(QUESTIONS, 300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_scratch(SCRATCH, tokenizer, seed=0)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of many lengths, the shortest in the middle."""
    texts = [
        (question, answer.text) for question in QUESTIONS for answer in world.answers(question)[::9]
    ]
    texts.insert(3, ("", ""))
    return (
        encode_prompts(tokenizer, [user(question) for question, _ in texts]),
        encode_answers(tokenizer, [text for _, text in texts]),
    )


# --- features -------------------------------------------------------------------------------------


def test_features_are_the_mean_last_hidden_state_of_the_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[list[list[int]], list[list[int]]],
) -> None:
    found = features(model, tokenizer, *rows, batch_size=4)
    assert found.shape == (len(rows[0]), 16) and found.dtype == torch.float32
    for phi, prompt, answer in zip(found, *rows, strict=True):
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0]
        assert torch.allclose(phi, hidden[len(prompt) :].mean(0), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_do_not_change_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[list[list[int]], list[list[int]]],
    batch_size: int,
) -> None:
    expected = features(model, tokenizer, *rows, batch_size=2)
    assert (features(model, tokenizer, *rows, batch_size=batch_size) - expected).abs().max() < 1e-5


def test_an_adapter_has_features_too(
    tokenizer: PreTrainedTokenizerBase, rows: tuple[list[list[int]], list[list[int]]]
) -> None:
    plain = build_scratch(SCRATCH, tokenizer, seed=0)
    expected = features(plain, tokenizer, *rows, batch_size=4)
    lora = with_lora(
        plain,
        LoraParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None),
        0,
    )
    assert torch.allclose(features(lora, tokenizer, *rows, batch_size=4), expected, atol=1e-6)


def test_a_projection_keeps_squared_norms_on_average() -> None:
    vectors = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    ratios = torch.stack(
        [
            ((vectors @ projection(300, 20, seed)) ** 2).sum(1) / (vectors**2).sum(1)
            for seed in range(200)
        ]
    )
    assert ratios.mean().item() == pytest.approx(1, abs=0.03)
    assert ratios.std().item() == pytest.approx(math.sqrt(2 / 20), rel=0.1)
    assert torch.equal(projection(300, 20, 7), projection(300, 20, 7))
    assert not torch.equal(projection(300, 20, 7), projection(300, 20, 8))


# --- covariances and bonuses ----------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_precision_is_the_inverse_of_the_ridge_and_the_sum_over_pairs() -> None:
    differences = normal(7, 4)
    sigma = 0.3 * torch.eye(4, dtype=torch.float64)
    for delta in differences:
        sigma += torch.outer(delta, delta)
    inverse = precision(differences, 0.3)
    assert inverse.dtype == torch.float64
    assert torch.allclose(inverse @ sigma, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.equal(precision(differences[:0], 0.25), 4 * torch.eye(4, dtype=torch.float64))


def test_bonus_by_hand() -> None:
    # Sigma = diag(1 + 3^2, 1): ||(10, 0)||^2 = 100 / 10, ||(0, 2)||^2 = 4, ||(10, 2)||^2 = 14;
    # alpha = 0.5
    inverse = precision(torch.tensor([[3.0, 0.0]]), 1.0)
    values = bonus(torch.tensor([[10.0, 0.0], [0.0, 2.0], [10.0, 2.0], [0.0, 0.0]]), inverse, 0.5)
    assert values.tolist() == pytest.approx([0.5 * math.sqrt(10), 1.0, 0.5 * math.sqrt(14), 0.0])


def test_bonuses_shrink_along_the_directions_of_pairs() -> None:
    along, across = (
        torch.tensor([[1.0, 1.0, 0.0]]),
        torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]),
    )
    left = []
    for pairs in range(5):
        inverse = precision(along.repeat(pairs, 1), 0.5)
        assert torch.allclose(
            bonus(across, inverse, 1.0), across.double().norm(dim=1) / math.sqrt(0.5)
        )
        left.append(bonus(along, inverse, 1.0).item())
    assert left == pytest.approx([math.sqrt(2 / (0.5 + 2 * pairs)) for pairs in range(5)])


def test_no_pair_raises_a_bonus() -> None:
    seen, answers = normal(30, 6), normal(50, 6, seed=1)
    values = torch.stack([bonus(answers, precision(seen[:n], 0.1), 2.0) for n in range(31)])
    assert (values.diff(dim=0) < 1e-12).all()
    assert torch.allclose(values[0], 2 * answers.norm(dim=1) / math.sqrt(0.1))


def test_the_order_and_the_sides_of_pairs_do_not_matter() -> None:
    seen, answers = normal(30, 6), normal(50, 6, seed=1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    flipped = seen[order] * torch.tensor([1.0, -1.0]).repeat(15)[:, None]
    assert torch.allclose(
        bonus(answers, precision(flipped, 0.1), 1.0), bonus(answers, precision(seen, 0.1), 1.0)
    )


def test_a_covariance_of_barely_different_answers_can_be_inverted() -> None:
    """A hundred thousand pairs along almost one direction, a small ridge: fp32 would not do."""
    differences = (normal(1, 8) + 1e-4 * normal(100_000, 8, seed=1)).float()
    values = bonus(normal(20, 8, seed=2), precision(differences, 1e-6), 1.0)
    assert torch.isfinite(values).all() and (values > 0).all()


def test_the_spread_of_pairs_by_hand() -> None:
    """Differences 2 e_1 and 2 e_2 and gamma 1: Sigma = 5 I, norms 3, 1 and 2, 0 over sqrt 5."""
    chosen, rejected = (
        torch.tensor([[3.0, 0.0], [0.0, 2.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    )
    assert spread(chosen, rejected, 1.0) == pytest.approx((2 + 2) / 2 / math.sqrt(5))
    assert spread(rejected, chosen, 1.0) == spread(chosen, rejected, 1.0)


# --- optimism in phase 2 --------------------------------------------------------------------------


def test_phase_two_with_folded_bonuses_leads_to_the_optimistic_policy() -> None:
    """Bonuses of features and pairs, phase 2 by direct optimisation over all policies of six
    answers.

    The minimiser is pi_ref exp((r + b_r - lambda (c - b_c)) / beta), and an answer unlike all pairs
    gains by it."""
    beta, lam = 0.7, 1.3
    log_ref, reward, cost = normal(6, seed=5).log_softmax(0), normal(6, seed=6), normal(6, seed=7)
    reward[5] = -2.0
    phi = torch.cat(
        [0.5 * normal(6, 3, seed=8), torch.tensor([[0.0]] * 5 + [[2.0]])], 1
    )  # the last one stands apart
    delta = phi[:5].repeat(8, 1) - phi[torch.arange(40).add(1).remainder(5)]
    reward_bonus = bonus(phi, precision(delta, 0.5), 0.4)
    cost_bonus = bonus(phi, precision(delta[:7], 0.5), 0.6)
    helpful = (log_ref + reward / beta).log_softmax(0)
    column = losses.folded_reference(helpful, reward_bonus + lam * cost_bonus, beta)
    safer = torch.sigmoid(cost[None, :] - cost[:, None])  # P(row safer than column)

    table = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([table], max_iter=5000, tolerance_grad=1e-12, tolerance_change=1e-18,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        search.zero_grad()
        logit = losses.pairwise_logit(
            table[:, None], table[None, :], column[:, None], column[None, :], beta / lam
        )
        loss = losses.soft_label_loss(logit, safer).sum()
        loss.backward()
        return loss

    search.step(closure)
    fitted = table.detach().softmax(0)
    optimistic = (log_ref + (reward + reward_bonus - lam * (cost - cost_bonus)) / beta).softmax(0)
    plain = (log_ref + (reward - lam * cost) / beta).softmax(0)
    assert (fitted - optimistic).abs().max() < 1e-6
    assert fitted[5] > 1.5 * plain[5]
