"""Additional constraints: what each quantity is, prices against an independent solver, and what
they do to tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML
from scipy.optimize import minimize

from dualign.certify.candidates import candidate_policies
from dualign.core.errors import InfeasibleError, ParamsError
from dualign.core.records import PriceRow
from dualign.core.schema import user
from dualign.math.constraints import (
    Constraint,
    Price,
    constraint,
    prices_in,
    with_priced_rewards,
)
from dualign.math.dual.root import root
from dualign.math.dual.tail import shortfall, value_at_risk
from dualign.math.dual.tilt import jackknife_weights, weights
from dualign.math.pricing import Scored, price
from dualign.params.dual import ConstraintSpec
from dualign.params.loading import check, read_yaml
from tests.shipped import preset

BETA, LIMIT, TOP = 0.8, 0.1, 1e3
Array = np.ndarray


def pool(seed: int, prompts: int = 3, samples: int = 6) -> Scored:
    """A pool whose more helpful answers are longer and tend to be more harmful."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(prompts, samples))
    cost = 0.6 * reward + rng.normal(size=reward.shape)
    length = np.round(20 + 6 * (0.5 * reward + rng.normal(size=reward.shape)))
    return Scored(
        reward, cost, length, length < 22, [user(f"question {x}") for x in range(prompts)]
    )


def values_of(given: Scored, additional: Constraint) -> Array:
    return additional.values(given.cost, given.length, given.ended)


def tilted(given: Scored, prices: list[Price], limit: float = LIMIT) -> Array:
    """Weights of the samples at the prices, with the main limit's multiplier solved on the charged
    reward.
    """
    reward = given.reward - charge(given, prices)
    lam = root(reward, given.cost, limit=limit, beta=BETA, lambda_max=TOP)
    return weights(reward, given.cost, lam, BETA)


def charge(given: Scored, prices: list[Price]) -> Any:
    """What the prices take off each sample's reward [prompts, samples]."""
    return sum(
        found.lam
        * found.constraint.applies(given.prompts)[:, None]
        * values_of(given, found.constraint)
        for found in prices
    )


def worth(given: Scored, w: Array) -> float:
    return float(((w * given.reward).sum(1) - BETA * (w * np.log(w * w.shape[1])).sum(1)).mean())


def primal(
    given: Scored, room: Callable[[Array], float], extra: float | None = None, starts: int = 1
) -> float:
    """max E[r] - beta KL on the samples by a general solver; `room` of all variables must stay
    above 0, E[c] <= LIMIT.

    The variables are the weights, and `extra` after them, where the problem is not concave: hence
    several starts.
    """
    shape, count = given.reward.shape, given.reward.size

    def weights_of(z: Array) -> Array:
        return np.asarray(z[:count].reshape(shape))

    def loss(z: Array) -> tuple[float, Array]:
        slope = given.reward - BETA * (1 + np.log(weights_of(z) * shape[1]))
        return -worth(given, weights_of(z)), np.append(
            -slope.ravel() / shape[0], np.zeros(len(z) - count)
        )

    sums = np.hstack(
        [
            np.kron(np.eye(shape[0]), np.ones(shape[1])),
            np.zeros((shape[0], 0 if extra is None else 1)),
        ]
    )
    found = []
    for seed in range(starts):
        begin = np.random.default_rng(seed).dirichlet(10 * np.ones(shape[1]), shape[0]).ravel()
        tail = [] if extra is None else [extra + 0.3 * (seed - starts // 2)]
        solved = minimize(
            loss,
            [*begin, *tail],
            jac=True,
            method="SLSQP",
            bounds=[(1e-9, 1)] * count + [(None, None)] * len(tail),
            constraints=[
                {"type": "eq", "fun": lambda z: sums @ z - 1},
                {
                    "type": "ineq",
                    "fun": lambda z: LIMIT - float((weights_of(z) * given.cost).sum(1).mean()),
                },
                {"type": "ineq", "fun": room},
            ],
            options={"maxiter": 200, "ftol": 1e-10},
        )
        if room(solved.x) > -1e-7:
            found.append(-solved.fun)
    return max(found)


# --- what the quantities are ----------------------------------------------------------------------


def test_values_of_each_kind_by_hand() -> None:
    cost, length = np.array([[-1.0, 0.0], [0.5, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]])
    ended = np.array([[1.0, 1.0], [1.0, 0.0]])
    kinds: dict[str, Any] = {
        "cost": cost,
        "p_unsafe": [[0, 0], [1, 1]],
        "length": length,
        "unended": [[0, 0], [0, 1]],
        "cvar": [[0.5, 0.5], [0.5, 0.5 + 1.5 / 0.25]],
    }
    for quantity, expected in kinds.items():
        additional = Constraint("it", quantity, 0.0, level=0.75, threshold=0.5)  # type: ignore[arg-type]
        assert (
            additional.values(cost, length, ended).tolist() == np.asarray(expected, float).tolist()
        )
        assert (
            additional.values(cost[1], length[1], ended[1] > 0).tolist()
            == np.asarray(expected, float)[1].tolist()
        )


def test_the_range_of_each_kind() -> None:
    ranges = {
        "cost": (-2.0, 3.0),
        "p_unsafe": (0.0, 1.0),
        "length": (0.0, 50.0),
        "unended": (0.0, 1.0),
    }
    for quantity, expected in {**ranges, "cvar": (0.5, 0.5 + 2.5 / 0.25)}.items():
        additional = Constraint("it", quantity, 0.0, level=0.75, threshold=0.5)  # type: ignore[arg-type]
        assert additional.bounds((-2.0, 3.0), 50) == expected


def test_a_pattern_is_looked_for_in_the_last_user_text() -> None:
    history = [
        *user("how do I cook?"),
        {"role": "assistant", "content": "gently"},
        *user("and clean up?"),
    ]
    prompts = [user("How do I clean an oven?"), history, user("cook!")]
    assert Constraint("all", "cost", 0.0).applies(prompts).tolist() == [True, True, True]
    assert Constraint("clean", "cost", 0.0, prompts="(?i)clean").applies(prompts).tolist() == [
        True,
        True,
        False,
    ]
    assert Constraint("cook", "cost", 0.0, prompts="^cook").applies(prompts).tolist() == [
        False,
        False,
        True,
    ]


def test_prices_come_back_from_their_file() -> None:
    prices = [
        Price(Constraint("tail", "cvar", 1.0, level=0.9, prompts="x", threshold=0.3), 0.4, 0.99),
        Price(Constraint("short", "length", 25.0), 0.0, 12.5),
    ]
    rows = [found.as_dict() for found in prices]
    assert prices_in([PriceRow(**row) for row in rows]) == prices and prices_in([]) == []
    assert set(rows[0]) == {
        "name",
        "quantity",
        "limit",
        "level",
        "prompts",
        "threshold",
        "lam",
        "predicted",
    }


# --- prices ---------------------------------------------------------------------------------------


def test_a_price_on_length_by_hand() -> None:
    """Two answers of 10 and 20 tokens, one reward: E[length] <= 12 needs odds of 1 to 4, a price of
    beta log 4 / 10.
    """
    given = Scored(
        np.zeros((1, 2)),
        np.full((1, 2), -9.0),
        np.array([[10.0, 20.0]]),
        np.ones((1, 2)),
        [user("q")],
    )
    [found] = price(
        given,
        {"short": ConstraintSpec(quantity="length", limit=12.0)},
        limit=0.0,
        beta=2.0,
        lambda_max=9.0,
    )
    assert found.lam == pytest.approx(2.0 * np.log(4) / 10)
    assert found.predicted == pytest.approx(12.0)


def test_a_price_on_answers_that_do_not_end_by_hand() -> None:
    """One of four is cut: P(unended) <= 0.1 needs odds of 1 to 9 for 1 to 3, a price of beta log 3.
    A mild limit: 0.
    """
    ended = np.array([[1.0, 1.0, 0.0, 1.0]])
    given = Scored(
        np.zeros((1, 4)), np.full((1, 4), -9.0), np.full((1, 4), 5.0), ended, [user("q")]
    )
    for limit, lam, mean in ((0.1, 2.0 * np.log(3), 0.1), (0.3, 0.0, 0.25)):
        additional = {"whole": ConstraintSpec(quantity="unended", limit=limit)}
        [found] = price(given, additional, limit=0.0, beta=2.0, lambda_max=99.0)
        assert (found.lam, found.predicted) == pytest.approx((lam, mean))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "spec",
    [
        {"quantity": "cost", "limit": -0.1, "prompts": "question [01]"},
        {"quantity": "p_unsafe", "limit": 0.3},
        {"quantity": "length", "limit": 19.0},
        {"quantity": "unended", "limit": 0.2},
    ],
    ids=["cost on a group", "p_unsafe", "length", "unended"],
)
def test_prices_solve_the_constrained_problem(spec: dict[str, Any], seed: int) -> None:
    given = pool(seed)
    additional = constraint("it", ConstraintSpec(**spec))
    group = additional.applies(given.prompts)
    values = values_of(given, additional)

    def room(z: Array) -> float:
        w = z.reshape(values.shape)
        return (spec["limit"] - float((w * values).sum(1)[group].mean())) / values.std()

    prices = price(given, {"it": ConstraintSpec(**spec)}, limit=LIMIT, beta=BETA, lambda_max=TOP)
    w = tilted(given, prices)
    assert room(w.ravel()) > -1e-7 and float((w * given.cost).sum(1).mean()) < LIMIT + 1e-7
    assert worth(given, w) == pytest.approx(primal(given, room), abs=1e-5)
    assert prices[0].predicted == pytest.approx(float((w * values).sum(1)[group].mean()), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_of_a_cvar_is_the_best_one(seed: int) -> None:
    """Against weights and threshold solved together, from several starts, and against CVaR's own
    definition.
    """
    given, level, limit = pool(seed, prompts=2), 0.7, 0.6
    spec = ConstraintSpec(quantity="cvar", limit=limit, level=level)

    def room(z: Array) -> float:
        w = z[:-1].reshape(given.cost.shape)
        return limit - float((w * shortfall(given.cost, z[-1], level)).sum(1).mean())

    prices = price(given, {"tail": spec}, limit=LIMIT, beta=BETA, lambda_max=TOP)
    w = tilted(given, prices)
    share = w / len(w)
    threshold = value_at_risk(given.cost, share, level)
    assert float((share * shortfall(given.cost, threshold, level)).sum()) <= limit + 1e-7
    assert prices[0].lam > 0
    assert worth(given, w) == pytest.approx(
        primal(given, room, extra=threshold, starts=5), abs=2e-3
    )


def test_limits_together_cost_no_less_than_apart_and_slack_ones_nothing() -> None:
    given = pool(1, prompts=40)
    additional = {
        "short": ConstraintSpec(quantity="length", limit=18.0),
        "tail": ConstraintSpec(quantity="cvar", limit=1.2, level=0.8),
        "loose": ConstraintSpec(quantity="p_unsafe", limit=0.99),
    }
    prices = price(given, additional, limit=LIMIT, beta=BETA, lambda_max=TOP)
    assert [found.constraint.name for found in prices] == list(additional)
    assert prices[0].lam > 0 and prices[1].lam > 0 and prices[2].lam == 0
    w = tilted(given, prices)
    for found in prices:
        mean = float((w * values_of(given, found.constraint)).sum(1).mean())
        assert mean <= found.constraint.limit + 1e-7 and mean == pytest.approx(
            found.predicted, abs=1e-6
        )
    for name in additional:
        alone = tilted(
            given, price(given, {name: additional[name]}, limit=LIMIT, beta=BETA, lambda_max=TOP)
        )
        assert worth(given, alone) >= worth(given, w) - 1e-9


def test_jackknifed_limits_are_kept_with_each_sample_left_out_in_turn() -> None:
    """A limit of all prompts, a tail, one of a group and a slack one, by `jackknife_weights`."""
    given = pool(1, prompts=60, samples=10)
    additional = {
        "short": ConstraintSpec(quantity="length", limit=18.0),
        "tail": ConstraintSpec(quantity="cvar", limit=1.2, level=0.8),
        "few": ConstraintSpec(quantity="p_unsafe", limit=0.4, prompts="question [12]"),
        "loose": ConstraintSpec(quantity="p_unsafe", limit=0.99),
    }
    prices = price(given, additional, limit=LIMIT, beta=BETA, lambda_max=TOP, jackknife=True)
    plain = price(given, additional, limit=LIMIT, beta=BETA, lambda_max=TOP)
    assert [found.lam > 0 for found in prices] == [True, True, True, False]
    assert all(a.lam < b.lam for a, b in zip(prices[:3], plain[:3], strict=True))

    reward = given.reward - charge(given, prices)
    lam = root(reward, given.cost, limit=LIMIT, beta=BETA, lambda_max=TOP, jackknife=True)
    w = jackknife_weights(reward, given.cost, lam, BETA)
    for found in prices:
        members = found.constraint.applies(given.prompts)
        mean = float((w * values_of(given, found.constraint)).sum(1)[members].mean())
        assert mean == pytest.approx(found.predicted, abs=1e-6)
        assert mean <= found.constraint.limit + 1e-7
        assert found.lam == 0 or mean == pytest.approx(found.constraint.limit, abs=1e-6)


def test_prices_are_not_corrected_where_too_few_samples_count() -> None:
    """Three prompts of three samples: the corrected limit would be out of their reach."""
    given = pool(16, samples=3)
    short = {"short": ConstraintSpec(quantity="length", limit=15.0)}
    settings = {"limit": 5.0, "beta": BETA, "lambda_max": TOP}
    [found] = price(given, short, jackknife=True, **settings)
    assert [found] == price(given, short, **settings)
    assert found.lam > 0.5


def test_without_additional_constraints_there_are_no_prices() -> None:
    assert price(pool(0), {}, limit=-99.0, beta=BETA, lambda_max=TOP) == []


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            {"quantity": "length", "limit": 3.0},
            r"^constraint\.additional\.it\.limit 3 is out of the samples' reach",
        ),
        (
            {"quantity": "cvar", "level": 0.9, "limit": -9.0},
            r"^constraint\.additional\.it\.limit -9 is out .* a CVaR of -?\d",
        ),
        (
            {"quantity": "unended", "limit": 0.2},
            (
                r"it\.limit 0\.2 is out of .* 33\.3 % of the prompts have no sample that ended;"
                r" raise generation\.max_new"
            ),
        ),
    ],
)
def test_a_limit_out_of_reach_is_named(spec: dict[str, Any], says: str) -> None:
    given = pool(2)
    given.ended[0] = False
    with pytest.raises(InfeasibleError, match=says):
        price(given, {"it": ConstraintSpec(**spec)}, limit=LIMIT, beta=BETA, lambda_max=TOP)


def test_the_main_limit_out_of_reach_is_told_as_ever() -> None:
    additional = {"it": ConstraintSpec(quantity="length", limit=19.0)}
    with pytest.raises(
        InfeasibleError, match=r"^constraint\.limit -9 is out of the samples' reach: at lambda_max"
    ):
        price(pool(2), additional, limit=-9.0, beta=BETA, lambda_max=TOP)


def test_limits_in_conflict_are_named() -> None:
    given = Scored(
        np.zeros((1, 2)),
        np.array([[-1.0, 1.0]]),
        np.array([[20.0, 10.0]]),
        np.ones((1, 2)),
        [user("q")],
    )
    additional = {
        "short": ConstraintSpec(quantity="length", limit=12.0),
        "idle": ConstraintSpec(quantity="length", limit=30.0),
    }
    with pytest.raises(
        InfeasibleError,
        match=r"keep constraint\.limit -0\.5, constraint\.additional\.short\.limit 12 together",
    ):
        price(given, additional, limit=-0.5, beta=BETA, lambda_max=TOP)
    tail = {
        "short": additional["short"],
        "tail": ConstraintSpec(quantity="cvar", limit=-0.5, level=0.5),
    }
    with pytest.raises(InfeasibleError, match=r"constraint\.additional\.tail\.limit -0\.5"):
        price(given, tail, limit=9.0, beta=BETA, lambda_max=TOP)


def test_a_pattern_that_no_prompt_has_is_refused() -> None:
    additional = {"it": ConstraintSpec(quantity="cost", limit=0.0, prompts="nowhere")}
    with pytest.raises(
        ParamsError, match=r"^constraint\.additional\.it\.prompts: 'nowhere' is found in no prompt"
    ):
        price(pool(2), additional, limit=LIMIT, beta=BETA, lambda_max=TOP)


# --- tables ---------------------------------------------------------------------------------------

PRICES = [
    Price(Constraint("short", "length", 10.0), 0.1, 10.0),
    Price(Constraint("kitchen", "p_unsafe", 0.2, prompts="kitchen"), 2.0, 0.2),
]


def samples() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt": [user("in the kitchen"), user("in the kitchen"), user("outside")],
            "reward": [1.0, 1.0, 1.0],
            "cost": [-0.5, 0.5, 0.5],
            "length": [10, 20, 30],
            "ended": [True, False, True],
        }
    )


def test_samples_pay_for_their_length_and_where_it_applies_for_harm() -> None:
    frame = samples()
    charged = with_priced_rewards(frame, PRICES)
    assert charged["reward"].tolist() == pytest.approx([1 - 1, 1 - 2 - 2, 1 - 3])
    assert frame["reward"].tolist() == [1.0, 1.0, 1.0]
    assert charged.drop(columns="reward").equals(frame.drop(columns="reward"))


def test_pairs_pay_on_both_sides_and_their_tokens_are_counted() -> None:
    frame = pd.DataFrame(
        {
            "prompt": [user("in the kitchen"), user("outside")],
            "chosen": ["a b", "a"],
            "rejected": ["a", "a b c"],
            "reward_chosen": [1.0, 1.0],
            "reward_rejected": [0.0, 0.0],
            "cost_chosen": [-1.0, -1.0],
            "cost_rejected": [1.0, 1.0],
        }
    )
    charged = with_priced_rewards(
        frame, PRICES, lambda texts: [len(text.split()) + 1 for text in texts]
    )
    assert charged["reward_chosen"].tolist() == pytest.approx([1 - 0.3, 1 - 0.2])
    assert charged["reward_rejected"].tolist() == pytest.approx([-0.2 - 2.0, -0.4])
    with pytest.raises(ValueError, match="counts the tokens"):
        with_priced_rewards(frame, PRICES)
    assert with_priced_rewards(frame, PRICES[1:])["reward_rejected"].tolist() == [-2.0, 0.0]


def test_answers_that_did_not_end_pay_and_those_of_pairs_all_ended() -> None:
    whole = Price(Constraint("whole", "unended", 0.1), 3.0, 0.1)
    assert with_priced_rewards(samples(), [whole])["reward"].tolist() == [1.0, -2.0, 1.0]
    pair = {
        "prompt": [user("q")],
        "reward_chosen": [1.0],
        "reward_rejected": [0.0],
        "cost_chosen": [0.0],
    }
    charged = with_priced_rewards(pd.DataFrame({**pair, "cost_rejected": [0.0]}), [whole])
    assert charged[["reward_chosen", "reward_rejected"]].to_numpy().tolist() == [[1.0, 0.0]]


def test_no_prices_leave_the_table_as_it_is() -> None:
    frame = samples()
    assert with_priced_rewards(frame, []) is frame


# --- the guide ------------------------------------------------------------------------------------


def test_the_limits_of_the_guide_are_ones_that_params_take(repo_root: Path) -> None:
    text = (repo_root / "docs/constraints.md").read_text()
    block = next(
        part
        for part in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
        if "additional:" in part
    )
    content = read_yaml(repo_root / "params.yaml")
    content["constraint"] |= YAML(typ="safe").load(block)["constraint"]
    additional = check(content, "guide")["dual_init"].additional  # type: ignore[attr-defined]
    assert {spec.quantity for spec in additional.values()} == {
        "cost",
        "p_unsafe",
        "cvar",
        "length",
        "unended",
    }
    prompts = [user("Is it safe for Children?"), user("A grandchild?")]
    assert constraint("children", additional["children"]).applies(prompts).tolist() == [True, False]


def test_the_recipe_for_p_unsafe_alone_is_one_that_params_take(repo_root: Path) -> None:
    text = (repo_root / "docs/constraints.md").read_text()
    recipe = YAML(typ="safe").load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[-1])
    content = preset("quick")
    content["constraint"] |= recipe["constraint"]
    content["certify"] |= recipe["certify"]
    stages = check(content, "guide")
    assert stages["dual_init"].additional["rare"].quantity == "p_unsafe"  # type: ignore[attr-defined]
    row = stages["certify"].runs["dualign"]  # type: ignore[attr-defined]
    found = candidate_policies(row, Path("models"), Path("scratch"))
    assert next(iter(found)) == "aligned/dualign at 1.6", "no safety DPO at multiplier 0 goes first"
