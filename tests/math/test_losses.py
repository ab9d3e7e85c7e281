"""The losses against hand-computed numbers, and their minimisers over all tabular policies of a
finite world.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.losses import (
    huber_difference_loss,
    modpo_logit,
    safe_dpo_loss,
    squared_difference_loss,
)
from dualign.math import losses

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
    first, second = (
        (lambda f: f[:, :, None].expand(-1, -1, 5)),
        (lambda f: f[:, None, :].expand(-1, 5, -1)),
    )
    return losses.pairwise_logit(
        first(policy), second(policy), first(reference), second(reference), scale
    )


def minimiser(loss: Callable[[Tensor], Tensor], iterations: int = 5000) -> Tensor:
    """argmin over all tables of log-probabilities, whose level is free; rows need not sum to
    one.
    """
    table = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [table],
        max_iter=iterations,
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


# --- by hand --------------------------------------------------------------------------------------


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_pairwise_logit_by_hand() -> None:
    # 0.5 * ((-3 + 4) - (-6 + 5.5)) = 0.75
    assert (
        losses.pairwise_logit(tensor(-3), tensor(-6), tensor(-4), tensor(-5.5), 0.5).item() == 0.75
    )


def test_soft_label_loss_by_hand() -> None:
    logit = tensor(0.0, math.log(3), math.log(3), -2.0)
    expected = [
        math.log(2),
        -0.25 * math.log(0.75) - 0.75 * math.log(0.25),
        math.log(4 / 3),
        math.log1p(math.exp(2)),
    ]
    assert losses.soft_label_loss(logit, tensor(0.9, 0.25, 1.0, 1.0)).tolist() == pytest.approx(
        expected, abs=1e-15
    )


def test_lagrangian_label_by_hand() -> None:
    labels = losses.lagrangian_label(tensor(1, 1, 2), tensor(2, 0, -1), 0.5)
    assert labels.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2.5))])
    assert losses.lagrangian_label(tensor(2), tensor(-1), 0.5, 0.2).item() == pytest.approx(
        1 / (1 + math.exp(-0.5))
    )


def test_lagrangian_scale_by_hand() -> None:
    assert [losses.lagrangian_scale(lam, True) for lam in (0.0, 1.0, 3.0)] == [1.0, 0.5, 0.25]
    assert losses.lagrangian_scale(3.0, False) == 1.0


def test_anchor_loss_by_hand() -> None:
    assert losses.anchor_loss(tensor(2, -1), tensor(3, -0.5), 0.5).tolist() == [4.0, 0.0]


def test_weighted_nll_by_hand() -> None:
    assert losses.weighted_nll(tensor(-2, -3), tensor(0.5, 0)).tolist() == [1.0, 0.0]


def test_controlled_weight_by_hand() -> None:
    """Ratios 1, e and e^3; the last counts for 5, and for 10 beside a weight of 2."""
    weight, logp = tensor(0.5, 4, 0, 2), tensor(-2, -3, -1, -1)
    found = losses.controlled_weight(weight, logp, tensor(-2, -4, -4, -4), 0.5)
    assert found.tolist() == pytest.approx([0.0, 4 - math.e / 2, -2.5, -3.0])
    assert losses.controlled_weight(weight, logp, logp, 0.0).tolist() == weight.tolist()


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


# --- what the minimisers are ----------------------------------------------------------------------


def test_soft_labels_lead_to_the_tilted_policy(world: World) -> None:
    labels = losses.lagrangian_label(gaps(world.reward), gaps(world.cost), LAM)
    fitted = minimiser(
        lambda t: losses.soft_label_loss(pair_logit(t, world.log_ref, BETA), labels).sum()
    )
    assert largest_gap(fitted, world.tilted) < 1e-5


def test_normalised_labels_need_the_coefficient_divided_too(world: World) -> None:
    """Safe RLHF's 1 / (1 + lambda) solves another problem, unless beta is divided as well (methods:
    C-DPO).
    """
    scale = losses.lagrangian_scale(LAM, normalised=True)
    weaker = world.tilt(world.log_ref, world.reward - LAM * world.cost, BETA / scale)
    assert largest_gap(fit_normalised(world, LAM, BETA), weaker) < 1e-5
    assert largest_gap(fit_normalised(world, LAM, BETA * scale), world.tilted) < 1e-5


def fit_normalised(world: World, lam: float, coefficient: float) -> Tensor:
    """The minimiser for labels sigma((Delta r - lambda Delta c) / (1 + lambda)) and any DPO
    coefficient.
    """
    scale = losses.lagrangian_scale(lam, normalised=True)
    labels = losses.lagrangian_label(gaps(world.reward), gaps(world.cost), lam, scale)
    return minimiser(
        lambda t: losses.soft_label_loss(pair_logit(t, world.log_ref, coefficient), labels).sum()
    )


def test_normalised_labels_with_plain_beta_cannot_reach_a_strict_limit(world: World) -> None:
    """At any multiplier the cost stays above that of the tilt by -c / beta; with beta divided too
    it falls on.
    """

    def cost(log_policy: Tensor) -> float:
        return float((log_policy.log_softmax(1).exp() * world.cost).sum(1).mean())

    saturated = cost(world.tilt(world.log_ref, -world.cost, BETA))
    plain = [cost(fit_normalised(world, lam, BETA)) for lam in (1.0, 10.0, 1000.0)]
    assert plain == sorted(plain, reverse=True) and saturated < plain[-1] < saturated + 1e-2
    assert cost(fit_normalised(world, 10.0, BETA / 11)) < saturated - 0.1


def test_normalised_labels_share_their_minimiser_with_anchor_and_likelihood(world: World) -> None:
    """Both keep plain beta: at pi_lambda all three terms have gradient zero, so any weights lead
    there.
    """
    scale, tilt = losses.lagrangian_scale(LAM, normalised=True), world.reward - LAM * world.cost
    value = BETA * (world.log_ref + tilt / BETA).logsumexp(1, keepdim=True)
    labels = losses.lagrangian_label(gaps(world.reward), gaps(world.cost), LAM, scale)
    share, weight = world.log_ref.exp(), ((tilt - value) / BETA).exp()

    def loss(t: Tensor, scale: float) -> Tensor:
        policy = t.log_softmax(1)
        pairs = losses.soft_label_loss(
            pair_logit(policy, world.log_ref, BETA * scale), labels
        ).sum()
        anchor = losses.anchor_loss(policy - world.log_ref, tilt - value, BETA).sum()
        return pairs + 0.3 * anchor + 2.0 * (share * losses.weighted_nll(policy, weight)).sum()

    assert largest_gap(minimiser(lambda t: loss(t, scale)), world.tilted) < 1e-5
    assert largest_gap(minimiser(lambda t: loss(t, 1.0)), world.tilted) > 0.01


def test_the_anchor_leads_to_the_tilted_policy_and_its_level(world: World) -> None:
    """For any distribution of answers, and without a partition function: the rows sum to one by
    themselves.
    """
    tilt = world.reward - LAM * world.cost
    value = BETA * (world.log_ref + tilt / BETA).logsumexp(1, keepdim=True)
    drawn = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.05
    fitted = minimiser(
        lambda t: (drawn * losses.anchor_loss(t - world.log_ref, tilt - value, BETA)).sum()
    )
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
    """w = pi_lambda / pi_ref makes the mean over pi_ref's answers the cross-entropy to
    pi_lambda.
    """
    share, weight = world.log_ref.exp(), (world.tilted - world.log_ref).exp()
    fitted = minimiser(lambda t: (share * losses.weighted_nll(t.log_softmax(1), weight)).sum())
    assert largest_gap(fitted, world.tilted) < 1e-5


def gradients(world: World, policy: Tensor, log_drawn: Tensor, control: float) -> Tensor:
    """The gradient of each answer's likelihood term in the logits of its prompt's policy, before
    the answer is drawn: [prompts, answers, logits].
    """
    weight = (world.tilted - log_drawn).exp()
    found = []
    for answer in range(policy.shape[1]):
        logits = policy.clone().requires_grad_()
        logp = logits.log_softmax(1)
        controlled = losses.controlled_weight(weight, logp, log_drawn, control)
        losses.weighted_nll(logp, controlled)[:, answer].sum().backward()
        assert logits.grad is not None
        found.append(logits.grad)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("control", [0.3, 0.8, 1.0])
def test_a_control_variate_leaves_the_gradient_of_the_likelihood_as_it_is(
    world: World, control: float
) -> None:
    """On average over the answers of any policy that draws, where no ratio meets the bound."""
    for policy in world.policies:
        drawn = (policy + 0.3 * world.cost).log_softmax(1)
        assert (policy - drawn).max() < math.log(losses.RATIO_BOUND)
        plain, controlled = (
            (drawn.exp()[..., None] * gradients(world, policy, drawn, k)).sum(1)
            for k in (0.0, control)
        )
        assert torch.allclose(controlled, plain, atol=1e-12)
        assert plain.abs().max() > 0.01


def test_a_whole_control_variate_leaves_no_noise_at_the_minimiser(world: World) -> None:
    """Each answer's own gradient vanishes at pi_lambda, whoever draws; without it none does."""
    for drawn in (world.log_ref, world.helpful):
        assert gradients(world, world.tilted, drawn, 1.0).abs().max() < 1e-12
        assert gradients(world, world.tilted, drawn, 0.0).abs().amax(2).min() > 1e-3
        noise = [gradients(world, world.tilted, drawn, k).norm() for k in (0.0, 0.8)]
        assert noise[1] == pytest.approx(0.2 * noise[0])


def test_bernoulli_labels_have_the_soft_loss_as_expectation(world: World) -> None:
    labels = losses.lagrangian_label(gaps(world.reward), gaps(world.cost), LAM)
    one, zero = torch.ones_like(labels), torch.zeros_like(labels)
    for policy in world.policies:
        logit = pair_logit(policy, world.log_ref, BETA)
        expected = labels * losses.soft_label_loss(logit, one) + (
            1 - labels
        ) * losses.soft_label_loss(logit, zero)
        assert torch.allclose(losses.soft_label_loss(logit, labels), expected, atol=1e-12)


def test_hard_labels_have_no_finite_minimiser() -> None:
    logit = torch.tensor([0.0, 5.0, 30.0], dtype=torch.float64, requires_grad=True)
    losses.soft_label_loss(logit, torch.ones(3, dtype=torch.float64)).sum().backward()
    assert logit.grad is not None and (logit.grad < 0).all()


def safer(world: World) -> Tensor:
    """P(first is the safer one)."""
    return torch.sigmoid(gaps(-world.cost))


def test_sacpo_step_two_leads_to_the_tilted_policy(world: World) -> None:
    fitted = minimiser(
        lambda t: losses.soft_label_loss(
            pair_logit(t, world.helpful, BETA / LAM), safer(world)
        ).sum()
    )
    assert largest_gap(fitted, world.tilted) < 1e-5


def test_steps_may_be_swapped(world: World) -> None:
    """Safety first with beta / lambda, then helpfulness with beta."""
    first = minimiser(
        lambda t: losses.soft_label_loss(
            pair_logit(t, world.log_ref, BETA / LAM), safer(world)
        ).sum()
    )
    second = minimiser(
        lambda t: losses.soft_label_loss(
            pair_logit(t, first.log_softmax(1), BETA), torch.sigmoid(gaps(world.reward))
        ).sum()
    )
    assert largest_gap(second, world.tilted) < 1e-5


def test_a_reward_folded_into_the_reference_column_saves_the_first_step(world: World) -> None:
    column = world.log_ref + world.reward / BETA
    fitted = minimiser(
        lambda t: losses.soft_label_loss(pair_logit(t, column, BETA / LAM), safer(world)).sum()
    )
    assert largest_gap(fitted, world.tilted) < 1e-5


# --- three papers, one loss -----------------------------------------------------------------------


def pd_dpo_argument(policy: Tensor, world: World) -> Tensor:
    """What stands inside PD-DPO's sigma (2510.05703, eq. 16) for (more harmful, safer), term by
    term.
    """
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
        # The papers sum over (winner, loser) once; over ordered pairs the soft loss counts every
        # pair twice.
        assert pd_dpo.sum().item() * 2 == pytest.approx(ours.item(), rel=1e-12)
        assert written.sum().item() * 2 == pytest.approx(ours.item(), rel=1e-12)
        seen.append(ours.item())
    assert len({round(value, 6) for value in seen}) == len(world.policies)


# --- by hand: the losses of other papers ----------------------------------------------------------


def test_squared_difference_by_hand() -> None:
    # (0.5 - 2 + 0.5 * 1)^2 = 1; an exact fit costs nothing
    loss = squared_difference_loss(tensor(0.5, 1.5), tensor(2, 2), tensor(1, 1), 0.5)
    assert loss.tolist() == [1.0, 0.0]


def test_huber_is_squared_near_zero_and_straight_beyond_the_threshold() -> None:
    logit, zero = tensor(0.5, -2.0, 3.0).requires_grad_(), tensor(0, 0, 0)
    loss = huber_difference_loss(logit, zero, zero, 1.0, threshold=2.0)
    assert loss.tolist() == [0.25, 4.0, 8.0]
    loss.sum().backward()
    assert logit.grad is not None and logit.grad.tolist() == [1.0, -4.0, 4.0]


def test_ipo_by_hand() -> None:
    # tau = 0.5 wants a gap of 1: (3 - 1)^2 if w is preferred for sure, half (3 - 1)^2 + half (3 +
    # 1)^2 if nobody knows
    assert losses.ipo_loss(tensor(3, 1, 3), tensor(1, 1, 0.5), 0.5).tolist() == [4.0, 0.0, 10.0]


def test_kto_by_hand() -> None:
    """The numbers of TRL's KTO: 1 - sigma(beta (h - z)) for desirable answers, 1 - sigma(beta (z -
    h)) for others.
    """
    h, kind, point = (
        tensor(3, 3, 1),
        torch.tensor([True, False, True]),
        torch.tensor(1.0, dtype=torch.float64),
    )
    loss = losses.kto_loss(h, kind, point, 0.5, undesirable_weight=3.0)
    sigma = 1 / (1 + math.exp(-1))
    assert loss.tolist() == pytest.approx([1 - sigma, 3 * sigma, 0.5])


def test_robust_loss_by_hand() -> None:
    # e = 0.25: (0.75 l(+) - 0.25 l(-)) / 0.5 = 1.5 l(+) - 0.5 l(-), a hard label; and e = 0 is DPO
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    loss = losses.robust_loss(tensor(2, 2, 2), tensor(1, 0, 0.5), 0.25)
    expected = [1.5 * right - 0.5 * wrong, 1.5 * wrong - 0.5 * right, 0.5 * (right + wrong)]
    assert loss.tolist() == pytest.approx(expected)
    assert losses.robust_loss(tensor(2), tensor(0.3), 0.0) == losses.soft_label_loss(
        tensor(2), tensor(0.3)
    )


def test_simpo_by_hand() -> None:
    # z = 0.5 (-8/4 + 12/3) = 1: -log sigma(1 - 0.25); with half a vote half of -log sigma(-1.25)
    loss = losses.simpo_loss(
        tensor(-8, -8), tensor(-12, -12), tensor(4, 4), tensor(3, 3), tensor(1, 0.5), 0.5, 0.25
    )
    won, lost = math.log1p(math.exp(-0.75)), math.log1p(math.exp(1.25))
    assert loss.tolist() == pytest.approx([won, 0.5 * (won + lost)])


def test_no_gradient_flows_through_ktos_reference_point() -> None:
    h = tensor(0.3, -0.2).requires_grad_()
    losses.kto_loss(h, torch.tensor([True, True]), h.mean(), 1.0).sum().backward()
    slope = [-s * (1 - s) for s in torch.sigmoid(h.detach() - 0.05).tolist()]
    assert h.grad is not None and h.grad.tolist() == pytest.approx(slope)


def test_safe_dpo_keeps_swaps_and_drops() -> None:
    unsafe_w, unsafe_l = (
        torch.tensor([False, False, True, True]),
        torch.tensor([False, True, False, True]),
    )
    assert losses.safe_dpo_direction(unsafe_w, unsafe_l).tolist() == [1, 1, -1, 0]
    loss = safe_dpo_loss(tensor(2, 2, 2, 2), unsafe_w, unsafe_l, 0.5)
    expected = [
        math.log1p(math.exp(-x)) for x in (2, 1.5, -2.5)
    ]  # safe pair: no offset; swapped: -2 - 0.5
    assert loss.tolist() == pytest.approx([*expected, 0.0])


def test_modpo_logit_by_hand() -> None:
    # (0.5 * 4 - 0.75 * 2) / 0.25 = 2; with all the weight on its own objective it is DPO
    assert modpo_logit(tensor(4), tensor(2), 0.5, 0.25).item() == 2.0
    assert modpo_logit(tensor(4), tensor(2), 0.5, 1.0).item() == 2.0


def test_folded_reference_by_hand() -> None:
    assert losses.folded_reference(tensor(-3), tensor(1), 0.5).item() == -1.0


# --- what their minimisers are --------------------------------------------------------------------


def arbitrary_pairs() -> Tensor:
    """A distribution of pairs that favours some answers; [prompts, answers, answers]."""
    share = torch.rand(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    return share[:, :, None] * share[:, None, :]


@pytest.mark.parametrize("regression", [squared_difference_loss, huber_difference_loss])
def test_regression_on_score_differences_leads_to_the_tilted_policy(
    world: World, regression: Callable[..., Tensor]
) -> None:
    """For any distribution of pairs, and where labels would all but saturate."""
    reward, cost, pairs = gaps(5 * world.reward), gaps(5 * world.cost), arbitrary_pairs()
    fitted = minimiser(
        lambda t: (pairs * regression(pair_logit(t, world.log_ref, BETA), reward, cost, LAM)).sum()
    )
    expected = world.tilt(world.log_ref, 5 * (world.reward - LAM * world.cost), BETA)
    assert largest_gap(fitted, expected) < 1e-5


def test_huber_bears_a_wild_score_better_than_squares_do(world: World) -> None:
    wild = gaps(world.reward)
    wild[0, 0, 1] += 100

    def off(regression: Callable[..., Tensor]) -> float:
        cost = gaps(world.cost)
        fitted = minimiser(
            lambda t: regression(pair_logit(t, world.log_ref, BETA), wild, cost, LAM).sum()
        )
        return largest_gap(fitted, world.tilted)

    assert off(huber_difference_loss) < 0.5 * off(squared_difference_loss)


def test_ipo_tilts_by_the_win_rate_not_by_the_reward(world: World) -> None:
    share = (0.3 * world.policies[0]).softmax(1)
    prefer = torch.sigmoid(gaps(world.reward))
    pairs = share[:, :, None] * share[:, None, :]
    fitted = minimiser(
        lambda t: (pairs * losses.ipo_loss(pair_logit(t, world.log_ref, 1.0), prefer, BETA)).sum()
    )
    rate = (prefer * share[:, None, :]).sum(2)
    assert largest_gap(fitted, world.tilt(world.log_ref, rate, BETA)) < 1e-5
    assert largest_gap(fitted, world.helpful) > 0.05


def test_robust_dpo_finds_the_helpful_policy_behind_flipped_labels_and_smoothing_does_not(
    world: World,
) -> None:
    """A fifth of the labels is wrong: DPO and conservative DPO end at weaker tilts."""
    rate = 0.2
    truth = torch.sigmoid(gaps(world.reward))
    seen = (1 - rate) * truth + rate * (1 - truth)

    def fit(loss: Callable[[Tensor], Tensor]) -> Tensor:
        return minimiser(lambda t: loss(pair_logit(t, world.log_ref, BETA)).sum())

    assert largest_gap(fit(lambda z: losses.robust_loss(z, seen, rate)), world.helpful) < 1e-5
    plain = largest_gap(fit(lambda z: losses.soft_label_loss(z, seen)), world.helpful)
    smoothed = (1 - rate) * seen + rate * (1 - seen)
    conservative = largest_gap(fit(lambda z: losses.soft_label_loss(z, smoothed)), world.helpful)
    assert 0.05 < plain < conservative


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_simpo_fits_the_mean_log_probability_of_a_token_and_knows_no_reference(
    world: World, margin: float
) -> None:
    tokens = torch.arange(1.0, 6.0, dtype=torch.float64).expand(3, 5)
    prefer = torch.sigmoid(gaps(world.reward))

    def loss(t: Tensor) -> Tensor:
        first, second = t[:, :, None].expand(3, 5, 5), t[:, None, :].expand(3, 5, 5)
        long, short = tokens[:, :, None].expand(3, 5, 5), tokens[:, None, :].expand(3, 5, 5)
        return losses.simpo_loss(first, second, long, short, prefer, BETA, margin).sum()

    logit = gaps(BETA * minimiser(loss) / tokens)
    if margin == 0:
        assert torch.allclose(logit, gaps(world.reward), atol=1e-5)
    else:
        wide = gaps(world.reward).abs() > 0.5
        assert (logit.abs() > gaps(world.reward).abs() + 0.1)[wide].all()


def test_simpos_margin_moves_each_logit_where_its_docstring_says() -> None:
    z = torch.linspace(-4, 4, 17, dtype=torch.float64, requires_grad=True)
    one, margin = torch.ones_like(z), 0.7
    odds = ((1 + (z - margin).exp()) / (1 + (-z - margin).exp())).detach()
    loss = losses.simpo_loss(z, 0 * z, one, one, odds / (1 + odds), 1.0, margin)
    (slope,) = torch.autograd.grad(loss.sum(), z)
    assert slope.abs().max() < 1e-12


def test_a_soft_clip_is_odd_bounded_and_the_identity_near_zero() -> None:
    u = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    clipped = losses.soft_clip(u, 3.0)
    assert torch.equal(clipped, -losses.soft_clip(-u, 3.0)) and clipped.abs().max() <= 3.0
    assert clipped[43].item() == pytest.approx(3 * math.tanh(1))  # u = 3, the bound itself
    (slope,) = torch.autograd.grad(clipped.sum(), u)
    assert slope[40] == 1.0 and (slope[33:48] > 0).all() and (slope <= 1).all()
    assert torch.allclose(losses.soft_clip(u, 1e5), u, atol=1e-4)


@pytest.mark.parametrize("probability", [0.45, 0.55])
def test_kto_pushes_one_way_at_every_log_ratio_where_dpo_comes_to_rest(probability: float) -> None:
    h = torch.linspace(-9, 9, 37, dtype=torch.float64, requires_grad=True)
    yes, point = torch.ones(37, dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    marks = probability * losses.kto_loss(h, yes, point, 1.0) + (1 - probability) * losses.kto_loss(
        h, ~yes, point, 1.0
    )
    (push,) = torch.autograd.grad(marks.sum(), h)
    assert (push < 0).all() if probability > 0.5 else (push > 0).all()
    (pull,) = torch.autograd.grad(
        losses.soft_label_loss(h, torch.full_like(h, probability)).sum(), h
    )
    assert (pull < 0).any() and (pull > 0).any()


def test_kto_empties_answers_that_the_majority_dislikes(world: World) -> None:
    good = torch.sigmoid(world.reward - world.reward.mean(1, keepdim=True))
    table = world.log_ref.clone().requires_grad_()
    search = torch.optim.Adam([table], lr=0.05)
    yes = torch.ones_like(good, dtype=torch.bool)
    for _ in range(1000):
        policy = table.log_softmax(1)
        h = policy - world.log_ref
        point = (policy.exp() * h).sum(1).mean().clamp(min=0)
        loss = good * losses.kto_loss(h, yes, point, BETA) + (1 - good) * losses.kto_loss(
            h, ~yes, point, BETA
        )
        search.zero_grad()
        loss.sum().backward()
        search.step()
    mass = table.detach().softmax(1)
    assert mass[good < 0.5].max() < 1e-3 < 0.02 < world.helpful.exp()[good < 0.5].max()
    assert (mass[good > 0.5] > 5e-3).all()


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_safe_dpo_leads_to_the_helpful_policy_on_safe_answers_whatever_the_offset(
    world: World, offset: float
) -> None:
    unsafe = world.cost > world.cost.mean(1, keepdim=True)
    prefer = torch.sigmoid(gaps(world.reward))
    first, second = unsafe[:, :, None].expand_as(prefer), unsafe[:, None, :].expand_as(prefer)

    def loss(t: Tensor) -> Tensor:
        return (
            prefer * safe_dpo_loss(pair_logit(t, world.log_ref, BETA), first, second, offset)
        ).sum()

    restricted = world.helpful.masked_fill(unsafe, -torch.inf).log_softmax(1)
    assert (
        largest_gap(minimiser(loss, iterations=300), restricted) < 1e-4
    )  # the unsafe ones go on for ever


def test_bonuses_in_the_reference_column_lead_to_the_optimistic_policy(world: World) -> None:
    """O-PD-DPO: phase 2 from log pi_r + (b_r + lambda b_c) / beta tilts by r + b_r - lambda (c -
    b_c).
    """
    reward_bonus, cost_bonus = world.policies[0].exp(), world.policies[1].exp()
    column = losses.folded_reference(world.helpful, reward_bonus + LAM * cost_bonus, BETA)
    fitted = minimiser(
        lambda t: losses.soft_label_loss(pair_logit(t, column, BETA / LAM), safer(world)).sum()
    )
    optimistic = world.reward + reward_bonus - LAM * (world.cost - cost_bonus)
    assert largest_gap(fitted, world.tilt(world.log_ref, optimistic, BETA)) < 1e-5
    assert largest_gap(fitted, world.tilted) > 0.01


def test_a_folded_reward_is_pi_r_to_every_pairwise_loss(world: World) -> None:
    column = losses.folded_reference(world.log_ref, world.reward, BETA)
    for policy in world.policies:
        logit = pair_logit(policy, column, BETA / LAM)
        assert torch.allclose(logit, pair_logit(policy, world.helpful, BETA / LAM), atol=1e-12)


def test_modpos_logit_is_that_of_sacpos_second_step_at_every_policy(world: World) -> None:
    weight, beta = LAM / (1 + LAM), BETA / (1 + LAM)
    margin = gaps(BETA * (world.helpful - world.log_ref))
    for policy in world.policies:
        logit = modpo_logit(pair_logit(policy, world.log_ref, 1.0), margin, beta, weight)
        assert torch.allclose(logit, pair_logit(policy, world.helpful, BETA / LAM), atol=1e-12)
        assert not torch.allclose(logit, pair_logit(policy, world.helpful, BETA), atol=1e-3)


def test_both_orders_of_the_steps_end_at_one_policy(world: World) -> None:
    """Each step fitted, not assumed: helpfulness then safety, and safety then helpfulness."""
    helpful = torch.sigmoid(gaps(world.reward))

    def fit(reference: Tensor, scale: float, labels: Tensor) -> Tensor:
        return minimiser(
            lambda t: losses.soft_label_loss(pair_logit(t, reference, scale), labels).sum()
        ).log_softmax(1)

    one = fit(fit(world.log_ref, BETA, helpful), BETA / LAM, safer(world))
    other = fit(fit(world.log_ref, BETA / LAM, safer(world)), BETA, helpful)
    assert largest_gap(one, other) < 1e-5
    # The same two numbers as coefficients of the steps in the other order are another problem.
    wrong = fit(fit(world.log_ref, BETA, safer(world)), BETA / LAM, helpful)
    assert largest_gap(wrong, one) > 0.02


def test_every_stage_starts_at_logit_zero(world: World) -> None:
    """From its own start each stage has logit 0, so its first loss is log 2 (DPO), 1 / (2 tau)^2
    (IPO), 1 / 2 (KTO).
    """
    margin = gaps(BETA * (world.helpful - world.log_ref))
    column = losses.folded_reference(world.log_ref, world.reward, BETA)
    stages = {
        "step 1": pair_logit(world.log_ref, world.log_ref, BETA),
        "step 2": pair_logit(world.helpful, world.helpful, BETA / LAM),
        "step 2, reward folded": pair_logit(world.helpful, column, BETA / LAM),
        "MODPO": modpo_logit(
            pair_logit(world.helpful, world.log_ref, 1.0), margin, BETA / (1 + LAM), LAM / (1 + LAM)
        ),
    }
    for name, logit in stages.items():
        assert logit.abs().max() < 1e-12, name
    # The control: step 2 measured against pi_ref, the mistake of a reference that was silently the
    # base model.
    assert pair_logit(world.helpful, world.log_ref, BETA / LAM).abs().max() > 0.1
    zero = tensor(0.0)
    assert losses.ipo_loss(zero, tensor(1), 0.25).item() == 4.0
    assert losses.kto_loss(zero, torch.tensor([True]), zero[0], BETA).item() == 0.5
