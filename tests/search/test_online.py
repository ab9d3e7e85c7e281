"""A round of O-PD-DPO: fresh pairs and their tables, covariances over rounds, and the columns of
both phases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core.errors import DataError
from dualign.core.schema import HELPFUL_PAIRS, SAFETY_PAIRS, pair_id, prompt_id, user
from dualign.data import world
from dualign.data.labelling import compare
from dualign.lm.models import build_scratch, train_tokenizer
from dualign.lm.sampling import log_probabilities
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.search import OnlineParams
from dualign.search.exploration import features, projection
from dualign.search.online import (
    Exploration,
    Preferences,
    collect,
    phase_two,
    preference_tables,
    union,
)
from dualign.training.pairs import preference_pairs
from tests.tiny import TINY, short_training

QUESTIONS = [world.prompts()[0], world.prompts()[3000]]
BETA, LAM = 0.7, 1.3
BONUSES = OnlineParams(
    labels="oracle",
    folder="data/labels",
    retrain_reward=False,
    ridge=0.5,
    reward_scale=0.4,
    cost_scale=0.9,
    dimension=None,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(QUESTIONS, 300)


@pytest.fixture(scope="module")
def reference(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_scratch(TINY, tokenizer, seed=0)


@pytest.fixture(scope="module")
def helpful(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_scratch(TINY, tokenizer, seed=1)


def drawn(*picks: int) -> pd.DataFrame:
    """The table of a policy that gives the picked grammatical answers, in turn, to both
    questions.
    """
    rows = []
    for question in QUESTIONS:
        for sample, pick in enumerate(picks):
            answer = world.answers(question)[pick]
            prompt = user(question)
            row = {
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "sample": sample,
                "response": answer.text,
            }
            rows.append({**row, "reward": answer.reward, "cost": answer.cost})
    return pd.DataFrame(rows)


def fresh(
    current: tuple[int, ...], baseline: tuple[int, ...], folder: Path, seed: int = 0
) -> Preferences:
    compared = compare(
        collect(drawn(*current), drawn(*baseline)), source="oracle", folder=folder, seed=seed
    )
    return preference_tables(compared, f"round-{seed}")


# --- fresh pairs ----------------------------------------------------------------------------------


def test_sample_meets_sample_and_identical_answers_drop_out() -> None:
    shuffled = drawn(3, 7, 40).sample(frac=1, random_state=0)
    pairs = collect(drawn(0, 7, 20), shuffled)
    expected = [
        {
            "prompt_id": prompt_id(user(q)),
            "prompt": user(q),
            "first": a[i].text,
            "second": a[j].text,
            "reward_first": a[i].reward,
            "reward_second": a[j].reward,
            "cost_first": a[i].cost,
            "cost_second": a[j].cost,
        }
        for q in QUESTIONS
        for a in [world.answers(q)]
        for i, j in ((0, 3), (20, 40))
    ]
    pd.testing.assert_frame_equal(pairs[list(expected[0])], pd.DataFrame(expected))
    assert len(pairs.columns) == len(expected[0])


@pytest.mark.parametrize("short", ["current", "baseline"])
def test_answers_to_other_prompts_are_refused(short: str) -> None:
    tables = {"current": drawn(0, 1), "baseline": drawn(2, 3)}
    tables[short] = tables[short].iloc[:-1]
    with pytest.raises(
        DataError,
        match=f"prompt {prompt_id(user(QUESTIONS[1]))}: sample 1 stands in one table alone",
    ):
        collect(**tables)


def test_the_labels_say_which_answer_is_chosen() -> None:
    pairs = collect(drawn(0, 1, 2, 4), drawn(10, 11, 12, 13))
    helpful, safer = [True, True, False, False] * 2, [True, False, True, False] * 2
    tables = preference_tables(
        pairs.assign(first_more_helpful=helpful, first_safer=safer), "round-3"
    )
    for table, first_wins, schema in (
        (tables.helpful, helpful, HELPFUL_PAIRS),
        (tables.safety, safer, SAFETY_PAIRS),
    ):
        assert list(table.columns) == schema.names
        for row, pair, wins in zip(table.itertuples(), pairs.itertuples(), first_wins, strict=True):
            chosen, rejected = (pair.first, pair.second) if wins else (pair.second, pair.first)
            assert (row.chosen, row.rejected) == (chosen, rejected)
            assert (
                row.pair_id == pair_id(pair.prompt, pair.first, pair.second)
                and row.prompt_id == pair.prompt_id
            )
            assert row.prompt == pair.prompt and (row.source, row.split) == ("round-3", "train")
    assert tables.safety[["chosen_is_safe", "rejected_is_safe"]].isna().all(axis=None)


def test_tables_survive_the_disk_and_held_out_rows_stay_out_of_training(tmp_path: Path) -> None:
    tables = fresh((0, 1, 2), (10, 11, 12), tmp_path)
    tables.write(tmp_path / "round-0")
    back = Preferences.read(tmp_path / "round-0")
    pd.testing.assert_frame_equal(back.helpful, tables.helpful)
    pd.testing.assert_frame_equal(back.safety, tables.safety)
    split = ["train", "heldout"] * 3
    Preferences(tables.helpful.assign(split=split), tables.safety.assign(split=split)).write(
        tmp_path / "offline"
    )
    kept = Preferences.read(tmp_path / "offline")
    assert kept.helpful["pair_id"].tolist() == tables.helpful["pair_id"].tolist()[::2]
    assert kept.safety["pair_id"].tolist() == tables.safety["pair_id"].tolist()[::2]


@pytest.mark.filterwarnings("error")
def test_a_union_holds_all_rows_and_a_run_is_given_those_it_reaches(tmp_path: Path) -> None:
    offline, none = fresh((0, 1, 2), (10, 11, 12), tmp_path), fresh((5,), (5,), tmp_path)
    offline = Preferences(
        offline.helpful, offline.safety.assign(chosen_is_safe=True, rejected_is_safe=False)
    )
    data = union(offline, none, fresh((3,), (20,), tmp_path, seed=1))
    assert (
        data.helpful["source"].tolist()
        == data.safety["source"].tolist()
        == ["round-0"] * 6 + ["round-1"] * 2
    )
    assert data.safety["chosen_is_safe"].tolist() == [True] * 6 + [None] * 2
    training = short_training(
        batch_size=2, warmup=0.1, schedule="cosine", max_length=10, max_steps=2
    )
    reached = data.rows_within_budget(training, seed=0)
    assert len(reached.helpful) == len(reached.safety) == 4
    assert set(reached.safety["pair_id"]) <= set(data.safety["pair_id"])


# --- bonuses --------------------------------------------------------------------------------------


Ids = tuple[list[list[int]], list[list[int]]]  # prompts and answers


class Probe:
    """Answers whose bonuses are asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *picks: int) -> None:
        table = drawn(*picks)
        self.ids = (
            encode_prompts(tokenizer, table["prompt"].tolist()),
            encode_answers(tokenizer, table["response"]),
        )

    def __call__(self, explored: Exploration, lam: float = LAM) -> torch.Tensor:
        return explored.optimism(*self.ids, lam)


def by_hand(
    reference: Any,
    tokenizer: Any,
    ids: Ids,
    tables: list[pd.DataFrame],
    scale: float,
    matrix: torch.Tensor,
) -> list[float]:
    """alpha ||phi||_{Sigma^-1}, pair by pair and answer by answer."""

    def phi(prompt: list[int], answer: list[int]) -> np.ndarray:
        return (features(reference, tokenizer, [prompt], [answer], 1)[0] @ matrix).double().numpy()

    sigma = BONUSES.ridge * np.eye(matrix.shape[1])
    for row in pd.concat(tables).itertuples():
        (prompt,), answers = (
            encode_prompts(tokenizer, [row.prompt]),
            encode_answers(tokenizer, [row.chosen, row.rejected]),
        )
        delta = phi(prompt, answers[0]) - phi(prompt, answers[1])
        sigma += np.outer(delta, delta)
    vectors = [phi(*row) for row in zip(*ids, strict=True)]
    return [scale * float(np.sqrt(v @ np.linalg.solve(sigma, v))) for v in vectors]


def gap(reference: Any, tokenizer: Any, table: pd.DataFrame, matrix: torch.Tensor) -> float:
    """Mean gap of ||phi||_{Sigma^-1} within the pairs that Sigma is of."""
    gaps = []
    for row in table.itertuples():
        prompts, answers = (
            encode_prompts(tokenizer, [row.prompt] * 2),
            encode_answers(tokenizer, [row.chosen, row.rejected]),
        )
        chosen, rejected = by_hand(reference, tokenizer, (prompts, answers), [table], 1.0, matrix)
        gaps.append(abs(chosen - rejected))
    return float(np.mean(gaps))


def test_a_scale_is_the_mean_gap_within_the_first_pairs(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first = fresh((0, 1, 5), (10, 11, 30), tmp_path)
    free = BONUSES.model_copy(update={"cost_scale": 0.0})
    explored = Exploration(reference, tokenizer, 3, free, 7)
    explored.observe(first)
    table = first.helpful
    prompts = encode_prompts(tokenizer, table["prompt"].tolist())
    answers = encode_answers(tokenizer, [*table["chosen"], *table["rejected"]])
    chosen, rejected = explored.optimism(prompts * 2, answers, LAM).chunk(2)
    assert float((chosen - rejected).abs().mean()) == pytest.approx(0.4, rel=1e-6)


@pytest.mark.parametrize("key", ["reward_scale", "cost_scale"])
def test_first_pairs_without_a_gap_fix_no_scale(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, key: str
) -> None:
    pairs = fresh((0, 1), (10, 11), tmp_path)
    same = Preferences(
        *(table.assign(rejected=table["chosen"]) for table in (pairs.helpful, pairs.safety))
    )
    scales = {"reward_scale": 0.0, "cost_scale": 0.0}
    unscaled = BONUSES.model_copy(update=scales)
    explored = Exploration(reference, tokenizer, 1, unscaled.model_copy(update={key: 0.4}), 7)
    with pytest.raises(DataError, match=rf"online\.{key}: .* online\.dimension"):
        explored.observe(same)
    none = Exploration(reference, tokenizer, 1, unscaled, 7)
    none.observe(same)
    assert Probe(tokenizer, 0, 1)(none).tolist() == [0.0] * 4


@pytest.mark.parametrize("dimension", [None, 5])
def test_optimism_is_both_bonuses_each_of_its_own_pairs(
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dimension: int | None,
    tmp_path: Path,
) -> None:
    first, second = fresh((0, 1), (10, 11), tmp_path), fresh((30,), (36,), tmp_path)
    uneven = Preferences(second.helpful.head(0), second.safety)  # safety pairs alone
    narrow = BONUSES.model_copy(update={"dimension": dimension})
    explored = Exploration(reference, tokenizer, 3, narrow, 7)
    for data in (first, uneven):
        explored.observe(data)
    probe = Probe(tokenizer, 1, 25, 41)
    matrix = torch.eye(16) if dimension is None else projection(16, dimension, 7)
    reward_alpha, cost_alpha = (
        scale / gap(reference, tokenizer, table, matrix)
        for scale, table in ((0.4, first.helpful), (0.9, first.safety))
    )
    reward = by_hand(reference, tokenizer, probe.ids, [first.helpful], reward_alpha, matrix)
    cost = by_hand(
        reference, tokenizer, probe.ids, [first.safety, second.safety], cost_alpha, matrix
    )
    assert probe(explored).tolist() == pytest.approx(
        [r + LAM * c for r, c in zip(reward, cost, strict=True)], rel=1e-4
    )
    assert probe(explored, 0.0).tolist() == pytest.approx(reward, rel=1e-4)


def test_a_resumed_search_has_the_same_bonuses_bit_for_bit(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    probe, straight = Probe(tokenizer, 1, 25), Exploration(reference, tokenizer, 4, BONUSES, 0)
    rounds = [
        fresh((0, 1, 2), (10, 11, 12), tmp_path),
        fresh((5, 6), (20, 21), tmp_path),
        fresh((7,), (41,), tmp_path),
    ]
    for number, tables in enumerate(rounds):
        tables.write(tmp_path / f"{number}")
        straight.observe(tables)
        probe(straight)  # a round trains with its bonuses before the next one comes
    resumed = Exploration(reference, tokenizer, 4, BONUSES, 0)
    for number in range(3):
        resumed.observe(Preferences.read(tmp_path / f"{number}"))
    assert torch.equal(probe(resumed), probe(straight))


def test_rounds_lower_bonuses_in_whatever_order_they_come(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rounds = [
        fresh((0, 1, 2), (10, 11, 12), tmp_path),
        fresh((5, 6), (20, 21), tmp_path),
        fresh((7,), (41,), tmp_path),
    ]
    probe, offline = (
        Probe(tokenizer, 5, 20, 30),
        fresh((3, 4), (33, 34), tmp_path),
    )  # which fixes both alphas
    ends = []
    for order in (rounds, rounds[::-1]):
        explored, values = Exploration(reference, tokenizer, 4, BONUSES, 0), []
        explored.observe(offline)
        for data in order:
            explored.observe(data)
            values.append(probe(explored))
        assert (values[1] < values[0]).all() and (values[2] < values[1]).all()
        ends.append(values[2])
    assert torch.allclose(ends[0], ends[1], rtol=1e-6)


# --- what the second phase trains on --------------------------------------------------------------


def test_phase_two_has_the_safer_answer_first_and_bonuses_in_its_reference(
    reference: PreTrainedModel,
    helpful: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    data = fresh((0, 1, 2), (10, 11, 12), tmp_path)
    explored = Exploration(reference, tokenizer, 3, BONUSES, 0)
    explored.observe(data)
    pairs = phase_two(data, helpful, tokenizer, 3, explored, lam=LAM, beta=BETA)
    for pair, row in zip(pairs, data.safety.itertuples(), strict=True):
        both = [pair.first, pair.second]
        assert both == encode_answers(tokenizer, [row.chosen, row.rejected]) and pair.label == 1
        log_helpful = log_probabilities(helpful, tokenizer, [pair.prompt] * 2, both, batch_size=1)
        bonus = explored.optimism([pair.prompt] * 2, both, LAM)
        assert [pair.ref_first, pair.ref_second] == pytest.approx(
            (log_helpful + bonus / BETA).tolist(), abs=1e-4
        )
        assert bonus.min() > 0.1


def test_a_round_depends_on_its_seeds_alone(
    reference: PreTrainedModel,
    helpful: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    offline = fresh((0, 1), (10, 11), tmp_path)

    def play(seed: int) -> tuple[Any, Any]:
        current = fresh((20, 21, 22, 23), (30, 31, 32, 33), tmp_path, seed)
        narrow = BONUSES.model_copy(update={"dimension": 6})
        explored = Exploration(reference, tokenizer, 4, narrow, seed)
        data = union(offline, current)
        for part in (offline, current):
            explored.observe(part)
        first = preference_pairs(data.helpful, reference, tokenizer, 4)
        return first, phase_two(data, helpful, tokenizer, 4, explored, lam=LAM, beta=BETA)

    one, same, other = play(1), play(1), play(2)
    assert one == same
    assert one[0] != other[0] and one[1] != other[1]
