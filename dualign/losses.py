"""The losses, as pure functions of tensors.

Notation: h(y) = log pi(y|x) - log pi_ref(y|x); Delta f = f(y_w) - f(y_l) for a pair whose first answer is called w.
All tensors have shape [pairs] unless said otherwise; log-probabilities are in nats and summed over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_logit(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, scale: float) -> Tensor:
    """a [(log pi(y_w) - ref(y_w)) - (log pi(y_l) - ref(y_l))], the logit of every pairwise loss here.

    `scale` is a = beta for DPO (2305.18290, eq. 7) and C-DPO; beta / lambda for SACPO's second step (2404.11049,
    theorem 1) and for PD-DPO's phase 2 (2510.05703, eq. 16), whose reference column is log pi_r.
    """
    return scale * ((logp_w - ref_w) - (logp_l - ref_l))


def soft_label_loss(logit: Tensor, probability: Tensor) -> Tensor:
    """-p log sigma(logit) - (1 - p) log sigma(-logit), with p the probability that w is preferred.

    p = 1 is DPO; p = sigma(Delta r - lambda Delta c) is Lagrangian DPO with exact labels, whose expectation over
    Bernoulli draws of the label is C-DPO (2403.02475). The minimiser over h is logit = log(p / (1 - p)).
    """
    return -probability * logsigmoid(logit) - (1 - probability) * logsigmoid(-logit)


def lagrangian_label(reward_gap: Tensor, cost_gap: Tensor, lam: float) -> Tensor:
    """P(y_w preferred) = sigma(Delta r - lambda Delta c), the Bradley-Terry label of r - lambda c."""
    return torch.sigmoid(reward_gap - lam * cost_gap)


def anchor_loss(log_ratio: Tensor, target: Tensor, beta: float) -> Tensor:
    """(beta h(y) - t(y))^2, t = r - lambda c - V_lambda(x), V_lambda(x) = beta log E_ref exp((r - lambda c) / beta).

    Pairwise losses leave the level of log pi free; the soft value, a by-product of the dual, fixes it. The minimiser is
    pi_lambda for any distribution of y.
    """
    return (beta * log_ratio - target) ** 2


def weighted_nll(logp: Tensor, weight: Tensor) -> Tensor:
    """-w(y) log pi(y|x); shape [answers].

    With y ~ pi_ref and w = pi_lambda / pi_ref = exp((r - lambda c - V_lambda(x)) / beta), the mean over samples is the
    cross-entropy to pi_lambda, whose minimiser is pi_lambda: it moves mass only among what the reference says, where a
    pairwise loss may also lose it to text that no pair shows.
    """
    return -weight * logp


def sign_loss(cost: Tensor, unsafe: Tensor) -> Tensor:
    """-log sigma(s c), s = +1 where the answer is unsafe and -1 where it is safe (Safe RLHF, 2310.12773).

    `unsafe` is boolean. Gives the cost model its zero: c > 0 means unsafe.
    """
    return -logsigmoid(torch.where(unsafe, cost, -cost))
