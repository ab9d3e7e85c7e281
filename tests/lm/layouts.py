"""Chat templates of the kinds that models ship, in words of our own, and small tokenizers that know
their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dualign.lm.tokens import PLAIN_TEMPLATE

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Sure, here is how you do it: warm the rice, stir it, then wait for 10 minutes.",
    "Who wrote it? I do not know. No, that is not what the user said to the model.",
    (
        "BEGINNING OF CONVERSATION: USER: How do I cook? ASSISTANT: Just stir it, system, user,"
        " assistant."
    ),
    "def f(x):\n    return x + 1\n\n\nprint(f(41))\n",
]


@dataclass(frozen=True)
class Chat:
    """A template, the control tokens that it writes, and what its tokenizer calls BOS and EOS.

    `end` is the token that ends a turn; `adds_bos` says that the tokenizer puts BOS before every
    text; `system` that the template takes a system turn."""

    template: str
    controls: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    adds_bos: bool = False
    system: bool = True


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are of help.<|im_end|>\n{%"
    " endif %}{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content']"
    " }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%-"
    " else %}{%- set day = 'never' %}{%- endif %}{{-"
    " '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + day + '\\n\\n' }}{%- if"
    " messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- endif %}{{-"
    " '<|eot_id|>' }}{%- for turn in messages if turn['role'] != 'system' %}{{-"
    " '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' + turn['content'] | trim +"
    " '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{-"
    " '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{% set"
    " rest = messages[1:] if system else messages %}{% for turn in rest %}{% if (turn['role'] =="
    " 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif"
    " %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + turn['content'] if loop.first"
    " and system else turn['content'] %}{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' +"
    " text.strip() + ' [/INST]' }}{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{%"
    " endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for turn in messages %}"
    "{% set role = 'model' if turn['role'] == 'assistant' else turn['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + turn['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' %}{{ '[INST] ' + turn['content'] + ' [/INST]' }}"
    "{% elif turn['role'] == 'assistant' %}{{ ' ' + turn['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for turn in messages %}<|{{ turn['role'] }}|>\n{{ turn['content'] }}{{ eos_token }}\n{%"
    " endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{%- set seen = namespace(last=-1) %}{%- for turn in messages %}{%- if turn['role'] == 'user'"
    " %}{%- set seen.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for turn in messages %}{{-"
    " '<|im_start|>' + turn['role'] + '\\n' }}{%- if turn['role'] == 'assistant' and loop.index0 >"
    " seen.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- turn['content'] +"
    " '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n'"
    " }}{%- if enable_thinking is defined and enable_thinking is false %}{{-"
    " '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
REASONER = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% if turn['role'] == 'user' %}{{ '<|User|>' + turn['content'] }}"
    "{% elif turn['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + turn['content'].split('</think>')[-1] + '<|sentence_end|>' }}"
    "{% else %}{{ turn['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

CHATS = {
    "chatml": Chat(
        CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|endoftext|>", "<|im_end|>"
    ),
    "llama3": Chat(
        LLAMA3,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        adds_bos=True,
    ),
    "llama2": Chat(LLAMA2, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "</s>", adds_bos=True),
    "gemma": Chat(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        adds_bos=True,
        system=False,
    ),
    "mistral": Chat(
        MISTRAL, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "</s>", adds_bos=True, system=False
    ),
    "zephyr": Chat(ZEPHYR, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "</s>", adds_bos=True),
    "plain": Chat(PLAIN_TEMPLATE, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "</s>", adds_bos=True),
    "thinking": Chat(
        THINKING,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "reasoner": Chat(
        REASONER,
        ("<|sentence_begin|>", "<|sentence_end|>", "<|User|>", "<|Assistant|>"),
        "<|sentence_begin|>",
        "<|sentence_end|>",
        "<|sentence_end|>",
        adds_bos=True,
    ),
}


def byte_level(chat: Chat, *spare: str) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, as of GPT-2, Llama 3 and Qwen, with the control tokens of a chat
    and `spare` ones.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*chat.controls, *spare],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return _wrapped(core, chat)


def byte_fallback(chat: Chat, *spare: str) -> PreTrainedTokenizerBase:
    """A tokenizer as of Llama 2: a space is a letter, unknown letters fall to bytes.

    A space is put before every text, also before one after a control token.
    """
    return _sentencepiece(chat, spare, prefix="always")


def metaspace(chat: Chat, *spare: str) -> PreTrainedTokenizerBase:
    """As `byte_fallback`, with a space before the first text alone, as of Mistral and newer
    versions of Llama 2.
    """
    return _sentencepiece(chat, spare, prefix="first")


def no_prefix(chat: Chat, *spare: str) -> PreTrainedTokenizerBase:
    """As `byte_fallback` without a space before a text, as of Gemma."""
    return _sentencepiece(chat, spare, prefix="never")


BUILDERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "no_prefix": no_prefix,
}


def _sentencepiece(chat: Chat, spare: tuple[str, ...], *, prefix: str) -> PreTrainedTokenizerBase:
    controls = [*chat.controls, *spare]
    trained = _trained_pieces()
    tokens = [
        *dict.fromkeys(["<unk>", *controls]),
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *trained[0],
    ]
    vocab = {token: at for at, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(
        models.BPE(
            vocab=vocab, merges=trained[1], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if prefix == "first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first", split=False
        )
    else:
        steps = [normalizers.Prepend("▁")] if prefix == "always" else []
        core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ["<unk>", *controls]]
    )
    return _wrapped(core, chat)


def _trained_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges learnt from texts in which a space is a letter and merges with what
    follows.
    """
    core = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=160, show_progress=False)
    words = [f"▁{word}" for text in TEXTS for word in text.replace("\n", " ").split(" ")]
    core.train_from_iterator(words, trainer)
    vocab = core.get_vocab()
    ordered = sorted(vocab, key=vocab.__getitem__)
    merges = []
    known = set(filter(lambda token: len(token) == 1, ordered))
    for token in ordered:
        cut = next(
            (at for at in range(1, len(token)) if token[:at] in known and token[at:] in known), None
        )
        if cut is not None:
            merges.append((token[:cut], token[cut:]))
            known.add(token)
    kept = [token for token in ordered if token in known]
    return kept, merges


def _wrapped(core: Tokenizer, chat: Chat) -> PreTrainedTokenizerBase:
    if chat.adds_bos and chat.bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{chat.bos} $A",
            pair=f"{chat.bos} $A {chat.bos} $B",
            special_tokens=[(chat.bos, core.token_to_id(chat.bos))],
        )
    named = {"unk_token": "<unk>"} if core.token_to_id("<unk>") is not None else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=chat.bos, eos_token=chat.eos, **named
    )
    tokenizer.chat_template = chat.template
    return tokenizer
