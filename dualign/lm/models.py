"""Models and tokenizers: built from scratch, loaded from a hub or a folder, saved."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
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
from transformers.pytorch_utils import Conv1D

from dualign.core import ranks
from dualign.core.errors import ModelError, ParamsError
from dualign.core.records import AdapterConfig, read_record
from dualign.lm.decoding import beside, instead_of
from dualign.lm.engines.check import check_batches
from dualign.lm.frozen import frozen, own
from dualign.lm.loading import first_line, load_model, load_reported, name_of, require, with_adapter
from dualign.lm.numerics import check_head, device_of, in_precision, precision_of, without_adapter
from dualign.lm.quantised import folded, is_quantised
from dualign.lm.templates import own_template, read_template, settle
from dualign.lm.tokens import PLAIN_TEMPLATE, TEMPLATE
from dualign.params.base import LoraParams, Resources
from dualign.params.models import ScratchParams

log = logging.getLogger(__name__)

_SCRATCH_TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' %}<|user|> {{ turn['content'] }}<|assistant|>"
    "{% elif turn['role'] == 'assistant' %} {{ turn['content'] }}<|end|>"
    "{% else %}<|system|> {{ turn['content'] }}{% endif %}"
    "{% endfor %}"
)
_SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


# --- tokenizers -----------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `texts`, with pad, end and role tokens and a chat template."""
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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=_SPECIAL[0], eos_token=_SPECIAL[1]
    )
    tokenizer.chat_template = _SCRATCH_TEMPLATE
    return tokenizer


def load_tokenizer(
    path: str | Path,
    revision: str | None = None,
    chat_template: str | None = None,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template (`chat_template` names a Jinja file), an EOS that ends
    turns, and a pad token.

    Raises ModelError if there is no tokenizer at `path`, one without an EOS token, or a template
    that cannot be used."""
    return made_fit(read_tokenizer(path, revision, gguf_file), path, chat_template)


def read_tokenizer(
    path: str | Path, revision: str | None = None, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer as it is stored. Raises ModelError if there is none at `path`."""
    require(path)
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), revision=revision, trust_remote_code=False, **options
        )
    except Exception as error:  # transformers raises many kinds here, down to bare Exception
        raise ModelError(
            f"{path}: no usable tokenizer ({first_line(error)}); put tokenizer.json and"
            " tokenizer_config.json there"
        ) from error
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if not set(tokenizer.get_vocab()) - added:  # transformers makes an empty one without a word
        raise ModelError(
            f"{path}: the tokenizer has no vocabulary beside {len(added)} control tokens; put"
            " tokenizer.json there"
        )
    return tokenizer


def made_fit(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer with all that `load_tokenizer` promises; `path` is what errors name."""
    if tokenizer.eos_token is None:
        if "<|end|>" not in tokenizer.get_vocab() and "<|endoftext|>" not in tokenizer.get_vocab():
            raise ModelError(
                f"{path}: the tokenizer names no eos_token; set it in tokenizer_config.json"
            )
        tokenizer.eos_token = "<|end|>" if "<|end|>" in tokenizer.get_vocab() else "<|endoftext|>"
    found = read_template(chat_template) if chat_template else own_template(tokenizer, str(path))
    if not found:
        log.warning(
            "%s: the tokenizer has no chat template, so conversations are written as Alpaca's are"
            " (BEGINNING OF CONVERSATION: USER: ...); where it was trained on others, give its own"
            " as %s",
            path,
            TEMPLATE,
        )
    tokenizer.chat_template = found or PLAIN_TEMPLATE
    settle(tokenizer, str(chat_template or path))
    _with_pad(tokenizer)
    return tokenizer


#: Names of tokens that a base holds in reserve and never says: those that are meant for padding,
#: then any.
_SPARE = (
    re.compile(r"<\|finetune_right_pad_id\|>|<pad>|\[PAD\]|<\|pad(?:ding)?\|>"),
    re.compile(
        r"<\|reserved_special_token_\d+\|>|<reserved_\d+>|<unused\d+>|\[unused\d+\]|<\|extra_\d+\|>|<\|dummy_\d+\|>"
    ),
)
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>")


def _with_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token that the base has and never says; one is added only where there is none.

    A pad equal to EOS makes reward models read the score one token before EOS."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in taken:
        return
    held = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
    spare = [name for names in _SPARE for name in held if names.fullmatch(name)]
    named = [name for name in _TEXT_ENDS if name in held]
    silent = [tokenizer.unk_token] if _knows_every_byte(tokenizer) and tokenizer.unk_token else []
    found = next((token for token in [*spare, *named, *silent] if token not in taken), None)
    if found is None:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    else:
        tokenizer.pad_token = found


def _knows_every_byte(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether any text can be encoded without the unknown token."""
    unknown = tokenizer.unk_token_id
    return (
        unknown is not None
        and unknown not in tokenizer("\U0001f9ff\x00\u4e00", add_special_tokens=False)["input_ids"]
    )


# --- policies -------------------------------------------------------------------------------------


def build_scratch(
    params: ScratchParams, vocabulary: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
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
    model = LlamaForCausalLM(config)
    model.generation_config = instead_of(model.generation_config)
    return model


def load_policy(
    path: str | Path,
    resources: Resources,
    revision: str | None = None,
    *,
    gguf_file: str | None = None,
    trained: bool = False,
    rounded: bool = False,
) -> PreTrainedModel | PeftModel:
    """A causal language model, or an adapter on its base, on the device in the chosen precision.

    `trained` says that all its weights are to change: they are fp32 then, under bf16 as well;
    `rounded` that they begin as what the precision computes with. An adapter's base is frozen
    either way, and what is frozen is held once in a process, so it must not be changed in place
    (`dualign.lm.frozen.own` makes it the model's own). Raises ModelError as `load_model` does."""
    require(path)
    adapter = Path(path) / "adapter_config.json"
    base = adapter_base(path) if adapter.is_file() else str(path)
    computed = precision_of(resources)
    dtype = computed if rounded or computed is torch.float32 else "auto"
    whole = trained and not adapter.is_file()

    stored = partial(load_model, AutoModelForCausalLM, base, revision=revision, gguf_file=gguf_file)

    def read() -> PreTrainedModel:
        model = in_precision(stored(dtype=dtype), resources, trained=whole)
        check_head(model, base)
        check_batches(model, base, computed, partial(stored, dtype=torch.float32))
        return model

    if whole or is_sharded(resources):
        model = read()
        if is_quantised(model):
            raise ParamsError(
                "resources.distributed: fsdp2 cannot shard a base in 4 bits; take ddp"
            )
    else:
        how = (str(dtype), resources.precision, str(device_of(resources)), revision, gguf_file)
        model = frozen(base, read, *how)
    return with_adapter(model, path).to(device_of(resources)) if adapter.is_file() else model


def is_sharded(resources: Resources) -> bool:
    """Whether processes hold shards of what is trained, a copy, for which the model makes room."""
    return ranks.world() > 1 and resources.distributed == "fsdp2"


def adapter_base(path: str | Path) -> str:
    """The base that the adapter in a folder names."""
    return read_record(Path(path) / "adapter_config.json", AdapterConfig).base_model_name_or_path


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's embeddings, special ids and end tokens agree with the tokenizer.

    New rows are the mean of the others, and the vocabulary is rounded up to a multiple of 64.
    Generation ends at every token that ends a turn or that the base ends a text with. It is to draw
    as policies are measured, at temperature 1 and without a penalty, whatever the base asks for."""
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        with seeded(0):
            model.resize_token_embeddings(
                len(tokenizer), mean_resizing=False, pad_to_multiple_of=64
            )
        _take_means(model, known)
    ends = end_tokens(model, tokenizer)
    # Of a model of texts and images the text's own config too, by which scores are read.
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        if others := beside(generation):
            log.info("generation_config.json of policies leaves out the base's %s", others)
        model.generation_config = instead_of(generation)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


@torch.no_grad()
def _take_means(model: PreTrainedModel, known: int) -> None:
    """Give the tokens after the `known` ones the mean of their rows, so that their logits are the
    mean of the others. Rows near 0 have logits near 0, where those of a base such as GPT-2 lie far
    below: it would say nothing but new tokens (Hewitt, 2021)."""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in () if layer is None else layer.parameters():
            weight[known:] = weight[:known].float().mean(0)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random draws of torch from `seed`; those outside go on as if none had been made.

    Of several GPUs only this process's is touched: each other would give it room."""
    own = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(own):
        torch.manual_seed(seed)
        yield


def with_lora(
    model: PreTrainedModel | PeftModel, lora: LoraParams, seed: int, *, head: bool = False
) -> PreTrainedModel | PeftModel:
    """The model with fresh adapters if `lora.rank` > 0 and it has none; `head` adds the score head.

    Adapters are drawn from `seed`. Raises ParamsError for target modules that the model does not
    have, for dropout on what cannot have it, and for all weights of a model that is an adapter."""
    if isinstance(model, PeftModel) and lora.rank == 0:
        raise ParamsError(
            "lora.rank 0 trains all weights, but the policy to go on from is an adapter on"
            f" {name_of(model)}; give this stage a rank too, or that policy's rank 0"
        )
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
    if lora.target_modules != "all-linear":
        _check_targets(model, lora.target_modules)
    try:
        with seeded(seed):
            adapted = get_peft_model(model, config)
    except ValueError as error:
        if "lora_dropout" in str(error):  # weights of experts are one tensor and no module
            raise ParamsError(
                f"lora.dropout {lora.dropout:g} does not go with the experts of"
                f" {type(model).__name__}; set it to 0"
            ) from error
        raise ParamsError(
            f"lora.target_modules {lora.target_modules} does not fit {type(model).__name__}"
            f" ({first_line(error)}); it takes {_taken(model, config)}"
        ) from error
    _check_adapted(adapted)
    return adapted


def _taken(model: PreTrainedModel, config: LoraConfig) -> str:
    """What peft takes as targets of such a model: of Mamba, say, not every linear module."""
    bare = _empty(model)
    head = bare.get_output_embeddings()
    linear = (
        name
        for name, module in bare.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    )
    names = sorted({name.rpartition(".")[2] for name in linear})
    taken = [name for name in names if _takes(model, config, [name])]
    every = "; or write all-linear" if _takes(model, config, "all-linear") else ""
    return ", ".join(taken) + every


def _takes(model: PreTrainedModel, config: LoraConfig, targets: list[str] | str) -> bool:
    asked = copy.copy(config)
    asked.target_modules = targets
    try:
        get_peft_model(_empty(model), asked)
    except ValueError:
        return False
    return True


def _empty(model: PreTrainedModel) -> PreTrainedModel:
    """A model of that kind and shape without weights."""
    with torch.device("meta"):
        return type(model)(model.config)


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse adapters of the head, which log-probabilities skip, and of embeddings tied to it."""
    head = model.get_output_embeddings()
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets and name not in targets:
            continue
        if module is head:
            raise ParamsError(
                f"lora.target_modules: {name} is the head over the vocabulary, of whose weights"
                " log-probabilities are computed; leave it out"
            )
        if module is words and head is not None and head.weight is words.weight:
            raise ParamsError(
                f"lora.target_modules: {name} shares its weights with the head, which would change"
                " too once the adapter is folded in; leave it out"
            )


def _check_adapted(model: PeftModel) -> None:
    """Refuse adapters of modules that share a weight, as Zamba's: it would get all, folded in."""
    owners: dict[torch.Tensor, str] = {}
    shared = set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            continue
        if owners.setdefault(module.get_base_layer().weight, name) != name:
            shared.add(name.rpartition(".")[2])
    if shared:
        raise ParamsError(
            f"lora.target_modules: layers of {type(without_adapter(model)).__name__} share the"
            f" weights of {', '.join(sorted(shared))}, to which adapters of each would be added;"
            " name modules without these, or set lora.rank to 0"
        )


def end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which an answer ends: the end of a turn, and all at which the base ends a text."""
    base = without_adapter(model)
    listed = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    others = listed if isinstance(listed, list) else [listed]
    return [
        tokenizer.eos_token_id,
        *(end for end in others if end not in (None, tokenizer.eos_token_id)),
    ]


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Plain weights, adapters folded in, in fp32, since bf16 would lose most of a small adapter; of
    a base in 4 bits those that they stand for."""
    if not isinstance(model, PeftModel):
        return model
    own(model)
    if is_quantised(model):
        return folded(model)
    return model.float().merge_and_unload()


def save(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a Hugging Face folder, of an adapter itself only. Of several processes one writes."""
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank() > 0:
        return
    if not isinstance(model, PeftModel):
        model.config._name_or_path = ""
    model.save_pretrained(str(folder))
    if isinstance(model, PeftModel):
        _sort_targets(folder / "adapter_config.json")
    tokenizer.save_pretrained(str(folder))


def _sort_targets(config: Path) -> None:
    """Sort what an adapter changes: peft writes sets, in another order in every process."""
    content = json.loads(config.read_text())
    for key in ("target_modules", "target_parameters"):
        if isinstance(content.get(key), list):
            content[key] = sorted(content[key])
    config.write_text(json.dumps(content, indent=2, sort_keys=True))


# --- scorers --------------------------------------------------------------------------------------


def load_scorer_backbone(
    path: str, tokenizer: PreTrainedTokenizerBase, resources: Resources, *, trained: bool = True
) -> PreTrainedModel:
    """A sequence classifier with one output on top of a language model.

    A head that the checkpoint has is kept; a fresh one begins at zero. `trained` as for
    `load_policy`."""
    with seeded(0):  # a head is drawn before it is set to zero, and nobody else's draws may move
        model, missing = load_reported(
            AutoModelForSequenceClassification, path, dtype="auto", fresh=("score.",), num_labels=1
        )
    fit_vocabulary(model, tokenizer)
    if missing:
        torch.nn.init.zeros_(model.score.weight)
    else:
        log.info("%s: the score head of the checkpoint is kept", path)
    return in_precision(model, resources, trained=trained)
