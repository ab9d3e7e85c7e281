"""The losses against hand-computed numbers, and their minimisers over all tabular policies of a finite world."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dualign import losses

BETA, LAM = 0.7, 1.3


class World:
    """Three prompts, five answers each: log pi_ref, r and c; every expectation is a sum."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(3, 5, generator=generator, dtype=torch.float64)

        self.log_ref = draw().log_softmax(1)
        self.reward = draw()
        self.cost = 0.6 * self.reward + draw()  # helpful answers tend to be harmful
        self.policies = [draw().log_softmax(1) for _ in range(20)]

    def tilt(self, base: Tensor, score: Tensor, beta: float) -> Tensor:
        """log of the policy proportional to base * exp(score / beta)."""
        return (base + score / beta).log_softmax(1)

    @property
    def tilted(self) -> Tensor:
        """log pi_lambda."""
        return self.tilt(self.log_ref, self.reward - LAM * self.cost, BETA)

    @property
    def helpful(self) -> Tensor:
        """log pi_r, the exact result of SACPO's first step."""
        return self.tilt(self.log_ref, self.reward, BETA)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def gaps(values: Tensor) -> Tensor:
    """Delta f of all ordered pairs of answers to a prompt; shape [prompts, first, second]."""
    return values[:, :, None] - values[:, None, :]


def pair_logit(policy: Tensor, reference: Tensor, scale: float) -> Tensor:
    """`pairwise_logit` of all ordered pairs."""
    first, second = (lambda f: f[:, :, None].expand(-1, -1, 5)), (lambda f: f[:, None, :].expand(-1, 5, -1))
    return losses.pairwise_logit(first(policy), second(policy), first(reference), second(reference), scale)


def minimiser(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """argmin over all tables of log-probabilities, whose level is free; rows need not sum to one."""
    table = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [table],
        max_iter=5000,
        tolerance_grad=1e-12,
        tolerance_change=1e-18,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(table)
        value.backward()
        return value

    search.step(closure)
    return table.detach()


def largest_gap(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.log_softmax(1).exp() - log_q.exp()).abs().max())


# --- by hand ----------------------------------------------------------------------------------------------------------


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_pairwise_logit_by_hand() -> None:
    # 0.5 * ((-3 + 4) - (-6 + 5.5)) = 0.75
    assert losses.pairwise_logit(tensor(-3), tensor(-6), tensor(-4), tensor(-5.5), 0.5).item() == 0.75


def test_soft_label_loss_by_hand() -> None:
    logit = tensor(0.0, math.log(3), math.log(3), -2.0)
    expected = [math.log(2), -0.25 * math.log(0.75) - 0.75 * math.log(0.25), math.log(4 / 3), math.log1p(math.exp(2))]
    assert losses.soft_label_loss(logit, tensor(0.9, 0.25, 1.0, 1.0)).tolist() == pytest.approx(expected, abs=1e-15)


def test_lagrangian_label_by_hand() -> None:
    labels = losses.lagrangian_label(tensor(1, 1, 2), tensor(2, 0, -1), 0.5)
    assert labels.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2.5))])


def test_anchor_loss_by_hand() -> None:
    assert losses.anchor_loss(tensor(2, -1), tensor(3, -0.5), 0.5).tolist() == [4.0, 0.0]


def test_weighted_nll_by_hand() -> None:
    assert losses.weighted_nll(tensor(-2, -3), tensor(0.5, 0)).tolist() == [1.0, 0.0]


def test_sign_loss_wants_unsafe_answers_above_zero_and_safe_ones_below() -> None:
    loss = losses.sign_loss(tensor(2, 2, -2), torch.tensor([True, False, False]))
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert loss.tolist() == pytest.approx([right, wrong, right])


@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_extreme_logits_keep_loss_and_gradient_finite(logit: float, label: float) -> None:
    x = torch.tensor([logit], requires_grad=True)
    loss = losses.soft_label_loss(x, torch.tensor([label])).sum()
    loss.backward()
    assert torch.isfinite(loss) and x.grad is not None and torch.isfinite(x.grad).all()
    assert abs(x.grad.item()) <= 1


def test_an_untrained_policy_has_logit_zero_whatever_its_reference_says(world: World) -> None:
    for policy in world.policies:
        assert not pair_logit(policy, policy, 3.0).any()


# --- what the minimisers are ------------------------------------------------------------------------------------------


def test_soft_labels_lead_to_the_tilted_policy(world: World) -> None:
    labels = losses.lagrangian_label(gaps(world.reward), gaps(world.cost), LAM)
    fitted = minimiser(lambda t: losses.soft_label_loss(pair_logit(t, world.log_ref, BETA), labels).sum())
    assert largest_gap(fitted, world.tilted) < 1e-5


def test_normalised_labels_need_the_coefficient_divided_too(world: World) -> None:
    """Safe RLHF's 1 / (1 + lambda) solves another problem, unless beta is divided as well (methods: C-DPO)."""
    share = 1 + LAM
    labels = losses.lagrangian_label(gaps(world.reward) / share, gaps(world.cost) / share, LAM)

    def fit(scale: float) -> Tensor:
        return minimiser(lambda t: losses.soft_label_loss(pair_logit(t, world.log_ref, scale), labels).sum())

    weaker = world.tilt(world.log_ref, world.reward - LAM * world.cost, BETA * share)
    assert largest_gap(fit(BETA), weaker) < 1e-5
    assert largest_gap(fit(BETA / share), world.tilted) < 1e-5


def test_the_anchor_leads_to_the_tilted_policy_and_its_level(world: World) -> None:
    """For any distribution of answers, and without a partition function: the rows sum to one by themselves."""
    tilt = world.reward - LAM * world.cost
    value = BETA * (world.log_ref + tilt / BETA).logsumexp(1, keepdim=True)
    drawn = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.05
    fitted = minimiser(lambda t: (drawn * losses.anchor_loss(t - world.log_ref, tilt - value, BETA)).sum())
    assert torch.allclose(fitted, world.tilted, atol=1e-6)
    assert torch.allclose(fitted.exp().sum(1), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_labels_and_anchor_have_one_minimiser(world: World) -> None:
    tilt = world.reward - LAM * world.cost
    value = BETA * (world.log_ref + tilt / BETA).logsumexp(1, keepdim=True)
    labels = losses.lagrangian_label(gaps(world.reward), gaps(world.cost), LAM)

    def loss(t: Tensor) -> Tensor:
        pairs = losses.soft_label_loss(pair_logit(t, world.log_ref, BETA), labels).sum()
        return pairs + 0.3 * losses.anchor_loss(t - world.log_ref, tilt - value, BETA).sum()

    assert torch.allclose(minimiser(loss), world.tilted, atol=1e-5)


def test_weighted_nll_of_the_references_answers_leads_to_the_tilted_policy(world: World) -> None:
    """w = pi_lambda / pi_ref makes the mean over pi_ref's answers the cross-entropy to pi_lambda."""
    share, weight = world.log_ref.exp(), (world.tilted - world.log_ref).exp()
    fitted = minimiser(lambda t: (share * losses.weighted_nll(t.log_softmax(1), weight)).sum())
    assert largest_gap(fitted, world.tilted) < 1e-5


def test_bernoulli_labels_have_the_soft_loss_as_expectation(world: World) -> None:
    labels = losses.lagrangian_label(gaps(world.reward), gaps(world.cost), LAM)
    one, zero = torch.ones_like(labels), torch.zeros_like(labels)
    for policy in world.policies:
        logit = pair_logit(policy, world.log_ref, BETA)
        expected = labels * losses.soft_label_loss(logit, one) + (1 - labels) * losses.soft_label_loss(logit, zero)
        assert torch.allclose(losses.soft_label_loss(logit, labels), expected, atol=1e-12)


def test_hard_labels_have_no_finite_minimiser() -> None:
    logit = torch.tensor([0.0, 5.0, 30.0], dtype=torch.float64, requires_grad=True)
    losses.soft_label_loss(logit, torch.ones(3, dtype=torch.float64)).sum().backward()
    assert logit.grad is not None and (logit.grad < 0).all()


def safer(world: World) -> Tensor:
    """P(first is the safer one)."""
    return torch.sigmoid(gaps(-world.cost))


def test_sacpo_step_two_leads_to_the_tilted_policy(world: World) -> None:
    fitted = minimiser(lambda t: losses.soft_label_loss(pair_logit(t, world.helpful, BETA / LAM), safer(world)).sum())
    assert largest_gap(fitted, world.tilted) < 1e-5


def test_steps_may_be_swapped(world: World) -> None:
    """Safety first with beta / lambda, then helpfulness with beta."""
    first = minimiser(lambda t: losses.soft_label_loss(pair_logit(t, world.log_ref, BETA / LAM), safer(world)).sum())
    second = minimiser(
        lambda t: losses.soft_label_loss(
            pair_logit(t, first.log_softmax(1), BETA), torch.sigmoid(gaps(world.reward))
        ).sum()
    )
    assert largest_gap(second, world.tilted) < 1e-5


def test_a_reward_folded_into_the_reference_column_saves_the_first_step(world: World) -> None:
    column = world.log_ref + world.reward / BETA
    fitted = minimiser(lambda t: losses.soft_label_loss(pair_logit(t, column, BETA / LAM), safer(world)).sum())
    assert largest_gap(fitted, world.tilted) < 1e-5


# --- three papers, one loss -------------------------------------------------------------------------------------------


def pd_dpo_argument(policy: Tensor, world: World) -> Tensor:
    """What stands inside PD-DPO's sigma (2510.05703, eq. 16) for (more harmful, safer), term by term."""
    implicit = BETA * (world.helpful - world.log_ref) - BETA * (policy - world.log_ref)
    return gaps(implicit) / LAM


def test_pd_dpo_argument_is_sacpos_logit_with_the_safer_answer_first(world: World) -> None:
    for policy in world.policies:
        logit = pair_logit(policy, world.helpful, BETA / LAM)  # [safer, more harmful]
        assert torch.allclose(pd_dpo_argument(policy, world), logit.transpose(1, 2), atol=1e-12)


def test_sacpo_pd_dpo_and_modpo_have_the_same_loss_at_every_policy(world: World) -> None:
    label = safer(world)
    harmful = label.transpose(1, 2)
    w0, w1, beta = LAM / (1 + LAM), 1 / (1 + LAM), BETA / (1 + LAM)
    margin = BETA * (world.helpful - world.log_ref)
    seen = []
    for policy in world.policies:
        ours = losses.soft_label_loss(pair_logit(policy, world.helpful, BETA / LAM), label).sum()
        pd_dpo = -(harmful * torch.nn.functional.logsigmoid(pd_dpo_argument(policy, world)))
        modpo = gaps((beta * (policy - world.log_ref) - w1 * margin) / w0)
        written = -(label * torch.nn.functional.logsigmoid(modpo))
        # The papers sum over (winner, loser) once; over ordered pairs the soft loss counts every pair twice.
        assert pd_dpo.sum().item() * 2 == pytest.approx(ours.item(), rel=1e-12)
        assert written.sum().item() * 2 == pytest.approx(ours.item(), rel=1e-12)
        seen.append(ours.item())
    assert len({round(value, 6) for value in seen}) == len(world.policies)
