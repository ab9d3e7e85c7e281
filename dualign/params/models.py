"""Params of sft, the two scorers and score."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dualign.core.names import Place
from dualign.params.base import (
    ADDRESS,
    NO_ADDRESS,
    Count,
    Few,
    Frozen,
    LoraParams,
    NonNegative,
    Seed,
    Share,
    StageParams,
    TrainingParams,
    Two,
)


class ScratchParams(Frozen):
    """A small Llama, for `sft.base: scratch`. `tokenizer` is `train` or a folder."""

    tokenizer: Place
    vocab_size: Annotated[int, Field(ge=64, le=10**6)]
    hidden_size: Annotated[int, Field(ge=1, le=10**5)]
    layers: Few
    heads: Few
    intermediate_size: Annotated[int, Field(ge=1, le=10**6)]
    context: Annotated[int, Field(ge=1, le=10**7)]

    @model_validator(mode="after")
    def _check(self) -> ScratchParams:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}"
            )
        return self


class SftParams(StageParams):
    """Supervised fine-tuning of the reference policy; with `train` false the base is it."""

    section = "sft"
    shared = {"seed": "seed"}

    seed: Seed
    train: bool | None
    base: Place
    revision: Place | None
    gguf_file: Place | None
    chat_template: Place | None
    scratch: ScratchParams
    training: TrainingParams
    lora: LoraParams

    @model_validator(mode="after")
    def _check(self) -> SftParams:
        if self.base == "scratch" and not self.train:
            raise ValueError(
                "train is off, but base 'scratch' knows nothing yet; set train to true, or name a"
                " base"
            )
        for name in ("gguf_file", "revision"):
            if self.base == "scratch" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} belongs to a base that is a folder or a hub id; set it to null"
                )
        if (
            self.base == "scratch"
            and self.scratch.tokenizer == "train"
            and self.chat_template is not None
        ):
            raise ValueError(
                "chat_template belongs to a tokenizer that exists, and scratch.tokenizer 'train'"
                " makes one with a template of its own; set it to null"
            )
        return self


#: Words of a verdict, none of them empty.
Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]

#: The keys of `dualign.scoring.kinds.KINDS`.
ScorerKind = Literal["classifier", "labels", "safe_rlhf", "guard"]


class GivenScorer(Frozen):
    """A scorer that exists already (docs/scorers.md): where, how it is read, what more means.

    `path` is a hub id or a folder; `label` names the output of a classifier of several; `template`
    is a Jinja file for a tokenizer without a chat template of its own. `url` is where vLLM serves
    the weights. `unsafe`, `safe` and `prefix` are what a guard says: the words of its verdict, and
    what it writes before them."""

    path: Place
    kind: ScorerKind
    higher_is: Literal["harmful", "helpful"]
    revision: Place | None = None
    label: Place | None = None
    template: Place | None = None
    url: str | None = None
    unsafe: Words = ["unsafe"]
    safe: Words = ["safe"]
    prefix: str = ""

    @model_validator(mode="after")
    def _check(self) -> GivenScorer:
        if (self.kind == "labels") != (self.label is not None):
            raise ValueError(
                "kind labels needs a label, the name of one output, and no other kind takes one"
            )
        if self.url is not None and self.kind == "safe_rlhf":
            raise ValueError(
                "a server scores by kind classifier, labels or guard; set url to null, or choose"
                " one"
            )
        if self.url is not None and not ADDRESS.fullmatch(self.url):
            raise ValueError(f"url: {NO_ADDRESS}")
        if self.kind == "safe_rlhf" and self.template is not None:
            raise ValueError("kind safe_rlhf has a template of its own; remove template")
        # What a stage leaves of its params gives every field, so being given is no matter.
        fields = type(self).model_fields
        verdict = ("unsafe", "safe", "prefix")
        changed = [name for name in verdict if getattr(self, name) != fields[name].default]
        if changed and self.kind != "guard":
            raise ValueError(
                "unsafe, safe and prefix are a guard's verdict; remove them, or choose kind guard"
            )
        if self.kind == "guard" and self.higher_is != "harmful":
            raise ValueError(
                "a guard's score is the log-odds of its unsafe words, so higher_is must be harmful"
            )
        return self


class ScorerParams(StageParams):
    """What reward and cost model share. `backbone` is `sft`, a hub id or a folder.

    `given` scorers are served instead of a trained one, which leaves `backbone`, `training`, `lora`
    and the weights of the loss unused. `spread` weighs their disagreement: it lowers a reward and
    raises a cost. `cut_share` of the training pairs have their answers cut, so that the scorer can
    read an answer that did not end."""

    seed: Seed
    given: Annotated[list[GivenScorer], Field(min_length=1)] | None
    spread: NonNegative
    backbone: Place
    cut_share: Share
    training: TrainingParams
    lora: LoraParams
    score_regularisation: NonNegative

    @model_validator(mode="after")
    def _check(self) -> ScorerParams:
        if self.given is not None and self.backbone != "sft":
            raise ValueError(
                "given scorers are not trained, so backbone must be sft, which nothing reads then"
            )
        if self.spread > 0 and len(self.given or ()) < 2:
            raise ValueError(
                "spread weighs how far several given scorers differ; give two or more, or set it"
                " to 0"
            )
        return self


class RewardModelParams(ScorerParams):
    """Bradley-Terry reward model."""

    section = "reward_model"
    shared = {"seed": "seed"}


class CostModelParams(ScorerParams):
    """Cost model: ranking and sign terms, then zero-point calibration on held-out flags."""

    section = "cost_model"
    shared = {"seed": "seed"}

    sign_weight: NonNegative
    calibrate: Literal["platt", "isotonic", "none"]
    zero_pairs: Annotated[int, Field(ge=0)]


class ScoreParams(StageParams):
    """The pool of reference samples and the scored training pairs."""

    section = "score"
    shared = {"seed": "seed", "max_new_tokens": "generation.max_new_tokens"}

    seed: Seed
    max_new_tokens: Count
    samples_per_prompt: Two
    pairs: Count | None
