"""What a search asks of models, on tiny ones: screening, tilts, merging, mixing, training."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dualign.core.schema import (
    ANSWERS,
    POOL,
    by_prompt,
    read_table,
)
from dualign.evaluation.effective_tilt import Tilt, effective_tilt
from dualign.lm.models import (
    load_policy,
    load_tokenizer,
    merged,
    save,
    with_lora,
)
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_prompts
from dualign.math.constraints import Constraint, Price, with_priced_rewards
from dualign.methods import METHODS, Plan
from dualign.params.base import LoraParams, Resources
from dualign.params.search import (
    DualSearchParams,
)
from dualign.params.training import PairLossParams
from dualign.search import answers, backend
from dualign.search.backend import ModelBackend
from dualign.search.screening import off_policy_cost
from dualign.search.task import Inputs, PairLosses, SearchTask
from tests.search.backends import (
    PROMPTS,
    bench_of,
    distance,
    ours,
    pool_logp,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def params(tiny: DualSearchParams) -> DualSearchParams:
    return tiny


def test_a_merge_is_screened_on_the_pool_without_an_answer(
    params: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = ours(params, resources, inputs, tmp_path)
    monkeypatch.delattr(answers, "roll_out")
    seen = bench.screen(0.3)
    ratio = pool_logp(bench.merge(1, 0.3), resources, inputs) - pool_logp(
        inputs.models / "sft", resources, inputs
    )
    cost = by_prompt(read_table(inputs.scored / "pool.parquet", POOL), "cost")
    assert seen.q == 0.3
    assert asdict(seen.pool) == pytest.approx(asdict(off_policy_cost(ratio, cost)), rel=1e-3)
    assert bench.screen(0.3) == seen and bench.screen(0.6).pool.cost != seen.pool.cost
    assert asdict(bench.on_pool(bench.merge(1, 0.3))) == pytest.approx(asdict(seen.pool), rel=1e-6)


def known(tilt: Tilt) -> dict[str, float]:
    """The figures of a tilt: beta_eff and lam_eff are none where the policy goes against the
    reward.
    """
    return {name: value for name, value in asdict(tilt).items() if value is not None}


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
    bench.on_pool(bench.start)  # its log-ratios are those of the tilt
    monkeypatch.delattr(backend, "log_ratios")
    assert known(bench.tilt(bench.start)) == pytest.approx(known(expected), rel=1e-3, abs=1e-6)
    monkeypatch.undo()
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
    lora = LoraParams(
        rank=2, alpha=6.0, dropout=0.0, target_modules=["q_proj", "v_proj"], quantise=None
    )
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
    between = load_policy(tmp_path / "models/sft", resources, trained=True)
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


def test_a_tilt_is_towards_the_reward_that_is_trained_on(
    params: DualSearchParams, resources: Resources, inputs: Inputs, tmp_path: Path
) -> None:
    pair_loss = PairLossParams(labels="soft", normalised=False, anchor=0.3, nll=0.0)
    prices = [Price(Constraint("mild", "cost", 0.0), 0.7, 0.0)]
    plan = Plan("row", METHODS["dualign"], "sft", "sft")
    bench = ModelBackend(
        SearchTask(
            plan, params, resources, PROMPTS, tmp_path, inputs, PairLosses(pair_loss), prices=prices
        )
    )
    policy = inputs.models / "safety_dpo/one"
    ratio = pool_logp(policy, resources, inputs) - pool_logp(
        inputs.models / "sft", resources, inputs
    )
    pool = read_table(inputs.scored / "pool.parquet", POOL)
    slopes = []
    for table in (with_priced_rewards(pool, prices), pool):
        columns = [by_prompt(table, name) for name in ("reward", "cost", "length")]
        slopes.append(effective_tilt(ratio, *columns).cost_slope)
    paid, free = slopes
    assert bench.tilt(str(policy)).cost_slope == pytest.approx(paid, rel=1e-2)
    assert abs(paid - free) > 0.05 * abs(paid)
