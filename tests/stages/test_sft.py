"""The stage sft: a base that is trained, one that is taken as it is, and what is refused by
name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import DataError, ModelError, ParamsError
from dualign.core.schema import PROMPTS, SAFETY_PAIRS, SFT, prompt_id, user
from dualign.data import world
from dualign.lm.models import load_policy, save, with_lora
from dualign.lm.quantised import is_quantised
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_conversations
from dualign.params.base import LoraParams, Resources
from dualign.params.loading import check, read_yaml
from dualign.params.models import SftParams
from dualign.stage import Run
from stages import sft

ROOT = Path(__file__).resolve().parents[2]
BASE = Path("models/base/mine")

pytestmark = pytest.mark.usefixtures("one_thread")


def params(**changes: Any) -> SftParams:
    """The shipped section on a base of one's own, cut short. Raises ParamsError as the loader
    does.
    """
    content = read_yaml(ROOT / "params.yaml")
    content["sft"] |= {"base": str(BASE), **changes}
    content["sft"]["training"] |= {"max_steps": 2, "batch_size": 4}
    checked = check(content, "my.yaml")["sft"]
    assert isinstance(checked, SftParams)
    return checked


def write(content: dict[str, Any]) -> None:
    """The params of the working folder."""
    with Path("params.yaml").open("w") as file:
        YAML(typ="safe").dump(content, file)


@pytest.fixture
def base(workspace: Path) -> Path:
    """The working folder with supervised rows and a base in bf16."""
    (workspace / "models/base").mkdir()
    (workspace / "models/sft").rename(workspace / BASE)
    file = workspace / BASE / "model.safetensors"
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    rows = []
    for i, question in enumerate(world.prompts()[:8]):
        prompt = user(question)
        answer = world.answers(question)[0].text
        split = "train" if i < 6 else "heldout"
        rows.append(
            {
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "response": answer,
                "source": "world",
                "split": split,
            }
        )
    write_parquet(workspace / "data/prepared/sft.parquet", rows, SFT)
    shutil.copy(ROOT / "params.yaml", workspace)
    return workspace


def run(given: SftParams, resources: Resources, **changes: Any) -> None:
    sft.main(Run("sft", None, given, resources.model_copy(update=changes)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_that_is_not_trained_stays_what_it_is(
    base: Path, resources: Resources, precision: str
) -> None:
    run(params(train=False), resources, precision=precision)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (BASE, Path("models/sft"))
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics = read_json("reports/metrics/sft.json")
    assert metrics["trained"] is False and "steps" not in metrics


def test_the_heldout_loss_of_an_untrained_base_is_by_token(
    base: Path, resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    run(params(train=None), resources)
    questions = world.prompts()[6:8]
    answers = [world.answers(question)[0].text for question in questions]
    ids = encode_conversations(tokenizer, [user(question) for question in questions], answers)
    prompts, tokens = zip(*ids, strict=True)
    logps = log_probabilities(
        load_policy(BASE, resources), tokenizer, prompts, tokens, batch_size=2
    )
    expected = -float(logps.sum()) / sum(map(len, tokens))
    assert read_json("reports/metrics/sft.json")["heldout_loss"] == pytest.approx(
        expected, rel=1e-5
    )


def test_training_moves_every_matrix_and_saves_in_fp32(base: Path, resources: Resources) -> None:
    run(params(train=True), resources, precision="bf16")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (BASE, Path("models/sft"))
    )
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert tensor.dim() < 2 or not torch.equal(tensor, before[name].float()), name


def test_scratch_must_be_trained() -> None:
    with pytest.raises(ParamsError, match=r"my\.yaml: sft: train is off, but base 'scratch'"):
        params(base="scratch", train=False)
    with pytest.raises(ParamsError, match="gguf_file belongs to a base"):
        params(base="scratch", gguf_file="x.gguf")


def test_a_row_that_the_template_refuses_is_named_with_its_file(
    base: Path, resources: Resources
) -> None:
    refusing = (
        "{% for turn in messages %}{% if turn['content'] == 'no' %}{{ raise_exception('not that')"
        " }}{% endif %}{{ turn['content'] }}{% endfor %}:"
    )
    Path("mine.jinja").write_text(refusing)
    row = {
        "prompt_id": "p",
        "prompt": user("no"),
        "response": "Yes.",
        "source": "mine",
        "split": "train",
    }
    write_parquet("data/prepared/sft.parquet", [row, {**row, "split": "heldout"}], SFT)
    with pytest.raises(
        DataError, match=r"^data/prepared/sft\.parquet: row 1 .*not that.*sft\.chat_template"
    ):
        run(params(chat_template="mine.jinja"), resources)


def test_rows_longer_than_the_context_are_refused_before_training(
    base: Path, resources: Resources
) -> None:
    given = params()
    longer = given.model_copy(
        update={"training": given.training.model_copy(update={"max_length": 129})}
    )
    with pytest.raises(
        ParamsError, match=r"sft\.training\.max_length: 129 tokens, but the context .* is 128"
    ):
        run(longer, resources)


def test_prompts_that_are_answered_later_must_fit_before_training(
    base: Path, resources: Resources
) -> None:
    """The certificate's are answered last, when all policies are trained."""
    rows = [
        {"prompt_id": prompt_id(user(text)), "prompt": user(text), "source": "mine"}
        for text in ("Why?", "Why so? " * 50, "Oh, why so? " * 50)
    ]
    write_parquet("data/prepared/certify.parquet", rows, PROMPTS)
    told = (
        r"^data/prepared/certify\.parquet: 2 of 3 prompts leave no room for an answer of 40 tokens"
        r" in the context of .*mine, 128 .*_chars \(below 400 all of these are left out\)$"
    )
    with pytest.raises(DataError, match=told):
        run(params(), resources)
    assert not Path("models/sft").exists()
    write_parquet("data/prepared/certify.parquet", rows[:1], PROMPTS)
    run(params(train=False), resources)


def test_a_pair_whose_prompt_the_template_refuses_is_named_before_training(
    base: Path, resources: Resources
) -> None:
    Path("mine.jinja").write_text(
        "{% for turn in messages %}{% if turn['role'] == 'system' %}{{ raise_exception('no system')"
        " }}{% endif %}{{ turn['content'] }}{% endfor %}:"
    )
    prompt = [{"role": "system", "content": "Be brief."}, *user("Why?")]
    row = {"pair_id": "p", "prompt_id": "p", "prompt": prompt, "chosen": "A", "rejected": "B"}
    write_parquet("data/prepared/safety_pairs.parquet", [row], SAFETY_PAIRS)
    told = r"^data/prepared/safety_pairs\.parquet: row 1 \(turns system, user: .*no system"
    with pytest.raises(DataError, match=told):
        run(params(chat_template="mine.jinja"), resources)


def test_rows_of_later_trainings_must_fit_before_the_first(
    base: Path, resources: Resources
) -> None:
    content = read_yaml(ROOT / "params.yaml")
    content["cost_model"]["training"]["max_length"] = 129
    write(content)
    told = r"^cost_model\.training\.max_length: 129 tokens, but the context of .*mine is 128; lower"
    with pytest.raises(ParamsError, match=told):
        run(params(), resources)
    assert not Path("models/sft").exists()
    content["cost_model"]["given"] = [{"path": "a", "kind": "classifier", "higher_is": "harmful"}]
    content["methods"] = {}
    content["dual_search"]["training"]["max_length"] = 129
    content["certify"]["runs"] = {}
    content["evaluate"]["policies"] = {"sft": "sft"}
    write(content)
    run(params(train=False), resources)  # neither trains then


def test_an_engine_that_cannot_draw_from_the_base_is_refused_before_training(
    base: Path, resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    recurrent = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4
    )
    AutoModelForCausalLM.from_config(recurrent).save_pretrained(BASE)
    told = r"^resources\.engine refill: MambaForCausalLM keeps more .* set resources\.engine to gen"
    with pytest.raises(ParamsError, match=told):
        run(params(), resources.model_copy(update={"engine": "refill"}))
    assert not Path("models/sft").exists()


def test_an_adapter_is_no_base(
    base: Path, resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    lora = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
    save(with_lora(load_policy(BASE, resources), lora, 0), tokenizer, Path("adapter"))
    with pytest.raises(ModelError, match=r"^sft\.base: adapter holds an adapter"):
        run(params(base="adapter"), resources)


@pytest.mark.parametrize("train", [True, False])
def test_the_reference_is_put_into_4_bits(base: Path, resources: Resources, train: bool) -> None:
    pytest.importorskip("bitsandbytes")
    given = params(train=train)
    lora = given.lora.model_copy(update={"rank": 2, "quantise": "nf4"})
    run(given.model_copy(update={"lora": lora}), resources)
    assert is_quantised(load_policy("models/sft", resources))
    metrics = read_json("reports/metrics/sft.json")
    assert abs(metrics["heldout_loss_in_4_bits"] - metrics["heldout_loss"]) < 0.5
    again = given.model_copy(update={"lora": lora, "base": "models/sft"})
    with pytest.raises(ModelError, match=r"^sft\.base: models/sft is in 4 bits already"):
        run(again, resources)


def test_a_checkpoint_belongs_to_the_contents_of_base_and_template(
    base: Path, resources: Resources
) -> None:
    """Not to their paths: after a change the training starts afresh."""
    Path("mine.jinja").write_text("{% for turn in messages %}{{ turn['content'] }}{% endfor %}")
    given = params(chat_template="mine.jinja")
    stage = Run("sft", None, given, resources)
    before = stage.scratch(sft.ROWS, *sft.local_inputs(given))
    assert stage.scratch(sft.ROWS, *sft.local_inputs(given)) == before
    Path("mine.jinja").write_text("{% for turn in messages %}{{ turn['content'] }};{% endfor %}")
    template = stage.scratch(sft.ROWS, *sft.local_inputs(given))
    (BASE / "config.json").write_text((BASE / "config.json").read_text() + "\n")
    assert len({before, template, stage.scratch(sft.ROWS, *sft.local_inputs(given))}) == 3
