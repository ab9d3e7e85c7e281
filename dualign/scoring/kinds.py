"""Kinds of scorers: how each is loaded, which text it reads, which output is the score.

A scorer reads text, never another model's token ids, so it needs to share neither tokenizer nor
template with the policy or with other scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dualign.core.errors import ModelError
from dualign.core.schema import Message, user
from dualign.lm.engines.check import ROWS, check_batches
from dualign.lm.folders import ADAPTER
from dualign.lm.loading import (
    files_of,
    load_config,
    load_model,
    require,
    stored,
    with_adapter,
)
from dualign.lm.models import (
    adapter_base,
    fit_vocabulary,
    load_policy,
    load_tokenizer,
    made_fit,
    read_tokenizer,
)
from dualign.lm.numerics import in_precision, padded_rows, precision_of
from dualign.lm.templates import own_template, read_template
from dualign.lm.tokens import QUESTION, common_prefix, encode_conversations, encode_rendered, render
from dualign.params.base import Frozen, Resources
from dualign.scoring.calibration import Calibration, Platt

#: What Safe RLHF's score models read: prompts.py of PKU-Alignment/safe-rlhf, and the end of the
#: text after the answer.
SAFE_RLHF_TEMPLATE = (
    "BEGINNING OF CONVERSATION: "
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' %}USER: {{ turn['content'] }} ASSISTANT:"
    "{% elif turn['role'] == 'assistant' %}{{ turn['content'] }}{{ eos_token }}"
    "{% else %}{{ turn['content'] }} {% endif %}"
    "{% endfor %}"
)
_SAFE_RLHF = ("LlamaModelForScore", "LlamaForScore")
_SCALARS = ("score_head.bias", "normalizer.mean", "normalizer.var")
_PROBE: list[Message] = [*user(QUESTION), {"role": "assistant", "content": "Sure."}]


@dataclass(frozen=True)
class Place:
    """Where a scorer lies, and the Jinja file that is to be its template, if any.

    Where a server at `url` has its weights, `root` is what that server calls the scorer."""

    path: str
    revision: str | None = None
    template: str | None = None
    url: str | None = None
    root: str = ""


class Reading(Frozen):
    """How the score is read: kind, server, a classifier's label, a guard's words and prefix."""

    kind: str = "classifier"
    url: str | None = None
    label: str | None = None
    unsafe: list[str] = Field(default=["unsafe"])
    safe: list[str] = Field(default=["safe"])
    prefix: str = ""


#: The output of a classifier that has one.
PLAIN = Reading()


@dataclass(frozen=True)
class Loaded:
    """A model, here or at a server, its tokenizer, and what its raw output still goes through."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    steps: tuple[Calibration, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a guard writes: a prefix, of whose ids the last `trim` merge with the first words'."""

    prefix: str
    trim: int
    unsafe: list[int]
    safe: list[int]


Encoded = list[list[int]]
Ended = Sequence[bool] | None


@dataclass(frozen=True)
class Kind:
    """One kind: `load` it, `check` how it is read, `encode` rows, read the scores of a batch.

    `becomes_plain`: loading makes it a classifier of one output, as which it is read and saved."""

    load: Callable[[Place, Resources], Loaded]
    check: Callable[[Loaded, Reading, str], None]
    encode: Callable[[Loaded, Reading, Sequence[Sequence[Message]], Sequence[str], Ended], Encoded]
    outputs: Callable[[Loaded, Reading, Tensor, Tensor], Tensor]
    becomes_plain: bool = False


# --- loading --------------------------------------------------------------------------------------


def load_scorer(place: Place, reading: Reading, resources: Resources) -> Loaded:
    """What is at `place`, which can be read so. Raises ModelError where it cannot, and for one that
    scores a row in a padded batch otherwise than alone.
    """
    kind = KINDS[reading.kind]
    loaded = kind.load(place, resources)
    kind.check(loaded, reading, place.path)
    if place.url is None:
        plain = resources.model_copy(update={"precision": "fp32"})
        check_batches(
            loaded.model,
            place.path,
            precision_of(resources),
            lambda: kind.load(place, plain).model,
            lambda model: _apart(replace(loaded, model=model), reading),
        )
    return loaded


def _apart(loaded: Loaded, reading: Reading) -> float:
    """The largest difference between the scores of rows in a padded batch and alone, as a share of
    the largest score where that is above 1: bf16 rounds large ones by more.
    """
    pad = int(loaded.tokenizer.pad_token_id)

    def scores(rows: Encoded) -> Tensor:
        ids, mask, _ = padded_rows([()] * len(rows), rows, pad)
        device = loaded.model.device
        return KINDS[reading.kind].outputs(loaded, reading, ids.to(device), mask.to(device))

    rows = list(map(list, ROWS))
    alone = torch.cat([scores([row]) for row in rows])
    return float((scores(rows) - alone).abs().max() / alone.abs().max().clamp(min=1.0))


def load_classifier(place: Place, resources: Resources) -> Loaded:
    """A sequence classifier of any number of outputs, here or at a server."""
    tokenizer = _tokenizer(place)
    if place.url is not None:
        return _served_classifier(place, place.url, tokenizer)
    model = load_model(
        AutoModelForSequenceClassification, place.path, dtype="auto", revision=place.revision
    )
    return _ready(model, tokenizer, resources)


def _served_classifier(place: Place, url: str, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    # Its client takes half a second to import, and few scorers are served.
    from dualign.scoring.served import ServedClassifier

    config = load_config(place.path, place.revision)
    if _has_segments(tokenizer):
        raise ModelError(
            f"{place.path}: reads two segments, of which a server is not told; set url to null"
        )
    return Loaded(ServedClassifier(config, place.root, url), tokenizer)


def load_adapted(folder: Path, resources: Resources) -> Loaded:
    """A classifier of one output: adapter and head in a folder, on the base of the policies."""
    adapter = folder / ADAPTER
    tokenizer = load_tokenizer(folder)
    base = adapter_base(adapter)
    policy = load_policy(base, resources)
    backbone = getattr(policy, policy.base_model_prefix)
    model = _headed(backbone, torch.zeros(1, backbone.config.get_text_config().hidden_size), base)
    loaded = _ready(model, tokenizer, resources)
    return replace(loaded, model=with_adapter(loaded.model, adapter).eval())


def _load_guard(place: Place, resources: Resources) -> Loaded:
    """A language model that says a verdict, here or at a server."""
    tokenizer = load_tokenizer(place.path, place.revision, place.template)
    if place.url is not None:
        from dualign.scoring.served import ServedGuard

        config = load_config(place.path, place.revision)
        return Loaded(ServedGuard(config, place.root, place.url), tokenizer)
    model = load_model(AutoModelForCausalLM, place.path, dtype="auto", revision=place.revision)
    return _ready(model, tokenizer, resources)


def _load_safe_rlhf(place: Place, resources: Resources) -> Loaded:
    """A score model of Safe RLHF as a classifier of one output, read without that code.

    Its bias and its normaliser, (s - mean) / sd of a reward and s / sd of a cost, are steps after
    the head."""
    require(place.path)
    config = load_config(place.path, place.revision)
    names = getattr(config, "architectures", None) or []
    if not set(names) & set(_SAFE_RLHF) or getattr(config, "score_dim", 1) != 1:
        raise ModelError(
            f"{place.path}: is no score model of Safe RLHF with one output (architectures {names}"
            " in config.json); choose kind classifier, labels or guard"
        )
    tokenizer = read_tokenizer(place.path, place.revision)
    tokenizer.chat_template = SAFE_RLHF_TEMPLATE
    made_fit(tokenizer, place.path)
    backbone = load_model(AutoModel, place.path, dtype="auto", revision=place.revision)
    names = ("score_head.weight", *_SCALARS)
    held = stored(files_of(place.path, place.revision), lambda name, dtype: name in names)
    model = _headed(backbone, held.pop("score_head.weight", None), place.path)
    scalars = {name: tensor.float().item() for name, tensor in held.items()}
    loaded = _ready(model, tokenizer, resources)
    return replace(loaded, steps=_after_head(scalars, config, place.path))


def _headed(backbone: PreTrainedModel, head: Tensor | None, path: str) -> PreTrainedModel:
    """The classifier of a backbone and a head [1, hidden] that was stored under another name."""
    backbone.config.num_labels = 1
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(backbone.config)
    wanted = model.score.weight.shape
    if head is None or head.shape != wanted or not bool(torch.isfinite(head).all()):
        shape = None if head is None else tuple(head.shape)
        raise ModelError(
            f"{path}: score_head.weight is {shape}, not finite numbers {tuple(wanted)}"
        )
    setattr(model, model.base_model_prefix, backbone)
    model.score.weight = torch.nn.Parameter(head)
    scorer: PreTrainedModel = model
    return scorer


def _after_head(held: dict[str, float], config: Any, path: str) -> tuple[Calibration, ...]:
    """The bias of Safe RLHF's head and its normaliser as one line, or nothing."""
    bias = held.get("score_head.bias", 0.0)
    scale = 1.0
    offset = bias
    if getattr(config, "do_normalize", False):
        if "normalizer.var" not in held or "normalizer.mean" not in held:
            raise ModelError(
                f"{path}: config.json says do_normalize, but the weights lack normalizer.mean or"
                " .var"
            )
        scale = max(held["normalizer.var"], 1e-8) ** -0.5
        mean = 0.0 if getattr(config, "score_type", "reward") == "cost" else held["normalizer.mean"]
        offset = scale * (bias - mean)
    return () if (scale, offset) == (1.0, 0.0) else (Platt(scale, offset),)


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> Loaded:
    """Model and tokenizer in agreement, on the device, never to be trained."""
    if not is_encoder(tokenizer):
        fit_vocabulary(model, tokenizer)
    return Loaded(in_precision(model, resources, trained=False).eval(), tokenizer)


def _tokenizer(place: Place) -> PreTrainedTokenizerBase:
    """An encoder's tokenizer as it is, with a given template; others made fit as a policy's."""
    require(place.path)
    if place.template is not None and not Path(place.template).is_file():
        raise ModelError(
            f"{place.path}: template {place.template} is no file; give a Jinja file or leave it out"
        )
    tokenizer = read_tokenizer(place.path, place.revision)
    if not is_encoder(tokenizer):
        return made_fit(tokenizer, place.path, place.template)
    own = own_template(tokenizer, place.path)
    tokenizer.chat_template = read_template(place.template) if place.template else own
    return tokenizer


def is_encoder(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts are put between a CLS and a SEP token, as BERT's; some language models, such as
    LLM-jp's, have such tokens and put them nowhere."""
    around = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    return None not in around and around <= set(tokenizer("a")["input_ids"])


def _has_segments(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model is told which of two texts a token is of."""
    return is_encoder(tokenizer) and "token_type_ids" in tokenizer.model_input_names


# --- checks ---------------------------------------------------------------------------------------


def _check_one_output(loaded: Loaded, reading: Reading, path: str) -> None:
    if loaded.model.config.num_labels != 1:
        raise ModelError(
            f"{path}: has the outputs {_labels(loaded)}; choose kind labels and name one as label"
        )


def _check_label(loaded: Loaded, reading: Reading, path: str) -> None:
    names = _labels(loaded)
    if reading.label not in names:
        raise ModelError(
            f"{path}: has no label {reading.label!r}; it has {', '.join(map(repr, names))}"
        )
    if len(names) == 1:
        raise ModelError(f"{path}: has one output only; choose kind classifier and leave label out")


def _check_verdict(loaded: Loaded, reading: Reading, path: str) -> None:
    found = verdict(loaded, reading)
    common = set(found.unsafe) & set(found.safe)
    if common:
        token = loaded.tokenizer.decode([min(common)])
        raise ModelError(
            f"{path}: the verdicts {reading.unsafe} and {reading.safe} begin with the same token"
            f" {token!r}; name words that differ from the first token on, or what stands before"
            " them as prefix"
        )


def _labels(loaded: Loaded) -> list[str]:
    named: dict[int, str] = loaded.model.config.id2label
    return [str(named[i]) for i in sorted(named)]


# --- text to ids ----------------------------------------------------------------------------------


def _conversations(
    loaded: Loaded,
    reading: Reading,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    ended: Ended,
) -> Encoded:
    """Conversations by the scorer's template; an encoder without one reads prompt and answer."""
    tokenizer = loaded.tokenizer
    if not is_encoder(tokenizer):
        rows = encode_conversations(tokenizer, prompts, answers, ended)
        return [prompt + answer for prompt, answer in rows]
    if tokenizer.chat_template:
        turns = _turns(prompts, answers)
        inner = encode_rendered(tokenizer, turns, partial(render, tokenizer))
        return [[tokenizer.cls_token_id, *row, tokenizer.sep_token_id] for row in inner]
    texts = ["\n".join(map(itemgetter("content"), prompt)) for prompt in prompts]
    return [
        tokenizer(prompt, answer, split_special_tokens=True)["input_ids"]
        for prompt, answer in zip(texts, answers, strict=True)
    ]


def _questions(
    loaded: Loaded,
    reading: Reading,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    ended: Ended,
) -> Encoded:
    """What a guard is asked, up to its verdict; whether an answer ended is not shown."""
    return _prompts(loaded, reading, _turns(prompts, answers), answers, ended)


def _prompts(
    loaded: Loaded,
    reading: Reading,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    ended: Ended,
) -> Encoded:
    """Prompts that hold the question, up to the verdict; `answers` are not read."""
    found = verdict(loaded, reading)
    rows = _asked(loaded.tokenizer, prompts, found.prefix)
    return [row[: len(row) - found.trim] for row in rows]


def verdict(loaded: Loaded, reading: Reading) -> Verdict:
    """The first token of each word of a guard's verdict, as they follow the end of its prompt.

    Where the prompt's last token merges with the words, it is cut off and belongs to their first
    token."""
    suffix = reading.prefix
    (bare,) = _asked(loaded.tokenizer, [_PROBE], suffix)
    words = [*reading.unsafe, *reading.safe]
    rows = [_asked(loaded.tokenizer, [_PROBE], suffix + word)[0] for word in words]
    shared = min(common_prefix(bare, row) for row in rows)
    first = [row[shared] for row in rows]
    count = len(reading.unsafe)
    return Verdict(
        suffix, len(bare) - shared, sorted(set(first[:count])), sorted(set(first[count:]))
    )


def _asked(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[Message]], suffix: str
) -> Encoded:
    """Ids of conversations by a guard's template up to its answer, and of a text after."""

    def texts(turns: Sequence[Sequence[Message]]) -> list[str]:
        return [text + suffix for text in render(tokenizer, turns, answering=True)]

    return encode_rendered(tokenizer, rows, texts)


def _turns(prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[list[Message]]:
    rows = zip(prompts, answers, strict=True)
    return [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in rows]


# --- outputs to scores; ids and mask are [rows, positions] ----------------------------------------


def _logit(loaded: Loaded, reading: Reading, ids: Tensor, mask: Tensor) -> Tensor:
    """The one output, as it is."""
    return _logits(loaded, ids, mask)[:, 0]


def _label_odds(loaded: Loaded, reading: Reading, ids: Tensor, mask: Tensor) -> Tensor:
    """log P(label) - log(1 - P(label)): a sigmoid's logit, or a softmax's less logsumexp. Outputs
    of a regression, such as ratings, are no odds and stay what they are."""
    logits = _logits(loaded, ids, mask)
    at = _labels(loaded).index(str(reading.label))
    if loaded.model.config.problem_type in ("multi_label_classification", "regression"):
        return logits[:, at]
    others = torch.cat([logits[:, :at], logits[:, at + 1 :]], 1)
    return logits[:, at] - torch.logsumexp(others, 1)


def _logits(loaded: Loaded, ids: Tensor, mask: Tensor) -> Tensor:
    more: dict[str, Any] = {} if is_encoder(loaded.tokenizer) else {"use_cache": False}
    if _has_segments(loaded.tokenizer):
        ends = (ids == loaded.tokenizer.sep_token_id).long()
        second = ends.cumsum(1) - ends  # 0 up to the first SEP, 1 up to the second
        more["token_type_ids"] = second.clamp(max=1) * mask
    logits: Tensor = loaded.model(input_ids=ids, attention_mask=mask, **more).logits
    return logits.double()


def _verdict_odds(loaded: Loaded, reading: Reading, ids: Tensor, mask: Tensor) -> Tensor:
    """log P(unsafe word) - log P(safe word) next."""
    found = verdict(loaded, reading)
    tokens = [*found.unsafe, *found.safe]
    if reading.url is None:
        logits = _next_logits(loaded, ids, mask)[:, tokens]
    else:
        logits = loaded.model.log_shares(ids, mask, tokens)
    count = len(found.unsafe)
    return torch.logsumexp(logits[:, :count], 1) - torch.logsumexp(logits[:, count:], 1)


def _next_logits(loaded: Loaded, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the next token, [rows, vocabulary], with rows turned to be padded on the left."""
    lengths = mask.sum(1, keepdim=True)
    order = (torch.arange(ids.shape[1], device=ids.device) + lengths) % ids.shape[1]
    ids = ids.gather(1, order)
    mask = mask.gather(1, order)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = loaded.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1].double()
    return logits


#: `question` is a guard for whatever it is asked (`dualign.judging.local`); no params name a scorer
#: of that kind.
KINDS = {
    "classifier": Kind(load_classifier, _check_one_output, _conversations, _logit),
    "labels": Kind(load_classifier, _check_label, _conversations, _label_odds),
    "safe_rlhf": Kind(
        _load_safe_rlhf, _check_one_output, _conversations, _logit, becomes_plain=True
    ),
    "guard": Kind(_load_guard, _check_verdict, _questions, _verdict_odds),
    "question": Kind(_load_guard, _check_verdict, _prompts, _verdict_odds),
}
