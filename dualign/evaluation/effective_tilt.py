"""The tilt that a policy has, read off its log-probabilities of reference samples.

The optimum at multiplier lambda is log(pi / pi_ref) = (r - lambda c) / beta - log Z(x). So, within
each prompt, the log-ratio of any policy may be regressed on the scores and on the length of the
answers,

    log(pi / pi_ref) = r / beta_eff - c lambda_eff / beta_eff + s length + a level for each prompt +
    the rest,

which tells what a training reached (beta_eff, lambda_eff), whether it bought length besides (s,
nats a token), and how much of the policy is such a tilt at all (R^2). All arrays have shape
[prompts, samples]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dualign.core.schema import by_prompt

Array = np.ndarray

#: Samples of each pool prompt that a tilt is read off: a forward pass over a part of the pool.
TILT_SAMPLES = 4
#: Nats. Log-ratios that vary less are the rounding of a policy that is the reference itself.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Tilt:
    """The regression of a policy's log-ratios. A slope is in nats a unit of score or a token.

    `beta_eff` is 1 / reward_slope and `lam_eff` is -cost_slope / reward_slope; None where the
    policy does not tilt towards reward. `*_se` are standard errors clustered by prompt. For a
    policy equal to the reference all slopes are 0 and `r2` is None."""

    reward_slope: float
    cost_slope: float
    length_slope: float
    reward_slope_se: float
    cost_slope_se: float
    length_slope_se: float
    beta_eff: float | None
    beta_eff_se: float | None
    lam_eff: float | None
    lam_eff_se: float | None
    r2: float | None


def effective_tilt(log_ratio: Array, reward: Array, cost: Array, length: Array) -> Tilt:
    """A policy's effective tilt on reference samples, all of shape [prompts, samples >= 2].

    Least squares of values centred within prompts. The covariance of the slopes is the sandwich
    with one block for each prompt, times prompts / (prompts - 1): answers to a prompt are alike,
    and the residuals are not of one size. That of beta_eff and lam_eff follows by the delta method.
    Where two of the scores move together (all answers of one length, say) the smallest slopes that
    fit are given. Raises ValueError on arrays of another shape or a value not finite."""
    table = np.stack([np.asarray(values, float) for values in (log_ratio, reward, cost, length)])
    if table.ndim != 3 or table.shape[2] < 2 or table.shape[1] < 2:
        raise ValueError(f"need [prompts >= 2, samples >= 2], got {table.shape[1:]}")
    if not np.isfinite(table).all():
        raise ValueError("log-ratios, rewards, costs and lengths must be finite")
    y, *columns = table - table.mean(2, keepdims=True)
    x = np.stack(columns, -1)  # [prompts, samples, 3]
    bread = np.linalg.pinv(np.einsum("pnj,pnk->jk", x, x), rcond=1e-12, hermitian=True)
    slopes = bread @ np.einsum("pnj,pn->j", x, y)
    residual = y - x @ slopes
    score = np.einsum("pnj,pn->pj", x, residual)
    covariance = bread @ (score.T @ score) @ bread * len(y) / (len(y) - 1)
    total = float((y**2).sum())
    if total <= y.size * _ROUNDING**2:
        return _tilt(np.zeros(3), np.zeros((3, 3)), None)
    return _tilt(slopes, covariance, 1 - float((residual**2).sum()) / total)


def tilt_on(samples: pd.DataFrame, log_ratio: Array) -> Tilt:
    """The effective tilt on a POOL table; `log_ratio` is log(pi / pi_ref) of its rows."""
    reward, cost, length = (by_prompt(samples, name) for name in ("reward", "cost", "length"))
    return effective_tilt(np.reshape(log_ratio, reward.shape), reward, cost, length)


def _tilt(slopes: Array, covariance: Array, r2: float | None) -> Tilt:
    """Slopes and, by the delta method, beta_eff = 1 / a, lam_eff = -b / a (a of r, b of c)."""
    a, b, length = map(float, slopes)
    errors = [float(error) for error in np.sqrt(np.maximum(np.diag(covariance), 0))]
    known = (a, b, length, errors[0], errors[1], errors[2])
    if a <= 0:
        return Tilt(*known, None, None, None, None, r2)
    gradient = np.array([b / a**2, -1 / a])
    lam_error = math.sqrt(max(0.0, float(gradient @ covariance[:2, :2] @ gradient)))
    return Tilt(*known, 1 / a, errors[0] / a**2, -b / a, lam_error, r2)
