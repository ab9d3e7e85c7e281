"""Precision: what is computed in which, so that a policy first equals its reference.

In bf16 the matrices multiply under autocast, hidden states between layers are bf16, norms and
biases stay fp32, and the head over the vocabulary and its softmax are fp32. A frozen model keeps
its matrices in bf16, a trained one in fp32 (autocast rounds them for each product), so both compute
the same numbers; only the trained one can take small steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dualign.core import ranks
from dualign.core.errors import ModelError
from dualign.lm import onednn
from dualign.lm.batches import padded
from dualign.lm.kernels import fuse
from dualign.lm.quantised import cast, is_quantised
from dualign.params.base import Resources

#: Elements of the vocabulary-wide logits that are held at once: 256 MiB in fp32.
CHUNK = 1 << 26
#: Largest output of a head by which it is checked what a model makes of it, and how far its logits
#: may be off ours, in nats and as a share: what bf16 rounds.
_LARGE = 50.0
_SAME = 0.01
#: Configuration keys of what logits are multiplied by.
_FACTORS = ("logit_scale", "lm_head_multiplier")


def device_of(resources: Resources) -> torch.device:
    """The device: CUDA if there is one, unless params say otherwise; one GPU for a process."""
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "resources.device is cuda but torch sees no GPU; set it to auto, or install a CUDA"
            " build of torch"
        )
    if resources.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if resources.processes != 1:
        return torch.device("cuda", ranks.local_rank())
    if torch.cuda.device_count() > 1:
        raise ModelError(
            f"torch sees {torch.cuda.device_count()} GPUs, and a stage runs in one process: set"
            " resources.processes to auto, or show it one, e.g. CUDA_VISIBLE_DEVICES=0 dvc repro"
        )
    return torch.device("cuda")


def precision_of(resources: Resources) -> torch.dtype:
    """What matrices are multiplied in: bf16 on a GPU that has it, unless params say otherwise."""
    if resources.precision == "auto":
        # Cards before Ampere have it by emulation, which is slower than fp32.
        on_gpu = device_of(resources).type == "cuda"
        capable = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    return torch.float32 if resources.precision == "fp32" else torch.bfloat16


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products of fp32 by a GPU's tensor cores, which read ten bits of a factor and add in fp32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class _HeadProduct(torch.autograd.Function):
    """x W^T in fp32 of numbers that bf16 holds, whose products tensor cores make exactly. They
    round what comes back to ten bits, which is rounded to bf16's seven behind the head anyway.

    Without them the head would take most of a step: a GPU multiplies fp32 ten times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with _tensor_cores():
            return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = given
        wanted = ctx.needs_input_grad
        with _tensor_cores(), torch.autocast(gradient.device.type, enabled=False):
            to_x = gradient @ weight if wanted[0] else None
            to_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2) if wanted[1] else None
        return to_x, to_weight


class Fp32Head(torch.nn.Linear):
    """A linear head in fp32, under any autocast, whatever bf16 holds of states and weights.

    A trained head is rounded as a frozen one is stored, so that both give the same logits."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            made = self._product(hidden.to(torch.bfloat16).float())
            return made if self.bias is None else made + self.bias.float()

    def _product(self, states: Tensor) -> Tensor:
        made: Tensor = _HeadProduct.apply(states, self.weight.to(torch.bfloat16).float())
        return made


class Fp32Score(Fp32Head):
    """A scorer's head, whose few weights are stored in fp32, frozen or not."""

    def _product(self, states: Tensor) -> Tensor:
        return torch.nn.functional.linear(states, self.weight.float())


def in_precision(model: Any, resources: Resources, *, trained: bool) -> Any:
    """The model on its device, computing as params say; `trained`: its weights will change."""
    device = device_of(resources)
    computed = precision_of(resources)
    if device.type == "cuda":
        fuse(model)
    if is_quantised(model):
        if trained:
            raise ModelError("a base in 4 bits is never trained itself; set lora.rank above 0")
        model = cast(model, computed, _of_score(model)).to(device)
        if computed is not torch.float32:
            _compute_in_bf16(model, device)
        return model
    if computed is torch.float32:
        if device.type == "cpu" and onednn.faster():
            onednn.through_onednn(model)
        return model.float().to(device)
    pure = resources.precision == "pure_bf16"
    scored = _of_score(model)
    for weight in model.parameters():
        narrow = pure if trained else weight.dim() > 1 and weight not in scored
        weight.data = weight.data.to(torch.bfloat16 if narrow else torch.float32)
    model.to(device)
    _compute_in_bf16(model, device)
    return model


def _of_score(model: Any) -> set[Tensor]:
    """The weights of a scorer's head."""
    score = getattr(model, "score", None)
    return set() if score is None else set(score.parameters())


def _compute_in_bf16(model: Any, device: torch.device) -> None:
    """Autocast of the forward pass, bf16 from the embeddings on, and an fp32 head."""
    forward = torch.autocast(device.type, torch.bfloat16)(type(model).forward)
    # A method of its own, so that a copy's is the copy's.
    model.forward = MethodType(forward, model)
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, output: output.to(torch.bfloat16)
    )
    head = head_of(model)
    # A class and no patch of `forward`: a copy of the head is one too.
    if type(head) is torch.nn.Linear:
        head.__class__ = Fp32Score if head is getattr(model, "score", None) else Fp32Head


def head_of(model: Any) -> torch.nn.Module | None:
    """What maps hidden states to logits or scores: the output embeddings, or a scorer's `score`."""
    bare = _bare(model)
    base = without_adapter(bare)
    head = base.get_output_embeddings()
    return head if head is not None else getattr(base, "score", None)


def without_adapter(model: Any) -> Any:
    """The model itself, without an adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _bare(model: Any) -> Any:
    """The model without what averages its gradients over processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def answer_log_probabilities(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions with label != -100 of log pi(label | what stands before), in fp32 (fp64 of
    a model in fp64); shape [rows].

    Only the positions that predict an answer token go through the vocabulary, in chunks, so memory
    grows as CHUNK and not as positions times vocabulary."""
    hidden = hidden_states(model, ids, mask)[:, :-1]
    targets = labels[:, 1:]
    labelled = targets != -100
    logp = log_softmax_at(model, hidden[labelled], targets[labelled])
    table = torch.zeros(labelled.shape, device=logp.device, dtype=logp.dtype)
    table[labelled] = logp
    return table.sum(1)


def padded_rows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, labels [rows, positions] of prompts with answers (`answer_log_probabilities`)."""
    pairs = list(zip(prompts, answers, strict=True))
    ids, mask = padded([[*prompt, *answer] for prompt, answer in pairs], pad)
    labels, _ = padded([[-100] * len(prompt) + [*answer] for prompt, answer in pairs], -100)
    return ids, mask, labels


def answer_logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits from which each token of an answer is drawn; [tokens, vocabulary], fp32 or more."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    hidden = hidden_states(model, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
    return _logits(head_of(model), model.config.get_text_config(), hidden)


def hidden_states(model: Any, ids: Tensor, mask: Tensor, **given: Any) -> Tensor:
    """What the model hands its head, which gets no position: [rows, positions, hidden]."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0])
        return (given[0][:, :0], *given[1:])

    head = head_of(model)
    assert head is not None
    hook = head.register_forward_pre_hook(keep)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False, **given)
    finally:
        hook.remove()
    return seen[0]


def log_softmax_at(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax [positions], fp32, of targets [positions]; hidden [positions, width]."""
    head = head_of(model)
    config = _bare(model).config.get_text_config()

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        logits = _logits(head, config, states)
        return torch.log_softmax(logits, -1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)

    size = max(1, CHUNK // int(config.vocab_size))
    if len(targets) <= size:
        return part(hidden, targets)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([part(states, wanted) for states, wanted in parts])
    return torch.cat(
        [checkpoint(part, states, wanted, use_reentrant=False) for states, wanted in parts]
    )


def _logits(head: Any, config: Any, hidden: Tensor) -> Tensor:
    """Logits as the model's own forward pass makes them of hidden states."""
    # Not by a call, whose hooks FSDP would take for another forward pass of the model.
    return _shaped(config, head.forward(hidden))


def _shaped(config: Any, output: Tensor) -> Tensor:
    """Logits of the head's output, scaled or capped as the configuration says; fp32 or more."""
    logits = output.to(torch.promote_types(output.dtype, torch.float32))
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    for factor in filter(None, (getattr(config, key, None) for key in _FACTORS)):
        logits = logits * factor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_head(model: Any, path: Any) -> None:
    """Put numbers as large as logits get in the place of the head's output, and compare what the
    model makes of them with what we do. Raises ModelError where it does other things."""
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    put: list[Tensor] = []

    def replaced(module: torch.nn.Module, given: Any, output: Tensor) -> Tensor:
        row = torch.linspace(-_LARGE, _LARGE, output.shape[-1], device=output.device)
        put.append(row.to(output.dtype).expand_as(output))
        return put[0]

    head = head_of(model)
    hook = head.register_forward_hook(replaced) if head is not None else None
    training = model.training
    model.eval()
    try:
        own = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        model.train(training)
        if hook is not None:
            hook.remove()
    ours = [_shaped(model.config.get_text_config(), states) for states in put]
    if not any(_alike(own.float(), logits) for logits in ours):
        raise ModelError(
            f"{path}: {type(model).__name__} turns hidden states into logits in a way that dualign"
            " does not know; use another architecture"
        )


def _alike(own: Tensor, ours: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    return own.shape == ours.shape and torch.allclose(own, ours, rtol=_SAME, atol=_SAME)
