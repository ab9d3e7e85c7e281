"""The exact laboratory: every method on problems whose constrained optimum is known. Part (a),
tabular policies.

    python -m bench.exact                                         # exact data: where each loss and
    rule leads python -m bench.exact --pairs 200 --noise 0.3 --samples 16    # finite labels, noisy
    scores, partial coverage

A method is a row of one table: a loss, and a rule for the multiplier. Every policy is really
trained (`bench.tabular`); beside it stands the closed form that theory gives for its minimiser.
E[c] is measured by the cost model on the policy's exact distribution; the results are judged by r*
and c*."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, Literal

import torch
from torch import Tensor

from bench import options
from bench.losses import huber_difference_loss, squared_difference_loss
from bench.tabular import Laboratory, Settings, fit, tilt
from dualign.math import losses, updates
from dualign.training.policy_gradient import kl_weight, lagrangian_reward, log_lambda_step

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.exact"

_PATH = (0.25, 0.5, 1.0, 2.0)  # multiples of lambda* on the path
_GRID = (1.0, 2.0, 4.0, 10.0)  # SACPO's multipliers: beta / lambda of 0.1 to 0.01 at beta 0.1


# --- inner losses: the policy of a method at a multiplier -----------------------------------------

Train = Callable[[Laboratory, float], Tensor]
Steps = Sequence[tuple[float, Tensor]]


def _safety_dpo(lab: Laboratory, reference: Tensor, lam: float) -> Tensor:
    return lab.dpo(lab.safer, reference, lab.beta / lam)


def _sacpo(lab: Laboratory, lam: float) -> Tensor:
    return _safety_dpo(lab, lab.helpful, lam)


def _sacpo_swapped(lab: Laboratory, lam: float) -> Tensor:
    return lab.dpo(lab.more_helpful, _safety_dpo(lab, lab.reference, lam), lab.beta)


def _sacpo_ipo_dpo(lab: Laboratory, lam: float) -> Tensor:
    return _safety_dpo(lab, lab.helpful_ipo, lam)


def _sacpo_dpo_ipo(lab: Laboratory, lam: float) -> Tensor:
    return lab.ipo(lab.safer, lab.helpful, lab.beta / lam)


def _sacpo_kto_dpo(lab: Laboratory, lam: float) -> Tensor:
    return _safety_dpo(lab, lab.helpful_kto, lam)


def _sacpo_dpo_kto(lab: Laboratory, lam: float) -> Tensor:
    return lab.kto(*lab.safe_marks(), lab.helpful, lab.beta / lam)


def _p_sacpo(lab: Laboratory, lam: float) -> Tensor:
    """Logits merged at weight q = lambda / lambda-bar."""
    return torch.lerp(lab.helpful, lab.merge_end, lam / lab.settings.lambda_bar).log_softmax(1)


def _naive_merge(lab: Laboratory, lam: float) -> Tensor:
    """Logits of two independent policies merged at weight q = lambda / (lambda + lambda-bar)."""
    q = updates.first_weight(lam, lab.settings.lambda_bar, naive=True)
    return torch.lerp(lab.helpful, lab.safe_alone, q).log_softmax(1)


def _o_pd_dpo(lab: Laboratory, lam: float, steps: Steps = ()) -> Tensor:
    return lab.o_pd_dpo(lam, [policy for _, policy in steps])


def _o_pd_dpo_kept(lab: Laboratory, lam: float) -> Tensor:
    """Bonuses that no round lowers."""
    return lab.optimistic(lam, lab.helpful, lab.safer, lab.first_bonus, lab.first_bonus)


def _modpo(lab: Laboratory, lam: float) -> Tensor:
    margin = lab.beta * (lab.helpful - lab.reference)
    return lab.modpo(lab.safer, margin, lab.beta / (1 + lam), lam / (1 + lam))


def _folded(lab: Laboratory, lam: float) -> Tensor:
    return _safety_dpo(lab, losses.folded_reference(lab.reference, lab.seen_reward, lab.beta), lam)


def _by_score(lab: Laboratory, score: Tensor, beta: float) -> Tensor:
    """DPO on scored pairs, labelled by `score`."""
    return lab.dpo(lab.wins(score, lab.scored_pairs), lab.reference, beta)


def _c_dpo(lab: Laboratory, lam: float) -> Tensor:
    return _by_score(lab, lab.seen_reward - lam * lab.seen_cost, lab.beta)


def _c_dpo_normalised(lab: Laboratory, lam: float) -> Tensor:
    return _by_score(lab, (lab.seen_reward - lam * lab.seen_cost) / (1 + lam), lab.beta)


def _c_dpo_rescaled(lab: Laboratory, lam: float) -> Tensor:
    return _by_score(lab, (lab.seen_reward - lam * lab.seen_cost) / (1 + lam), lab.beta / (1 + lam))


def _pecan_as_coded(lab: Laboratory, lam: float) -> Tensor:
    reward, cost = lab.implicit
    return _by_score(lab, reward - lam * cost, lab.beta)


def _pecan(lab: Laboratory, lam: float) -> Tensor:
    reward, cost = lab.implicit
    return _by_score(lab, lab.beta * (reward - lam * cost), lab.beta)


def _safe_dpo(lab: Laboratory, lam: float) -> Tensor:
    return lab.safe_dpo()


def _policy_gradient(lab: Laboratory, lam: float, beta: float) -> Tensor:
    """Where the gradient of E[(r - lambda c) / (1 + lambda)] - beta KL vanishes; RLOO's samples
    estimate it.
    """
    score = torch.tensor(lagrangian_reward(lab.seen_reward.numpy(), lab.seen_cost.numpy(), lam))

    def loss(policy: Tensor) -> Tensor:
        return (policy.exp() * (beta * (policy - lab.reference) - score)).sum()

    return fit(loss, lab.reference)


def _safe_rlhf(lab: Laboratory, lam: float) -> Tensor:
    return _policy_gradient(lab, lam, kl_weight(lab.beta, lam))


def _safe_rlhf_kept(lab: Laboratory, lam: float) -> Tensor:
    return _policy_gradient(lab, lam, lab.beta)


def _squared(lab: Laboratory, lam: float) -> Tensor:
    return lab.lagrangian(lam, squared_difference_loss)


def _huber(lab: Laboratory, lam: float) -> Tensor:
    return lab.lagrangian(lam, huber_difference_loss)


def _anchor(lab: Laboratory, lam: float) -> Tensor:
    return lab.anchored(lam, 0.0)


def _ours(lab: Laboratory, lam: float) -> Tensor:
    return lab.anchored(lam, 1.0)


# --- predictions: what theory says the minimiser is, with exact data ------------------------------


def _optimal(lab: Laboratory, lam: float) -> Tensor:
    """pi_lambda."""
    return tilt(lab.reference, (lab.reward - lam * lab.cost) / lab.beta)


def _weaker(lab: Laboratory, lam: float) -> Tensor:
    """Normalised labels with plain beta: the KL weight is beta (1 + lambda)."""
    return tilt(lab.reference, (lab.reward - lam * lab.cost) / (lab.beta * (1 + lam)))


def _stronger(lab: Laboratory, lam: float) -> Tensor:
    """Labels of log-ratios without beta: the tilt is over-done by 1 / beta."""
    return tilt(lab.reference, (lab.reward - lam * lab.cost) / lab.beta**2)


def _diluted(lab: Laboratory, lam: float) -> Tensor:
    """A naive merge: lambda is right, but the KL weight is beta / (1 - q)."""
    share = 1 - updates.first_weight(lam, lab.settings.lambda_bar, naive=True)
    return tilt(lab.reference, share * (lab.reward - lam * lab.cost) / lab.beta)


def _hopeful(lab: Laboratory, lam: float) -> Tensor:
    """pi_ref exp((r + b - lambda (c - b)) / beta): bonuses that stay are part of the scores."""
    score = lab.reward + lab.first_bonus - lam * (lab.cost - lab.first_bonus)
    return tilt(lab.reference, score / lab.beta)


def _first_by_wins(lab: Laboratory, lam: float) -> Tensor:
    """IPO at step 1 tilts by the win rate of r."""
    return tilt(lab.reference, (lab.win_rate(lab.reward) - lam * lab.cost) / lab.beta)


def _second_by_wins(lab: Laboratory, lam: float) -> Tensor:
    """IPO at step 2 tilts by the win rate of -c."""
    return tilt(lab.reference, (lab.reward + lam * lab.win_rate(-lab.cost)) / lab.beta)


def _only_safe(lab: Laboratory, lam: float) -> Tensor:
    """pi_r on safe answers alone."""
    unsafe = torch.where(lab.cost > 0, -torch.inf, 0.0)
    return tilt(lab.reference, lab.reward / lab.beta + unsafe)


def _outvoted(good: Tensor, bad: Tensor) -> Tensor:
    """The answers that KTO empties: w_D good < w_U bad, where the prompt has a better one."""
    loses = good < bad * (good.sum() / bad.sum())
    return loses & ~loses.all(1, keepdim=True)


def _outvoted_helpful(lab: Laboratory) -> Tensor:
    wins = lab.more_helpful
    return _outvoted(wins.sum(2), wins.sum(1))


def _outvoted_safe(lab: Laboratory) -> Tensor:
    return _outvoted(*lab.safe_marks())


# --- rules: which multiplier first, and which next ------------------------------------------------

Next = Callable[[Laboratory, Steps], float | None]


@dataclass(frozen=True)
class Rule:
    """The first multiplier, and the next one from the steps so far, if any, unless E[c] is at the
    limit.
    """

    first: Callable[[Laboratory], float]
    next: Next | None = None


def _gradient(lab: Laboratory, steps: Steps) -> float:
    lam, policy = steps[-1]
    s = lab.settings
    return min(
        updates.dual_gradient_step(lam, lab.measure(policy)[0], lab.limit, s.step_size),
        s.lambda_max,
    )


def _projected(lab: Laboratory, steps: Steps) -> float:
    lam, policy = steps[-1]
    s = lab.settings
    cost = lab.measure(policy)[0]
    return updates.projected_subgradient_step(
        lam, cost, lab.limit, s.step_size, lab.radius, s.lambda_min
    )


def _newton(lab: Laboratory, steps: Steps) -> float:
    """Newton with the variance of the policy's own answers, then secants."""
    lam, policy = steps[-1]
    cost, variance = lab.measure(policy)
    proposed = updates.newton_step(lam, cost, variance, lab.limit, lab.beta)
    if len(steps) > 1:
        earlier = (steps[-2][0], lab.measure(steps[-2][1])[0])
        secant = updates.secant_step(earlier, (lam, cost), lab.limit)
        proposed = proposed if secant is None else secant
    return min(proposed, lab.settings.lambda_max)


def _ascent(lab: Laboratory, steps: Steps) -> float:
    lam, policy = steps[-1]
    s = lab.settings
    cost = lab.measure(policy)[0]
    return math.exp(
        log_lambda_step(math.log(lam), cost, lab.limit, s.ascent_rate, s.lambda_min, s.lambda_max)
    )


def _next_of_grid(lab: Laboratory, steps: Steps) -> float | None:
    return _GRID[len(steps)] if len(steps) < len(_GRID) else None


def _pool(lab: Laboratory) -> float:
    return lab.root(lab.seen_reward, lab.seen_cost)


def _pecan_pool(lab: Laboratory) -> float:
    reward, cost = lab.implicit
    return lab.root(lab.beta * reward, lab.beta * cost)


def _start(lab: Laboratory) -> float:
    return lab.settings.lambda_start


_GIVEN = Rule(lambda lab: lab.lam)
_NONE = Rule(lambda lab: 0.0)
_DUAL_GRADIENT = Rule(_start, _gradient)
_PROJECTED = Rule(_start, _projected)
_ONE_SHOT = Rule(_pool)
_PECAN = Rule(_pecan_pool)
_MULTI_SHOT = Rule(_pool, _gradient)
_NEWTON = Rule(_pool, _newton)
_ASCENT = Rule(lambda lab: lab.settings.ascent_start, _ascent)
_ON_GRID = Rule(lambda lab: _GRID[0], _next_of_grid)


# --- the table of methods -------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One published method, or ours. `predicted` is the minimiser at a multiplier, None where it
    has no closed form.

    `emptied` are answers that should lose all mass. `before` trainings are shared by all
    multipliers, `each` are done for every one. `returns`: the last policy, the mixture of all, or
    the best: the most rewarding one within the limit. `online` takes the place of `train` in a
    search: it also sees the policies before."""

    name: str
    title: str
    source: str
    train: Train
    rule: Rule
    predicted: Train | None = _optimal
    emptied: Callable[[Laboratory], Tensor] | None = None
    before: int = 0
    each: int = 1
    returns: Literal["last", "mixture", "best"] = "last"
    online: Callable[[Laboratory, float, Steps], Tensor] | None = None

    @property
    def claims(self) -> bool:
        """Whether it should reach pi_lambda* with exact data.

        A mixture gets there only with the number of rounds, and the best of a grid comes as near as
        the grid."""
        return self.predicted is _optimal and self.returns == "last"


_SACPO = "2404.11049"
_CAN = "2405.19544"
_CDPO = "2403.02475"
_PD = "2510.05703"
_OURS = "docs/methods.md"
_RLHF = "2310.12773"
METHODS = (
    Method("sacpo", "SACPO DPO(H) → DPO(S)", _SACPO, _sacpo, _GIVEN, before=1),
    Method("sacpo_swapped", "SACPO DPO(S) → DPO(H)", _SACPO, _sacpo_swapped, _GIVEN, each=2),
    Method(
        "sacpo_swapped_grid",
        "SACPO DPO(S) → DPO(H), best of λ = 1, 2, 4, 10",
        _SACPO,
        _sacpo_swapped,
        _ON_GRID,
        each=2,
        returns="best",
    ),
    Method(
        "sacpo_ipo_dpo",
        "SACPO IPO(H) → DPO(S)",
        _SACPO,
        _sacpo_ipo_dpo,
        _GIVEN,
        _first_by_wins,
        before=1,
    ),
    Method(
        "sacpo_dpo_ipo",
        "SACPO DPO(H) → IPO(S)",
        _SACPO,
        _sacpo_dpo_ipo,
        _GIVEN,
        _second_by_wins,
        before=1,
    ),
    Method(
        "sacpo_kto_dpo",
        "SACPO KTO(H) → DPO(S)",
        _SACPO,
        _sacpo_kto_dpo,
        _GIVEN,
        None,
        _outvoted_helpful,
        before=1,
    ),
    Method(
        "sacpo_dpo_kto",
        "SACPO DPO(H) → KTO(S)",
        _SACPO,
        _sacpo_dpo_kto,
        _GIVEN,
        None,
        _outvoted_safe,
        before=1,
    ),
    Method("p_sacpo", "P-SACPO", _SACPO, _p_sacpo, _NEWTON, before=2, each=0),
    Method(
        "naive_merge",
        "naive merge of DPO(H) and DPO(S)",
        _SACPO,
        _naive_merge,
        _NEWTON,
        _diluted,
        before=2,
        each=0,
    ),
    Method("modpo", "MODPO", "2310.03708", _modpo, _GIVEN, before=1),
    Method("c_dpo", "C-DPO", _CDPO, _c_dpo, _DUAL_GRADIENT),
    Method(
        "c_dpo_rescaled", "C-DPO, labels and β over 1 + λ", _CDPO, _c_dpo_rescaled, _DUAL_GRADIENT
    ),
    Method(
        "c_dpo_normalised",
        "C-DPO, labels over 1 + λ",
        _CDPO,
        _c_dpo_normalised,
        _DUAL_GRADIENT,
        _weaker,
    ),
    Method(
        "c_dpo_normalised_given",
        "C-DPO, labels over 1 + λ, at λ*",
        _CDPO,
        _c_dpo_normalised,
        _GIVEN,
        _weaker,
    ),
    Method("pd_dpo", "PD-DPO, last policy", _PD, _sacpo, _PROJECTED, before=1),
    Method(
        "pd_dpo_mixture", "PD-DPO, mixture", _PD, _sacpo, _PROJECTED, before=1, returns="mixture"
    ),
    Method("pd_dpo_folded", "PD-DPO, reward model in the reference", _PD, _folded, _PROJECTED),
    Method("o_pd_dpo", "O-PD-DPO", _PD, _o_pd_dpo, _PROJECTED, each=2, online=_o_pd_dpo),
    Method(
        "o_pd_dpo_kept",
        "O-PD-DPO, bonuses as after few pairs",
        _PD,
        _o_pd_dpo_kept,
        _PROJECTED,
        _hopeful,
        before=1,
    ),
    Method("mocan", "MoCAN", _CAN, _c_dpo, _ONE_SHOT),
    Method("pecan", "PeCAN, β in the labels", _CAN, _pecan, _PECAN, before=2),
    Method("pecan_as_coded", "PeCAN as coded", _CAN, _pecan_as_coded, _PECAN, _stronger, before=2),
    Method("caid", "CAID", "2505.19387", _c_dpo, _MULTI_SHOT),
    Method(
        "safe_dpo", "SafeDPO", "2505.20065", _safe_dpo, _NONE, _only_safe, lambda lab: lab.cost > 0
    ),
    Method("safe_rlhf", "Safe RLHF, β over 1 + λ", _RLHF, _safe_rlhf, _ASCENT, before=1, each=0),
    Method(
        "safe_rlhf_kept",
        "Safe RLHF, β kept",
        _RLHF,
        _safe_rlhf_kept,
        _ASCENT,
        _weaker,
        before=1,
        each=0,
    ),
    Method("squared", "ours, squared difference", _OURS, _squared, _NEWTON),
    Method("huber", "ours, Huber difference", _OURS, _huber, _NEWTON),
    Method("anchor", "ours, anchor alone", _OURS, _anchor, _NEWTON),
    Method("dualign", "ours, soft labels + anchor", _OURS, _ours, _NEWTON),
)


# --- measuring ------------------------------------------------------------------------------------


def run_rule(method: Method, lab: Laboratory) -> list[tuple[float, Tensor]]:
    """Train at the first multiplier and go on until E[c] is at the limit or the rounds are
    spent.
    """
    steps: list[tuple[float, Tensor]] = []
    lam: float | None = method.rule.first(lab)
    while lam is not None and len(steps) < lab.settings.rounds:
        steps.append(
            (lam, method.online(lab, lam, steps) if method.online else method.train(lab, lam))
        )
        met = abs(lab.measure(steps[-1][1])[0] - lab.limit) <= lab.settings.tolerance
        lam = None if met or method.rule.next is None else method.rule.next(lab, steps)
    return steps


def returned(method: Method, lab: Laboratory, steps: Steps) -> Steps:
    """The steps that make the policy of a search: the last one, all of them, or the best by the
    models' scores.
    """
    if method.returns == "mixture":
        return steps
    if method.returns == "last":
        return steps[-1:]
    within = [step for step in steps if lab.measure(step[1])[0] <= lab.limit]
    if not within:
        return [min(steps, key=lambda step: lab.measure(step[1])[0])]
    return [max(within, key=lambda step: float((step[1].exp() * lab.seen_reward).sum()))]


def mixture(policies: Sequence[Tensor]) -> Tensor:
    """log of the policy that first draws one of `policies` at random."""
    return torch.stack(list(policies)).logsumexp(0) - math.log(len(policies))


def against_optimum(lab: Laboratory, policy: Tensor) -> dict[str, float]:
    """J* - J, E[c*] - limit, and both in one: J* - J + lambda* (E[c*] - limit) = beta KL(pi ||
    pi*), never negative.
    """
    found = lab.problem.describe(policy.numpy())
    gap = lab.optimum - found["value"]
    excess = found["cost"] - lab.limit
    return {"gap": gap, "excess": excess, "distance": gap + lab.lam * excess}


def against_prediction(lab: Laboratory, policy: Tensor, predicted: Tensor) -> dict[str, float]:
    """The same two numbers of the predicted policy, and the largest difference of a probability."""
    expected = against_optimum(lab, predicted)
    deviation = float((policy.exp() - predicted.exp()).abs().max())
    return {
        "predicted_gap": expected["gap"],
        "predicted_excess": expected["excess"],
        "deviation": deviation,
    }


def shared_losses() -> dict[Train, list[Method]]:
    """The methods of each loss that depends on lambda: they differ in their rule alone, so they
    share a path.
    """
    groups: dict[Train, list[Method]] = {}
    for method in METHODS:
        if method.rule is not _NONE:
            groups.setdefault(method.train, []).append(method)
    return groups


def path(methods: Sequence[Method], lab: Laboratory) -> list[dict[str, Any]]:
    """The policies of one loss at fixed multiples of lambda*."""
    names = [method.name for method in methods]
    points = []
    for ratio in _PATH:
        lam = ratio * lab.lam
        policy = methods[0].train(lab, lam)
        point = {"methods": names, "ratio": ratio, "lam": lam, **against_optimum(lab, policy)}
        if methods[0].predicted:
            point |= against_prediction(lab, policy, methods[0].predicted(lab, lam))
        points.append(point)
    return points


def measure(method: Method, lab: Laboratory) -> dict[str, Any]:
    """One method on one problem."""
    steps = run_rule(method, lab)
    kept = returned(method, lab, steps)
    policy = mixture([policy for _, policy in kept])
    row: dict[str, Any] = {
        "method": method.name,
        "title": method.title,
        "source": method.source,
        "claims": method.claims,
        "lam": fmean(lam for lam, _ in kept),
        "lam_star": lab.lam,
        "trainings": method.before + method.each * len(steps),
        **against_optimum(lab, policy),
    }
    if method.predicted:
        row |= against_prediction(
            lab, policy, mixture([method.predicted(lab, lam) for lam, _ in kept])
        )
    if method.emptied:
        row["emptied"] = float((policy.exp() * method.emptied(lab)).sum(1).mean())
        row["emptied_reference"] = float((lab.reference.exp() * method.emptied(lab)).sum(1).mean())
    return row


def run(settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All methods, and the paths of all losses, on all seeds."""
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for seed in range(settings.seeds):
        lab = Laboratory(settings, seed)
        log.info(
            "problem %d: limit %.4f, lambda* %.4f, J* %.4f", seed, lab.limit, lab.lam, lab.optimum
        )
        rows += [{"seed": seed, **measure(method, lab)} for method in METHODS]
        points += [
            {"seed": seed, **point}
            for methods in shared_losses().values()
            for point in path(methods, lab)
        ]
    return rows, points


# --- report ---------------------------------------------------------------------------------------

_NOTES = """\
How to read it: numbers are means over the problems, ± their standard deviation. `J* − J` is what a
policy falls short
of the constrained optimum; it is negative where the policy buys reward by breaking the limit (`E[c]
− limit` above 0). `β KL to π*` is J* − J + λ* (E[c] − limit), both in one number. *Predicted* is
the closed form of the loss's minimiser with exact data at the same multipliers; *off by* is the
largest difference of any probability from it. A training is one policy trained to the end.

- SACPO and MODPO have no rule for λ: they are given the true λ*. SafeDPO has none. PD-DPO's mixture
  comes near the optimum only with the number of its rounds, so it is not held to it.
- The best of a grid is π_λ at the largest reward within the limit, as near to the optimum as the
grid has it.
- A naive merge of weight q has KL weight β / (1 − q): where it meets the limit it pays in J.
- O-PD-DPO's bonuses shrink as pairs are compared: with infinitely many it is PD-DPO. Bonuses that
  stay, as after the few of one round (`--fresh`), are part of the scores: it meets the limit, and
  pays in J. With a finite pool they lead to answers that no pair shows, which its rounds then
  compare. Its path below is its first round.
- Safe RLHF is a policy gradient on (r − λc) / (1 + λ), run to its stationary point at each λ: π_λ
  with KL weight β / (1 + λ), as here; with β kept, as published, the C-DPO of labels over 1 + λ. It
  is one training, which moves λ.
- IPO tilts by the win rate over the reference's answers, not by the reward, so a step of IPO is
another problem.
- C-DPO with labels of (r − λc) / (1 + λ) and plain β has KL weight β (1 + λ): at λ* it misses the
  limit, and where its own loop meets the limit it pays in J. With β / (1 + λ) too it is exact.
- PeCAN as coded labels by log-ratios without β, so its tilt is (r − λc) / β². With β in the labels
it is exact.
- SafeDPO solves another problem, no unsafe answer at all: π_r restricted to safe answers, wherever
the limit lies.
- KTO is no Bradley-Terry fit and its minimiser has no closed form, but answers that the (weighted)
majority marks
  undesirable are predicted to lose all their mass, however close the vote."""


def _cell(rows: Sequence[dict[str, Any]], key: str, digits: int = 4) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return "–"
    spread = f" ± {pstdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{_rounded(fmean(values), digits)}{spread}"


def _rounded(value: float, digits: int = 4) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0 turns -0 into 0


def _of(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each method, in the order of the table."""
    return [options.where(rows, method=method.name) for method in METHODS]


def results_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a method."""
    titles = ["method", "source", "J* − J", "E[c] − limit", "β KL to π*", "predicted J* − J"]
    titles += ["predicted E[c] − limit", "off by", "λ / λ*", "trainings"]
    lines = options.head(titles)
    for own in _of(rows):
        off = f"{max(row['deviation'] for row in own):.0e}" if "deviation" in own[0] else "–"
        ratio = [{"ratio": row["lam"] / row["lam_star"]} for row in own]
        cells = [
            own[0]["title"],
            own[0]["source"],
            *(_cell(own, key) for key in ("gap", "excess", "distance")),
        ]
        cells += [
            _cell(own, "predicted_gap"),
            _cell(own, "predicted_excess"),
            off,
            _cell(ratio, "ratio", 3),
            _cell(own, "trainings", 1),
        ]
        lines.append(options.line(cells))
    return lines


def path_table(points: Sequence[dict[str, Any]]) -> list[str]:
    """E[c] - limit (J* - J) at multiples of lambda*."""
    lines = options.head(["method", *(f"{ratio:g} λ*" for ratio in _PATH)])
    for methods in shared_losses().values():
        cells = ["; ".join(method.title for method in methods)]
        for ratio in _PATH:
            at = [p for p in points if p["ratio"] == ratio and methods[0].name in p["methods"]]
            cells.append(
                f"{_rounded(fmean(p['excess'] for p in at))}"
                f" ({_rounded(fmean(p['gap'] for p in at))})"
            )
        lines.append(options.line(cells))
    return lines


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The worst case of the methods that claim pi_lambda*, and the mass on answers predicted to
    lose it.
    """
    claimed = [row for row in rows if row["claims"]]
    gap = max(abs(row["gap"]) for row in claimed)
    excess = max(abs(row["excess"]) for row in claimed)
    lines = [
        f"Methods that claim π_λ*, worst of all problems: |J* − J| {gap:.1e}, |E[c] − limit|"
        f" {excess:.1e}."
    ]
    for own in _of(rows):
        if "emptied" in own[0]:
            mass = options.mean(own, "emptied")
            before = options.mean(own, "emptied_reference")
            lines.append(
                f"{own[0]['title']}, mass on answers predicted to lose it: {before:.3f} before,"
                f" {mass:.1e} after."
            )
    return lines


def report(
    settings: Settings, rows: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]
) -> str:
    """The page in markdown."""
    size = (
        f"{settings.seeds} problems of {settings.prompts} prompts × {settings.answers} answers, β ="
        f" {settings.beta:g}"
    )
    data = (
        f"pairs {settings.pairs}, score noise {settings.noise:g}, reference samples"
        f" {settings.samples} (0: exact)"
    )
    return options.page(
        "Tabular policies against the exact optimum",
        options.command(PROGRAM, settings),
        f"{size}; {data}.",
        "\n".join(results_table(rows)),
        "\n".join(f"- {line}" for line in findings(rows)),
        _NOTES,
        "## The path of λ",
        (
            "`E[c] − limit (J* − J)` at multiples of λ*. Methods of one loss differ in their rule"
            " alone."
        ),
        "\n".join(path_table(points)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the laboratory; write exact-tabular.json and exact-tabular.md, and the page to stdout."""
    settings, out = options.parse(Settings, PROGRAM, __doc__, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows, points = run(settings)
    page = report(settings, rows, points)
    options.tell(out, "exact-tabular", PROGRAM, settings, page, methods=rows, paths=points)


if __name__ == "__main__":
    main()
