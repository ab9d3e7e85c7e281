"""What a search asks of models, on tiny ones: measuring by labels and by scores, mixing, and the options of a loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import write_parquet
from dualign.core.errors import AwaitingLabels
from dualign.core.params import DualSearchParams, Resources, ScratchParams, load, load_resources
from dualign.data import world
from dualign.data.schema import ANSWERS, SAFETY_PAIRS, prompt_id, read_table, user
from dualign.labelling import vote
from dualign.lm.models import build_scratch, load_policy, load_scorer_backbone, load_tokenizer, save, train_tokenizer
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.measure.stats import Measurement
from dualign.methods import METHODS, Plan
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.search import Step
from dualign.workbench import Inputs, PolicyBench

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ScratchParams(
    tokenizer="train", vocab_size=300, hidden_size=16, layers=1, heads=2, intermediate_size=24, context=64
)
PROMPTS = pd.DataFrame(
    [{"prompt_id": prompt_id(user(q)), "prompt": user(q), "source": "world"} for q in world.prompts()[::700]]
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def resources() -> Resources:
    return load_resources(ROOT / "params.yaml").model_copy(update={"device": "cpu", "precision": "fp32"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, resources: Resources) -> Inputs:
    """A reference, two policies, a reward and a cost model, all random, and some safety pairs."""
    models = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([answer.text for answer in world.answers(world.prompts()[0])], 300)
    for seed, name in enumerate(("sft", "reward_dpo/helpful", "safety_dpo/one")):
        policy = build_scratch(SCRATCH, tokenizer, seed)
        with torch.no_grad():
            policy.lm_head.weight.mul_(20)
        save(policy, tokenizer, models / name)
    for seed, name in enumerate(("reward_model", "cost_model")):
        Scorer(scorer(models / "sft", tokenizer, resources, seed), tokenizer, Platt(1.0, 0.5)).save(models / name)
    write_pairs(models / "prepared/safety_pairs.parquet")
    return Inputs(models=models, prepared=models / "prepared", scored=models / "none")


def scorer(folder: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, seed: int) -> Any:
    model = load_scorer_backbone(str(folder), tokenizer, resources, seed)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


@pytest.fixture
def params(tmp_path: Path) -> DualSearchParams:
    shipped = load(DualSearchParams, ROOT / "params.yaml")
    feedback = shipped.feedback.model_copy(
        update={
            "prompts": 4,
            "labels": 20,
            "smoothing": 0.5,
            "source": "cost_model",
            "folder": str(tmp_path / "labels"),
        }
    )
    return shipped.model_copy(update={"max_new_tokens": 8, "samples_per_prompt": 3, "feedback": feedback})


def write_pairs(path: Path) -> None:
    rows = []
    for i, row in enumerate(world.pku_rows(12, seed=1, sharpness=1.0)):
        safer = row["safer_response_id"]
        rows.append(
            {
                "pair_id": str(i), "prompt_id": prompt_id(user(row["prompt"])), "prompt": user(row["prompt"]),
                "chosen": row[f"response_{safer}"], "rejected": row[f"response_{1 - safer}"],
                "chosen_is_safe": None, "rejected_is_safe": None, "source": "world", "split": "train",
            }
        )  # fmt: skip
    write_parquet(path, rows, SAFETY_PAIRS)


def bench_of(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path, **options: Any
) -> PolicyBench:
    """PD-DPO's bench with some options changed."""
    method = replace(METHODS["pd_dpo"], **options)
    plan = Plan("row", method, "safety_dpo/one", "reward_dpo/helpful")
    return PolicyBench(plan, params, resources, None, PROMPTS, scratch, inputs)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_labels_replace_the_cost_that_the_search_goes_by_and_nothing_else(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    plain = bench_of(params, resources, inputs, tmp_path / "plain")
    asked = bench_of(params, resources, inputs, tmp_path / "asked", cost="feedback")
    by_model, by_labels = plain.measure(2, plain.start), asked.measure(2, asked.start)
    assert (by_labels.model_cost, by_labels.model_cost_se) == (by_model.cost, by_model.cost_se)
    assert by_labels.labels == 4 * 3 * 20 and by_model.labels == 0 and by_model.model_cost is None
    same = {"cost": 0.0, "cost_se": 0.0, "labels": 0, "model_cost": None, "model_cost_se": None}
    assert replace(by_labels, **same) == replace(by_model, **same)
    answers = read_table(tmp_path / "asked/step-2/answers.parquet", ANSWERS).head(12)
    votes = vote(answers, source="cost_model", count=20, folder=tmp_path, seed=params.seed + 2)
    odds = np.log((votes + 0.5) / (20 - votes + 0.5)).reshape(4, 3).mean(1)
    assert by_labels.cost == pytest.approx(odds.mean())
    assert by_labels.cost_se == pytest.approx(odds.std(ddof=1) / 2)


def test_many_labels_agree_with_the_cost_model(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    every = params.feedback.model_copy(update={"prompts": len(PROMPTS), "labels": 4000})
    many = params.model_copy(update={"feedback": every})
    found = bench_of(many, resources, inputs, tmp_path, cost="feedback").measure(0, str(inputs.models / "sft"))
    assert found.model_cost is not None and found.cost == pytest.approx(found.model_cost, abs=0.05)


def test_people_are_asked_once_about_answers_that_are_kept(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    by_people = params.feedback.model_copy(update={"source": "file", "labels": 3})
    given = params.model_copy(update={"feedback": by_people})
    folder = Path(by_people.folder)
    with pytest.raises(AwaitingLabels, match="to-label-"):
        bench_of(given, resources, inputs, tmp_path / "s", cost="feedback").measure(1, str(inputs.models / "sft"))
    kept = (tmp_path / "s/step-1/answers.parquet").read_bytes()
    (asked,) = folder.glob("to-label-*.jsonl")
    labelled = asked.read_text().replace('"unsafe_votes": null', '"unsafe_votes": 3')
    asked.with_name(asked.name.replace("to-label", "labelled")).write_text(labelled)
    found = bench_of(given, resources, inputs, tmp_path / "s", cost="feedback").measure(1, "gone, and not needed")
    assert found.cost == pytest.approx(math.log(3.5 / 0.5)) and found.cost_se == 0
    assert (tmp_path / "s/step-1/answers.parquet").read_bytes() == kept


# --- making policies --------------------------------------------------------------------------------------------------


def step(number: int, lam: float, policy: Path) -> Step:
    return Step(number, lam, None, str(policy), False, Measurement(0.0, 0.1, 0.0, 0.1, 0.0, 0.5, 0.5, 10))


def test_a_mixture_of_steps_is_measured_by_its_own_answers(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    bench = bench_of(params, resources, inputs, tmp_path, returns="mixture")
    folders = [inputs.models / name for name in ("sft", "reward_dpo/helpful", "safety_dpo/one")]
    mixed = bench.mix(3, [step(k, 0.5 + k, folder) for k, folder in enumerate(folders)])
    assert bench.mix(3, [step(k, 0.5 + k, folder) for k, folder in enumerate(folders)]) == mixed
    found = bench.measure(3, mixed)
    answers = read_table(Path(mixed).parent / "answers.parquet", ANSWERS)
    prompts = encode_prompts(load_tokenizer(folders[0]), answers["prompt"].tolist())
    tokens = [list(ids) for ids in answers["tokens"]]
    each = [
        log_probabilities(load_policy(f, resources), load_tokenizer(f), prompts, tokens, batch_size=9) for f in folders
    ]
    mean = torch.stack(each).exp().mean(0).log().numpy()
    assert answers["logp"].to_numpy() == pytest.approx(mean, abs=1e-4)
    assert answers["logp_ref"].to_numpy() == pytest.approx(each[0].numpy(), abs=1e-4)
    assert found.kl == pytest.approx((mean - each[0].numpy()).mean(), abs=1e-4)


@pytest.mark.parametrize("warm", [False, True])
def test_training_begins_at_the_reference_or_at_the_policy_before(
    warm: bool, params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    timid = params.training.model_copy(update={"max_steps": 1, "batch_size": 4, "learning_rate": 1e-6, "warmup": 0.0})
    bench = bench_of(params.model_copy(update={"training": timid}), resources, inputs, tmp_path, warm=warm)
    trained = bench.train(1, 0.7, step(0, 0.5, inputs.models / "sft"))
    assert distance(trained, inputs.models / ("sft" if warm else "reward_dpo/helpful")) < 1e-3
    assert distance(trained, inputs.models / ("reward_dpo/helpful" if warm else "sft")) > 0.1
    before = (Path(trained) / "model.safetensors").stat().st_mtime_ns
    assert bench.train(1, 0.7, step(0, 0.5, inputs.models / "sft")) == trained
    assert (Path(trained) / "model.safetensors").stat().st_mtime_ns == before, "a finished training is not repeated"


def distance(first: str, second: Path) -> float:
    left, right = (load_file(Path(folder) / "model.safetensors") for folder in (first, second))
    return max(float((left[name] - right[name]).abs().max()) for name in left)
