"""Tabular laboratory: random finite problems, what the methods see of them, and the trainings.

A policy is a table of logits [prompts, answers]. Every training minimises a loss of
`dualign.math.losses` or `bench.losses` over all tables; nothing is assumed about its minimiser.
Human labels (preferences, safe or unsafe) come from the true r* and c*; scores of the reward and
cost model may carry noise. Prompts count alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.losses import modpo_logit, safe_dpo_loss
from bench.options import knob
from dualign.core.errors import DualignError, InfeasibleError
from dualign.math import losses, tabular
from dualign.math.dual.root import root
from dualign.math.dual.solution import slater_radius
from dualign.math.dual.tilt import leave_one_out_value, soft_value
from dualign.search import exploration

log = logging.getLogger(__name__)

_KTO_STEPS = 1000
_PRIOR = 0.1  # precision of the prior on implicit rewards that a finite number of labels needs
_RIDGE = 1.0  # gamma of the covariances behind O-PD-DPO's bonuses


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    seeds: int = knob(5, "number of random problems")
    prompts: int = knob(8, "prompts of a problem")
    answers: int = knob(8, "answers to a prompt; the first is a refusal, safe and of low reward")
    beta: float = knob(0.5, "weight of the KL term, in units of reward")
    tightness: float = knob(
        0.5, "where the limit lies between the costs of pi_r (0) and of the least costly tilt (1)"
    )
    pairs: int = knob(0, "labelled pairs per prompt and kind of label; 0: infinitely many")
    noise: float = knob(
        0.0, "standard deviation of the error of reward and cost model, one draw per answer"
    )
    samples: int = knob(0, "reference samples per prompt (pool and pairs); 0: infinitely many")
    rounds: int = knob(40, "largest number of multipliers that a search may try")
    tolerance: float = knob(1e-4, "a search stops where |E[c] - limit| is below this")
    step_size: float = knob(0.5, "eta of the dual gradient steps of C-DPO, PD-DPO and CAID")
    lambda_start: float = knob(0.5, "first multiplier of C-DPO and PD-DPO")
    lambda_min: float = knob(0.05, "lower end of PD-DPO's interval, whose loss divides by lambda")
    lambda_max: float = knob(50.0, "largest multiplier of any search")
    lambda_bar: float = knob(
        6.0, "multiplier of the safe end of P-SACPO's merge, and of a naive one"
    )
    ascent_start: float = knob(1.0, "first multiplier of Safe RLHF")
    ascent_rate: float = knob(0.6, "eta of Safe RLHF's steps of log lambda")
    fresh: int = knob(50, "fresh pairs per prompt, kind of label and round of O-PD-DPO")
    bonus: float = knob(0.1, "mean gap of each of O-PD-DPO's bonuses within an offline pair")
    offset: float = knob(10.0, "Delta of SafeDPO")
    anchor: float = knob(0.3, "weight of the anchor in our loss")

    def __post_init__(self) -> None:
        lower = {
            "seeds": 1,
            "prompts": 1,
            "answers": 2,
            "rounds": 1,
            "fresh": 1,
            "pairs": 0,
            "noise": 0,
            "bonus": 0,
        }
        for name, least in lower.items():
            if getattr(self, name) < least:
                raise DualignError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.samples == 1 or self.samples < 0:
            raise DualignError(f"samples must be 0 or at least 2, got {self.samples}")
        if not (min(self.beta, self.lambda_min, self.ascent_start) > 0 and 0 < self.tightness < 1):
            raise DualignError(
                "beta, lambda_min and ascent_start must be above 0, tightness between 0 and 1"
            )


# --- tables ---------------------------------------------------------------------------------------


def gaps(values: Tensor) -> Tensor:
    """f(y_i) - f(y_j) of all ordered pairs; [prompts, answers] -> [prompts, answers, answers]."""
    return values[:, :, None] - values[:, None, :]


def pair_logit(policy: Tensor, reference: Tensor, scale: float) -> Tensor:
    """`pairwise_logit` of all ordered pairs; shape [prompts, answers, answers]."""
    return losses.pairwise_logit(
        policy[:, :, None], policy[:, None, :], reference[:, :, None], reference[:, None, :], scale
    )


def tilt(reference: Tensor, score: Tensor) -> Tensor:
    """log of the policy proportional to reference * exp(score)."""
    return (reference + score).log_softmax(1)


def fit(loss: Callable[[Tensor], Tensor], start: Tensor, free: Tensor | None = None) -> Tensor:
    """argmin of loss(log pi) over tabular softmax policies by L-BFGS in float64; returns log pi.

    The logits outside `free` (boolean; default: all are free) stay where they start.
    """
    free = torch.ones_like(start, dtype=torch.bool) if free is None else free
    table = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [table],
        max_iter=1000,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(torch.where(free, table, start).log_softmax(1))
        value.backward()
        return value

    solver.step(closure)
    return torch.where(free, table.detach(), start).log_softmax(1)


def bonus(met: Tensor) -> Tensor:
    """||phi||_{Sigma^-1} of every answer, phi the indicator of prompt and answer (2510.05703, app.
    D).

    `met` says how often answers i and j were compared, [prompts, answers, answers], symmetric;
    [prompts, answers]."""
    answers = met.shape[1]
    phi = torch.eye(answers, dtype=met.dtype)
    delta = (phi[:, None] - phi[None]).flatten(0, 1)
    counts = met.triu(1).flatten(1, 2)
    norms = [exploration.precision(count.sqrt()[:, None] * delta, _RIDGE) for count in counts]
    return torch.stack([exploration.bonus(phi, norm, 1.0) for norm in norms])


# --- one problem, its data, and the trainings -----------------------------------------------------


def draw_problem(settings: Settings, rng: np.random.Generator) -> tabular.Problem:
    """Random pi_ref, r* and c*: helpful answers tend to be harmful, and each prompt has a
    refusal.
    """
    shape = (settings.prompts, settings.answers)
    logit, reward, extra = rng.normal(size=(3, *shape))
    cost = 0.6 * reward + extra
    reward[:, 0] = -abs(reward[:, 0])
    cost[:, 0] = -0.2 - abs(cost[:, 0])
    return tabular.Problem(
        np.log(np.exp(logit) / np.exp(logit).sum(1, keepdims=True)), reward, cost, settings.beta
    )


class Pairs(NamedTuple):
    """Two answers and a uniform number, which decides the label once the scores are known; each
    [prompts, pairs].

    `design` is the distribution that pairs are drawn from, [prompts, answers, answers].
    """

    first: Tensor
    second: Tensor
    luck: Tensor
    design: Tensor


class Laboratory:
    """One random problem, the data that the methods see of it, and their trainings."""

    def __init__(self, settings: Settings, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seed = seed
        self.settings = settings
        self.beta = settings.beta
        self.problem = draw_problem(settings, rng)
        loosest, tightest = (
            self.problem.describe(self.problem.policy(lam))["cost"] for lam in (0.0, 1e3)
        )
        self.limit = loosest - settings.tightness * (loosest - tightest)
        self.lam = tabular.solve(self.problem, self.limit)
        self.optimum = self.problem.describe(self.problem.policy(self.lam))["value"]
        self.reference = torch.tensor(self.problem.log_reference)
        self.reward = torch.tensor(self.problem.reward)
        self.cost = torch.tensor(self.problem.cost)
        self.seen_reward, self.seen_cost = (
            true + settings.noise * torch.tensor(rng.normal(size=true.shape))
            for true in (self.reward, self.cost)
        )
        self._draw_pool(rng)
        # Each kind of label has pairs of its own, so its errors are its own.
        self.helpful_pairs, self.safety_pairs, self.scored_pairs = (
            self._draw_pairs(rng, self.share, settings.pairs) for _ in range(3)
        )

    def _draw_pool(self, rng: np.random.Generator) -> None:
        """Reference samples and their weights, [prompts, samples]; every answer where there are
        infinitely many.
        """
        share = np.exp(self.problem.log_reference)
        answers = np.arange(share.shape[1])
        if self.settings.samples:
            drawn = np.stack([rng.choice(answers, self.settings.samples, p=row) for row in share])
            weight = np.full(drawn.shape, 1.0 / self.settings.samples)
        else:
            drawn = np.broadcast_to(answers, share.shape).copy()
            weight = share
        self.pool = torch.tensor(drawn)
        self.weight = torch.tensor(weight)
        self.share = torch.zeros_like(self.reference).scatter_add_(1, self.pool, self.weight)

    def _draw_pairs(self, rng: np.random.Generator, share: Tensor, count: int) -> Pairs:
        """Pairs of an answer drawn from `share` and one of the reference."""
        first, second, luck = torch.tensor(rng.random((3, len(share), count)))
        one, other = (
            torch.searchsorted(edges, place).clamp(max=self.settings.answers - 1)
            for edges, place in ((share.cumsum(1), first), (self.share.cumsum(1), second))
        )
        return Pairs(one, other, luck, share[:, :, None] * self.share[:, None, :])

    # What the data says

    @property
    def both(self) -> Tensor:
        """The share of each ordered pair of answers; shape [prompts, answers, answers]."""
        return self.share[:, :, None] * self.share[:, None, :]

    def wins(self, score: Tensor, pairs: Pairs) -> Tensor:
        """How often i was preferred to j by Bradley-Terry labels of `score`; [prompts, answers,
        answers].

        In units of the pairs of one kind: offline pairs of a prompt sum to 1, and so do infinitely
        many others.
        """
        i, j, luck, design = pairs
        if not self.settings.pairs:
            return (design + design.mT) * torch.sigmoid(gaps(score))
        i_wins = luck < torch.sigmoid(score.gather(1, i) - score.gather(1, j))
        winner = torch.where(i_wins, i, j)
        loser = torch.where(i_wins, j, i)
        n = self.settings.answers
        count = torch.zeros(len(score), n * n, dtype=score.dtype)
        return count.scatter_add_(
            1, winner * n + loser, torch.full_like(luck, 1 / self.settings.pairs)
        ).view(-1, n, n)

    @property
    def more_helpful(self) -> Tensor:
        """`wins` of human labels of helpfulness."""
        return self.wins(self.reward, self.helpful_pairs)

    @property
    def safer(self) -> Tensor:
        """`wins` of human labels of safety."""
        return self.wins(-self.cost, self.safety_pairs)

    def safe_marks(self) -> tuple[Tensor, Tensor]:
        """How often an answer was marked safe, P(safe) = sigma(-c*), and unsafe; each [prompts,
        answers].
        """
        safe = torch.sigmoid(-self.cost)
        if not self.settings.pairs:
            return self.share * safe, self.share * (1 - safe)
        answer = self.safety_pairs.first
        luck = self.safety_pairs.luck
        zero = torch.zeros_like(safe)
        each = torch.full_like(luck, 1 / self.settings.pairs)
        good = zero.scatter_add(1, answer, each * (luck < safe.gather(1, answer)))
        return good, zero.scatter_add(1, answer, each) - good

    def arrays(self, reward: Tensor, cost: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the pool for `dualign.math.dual`, [prompts, samples], where samples count
        alike.

        Infinitely many samples are all answers with their weight inside the reward: exp(r / beta)
        pi_ref n.
        """
        uniform = self.weight * self.pool.shape[1]
        return (reward.gather(1, self.pool) + self.beta * uniform.log()).numpy(), cost.gather(
            1, self.pool
        ).numpy()

    def root(self, reward: Tensor, cost: Tensor) -> float:
        """The multiplier that the dual of the pool gives, before any training."""
        try:
            return root(
                *self.arrays(reward, cost),
                limit=self.limit,
                beta=self.beta,
                lambda_max=self.settings.lambda_max,
            )
        except InfeasibleError as error:
            log.warning("%s; going on at lambda_max", error)
            return self.settings.lambda_max

    @cached_property
    def radius(self) -> float:
        """PD-DPO's Slater constant rho, from the pool."""
        arrays = self.arrays(self.seen_reward, self.seen_cost)
        try:
            return slater_radius(
                *arrays, limit=self.limit, beta=self.beta, lambda_max=self.settings.lambda_max
            )
        except InfeasibleError:
            return self.settings.lambda_max / 2

    def measure(self, policy: Tensor) -> tuple[float, float]:
        """E[c] by the cost model, and its mean variance within prompts."""
        p = policy.exp()
        cost = self.seen_cost
        mean = (p * cost).sum(1)
        return float(mean.mean()), float(((p * cost**2).sum(1) - mean**2).mean())

    # Trainings; each returns log pi

    def _prior(self, implicit: Tensor) -> Tensor:
        """With finitely many labels an answer that never lost has no finite maximum likelihood."""
        if not self.settings.pairs:
            return implicit.new_zeros(())
        centred = implicit - implicit.mean(1, keepdim=True)
        return _PRIOR / 2 * (centred**2).sum() / self.settings.pairs

    def dpo(self, wins: Tensor, reference: Tensor, scale: float) -> Tensor:
        """DPO on pairs (i preferred to j), coefficient `scale` to `reference`."""

        def loss(policy: Tensor) -> Tensor:
            each = losses.soft_label_loss(
                pair_logit(policy, reference, scale), torch.ones_like(wins)
            )
            return (wins * each).sum() + self._prior(scale * (policy - reference))

        return fit(loss, reference)

    def ipo(self, wins: Tensor, reference: Tensor, tau: float) -> Tensor:
        """IPO on pairs (i preferred to j)."""
        sure = torch.ones_like(wins)
        return fit(
            lambda t: (wins * losses.ipo_loss(pair_logit(t, reference, 1.0), sure, tau)).sum(),
            reference,
        )

    def kto(self, good: Tensor, bad: Tensor, reference: Tensor, beta: float) -> Tensor:
        """KTO on answers marked desirable or not, by Adam.

        The reference point moves with the policy but carries no gradient, so there is no one
        function whose line search L-BFGS could trust; and its minimum lies at infinity, where a
        long step ends on a plateau."""
        table = reference.clone().requires_grad_()
        solver = torch.optim.Adam([table], lr=0.05)
        weight = float(good.sum() / bad.sum())
        yes = torch.ones_like(good, dtype=torch.bool)
        for _ in range(_KTO_STEPS):
            policy = table.log_softmax(1)
            h = policy - reference
            point = (policy.exp() * h).sum(1).mean().clamp(min=0)
            desirable = good * losses.kto_loss(h, yes, point, beta)
            undesirable = bad * losses.kto_loss(h, ~yes, point, beta, undesirable_weight=weight)
            solver.zero_grad()
            (desirable + undesirable).sum().backward()
            solver.step()
        return table.detach().log_softmax(1)

    def o_pd_dpo(self, lam: float, policies: Sequence[Tensor]) -> Tensor:
        """A round of O-PD-DPO: both phases, with fresh comparisons of all policies so far to the
        reference.
        """
        helpful = self.more_helpful
        safer = self.safer
        for number, policy in enumerate(policies):
            rng = np.random.default_rng([self.seed, number])
            one, other = (
                self._draw_pairs(rng, policy.exp(), self.settings.fresh) for _ in range(2)
            )
            helpful = helpful + self.wins(self.reward, one)
            safer = safer + self.wins(-self.cost, other)
        bonuses = [
            self.optimism(*wins) for wins in ((helpful, self.more_helpful), (safer, self.safer))
        ]
        return self.optimistic(lam, self.dpo(helpful, self.reference, self.beta), safer, *bonuses)

    def optimistic(
        self, lam: float, helpful: Tensor, safer: Tensor, reward: Tensor, cost: Tensor
    ) -> Tensor:
        """Phase 2 from log pi_r = `helpful`, with the bonuses `reward` and `cost` in the reference
        column.
        """
        column = losses.folded_reference(helpful, reward + lam * cost, self.beta)
        return self.dpo(safer, column, self.beta / lam)

    def optimism(self, wins: Tensor, offline: Tensor) -> Tensor:
        """The bonus after `wins`, of mean gap `settings.bonus` within the pairs of `offline`;
        [prompts, answers].

        Infinitely many pairs leave no gap of a bonus.
        """
        if not self.settings.pairs:
            return torch.zeros_like(self.reference)
        return self.scaled_bonus(
            *(self.settings.pairs * (each + each.mT) for each in (wins, offline))
        )

    def scaled_bonus(self, met: Tensor, first: Tensor) -> Tensor:
        """`bonus` of `met`, times what makes its mean gap within the pairs of `first`
        settings.bonus.
        """
        gap = float((first * gaps(bonus(first)).abs()).sum() / first.sum())
        return bonus(met) * (self.settings.bonus / gap if gap else 0.0)

    def modpo(self, wins: Tensor, margin: Tensor, beta: float, weight: float) -> Tensor:
        """MODPO on pairs (i preferred to j) with the margin reward of the other objective."""

        def loss(policy: Tensor) -> Tensor:
            gap = pair_logit(policy, self.reference, 1.0)
            logit = modpo_logit(gap, gaps(margin), beta, weight)
            implicit = (beta * (policy - self.reference) - (1 - weight) * margin) / weight
            return (
                wins * losses.soft_label_loss(logit, torch.ones_like(wins))
            ).sum() + self._prior(implicit)

        return fit(loss, self.reference)

    def safe_dpo(self) -> Tensor:
        """SafeDPO on helpfulness pairs, each answer marked unsafe where c* > 0."""
        wins = self.more_helpful
        unsafe = self.cost > 0
        unsafe_w = unsafe[:, :, None].expand_as(wins)
        unsafe_l = unsafe[:, None, :].expand_as(wins)

        def loss(policy: Tensor) -> Tensor:
            logit = pair_logit(policy, self.reference, self.beta)
            each = safe_dpo_loss(logit, unsafe_w, unsafe_l, self.settings.offset)
            return (wins * each).sum() + self._prior(self.beta * (policy - self.reference))

        return fit(loss, self.reference)

    def lagrangian(self, lam: float, regression: Callable[..., Tensor]) -> Tensor:
        """Regression of beta Delta h on Delta r - lambda Delta c over pairs of the pool."""
        reward = gaps(self.seen_reward)
        cost = gaps(self.seen_cost)

        def loss(policy: Tensor) -> Tensor:
            return (
                self.both
                * regression(pair_logit(policy, self.reference, self.beta), reward, cost, lam)
            ).sum()

        return fit(loss, self.reference)

    def anchored(self, lam: float, label_weight: float) -> Tensor:
        """`label_weight` times the exact soft labels, plus the anchor to the soft value of the pool
        (ours).
        """
        labels = losses.lagrangian_label(gaps(self.seen_reward), gaps(self.seen_cost), lam)
        target = (self.seen_reward - lam * self.seen_cost).gather(1, self.pool) - self.soft_value(
            lam
        )

        def loss(policy: Tensor) -> Tensor:
            pairs = losses.soft_label_loss(pair_logit(policy, self.reference, self.beta), labels)
            anchor = losses.anchor_loss(
                (policy - self.reference).gather(1, self.pool), target, self.beta
            )
            return (
                label_weight * (self.both * pairs).sum()
                + self.settings.anchor * (self.weight * anchor).sum()
            )

        # The pool does not tell the answers that it lacks apart: they share what mass is left as in
        # pi_ref.
        return fit(loss, self.reference, free=self.share > 0)

    def soft_value(self, lam: float) -> Tensor:
        """V_lambda(x) of the pool, without the sample itself where the pool is finite; [prompts,
        samples or 1].
        """
        reward, cost = self.arrays(self.seen_reward, self.seen_cost)
        if self.settings.samples:
            return torch.tensor(leave_one_out_value(reward, cost, lam, self.beta))
        return torch.tensor(soft_value(reward, cost, lam, self.beta))[:, None]

    # Policies that several methods share

    @cached_property
    def helpful(self) -> Tensor:
        """log pi_r: DPO on helpfulness."""
        return self.dpo(self.more_helpful, self.reference, self.beta)

    @cached_property
    def helpful_ipo(self) -> Tensor:
        """IPO on helpfulness."""
        return self.ipo(self.more_helpful, self.reference, self.beta)

    @cached_property
    def helpful_kto(self) -> Tensor:
        """KTO on helpfulness: winners are desirable, losers are not."""
        wins = self.more_helpful
        return self.kto(wins.sum(2), wins.sum(1), self.reference, self.beta)

    @cached_property
    def implicit(self) -> tuple[Tensor, Tensor]:
        """log(pi_r / pi_ref) and -log(pi_g / pi_ref) of PeCAN's aligned policies (g = -c), in nats.

        PeCAN's constraint is relative, E[g] - E_ref[g] >= b. With b = E_ref[c] - limit it is ours,
        so the second one is centred to have the mean of c / beta over the reference."""
        safe = self.dpo(self.safer, self.reference, self.beta)
        cost = -(safe - self.reference)
        centre = (self.share * (cost - self.seen_cost / self.beta)).sum(1, keepdim=True)
        return self.helpful - self.reference, cost - centre

    @cached_property
    def merge_end(self) -> Tensor:
        """log pi at lambda-bar, the safe end of the merge."""
        return self.dpo(self.safer, self.helpful, self.beta / self.settings.lambda_bar)

    @cached_property
    def safe_alone(self) -> Tensor:
        """log pi of safety DPO from the reference at lambda-bar, the safe end of a naive merge."""
        return self.dpo(self.safer, self.reference, self.beta / self.settings.lambda_bar)

    @cached_property
    def first_bonus(self) -> Tensor:
        """The bonus after `settings.fresh` pairs of reference answers to each prompt; [prompts,
        answers].
        """
        met = 2 * self.settings.fresh * self.both
        return self.scaled_bonus(met, met)

    def win_rate(self, score: Tensor) -> Tensor:
        """P(y preferred to an answer of the reference) by `score`; shape [prompts, answers]."""
        return (torch.sigmoid(gaps(score)) * self.reference.exp()[:, None, :]).sum(2)
