"""Strengths, ratings and win rates against other ways to compute them, and their intervals against
simulation.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from dualign.core.errors import DataError
from dualign.evaluation.ranking import (
    battles_against,
    battles_by_score,
    battles_of,
    bradley_terry,
    elo,
    length_controlled_win_rate,
    rank,
    win_rate,
    wins_by_prompt,
    with_lengths,
)
from dualign.evaluation.stats import redrawn

STRENGTHS = {"a": 0.8, "b": 0.2, "c": -0.3, "d": -0.7}


def fought(seed: int, prompts: int, strengths: dict[str, float] = STRENGTHS) -> pd.DataFrame:
    """Each pair once at every prompt, by Bradley-Terry, a tenth of them ties."""
    generator = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for first, second in itertools.combinations(strengths, 2):
            won = generator.random() < expit(strengths[first] - strengths[second])
            score = 0.5 if generator.random() < 0.1 else float(won)
            rows.append({"first": first, "second": second, "prompt_id": prompt, "score": score})
    return pd.DataFrame(rows)


# --- Bradley-Terry --------------------------------------------------------------------------------


def test_of_two_the_strengths_are_the_log_odds_of_wins() -> None:
    one, other = bradley_terry(np.array([[0, 7], [2.5, 0]]))
    assert np.exp(one - other) == pytest.approx(7.5 / 3.0, abs=1e-6)
    assert one + other == pytest.approx(0)


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_a_logistic_regression(seed: int) -> None:
    """On one row for each direction of each pair, weighted by its wins, the prior's half among
    them.
    """
    wins = np.random.default_rng(seed).integers(0, 20, (4, 4)).astype(float)
    np.fill_diagonal(wins, 0)
    pairs = list(itertools.permutations(range(4), 2))
    design = np.zeros((len(pairs), 4))
    for row, (first, second) in enumerate(pairs):
        design[row, [first, second]] = [1, -1]
    weights = np.array([wins[pair] + 0.5 for pair in pairs])
    both = np.concatenate([np.ones(len(pairs)), np.zeros(len(pairs))])
    model = sm.GLM(
        both,
        np.concatenate([design, -design])[:, 1:],
        family=sm.families.Binomial(),
        freq_weights=np.concatenate([weights, weights]),
    )
    expected = np.concatenate([[0.0], model.fit().params])
    assert bradley_terry(wins) == pytest.approx(expected - expected.mean(), abs=1e-6)


def test_who_won_all_is_finitely_strong() -> None:
    found = bradley_terry(np.array([[0, 9, 9], [0, 0, 5], [0, 5, 0]]))
    assert np.isfinite(found).all() and found[0] > found[1] == pytest.approx(found[2], abs=1e-5)


def test_a_lopsided_table_has_its_maximum_too() -> None:
    """A chain in which each beat the next ten thousand times: far apart, and no step beyond."""
    wins = np.diag([1e4] * 4, 1)
    found = bradley_terry(wins)
    assert np.exp(found[:-1] - found[1:]) == pytest.approx((1e4 + 0.5) / 0.5, rel=1e-6)


def test_many_tables_are_ranked_as_one_by_one() -> None:
    wins = np.random.default_rng(0).integers(0, 9, (5, 3, 3)).astype(float)
    alone = [bradley_terry(one).tolist() for one in wins]
    assert bradley_terry(wins) == pytest.approx(np.array(alone), abs=1e-9)


def test_groups_that_never_met_have_no_ranking() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 1
    with pytest.raises(DataError, match="never met"):
        bradley_terry(wins)


def test_elo_is_ten_to_one_for_400_points() -> None:
    ratings = elo(np.array([0.3, 0.3 - np.log(10)]))
    assert ratings[0] - ratings[1] == pytest.approx(400)
    gap = elo(np.array([0.5, -0.5]))
    assert 1 / (1 + 10 ** (-(gap[0] - gap[1]) / 400)) == pytest.approx(expit(1.0))


def test_wins_by_prompt_are_counted_one_by_one() -> None:
    battles = fought(0, 5)
    table = wins_by_prompt(battles, list(STRENGTHS))
    expected = np.zeros((5, 4, 4))
    names = list(STRENGTHS)
    for row in battles.to_dict("records"):
        one = names.index(row["first"])
        other = names.index(row["second"])
        expected[row["prompt_id"], one, other] += row["score"]
        expected[row["prompt_id"], other, one] += 1 - row["score"]
    assert table.tolist() == expected.tolist()


def test_the_ranking_is_that_of_the_strengths() -> None:
    table = rank(fought(3, 300), draws=200)
    assert table["policy"].tolist() == list("abcd")
    assert (table["low"] < table["elo"]).all() and (table["elo"] < table["high"]).all()
    assert table["battles"].tolist() == [900] * 4
    pulled = elo(0.9 * np.array([*STRENGTHS.values()]))  # by the tenth of ties
    assert table["elo"].to_numpy() == pytest.approx(pulled, abs=40)


def test_an_answer_judged_twice_makes_no_interval_narrower() -> None:
    battles = fought(1, 40)
    once = rank(battles, draws=200)
    twice = rank(pd.concat([battles, battles]), draws=200)
    narrow = (twice["high"] - twice["low"]) / (once["high"] - once["low"])
    assert narrow.between(0.95, 1.1).all()


def test_who_won_or_lost_all_has_no_interval_and_nobody_where_draws_part_them() -> None:
    prompts = [1, 2, 2, 3]
    all_won = pd.DataFrame({"first": "a", "second": "b", "prompt_id": prompts, "score": 1.0})
    others = fought(4, 40)
    table = rank(pd.concat([all_won.assign(second="b"), others[others["first"] != "a"]]), draws=50)
    by_name = table.set_index("policy")
    assert np.isinf(by_name.loc["a", ["low", "high"]].astype(float)).all()
    assert np.isfinite(by_name.drop("a")[["low", "high"]]).all(axis=None)
    assert np.isinf(rank(all_won, draws=50)[["low", "high"]]).all(axis=None)
    chain = [(first, second) for first, second in itertools.pairwise("abcdefghijklmnop")]
    apart = pd.DataFrame(chain, columns=["first", "second"]).assign(prompt_id=range(15), score=0.5)
    assert np.isinf(rank(apart, draws=50)[["low", "high"]]).all(axis=None)  # without end before
    alone = others[others["prompt_id"] == others["prompt_id"].iloc[0]]
    assert np.isinf(rank(alone, draws=50)[["low", "high"]]).all(axis=None)


def test_ratings_do_not_depend_on_who_is_named_first() -> None:
    battles = fought(2, 30)
    turned = battles.rename(columns={"first": "second", "second": "first"})
    turned = turned.assign(score=1 - turned["score"])
    pd.testing.assert_frame_equal(rank(battles, draws=20), rank(turned, draws=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "battle 1: score is nan, expected 0 to 1"),
        ({"score": 2.0}, "battle 1: score is 2, expected 0 to 1"),
        ({"second": "a"}, "battle 1: a policy against itself"),
    ],
)
def test_a_battle_that_is_none_is_named(change: dict[str, object], message: str) -> None:
    battles = fought(0, 3).assign(**change)
    with pytest.raises(DataError, match=message):
        rank(battles)


# --- win rates ------------------------------------------------------------------------------------


def test_the_win_rate_counts_ties_half_whoever_is_named_first() -> None:
    battles = pd.DataFrame(
        {
            "first": ["a", "b", "a", "a"],
            "second": ["b", "a", "b", "c"],
            "prompt_id": [1, 1, 2, 2],
            "score": [1.0, 1.0, 0.5, 0.0],
        }
    )
    found = win_rate(battles, "a", "b")
    assert found.rate.mean == pytest.approx((0.5 + 0.5) / 2)
    assert (found.ties, found.battles) == (pytest.approx(1 / 3), 3)
    mirrored = win_rate(battles, "b", "a").rate
    assert mirrored.mean == pytest.approx(1 - found.rate.mean)
    with pytest.raises(DataError, match="'b' and 'c' never met"):
        win_rate(battles, "b", "c")


def test_lengths_turn_with_their_answers() -> None:
    rows = pd.DataFrame({"first": ["b"], "second": ["a"], "prompt_id": [1], "score": [1.0]})
    own = battles_of(rows.assign(length_first=7, length_second=3), "a", "b")
    assert own[["score", "length_first", "length_second"]].to_numpy().tolist() == [[0.0, 3, 7]]


def test_verdicts_become_battles_with_the_lengths_of_both_answers() -> None:
    verdicts = pd.DataFrame(
        {
            "policy": ["a", "a", "b"],
            "prompt_id": ["p", "q", "p"],
            "sample": [0, 0, 1],
            "win": [1.0, None, 0.5],
        }
    )
    lengths = pd.DataFrame(
        [
            {"policy": policy, "prompt_id": prompt, "sample": sample, "length": length}
            for (policy, prompt, sample), length in {
                ("a", "p", 0): 7,
                ("b", "p", 1): 8,
                ("ref", "p", 0): 3,
                ("ref", "p", 1): 4,
            }.items()
        ]
    )
    battles = with_lengths(battles_against(verdicts, "ref"), lengths)
    columns = ["first", "second", "score", "length_first", "length_second"]
    assert battles[columns].to_numpy().tolist() == [
        ["a", "ref", 1.0, 7.0, 3.0],
        ["b", "ref", 0.5, 8.0, 4.0],
    ]
    assert set(rank(battles, draws=5)["policy"]) == {"a", "b", "ref"}


@pytest.mark.parametrize("more", [True, False])
def test_by_scores_every_two_answers_to_a_prompt_meet_once(more: bool) -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"policy": name, "prompt_id": prompt, "sample": sample, "reward": generator.integers(3)}
        for name in "cab"
        for prompt in range(4)
        for sample in range(2)
    ]
    scores = pd.DataFrame(rows).astype({"reward": float})
    scores.loc[5, "reward"] = None
    lengths = scores.assign(length=np.arange(len(scores)))
    battles = with_lengths(battles_by_score(scores, "reward", more=more), lengths)
    known = scores.dropna().set_index(["policy", "prompt_id", "sample"])["reward"]
    assert len(battles) == 3 * 8 - 2, "an answer without a score meets nobody"
    place = lengths.set_index(["policy", "prompt_id", "sample"])["length"]
    for row in battles.itertuples():
        one, other = (known[name, row.prompt_id, row.sample] for name in (row.first, row.second))
        lead = one - other if more else other - one
        assert row.first < row.second and row.score == (0.5 if lead == 0 else float(lead > 0))
        assert row.length_first == place[row.first, row.prompt_id, row.sample]
        assert row.length_second == place[row.second, row.prompt_id, row.sample]


def rate_by_scikit_learn(battles: pd.DataFrame, weight: np.ndarray) -> float:
    gap = (battles["length_first"] - battles["length_second"]).to_numpy()
    feature = np.tanh(gap / gap.std())[:, None]
    score = battles["score"].to_numpy()
    model = LogisticRegression(C=10.0, tol=1e-8, max_iter=1000)
    outcome = np.repeat([1, 0], len(score))
    weights = np.concatenate([weight * score, weight * (1 - score)])
    model.fit(np.tile(feature, (2, 1)), outcome, sample_weight=weights)
    return float(expit(model.intercept_[0]))


@pytest.mark.parametrize("alike", [1, 4])
def test_the_error_at_equal_length_is_that_of_drawing_prompts_anew(alike: int) -> None:
    """Four battles that end alike are no more than one; a fit for each draw of 120 prompts."""
    battles = liking_length(4, 120, theta=0.2, phi=0.8, longer=0.2)
    battles.loc[:9, "score"] = 0.5
    drawn = redrawn(np.random.default_rng(0), 120, 300)
    rates = [rate_by_scikit_learn(battles, weight) for weight in drawn]
    found = length_controlled_win_rate(pd.concat([battles] * alike), "a", "b")
    assert found.mean == pytest.approx(rate_by_scikit_learn(battles, np.ones(120)), abs=2e-3)
    assert found.error == pytest.approx(np.std(rates), rel=0.12)
    assert (
        found.error
        < length_controlled_win_rate(battles.assign(score=battles["score"].round()), "a", "b").error
    ), "ties tell as much as others, and vary less"


def test_the_interval_at_equal_length_holds_the_truth_where_few_battles_are_lost() -> None:
    """Two or three of 48: the quantiles of draws of prompts held it 79 times in 100."""
    held = []
    for seed in range(300):
        battles = liking_length(seed, 48, theta=logit(0.95), phi=0.0, longer=0.0)
        found = length_controlled_win_rate(battles, "a", "b")
        held.append(found.low <= 0.95 <= found.high)
    assert np.mean(held) > 0.93


def test_an_answer_without_a_length_is_told() -> None:
    battles = liking_length(0, 5, theta=0.0, phi=0.0, longer=0.0)
    battles.loc[2, "length_first"] = None
    with pytest.raises(DataError, match="some answers have no length"):
        length_controlled_win_rate(battles, "a", "b")


def liking_length(seed: int, count: int, theta: float, phi: float, longer: float) -> pd.DataFrame:
    """A judge that likes length: answers of the first are longer by `longer` on average."""
    generator = np.random.default_rng(seed)
    gap = generator.normal(longer, 1, count)
    won = generator.random(count) < expit(theta + phi * np.tanh(gap / gap.std()))
    second = generator.integers(100, 200, count)
    return pd.DataFrame(
        {
            "first": "a",
            "second": "b",
            "prompt_id": range(count),
            "score": won.astype(float),
            "length_first": second + 20 * gap,
            "length_second": second,
        }
    )


def test_at_equal_length_the_judges_liking_for_length_is_gone() -> None:
    battles = liking_length(0, 4000, theta=-0.4, phi=1.5, longer=1.0)
    raw = win_rate(battles, "a", "b").rate.mean
    found = length_controlled_win_rate(battles, "a", "b")
    assert raw > 0.55
    assert found.low < expit(-0.4) < found.high
    assert found.mean == pytest.approx(expit(-0.4), abs=0.04)


def test_the_rate_is_the_minimum_of_the_penalised_likelihood() -> None:
    battles = liking_length(1, 80, theta=0.3, phi=0.5, longer=0.3)
    battles.loc[:9, "score"] = 0.5
    gap = (battles["length_first"] - battles["length_second"]).to_numpy()
    feature = np.tanh(gap / gap.std())
    score = battles["score"].to_numpy()

    def loss(point: np.ndarray) -> float:
        value = point[0] + point[1] * feature
        nats = score * np.logaddexp(0, -value) + (1 - score) * np.logaddexp(0, value)
        return float(nats.sum() + point[1] ** 2 / 2 / 10)

    best = minimize(loss, np.zeros(2), tol=1e-10).x
    found = length_controlled_win_rate(battles, "a", "b")
    assert found.mean == pytest.approx(expit(best[0]), abs=1e-4)


def test_without_a_difference_of_length_it_is_the_win_rate() -> None:
    battles = liking_length(2, 50, theta=0.5, phi=0.0, longer=0.0)
    battles = battles.assign(length_first=5, length_second=5)
    found = length_controlled_win_rate(battles, "a", "b")
    assert found.mean == pytest.approx(battles["score"].mean(), abs=1e-4)


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_battles_that_end_alike_do_so_at_equal_length_and_are_no_more_than_they_are(
    score: float,
) -> None:
    """Draws of prompts have no spread then: 20 wins of 20 are no 100 % for sure."""
    battles = liking_length(3, 20, theta=0.0, phi=0.0, longer=0.0).assign(score=score)
    found = length_controlled_win_rate(battles, "a", "b")
    assert found.mean == score
    assert found == win_rate(battles, "a", "b").rate
    assert found.high - found.low > 0.15


def test_prompts_that_all_end_alike_are_no_more_than_they_are() -> None:
    """A win and a loss on each of 20 prompts: all draws of prompts are the same."""
    rows = {"first": "a", "second": "b", "prompt_id": [*range(20)] * 2}
    battles = pd.DataFrame(rows).assign(score=[1.0] * 20 + [0.0] * 20)
    battles = battles.assign(length_first=[6] * 20 + [4] * 20, length_second=5)
    found = length_controlled_win_rate(battles, "a", "b")
    assert 0.05 < found.low < 0.15 and 0.85 < found.high < 0.95, "lengths tell who wins"
    table = rank(battles, draws=50)
    assert table["elo"].tolist() == pytest.approx([1000.0, 1000.0])
    assert (table["low"] == -np.inf).all() and (table["high"] == np.inf).all()


def test_at_equal_length_one_prompt_says_nothing_of_others() -> None:
    rows = {"first": "a", "second": "b", "prompt_id": 1, "score": [1.0, 0.0, 1.0]}
    battles = pd.DataFrame(rows).assign(length_first=[3, 4, 5], length_second=4)
    found = length_controlled_win_rate(battles, "a", "b")
    assert 0 < found.mean < 1 and (found.low, found.high) == (0.0, 1.0)
