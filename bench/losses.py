"""Losses that the laboratories measure and no stage trains by, in the notation of
`dualign.math.losses`. A stage has SafeDPO and MODPO as reference columns of DPO
(`dualign.training.pairs`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dualign.math.losses import safe_dpo_direction


def squared_difference_loss(
    logit: Tensor, reward_gap: Tensor, cost_gap: Tensor, lam: float
) -> Tensor:
    """(beta Delta h - Delta r + lambda Delta c)^2, with logit = beta Delta h; in squared units of
    reward.

    REBEL's regression (2404.16767) on r - lambda c. The minimiser is pi_lambda for any distribution
    of pairs; it stays finite where scores far apart make Bradley-Terry labels all but certain.

    >>> one = torch.ones(1)
    >>> squared_difference_loss(one, reward_gap=2 * one, cost_gap=4 * one, lam=0.5)  # (1 - 2 + 2)^2
    tensor([1.])
    """
    return (logit - reward_gap + lam * cost_gap) ** 2


def huber_difference_loss(
    logit: Tensor, reward_gap: Tensor, cost_gap: Tensor, lam: float, threshold: float = 1.0
) -> Tensor:
    """The squared difference up to `threshold` (units of reward), straight beyond it: e^2 or t (2
    |e| - t).

    Same minimiser where the scores are exact; a pair with a wild score pulls with bounded force
    (Huber, 1964).

    >>> error, none = torch.tensor([0.5, 3.0]), torch.zeros(2)
    >>> huber_difference_loss(error, none, none, lam=1.0)  # 0.5^2, and 2 * 3 - 1 in place of 9
    tensor([0.2500, 5.0000])
    """
    error = (logit - reward_gap + lam * cost_gap).abs()
    return torch.where(error <= threshold, error**2, threshold * (2 * error - threshold))


def safe_dpo_loss(logit: Tensor, unsafe_w: Tensor, unsafe_l: Tensor, offset: float) -> Tensor:
    """-log sigma(beta Delta h - (u_l - u_w) Delta) on transformed pairs, u = 1 if unsafe; SafeDPO
    (2505.20065).

    `logit` = beta Delta h of the pair as it was labelled, w preferred; dropped pairs have loss 0.
    The minimiser is pi_ref exp(r / beta) restricted to safe answers, whatever the offset Delta
    (proposition 4.4).

    >>> unsafe = torch.tensor([True])
    >>> safe_dpo_loss(torch.tensor([5.0]), unsafe, unsafe, offset=1.0).abs()  # dropped
    tensor([0.])
    >>> # Swapped: -log sigma(1 - 1).
    >>> safe_dpo_loss(torch.tensor([-1.0]), unsafe, ~unsafe, offset=1.0)
    tensor([0.6931])
    """
    direction = safe_dpo_direction(unsafe_w, unsafe_l)
    # After the transform the preferred answer is safe, so u_l - u_w is 1 where exactly one answer
    # is unsafe.
    mixed = (unsafe_w ^ unsafe_l).to(logit.dtype)
    return -direction.abs() * logsigmoid(direction * logit - offset * mixed)


def modpo_logit(log_ratio_gap: Tensor, margin_gap: Tensor, beta: float, weight: float) -> Tensor:
    """(beta Delta h - (1 - w) Delta m) / w, the logit of MODPO (2310.03708) for two objectives.

    The pairs rank objective 0, whose weight is w; m is the margin reward of the other one, in units
    of reward. With beta / (1 + lambda) for beta it is beta Delta h - lambda Delta m on helpful
    pairs, where w = 1 / (1 + lambda) and m = -c; on safety pairs, where w = lambda / (1 + lambda)
    and m = beta log(pi_r / pi_ref), it equals SACPO's second step and PD-DPO's phase 2 at every
    policy.

    >>> gap, margin = torch.tensor([4.0]), torch.tensor([1.0])
    >>> modpo_logit(gap, margin, beta=0.5, weight=1.0)
    tensor([2.])
    >>> modpo_logit(gap, margin, beta=0.5, weight=0.5)
    tensor([3.])
    """
    return (beta * log_ratio_gap - (1 - weight) * margin_gap) / weight
