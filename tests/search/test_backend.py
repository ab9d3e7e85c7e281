"""What a search asks of models, on tiny ones: measuring by labels and by scores, mixing, and the
options of a loss.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import AwaitingLabels, ParamsError
from dualign.core.schema import (
    ANSWERS,
    HELPFUL_PAIRS,
    POOL,
    SAFETY_PAIRS,
    SCORED_PAIRS,
    SUPPORT,
    by_prompt,
    prompt_id,
    read_table,
    user,
)
from dualign.data import world
from dualign.data.labelling import vote
from dualign.evaluation.effective_tilt import Tilt, effective_tilt
from dualign.evaluation.rollout import Scorers, roll_out
from dualign.evaluation.stats import Measurement
from dualign.lm.models import (
    build_scratch,
    load_policy,
    load_scorer_backbone,
    load_tokenizer,
    merged,
    save,
    train_tokenizer,
    with_lora,
)
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.math.constraints import Constraint, Price, with_priced_rewards
from dualign.math.dual.tilt import soft_value
from dualign.methods import METHODS, Plan
from dualign.params.base import LoraParams, PessimismParams, Resources
from dualign.params.loading import load, load_resources
from dualign.params.models import ScratchParams
from dualign.params.search import (
    DualSearchParams,
    FeedbackParams,
    OnlineParams,
    PolicyGradientParams,
)
from dualign.params.training import PairLossParams
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.scoring.support import doubt
from dualign.search import backend
from dualign.search.backend import Inputs, ModelBackend, downsample
from dualign.search.online import Preferences
from dualign.search.rules import Ascent, Step
from dualign.search.screening import off_policy_cost
from dualign.training.pairs import pool_pairs, pool_values, samples_of

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ScratchParams(
    tokenizer="train",
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=24,
    context=128,
)
PROMPTS = pd.DataFrame(
    [
        {"prompt_id": prompt_id(user(q)), "prompt": user(q), "source": "world"}
        for q in world.prompts()[::700]
    ]
)

BELIEVING, PESSIMISTIC = (
    PessimismParams(share=0.4, reward=reward, cost=0.0) for reward in (0.0, 2.0)
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def resources() -> Resources:
    return load_resources(ROOT / "params.yaml").model_copy(
        update={"device": "cpu", "precision": "fp32"}
    )


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
        Scorer(scorer(models / "sft", tokenizer, resources, seed), tokenizer, Platt(1.0, 0.5)).save(
            models / name
        )
    write_pairs(models / "prepared/safety_pairs.parquet", "safer_response_id", SAFETY_PAIRS)
    write_pairs(models / "prepared/helpful_pairs.parquet", "better_response_id", HELPFUL_PAIRS)
    scorers = Scorers.load(resources, models)
    pool = roll_out(scorers.reference, PROMPTS, scorers, count=3, max_new_tokens=8, seed=5)
    write_parquet(models / "scored/pool.parquet", pool, POOL)
    known = pool[pool["sample"] < 2][["length", "logp_ref"]]
    write_parquet(models / "scored/support.parquet", known, SUPPORT)
    return Inputs(models=models, prepared=models / "prepared", scored=models / "scored")


def scorer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, seed: int
) -> Any:
    model = load_scorer_backbone(str(folder), tokenizer, resources, seed)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


@pytest.fixture
def params(tmp_path: Path) -> DualSearchParams:
    shipped = load(DualSearchParams, ROOT / "params.yaml")
    feedback = FeedbackParams(
        prompts=4, labels=20, smoothing=0.5, source="cost_model", folder=str(tmp_path / "labels")
    )
    update = {
        "max_new_tokens": 8,
        "samples_per_prompt": 3,
        "feedback": feedback,
        "pessimism": BELIEVING,
    }
    return shipped.model_copy(update=update)


def write_pairs(path: Path, label: str, schema: pa.Schema) -> None:
    rows = []
    for i, row in enumerate(world.pku_rows(12, seed=1, sharpness=1.0)):
        chosen = row[label]
        rows.append(
            {
                "pair_id": str(i),
                "prompt_id": prompt_id(user(row["prompt"])),
                "prompt": user(row["prompt"]),
                "chosen": row[f"response_{chosen}"],
                "rejected": row[f"response_{1 - chosen}"],
                "chosen_is_safe": None,
                "rejected_is_safe": None,
                "source": "world",
                "split": "train",
            }
        )
    write_parquet(path, rows, schema)


def bench_of(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path, **options: Any
) -> ModelBackend:
    """PD-DPO's bench with some options changed."""
    method = replace(METHODS["pd_dpo"], **options)
    plan = Plan("row", method, "safety_dpo/one", "reward_dpo/helpful")
    return ModelBackend(plan, params, resources, None, PROMPTS, scratch, inputs)


# --- measuring ------------------------------------------------------------------------------------


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
    found = bench_of(many, resources, inputs, tmp_path, cost="feedback").measure(
        0, str(inputs.models / "sft")
    )
    assert found.model_cost is not None and found.cost == pytest.approx(found.model_cost, abs=0.05)


def test_people_are_asked_once_about_answers_that_are_kept(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    by_people = params.feedback.model_copy(update={"source": "file", "labels": 3})
    given = params.model_copy(update={"feedback": by_people})
    folder = Path(by_people.folder)
    with pytest.raises(AwaitingLabels, match="to-label-"):
        bench_of(given, resources, inputs, tmp_path / "s", cost="feedback").measure(
            1, str(inputs.models / "sft")
        )
    kept = (tmp_path / "s/step-1/answers.parquet").read_bytes()
    (asked,) = folder.glob("to-label-*.jsonl")
    labelled = asked.read_text().replace('"unsafe_votes": null', '"unsafe_votes": 3')
    asked.with_name(asked.name.replace("to-label", "labelled")).write_text(labelled)
    found = bench_of(given, resources, inputs, tmp_path / "s", cost="feedback").measure(
        1, "gone, and not needed"
    )
    assert found.cost == pytest.approx(math.log(3.5 / 0.5)) and found.cost_se == 0
    assert (tmp_path / "s/step-1/answers.parquet").read_bytes() == kept


# --- what the pool says without generation --------------------------------------------------------


def ours(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path
) -> ModelBackend:
    """Our bench on a merge of two policies, any two."""
    plan = Plan(
        "row", replace(METHODS["dualign"], rule="merge"), "safety_dpo/one", "reward_dpo/helpful"
    )
    pair_loss = PairLossParams(labels="soft", normalised=False, anchor=0.3, nll=0.0)
    return ModelBackend(plan, params, resources, pair_loss, PROMPTS, scratch, inputs)


def pool_logp(folder: Path | str, resources: Resources, inputs: Inputs) -> np.ndarray:
    """Log-probabilities of the pool's answers under the policy in a folder, [prompts, samples]."""
    pool = read_table(inputs.scored / "pool.parquet", POOL)
    tokenizer = load_tokenizer(inputs.models / "sft")
    prompts, tokens = (
        encode_prompts(tokenizer, pool["prompt"].tolist()),
        [list(ids) for ids in pool["tokens"]],
    )
    logp = log_probabilities(
        load_policy(folder, resources), tokenizer, prompts, tokens, batch_size=9
    )
    return logp.numpy().reshape(pool["prompt_id"].nunique(), -1)


def test_a_merge_is_screened_on_the_pool_without_an_answer(
    params: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = ours(params, resources, inputs, tmp_path)
    monkeypatch.delattr(backend, "roll_out")
    seen = bench.screen(0.3)
    ratio = pool_logp(bench.merge(1, 0.3), resources, inputs) - pool_logp(
        inputs.models / "sft", resources, inputs
    )
    cost = by_prompt(read_table(inputs.scored / "pool.parquet", POOL), "cost")
    assert seen.q == 0.3
    assert (seen.cost, seen.cost_se, seen.ess) == pytest.approx(
        off_policy_cost(ratio, cost), rel=1e-3
    )
    assert bench.screen(0.3) == seen and bench.screen(0.6).cost != seen.cost


def known(tilt: Tilt) -> dict[str, float]:
    """The figures of a tilt: beta_eff and lam_eff are none where the policy goes against the
    reward.
    """
    return {name: value for name, value in tilt.as_dict().items() if value is not None}


def test_a_policys_tilt_is_read_off_the_first_samples(
    params: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = ours(params, resources, inputs, tmp_path)
    ratio = pool_logp(bench.start, resources, inputs) - pool_logp(
        inputs.models / "sft", resources, inputs
    )
    pool = read_table(inputs.scored / "pool.parquet", POOL)
    expected = effective_tilt(
        ratio, *(by_prompt(pool, name) for name in ("reward", "cost", "length"))
    )
    assert known(bench.tilt(bench.start)) == pytest.approx(known(expected), rel=1e-3, abs=1e-6)
    monkeypatch.setattr(backend, "TILT_SAMPLES", 2)
    two = [by_prompt(pool, name)[:, :2] for name in ("reward", "cost", "length")]
    assert known(bench.tilt(bench.start)) == pytest.approx(
        known(effective_tilt(ratio[:, :2], *two)), rel=1e-3, abs=1e-6
    )
    assert bench.tilt(str(inputs.models / "sft")).reward_slope == pytest.approx(0, abs=1e-5)


def test_a_merge_between_adapters_is_the_policy_between(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    """Two adapters on the reference, as a path trained with lora leaves them: products are merged,
    not factors.
    """
    shutil.copytree(inputs.models, tmp_path / "models")
    lora = LoraParams(rank=2, alpha=6.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
    tokenizer, weights = load_tokenizer(inputs.models / "sft"), {}
    for seed, name in enumerate(("reward_dpo/helpful", "safety_dpo/one")):
        policy = with_lora(load_policy(tmp_path / "models/sft", resources), lora, 0)
        torch.manual_seed(seed)
        for key, parameter in policy.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        shutil.rmtree(tmp_path / "models" / name)
        save(policy, tokenizer, tmp_path / "models" / name)
        weights[name] = merged(policy).state_dict()
    bench = ours(params, resources, replace(inputs, models=tmp_path / "models"), tmp_path / "s")
    between = load_policy(tmp_path / "models/sft", resources)
    first, second = weights.values()
    between.load_state_dict({key: 0.6 * first[key] + 0.4 * second[key] for key in first})
    save(between, tokenizer, tmp_path / "between")
    made = bench.merge(1, 0.4)
    assert (Path(made) / "adapter_model.safetensors").is_file()
    expected = pool_logp(tmp_path / "between", resources, inputs)
    assert pool_logp(made, resources, inputs) == pytest.approx(expected, abs=1e-3)
    ends = [pool_logp(tmp_path / "models" / name, resources, inputs) for name in weights]
    blend = bench.blend(2, *(str(tmp_path / "models" / name) for name in weights), 0.4)
    assert blend.endswith("step-2/policy") and pool_logp(blend, resources, inputs) == pytest.approx(
        expected, abs=1e-3
    )
    assert all(np.abs(expected - end).max() > 0.05 for end in ends)


# --- making policies ------------------------------------------------------------------------------


def step(number: int, lam: float, policy: Path) -> Step:
    return Step(
        number, lam, None, str(policy), False, Measurement(0.0, 0.1, 0.0, 0.1, 0.0, 0.5, 0.5, 10)
    )


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
        log_probabilities(
            load_policy(f, resources), load_tokenizer(f), prompts, tokens, batch_size=9
        )
        for f in folders
    ]
    mean = torch.stack(each).exp().mean(0).log().numpy()
    assert answers["logp"].to_numpy() == pytest.approx(mean, abs=1e-4)
    assert answers["logp_ref"].to_numpy() == pytest.approx(each[0].numpy(), abs=1e-4)
    assert found.kl == pytest.approx((mean - each[0].numpy()).mean(), abs=1e-4)


@pytest.mark.parametrize("warm", [False, True])
def test_training_begins_at_the_reference_or_at_the_policy_before(
    warm: bool, params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    timid = params.training.model_copy(
        update={"max_steps": 1, "batch_size": 4, "learning_rate": 1e-6, "warmup": 0.0}
    )
    bench = bench_of(
        params.model_copy(update={"training": timid}), resources, inputs, tmp_path, warm=warm
    )
    trained = bench.train(1, 0.7, step(0, 0.5, inputs.models / "sft"))
    assert distance(trained, inputs.models / ("sft" if warm else "reward_dpo/helpful")) < 1e-3
    assert distance(trained, inputs.models / ("reward_dpo/helpful" if warm else "sft")) > 0.1
    before = (Path(trained) / "model.safetensors").stat().st_mtime_ns
    assert bench.train(1, 0.7, step(0, 0.5, inputs.models / "sft")) == trained
    assert (Path(trained) / "model.safetensors").stat().st_mtime_ns == before, (
        "a finished training is not repeated"
    )


@pytest.mark.parametrize("loss_type", ["ipo", "kto"])
def test_a_training_keeps_the_loss_of_the_start_and_its_pairs(
    loss_type: str, params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """KTO takes an answer as desirable by its flag, and a mismatched answer to each pair."""
    flagged = read_table(inputs.prepared / "safety_pairs.parquet", SAFETY_PAIRS)
    flagged = flagged.assign(
        chosen_is_safe=True, rejected_is_safe=[i % 2 == 0 for i in range(len(flagged))]
    )
    write_parquet(tmp_path / "prepared/safety_pairs.parquet", flagged, SAFETY_PAIRS)
    seen: list[Any] = []
    train = backend.train_pairwise
    monkeypatch.setattr(backend, "train_pairwise", lambda *args: seen.extend(args) or train(*args))
    short = params.model_copy(
        update={"training": params.training.model_copy(update={"max_steps": 2, "batch_size": 6})}
    )
    plan = Plan("row", METHODS["pd_dpo"], "safety_dpo/one", "reward_dpo/helpful")
    given, options = replace(inputs, prepared=tmp_path / "prepared"), {"loss_type": loss_type}
    bench = ModelBackend(plan, short, resources, None, PROMPTS, tmp_path / "s", given, loss=options)
    trained = bench.train(1, 0.7, step(0, 0.5, Path(bench.start)))
    assert distance(trained, inputs.models / "reward_dpo/helpful") > 1e-4
    _, _, pairs, pair_loss, _ = seen
    assert pair_loss.loss_type == loss_type and len(pairs) == 12
    if loss_type == "kto":
        assert [pair.desirable for pair in pairs] == [(True, i % 2 == 0) for i in range(12)]
        assert all(math.isfinite(pair.ref_mismatched) for pair in pairs)


def test_a_tilt_is_towards_the_reward_that_is_trained_on(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    pair_loss = PairLossParams(labels="soft", normalised=False, anchor=0.3, nll=0.0)
    prices = [Price(Constraint("mild", "cost", 0.0), 0.7, 0.0)]
    plan = Plan("row", METHODS["dualign"], "sft", "sft")
    bench = ModelBackend(
        plan, params, resources, pair_loss, PROMPTS, tmp_path, inputs, prices=prices
    )
    policy = inputs.models / "safety_dpo/one"
    ratio = pool_logp(policy, resources, inputs) - pool_logp(
        inputs.models / "sft", resources, inputs
    )
    pool = read_table(inputs.scored / "pool.parquet", POOL)
    paid, free = (
        effective_tilt(
            ratio, *(by_prompt(table, name) for name in ("reward", "cost", "length"))
        ).cost_slope
        for table in (with_priced_rewards(pool, prices), pool)
    )
    assert bench.tilt(str(policy)).cost_slope == pytest.approx(paid, rel=1e-2)
    assert abs(paid - free) > 0.05 * abs(paid)


def test_prices_are_charged_to_the_pool_to_fresh_answers_and_to_pairs(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    pair_loss = PairLossParams(labels="soft", normalised=False, anchor=0.3, nll=0.0)
    prices = [
        Price(Constraint("short", "length", 4.0), 0.2, 4.0),
        Price(Constraint("harm", "p_unsafe", 0.1), 0.7, 0.1),
    ]
    small = params.model_copy(update={"refresh_prompts": 3, "refresh_samples": 2})
    before = step(0, 0.5, inputs.models / "sft")

    def bench(method: str) -> ModelBackend:
        plan = Plan("row", METHODS[method], "sft", "sft")
        return ModelBackend(
            plan, small, resources, pair_loss, PROMPTS, tmp_path / method, inputs, prices=prices
        )

    tokenizer = load_tokenizer(inputs.models / "sft")
    pool = with_priced_rewards(read_table(inputs.scored / "pool.parquet", POOL), prices)
    found = bench("dualign")._pairs(0.5, tmp_path, before)
    fresh = samples_of(
        with_priced_rewards(read_table(tmp_path / "refresh.parquet", ANSWERS), prices), tokenizer
    )
    samples, beta = samples_of(pool, tokenizer), small.beta
    value = soft_value(samples.reward, samples.cost, 0.5, beta)[:3, None].repeat(2, axis=1)
    on_pool = pool_pairs(samples, pool_values(samples, 0.5, beta), 0.5, beta, small.seed)
    assert found == on_pool + pool_pairs(fresh, value, 0.5, beta, small.seed)

    rows = read_table(inputs.prepared / "helpful_pairs.parquet", HELPFUL_PAIRS)
    scores = {
        f"{name}_{side}": 0.5
        for name in ("logp_ref", "reward", "cost")
        for side in ("chosen", "rejected")
    }
    write_parquet(
        tmp_path / "scored/scored_pairs.parquet",
        rows.assign(kind="helpful", **scores),
        SCORED_PAIRS,
    )
    plan, given = (
        Plan("row", METHODS["c_dpo"], "sft", "sft"),
        replace(inputs, scored=tmp_path / "scored"),
    )
    on_pairs = ModelBackend(
        plan, small, resources, pair_loss, PROMPTS, tmp_path, given, prices=prices
    )
    pairs = on_pairs._pairs(0.5, tmp_path, before)
    gap = np.array(
        [len(pair.first) - len(pair.second) for pair in pairs]
    )  # all are unsafe, so length alone tells
    assert [pair.label for pair in pairs] == pytest.approx(
        (1 / (1 + np.exp(0.2 * gap))).tolist(), abs=1e-6
    )


def test_answers_off_the_support_are_doubted_in_the_pool_and_in_fresh_answers(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    """Half of the answers surprise the reference more than the held-out ones do; a method on pairs
    believes all.
    """
    pair_loss = PairLossParams(labels="soft", normalised=False, anchor=0.3, nll=0.0)
    update = {"refresh_prompts": 3, "refresh_samples": 2, "pessimism": PESSIMISTIC}
    wary, before = params.model_copy(update=update), step(0, 0.5, inputs.models / "sft")

    def bench(method: str, weights: PairLossParams | None) -> ModelBackend:
        plan = Plan("row", METHODS[method], "sft", "sft")
        return ModelBackend(plan, wary, resources, weights, PROMPTS, tmp_path / method, inputs)

    pool, tokenizer = (
        read_table(inputs.scored / "pool.parquet", POOL),
        load_tokenizer(inputs.models / "sft"),
    )
    found = doubt(inputs.scored, pool, PESSIMISTIC)
    assert found is not None and 0 < (found.beyond(pool) > 0).mean() < 1
    pairs = bench("dualign", pair_loss)._pairs(0.5, tmp_path, before)
    fresh = samples_of(found.scores(read_table(tmp_path / "refresh.parquet", ANSWERS)), tokenizer)
    samples, beta = samples_of(found.scores(pool), tokenizer), wary.beta
    value = soft_value(samples.reward, samples.cost, 0.5, beta)[:3, None].repeat(2, axis=1)
    on_pool = pool_pairs(samples, pool_values(samples, 0.5, beta), 0.5, beta, wary.seed)
    assert pairs == on_pool + pool_pairs(fresh, value, 0.5, beta, wary.seed)
    assert pairs != bench_without(params, resources, inputs, pair_loss, tmp_path)._pairs(
        0.5, tmp_path, before
    )
    assert bench("sacpo", None)._pool["reward"].tolist() == pool["reward"].tolist()


def bench_without(
    params: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    pair_loss: PairLossParams,
    folder: Path,
) -> ModelBackend:
    """The same without pessimism."""
    small = params.model_copy(update={"refresh_prompts": 3, "refresh_samples": 2})
    return ModelBackend(
        Plan("row", METHODS["dualign"], "sft", "sft"),
        small,
        resources,
        pair_loss,
        PROMPTS,
        folder,
        inputs,
    )


def test_corrected_prices_reach_the_pairs_of_a_training_and_the_tilts_after(
    params: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told price 0.9 in place of 0.2, a training sees the labels of a bench that began at 0.9."""
    pair_loss = PairLossParams(labels="soft", normalised=False, anchor=0.3, nll=0.0)
    small = params.model_copy(update={"refresh_prompts": 3, "refresh_samples": 2})
    plan, before = (
        Plan("row", METHODS["dualign"], "sft", "sft"),
        step(0, 0.5, inputs.models / "sft"),
    )
    limit = Constraint("mild", "cost", 0.0)

    def bench(name: str, price: float) -> ModelBackend:
        prices = [Price(limit, price, 0.0)]
        return ModelBackend(
            plan, small, resources, pair_loss, PROMPTS, tmp_path / name, inputs, prices=prices
        )

    seen: list[Any] = []

    def watched(
        policy: Any, tokenizer: Any, pairs: Any, pair_loss: Any, job: Any
    ) -> dict[str, Any]:
        seen.append(pairs)
        return {"losses": []}

    monkeypatch.setattr(backend, "train_pairwise", watched)
    told, began = bench("told", 0.2), bench("began", 0.9)
    told.train(1, 0.5, before, [0.9])
    began.train(1, 0.5, before)
    bench("kept", 0.2).train(1, 0.5, before)
    assert seen[0] == seen[1] != seen[2]
    policy = str(inputs.models / "safety_dpo/one")
    assert told.tilt(policy) == began.tilt(policy) != bench("other", 0.2).tilt(policy)
    measured = told.measure(1, policy)
    (mild,) = measured.additional
    assert mild.mean == pytest.approx(measured.cost) and mild.error == pytest.approx(
        measured.cost_se
    )
    assert np.allclose(measured.covariance, measured.variance)  # the same quantity twice


def distance(first: str, second: Path) -> float:
    left, right = (load_file(Path(folder) / "model.safetensors") for folder in (first, second))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


# --- rounds of comparisons ------------------------------------------------------------------------


@pytest.fixture
def quick(params: DualSearchParams, tmp_path: Path) -> DualSearchParams:
    """Rounds of two fresh answers to four prompts, two steps a training, and bonuses that can be
    seen.
    """
    training = params.training.model_copy(update={"max_steps": 2, "batch_size": 4, "warmup": 0.0})
    online = OnlineParams(
        labels="models",
        folder=str(tmp_path / "people"),
        retrain_reward=True,
        ridge=1.0,
        reward_scale=0.3,
        cost_scale=0.3,
        dimension=8,
    )
    update = {"training": training, "online": online, "refresh_prompts": 4, "refresh_samples": 2}
    return params.model_copy(update=update)


def online_bench(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path, **losses: Any
) -> ModelBackend:
    plan = Plan("row", METHODS["o_pd_dpo"], "safety_dpo/one", "reward_dpo/helpful")
    frequent = resources.model_copy(update={"checkpoint_steps": 1})
    return ModelBackend(plan, params, frequent, None, PROMPTS, scratch, inputs, **losses)


def rounds(bench: ModelBackend) -> tuple[str, Measurement]:
    """Two rounds; the last policy and its measurement."""
    first = bench.train(1, 0.7, step(0, 0.5, Path(bench.start)))
    last = bench.train(2, 0.9, step(1, 0.7, Path(first)))
    return last, bench.measure(2, last)


def test_a_round_compares_trains_both_policies_and_counts_what_it_took(
    quick: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    bench = online_bench(quick, resources.model_copy(update={"log_steps": 1}), inputs, tmp_path)
    measured = rounds(bench)[1]
    fresh = [Preferences.read(tmp_path / f"step-{k}/fresh") for k in (1, 2)]
    assert all(0 < len(tables.helpful) == len(tables.safety) <= 8 for tables in fresh)
    assert set(fresh[1].safety["source"]) == {"round-2"}
    refreshed = read_table(tmp_path / "step-2/refresh.parquet", ANSWERS)
    assert len(refreshed) == 8 and measured.comparisons == len(fresh[1].helpful)
    answers = read_table(tmp_path / "step-2/answers.parquet", ANSWERS)
    assert measured.generated_tokens == int(answers["length"].sum() + refreshed["length"].sum())
    assert distance(str(tmp_path / "step-1/helpful"), inputs.models / "reward_dpo/helpful") > 1e-4
    assert distance(str(tmp_path / "step-2/helpful"), tmp_path / "step-1/helpful") > 1e-4
    assert bench.measure(0, bench.start).comparisons == 0
    losses = bench.losses(3)
    trainings = [f"step-{k}/{name}" for k in (1, 2) for name in ("helpful", "policy")]
    assert [*dict.fromkeys(row["training"] for row in losses)] == trainings
    assert (
        all(row["step"] > 0 and math.isfinite(row["loss"]) for row in losses)
        and bench.losses(1) == []
    )


def test_a_round_trains_on_all_pairs_so_far_from_its_own_helpful_policy(
    quick: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, float]] = []
    clips: list[float | None] = []
    train = backend.train_pairwise

    def watched(policy: Any, tokenizer: Any, pairs: Any, pair_loss: Any, job: Any) -> Any:
        seen.append((len(pairs), pair_loss.scale))
        clips.append(pair_loss.clip)
        return train(policy, tokenizer, pairs, pair_loss, job)

    monkeypatch.setattr(backend, "train_pairwise", watched)
    timid = quick.model_copy(
        update={
            "training": quick.training.model_copy(update={"max_steps": 2, "learning_rate": 1e-7})
        }
    )
    last, _ = rounds(
        online_bench(timid, resources, inputs, tmp_path, loss={"clip": 3.0}, reward_clip=7.0)
    )
    assert clips == [7.0, 3.0] * 2
    offline = Preferences.read(inputs.prepared).rows_within_budget(timid.training, timid.seed)
    first, second = (len(Preferences.read(tmp_path / f"step-{k}/fresh").helpful) for k in (1, 2))
    counts = [len(offline.helpful) + first] * 2 + [len(offline.helpful) + first + second] * 2
    assert len(offline.helpful) == 8 and [count for count, _ in seen] == counts
    assert [scale for _, scale in seen] == pytest.approx(
        [quick.beta, quick.beta / 0.7, quick.beta, quick.beta / 0.9]
    )
    assert distance(last, tmp_path / "step-2/helpful") < 1e-4


def test_the_given_helpful_policy_may_be_kept(
    quick: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    kept = quick.model_copy(
        update={"online": quick.online.model_copy(update={"retrain_reward": False})}
    )
    bench = online_bench(kept, resources, inputs, tmp_path)
    bench.train(1, 0.7, step(0, 0.5, Path(bench.start)))
    assert not (tmp_path / "step-1/helpful").exists()


def test_bonuses_reach_the_policy(
    quick: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    policies = []
    for scale in (0.0, 0.5):
        online = quick.online.model_copy(
            update={"cost_scale": scale, "reward_scale": 0.0, "retrain_reward": False}
        )
        bench = online_bench(
            quick.model_copy(update={"online": online}), resources, inputs, tmp_path / f"{scale}"
        )
        policies.append(bench.train(1, 0.7, step(0, 0.5, Path(bench.start))))
    assert distance(policies[0], Path(policies[1])) > 1e-4


class Killed(Exception):
    """The machine went away."""


@pytest.mark.parametrize(
    ("name", "call", "when"),
    [
        ("compare", 2, "before"),
        ("preference_tables", 1, "before"),
        ("train_pairwise", 1, "before"),
        ("train_pairwise", 1, "after"),  # checkpoints are there, the policy is not
        ("save", 1, "after"),
        ("load_policy", 3, "before"),
        ("phase_two", 1, "after"),
        ("train_pairwise", 2, "after"),
        ("train_pairwise", 3, "after"),
        ("phase_two", 2, "before"),
        ("train_pairwise", 4, "after"),
        ("measure", 1, "before"),
    ],
)
def test_a_killed_round_ends_with_the_same_policy(
    name: str,
    call: int,
    when: str,
    quick: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, measured = rounds(online_bench(quick, resources, inputs, tmp_path / "whole"))
    function, calls = getattr(backend, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            raise Killed
        result = function(*args, **kwargs)
        if calls == call:
            raise Killed
        return result

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(backend, name, dying)
        rounds(online_bench(quick, resources, inputs, tmp_path / "broken"))
    policy, again = rounds(online_bench(quick, resources, inputs, tmp_path / "broken"))
    assert (Path(policy) / "model.safetensors").read_bytes() == (
        Path(expected) / "model.safetensors"
    ).read_bytes()
    assert again == measured


def test_a_round_waits_for_people_and_goes_on_with_their_labels(
    quick: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    asking = quick.model_copy(update={"online": quick.online.model_copy(update={"labels": "file"})})
    start = step(0, 0.5, inputs.models / "safety_dpo/one")
    with pytest.raises(AwaitingLabels) as caught:
        online_bench(asking, resources, inputs, tmp_path / "s").train(1, 0.7, start)
    assert caught.value.status == 3
    answers = (tmp_path / "s/step-1/refresh.parquet").read_bytes()
    (asked,) = (tmp_path / "people").glob("to-label-*.jsonl")
    labelled = (
        asked.read_text()
        .replace('"more_helpful": null', '"more_helpful": "a"')
        .replace(": null", ': "b"')
    )
    asked.with_name(asked.name.replace("to-label", "labelled")).write_text(labelled)
    online_bench(asking, resources, inputs, tmp_path / "s").train(1, 0.7, start)
    assert (tmp_path / "s/step-1/refresh.parquet").read_bytes() == answers
    tables = Preferences.read(tmp_path / "s/step-1/fresh")
    assert tables.helpful["chosen"].tolist() == tables.safety["rejected"].tolist()


@pytest.mark.parametrize("update", [{"refresh_samples": 4}, {"refresh_prompts": 0}])
def test_rounds_need_answers_of_the_pool(
    update: dict[str, int],
    quick: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
) -> None:
    bench = online_bench(quick.model_copy(update=update), resources, inputs, tmp_path)
    with pytest.raises(ParamsError, match="refresh_samples to at most 3"):
        bench.train(1, 0.7, step(0, 0.5, Path(bench.start)))


# --- policy gradient ------------------------------------------------------------------------------


def climb(
    params: DualSearchParams, resources: Resources, inputs: Inputs, scratch: Path
) -> tuple[Ascent, Measurement]:
    gradient = PolicyGradientParams(
        samples=2,
        batch_size=4,
        steps=3,
        learning_rate=1e-2,
        lambda_init=1.0,
        lambda_rate=0.1,
        window=128,
    )
    given = params.model_copy(
        update={"policy_gradient": gradient, "max_new_tokens": 4, "limit": -2.0}
    )
    frequent = resources.model_copy(update={"checkpoint_steps": 1})
    bench = ModelBackend(
        Plan("row", METHODS["safe_rlhf"], "sft", "sft"),
        given,
        frequent,
        None,
        PROMPTS,
        scratch,
        inputs,
    )
    made = bench.ascend(1)
    return made, bench.measure(1, made.policy)


def test_an_ascent_trains_policy_and_multiplier_and_counts_its_answers(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    made, measured = climb(params, resources.model_copy(update={"log_steps": 1}), inputs, tmp_path)
    assert distance(made.policy, inputs.models / "sft") > 1e-3
    assert [row["step"] for row in made.history] == [1, 2, 3] and made.lam == made.history[-1][
        "lam"
    ] > 1
    answers = read_table(tmp_path / "step-1/answers.parquet", ANSWERS)
    own = measured.generated_tokens - int(answers["length"].sum())
    assert read_json(tmp_path / "step-1/policy-losses.json")
    assert 3 * 4 <= own <= 3 * 4 * 4, "three steps of four answers of at most four tokens"


@pytest.mark.parametrize("name", ["train_policy_gradient", "write_json", "save"])
def test_a_killed_ascent_ends_with_the_same_policy_and_course(
    name: str, params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made, measured = climb(params, resources, inputs, tmp_path / "whole")
    function = getattr(backend, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(backend, name, dying)
        climb(params, resources, inputs, tmp_path / "broken")
    again, remeasured = climb(params, resources, inputs, tmp_path / "broken")
    assert (again.lam, again.history, remeasured) == (made.lam, made.history, measured)
    weights = [
        (Path(policy) / "model.safetensors").read_bytes() for policy in (made.policy, again.policy)
    ]
    assert weights[0] == weights[1]


def test_stretches_are_means_by_hand() -> None:
    history = {
        "lambda": [1.0, 2.0, 3.0, 4.0, 5.0],
        "cost": [0.0] * 5,
        "reward": [1.0] * 5,
        "kl": [0.0, 0, 0, 0, 3.0],
    }
    rows = downsample(history, 2)
    assert [(row["step"], row["lam"], row["kl"]) for row in rows] == [(3, 2.0, 0.0), (5, 4.5, 1.5)]
    assert [row["lam"] for row in downsample(history, 50)] == history["lambda"]
