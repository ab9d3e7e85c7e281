"""Tiny scorers of every kind, with weights that say something, as folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dualign.data import world
from dualign.lm.models import save, train_tokenizer
from dualign.params.base import Resources
from dualign.params.models import GivenScorer
from tests.tiny import on_cpu

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [answer.text for question in world.prompts()[:3] for answer in world.answers(question)[:12]]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1,
    "max_position_embeddings": 256,
}  # fmt: skip
#: Llama Guard's kind of template: the conversation inside a task, its last role named, and a turn
#: for the verdict.
GUARD_TEMPLATE = (
    "<|user|>Task: check the {{ messages[-1]['role'] }} message."
    "{% for turn in messages %} {{ turn['role'] }}: {{ turn['content'] }}{% endfor %}"
    "<|end|><|assistant|>"
)

#: Writes a folder and gives what a params file would say of it.
Maker = Callable[..., GivenScorer]


@pytest.fixture(scope="module")
def resources() -> Resources:
    return on_cpu()


def shaken(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with weights large enough that its outputs differ from text to text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2, generator=generator)
    return model.eval()


def llama(tokenizer: PreTrainedTokenizerBase, **more: Any) -> LlamaConfig:
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaConfig(vocab_size=len(tokenizer), **SIZES, **ids, **more)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return train_tokenizer([*TEXTS, "unsafe", "safe", "safe unsafe"], 320)


@pytest.fixture
def classifier(words: PreTrainedTokenizerBase, tmp_path: Path) -> Maker:
    """One output, a chat template of its own."""

    def make(name: str = "classifier", seed: int = 0, higher_is: str = "harmful") -> GivenScorer:
        save(
            shaken(LlamaForSequenceClassification(llama(words, num_labels=1)), seed),
            words,
            tmp_path / name,
        )
        return GivenScorer(path=str(tmp_path / name), kind="classifier", higher_is=higher_is)  # type: ignore[arg-type]

    return make


@pytest.fixture
def labels(words: PreTrainedTokenizerBase, tmp_path: Path) -> Maker:
    """Three named outputs, under a softmax or under sigmoids."""

    def make(problem: str, label: str) -> GivenScorer:
        named = {0: "fine", 1: "toxic", 2: "threat"}
        config = llama(
            words,
            id2label=named,
            label2id={name: i for i, name in named.items()},
            problem_type=problem,
        )
        save(shaken(LlamaForSequenceClassification(config), 3), words, tmp_path / "labels")
        return GivenScorer(
            path=str(tmp_path / "labels"), kind="labels", label=label, higher_is="harmful"
        )

    return make


@pytest.fixture
def guard(words: PreTrainedTokenizerBase, tmp_path: Path) -> Maker:
    """A causal language model that is asked for a verdict."""

    def make(template: str = GUARD_TEMPLATE, **more: Any) -> GivenScorer:
        folder = tmp_path / "guard"
        save(shaken(LlamaForCausalLM(llama(words)), 4), words, folder)
        (folder / "chat_template.jinja").write_text(template)
        return GivenScorer(path=str(folder), kind="guard", higher_is="harmful", **more)

    return make


@pytest.fixture
def safe_rlhf(words: PreTrainedTokenizerBase, tmp_path: Path) -> Maker:
    """Weights and config as PKU-Alignment/safe-rlhf saves a LlamaModelForScore."""

    def make(
        extra: dict[str, torch.Tensor] | None = None, meaning: str = "harmful", **config: Any
    ) -> GivenScorer:
        folder = tmp_path / "beaver"
        model = shaken(LlamaForSequenceClassification(llama(words, num_labels=1)), 5)
        save(model, words, folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        weights = {
            name.replace("score.", "score_head."): value
            for name, value in model.state_dict().items()
        }
        (folder / "model.safetensors").unlink()
        save_file({**weights, **(extra or {})}, folder / "model.safetensors", {"format": "pt"})
        written = json.loads((folder / "config.json").read_text())
        own = {
            "architectures": ["LlamaModelForScore"],
            "score_dim": 1,
            "score_type": "cost",
            "do_normalize": False,
        }
        for key in ("id2label", "label2id"):
            written.pop(key, None)
        (folder / "config.json").write_text(json.dumps({**written, **own, **config}))
        return GivenScorer(path=str(folder), kind="safe_rlhf", higher_is=meaning)  # type: ignore[arg-type]

    return make


@pytest.fixture
def encoder(tmp_path: Path) -> Maker:
    """A BERT of one output, which reads prompt and answer as two segments and has no chat
    template.
    """

    def make(**more: Any) -> GivenScorer:
        folder = tmp_path / "encoder"
        listed = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            *sorted({word for text in TEXTS for word in text.split()}),
        ]
        core = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="[UNK]")
        )
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
        config = BertConfig(
            vocab_size=len(listed), num_labels=1, **{**SIZES, "max_position_embeddings": 24}
        )
        save(shaken(BertForSequenceClassification(config), 6), tokenizer, folder)
        return GivenScorer(path=str(folder), kind="classifier", higher_is="helpful", **more)

    return make
