"""Training pairs from tables: labels, reference columns and anchors, recomputed row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.losses import modpo_logit, safe_dpo_loss
from dualign.core.errors import DataError
from dualign.core.schema import user
from dualign.data import world
from dualign.lm.models import build_scratch, train_tokenizer
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.math.dual.tilt import soft_value, weights
from dualign.math.losses import pairwise_logit, soft_label_loss
from dualign.params.training import LossType
from dualign.training.pairs import (
    Samples,
    lagrangian_pairs,
    pool_pairs,
    pool_values,
    preference_pairs,
    rows_within_budget,
    safe_first,
    safety_training_pairs,
    samples_of,
    with_margin,
    with_offset,
    with_safe_flags,
)
from dualign.training.pairwise import Pair, pair_dataset
from tests.tiny import TINY, short_training

QUESTIONS = [world.prompts()[0], world.prompts()[3000]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(QUESTIONS, 300)


@pytest.fixture(scope="module")
def reference(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_scratch(TINY, tokenizer, seed=0)


@pytest.fixture(scope="module")
def preferences() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for question in QUESTIONS:
        texts = [answer.text for answer in world.answers(question)]
        for i in range(3):
            scores = {
                f"{name}_{side}": rng.normal()
                for name in ("reward", "cost")
                for side in ("chosen", "rejected")
            }
            logps = {f"logp_ref_{side}": -20 - rng.random() for side in ("chosen", "rejected")}
            rows.append(
                {
                    "prompt": user(question),
                    "chosen": texts[i],
                    "rejected": texts[20 + i],
                    **scores,
                    **logps,
                }
            )
    return pd.DataFrame(rows)


def test_preference_pairs_prefer_the_chosen_and_hold_the_references_log_probabilities(
    preferences: pd.DataFrame, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = preference_pairs(preferences, reference, tokenizer, batch_size=5)
    assert len(pairs) == 6
    for pair, row in zip(pairs, preferences.itertuples(), strict=True):
        assert pair.prompt == encode_prompts(tokenizer, [row.prompt])[0]
        assert [pair.first, pair.second] == encode_answers(tokenizer, [row.chosen, row.rejected])
        alone = log_probabilities(
            reference, tokenizer, [pair.prompt] * 2, [pair.first, pair.second], batch_size=1
        )
        assert [pair.ref_first, pair.ref_second] == pytest.approx(alone.tolist(), abs=1e-4)
        assert pair.label == 1.0 and all(math.isnan(anchor) for anchor in pair.anchors)


def test_each_pair_may_carry_an_answer_to_another_prompt_with_its_own_column(
    preferences: pd.DataFrame, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = preference_pairs(preferences, reference, tokenizer, batch_size=5, mismatched=True)
    plain = preference_pairs(preferences, reference, tokenizer, batch_size=5)
    for pair, without in zip(pairs, plain, strict=True):
        assert (pair.first, pair.second) == (
            without.first,
            without.second,
        ) and without.mismatched is None
        assert (pair.ref_first, pair.ref_second) == pytest.approx(
            (without.ref_first, without.ref_second), abs=1e-4
        )
        assert pair.mismatched is not None
        alone = log_probabilities(
            reference, tokenizer, [pair.prompt], [pair.mismatched], batch_size=1
        )
        assert pair.ref_mismatched == pytest.approx(alone.item(), abs=1e-4)
    # The next pair of the other question, its first and second answer in turn.
    assert [pair.mismatched for pair in pairs] == [
        pairs[3].first,
        pairs[3].second,
        pairs[3].first,
        pairs[0].second,
        pairs[0].first,
        pairs[0].second,
    ]


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "kto"])
def test_safety_pairs_carry_what_their_loss_reads(
    preferences: pd.DataFrame,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loss_type: LossType,
) -> None:
    frame = preferences.assign(chosen_is_safe=True, rejected_is_safe=True)
    pairs = safety_training_pairs(frame, reference, tokenizer, 5, loss_type)
    kto = loss_type == "kto"
    assert pairs and all(
        pair.desirable == (True, kto) and (pair.mismatched is not None) == kto for pair in pairs
    )


def test_one_prompt_has_no_mismatched_answers(
    preferences: pd.DataFrame, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match="all pairs have one prompt"):
        preference_pairs(preferences.head(3), reference, tokenizer, batch_size=5, mismatched=True)


FLAGS = [(True, True), (True, False), (False, True), (False, False), (None, True), (False, None)]


@pytest.fixture
def flagged() -> pd.DataFrame:
    """Every combination of flags; an answer's text says whether it is the preferred one, and of
    which row.
    """
    rows = [
        {
            "chosen": f"w{i}",
            "rejected": f"l{i}",
            "chosen_is_safe": winner,
            "rejected_is_safe": loser,
            "pair_id": str(i),
        }
        for i, (winner, loser) in enumerate(FLAGS)
    ]
    return pd.DataFrame(rows).set_axis(range(10, 16))


def columns(*values: float) -> list[Pair]:
    """Pairs without text whose columns are `v`, `v` + 0.1 and `v` + 0.2."""
    return [Pair([0], [1], [2], v, v + 0.1, mismatched=[3], ref_mismatched=v + 0.2) for v in values]


def test_an_answer_is_desirable_if_its_flag_says_safe(flagged: pd.DataFrame) -> None:
    found = [pair.desirable for pair in with_safe_flags(columns(*[0.0] * 6), flagged)]
    assert found == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
        (True, True),  # the safer one of a safe one
        (False, False),
    ]


def test_safe_dpo_keeps_swaps_and_drops(
    flagged: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    """T by hand: keep a safe winner, swap where only the loser is safe, drop two unsafe ones; two
    rows lack a flag.
    """
    with caplog.at_level("WARNING"):
        turned = safe_first(flagged)
    assert "left out 2 of 6 pairs without is-safe flags" in caplog.text
    assert list(turned.columns) == list(flagged.columns) and turned.index.tolist() == [10, 11, 12]
    assert turned[
        ["chosen", "rejected", "chosen_is_safe", "rejected_is_safe"]
    ].to_numpy().tolist() == [
        ["w0", "l0", True, True],
        ["w1", "l1", True, False],
        ["l2", "w2", True, False],
    ]
    assert turned["pair_id"].tolist() == ["0", "1", "2"]
    assert safe_first(flagged[flagged["pair_id"] > "2"]).empty


def test_safe_dpos_offset_stands_in_the_reference_column(flagged: pd.DataFrame) -> None:
    """The table of losses: the same value as SafeDPO's loss on the pairs as they were labelled, at
    any log-ratios.
    """
    beta, offset = 0.4, 3.0
    known = flagged.head(4)
    turned = safe_first(known)
    pairs = with_offset(columns(-5.0, -6.0, -7.0), turned, offset, beta)
    assert [pair.ref_first for pair in pairs] == pytest.approx([-5.0, -6.0 + 7.5, -7.0 + 7.5])
    assert [pair.ref_second for pair in pairs] == pytest.approx([-4.9, -5.9, -6.9])
    logp = torch.tensor([[-4.0, -6.5], [-7.0, -5.0], [-3.0, -9.0]])  # of first and second answer
    refs = torch.tensor([[pair.ref_first, pair.ref_second] for pair in pairs])
    folded = soft_label_loss(pairwise_logit(*logp.T, *refs.T, beta), torch.ones(3))
    own = torch.tensor([[-5.0, -4.9], [-6.0, -5.9], [-7.0, -6.9]])
    labelled = pairwise_logit(*logp.T, *own.T, beta) * torch.tensor(
        [1.0, 1.0, -1.0]
    )  # before the swap
    unsafe = [
        ~torch.tensor(known[f"{side}_is_safe"].to_numpy(bool)) for side in ("chosen", "rejected")
    ]
    expected = safe_dpo_loss(torch.cat([labelled, torch.zeros(1)]), *unsafe, offset)
    assert expected[3] == 0 and torch.allclose(folded, expected[:3], atol=1e-5)


def test_a_margin_in_the_reference_column_is_modpo() -> None:
    """Against MODPO's own logit with w = 1 / (1 + lambda), beta / (1 + lambda) and m = (beta /
    lambda_m) log-ratio.
    """
    rng = np.random.default_rng(3)
    beta, lam, lam_m = 0.7, 1.2, 0.5
    base, margin = columns(*rng.normal(-20, 3, 5)), columns(*rng.normal(-20, 3, 5))
    margin = [replace(pair, ref_second=float(rng.normal(-20, 3))) for pair in margin]
    folded = with_margin(base, margin, base, weight=lam / lam_m)
    logp = torch.tensor(rng.normal(-20, 3, (2, 5)))

    def gap(pairs: list[Pair]) -> torch.Tensor:
        return torch.tensor([pair.ref_first - pair.ref_second for pair in pairs])

    ours = pairwise_logit(
        *logp, *(torch.tensor([[p.ref_first, p.ref_second] for p in folded]).T), beta
    )
    margin_gap = beta / lam_m * (gap(margin) - gap(base))
    theirs = modpo_logit(logp[0] - logp[1] - gap(base), margin_gap, beta / (1 + lam), 1 / (1 + lam))
    assert torch.allclose(ours, theirs.to(ours.dtype), atol=1e-4) and ours.abs().min() > 0.01


def test_a_margin_of_the_reference_itself_is_none() -> None:
    base = columns(-3.0, -4.0)
    assert with_margin(base, base, base, weight=7.0) == base


@pytest.mark.parametrize(("lam", "scale"), [(0.0, 1.0), (1.3, 1.0), (1.3, 0.4)])
def test_lagrangian_pairs_have_the_joint_label_and_the_scored_columns(
    preferences: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, lam: float, scale: float
) -> None:
    for pair, row in zip(
        lagrangian_pairs(preferences, tokenizer, lam, scale), preferences.itertuples(), strict=True
    ):
        gap = (row.reward_chosen - lam * row.cost_chosen) - (
            row.reward_rejected - lam * row.cost_rejected
        )
        assert pair.label == pytest.approx(sigmoid(scale * gap))
        assert (pair.ref_first, pair.ref_second) == (row.logp_ref_chosen, row.logp_ref_rejected)
        assert [pair.first, pair.second] == encode_answers(tokenizer, [row.chosen, row.rejected])


def samples(count: int) -> Samples:
    """Two prompts; an answer's ids say which prompt and sample it is."""
    rng = np.random.default_rng(1)
    answers = np.indices((2, count)).transpose(1, 2, 0).tolist()
    logp, reward, cost = (rng.normal(size=(2, count)) for _ in range(3))
    return Samples([[100], [200]], answers, logp, logp, reward, cost)


def test_pool_pairs_use_every_sample_once_with_its_label_and_anchor() -> None:
    pool, lam, beta = samples(8), 0.9, 0.7
    value = pool_values(pool, lam, beta)
    pairs = pool_pairs(pool, value, lam, beta, seed=0)
    assert sorted(tuple(a) for p in pairs for a in (p.first, p.second)) == [
        (x, i) for x in range(2) for i in range(8)
    ]
    tilt = pool.reward - lam * pool.cost
    ratio = np.exp((tilt - value) / beta).clip(max=16)  # as many as there are samples
    for pair in pairs:
        (x, i), (z, j) = pair.first, pair.second
        assert x == z and pair.prompt == pool.prompts[x]
        assert pair.label == pytest.approx(sigmoid(tilt[x, i] - tilt[x, j]))
        assert (pair.ref_first, pair.ref_second) == (pool.logp_ref[x, i], pool.logp_ref[x, j])
        assert pair.anchors == pytest.approx((tilt[x, i] - value[x, i], tilt[x, j] - value[x, j]))
        assert pair.weights == pytest.approx((ratio[x, i], ratio[x, j]))
        assert pair.drawn == (pool.logp[x, i], pool.logp[x, j])


def test_a_scale_changes_the_labels_of_the_pool_and_nothing_else() -> None:
    pool, lam, beta = samples(4), 0.9, 0.7
    value = pool_values(pool, lam, beta)
    plain, scaled = (
        pool_pairs(pool, value, lam, beta, 0),
        pool_pairs(pool, value, lam, beta, 0, 0.4),
    )
    assert [pair.label for pair in scaled] == pytest.approx(
        [sigmoid(0.4 * math.log(pair.label / (1 - pair.label))) for pair in plain], rel=1e-5
    )
    assert [replace(pair, label=0.0) for pair in scaled] == [
        replace(pair, label=0.0) for pair in plain
    ]


def test_the_anchor_of_a_sample_does_not_depend_on_its_own_score() -> None:
    pool = samples(4)
    before = pool_values(pool, 1.0, 0.7)
    pool.reward[0, 2] += 5
    after = pool_values(pool, 1.0, 0.7)
    assert after[0, 2] == before[0, 2] and (after[0, [0, 1, 3]] > before[0, [0, 1, 3]]).all()
    assert (after[1] == before[1]).all()
    others = soft_value(pool.reward[:, 1:], pool.cost[:, 1:], 1.0, 0.7)
    assert after[:, 0] == pytest.approx(others)


def test_weights_correct_for_the_policy_that_drew_the_samples() -> None:
    """exp((tilt - V) / beta) pi_ref / pi_drawn: by hand on two samples, one drawn twice as often as
    by pi_ref.
    """
    logp_ref = np.log([[0.25, 0.25], [0.25, 0.25]])
    drawn = np.log([[0.5, 0.25], [0.25, 0.25]])
    zero = np.zeros((2, 2))
    samples = Samples([[100], [200]], [[[1], [2]], [[3], [4]]], drawn, logp_ref, zero, zero)
    value = np.array([[0.0, 0.7], [0.0, 0.0]])
    first, second = pool_pairs(samples, value, 1.0, 0.7, seed=0)
    by_answer = dict(zip(((first.first[0]), (first.second[0])), first.weights or (), strict=True))
    assert by_answer == {1: pytest.approx(1 / 2), 2: pytest.approx(np.exp(-1))}
    log_drawn = dict(zip((first.first[0], first.second[0]), first.drawn, strict=True))
    assert log_drawn == {1: np.log(0.5), 2: np.log(0.25)}
    assert second.weights == pytest.approx((1.0, 1.0))


def test_pool_weights_average_to_the_density_ratio_where_a_softmax_flattens_it() -> None:
    """Two answers of tilt 0 and 2, drawn evenly, beta 1: the ratio of mean weights is e^2 at any
    number of samples.
    """
    rng = np.random.default_rng(0)
    reward = 2.0 * rng.integers(0, 2, size=(20_000, 4))
    zero = np.zeros_like(reward)
    answers = reward.astype(int)[:, :, None].tolist()
    pool = Samples([[0]] * len(reward), answers, zero, zero, reward, zero)
    weight: dict[int, list[float]] = {0: [], 2: []}
    for pair in pool_pairs(pool, pool_values(pool, 1.0, 1.0), 1.0, 1.0, seed=0):
        for answer, w in zip((pair.first, pair.second), pair.weights or (), strict=True):
            weight[answer[0]].append(w)
    unbiased = np.mean(weight[2]) / np.mean(weight[0])
    share = weights(reward, zero, 1.0, 1.0)
    flattened = share[reward == 2].mean() / share[reward == 0].mean()
    assert unbiased == pytest.approx(np.exp(2), rel=0.03)
    assert flattened < 0.7 * np.exp(2)


def test_no_weight_counts_for_more_than_all_samples_and_fp32_holds_it() -> None:
    """Of an answer far above the others of its prompt, (r - V) / beta = 1000, exp is infinite."""
    pool = samples(4)
    pool.reward[0, 2] += 700.0
    pairs = pool_pairs(pool, pool_values(pool, 1.0, 0.7), 1.0, 0.7, seed=0)
    table = pair_dataset(pairs)
    held = torch.tensor([table["weight_chosen"], table["weight_rejected"]])
    assert held.dtype == torch.float32 and held.isfinite().all()
    assert held.max() == pytest.approx(pool.reward.size)
    assert (held < 4).sum() == pool.reward.size - 1


def test_pairs_depend_on_the_seed_and_an_odd_sample_is_left_out() -> None:
    pool = samples(7)
    value = pool_values(pool, 1.0, 0.7)
    one, same, other = (pool_pairs(pool, value, 1.0, 0.7, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == 6


def test_a_run_is_given_the_rows_that_it_reaches() -> None:
    frame = pd.DataFrame({"row": range(100)})
    training = short_training(
        batch_size=8, warmup=0.1, schedule="cosine", max_length=10, max_steps=5
    )
    some = rows_within_budget(frame, training, seed=0)["row"].tolist()
    assert len(set(some)) == 40 and some == sorted(some) and max(some) > 50
    assert (
        some
        == rows_within_budget(frame, training, seed=0)["row"].tolist()
        != rows_within_budget(frame, training, seed=1)["row"].tolist()
    )
    for steps in (None, 13):
        assert (
            rows_within_budget(frame, training.model_copy(update={"max_steps": steps}), seed=0)
            is frame
        )


def test_a_pool_table_becomes_arrays_in_its_own_order(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {
            "prompt_id": name,
            "prompt": user(question),
            "tokens": [k, i],
            "logp_ref": -k - i,
            "reward": k * i,
            "cost": -i,
        }
        for k, (name, question) in enumerate(zip(("b", "a"), QUESTIONS, strict=True))
        for i in range(3)
    ]
    pool = samples_of(pd.DataFrame(rows), tokenizer)
    assert pool.prompts == encode_prompts(tokenizer, [user(question) for question in QUESTIONS])
    assert pool.answers == [[[0, 0], [0, 1], [0, 2]], [[1, 0], [1, 1], [1, 2]]]
    assert (
        pool.reward.tolist() == [[0, 0, 0], [0, 1, 2]] and pool.cost.tolist() == [[0, -1, -2]] * 2
    )
    assert pool.logp_ref.tolist() == [[0, -1, -2], [-1, -2, -3]]
