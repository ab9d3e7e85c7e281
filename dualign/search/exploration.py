"""Bonuses for answers unlike the pairs so far: features of the reference, covariance, norm.

With phi(x, y) the features of an answer and pairs (y, y') compared so far, O-PD-DPO (2510.05703,
alg. 2) has

    Sigma = gamma I + sum (phi(y) - phi(y')) (phi(y) - phi(y'))^T,
    b(y) = alpha ||phi(y)||_{Sigma^{-1}},

one Sigma for the helpful pairs and one for the safety pairs. Both bonuses enter phase 2 by way of
its reference column, log pi_r + (b_r + lambda b_c) / beta (`dualign.math.losses.folded_reference`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dualign.core.progress import Progress
from dualign.lm.batches import by_length
from dualign.lm.numerics import padded_rows


@torch.inference_mode()
def features(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch_size: int,
) -> Tensor:
    """phi(x, y): the model's last hidden layer, mean over the positions of the answer (token ids,
    none of them empty).

    fp32 on the CPU, shape [answers, hidden]."""
    model.eval()
    pad = int(tokenizer.pad_token_id)
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    found: dict[int, Tensor] = {}
    with Progress("features", len(lengths)) as progress:
        for batch in by_length(range(len(lengths)), lengths, batch_size):
            pooled = _pooled(model, pad, [prompts[i] for i in batch], [answers[i] for i in batch])
            found.update(zip(batch, pooled, strict=True))
            progress.advance(len(batch))
    return torch.stack([found[i] for i in range(len(lengths))])


def projection(dimension_in: int, dimension_out: int, seed: int) -> Tensor:
    """A Gaussian matrix of variance 1 / dimension_out, fp32 [dimension_in, dimension_out].

    features @ projection keeps squared norms in expectation, up to a factor 1 +- sqrt(2 /
    dimension_out) (Johnson and Lindenstrauss, 1984); it makes the covariance of a wide model small
    enough to invert."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dimension_in, dimension_out, generator=generator) / dimension_out**0.5


def precision(differences: Tensor, ridge: float) -> Tensor:
    """Sigma^{-1} = (gamma I + sum delta delta^T)^{-1}, delta = phi(y) - phi(y') of each pair; fp64
    [d, d], by Cholesky.

    `differences` holds the deltas, shape [pairs, d], pairs >= 0; gamma = `ridge` > 0 in squared
    units of the features."""
    delta = differences.double()
    sigma = ridge * torch.eye(delta.shape[1], dtype=torch.float64) + delta.T @ delta
    return torch.cholesky_inverse(torch.linalg.cholesky(sigma))


def bonus(features: Tensor, precision: Tensor, scale: float) -> Tensor:
    """b = alpha sqrt(phi^T Sigma^{-1} phi), alpha = `scale`; fp64 [answers], in units of the score
    it is added to.

    At most alpha ||phi|| / sqrt(gamma), its value before any pair; each pair lowers it, most along
    its own difference."""
    phi = features.double()
    return scale * ((phi @ precision) * phi).sum(1).clamp(min=0).sqrt()


def spread(chosen: Tensor, rejected: Tensor, ridge: float) -> float:
    """Mean of | ||phi(y)|| - ||phi(y')|| | in the norm of Sigma^{-1}, Sigma of these pairs: their
    bonus gap at alpha 1.

    chosen, rejected: features of both answers of each pair, [pairs, d]. A pairwise loss reads a
    bonus by its gap within a pair; its mean says little, since what all answers have in common is
    in no difference and so never explored."""
    norm = precision(chosen - rejected, ridge)
    return float((bonus(chosen, norm, 1.0) - bonus(rejected, norm, 1.0)).abs().mean())


def _pooled(
    model: torch.nn.Module,
    pad: int,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Mean hidden state over the positions of each answer; [rows, hidden]."""
    device = next(model.parameters()).device
    ids, mask, labels = padded_rows(prompts, answers, pad)
    own = (labels >= 0).float()
    weight = own / own.sum(1, keepdim=True)
    # One position of logits is the least that a causal model gives beside its hidden states.
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    hidden = output.hidden_states[-1].float()
    return torch.einsum("rp,rph->rh", weight.to(device), hidden).cpu()
