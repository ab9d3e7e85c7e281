"""The losses, as pure functions of tensors.

Notation: h(y) = log pi(y|x) - log pi_ref(y|x); Delta f = f(y_w) - f(y_l) for a pair whose first
answer is called w. All tensors have shape [pairs] unless said otherwise; log-probabilities are in
nats and summed over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

#: How much the probability ratio of one answer may count for in a control variate, in units of the
#: larger of its weight and 1: one whose probability soars does not rule the batch.
RATIO_BOUND = 5.0


def pairwise_logit(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, scale: float
) -> Tensor:
    """a [(log pi(y_w) - ref(y_w)) - (log pi(y_l) - ref(y_l))], the logit of pairwise losses.

    `scale` is a = beta for DPO (2305.18290, eq. 7) and C-DPO; beta / lambda for SACPO's second step
    (2404.11049, theorem 1) and for PD-DPO's phase 2 (2510.05703, eq. 16), whose reference column is
    log pi_r.

    >>> first, second, ref_first, ref_second = torch.tensor([[-4.0], [-7.0], [-5.0], [-6.0]])
    >>> pairwise_logit(first, second, ref_first, ref_second, scale=0.5)  # 0.5 (1 + 1)
    tensor([1.])
    """
    return scale * ((logp_w - ref_w) - (logp_l - ref_l))


def soft_label_loss(logit: Tensor, probability: Tensor) -> Tensor:
    """-p log sigma(logit) - (1 - p) log sigma(-logit), with p the probability that w is preferred.

    p = 1 is DPO; p = sigma(Delta r - lambda Delta c) is Lagrangian DPO with exact labels, whose
    expectation over Bernoulli draws of the label is C-DPO (2403.02475). The minimiser over h is
    logit = log(p / (1 - p)).

    At the minimiser, here log(0.75 / 0.25) = log 3, the gradient is zero:

    >>> logit = torch.tensor([3.0]).log().requires_grad_()
    >>> soft_label_loss(logit, torch.tensor([0.75])).sum().backward()
    >>> bool(logit.grad.abs() < 1e-6)
    True
    """
    return -probability * logsigmoid(logit) - (1 - probability) * logsigmoid(-logit)


def lagrangian_label(
    reward_gap: Tensor, cost_gap: Tensor, lam: float, scale: float = 1.0
) -> Tensor:
    """P(y_w preferred) = sigma(s (Delta r - lambda Delta c)), Bradley-Terry's of s (r - lambda c).

    >>> lagrangian_label(torch.tensor([1.0, 9.0]), torch.tensor([2.0, 18.0]), lam=0.5)  # a tie each
    tensor([0.5000, 0.5000])
    """
    return torch.sigmoid(scale * (reward_gap - lam * cost_gap))


def lagrangian_scale(lam: float, normalised: bool) -> float:
    """s = 1 / (1 + lambda) if `normalised`, else 1: the factor of the label's score and of beta.

    C-DPO (2403.02475) takes the normalisation from Safe RLHF (2310.12773). The pairwise minimiser
    has a Delta h = s (Delta r - lambda Delta c), which is pi_lambda for a = s beta alone. With a =
    beta, as published, the KL weight is beta (1 + lambda): as lambda grows the policy stops at
    pi_ref exp(-c / beta), and a limit below the cost of that is out of reach. Anchor and likelihood
    keep beta, since their minimiser is pi_lambda whatever s is.

    >>> lagrangian_scale(3.0, normalised=True), lagrangian_scale(3.0, normalised=False)
    (0.25, 1.0)
    """
    return 1 / (1 + lam) if normalised else 1.0


def soft_clip(value: Tensor, bound: float) -> Tensor:
    """R tanh(u / R), an implicit reward u = a h(y) kept within (-R, R); any shape, `bound` R > 0 in
    u's units.

    PD-DPO's policy classes bound the implicit reward of phase 1 by R_max, that of phase 2 by C_max
    (2510.05703, algorithm 1); this is their smooth form: the identity near 0, with a gradient
    everywhere.

    >>> soft_clip(torch.tensor([0.0, 0.1, 100.0]), bound=5.0)
    tensor([0.0000, 0.1000, 5.0000])
    """
    return bound * torch.tanh(value / bound)


def anchor_loss(log_ratio: Tensor, target: Tensor, beta: float) -> Tensor:
    """(beta h(y) - t(y))^2, t = r - lambda c - V_lambda(x), V_lambda(x) = beta log E_ref exp((r -
    lambda c) / beta).

    Pairwise losses leave the level of log pi free; the soft value, a by-product of the dual, fixes
    it. The minimiser is pi_lambda for any distribution of y.

    >>> anchor_loss(torch.tensor([2.0, 4.0]), target=torch.tensor([1.0, 1.0]), beta=0.5)
    tensor([0., 1.])
    """
    return (beta * log_ratio - target) ** 2


def weighted_nll(logp: Tensor, weight: Tensor) -> Tensor:
    """-w(y) log pi(y|x); shape [answers].

    With y ~ pi_ref and w = pi_lambda / pi_ref = exp((r - lambda c - V_lambda(x)) / beta), the mean
    over samples is the cross-entropy to pi_lambda, whose minimiser is pi_lambda: it moves mass only
    among what the reference says, where a pairwise loss may also lose it to text that no pair
    shows. log pi is a sum over the answer's tokens: neither the term nor its weight compares with a
    mean over tokens, such as the `sft` loss of TRL's DPO trainer.

    >>> weighted_nll(torch.tensor([-2.0, -5.0]), weight=torch.tensor([3.0, 0.0])).abs()
    tensor([6., 0.])
    """
    return -weight * logp


def controlled_weight(weight: Tensor, logp: Tensor, log_drawn: Tensor, control: float) -> Tensor:
    """w(y) - k rho(y), rho = pi / pi_drawn without a gradient: the weight of `weighted_nll` with a
    control variate; shape [answers].

    E_drawn[rho grad log pi] = E_pi[grad log pi] = 0, so the gradient of the likelihood term is the
    same on average for every k in [0, 1]. Its noise is not: at k = 1 an answer's own gradient
    vanishes where pi is the target, as w = rho there, so no noise of the draw is left; the loss is
    then the generalised KL divergence, rho - w log rho. What 1 - k leaves presses on text that was
    not drawn. rho counts for no more than `RATIO_BOUND` times the larger of w and 1.

    >>> weight, logp = torch.tensor([3.0, 0.0]), torch.tensor([-2.0, -5.0])
    >>> controlled_weight(weight, logp, log_drawn=logp, control=0.5)
    tensor([ 2.5000, -0.5000])
    """
    bound = RATIO_BOUND * weight.clamp(min=1)
    ratio = torch.minimum((logp.detach() - log_drawn).exp(), bound)
    return weight - control * ratio


def sign_loss(cost: Tensor, unsafe: Tensor) -> Tensor:
    """-log sigma(s c), s = +1 for an unsafe answer and -1 for a safe one (Safe RLHF, 2310.12773).

    `unsafe` is boolean. Gives the cost model its zero: c > 0 means unsafe.

    >>> unsafe = torch.tensor([True, True, False])
    >>> sign_loss(torch.tensor([9.0, 0.0, 9.0]), unsafe).round(decimals=2)
    tensor([0.0000, 0.6900, 9.0000])
    """
    return -logsigmoid(torch.where(unsafe, cost, -cost))


# --- the losses of other papers -------------------------------------------------------------------


def ipo_loss(log_ratio_gap: Tensor, probability: Tensor, tau: float) -> Tensor:
    """p (Delta h - 1 / (2 tau))^2 + (1 - p) (Delta h + 1 / (2 tau))^2, IPO (2310.12036, eq. 17).

    p is the probability that w is preferred (1 in a data set of winners and losers). Over all pairs
    of answers drawn from mu the minimiser is h(y) = P(y preferred to mu) / tau + const(x): it tilts
    by the win rate, not by the reward, so its steps add up in win rates and not to the Lagrangian r
    - lambda c.

    >>> ipo_loss(torch.tensor([1.0, 1.0]), probability=torch.tensor([1.0, 0.0]), tau=0.5)
    tensor([0., 4.])
    """
    margin = 1 / (2 * tau)
    return (
        probability * (log_ratio_gap - margin) ** 2
        + (1 - probability) * (log_ratio_gap + margin) ** 2
    )


def robust_loss(logit: Tensor, probability: Tensor, flip_rate: float) -> Tensor:
    """[(1 - e) l(z, p) - e l(z, 1 - p)] / (1 - 2 e), l the soft-label loss; rDPO (2403.00409).

    Each label is wrong with probability e = `flip_rate` < 1/2, whichever answer was preferred.
    Over such flips the expectation is the loss of the true label, so with q the observed
    probability of w the minimiser is logit = log((q - e) / (1 - e - q)): DPO's on clean labels,
    the reference tilted by the reward. As l is linear in p, it is the loss of p turned back, (p -
    e) / (1 - 2 e). Conservative DPO, the paper's baseline, turns p the other way, to (1 - e) p + e
    (1 - p), and its minimiser prefers less than the truth does. A hard label is turned back beyond
    1: a pair that was seen once has no finite minimiser, as in DPO, and pulls the harder.

    The loss that is seen, 0.9 times that of the true label and 0.1 times that of the wrong one, is
    the true label's:

    >>> logit, right, wrong = torch.tensor([2.0]), torch.ones(1), torch.zeros(1)
    >>> 0.9 * robust_loss(logit, right, 0.1) + 0.1 * robust_loss(logit, wrong, 0.1)
    tensor([0.1269])
    >>> soft_label_loss(logit, right)
    tensor([0.1269])
    """
    return soft_label_loss(logit, (probability - flip_rate) / (1 - 2 * flip_rate))


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """1 - sigma(beta (h - z)) if desirable, else w (1 - sigma(beta (z - h))); KTO (2402.01306);
    [answers].

    `desirable` is boolean. z = max(0, KL(pi || reference)) in nats is the reference point, a
    constant: no gradient flows through it. With P(desirable | y) = s the expectation is linear in
    sigma(beta (h - z)): no Bradley-Terry fit, and an answer with s < w (1 - s) loses all its
    mass, however close the vote.

    >>> at = torch.tensor(0.2)
    >>> kto_loss(torch.tensor([0.2, 99.0, 99.0]), torch.tensor([True, True, False]), at, beta=1.0)
    tensor([0.5000, 0.0000, 1.0000])
    """
    scaled = beta * (log_ratio - reference_point.detach())
    return torch.where(
        desirable,
        torch.sigmoid(-scaled),
        undesirable_weight * torch.sigmoid(scaled),
    )


def simpo_loss(
    logp_w: Tensor,
    logp_l: Tensor,
    tokens_w: Tensor,
    tokens_l: Tensor,
    probability: Tensor,
    scale: float,
    margin: float,
) -> Tensor:
    """-p log sigma(z - g) - (1 - p) log sigma(-z - g), z = a (log pi(y_w) / |y_w| - log pi(y_l) /
    |y_l|).

    SimPO (2405.14734, eq. 6) with a = `scale`, its beta, and g = `margin` >= 0 in units of the
    logit z; p is the probability that w is preferred (1 in the paper), |y| the number of tokens.
    No reference stands in it. With Bradley-Terry labels of r and g = 0 the minimiser is a log pi(y)
    / |y| = r(y) + const(x): no tilt, so that its steps do not add up, its log-ratios are no score
    and the KL divergence to the reference is held by nothing but the training's length. With g > 0
    it is the z of log(p / (1 - p)) = log[(1 + exp(z - g)) / (1 + exp(-z - g))], further apart.

    >>> one, two = torch.ones(1), torch.full((1,), 2.0)
    >>> simpo_loss(-2 * two, -3 * one, two, one, one, scale=1.0, margin=1.0)  # sigma(-2 + 3 - 1)
    tensor([0.6931])
    """
    logit = scale * (logp_w / tokens_w - logp_l / tokens_l)
    return -probability * logsigmoid(logit - margin) - (1 - probability) * logsigmoid(
        -logit - margin
    )


def safe_dpo_direction(unsafe_w: Tensor, unsafe_l: Tensor) -> Tensor:
    """SafeDPO's transform T of a preferred and a rejected answer (2505.20065): +1 keep, -1 swap, 0
    drop; [pairs].

    Keep where the preferred answer is safe, swap where only the rejected one is, drop where both
    are unsafe. The arguments are boolean.

    >>> preferred, rejected = torch.tensor([[False, False, True, True], [False, True, False, True]])
    >>> safe_dpo_direction(preferred, rejected)
    tensor([ 1,  1, -1,  0])
    """
    return torch.where(unsafe_w, torch.where(unsafe_l, 0, -1), 1)


def folded_reference(ref: Tensor, score: Tensor, beta: float) -> Tensor:
    """log pi_ref + s / beta: a reference column with a score; [answers], s in units of reward.

    A pairwise loss relative to it has its optimum tilted by s. With s = r step 2 needs no pi_r;
    with s = b_r + lambda b_c, added to log pi_r, it is the optimistic phase 2 of O-PD-DPO
    (2510.05703, alg. 2).

    >>> folded_reference(torch.tensor([-5.0]), score=torch.tensor([2.0]), beta=0.5)
    tensor([-1.])
    """
    return ref + score / beta
