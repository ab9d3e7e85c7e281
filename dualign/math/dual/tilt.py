"""pi_lambda ~ pi_ref exp((r - lambda c) / beta) by importance weights on samples of pi_ref."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

Array = np.ndarray


def weights(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Self-normalised importance weights of pi_lambda on the samples; every row sums to one.

    Where r - lambda c is the same, so is the weight:

    >>> weights(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]]), lam=1.0, beta=0.5)
    array([[0.5, 0.5]])
    """
    logit = (reward - lam * cost) / beta
    return np.exp(logit - logsumexp(logit, axis=1, keepdims=True))


def soft_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) for each prompt; shape [prompts].

    Of answers that are alike it is their r - lambda c:

    >>> soft_value(np.array([[2.0, 2.0]]), np.array([[1.0, 1.0]]), lam=0.5, beta=1.0)
    array([1.5])
    """
    logit = (reward - lam * cost) / beta
    return beta * (logsumexp(logit, axis=1) - np.log(reward.shape[1]))


def leave_one_out_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) estimated without the sample itself; shape [prompts, samples].

    The anchor of a sample must not contain its own score, or it would be pulled towards it.

    >>> leave_one_out_value(np.array([[1.0, 3.0]]), np.zeros((1, 2)), lam=0.0, beta=1.0)
    array([[3., 1.]])
    """
    logit = (reward - lam * cost) / beta
    nothing = np.full((len(logit), 1), -np.inf)
    before = np.hstack([nothing, np.logaddexp.accumulate(logit[:, :-1], axis=1)])
    after = np.hstack([np.logaddexp.accumulate(logit[:, :0:-1], axis=1)[:, ::-1], nothing])
    value: Array = beta * (np.logaddexp(before, after) - np.log(logit.shape[1] - 1))
    return value


def effective_samples(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Effective sample size 1 / sum w^2 of each prompt; shape [prompts].

    >>> effective_samples(np.zeros((1, 4)), np.zeros((1, 4)), lam=1.0, beta=1.0)
    array([4.])
    """
    return 1.0 / (weights(reward, cost, lam, beta) ** 2).sum(1)


def dual_value(reward: Array, cost: Array, lam: float, *, limit: float, beta: float) -> float:
    """D(lambda).

    >>> dual_value(np.array([[2.0, 2.0]]), np.array([[1.0, 1.0]]), lam=0.5, limit=-0.4, beta=1.0)
    1.3
    """
    return float(soft_value(reward, cost, lam, beta).mean() + lam * limit)


def predict(reward: Array, cost: Array, lam: float, beta: float, value: Array) -> Array:
    """E_{pi_lambda}[value | x] for each prompt by importance weighting; shape [prompts].

    With odds of 3 to 1 for the first answer:

    >>> reward, cost = np.array([[np.log(3), 0.0]]), np.zeros((1, 2))
    >>> predict(reward, cost, lam=0.0, beta=1.0, value=np.array([[1.0, 5.0]])).round(12)
    array([2.])
    """
    return (weights(reward, cost, lam, beta) * value).sum(1)


def variance(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Var_{pi_lambda}(c | x) by importance weighting, [prompts]. Its mean over beta is D''.

    Costs of 0 and 1 with odds of 3 to 1 vary by 3/4 times 1/4:

    >>> variance(np.array([[np.log(3), 0.0]]), np.array([[0.0, 1.0]]), lam=0.0, beta=1.0).round(12)
    array([0.1875])
    """
    w = weights(reward, cost, lam, beta)
    mean = (w * cost).sum(1, keepdims=True)
    return (w * (cost - mean) ** 2).sum(1)


def divergence(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """KL(pi_lambda || pi_ref) for each prompt: E[(r - lambda c) / beta] - V_lambda / beta; shape
    [prompts].

    All on one of two answers is log 2 away:

    >>> divergence(np.array([[99.0, 0.0]]), np.zeros((1, 2)), lam=0.0, beta=1.0).round(4)
    array([0.6931])
    """
    tilt = predict(reward, cost, lam, beta, reward - lam * cost)
    return (tilt - soft_value(reward, cost, lam, beta)) / beta


def jackknife_weights(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """Weights whose weighted sums have no bias of order 1 / n; each row sums to one, some weights
    may be negative.

    The jackknife of f = sum_j w_j f_j is n f - (n - 1) mean_i f_(-i), f_(-i) being f without sample
    i (Quenouille 1956). As f - f_(-i) = w_i (f_i - f_(-i)), it is sum_j a_j f_j with a = w + (n -
    1) / n (w - sum_i w_i w_(-i)) and w_(-i) the weights without sample i. It is within max f_j -
    min f_j of f, even where one sample has all the weight. A prompt's only sample keeps weight 1.

    Of two samples it is 2 w - 1/2, with w = 7/8 and 1/8 here:

    >>> reward, cost = np.array([[np.log(7), 0.0]]), np.zeros((1, 2))
    >>> jackknife_weights(reward, cost, lam=0.0, beta=1.0).round(12)
    array([[ 1.25, -0.25]])
    """
    w = weights(reward, cost, lam, beta)
    count = w.shape[1]
    if count == 1:  # there is none to leave out
        return w
    heaviest = np.arange(count) == w.argmax(1)[:, None]
    # Beside the heaviest the others may be too light for 1 - w: their weights without it are
    # computed anew.
    others = weights(np.where(heaviest, -np.inf, reward - lam * cost), np.zeros_like(w), 0.0, beta)
    odds = np.where(heaviest, 0.0, w / np.where(heaviest, 1.0, 1.0 - w))
    left_out = w * (odds.sum(1, keepdims=True) - odds) + w.max(1, keepdims=True) * others
    jackknifed: Array = w + (count - 1) / count * (w - left_out)
    return jackknifed


def bias(reward: Array, cost: Array, lam: float, beta: float, value: Array) -> Array:
    """What `predict` has too much of E_{pi_lambda}[value | x] by the jackknife; [prompts].

    Of the two samples of `jackknife_weights`, (7 / 8, 1 / 8) in place of (1.25, -0.25):

    >>> reward, cost = np.array([[np.log(7), 0.0]]), np.zeros((1, 2))
    >>> bias(reward, cost, lam=0.0, beta=1.0, value=np.array([[0.0, 8.0]])).round(12)
    array([3.])
    """
    plain = predict(reward, cost, lam, beta, value)
    without: Array = (jackknife_weights(reward, cost, lam, beta) * value).sum(1)
    return plain - without


def mean_cost(reward: Array, cost: Array, lam: float, beta: float, jackknife: bool) -> float:
    """C(lambda) = mean_x E_{pi_lambda}[c | x] of a pool, with `jackknife` less its `bias`.

    >>> reward, cost = np.array([[np.log(7), 0.0]]), np.array([[0.0, 8.0]])
    >>> [round(mean_cost(reward, cost, 0.0, 1.0, jackknife=each), 12) for each in (False, True)]
    [1.0, -2.0]
    """
    given = (reward, cost, lam, beta, cost)
    shift = float(bias(*given).mean()) if jackknife else 0.0
    return float(predict(*given).mean()) - shift


def jackknife_value(reward: Array, cost: Array, lam: float, beta: float) -> Array:
    """V_lambda(x) less its bias of order 1 / n: n V - (n - 1) mean_i V_(-i), as in
    `jackknife_weights`; [prompts].

    >>> jackknife_value(np.array([[2.0, 2.0]]), np.array([[1.0, 1.0]]), lam=0.5, beta=1.0)
    array([1.5])
    """
    count = reward.shape[1]
    without = leave_one_out_value(reward, cost, lam, beta).mean(1)
    value: Array = count * soft_value(reward, cost, lam, beta) - (count - 1) * without
    return value
