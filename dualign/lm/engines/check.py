"""Whether an engine drew from the policy that we compute: a sample of its answers is scored anew.

Two things can be wrong. The engine's log-probabilities may be of other weights, another precision
or another prompt; so those of an answer of n tokens may differ from ours by BOUND * sqrt(n) nats,
as roundings that are independent from token to token do. And the answers may have been drawn from
something else, such as a temperature or a truncated tail. Against each such alternative q the
likelihood ratio prod q(token) / p(token) has mean 1 if the engine is right, wherever answers stop,
and so has the mean of these ratios: it passes EVIDENCE with a probability of at most 1 / EVIDENCE
(Ville's inequality)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dualign.core.errors import ModelError
from dualign.lm.engines.generate import configured
from dualign.lm.engines.interface import Answer, Request, left_padded
from dualign.lm.numerics import answer_logits, precision_of
from dualign.lm.tokens import told
from dualign.params.base import Resources

#: Largest difference in nats of an answer's log-probability from ours, by the square root of its
#: tokens. fp32 rounds by 6e-8, a logit of 30 behind some dozens of layers by about 1e-4. bf16
#: keeps 8 bits: hidden states are off by 0.4 %, logits by some hundredths to tenths.
BOUND = {torch.float32: 2e-3, torch.bfloat16: 0.2}
#: Largest likelihood ratio against the policy: a right engine passes it once in a million checks.
EVIDENCE = 1e6
#: Answers that are checked.
SAMPLE = 32
#: What a wrong engine may draw from: powers of the policy, its likeliest tokens, its nucleus.
_POWERS = (0.8, 0.9, 1.1, 1.25)
_TOP_K = 50
_TOP_P = 0.95
#: Likeliest tokens among which a nucleus is looked for; a wider one is left alone.
_WIDEST = 2048
#: Texts of one batch by which a model itself is checked, and the tokens that are drawn.
ROWS = ((1, 2), (3, 1, 2, 3, 3, 1, 2, 1, 3))
_STEPS = GenerationConfig(
    max_new_tokens=4,
    do_sample=False,
    pad_token_id=0,
    output_logits=True,
    return_dict_in_generate=True,
)


def _drawn_apart(model: Any) -> float:
    """Mean difference in nats, at the worst token, between draws of a batch and one pass over each
    row."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids, mask = (part.to(device) for part in left_padded(ROWS, 0))
    with configured(model, _STEPS):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=_STEPS)
    drawn_from = torch.stack(output.logits, 1).float().log_softmax(-1)
    apart = []
    for prompt, row, table in zip(ROWS, output.sequences, drawn_from, strict=True):
        answer = row[ids.shape[1] :].tolist()
        own = answer_logits(model, prompt, answer).log_softmax(-1)
        gaps = own.exp() * (own - table[: len(answer)]).abs()
        apart.append(torch.where(own.exp() == 0, 0.0, gaps).sum(-1).max())
    model.train(training)
    return float(torch.stack(apart).max())


@torch.no_grad()
def check_batches(
    model: Any,
    path: Any,
    precision: torch.dtype,
    exact: Callable[[], Any],
    apart: Callable[[Any], float] = _drawn_apart,
) -> None:
    """Refuse a model that says other things of a text in a padded batch than alone: one that reads
    padding, or whose state between tokens is not what it has read. Raises ModelError in one line.

    `apart` measures how far off a model is, in nats. In bf16 rounding turns choices of experts too,
    so what is off there is measured again in fp32, of what `exact` loads."""
    try:
        gap = apart(model)
        if gap <= BOUND[precision]:
            return
        gap = apart(exact())
    except Exception as error:  # transformers raises many kinds here
        raise ModelError(
            f"{path}: {type(model).__name__} cannot read a padded batch ({told(error)}); use"
            " another architecture"
        ) from error
    if not gap <= BOUND[torch.float32]:
        raise ModelError(
            f"{path}: {type(model).__name__} says other things of a text in a padded batch than"
            f" alone (off by {gap:.2g} nats), since it reads padding or does not keep what it has"
            " read; use another architecture"
        )


@torch.inference_mode()
def check(
    model: torch.nn.Module, request: Request, answers: Sequence[Answer], resources: Resources
) -> None:
    """Refuse answers of an engine that are not draws of `model`. Raises ModelError in one line."""
    rows = range(0, len(answers), max(1, -(-len(answers) // SAMPLE)))
    bound = BOUND[precision_of(resources)]
    ratios = torch.zeros(len(_POWERS) + 2, dtype=torch.float64)
    for row in rows:
        tokens = answers[row].tokens
        table = torch.log_softmax(answer_logits(model, request.prompts[row], tokens), -1)
        drawn = torch.tensor(tokens, device=table.device)
        own = table.gather(1, drawn.unsqueeze(1)).squeeze(1)
        _compare(answers[row], float(own.sum()), bound, resources.engine)
        ratios += log_ratios(table, drawn).cpu()
    evidence = torch.logsumexp(ratios, 0) - math.log(len(ratios))
    if not evidence <= math.log(EVIDENCE):
        raise ModelError(
            f"resources.engine {resources.engine}: its answers are no draws of the policy at"
            f" temperature 1 (another distribution is e^{evidence:.0f} times as likely, by"
            f" {len(rows)} answers); let it neither truncate nor penalise, or set resources.engine"
            " to generate"
        )


def _compare(answer: Answer, ours: float, bound: float, engine: str) -> None:
    if answer.log_probabilities is None:
        return
    most = bound * math.sqrt(len(answer.tokens))
    gap = abs(math.fsum(answer.log_probabilities) - ours)
    if not gap <= most:
        raise ModelError(
            f"resources.engine {engine}: log pi of an answer of {len(answer.tokens)} tokens is"
            f" {gap:.3g} nats off ours, at most {most:.3g} is taken; let the engine hold the same"
            " weights in resources.precision, or set resources.engine to generate"
        )


def log_ratios(table: Tensor, drawn: Tensor) -> Tensor:
    """log prod q(token) / p(token) for each alternative q: powers of p, its top k, its nucleus.

    table [tokens, vocabulary] of log p, drawn [tokens]; [alternatives], in nats."""
    at = drawn.unsqueeze(1)
    own = table.gather(1, at).squeeze(1)
    ratios = [(torch.log_softmax(s * table, -1).gather(1, at).squeeze(1) - own) for s in _POWERS]
    ordered = table.topk(min(_WIDEST, table.shape[1]), 1).values.exp()
    first = torch.arange(ordered.shape[1], device=table.device) < _TOP_K
    nucleus = ordered.cumsum(1) - ordered < _TOP_P
    narrow = ordered.sum(1) >= _TOP_P
    ratios.append(_cut(ordered, first.expand_as(ordered), own))
    ratios.append(torch.where(narrow, _cut(ordered, nucleus, own), 0.0))
    return torch.stack([ratio.double().sum() for ratio in ratios])


def _cut(ordered: Tensor, kept: Tensor, own: Tensor) -> Tensor:
    """log q / p of tokens for p cut to what is `kept` of its largest probabilities, `ordered`
    [tokens, some]; `own` is log p of each token. [tokens], in nats."""
    least = torch.where(kept, ordered, 1.0).amin(1)
    mass = torch.where(kept, ordered, 0.0).sum(1)
    return torch.where(own.exp() >= least, -mass.log(), -torch.inf)
