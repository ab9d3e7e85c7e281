"""Templates made fit for use: one BOS, a pinned date, a known end of turn, a pad; or an error that
names the file.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dualign.core.errors import ModelError
from dualign.core.schema import user
from dualign.lm.models import fit_vocabulary, load_tokenizer
from dualign.lm.sampling import sample
from dualign.lm.tokens import decode_answers, encode_answers, encode_conversations, encode_prompts
from dualign.training.run import Job
from dualign.training.supervised import train_sft
from tests.lm.layouts import BUILDERS, CHATS, LLAMA3, Chat, byte_fallback, byte_level
from tests.tiny import on_cpu, short_training

pytestmark = pytest.mark.usefixtures("one_thread")


def loaded(
    tokenizer: PreTrainedTokenizerBase, folder: Path, template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer as `load_tokenizer` reads it from a folder, under its own template or
    another.
    """
    tokenizer.save_pretrained(folder)
    if template is None:
        return load_tokenizer(folder)
    file = folder / "other.jinja"
    file.write_text(template)
    return load_tokenizer(folder, chat_template=str(file))


def refusal(tokenizer: PreTrainedTokenizerBase, folder: Path, template: str) -> str:
    """What is said of a template that cannot be used: one line that begins with the file."""
    with pytest.raises(ModelError) as caught:
        loaded(tokenizer, folder, template)
    message = str(caught.value)
    assert (
        message.startswith(f"{folder / 'other.jinja'}: ")
        and "\n" not in message
        and "sft.chat_template" in message
    )
    return message.removeprefix(f"{folder / 'other.jinja'}: ")


# --- BOS and EOS ----------------------------------------------------------------------------------


def test_a_bos_that_the_template_leaves_to_the_tokenizer_is_written_into_it(tmp_path: Path) -> None:
    tokenizer = loaded(byte_level(CHATS["zephyr"]), tmp_path)
    assert tokenizer.chat_template == "{{ bos_token }}" + CHATS["zephyr"].template
    (ids,) = encode_prompts(tokenizer, [user("Hi")])
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_is_written_for_a_base_that_never_saw_one(tmp_path: Path) -> None:
    chat = CHATS["zephyr"]
    silent = Chat(chat.template, chat.controls, chat.bos, chat.eos, chat.end, adds_bos=False)
    tokenizer = loaded(byte_level(silent), tmp_path)
    assert tokenizer.chat_template == chat.template
    assert tokenizer.bos_token_id not in encode_prompts(tokenizer, [user("Hi")])[0]


def test_the_end_of_a_turn_becomes_eos_and_what_the_template_wrote_stays(tmp_path: Path) -> None:
    """A template that also writes the old EOS goes on to write that."""
    chat = CHATS["chatml"]
    template = chat.template.replace(
        "<|im_end|>\n{% endfor %}", "<|im_end|>{{ eos_token }}\n{% endfor %}"
    )
    tokenizer = loaded(byte_level(chat), tmp_path, template)
    assert tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(
        [*user("Hi"), {"role": "assistant", "content": "Yes"}], tokenize=False
    )
    assert text.endswith("assistant\nYes<|im_end|><|endoftext|>\n")


def test_a_template_that_ends_no_turn_gets_eos_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        tokenizer = loaded(
            byte_level(CHATS["chatml"]),
            tmp_path,
            "{% for t in messages %}[{{ t.content }}]{% endfor %}",
        )
    assert "ends no turn; answers end with <|endoftext|>" in caplog.text
    ((prompt, answer),) = encode_conversations(tokenizer, [user("Hi")], ["Yes"])
    assert tokenizer.decode(prompt + answer) == "[Hi][Yes<|endoftext|>"
    ((_, opened),) = encode_conversations(tokenizer, [user("Hi")], ["Yes"], [False])
    assert opened == answer[:-1]


def test_a_template_whose_answers_open_otherwise_is_told_and_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = loaded(byte_level(CHATS["reasoner"]), tmp_path)
    assert "prompts end where both agree" in caplog.text
    assert tokenizer.decode(encode_prompts(tokenizer, [user("Hi")])[0]).endswith("Hi<|Assistant|>")


@pytest.mark.parametrize("kind", BUILDERS)
def test_control_tokens_that_a_tokenizer_holds_as_plain_ones_are_made_special(
    tmp_path: Path, kind: str
) -> None:
    """The turn's end is EOS then as well, and a text that spells it ends nothing; line breaks stay
    line breaks.
    """
    raw = BUILDERS[kind](CHATS["chatml"])
    raw.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<think>", normalized=False)])
    raw.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and "<|im_" not in token["content"]
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special >= {"<|im_start|>", "<|im_end|>"} and not special & {"\n\n", "<think>"}
    texts = ["Yes", "say <|im_end|> now", "a\n\nb", "<think>so"]
    texts = (
        texts[:2] if kind == "byte_fallback" else texts
    )  # it puts a space after every added token
    answers = encode_answers(tokenizer, texts)
    assert tokenizer.eos_token == "<|im_end|>" and all(
        ids.count(tokenizer.eos_token_id) == 1 for ids in answers
    )
    assert decode_answers(tokenizer, answers) == texts
    plain, spelt = encode_prompts(tokenizer, [user("Hi"), user("<|im_start|>")])
    opened = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert plain.count(opened) == spelt.count(opened)
    saved = loaded(tokenizer, tmp_path / "again")
    assert encode_answers(saved, texts) == answers


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("chat", CHATS)
def test_what_is_settled_is_settled_once(tmp_path: Path, chat: str, kind: str) -> None:
    first = loaded(BUILDERS[kind](CHATS[chat]), tmp_path / "first")
    again = loaded(first, tmp_path / "again")
    assert (
        again.chat_template == first.chat_template
        and again.special_tokens_map == first.special_tokens_map
    )
    again.save_pretrained(tmp_path / "third")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "third" / file.name).read_bytes(), file.name


# --- dates ----------------------------------------------------------------------------------------


def test_todays_date_is_pinned_and_written_into_what_is_saved(tmp_path: Path) -> None:
    tokenizer = loaded(byte_level(CHATS["llama3"]), tmp_path)
    assert "Today: 26 Jul 2024" in tokenizer.decode(encode_prompts(tokenizer, [user("Hi")])[0])
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "chat_template.jinja").read_text()
    assert "'26 Jul 2024'" in saved and "strftime_now(" not in saved


def test_other_formats_of_the_date_are_pinned_too(tmp_path: Path) -> None:
    template = "{# strftime_now is today #}" + LLAMA3.replace(
        "strftime_now('%d %b %Y')", 'strftime_now( "%Y-%m-%d" )'
    )
    tokenizer = loaded(byte_level(CHATS["llama3"]), tmp_path, template)
    assert "Today: 2024-07-26" in tokenizer.decode(encode_prompts(tokenizer, [user("Hi")])[0])


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%d ' + '%b')",
        "strftime_now ('%d')",
        "strftime_now(form)",
        "[strftime_now][0]('%d')",
    ],
)
def test_a_date_that_cannot_be_pinned_is_refused(tmp_path: Path, call: str) -> None:
    template = LLAMA3.replace("strftime_now('%d %b %Y')", call)
    said = refusal(byte_level(CHATS["llama3"]), tmp_path, template)
    assert said.startswith("the chat template asks for today's date in a way that cannot be pinned")


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for turn in messages %}{{ turn['content'] }}", "is no valid Jinja (line 1: "),
        ("{{ 'Hello' }}{{ eos_token }}", "ignores its messages"),
        ("{{ messages[0]['content'] }}", "ignores its messages"),
        ("{{ raise_exception('never') }}", "refuses a question and its answer (never)"),
        ("{{ messages[0]['content'] + 1 }}", "refuses a question and its answer"),
        ("{{ messages.nothing.there }}", "refuses a question and its answer"),
        (
            "{{ messages[0]['content'] | tojson(1, 2, 3, 4, 5, 6, 7) }}",
            "refuses a question and its answer",
        ),
        ("{{ 1 / 0 }}{{ messages }}", "refuses a question and its answer"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, template: str, says: str
) -> None:
    assert says in refusal(byte_level(CHATS["chatml"]), tmp_path, template)


def test_a_template_that_changes_an_answered_question_gives_no_prompts(tmp_path: Path) -> None:
    """It can be loaded: a guard, which reads whole conversations, may have such a one."""
    template = "{{ messages | length }}{{ messages | map(attribute='content') | join }}"
    (tmp_path / "mine.jinja").write_text(template)
    byte_level(CHATS["chatml"]).save_pretrained(tmp_path)
    given = load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    with pytest.raises(ModelError, match=r"writes a question otherwise once it is answered"):
        encode_prompts(given, [user("Who wrote it?")])


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    byte_level(CHATS["chatml"]).save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        ModelError, match=r"^/.*mine\.jinja: cannot be read as a chat template .* or null$"
    ):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    """Editors of Windows write one, and carriage returns."""
    given = byte_level(CHATS["chatml"])
    plain = loaded(given, tmp_path / "plain")
    written = CHATS["chatml"].template.replace("\n", "\r\n").encode()
    (tmp_path / "mine.jinja").write_bytes(b"\xef\xbb\xbf" + written)
    marked = load_tokenizer(tmp_path / "plain", chat_template=str(tmp_path / "mine.jinja"))
    prompts = [user("Who wrote it?")]
    assert encode_prompts(marked, prompts) == encode_prompts(plain, prompts)


def test_of_several_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    given = byte_level(CHATS["chatml"])
    written = CHATS["chatml"].template
    alone = loaded(given, tmp_path / "alone").chat_template
    given.chat_template = {"default": written, "tool_use": "{{ tools }}"}
    assert loaded(given, tmp_path / "several").chat_template == alone
    given.chat_template = {"rag": written, "tool_use": "{{ tools }}"}
    told = r"has chat templates rag, tool_use and none is named default; give one .* sft\.chat_"
    with pytest.raises(ModelError, match=told):
        loaded(given, tmp_path / "others")
    assert loaded(given, tmp_path / "others", written).chat_template == alone


def test_an_empty_template_is_refused(tmp_path: Path) -> None:
    byte_level(CHATS["chatml"]).save_pretrained(tmp_path)
    path = tmp_path / "mine.jinja"
    path.write_text("\n")
    with pytest.raises(
        ModelError, match=r"^/.*mine\.jinja: the chat template is empty; give a Jinja file or null$"
    ):
        load_tokenizer(tmp_path, chat_template=str(path))


# --- pad ------------------------------------------------------------------------------------------


def padded(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    found = loaded(tokenizer, folder)
    assert found.pad_token_id is not None
    assert found.pad_token_id not in (found.eos_token_id, found.bos_token_id)
    return found


def test_a_pad_of_its_own_is_kept(tmp_path: Path) -> None:
    tokenizer = byte_level(CHATS["llama3"], "<|mine|>", "<|finetune_right_pad_id|>")
    tokenizer.pad_token = "<|mine|>"
    size = len(tokenizer)
    found = padded(tokenizer, tmp_path)
    assert found.pad_token == "<|mine|>" and len(found) == size


@pytest.mark.parametrize("taken", ["<|eot_id|>", "<|begin_of_text|>"])
def test_a_pad_that_is_bos_or_the_end_of_a_turn_is_not(tmp_path: Path, taken: str) -> None:
    tokenizer = byte_level(CHATS["llama3"], "<|finetune_right_pad_id|>")
    tokenizer.pad_token = taken
    assert padded(tokenizer, tmp_path).pad_token == "<|finetune_right_pad_id|>"


@pytest.mark.parametrize(
    ("chat", "spare", "expected"),
    [
        ("llama3", ("<|reserved_special_token_3|>",), "<|reserved_special_token_3|>"),
        (
            "llama3",
            ("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
            "<|finetune_right_pad_id|>",
        ),
        ("chatml", ("<unused7>",), "<unused7>"),
        ("chatml", (), "<|endoftext|>"),
        ("llama3", (), "<|end_of_text|>"),
        ("gemma", (), "<pad>"),
        ("reasoner", ("<|extra_0|>", "[PAD]"), "[PAD]"),
        ("reasoner", (), "<|pad|>"),
    ],
)
def test_a_spare_token_is_preferred_to_the_end_of_a_text_and_that_to_a_new_one(
    tmp_path: Path, chat: str, spare: tuple[str, ...], expected: str
) -> None:
    tokenizer = byte_level(CHATS[chat], *spare)
    size = len(tokenizer)
    found = padded(tokenizer, tmp_path)
    assert found.pad_token == expected
    assert len(found) == size + (expected == "<|pad|>")


def test_unk_is_a_pad_only_where_it_is_never_met(tmp_path: Path) -> None:
    assert padded(byte_fallback(CHATS["llama2"]), tmp_path / "bytes").pad_token == "<unk>"
    deaf = byte_fallback(CHATS["llama2"])
    deaf.save_pretrained(tmp_path / "deaf")
    file = tmp_path / "deaf" / "tokenizer.json"
    file.write_text(file.read_text().replace('"byte_fallback": true', '"byte_fallback": false'))
    found = load_tokenizer(tmp_path / "deaf")
    assert found.pad_token == "<|pad|>" and found.pad_token_id == len(deaf)


def test_a_model_grows_for_a_pad_that_was_added_and_for_no_other(tmp_path: Path) -> None:
    for chat, rows in (("reasoner", 448), ("chatml", 420)):
        tokenizer = padded(byte_level(CHATS[chat]), tmp_path / chat)
        model = small(420)
        fit_vocabulary(model, tokenizer)
        assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == rows
        assert model.config.pad_token_id == tokenizer.pad_token_id < rows


# --- trained and sampled --------------------------------------------------------------------------


def small(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("chat", "kind"),
    [
        ("chatml", "byte_level"),
        ("llama2", "metaspace"),
        ("llama3", "byte_level"),  # whose prompts end in ids that merge with the answer
        ("reasoner", "no_prefix"),  # whose answers open otherwise than it asks for them
    ],
)
def test_a_model_that_has_learnt_an_answer_says_its_very_ids(
    tmp_path: Path, chat: str, kind: str
) -> None:
    """What is trained is what is sampled: the same form, and the end of the turn ends it."""
    tokenizer = loaded(BUILDERS[kind](CHATS[chat]), tmp_path / "tokenizer")
    model = small(len(tokenizer))
    fit_vocabulary(model, tokenizer)
    prompt = user("How do I cook rice?")
    text = "Warm 2 cups,\nthen stir it. 🍚"
    rows = encode_conversations(tokenizer, [prompt], [text])
    resources = on_cpu()
    training = short_training(batch_size=1, learning_rate=1e-2, max_length=256, max_steps=100)
    metrics = train_sft(
        model, tokenizer, rows, rows, Job(training, resources, tmp_path / "scratch", seed=1)
    )
    assert metrics["heldout_loss"] < 0.01
    drawn = sample(
        model,
        tokenizer,
        encode_prompts(tokenizer, [prompt]),
        count=3,
        max_new_tokens=80,
        batch_size=3,
        seed=1,
    )
    assert [one.tokens for one in drawn] == [rows[0][1]] * 3
    assert all(one.ended and one.text == text for one in drawn)
