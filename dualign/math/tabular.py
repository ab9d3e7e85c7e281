"""The exact constrained optimum where all answers and true scores are known (the embedded world).

The grammatical answers of a prompt carry their own r* and c*; all other text shares one score, so
it acts as a single further answer that holds the rest of pi_ref's mass. The tilt of this finite
distribution is the optimum over all text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from dualign.core.errors import InfeasibleError

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """log pi_ref, r* and c* of every answer, [prompts, answers]; rows of pi_ref sum to one."""

    log_reference: Array
    reward: Array
    cost: Array
    beta: float

    def policy(self, lam: float) -> Array:
        """log pi_lambda, proportional to pi_ref exp((r - lambda c) / beta).

        >>> reward, cost = np.zeros((1, 2)), np.array([[0.0, 1.0]])
        >>> world = Problem(np.log([[0.5, 0.5]]), reward, cost, beta=1.0)
        >>> np.exp(world.policy(lam=np.log(3))).round(6)
        array([[0.75, 0.25]])
        """
        logit = self.log_reference + (self.reward - lam * self.cost) / self.beta
        return logit - logsumexp(logit, axis=1, keepdims=True)

    def describe(self, log_policy: Array) -> dict[str, float]:
        """E[r*], E[c*], KL to pi_ref and J = E[r*] - beta KL of a policy, averaged over prompts.

        >>> reward, cost = np.array([[0.0, 2.0]]), np.array([[0.0, 1.0]])
        >>> world = Problem(np.log([[0.5, 0.5]]), reward, cost, beta=1.0)
        >>> world.describe(world.log_reference)
        {'reward': 1.0, 'cost': 0.5, 'kl': 0.0, 'value': 1.0}
        """
        p = np.exp(log_policy)
        reward = float((p * self.reward).sum(1).mean())
        kl = float((p * np.where(p > 0, log_policy - self.log_reference, 0.0)).sum(1).mean())
        return {
            "reward": reward,
            "cost": float((p * self.cost).sum(1).mean()),
            "kl": kl,
            "value": reward - self.beta * kl,
        }


def nearest(problem: Problem, limit: float) -> Array:
    """log of the policy nearest to pi_ref, in KL(pi | pi_ref), whose E[c*] is within the limit,
    [prompts, answers].

    The information projection of pi_ref (Csiszar, 1975), pi_ref exp(-lambda c) / Z at the least
    lambda >= 0 that meets the limit: pi_ref itself where that keeps it. What can be had without a
    look at reward. Raises InfeasibleError.

    >>> reward, cost = np.array([[0.0, 9.0]]), np.array([[0.0, 1.0]])
    >>> world = Problem(np.log([[0.5, 0.5]]), reward, cost, beta=1.0)
    >>> np.exp(nearest(world, limit=0.25)).round(6)  # whatever the reward
    array([[0.75, 0.25]])
    """
    blind = replace(problem, reward=np.zeros_like(problem.reward), beta=1.0)
    return blind.policy(solve(blind, limit))


def problem(
    log_reference: Array, reward: Array, cost: Array, rest: tuple[float, float], beta: float
) -> Problem:
    """Complete enumerated answers, shape [prompts, answers], by the rest of the text with scores
    `rest` = (r, c).

    >>> scores = np.zeros((1, 2))
    >>> whole = problem(np.log([[0.5, 0.3]]), scores, scores, rest=(-1.0, 2.0), beta=1.0)
    >>> np.exp(whole.log_reference).round(6)
    array([[0.5, 0.3, 0.2]])
    """
    mass = np.exp(log_reference).sum(1, keepdims=True)
    remainder = np.log(np.clip(1.0 - mass, 1e-12, None))
    column = np.ones((len(reward), 1))
    full = np.hstack([log_reference, remainder])
    return Problem(
        full - logsumexp(full, axis=1, keepdims=True),
        np.hstack([reward, rest[0] * column]),
        np.hstack([cost, rest[1] * column]),
        beta,
    )


def solve(problem: Problem, limit: float, lambda_max: float = 1e3) -> float:
    """lambda*: the root of E_{pi_lambda}[c*] = limit, or 0 if it is slack. Raises InfeasibleError.

    Two answers, and a quarter of the unsafe one allowed: e^-lambda / (1 + e^-lambda) = 1/4.

    >>> world = Problem(np.log([[0.5, 0.5]]), np.zeros((1, 2)), np.array([[0.0, 1.0]]), beta=1.0)
    >>> round(float(np.exp(solve(world, limit=0.25))), 6), solve(world, limit=0.5)
    (3.0, 0.0)
    """

    def excess(lam: float) -> float:
        return problem.describe(problem.policy(lam))["cost"] - limit

    if excess(0.0) <= 0:
        return 0.0
    if excess(lambda_max) > 0:
        raise InfeasibleError(
            f"constraint.limit {limit:g} is below the true minimum {excess(lambda_max) + limit:.4g}"
        )
    return float(brentq(excess, 0.0, lambda_max, xtol=1e-12))
