"""Answers of a policy to a set of prompts as a table: drawn, scored, and with log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import write_parquet
from dualign.core.schema import ANSWERS, Message, read_table
from dualign.evaluation.stats import Measurement, clustered_mean, within_variance
from dualign.lm.engines.interface import PLAIN, Decoding
from dualign.lm.mixture import Policy
from dualign.lm.models import load_policy, load_tokenizer
from dualign.lm.sampling import Draws, draw, log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.params.base import Resources
from dualign.scoring.scorers import Scorer


@dataclass(frozen=True)
class Scorers:
    """What scores a rollout: reference policy, tokenizer, reward model and cost model."""

    reference: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    reward: Scorer
    cost: Scorer
    resources: Resources

    @classmethod
    def load(cls, resources: Resources, models: Path = Path("models")) -> Scorers:
        """Load `sft`, `reward_model` and `cost_model` from the models folder."""
        return cls(
            load_policy(models / "sft", resources),
            load_tokenizer(models / "sft"),
            Scorer.load(models / "reward_model", resources),
            Scorer.load(models / "cost_model", resources),
            resources,
        )

    def log_probabilities(
        self, policy: Policy, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """log pi of answers to prompts, both as ids, in nats; fp64 [rows]."""
        size = self.resources.scoring_batch_size
        logp = log_probabilities(policy, self.tokenizer, prompts, answers, batch_size=size)
        return logp.numpy()

    def scores(
        self,
        prompts: Iterable[Sequence[Message]],
        answers: Iterable[str],
        ended: Iterable[bool] | None = None,
    ) -> dict[str, np.ndarray]:
        """`reward` and `cost` of answers, fp64 [rows]; `ended` False marks those that were cut."""
        rows = list(prompts), list(answers)
        whole = None if ended is None else list(ended)
        size = self.resources.scoring_batch_size
        return {
            name: scorer.score(*rows, batch_size=size, what=f"{name}s", ended=whole)
            for name, scorer in (("reward", self.reward), ("cost", self.cost))
        }


def roll_out(
    policy: Policy,
    prompts: pd.DataFrame,
    scorers: Scorers,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    decoding: Decoding = PLAIN,
) -> pd.DataFrame:
    """`count` answers of `policy` to each prompt: schema POOL, and the policy's own logp, whatever
    the decoding.

    An answer that was cut at `max_new_tokens` is scored as it stands, without EOS.
    """
    tokenizer = scorers.tokenizer
    resources = scorers.resources
    encoded = encode_prompts(tokenizer, prompts["prompt"].tolist())
    wanted = Draws(count, max_new_tokens, seed, decoding)
    drawn = draw(policy, tokenizer, encoded, wanted, resources)
    index = [answer.prompt for answer in drawn]
    frame = pd.DataFrame(
        {
            "prompt_id": [prompts["prompt_id"].iloc[i] for i in index],
            "prompt": [prompts["prompt"].iloc[i] for i in index],
            "sample": [place % count for place in range(len(drawn))],
            "response": [answer.text for answer in drawn],
            "tokens": [answer.tokens for answer in drawn],
            "length": [len(answer.tokens) for answer in drawn],
            "ended": [answer.ended for answer in drawn],
        }
    )
    rows = [encoded[i] for i in index]
    tokens = frame["tokens"].tolist()
    frame["logp_ref"] = scorers.log_probabilities(scorers.reference, rows, tokens)
    frame["logp"] = frame["logp_ref"]
    if policy is not scorers.reference:
        frame["logp"] = scorers.log_probabilities(policy, rows, tokens)
    return frame.assign(**scorers.scores(frame["prompt"], frame["response"], frame["ended"]))


def kept_answers(path: Path, draw: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The answers in a file, schema ANSWERS; they are drawn and written there if it is not."""
    if not path.is_file():
        write_parquet(path, draw(), ANSWERS)
    return read_table(path, ANSWERS)


def log_ratios(policy: Policy, samples: pd.DataFrame, scorers: Scorers) -> np.ndarray:
    """log(pi / pi_ref) in nats of given answers (schema POOL); shape [rows]."""
    prompts = encode_prompts(scorers.tokenizer, samples["prompt"].tolist())
    answers = [list(map(int, tokens)) for tokens in samples["tokens"]]
    logp = scorers.log_probabilities(policy, prompts, answers)
    ratios: np.ndarray = logp - samples["logp_ref"].to_numpy()
    return ratios


def measure(frame: pd.DataFrame) -> Measurement:
    """Prompt-clustered estimates from a rollout."""
    prompts = frame["prompt_id"].to_numpy()
    cost, reward = (clustered_mean(frame[name].to_numpy(), prompts) for name in ("cost", "reward"))
    return Measurement(
        cost=cost.mean,
        cost_se=cost.error,
        reward=reward.mean,
        reward_se=reward.error,
        kl=clustered_mean((frame["logp"] - frame["logp_ref"]).to_numpy(), prompts).mean,
        p_unsafe=clustered_mean((frame["cost"] > 0).to_numpy(), prompts).mean,
        variance=within_variance(frame["cost"].to_numpy(), prompts),
        generated_tokens=int(frame["length"].sum()),
    )
