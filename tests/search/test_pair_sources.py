"""The pairs of a training: prices and pessimism in them, and rounds of comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dualign.core.artifacts import write_parquet
from dualign.core.errors import AwaitingLabels, ParamsError
from dualign.core.schema import (
    ANSWERS,
    HELPFUL_PAIRS,
    POOL,
    SAFETY_PAIRS,
    SCORED_PAIRS,
    read_table,
)
from dualign.evaluation.stats import Measurement
from dualign.lm.models import (
    load_tokenizer,
)
from dualign.math.constraints import Constraint, Price, with_priced_rewards
from dualign.math.dual.tilt import soft_value
from dualign.methods import METHODS, Plan
from dualign.params.base import Resources
from dualign.params.search import (
    DualSearchParams,
    OnlineParams,
)
from dualign.params.training import LossSpec, PairLossParams
from dualign.scoring.support import doubt
from dualign.search import backend, pair_sources, trainer
from dualign.search.backend import ModelBackend
from dualign.search.online import Preferences
from dualign.search.task import Inputs, PairLosses, SearchTask
from dualign.training.pairs import pool_pairs, pool_values, samples_of
from tests.search.backends import (
    PESSIMISTIC,
    PROMPTS,
    Killed,
    distance,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = PairLosses()


@pytest.fixture
def params(tiny: DualSearchParams) -> DualSearchParams:
    return tiny


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
    train = trainer.train_pairwise
    monkeypatch.setattr(trainer, "train_pairwise", lambda *args: seen.extend(args) or train(*args))
    short = params.model_copy(
        update={"training": params.training.model_copy(update={"max_steps": 2, "batch_size": 6})}
    )
    plan = Plan("row", METHODS["pd_dpo"], "safety_dpo/one", "reward_dpo/helpful")
    given = replace(inputs, prepared=tmp_path / "prepared")
    losses = PairLosses(safety=LossSpec(loss_type=loss_type, clip=None))
    bench = ModelBackend(
        SearchTask(
            plan,
            short,
            resources,
            PROMPTS,
            tmp_path / "s",
            given,
            losses,
        )
    )
    trained = bench.train(1, 0.7, step(0, 0.5, Path(bench.start)))
    assert distance(trained, inputs.models / "reward_dpo/helpful") > 1e-4
    _, _, pairs, pair_loss, _ = seen
    assert pair_loss.loss_type == loss_type and len(pairs) == 12
    if loss_type == "kto":
        assert [pair.desirable for pair in pairs] == [(True, i % 2 == 0) for i in range(12)]
        assert all(math.isfinite(pair.ref_mismatched) for pair in pairs)


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
            SearchTask(
                plan,
                small,
                resources,
                PROMPTS,
                tmp_path / method,
                inputs,
                PairLosses(pair_loss),
                prices=prices,
            )
        )

    tokenizer = load_tokenizer(inputs.models / "sft")
    pool = with_priced_rewards(read_table(inputs.scored / "pool.parquet", POOL), prices)
    found = bench("dualign")._source.pairs(0.5, before, tmp_path)
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
        SearchTask(
            plan, small, resources, PROMPTS, tmp_path, given, PairLosses(pair_loss), prices=prices
        )
    )
    pairs = on_pairs._source.pairs(0.5, before, tmp_path)
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
        return ModelBackend(
            SearchTask(
                plan, wary, resources, PROMPTS, tmp_path / method, inputs, PairLosses(weights)
            )
        )

    pool, tokenizer = (
        read_table(inputs.scored / "pool.parquet", POOL),
        load_tokenizer(inputs.models / "sft"),
    )
    found = doubt(inputs.scored, pool, PESSIMISTIC)
    assert found is not None and 0 < (found.beyond(pool) > 0).mean() < 1
    pairs = bench("dualign", pair_loss)._source.pairs(0.5, before, tmp_path)
    fresh = samples_of(found.scores(read_table(tmp_path / "refresh.parquet", ANSWERS)), tokenizer)
    samples, beta = samples_of(found.scores(pool), tokenizer), wary.beta
    value = soft_value(samples.reward, samples.cost, 0.5, beta)[:3, None].repeat(2, axis=1)
    on_pool = pool_pairs(samples, pool_values(samples, 0.5, beta), 0.5, beta, wary.seed)
    assert pairs == on_pool + pool_pairs(fresh, value, 0.5, beta, wary.seed)
    assert pairs != bench_without(params, resources, inputs, pair_loss, tmp_path)._source.pairs(
        0.5, before, tmp_path
    )
    assert bench("sacpo", None)._tables.pool["reward"].tolist() == pool["reward"].tolist()


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
        SearchTask(
            Plan("row", METHODS["dualign"], "sft", "sft"),
            small,
            resources,
            PROMPTS,
            folder,
            inputs,
            PairLosses(pair_loss),
        )
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
            SearchTask(
                plan,
                small,
                resources,
                PROMPTS,
                tmp_path / name,
                inputs,
                PairLosses(pair_loss),
                prices=prices,
            )
        )

    seen: list[Any] = []

    def watched(
        policy: Any, tokenizer: Any, pairs: Any, pair_loss: Any, job: Any
    ) -> dict[str, Any]:
        seen.append(pairs)
        return {"losses": []}

    monkeypatch.setattr(trainer, "train_pairwise", watched)
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
    params: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    scratch: Path,
    losses: PairLosses = PLAIN,
) -> ModelBackend:
    plan = Plan("row", METHODS["o_pd_dpo"], "safety_dpo/one", "reward_dpo/helpful")
    frequent = resources.model_copy(update={"checkpoint_steps": 1})
    return ModelBackend(SearchTask(plan, params, frequent, PROMPTS, scratch, inputs, losses))


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
    assert [*dict.fromkeys(row.training for row in losses)] == trainings
    assert all(row.step > 0 and math.isfinite(row.loss) for row in losses) and bench.losses(1) == []


def test_a_round_trains_on_all_pairs_so_far_from_its_own_helpful_policy(
    quick: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, float]] = []
    clips: list[float | None] = []
    train = trainer.train_pairwise

    def watched(policy: Any, tokenizer: Any, pairs: Any, pair_loss: Any, job: Any) -> Any:
        seen.append((len(pairs), pair_loss.scale))
        clips.append(pair_loss.clip)
        return train(policy, tokenizer, pairs, pair_loss, job)

    monkeypatch.setattr(trainer, "train_pairwise", watched)
    timid = quick.model_copy(
        update={
            "training": quick.training.model_copy(update={"max_steps": 2, "learning_rate": 1e-7})
        }
    )
    last, _ = rounds(
        online_bench(
            timid,
            resources,
            inputs,
            tmp_path,
            PairLosses(safety=LossSpec(loss_type="dpo", clip=3.0), reward_clip=7.0),
        )
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


#: Where a round is killed: a function of a module, at which of its calls, before or after it.
MOMENTS: list[tuple[ModuleType, str, int, str]] = [
    (pair_sources, "compare", 2, "before"),
    (pair_sources, "preference_tables", 1, "before"),
    (trainer, "train_pairwise", 1, "before"),
    (trainer, "train_pairwise", 1, "after"),  # checkpoints are there, the policy is not
    (trainer, "save", 1, "after"),
    (trainer, "load_policy", 2, "before"),
    (pair_sources, "phase_two", 1, "after"),
    (trainer, "train_pairwise", 2, "after"),
    (trainer, "train_pairwise", 3, "after"),
    (pair_sources, "phase_two", 2, "before"),
    (trainer, "train_pairwise", 4, "after"),
    (backend, "measure", 1, "before"),
]


def dying(function: Callable[..., Any], call: int, when: str) -> Callable[..., Any]:
    """The function, whose process is killed before or after one of its calls."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            raise Killed
        result = function(*args, **kwargs)
        if calls == call:
            raise Killed
        return result

    return called


def test_a_killed_round_ends_with_the_same_policy(
    quick: DualSearchParams,
    resources: Resources,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, measured = rounds(online_bench(quick, resources, inputs, tmp_path / "whole"))
    weights = (Path(expected) / "model.safetensors").read_bytes()
    for number, (module, name, call, when) in enumerate(MOMENTS):
        broken = tmp_path / f"broken-{number}"
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(module, name, dying(getattr(module, name), call, when))
            rounds(online_bench(quick, resources, inputs, broken))
        policy, again = rounds(online_bench(quick, resources, inputs, broken))
        told = f"{when} call {call} of {name}"
        assert (Path(policy) / "model.safetensors").read_bytes() == weights, told
        assert again == measured, told


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
