"""What a search needs done: train a policy at a multiplier, merge or mix policies, measure one on its own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dualign import dual
from dualign.core.artifacts import replacing, write_parquet
from dualign.core.params import DualSearchParams, InnerParams, Resources
from dualign.data.schema import ANSWERS, POOL, SAFETY_PAIRS, SCORED_PAIRS, read_table
from dualign.labelling import log_odds, vote
from dualign.lm.mixture import policy_at, write_mixture
from dualign.lm.models import load_policy, save, with_lora
from dualign.losses import lagrangian_scale
from dualign.measure.rollout import Judges, measure, roll_out
from dualign.measure.stats import Measurement, clustered_mean
from dualign.merge import merge
from dualign.methods import Plan
from dualign.pairs import lagrangian_pairs, pool_pairs, pool_values, preference_pairs, samples_of, visited
from dualign.search import Step
from dualign.training.pairwise import Inner, Pair, train_pairwise
from dualign.training.run import Job

#: pairs at a multiplier, given the step's folder and the step before; and the inner loss at that multiplier
PairSource = Callable[[float, Path, Step], list[Pair]]
InnerAt = Callable[[float], Inner]


@dataclass(frozen=True)
class Inputs:
    """Folders that a search reads."""

    models: Path = Path("models")
    prepared: Path = Path("data/prepared")
    scored: Path = Path("data/scored")


class PolicyBench:
    """Implements `dualign.search.Workbench` on models; every step has its own folder in `scratch`.

    `inner` holds the weights of the Lagrangian loss; None means safety pairs at coefficient beta / lambda, with `loss`
    the options of that loss.
    """

    def __init__(
        self,
        plan: Plan,
        params: DualSearchParams,
        resources: Resources,
        inner: InnerParams | None,
        prompts: pd.DataFrame,
        scratch: Path,
        inputs: Inputs | None = None,
        loss: dict[str, Any] | None = None,
    ) -> None:
        self._plan, self._method, self._params, self._resources = plan, plan.method, params, resources
        self._loss = loss or {}
        self._weights, self._prompts, self._scratch, self._inputs = inner, prompts, scratch, inputs or Inputs()
        self._judges = Judges.load(resources, self._inputs.models)
        self._pairs, self._inner = self._sources()

    @property
    def start(self) -> str:
        """The folder of the policy at the first multiplier."""
        return str(self._inputs.models / self._plan.start)

    def train(self, step: int, lam: float, warm: Step) -> str:
        """Train at `lam` from the reference, or from the policy before for a warm-started method."""
        folder = self._folder(step)
        out = folder / "policy"
        if out.is_dir():  # trained before an interruption
            return str(out)
        begin = Path(warm.policy) if self._method.warm else self._inputs.models / self._plan.reference
        policy = with_lora(load_policy(begin, self._resources), self._params.lora)
        job = Job(self._params.training, self._resources, folder / "checkpoints", self._params.seed + step)
        train_pairwise(policy, self._judges.tokenizer, self._pairs(lam, folder, warm), self._inner(lam), job)
        with replacing(out) as temporary:
            save(policy, self._judges.tokenizer, temporary)
        return str(out)

    def merge(self, step: int, q: float) -> str:
        """(1 - q) pi_r + q start."""
        out = self._folder(step) / "policy"
        with replacing(out) as temporary:
            merge(self._inputs.models / self._plan.reference, Path(self.start), q, temporary)
        return str(out)

    def mix(self, step: int, steps: Sequence[Step]) -> str:
        """The policies of all steps in equal parts."""
        out = self._folder(step) / "policy"
        with replacing(out) as temporary:
            write_mixture([s.policy for s in steps], [s.lam for s in steps], temporary)
        return str(out)

    def measure(self, step: int, policy: str) -> Measurement:
        """On-policy estimates on the search prompts; the tokens of a refresh count as generated.

        The answers are kept, since people may be asked about them before the search can go on.
        """
        path = self._folder(step) / "answers.parquet"
        if not path.is_file():
            params = self._params
            write_parquet(path, self._roll_out(policy, self._prompts, params.samples_per_prompt, params.seed), ANSWERS)
        answers = read_table(path, ANSWERS)
        measured = measure(answers)
        refresh = self._folder(step) / "refresh.parquet"
        extra = int(read_table(refresh, ANSWERS)["length"].sum()) if refresh.is_file() else 0
        measured = replace(measured, generated_tokens=measured.generated_tokens + extra)
        return self._by_feedback(measured, answers, step) if self._method.cost == "feedback" else measured

    def _by_feedback(self, measured: Measurement, answers: pd.DataFrame, step: int) -> Measurement:
        """The cost by labels of the answers to the first prompts: the mean log-odds of their votes, by prompt."""
        options = self._params.feedback
        asked = answers[answers["prompt_id"].isin(self._prompts["prompt_id"].head(options.prompts))]
        seed = self._params.seed + step
        votes = vote(asked, source=options.source, count=options.labels, folder=Path(options.folder), seed=seed)
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

    def _roll_out(self, policy: str, prompts: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
        model = policy_at(policy, self._resources)
        return roll_out(
            model, prompts, self._judges, count=count, max_new_tokens=self._params.max_new_tokens, seed=seed
        )

    # --- where pairs and losses come from -----------------------------------------------------------------------------

    def _sources(self) -> tuple[PairSource, InnerAt]:
        beta, weights = self._params.beta, self._weights
        if weights is None:
            return self._safety_source(), lambda lam: Inner(scale=beta / lam, beta=beta, **self._loss)
        source = self._pool_source() if self._method.data == "pool" else self._scored_source()
        return source, lambda lam: Inner(beta * self._scale(lam), beta, weights.labels, weights.anchor, weights.nll)

    def _scale(self, lam: float) -> float:
        return lagrangian_scale(lam, self._weights is not None and self._weights.normalised)

    def _safety_source(self) -> PairSource:
        """Safety pairs with log pi_r as reference column, the same at every multiplier."""
        frame = read_table(self._inputs.prepared / "safety_pairs.parquet", SAFETY_PAIRS)
        pairs: list[Pair] = []

        def source(lam: float, folder: Path, warm: Step) -> list[Pair]:
            if not pairs:
                reference = load_policy(self._inputs.models / self._plan.reference, self._resources)
                train = visited(frame[frame["split"] == "train"], self._params.training, self._params.seed)
                batch = self._resources.scoring_batch_size
                pairs.extend(preference_pairs(train, reference, self._judges.tokenizer, batch))
            return pairs

        return source

    def _scored_source(self) -> PairSource:
        frame = read_table(self._inputs.scored / "scored_pairs.parquet", SCORED_PAIRS)
        return lambda lam, folder, warm: lagrangian_pairs(frame, self._judges.tokenizer, lam, self._scale(lam))

    def _pool_source(self) -> PairSource:
        """The pool at the new multiplier, and fresh answers of the policy before on some of its prompts.

        Fresh answers find the text that no fixed pool holds; their anchors use the pool's soft value of the prompt, so
        they need no new partition function.
        """
        pool = read_table(self._inputs.scored / "pool.parquet", POOL)
        samples = samples_of(pool, self._judges.tokenizer)
        prompts = pool.drop_duplicates("prompt_id")[["prompt_id", "prompt"]].head(self._params.refresh_prompts)

        def source(lam: float, folder: Path, warm: Step) -> list[Pair]:
            params = self._params
            seed = params.seed + warm.step
            pairs = pool_pairs(
                samples, pool_values(samples, lam, params.beta), lam, params.beta, seed, self._scale(lam)
            )
            if prompts.empty:
                return pairs
            fresh = samples_of(self._refresh(folder, warm, prompts), self._judges.tokenizer)
            known = dual.soft_value(samples.reward, samples.cost, lam, params.beta)[: len(prompts), None]
            value = known.repeat(params.refresh_samples, axis=1)
            return pairs + pool_pairs(fresh, value, lam, params.beta, seed, self._scale(lam))

        return source

    def _refresh(self, folder: Path, warm: Step, prompts: pd.DataFrame) -> pd.DataFrame:
        path = folder / "refresh.parquet"
        if not path.is_file():
            seed = self._params.seed + 1000 * (warm.step + 1)
            write_parquet(path, self._roll_out(warm.policy, prompts, self._params.refresh_samples, seed), ANSWERS)
        return read_table(path, ANSWERS)
