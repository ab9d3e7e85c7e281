"""The online comparator: Safe RLHF's Lagrangian policy gradient (2310.12773), on TRL's
leave-one-out REINFORCE.

max over pi of E[r] - beta KL(pi || pi_ref) subject to E[c] <= d, by turns of a gradient step of the
policy on its own answers and a step of lambda. RLOO (2402.14740) fits: its gradient is unbiased,
with the KL term inside the reward of a whole answer. GRPO would divide by the spread within a group
and penalise each token, and aim at another policy than pi_lambda. Safe RLHF's critics, clipping and
pretraining term are left out: an answer is used once, by the policy that drew it."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from dualign.core.errors import DataError, TrainingError
from dualign.core.progress import quiet
from dualign.core.schema import Message
from dualign.lm.frozen import shared
from dualign.lm.models import end_tokens
from dualign.lm.numerics import precision_of
from dualign.lm.sampling import sample
from dualign.lm.tokens import decode_answers, encode_prompts
from dualign.scoring.scorers import Scorer
from dualign.training.metering import Metered
from dualign.training.run import (
    Job,
    Metrics,
    Model,
    arguments,
    noise_kept,
    run,
    short_enough,
    without_dropout,
)
from dualign.training.sharding import Sharding

T = TypeVar("T")


@dataclass(frozen=True)
class PolicyGradient:
    """What the method needs besides a training; in brackets what Safe RLHF's `ppo-lag.sh` takes.

    `beta` is the KL weight in units of reward [0.01], `limit` d in units of cost [0], `samples` the
    answers drawn to each prompt [1: it has a critic], `max_new_tokens` their longest length. lambda
    starts at `lambda_init` [1], moves at `lambda_rate` eta [0.1] between `lambda_min` [none] and
    `lambda_max` [5], and sees the mean cost of the last `window` answers [128]. What
    makes sense stands in `dualign.params.search`."""

    beta: float
    limit: float
    samples: int
    max_new_tokens: int
    lambda_init: float
    lambda_rate: float
    lambda_min: float
    lambda_max: float
    window: int


# --- mathematics ----------------------------------------------------------------------------------


def log_lambda_step(
    log_lambda: float, cost: float, limit: float, rate: float, low: float, high: float
) -> float:
    """log lambda <- log lambda + eta lambda (C - d), lambda in [low, high] (Safe RLHF, 2310.12773).

    Gradient ascent of lambda (C - d) in log lambda: lambda stays positive, and grows while the mean
    cost C is above d."""
    step = log_lambda + rate * math.exp(log_lambda) * (cost - limit)
    return min(max(step, math.log(low)), math.log(high))


def lagrangian_reward(reward: np.ndarray, cost: np.ndarray, lam: float) -> np.ndarray:
    """(r - lambda c) / (1 + lambda), [answers]: Safe RLHF's, of one scale for every lambda."""
    return (reward - lam * cost) / (1 + lam)


def kl_weight(beta: float, lam: float) -> float:
    """beta / (1 + lambda), the KL weight beside `lagrangian_reward` whose optimum is pi_ref exp((r
    - lambda c) / beta).

    Safe RLHF keeps beta, which beside the divided reward is a KL weight of beta (1 + lambda): its
    optimum tends to the tilt -c / beta however large lambda grows, and limits beyond it cannot be
    reached."""
    return beta / (1 + lam)


# --- training -------------------------------------------------------------------------------------


def train_policy_gradient(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    reward: Scorer,
    cost: Scorer,
    options: PolicyGradient,
    job: Job,
) -> Metrics:
    """Train `model` on its own answers; the reference is `model` as passed, also if a run goes on.

    `job.training.batch_size` counts answers per step, a multiple of `options.samples`; an epoch
    draws as many prompts as there are. Prompts that leave no room for an answer in `max_length` are
    left out. Returns, beside the metrics of every run, the last lambda, the count of generated
    tokens, and the history by step: the lambda of the step, mean cost and reward of its answers,
    and their KL to the reference in nats an answer. Raises ParamsError, DataError, or TrainingError
    for scores that are not finite."""
    kept = _fitting(tokenizer, prompts, options.max_new_tokens, job.training.max_length)
    ends = end_tokens(model, tokenizer)
    ascent = _Ascent(tokenizer, ends, reward, cost, options, job.resources.scoring_batch_size)
    with noise_kept(model):
        trainer = PolicyGradientTrainer(model, ascent, kept, tokenizer, options, job)
        metrics = run(trainer, job)
    ascent.restore(trainer.state)  # of a run that had ended before
    return {
        **metrics,
        "rows": len(kept),
        "lambda": ascent.lam,
        "generated_tokens": ascent.generated_tokens,
        "history": ascent.history,
    }


class _Ascent(TrainerCallback, ExportableState):
    """Scores answers, moves lambda, keeps the history; the trainer writes it into every checkpoint
    with its own state.

    As in Safe RLHF's code, lambda moves first, and the answers that moved it are weighed by the new
    one."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        reward: Scorer,
        cost: Scorer,
        options: PolicyGradient,
        batch: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._scorers = (reward, cost)
        self._options = options
        self._batch = batch
        self._log_lambda = math.log(options.lambda_init)
        self._costs: deque[float] = deque(maxlen=options.window)
        self.generated_tokens = 0
        self.history: dict[str, list[float]] = {"lambda": [], "cost": [], "reward": [], "kl": []}

    @property
    def lam(self) -> float:
        return math.exp(self._log_lambda)

    def lagrangian(
        self, prompts: list[list[Message]], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """TRL's reward function: a step of lambda by the answers of all processes, then (r - lambda
        c) / (1 + lambda) of this one's."""
        asked = gather_object(prompts)
        drawn = gather_object(completion_ids)
        texts = decode_answers(self._tokenizer, drawn)
        ended = [ids[-1] in self._ends for ids in drawn]
        reward, cost = (
            scorer.score(asked, texts, batch_size=self._batch, ended=ended)
            for scorer in self._scorers
        )
        if not (np.isfinite(reward).all() and np.isfinite(cost).all()):
            raise TrainingError(
                "the reward or cost model gave a score that is NaN or infinite; train it again"
            )
        options = self._options
        self._costs.extend(cost.tolist())
        mean = math.fsum(self._costs) / len(self._costs)
        self._log_lambda = log_lambda_step(
            self._log_lambda,
            mean,
            options.limit,
            options.lambda_rate,
            options.lambda_min,
            options.lambda_max,
        )
        self.generated_tokens += sum(map(len, drawn))
        self.history["lambda"].append(self.lam)
        self.history["cost"].append(float(np.mean(cost)))
        self.history["reward"].append(float(np.mean(reward)))
        values: list[float] = lagrangian_reward(reward, cost, self.lam).tolist()
        return _own(values)

    def state(self) -> dict[str, Any]:
        attributes = {
            "log_lambda": self._log_lambda,
            "costs": list(self._costs),
            "generated_tokens": self.generated_tokens,
            "history": copy.deepcopy(self.history),
        }
        return {"args": {}, "attributes": attributes}

    def restore(self, state: TrainerState) -> None:
        """Go on from a checkpoint's state; that of a run that begins holds how this began."""
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self._log_lambda = saved["log_lambda"]
        self.generated_tokens = saved["generated_tokens"]
        self._costs = deque(saved["costs"], maxlen=self._options.window)
        self.history = copy.deepcopy(saved["history"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore(state)


class PolicyGradientTrainer(Metered, Sharding, RLOOTrainer):
    """RLOOTrainer on answers of `dualign.lm.sampling`, with a KL weight that follows lambda."""

    def __init__(
        self,
        model: Model,
        ascent: _Ascent,
        prompts: Sequence[Sequence[Message]],
        tokenizer: PreTrainedTokenizerBase,
        options: PolicyGradient,
        job: Job,
    ) -> None:
        reference = None if isinstance(model, PeftModel) else _frozen(model)
        self._ascent = ascent
        self._options = options
        self._job = job
        steps, each = _steps(len(prompts), options.samples, job)
        rows = [list(map(dict, prompt)) for prompt in prompts]
        order = _order(len(prompts), steps * each, job.seed)
        super().__init__(
            without_dropout(model),
            reward_funcs=ascent.lagrangian,
            args=_config(options, job, steps),
            train_dataset=Dataset.from_dict({"prompt": rows}).select(order),
            processing_class=tokenizer,
            callbacks=[ascent],
        )
        if reference is not None:
            add_fused_lm_head(reference)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.beta = kl_weight(options.beta, ascent.lam)

    def _tokenize_prompts(
        self, prompts: Sequence[Sequence[Message]]
    ) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that every other stage reads of prompts. TRL asks thinking models for thoughts,
        and takes text that spells a control token for one."""
        return encode_prompts(self._tokenizer, prompts), None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
        """Answers from our one sampler, so that training draws what evaluation draws.

        All processes draw for all prompts, which share out the batches."""
        self.give_back()
        drawn = sample(
            self.whole,
            self._tokenizer,
            gather_object(prompt_ids),
            count=1,
            max_new_tokens=self._options.max_new_tokens,
            batch_size=self._job.resources.sampling_batch_size,
            # So that a resumed run draws what an uninterrupted one would have.
            seed=self._job.seed * 1_000_003 + self.state.global_step,
        )
        self.model.train()
        return [answer.tokens for answer in _own(drawn)]

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)
        # Read next, for the KL term of these rewards.
        self.beta = kl_weight(self._options.beta, self._ascent.lam)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        with quiet():  # sampling and scoring end at every step here
            output: dict[str, Tensor] = super()._generate_and_score_completions(inputs)
        seen = self._metrics["train"]
        # TRL's is per token.
        self._ascent.history["kl"].append(seen["kl"][-1] * seen["completions/mean_length"][-1])
        if self.meter is not None:
            answers = output["completion_mask"]
            self.meter.count(torch.cat([output["prompt_mask"], answers], 1), answers)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As TRL's, with the last of our history; the loss is 0 but for rounding."""
        own = {name: values[-1] for name, values in self._ascent.history.items() if values}
        super().log(logs | own, *args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Model,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Only the positions of answers go through the vocabulary, in fp32, as where answers are
        drawn and read: TRL's fused head rounds logits to bf16, and scores every position of a CPU.
        """
        size = batch_size or len(input_ids)
        parts = [
            self._answer_logps(model, ids, mask, logits_to_keep)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        return (
            torch.cat([logps for logps, _ in parts]),
            torch.cat([entropy for _, entropy in parts]),
            None,
        )

    def _answer_logps(
        self, model: Model, ids: Tensor, mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """log pi of the last `length` tokens, and the entropy there; [rows, length] in nats."""
        # Of itself the reference has no autocast, and accelerate has none where it shards.
        half = precision_of(self._job.resources) is torch.bfloat16
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
            output = model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length + 1
            )
        logps = torch.log_softmax(output.logits[:, :-1].float(), -1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, ids[:, -length:].unsqueeze(-1)).squeeze(-1), entropy


def _own(rows: list[T]) -> list[T]:
    """This process's part of what all of them have gathered, each as much."""
    state = PartialState()
    size = len(rows) // state.num_processes
    return rows[state.process_index * size :][:size]


def _config(options: PolicyGradient, job: Job, steps: int) -> RLOOConfig:
    return RLOOConfig(
        **{**arguments(job), "num_train_epochs": 1.0, "max_steps": steps},
        num_generations=options.samples,
        max_completion_length=options.max_new_tokens,
        shuffle_dataset=False,
        # An adapter's too, or the log-probabilities would be those of another policy than the one
        # that drew.
        disable_dropout=True,
        # Or TRL would load a reference from the model's path, empty or stale perhaps; set after.
        beta=0.0,
        router_aux_loss_coef=0.0,
    )


def _frozen(model: Model) -> Model:
    """A copy of the model as it is, which no training changes."""
    reference = shared(model)
    # A trainer before this one may have put its own forward on the instance; its copy would still
    # call the original's.
    reference.__dict__.pop("forward", None)
    return reference.eval().requires_grad_(False)


def _fitting(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    room: int,
    max_length: int,
) -> list[Sequence[Message]]:
    if not len(prompts):
        raise DataError("there are no prompts to answer; a policy gradient needs some")
    ids = encode_prompts(tokenizer, prompts)
    return short_enough(prompts, [len(row) + room for row in ids], max_length)


def _steps(prompts: int, samples: int, job: Job) -> tuple[int, int]:
    """Steps of the run, and prompts per step."""
    training = job.training
    each = training.batch_size // samples
    return training.max_steps or math.ceil(training.epochs * prompts / each), each


def _order(count: int, draws: int, seed: int) -> list[int]:
    """`draws` positions of `count` prompts, one shuffle after another.

    The whole run is one pass of the trainer: TRL's own sampler forgets in a resumed run which
    shuffle it was at."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(draws / count))]
    positions: list[int] = torch.cat(rounds)[:draws].tolist()
    return positions
