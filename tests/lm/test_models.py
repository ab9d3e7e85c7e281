"""Models and tokenizers: built, loaded, saved; and what is said when they cannot be."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dualign.core.artifacts import write_json, write_parquet
from dualign.core.errors import ModelError, ParamsError
from dualign.core.schema import HELPFUL_PAIRS, SAFETY_PAIRS, SFT, user
from dualign.data import world
from dualign.lm import models
from dualign.lm.sampling import sample
from dualign.lm.tokens import PLAIN_TEMPLATE, encode_prompts
from dualign.params.base import LoraParams, Resources
from tests.lm.layouts import CHATS, byte_level
from tests.lm.test_numerics import stir
from tests.stages.conftest import rows as pair_rows
from tests.tiny import WIDER
from tests.written import solved

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [answer.text for prompt in world.prompts()[::500] for answer in world.answers(prompt)]
SCRATCH = WIDER.model_copy(update={"vocab_size": 320, "layers": 2, "heads": 4, "context": 64})
LORA = LoraParams(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", quantise=None)
IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.train_tokenizer(TEXTS, 320)


def build(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    model = models.build_scratch(SCRATCH, tokenizer, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # logits far enough apart to tell models from each other
    return model


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A saved policy."""
    models.save(build(tokenizer), tokenizer, tmp_path / "policy")
    return tmp_path / "policy"


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def one_line(caught: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_trained_tokenizer_is_the_same_every_time_and_knows_its_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    again = models.train_tokenizer(TEXTS, 320)
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 320
    for text in (TEXTS[0], "never seen: Zürich 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0])


def test_pad_and_end_are_tokens_of_their_own(
    tokenizer: PreTrainedTokenizerBase, policy: Path
) -> None:
    for one in (tokenizer, models.load_tokenizer(policy)):
        assert (
            one.pad_token_id != one.eos_token_id
            and one.eos_token_id is not None
            and one.pad_token_id is not None
        )
        assert one.chat_template


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder") as caught:
        models.load_tokenizer(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in one_line(caught)


def test_a_base_without_tokenizer_is_refused_in_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    build(tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"no usable tokenizer .*put tokenizer\.json") as caught:
        models.load_tokenizer(tmp_path / "bare")
    assert one_line(caught).startswith(f"{tmp_path / 'bare'}: ")


def test_a_tokenizer_that_knows_control_tokens_alone_is_refused(tmp_path: Path) -> None:
    """As transformers makes of a folder that has lost its tokenizer.json."""
    token = {"content": "<|endoftext|>", "special": True}
    named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": token["content"]}
    config = {**named, "added_tokens_decoder": {"0": token}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    told = r"no vocabulary beside \d+ control tokens; put tokenizer\.json there"
    with pytest.raises(ModelError, match=told) as caught:
        models.load_tokenizer(tmp_path)
    assert one_line(caught).startswith(f"{tmp_path}: ")


def test_a_pad_equal_to_eos_is_replaced(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|end|>"}))
    loaded = models.load_tokenizer(tmp_path)
    assert loaded.eos_token == "<|end|>" and loaded.pad_token_id != loaded.eos_token_id


@pytest.mark.parametrize("known", [True, False])
def test_a_tokenizer_without_eos_is_completed_or_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, known: bool
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    if known:
        assert models.load_tokenizer(tmp_path).eos_token == "<|end|>"
        return
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|end|>", "<|halt|>"))
    with pytest.raises(ModelError, match="names no eos_token") as caught:
        models.load_tokenizer(tmp_path)
    one_line(caught)


def test_a_chat_template_may_be_given_kept_or_added(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    given = tmp_path / "mine.jinja"
    given.write_text("{% for turn in messages %}{{ turn['content'] }}!{% endfor %}")
    loaded = models.load_tokenizer(tmp_path, chat_template=str(given))
    assert loaded.apply_chat_template(user("hi"), tokenize=False) == "hi!"
    given.write_text("{{ messages[0]['content'] }}!")
    with pytest.raises(ModelError, match=r"mine\.jinja: the chat template ignores its messages"):
        models.load_tokenizer(tmp_path, chat_template=str(given))
    with pytest.raises(ModelError, match=r"gone\.jinja: cannot be read as a chat template"):
        models.load_tokenizer(tmp_path, chat_template=str(tmp_path / "gone.jinja"))
    (tmp_path / "chat_template.jinja").unlink()
    assert "has no chat template" not in caplog.text
    assert models.load_tokenizer(tmp_path).chat_template == PLAIN_TEMPLATE
    assert f"{tmp_path}: the tokenizer has no chat template" in caplog.text
    assert "of a backbone or a judge: chat_template.jinja in its folder" in caplog.text
    given.write_text("{% for turn in messages %}{{ turn['content'] }}!{% endfor %}")
    given.rename(tmp_path / "chat_template.jinja")
    loaded = models.load_tokenizer(tmp_path)
    assert loaded.apply_chat_template(user("hi"), tokenize=False) == "hi!"


# --- policies -------------------------------------------------------------------------------------


def test_a_scratch_model_depends_on_its_seed_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    one, same, other = (models.build_scratch(SCRATCH, tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(logits(one), logits(same)) and not torch.equal(logits(one), logits(other))
    assert logits(one).shape == (1, 6, len(tokenizer))
    assert (one.config.pad_token_id, one.config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    assert (one.config.num_hidden_layers, one.config.hidden_size) == (2, 32)


def test_a_saved_policy_comes_back_and_forgets_where_it_was(
    policy: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    loaded = models.load_policy(policy, resources)
    assert torch.equal(logits(loaded), logits(build(tokenizer)))
    assert loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    models.save(loaded, tokenizer, policy.parent / "again")
    for path in (policy.parent / "again").glob("*.json"):
        assert str(policy.parent) not in path.read_text()
    assert (policy.parent / "again" / "model.safetensors").is_file()


def test_precision_follows_the_params(policy: Path, resources: Resources) -> None:
    assert (
        models.load_policy(policy, resources.model_copy(update={"precision": "bf16"})).dtype
        == torch.bfloat16
    )
    assert models.precision_of(resources.model_copy(update={"precision": "auto"})) == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(resources: Resources) -> None:
    with pytest.raises(ModelError, match=r"resources\.device is cuda but torch sees no GPU"):
        models.device_of(resources.model_copy(update={"device": "cuda"}))
    assert models.device_of(resources.model_copy(update={"device": "auto"})).type == "cpu"


@pytest.mark.parametrize(
    "content", [None, {}, {"config.json": "{}"}, {"config.json": '{"model_type": "llama"}'}]
)
def test_a_folder_without_a_model_is_refused_in_one_line(
    tmp_path: Path,
    resources: Resources,
    tokenizer: PreTrainedTokenizerBase,
    content: dict[str, str] | None,
) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    for load in (
        models.load_policy,
        lambda path, how: models.load_scorer_backbone(str(path), tokenizer, how),
    ):
        with pytest.raises(ModelError) as caught:
            load(folder, resources)
        assert one_line(caught).startswith(f"{folder}: ")


def test_a_hub_id_that_cannot_be_reached_is_named(resources: Resources) -> None:
    with pytest.raises(ModelError, match=r"^nobody/nothing: no usable config") as caught:
        models.load_policy("nobody/nothing", resources)
    one_line(caught)


def test_a_new_pad_token_gets_a_row_and_the_old_rows_stay(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model, larger = build(tokenizer), models.train_tokenizer(TEXTS, 320)
    before = logits(model)
    larger.add_special_tokens({"pad_token": "<|another|>"})
    models.fit_vocabulary(model, larger)
    assert model.get_input_embeddings().num_embeddings == 384  # a multiple of 64
    assert torch.equal(logits(model)[..., :320], before)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 320


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_is_as_probable_as_others_are_on_average(
    tokenizer: PreTrainedTokenizerBase, tied: bool
) -> None:
    """All logits of GPT-2 lie far below 0, where those of rows near 0 would be."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(4.0)
        model.lm_head.weight -= 1.0
    before = logits(model)
    assert float(before.max()) < -50
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<|another|>"})
    models.fit_vocabulary(model, larger)
    after = logits(model)
    known = len(tokenizer)
    assert torch.equal(after[..., :known], before) and after.shape[-1] > known
    mean = before.mean(-1, keepdim=True).expand_as(after[..., known:])
    assert torch.allclose(after[..., known:], mean, rtol=1e-4)


# --- adapters -------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_train_alone(policy: Path, resources: Resources) -> None:
    plain = models.load_policy(policy, resources)
    before = logits(plain)
    adapted = models.with_lora(plain, LORA, 0)
    assert isinstance(adapted, PeftModel)
    assert torch.allclose(logits(adapted), before, atol=1e-6)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert models.with_lora(adapted, LORA, 0) is adapted


def test_rank_zero_trains_all_weights(policy: Path, resources: Resources) -> None:
    plain = models.load_policy(policy, resources)
    assert models.with_lora(plain, LORA.model_copy(update={"rank": 0}), 0) is plain
    assert models.merged(plain) is plain


def test_rank_zero_is_refused_to_an_adapter_which_alone_would_train(
    policy: Path, resources: Resources
) -> None:
    adapted = models.with_lora(models.load_policy(policy, resources), LORA, 0)
    with pytest.raises(ParamsError, match=rf"adapter on {policy}; give this stage a rank"):
        models.with_lora(adapted, LORA.model_copy(update={"rank": 0}), 0)


def test_adapters_come_back_on_their_base_and_can_be_trained_further(
    policy: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    model = models.with_lora(models.load_policy(policy, resources), LORA, 0)
    stir(model)
    expected = logits(model)
    assert not torch.allclose(expected, logits(models.load_policy(policy, resources)), atol=0.01)
    folder = policy.parent / "adapter"
    models.save(model, tokenizer, folder)
    assert not (folder / "model.safetensors").exists()
    loaded = models.load_policy(folder, resources)
    assert isinstance(loaded, PeftModel) and any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded), expected)
    plain = models.merged(loaded)
    assert not isinstance(plain, PeftModel) and torch.allclose(logits(plain), expected, atol=1e-4)
    models.save(plain, tokenizer, policy.parent / "plain")
    whole = AutoModelForCausalLM.from_pretrained(policy.parent / "plain")
    assert torch.allclose(logits(whole), expected, atol=1e-4)


# --- scorers --------------------------------------------------------------------------------------


def test_a_fresh_scorer_scores_zero(
    policy: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    model = models.load_scorer_backbone(str(policy), tokenizer, resources)
    assert model(input_ids=IDS).logits.tolist() == [[0.0]]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    adapted = models.with_lora(model, LORA, 0, head=True)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("score" in name for name in trained) and any("lora_" in name for name in trained)


@torch.no_grad()
def test_a_scorer_of_texts_and_images_is_read_at_the_last_token_of_a_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Its config of the text has a pad token of its own."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 9,
    }
    seen = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=seen, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    models.fit_vocabulary(model, tokenizer)
    row = [20, 21, 22]
    padded = torch.tensor([[*row, *[tokenizer.pad_token_id] * 2]])
    found = model(input_ids=padded, attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits
    alone = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, 3)).logits
    assert torch.allclose(found, alone, atol=1e-5)


# --- a genuine model ------------------------------------------------------------------------------


def test_a_genuine_llama_loads_and_samples_words(real_data: Path, resources: Resources) -> None:
    folder = real_data / "tiny_llama_260k"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    tokenizer = models.load_tokenizer(folder)
    model = models.load_policy(folder, resources)
    models.fit_vocabulary(model, tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    prompts = encode_prompts(
        tokenizer, [user("Once upon a time"), user("Tell me a story about a little dog.")]
    )
    drawn = sample(model, tokenizer, prompts, count=3, max_new_tokens=20, batch_size=6, seed=0)
    assert [one.prompt for one in drawn] == [0, 0, 0, 1, 1, 1]
    assert all(any(map(str.isalpha, one.text)) for one in drawn)
    assert all(
        token < model.get_input_embeddings().num_embeddings for one in drawn for token in one.tokens
    )


# --- the same seed --------------------------------------------------------------------------------


def workspace(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """What the stages of `seeded_runs` read: a base, one without a pad token, supervised rows and
    pairs.
    """
    long = SCRATCH.model_copy(update={"context": 128})
    models.save(models.build_scratch(long, tokenizer, 0), tokenizer, folder / "base/lora")
    padless = byte_level(CHATS["reasoner"])
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(padless),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
        )
    ).save_pretrained(folder / "base/grown")
    padless.save_pretrained(folder / "base/grown")
    pairs = pair_rows("better_response_id")
    rows = pd.DataFrame(pairs)[["prompt_id", "prompt", "source", "split", "chosen"]]
    rows = rows.rename(columns={"chosen": "response"})
    prepared = folder / "data/prepared"
    write_parquet(prepared / "sft.parquet", rows.to_dict("records"), SFT)
    write_parquet(prepared / "helpful_pairs.parquet", pairs, HELPFUL_PAIRS)
    write_parquet(prepared / "safety_pairs.parquet", pair_rows("safer_response_id"), SAFETY_PAIRS)
    write_json(folder / "data/dual/dual.json", solved())
    shutil.copy(ROOT / "params.yaml", folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the models by name."""
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and "sft" not in path.parts
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_two_processes_write_the_same_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Adapters and rows for new tokens are drawn from the seed, and nothing depends on the order of
    a set.
    """
    first = workspace(tmp_path / "first", tokenizer)
    shutil.copytree(first, tmp_path / "second")
    running = []
    for seed, name in enumerate(("first", "second")):
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.lm.seeded_runs", str(tmp_path / name)]
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        )
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    one, other = (digests(tmp_path / name / "models") for name in ("first", "second"))
    assert one == other
    written = {f"{name}/model.safetensors" for name in ("lora", "grown")}
    written |= {
        f"{name}/adapter_model.safetensors" for name in ("reward_dpo/helpful", "safety_dpo/alone")
    }
    assert written <= one.keys()
    grown = json.loads((tmp_path / "first/models/grown/config.json").read_text())
    assert grown["vocab_size"] == 448 and load_file(
        tmp_path / "first/models/grown/model.safetensors"
    )
    assert not (tmp_path / "first/models/reward_dpo/helpful/ref").exists()
