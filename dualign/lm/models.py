"""Models and tokenizers: built from scratch, loaded from a hub or a folder, saved whole or as adapters."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dualign.core.errors import ModelError
from dualign.core.params import LoraParams, Resources, ScratchParams
from dualign.lm.tokens import PLAIN_TEMPLATE

log = logging.getLogger(__name__)

_SCRATCH_TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' %}<|user|> {{ turn['content'] }}<|assistant|>"
    "{% elif turn['role'] == 'assistant' %} {{ turn['content'] }}<|end|>"
    "{% else %}<|system|> {{ turn['content'] }}{% endif %}"
    "{% endfor %}"
)
_SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def device_of(resources: Resources) -> torch.device:
    """The device to run on: CUDA where there is one, unless params say otherwise."""
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "resources.device is cuda but torch sees no GPU; set it to auto, or install a CUDA build of torch"
        )
    use_cuda = resources.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def precision_of(resources: Resources) -> torch.dtype:
    """bf16 on a GPU that has it, fp32 elsewhere, unless params say otherwise."""
    if resources.precision == "auto":
        capable = device_of(resources).type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if capable else torch.float32
    return torch.bfloat16 if resources.precision == "bf16" else torch.float32


# --- tokenizers -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer learnt from `texts`, with pad, end and role tokens and a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_SPECIAL[0], eos_token=_SPECIAL[1])
    tokenizer.chat_template = _SCRATCH_TEMPLATE
    return tokenizer


def load_tokenizer(
    path: str | Path, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer with EOS, a pad token of its own and a chat template (`chat_template` names a Jinja file).

    Raises ModelError if there is no tokenizer at `path`, or one without an EOS token.
    """
    _require(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision)
    except Exception as error:  # transformers raises many kinds here, down to bare Exception
        raise ModelError(
            f"{path}: no usable tokenizer ({_first_line(error)}); put tokenizer.json and tokenizer_config.json there"
        ) from error
    if tokenizer.eos_token is None:
        if "<|end|>" not in tokenizer.get_vocab() and "<|endoftext|>" not in tokenizer.get_vocab():
            raise ModelError(f"{path}: the tokenizer names no eos_token; set it in tokenizer_config.json")
        tokenizer.eos_token = "<|end|>" if "<|end|>" in tokenizer.get_vocab() else "<|endoftext|>"
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        # A pad equal to EOS makes reward models read the score one token before EOS.
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ModelError(
            f"sft.chat_template: {path} cannot be read ({error.strerror}); give a Jinja file or null"
        ) from error


# --- policies ---------------------------------------------------------------------------------------------------------


def build_scratch(params: ScratchParams, vocabulary: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A small Llama with random weights for this tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=params.hidden_size,
        intermediate_size=params.intermediate_size,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        max_position_embeddings=params.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load_policy(path: str | Path, resources: Resources, revision: str | None = None) -> PreTrainedModel | PeftModel:
    """A causal language model, or an adapter on its base, on the device in the chosen precision."""
    _require(path)
    adapter = Path(path) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else str(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=precision_of(resources))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: cannot be loaded as a causal language model ({_first_line(error)})") from error
    if adapter.is_file():
        model = PeftModel.from_pretrained(model, str(path), is_trainable=True)
    return model.to(device_of(resources))


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's embeddings and special ids agree with the tokenizer."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id


def with_lora(
    model: PreTrainedModel | PeftModel, lora: LoraParams, *, head: bool = False
) -> PreTrainedModel | PeftModel:
    """The model with fresh adapters if `lora.rank` > 0 and it has none yet; `head` adds the score head."""
    if lora.rank == 0 or isinstance(model, PeftModel):
        return model
    config = LoraConfig(
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=["score"] if head else None,
    )
    return get_peft_model(model, config)


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Plain weights: adapters folded in."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer, chat template); an adapter saves itself only."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, PeftModel):
        model.config._name_or_path = ""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


# --- scorers ----------------------------------------------------------------------------------------------------------


def load_scorer_backbone(
    path: str, tokenizer: PreTrainedTokenizerBase, resources: Resources, seed: int
) -> PreTrainedModel:
    """A sequence classifier with one fresh output on top of a language model."""
    _require(path)
    torch.manual_seed(seed)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=precision_of(resources))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be loaded as a scorer ({_first_line(error)})") from error
    fit_vocabulary(model, tokenizer)
    torch.nn.init.zeros_(model.score.weight)
    return model.to(device_of(resources))


def _require(path: str | Path) -> None:
    """A path that looks local must exist; what is left is a hub id."""
    local = str(path).startswith((".", "/", "models/")) or Path(path).exists()
    if local and not Path(path).is_dir():
        raise ModelError(f"{path}: no such model folder; run the stage that writes it, or correct the path")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
