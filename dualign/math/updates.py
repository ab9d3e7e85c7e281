"""Updates of the multiplier lambda from a measured cost, and the algebra of merge weights.

C is the mean cost of a policy's own answers and d its limit, both in units of cost; lambda is in
units of reward for one of cost. A policy trained at lambda aims at pi_ref exp((r - lambda c) /
beta), beta the KL weight in units of reward. Merges are linear in log-probabilities: (1 - q) log
pi_1 + q log pi_2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray

#: Standard deviation of what trained policies answer to a multiplier, in units of the slope that
#: theory gives.
SLOPE_ERROR = 0.25
#: Standard deviation within a prompt, in nats, of a tilt that may be dropped in one step.
SMALL_TILT_SD = 0.25
#: Units of cost; a measurement is not taken to be more exact.
_EXACT = 1e-6
#: On the curvature in units of its diagonal: two limits that say the same share their price.
_RIDGE = 1e-9


# --- one multiplier -------------------------------------------------------------------------------


def dual_gradient_step(lam: float, cost: float, limit: float, step_size: float) -> float:
    """lambda <- [lambda + eta (C - d)]_+, C-DPO (2403.02475).

    >>> dual_gradient_step(1.0, cost=0.5, limit=0.0, step_size=2.0)
    2.0
    >>> dual_gradient_step(1.0, cost=-2.0, limit=0.0, step_size=2.0)
    0.0
    """
    return max(0.0, lam + step_size * (cost - limit))


def projected_subgradient_step(
    lam: float, cost: float, limit: float, step_size: float, radius: float, lambda_min: float
) -> float:
    """lambda <- Proj_[lambda_min, 2 rho](lambda + eta (C - d)), PD-DPO (2510.05703, alg. 1).

    The paper's interval starts at 0, where its loss divides by zero; lambda_min > 0 keeps off it.

    >>> projected_subgradient_step(1.0, 0.5, 0.0, step_size=10.0, radius=2.0, lambda_min=0.1)
    4.0
    """
    return max(min(lam + step_size * (cost - limit), 2 * radius), lambda_min)


def newton_step(lam: float, cost: float, variance: float, limit: float, beta: float) -> float:
    """lambda <- [lambda + beta (C - d) / E_x Var(c|x)]_+ with the curvature of on-policy samples.

    >>> newton_step(1.0, cost=0.5, variance=0.25, limit=0.0, beta=0.5)
    2.0
    """
    return max(0.0, lam + beta * (cost - limit) / variance)


def tilt_step(
    lam: float,
    beta_eff: float | None,
    lam_eff: float | None,
    cost: float,
    variance: float,
    limit: float,
) -> float | None:
    """Newton's step on the effective multiplier, rescaled to the nominal one: lambda <- lambda
    lam_req / lam_eff.

    A policy trained at `lam` whose effective tilt is (beta_eff, lam_eff) has dC / dlam_eff = -V /
    beta_eff, so it needs lam_req = lam_eff + beta_eff (C - d) / V; and it answers to a command as
    lam_eff / lam did. A training that reaches its target exactly makes this `newton_step`. None
    where the policy has no effective multiplier above 0.

    A policy that was told 1 and reached half of that is told twice what it needs, 0.5 + 0.5 * 0.5 /
    0.5:

    >>> tilt_step(1.0, beta_eff=0.5, lam_eff=0.5, cost=0.5, variance=0.5, limit=0.0)
    2.0
    """
    if beta_eff is None or lam_eff is None or lam_eff <= 0 or variance <= 0:
        return None
    required = lam_eff + beta_eff * (cost - limit) / variance
    return max(0.0, lam * required / lam_eff)


def secant_step(
    previous: tuple[float, float], last: tuple[float, float], limit: float
) -> float | None:
    """The root of the line through two points (x, C); None where the line does not fall.

    >>> secant_step((0.0, 1.0), (1.0, 0.5), limit=0.0)
    2.0
    >>> secant_step((0.0, 0.5), (1.0, 1.0), limit=0.0) is None  # the cost rises
    True
    """
    (x0, c0), (x1, c1) = previous, last
    if x0 == x1 or (c1 - c0) / (x1 - x0) >= 0:
        return None
    return max(0.0, x1 + (limit - c1) * (x1 - x0) / (c1 - c0))


def line_root(
    lams: Sequence[float],
    costs: Sequence[float],
    errors: Sequence[float],
    slope: float,
    limit: float,
) -> float:
    """The root of the line C = a - s lambda through all steps, where theory says s = `slope` > 0
    beforehand.

    a and s minimise sum_k (C_k - a + s lambda_k)^2 / error_k^2 + (s - slope)^2 / (`SLOPE_ERROR`
    slope)^2. With one step it is Newton's; with steps far apart, or many, the regression of all of
    them, which averages multipliers in place of policies; steps that noise does not tell apart keep
    the slope of theory, where a secant would be thrown far off or stand still. A line that falls
    less than a quarter of that is not believed.

    >>> line_root([1.0], [0.5], [0.1], slope=0.5, limit=0.0)
    2.0
    >>> line_root([1.0, 3.0], [0.5, -0.5], [0.1, 0.1], slope=0.5, limit=0.0)
    2.0
    """
    x = np.asarray(lams, float)
    y = np.asarray(costs, float)
    weight = 1 / np.maximum(np.asarray(errors, float), _EXACT) ** 2
    centre = float(np.average(x, weights=weight))
    level = float(np.average(y, weights=weight))
    along = float(weight @ (x - centre) ** 2)
    across = float(weight @ ((x - centre) * (y - level)))
    prior = 1 / (SLOPE_ERROR * slope) ** 2
    fall = (prior * slope - across) / (prior + along)
    return max(0.0, centre + (level - limit) / max(fall, slope / 4))


def tail(lams: Sequence[float]) -> Sequence[float]:
    """The last half of the multipliers, the middle one included; PD-DPO's tail average is its mean.

    >>> tail([1.0, 2.0, 3.0, 4.0, 5.0])
    [3.0, 4.0, 5.0]
    """
    return lams[len(lams) // 2 :]


# --- several multipliers --------------------------------------------------------------------------


def joint_newton_step(lams: Array, excess: Array, covariance: Array, beta: float) -> Array:
    """argmin over lambda >= 0 of the dual's quadratic model at `lams`; shape [K], like `excess`.

    D(lambda + s) ~ D - s excess + s H s / 2 with excess_k = E[m_k (f_k - d_k)] and H = E_x Cov(f|x)
    / beta, the dual of `solve_many` on the policy's own answers; one limit makes it
    `newton_step`. With H = R'R it is the least squares |R lambda - (R lams + R^-T excess)| over
    lambda >= 0. A quantity that does not vary keeps its price. A price whose tilt lambda f / beta
    is no trifle falls by half at most: means are convex in prices, so that a step from above goes
    too far.

    >>> lams, excess = np.array([1.0, 0.5]), np.array([0.5, 0.0])
    >>> joint_newton_step(lams, excess, np.diag([0.25, 0.0]), beta=0.5).round(6).tolist()
    [2.0, 0.5]
    """
    scale = np.sqrt(np.diag(covariance) / beta)
    moves = scale > 0
    unit = np.where(moves, scale, 1.0)
    curvature = covariance / beta / np.outer(unit, unit) + _RIDGE * np.eye(len(unit))
    curvature[~moves, ~moves] = 1.0
    root = np.linalg.cholesky(curvature).T
    goal = root @ (lams * unit) + np.linalg.solve(root.T, np.where(moves, excess / unit, 0.0))
    tilt = lams * np.sqrt(np.diag(covariance)) / beta
    return np.maximum(nnls(root, goal)[0] / unit, np.where(tilt > SMALL_TILT_SD, lams / 2, 0.0))


# --- merge weights --------------------------------------------------------------------------------


def first_weight(
    lam_pool: float, lam_start: float, naive: bool, lam_reference: float = 0.0
) -> float:
    """The merge weight q >= 0 whose multiplier is that of the pool; inverts `merge_multiplier`.

    >>> first_weight(lam_pool=1.0, lam_start=4.0, naive=False), first_weight(1.0, 4.0, naive=True)
    (0.25, 0.2)
    """
    if naive:
        return lam_pool / (lam_pool + lam_start)
    return max(0.0, (lam_pool - lam_reference) / (lam_start - lam_reference))


def merge_multiplier(q: float, lam_start: float, naive: bool, lam_reference: float = 0.0) -> float:
    """The multiplier of a merge of weight q on the start, to first order (P-SACPO, 2404.11049).

    log pi = (1 - q) log pi_1 + q log pi_2. Where the start's tilt is (r - lambda c) / beta and the
    other's (r - lambda_1 c) / beta, lambda_1 = 0 for pi_r, the merge's is that of (1 - q) lambda_1
    + q lambda at the same beta. Where the start is safety DPO from pi_ref (a naive merge), the
    merge's tilt is ((1 - q) r - q lambda c) / beta: multiplier q lambda / (1 - q) at KL weight beta
    / (1 - q), for q < 1.

    >>> merge_multiplier(0.25, lam_start=4.0, naive=False), merge_multiplier(0.2, 4.0, naive=True)
    (1.0, 1.0)
    """
    return q * lam_start / (1 - q) if naive else (1 - q) * lam_reference + q * lam_start


def next_weight(
    points: Sequence[tuple[float, float]], limit: float, largest: float
) -> float | None:
    """The weight, at most `largest`, of the secant through the points (q, C) nearest to the limit.

    Where points lie on both sides of the limit and that secant leaves the interval between the
    nearest of each side, it is the one through these two. None where the line does not fall, or its
    root is a point already.

    >>> next_weight([(0.0, 1.0), (1.0, -1.0)], limit=0.5, largest=1.0)
    0.25
    """
    nearest = sorted(points, key=lambda point: abs(point[1] - limit))
    over = [point for point in nearest if point[1] > limit]
    under = [point for point in nearest if not point[1] > limit]
    root = secant_step(nearest[1], nearest[0], limit)
    if over and under and (root is None or not over[0][0] <= root <= under[0][0]):
        root = secant_step(over[0], under[0], limit)
    if root is None:
        return None
    weight = min(root, largest)
    return None if any(abs(weight - q) < 1e-3 for q, _ in points) else weight
