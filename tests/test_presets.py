"""Presets that name a base on a hub run from data to report, on tiny weights of that base's
architecture.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.repo import Repo
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dualign.core.artifacts import read_json
from dualign.core.errors import DualignError
from dualign.core.records import Comparison, read_record
from dualign.params.loading import check, load, load_resources
from dualign.params.stages import STAGES
from dualign.params.training import SafetyPathParams
from dualign.stage import Run
from pipeline.dvc.dag import StageSpec, load_dag
from tests import shipped
from tests.lm.layouts import CHATS, byte_fallback, byte_level
from tests.params.mistakes import put

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024,
}  # fmt: skip
#: The preset, the kind of its base, and the layout of its conversations; None where the base has no
#: chat template.
PRESETS = {
    "smollm2-gpu": ("llama", "chatml"),
    "qwen2.5-0.5b": ("qwen2", "chatml"),
    "llama-3.2-1b": ("llama", "llama3"),
    "sacpo-alpaca-7b": ("llama", None),
    "c-dpo-llama2-7b": ("llama", None),
    "pd-dpo-30k": ("llama", None),
}
TINY: dict[str, Any] = {
    "constraint.limit": 5.0,
    "generation.max_new_tokens": 8,
    "pessimism.share": 0.1,
    "prepare.world.sft_rows": 60,
    "prepare.world.helpful_pairs": 200,
    "prepare.world.safety_pairs": 200,
    "prepare.pool_prompts": 6,
    "prepare.search_prompts": 6,
    "prepare.certify_prompts": 6,
    "prepare.eval_prompts": 4,
    "score.samples_per_prompt": 4,
    "score.pairs": 16,
    "dual_init.bootstrap": 20,
    "dual_search.prompts": 6,
    "dual_search.samples_per_prompt": 2,
    "dual_search.refresh_prompts": 4,
    "dual_search.refresh_samples": 2,
    "certify.prompts": 6,
    "certify.samples_per_prompt": 2,
    "evaluate.prompts": 4,
    "evaluate.samples_per_prompt": 2,
    "resources.device": "cpu",
    "resources.threads": 1,
}

pytestmark = pytest.mark.usefixtures("one_thread")


# --- tiny weights ---------------------------------------------------------------------------------


def tokenizer_of(chat: str | None) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with that layout, or one as of Llama 2 that brings none."""
    if chat is not None:
        return byte_level(CHATS[chat])
    return byte_fallback(replace(CHATS["plain"], template=""))


def write_base(kind: str, chat: str | None, folder: Path) -> None:
    """A base with random weights, as its makers save it."""
    tokenizer = tokenizer_of(chat)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if kind == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **SIZES, **ids))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **ids))
    model.to(torch.bfloat16).save_pretrained(folder)
    if chat is None:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


def write_beaver(folder: Path, seed: int) -> None:
    """A score model with random weights, as Safe RLHF saves it."""
    tokenizer = tokenizer_of(None)
    tokenizer.chat_template = None
    torch.manual_seed(seed)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
    }
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **SIZES, **ids)
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {
        name.replace("score.", "score_head."): value for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    own = {
        "architectures": ["LlamaModelForScore"],
        "score_dim": 1,
        "score_type": "cost",
        "do_normalize": False,
    }
    kept = {key: value for key, value in written.items() if key not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps({**kept, **own}))


def turn(folder: Path) -> None:
    """The same scorer with its head turned round."""
    weights = load_file(folder / "model.safetensors")
    weights["score_head.weight"] = -weights["score_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# --- a preset cut short ---------------------------------------------------------------------------


def cut(content: dict[str, Any], base: Path) -> dict[str, Any]:
    """The preset on the embedded world and on tiny weights: the same stages, loss and layout, few
    rows and steps.
    """
    for key, value in TINY.items():
        put(content, key, value)
    content["sft"]["base"] = str(base)
    for use in ("sft", "helpful", "safety"):
        content["prepare"][use] = [{"format": "world"}]
    for section in content.values():
        if isinstance(section, dict) and "training" in section:
            section["training"] |= {"max_steps": 2, "batch_size": 4}
    for name in ("reward_model", "cost_model"):
        for scorer in content[name]["given"] or ():
            scorer["path"] = name
    if not content["cost_model"]["given"]:  # two steps teach it nothing that could be calibrated
        content["cost_model"]["calibrate"] = "none"
    for row in content["methods"].values():
        if "feedback" in row:
            row["feedback"] |= {"prompts": 4, "labels": 2}
    return content


def thin(content: dict[str, Any], dag: dict[str, StageSpec]) -> dict[str, Any]:
    """One item of each fanned-out stage, and what it, the certificate and its policy depend on."""
    policies = content["evaluate"]["policies"]
    searched = next(name for name, folder in policies.items() if folder.startswith("aligned/"))
    content["evaluate"]["policies"] = {
        name: policies[name] for name in ("sft", searched, "certified")
    }
    first = {name.split("@")[0]: name for name in reversed(dag) if "@" in name}
    wanted = {*first.values(), *(f"evaluate@{name}" for name in content["evaluate"]["policies"])}
    while more := {up for name in wanted for up in dag[name].upstream} - wanted:
        wanted |= more
    for stage in (
        "reward_dpo",
        "safety_dpo",
        "lagrangian_dpo",
        "lambda_path",
        "safety_path",
        "certify",
    ):
        runs = content[stage]["runs"]
        content[stage]["runs"] = {
            name: run for name, run in runs.items() if f"{stage}@{name}" in wanted
        }
    methods = content["methods"]
    content["methods"] = {
        name: row for name, row in methods.items() if f"dual_search@{name}" in wanted
    }
    return content


def graph(content: dict[str, Any]) -> dict[str, StageSpec]:
    """The stages that dvc.yaml makes of these params, in the working directory."""
    Path("params.yaml").write_text(json.dumps(content))
    return load_dag(Path.cwd())


def ordered(dag: dict[str, StageSpec]) -> Iterator[str]:
    """Every stage after those that it depends on."""
    done: set[str] = set()
    while len(done) < len(dag):
        ready = [name for name in dag if name not in done and set(dag[name].upstream) <= done]
        done |= set(ready)
        yield from ready


def run_stage(name: str) -> None:
    stage, _, item = name.partition("@")
    run: Run[Any] = Run(stage, item or None, load(STAGES[stage]), load_resources())
    main = importlib.import_module(f"stages.{stage}").main
    try:
        main(run)
    except DualignError as error:  # random weights may score the wrong way round
        if "higher_is" not in str(error) or not (Path(stage) / "model.safetensors").is_file():
            raise
        turn(Path(stage))
        main(run)


# --- the presets ----------------------------------------------------------------------------------


def hub_presets() -> set[str]:
    """Files of params/ whose base is a hub id; the evaluations of some, which train as these do,
    are in tests/stages/test_protocols.py.
    """
    contents = {path.stem: shipped.preset(path.stem) for path in shipped.PRESETS}
    bases = {name: each["sft"]["base"] for name, each in contents.items() if not each["suites"]}
    return {
        name for name, base in bases.items() if base != "scratch" and not base.startswith("models/")
    }


def test_every_preset_of_a_hub_base_is_here() -> None:
    assert hub_presets() == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_from_its_data_to_its_report(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = cut(shipped.preset(preset), tmp_path / "base")
    check(copy.deepcopy(content), "params.yaml")
    write_base(*PRESETS[preset], tmp_path / "base")
    for seed, name in enumerate(("reward_model", "cost_model")):
        if content[name]["given"]:
            write_beaver(tmp_path / name, seed)
    Path("dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    Path("data/raw").mkdir(parents=True)
    with contextlib.closing(Repo.init(str(tmp_path), no_scm=True)):
        thinned = thin(content, graph(content))
    for name in ordered(graph(thinned)):
        run_stage(name)
    compared = read_json("reports/comparison.json")
    assert set(compared["policies"]) == set(thinned["evaluate"]["policies"])
    assert thinned["report"]["title"] in Path("reports/index.html").read_text()


def test_an_audit_certifies_the_base_and_trains_no_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = cut(shipped.preset("audit"), tmp_path / "base")
    check(copy.deepcopy(content), "params.yaml")
    write_base("llama", "chatml", tmp_path / "base")
    Path("dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    Path("data/raw").mkdir(parents=True)
    with contextlib.closing(Repo.init(str(tmp_path), no_scm=True)):
        dag = graph(content)
    for name in ordered(dag):
        run_stage(name)
    assert {path.name for path in Path("models").iterdir()} == {
        "sft", "reward_model", "cost_model", "certified",
    }  # fmt: skip
    compared = read_record("reports/comparison.json", Comparison)
    assert compared.certificates["audited"].returned == "sft" == compared.recommended
    for file in Path("models/sft").glob("*.safetensors"):
        assert file.read_bytes() == Path("models/certified/audited", file.name).read_bytes()


def test_sacpo_is_trained_at_the_published_coefficients() -> None:
    checked = check(shipped.preset("sacpo-alpaca-7b"), "it")["safety_path"]
    assert isinstance(checked, SafetyPathParams)
    second = {
        name: run for name, run in checked.runs.items() if run.reference == "reward_dpo/helpful"
    }
    assert [checked.beta / run.lam for run in second.values()] == pytest.approx(
        [0.01, 0.025, 0.05, 0.1]
    )
