"""What a search needs done: train a policy, merge or mix policies, measure one on its own
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualign.core.artifacts import listed, read_json, replacing, write_json, write_parquet
from dualign.core.errors import ParamsError
from dualign.core.schema import ANSWERS, POOL, SAFETY_PAIRS, SCORED_PAIRS, by_prompt, read_table
from dualign.data.labelling import compare, log_odds, vote
from dualign.evaluation.effective_tilt import TILT_SAMPLES, Tilt, tilt_on
from dualign.evaluation.rollout import Scorers, log_ratios, measure, roll_out
from dualign.evaluation.stats import Measurement, clustered_mean
from dualign.lm.merge import merge
from dualign.lm.mixture import policy_at, write_mixture
from dualign.lm.models import load_policy, save, with_lora
from dualign.lm.tokens import answer_lengths
from dualign.math.constraints import Price, with_priced_rewards
from dualign.math.dual.tilt import soft_value
from dualign.math.losses import lagrangian_scale
from dualign.methods import Plan
from dualign.params.base import Resources, TrainingParams
from dualign.params.search import DualSearchParams
from dualign.params.training import PairLossParams
from dualign.scoring.support import Doubt, doubt, doubted
from dualign.search.additional import measure_additional
from dualign.search.online import (
    Bonuses,
    Exploration,
    Preferences,
    collect,
    phase_one,
    phase_two,
    preference_tables,
    union,
)
from dualign.search.rules import Ascent, Step
from dualign.search.screening import Screening, off_policy_cost
from dualign.training.pairs import (
    lagrangian_pairs,
    pool_pairs,
    pool_values,
    rows_within_budget,
    safety_training_pairs,
    samples_of,
)
from dualign.training.pairwise import Pair, PairLossConfig, train_pairwise
from dualign.training.policy_gradient import PolicyGradient, train_policy_gradient
from dualign.training.run import Job, Model

#: pairs at a multiplier, given the step's folder and the step before; and the pair loss at that
#: multiplier
PairSource = Callable[[float, Path, Step], list[Pair]]
InnerAt = Callable[[float], PairLossConfig]

#: Rows of an ascent's history at most: what a chart can show.
_HISTORY_ROWS = 50
#: What the file of a training's losses, beside its policy, is named after it.
_LOSSES = "-losses.json"


@dataclass(frozen=True)
class Inputs:
    """Folders that a search reads."""

    models: Path = Path("models")
    prepared: Path = Path("data/prepared")
    scored: Path = Path("data/scored")


class ModelBackend:
    """Implements `dualign.search.SearchBackend` on models; every step has its own folder in
    `scratch`.

    `pair_loss` holds the weights of the Lagrangian loss; None means safety pairs at coefficient
    beta / lambda, with `loss` the options of that loss. `reward_clip` bounds the implicit rewards
    of pi_r where a round trains it. Additional constraints are measured on every policy, and their
    `prices` charged to the rewards that a Lagrangian loss reads."""

    def __init__(
        self,
        plan: Plan,
        params: DualSearchParams,
        resources: Resources,
        pair_loss: PairLossParams | None,
        prompts: pd.DataFrame,
        scratch: Path,
        inputs: Inputs | None = None,
        loss: dict[str, Any] | None = None,
        reward_clip: float | None = None,
        prices: Sequence[Price] = (),
    ) -> None:
        self._plan, self._method, self._params, self._resources = (
            plan,
            plan.method,
            params,
            resources,
        )
        self._loss, self._reward_clip, self._prices = loss or {}, reward_clip, list(prices)
        self._weights, self._prompts, self._scratch, self._inputs = (
            pair_loss,
            prompts,
            scratch,
            inputs or Inputs(),
        )
        self._scorers = Scorers.load(resources, self._inputs.models)
        if self._method.inner != "policy_gradient":
            self._pairs, self._inner = self._sources()

    @property
    def start(self) -> str:
        """The folder of the policy at the first multiplier."""
        return str(self._inputs.models / self._plan.start)

    @property
    def _reference(self) -> str:
        """The folder of the policy that the start is merged with."""
        return str(self._inputs.models / self._plan.reference)

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        """Train at `lam` from the reference, or from the policy before for a warm-started method.

        `prices` of additional constraints stay what they are, for tilts too, until another training
        changes them."""
        if prices is not None:
            self._prices = [
                replace(old, lam=new) for old, new in zip(self._prices, prices, strict=True)
            ]
        out = self._folder(step) / "policy"
        if not out.is_dir():  # or it was trained before an interruption
            pairs = self._pairs(lam, self._folder(step), warm)
            begin = Path(warm.policy) if self._method.warm else self._helpful(step)
            self._fit(begin, pairs, self._inner(lam), self._params.seed + step, out)
        return str(out)

    def ascend(self, step: int) -> Ascent:
        """Train by the policy gradient on all prompts of the pool, from the start."""
        out, history = self._folder(step) / "policy", self._folder(step) / "history.json"
        if not out.is_dir():
            seed = self._params.seed + step
            policy = self._adaptable(Path(self.start), seed)
            job = Job(
                self._gradient_training(),
                self._resources,
                out.with_name("policy-checkpoints"),
                seed,
            )
            pool, scorers = self._pool.drop_duplicates("prompt_id"), self._scorers
            found = train_policy_gradient(
                policy,
                scorers.tokenizer,
                pool["prompt"].tolist(),
                scorers.reward,
                scorers.cost,
                self._gradient(),
                job,
            )
            write_json(
                history,
                {
                    "lam": found["lambda"],
                    "tokens": found["generated_tokens"],
                    "history": found["history"],
                },
            )
            self._save(policy, out, found["losses"])
        made = read_json(history)
        return Ascent(str(out), made["lam"], downsample(made["history"], _HISTORY_ROWS))

    def merge(self, step: int, q: float) -> str:
        """(1 - q) reference + q start, in weight space."""
        return self.blend(step, self._reference, self.start, q)

    def blend(self, step: int, first: str, second: str, weight: float) -> str:
        """(1 - weight) first + weight second, in weight space."""
        return self._merged(first, second, weight, self._folder(step) / "policy")

    def screen(self, q: float) -> Screening:
        """The cost of the merge of weight q by importance weights on the whole pool."""
        ratio = self._pool_ratio(
            self._merged(self._reference, self.start, q, self._scratch / "screened"), self._pool
        )
        return Screening(q, *off_policy_cost(ratio, by_prompt(self._scored_pool, "cost")))

    @staticmethod
    def _merged(first: str, second: str, weight: float, out: Path) -> str:
        merge(Path(first), Path(second), weight, out)
        return str(out)

    def mix(self, step: int, steps: Sequence[Step]) -> str:
        """The policies of all steps in equal parts."""
        out = self._folder(step) / "policy"
        with replacing(out) as temporary:
            write_mixture([s.policy for s in steps], [s.lam for s in steps], temporary)
        return str(out)

    def measure(self, step: int, policy: str) -> Measurement:
        """On-policy estimates on the search prompts, and what the policy's own training took in
        tokens and comparisons.

        The answers are kept, since people may be asked about them before the search can go on.
        """
        path = self._folder(step) / "answers.parquet"
        if not path.is_file():
            params = self._params
            write_parquet(
                path,
                self._roll_out(policy, self._prompts, params.samples_per_prompt, params.seed),
                ANSWERS,
            )
        answers = read_table(path, ANSWERS)
        measured, (tokens, comparisons) = measure(answers), self._spent(self._folder(step))
        additional, covariance = measure_additional(
            answers, [price.constraint for price in self._prices]
        )
        measured = replace(
            measured,
            generated_tokens=measured.generated_tokens + tokens,
            comparisons=comparisons,
            additional=additional,
            covariance=covariance,
        )
        return (
            self._by_feedback(measured, answers, step)
            if self._method.cost == "feedback"
            else measured
        )

    def losses(self, steps: int) -> list[dict[str, Any]]:
        """The loss of every training of the first `steps` steps; `training` is its folder, such as
        step-1/policy.
        """
        found = [
            path for step in range(steps) for path in listed(self._folder(step), f"*{_LOSSES}")
        ]
        names = [path.relative_to(self._scratch).as_posix().removesuffix(_LOSSES) for path in found]
        tables = zip(names, map(read_json, found), strict=True)
        return [{"training": name, **row} for name, rows in tables for row in rows]

    def tilt(self, policy: str) -> Tilt:
        """The effective tilt of a policy on the first samples of every pool prompt."""
        few = self._pool[self._pool["sample"] < TILT_SAMPLES]
        return tilt_on(few, self._pool_ratio(policy, few))

    def _pool_ratio(self, policy: str, samples: pd.DataFrame) -> np.ndarray:
        """log(pi / pi_ref) of pool samples; shape [prompts, samples]."""
        ratios = log_ratios(policy_at(policy, self._resources), samples, self._scorers)
        return ratios.reshape(samples["prompt_id"].nunique(), -1)

    @property
    def _pool(self) -> pd.DataFrame:
        """The pool as a training reads it: with pessimistic scores, and prices of additional
        constraints in its rewards."""
        return self._priced(self._scored_pool)

    @cached_property
    def _scored_pool(self) -> pd.DataFrame:
        return read_table(self._inputs.scored / "pool.parquet", POOL)

    @staticmethod
    def _spent(folder: Path) -> tuple[int, int]:
        """Tokens generated and pairs compared for the training of a step."""
        refresh, history, fresh = (
            folder / "refresh.parquet",
            folder / "history.json",
            folder / "fresh",
        )
        tokens = int(read_table(refresh, ANSWERS)["length"].sum()) if refresh.is_file() else 0
        tokens += read_json(history)["tokens"] if history.is_file() else 0
        return tokens, len(Preferences.read(fresh).helpful) if fresh.is_dir() else 0

    def _by_feedback(self, measured: Measurement, answers: pd.DataFrame, step: int) -> Measurement:
        """The cost by labels of the answers to the first prompts: the mean log-odds of their votes,
        by prompt.
        """
        options = self._params.feedback
        assert options is not None  # `methods.plan` saw to it, here and below
        asked = answers[answers["prompt_id"].isin(self._prompts["prompt_id"].head(options.prompts))]
        seed = self._params.seed + step
        votes = vote(
            asked,
            source=options.source,
            count=options.labels,
            folder=Path(options.folder),
            seed=seed,
        )
        odds = log_odds(votes, options.labels, options.smoothing)
        cost = clustered_mean(odds, asked["prompt_id"].to_numpy())
        return replace(
            measured, cost=cost.mean, cost_se=cost.error, labels=options.labels * len(asked),
            model_cost=measured.cost, model_cost_se=measured.cost_se,
        )  # fmt: skip

    def _folder(self, step: int) -> Path:
        folder = self._scratch / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _adaptable(self, folder: Path, seed: int) -> Model:
        """The policy in a folder, with adapters where params ask for them; new ones are the same
        for the same seed.
        """
        lora = self._params.lora
        return with_lora(load_policy(folder, self._resources, trained=lora.rank == 0), lora, seed)

    def _fit(
        self, begin: Path, pairs: Sequence[Pair], pair_loss: PairLossConfig, seed: int, out: Path
    ) -> None:
        """Train the policy in `begin` on pairs and save it in `out`; checkpoints lie beside it."""
        policy = self._adaptable(begin, seed)
        job = Job(
            self._params.training, self._resources, out.with_name(f"{out.name}-checkpoints"), seed
        )
        found = train_pairwise(policy, self._scorers.tokenizer, pairs, pair_loss, job)
        self._save(policy, out, found["losses"])

    def _save(self, policy: Model, out: Path, losses: list[dict[str, Any]]) -> None:
        """Save a policy and the losses of its training, these first: once there is a policy,
        nothing trains again.
        """
        write_json(out.with_name(f"{out.name}{_LOSSES}"), losses)
        with replacing(out) as temporary:
            save(policy, self._scorers.tokenizer, temporary)

    def _roll_out(self, policy: str, prompts: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
        model = policy_at(policy, self._resources)
        return roll_out(
            model,
            prompts,
            self._scorers,
            count=count,
            max_new_tokens=self._params.max_new_tokens,
            seed=seed,
        )

    # --- where pairs and losses come from ---------------------------------------------------------

    def _sources(self) -> tuple[PairSource, InnerAt]:
        beta, weights = self._params.beta, self._weights
        if weights is None:
            source = (
                self._fresh_source()
                if self._method.data == "fresh_pairs"
                else self._safety_source()
            )
            return source, lambda lam: PairLossConfig(scale=beta / lam, beta=beta, **self._loss)
        source = self._pool_source() if self._method.data == "pool" else self._scored_source()
        return source, lambda lam: PairLossConfig(
            beta * self._scale(lam), beta, weights.labels, weights.anchor, weights.nll
        )

    def _scale(self, lam: float) -> float:
        return lagrangian_scale(lam, self._weights is not None and self._weights.normalised)

    def _priced(self, frame: pd.DataFrame) -> pd.DataFrame:
        return with_priced_rewards(
            doubted(frame, self._doubt),
            self._prices,
            partial(answer_lengths, self._scorers.tokenizer),
        )

    @cached_property
    def _doubt(self) -> Doubt | None:
        """Pessimism of a method that trains on the pool; the others are as published."""
        if self._method.data != "pool":
            return None
        return doubt(self._inputs.scored, self._scored_pool, self._params.pessimism)

    def _safety_source(self) -> PairSource:
        """Safety pairs with log pi_r as reference column, the same at every multiplier."""
        frame = read_table(self._inputs.prepared / "safety_pairs.parquet", SAFETY_PAIRS)
        pairs: list[Pair] = []

        def source(lam: float, folder: Path, warm: Step) -> list[Pair]:
            if not pairs:
                reference = load_policy(self._inputs.models / self._plan.reference, self._resources)
                train = rows_within_budget(
                    frame[frame["split"] == "train"], self._params.training, self._params.seed
                )
                batch, loss_type = (
                    self._resources.scoring_batch_size,
                    self._loss.get("loss_type", "dpo"),
                )
                pairs.extend(
                    safety_training_pairs(
                        train, reference, self._scorers.tokenizer, batch, loss_type
                    )
                )
            return pairs

        return source

    def _scored_source(self) -> PairSource:
        frame = read_table(self._inputs.scored / "scored_pairs.parquet", SCORED_PAIRS)
        return lambda lam, folder, warm: lagrangian_pairs(
            self._priced(frame), self._scorers.tokenizer, lam, self._scale(lam)
        )

    def _pool_source(self) -> PairSource:
        """The pool at the new multiplier, and fresh answers of the policy before on some of its
        prompts.

        Fresh answers find the text that no fixed pool holds; their anchors use the pool's soft
        value of the prompt, so they need no new partition function."""
        prompts = self._scored_pool.drop_duplicates("prompt_id")[["prompt_id", "prompt"]].head(
            self._params.refresh_prompts
        )

        def source(lam: float, folder: Path, warm: Step) -> list[Pair]:
            params, samples = self._params, samples_of(self._pool, self._scorers.tokenizer)
            seed = params.seed + warm.step
            pairs = pool_pairs(
                samples,
                pool_values(samples, lam, params.beta),
                lam,
                params.beta,
                seed,
                self._scale(lam),
            )
            if prompts.empty:
                return pairs
            fresh = samples_of(
                self._priced(self._refresh(folder, warm, prompts)), self._scorers.tokenizer
            )
            known = soft_value(samples.reward, samples.cost, lam, params.beta)[: len(prompts), None]
            value = known.repeat(params.refresh_samples, axis=1)
            return pairs + pool_pairs(fresh, value, lam, params.beta, seed, self._scale(lam))

        return source

    def _refresh(self, folder: Path, warm: Step, prompts: pd.DataFrame) -> pd.DataFrame:
        path = folder / "refresh.parquet"
        if not path.is_file():
            seed = self._params.seed + 1000 * (warm.step + 1)
            write_parquet(
                path,
                self._roll_out(warm.policy, prompts, self._params.refresh_samples, seed),
                ANSWERS,
            )
        return read_table(path, ANSWERS)

    # --- rounds of comparisons --------------------------------------------------------------------

    def _fresh_source(self) -> PairSource:
        """O-PD-DPO (2510.05703, alg. 2): each training is a round of `dualign.search.online`, on
        pairs of all rounds.

        Of the offline pairs those count that a run would reach without fresh ones. What a round
        makes (answers, labelled pairs, pi_r) is kept in its folder, and everything else follows
        from it."""
        params, scorers = self._params, self._scorers
        batch = self._resources.scoring_batch_size
        offline = Preferences.read(self._inputs.prepared).rows_within_budget(
            params.training, params.seed
        )

        def source(lam: float, folder: Path, warm: Step) -> list[Pair]:
            step = warm.step + 1
            self._compare(folder, warm)
            seen = [
                offline,
                *(Preferences.read(self._folder(k) / "fresh") for k in range(1, step + 1)),
            ]
            data = union(*seen)
            assert params.online is not None
            if params.online.retrain_reward and not (folder / "helpful").is_dir():
                pairs = phase_one(data, scorers.reference, scorers.tokenizer, batch)
                first = PairLossConfig(scale=params.beta, beta=params.beta, clip=self._reward_clip)
                self._fit(
                    self._helpful(warm.step), pairs, first, params.seed + step, folder / "helpful"
                )
            helpful = load_policy(self._helpful(step), self._resources)
            explored = self._explored(seen)
            return phase_two(
                data, helpful, scorers.tokenizer, batch, explored, lam=lam, beta=params.beta
            )

        return source

    def _helpful(self, step: int) -> Path:
        """pi_r at a step: the round's own, or the row's reference."""
        own = self._folder(step) / "helpful"
        return own if own.is_dir() else self._inputs.models / self._plan.reference

    def _compare(self, folder: Path, warm: Step) -> None:
        """Answers of the policy before and of the pool to some of its prompts, compared; kept as
        `fresh`.
        """
        if (folder / "fresh").is_dir():
            return
        params, online, seed = self._params, self._params.online, self._params.seed + warm.step
        assert online is not None
        pool = self._baseline()
        prompts = pool.drop_duplicates("prompt_id")[["prompt_id", "prompt"]]
        prompts = prompts.sample(
            min(params.refresh_prompts, len(prompts)), random_state=seed
        ).sort_index()
        pairs = collect(
            self._refresh(folder, warm, prompts), pool[pool["prompt_id"].isin(prompts["prompt_id"])]
        )
        compared = compare(pairs, source=online.labels, folder=Path(online.folder), seed=seed)
        preference_tables(compared, f"round-{warm.step + 1}").write(folder / "fresh")

    def _baseline(self) -> pd.DataFrame:
        """The first samples of the pool to each prompt, as many as the policy draws."""
        pool, count = self._pool, self._params.refresh_samples
        held = int(pool["sample"].max()) + 1
        if self._params.refresh_prompts == 0 or count > held:
            raise ParamsError(
                f"dual_search: {self._plan.name} compares its answers with those of the pool,"
                f" {held} a prompt; set refresh_prompts above 0 and refresh_samples to at most"
                f" {held}"
            )
        return pool[pool["sample"] < count]

    def _explored(self, seen: Sequence[Preferences]) -> Exploration:
        online, scorers = self._params.online, self._scorers
        assert online is not None
        bonuses = Bonuses(
            online.ridge,
            online.reward_scale,
            online.cost_scale,
            online.dimension,
            self._params.seed,
        )
        batch = self._resources.scoring_batch_size
        explored = Exploration(scorers.reference, scorers.tokenizer, batch, bonuses)
        for tables in seen:
            explored.observe(tables)
        return explored

    # --- policy gradient --------------------------------------------------------------------------

    def _gradient(self) -> PolicyGradient:
        params, given = self._params, self._params.policy_gradient
        assert given is not None
        return PolicyGradient(
            params.beta,
            params.limit,
            given.samples,
            params.max_new_tokens,
            given.lambda_init,
            given.lambda_rate,
            params.lambda_min,
            params.lambda_max,
            given.window,
        )

    def _gradient_training(self) -> TrainingParams:
        given = self._params.policy_gradient
        assert given is not None
        update = {
            "batch_size": given.batch_size,
            "max_steps": given.steps,
            "learning_rate": given.learning_rate,
        }
        return self._params.training.model_copy(update=update)


def downsample(history: dict[str, list[float]], count: int) -> list[dict[str, float]]:
    """A history by step as at most `count` rows, each of a stretch of steps as even as can be; see
    `rules.Ascent`.

    `history` holds lambda, cost, reward and kl of every step.
    """
    steps = len(history["lambda"])
    parts = np.array_split(np.arange(steps), min(count, steps))
    keys = {"lam": "lambda", "cost": "cost", "reward": "reward", "kl": "kl"}
    return [
        {
            "step": int(part[-1]) + 1,
            **{key: float(np.mean(np.array(history[own])[part])) for key, own in keys.items()},
        }
        for part in parts
    ]
