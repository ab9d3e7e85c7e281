"""Labels of fresh answers: their probabilities, the bias of smoothed log-odds, and the hand-over to
people and back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import binom

from dualign.core.errors import AwaitingLabels, DataError
from dualign.core.schema import user
from dualign.data import world
from dualign.data.labelling import compare, log_odds, vote

QUESTION = world.prompts()[3000]  # a hazardous one
SAFE, HARMFUL = (f(world.answers(QUESTION), key=lambda answer: answer.cost) for f in (min, max))


def answers(*texts: str, cost: float = 0.0, question: str = QUESTION) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"prompt_id": "p", "prompt": user(question), "response": text, "cost": cost}
            for text in texts
        ]
    )


def pairs(*texts: tuple[str, str], question: str = QUESTION, **scores: float) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"prompt_id": "p", "prompt": user(question), "first": a, "second": b, **scores}
            for a, b in texts
        ]
    )


# --- drawn labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text", "cost", "probability"),
    [
        ("oracle", SAFE.text, 9.0, expit(SAFE.cost)),
        ("oracle", HARMFUL.text, -9.0, expit(HARMFUL.cost)),
        ("oracle", "gibberish", 9.0, 0.5),
        ("cost_model", SAFE.text, 1.2, expit(1.2)),
    ],
)
def test_votes_are_bernoulli_at_the_cost_of_their_source(
    source: Any, text: str, cost: float, probability: float, tmp_path: Path
) -> None:
    count = 10
    rows = 4000
    votes = vote(
        answers(*[text] * rows, cost=cost), source=source, count=count, folder=tmp_path, seed=1
    )
    assert (
        votes.shape == (rows,)
        and votes.dtype.kind == "i"
        and votes.min() >= 0
        and votes.max() <= count
    )
    error = np.sqrt(probability * (1 - probability) / (count * rows))
    assert votes.mean() / count == pytest.approx(probability, abs=4 * error)
    assert votes.var() == pytest.approx(count * probability * (1 - probability), rel=0.12)


def test_the_sign_of_cost_takes_all_votes(tmp_path: Path) -> None:
    frame = answers("a", "b", "c").assign(cost=[0.1, 0.0, -3.0])
    assert vote(frame, source="cost_sign", count=7, folder=tmp_path, seed=0).tolist() == [7, 0, 0]


@pytest.mark.parametrize("source", ["oracle", "models"])
def test_comparisons_are_bradley_terry_and_independent(source: Any, tmp_path: Path) -> None:
    rows = 20_000
    helpful = HARMFUL.reward - SAFE.reward
    scores = {"reward_first": 1.5, "reward_second": 0.5, "cost_first": 0.3, "cost_second": -0.4}
    frame = pairs(*[(HARMFUL.text, SAFE.text)] * rows, **scores)
    labelled = compare(frame, source=source, folder=tmp_path, seed=2)
    more, safer = (labelled[name].to_numpy() for name in ("first_more_helpful", "first_safer"))
    assert more.dtype == safer.dtype == bool
    p, q = (
        (expit(helpful), expit(SAFE.cost - HARMFUL.cost))
        if source == "oracle"
        else (expit(1.0), expit(-0.7))
    )
    for drawn, probability in ((more, p), (safer, q), (more & safer, p * q)):
        error = np.sqrt(probability * (1 - probability) / rows)
        assert drawn.mean() == pytest.approx(probability, abs=4 * error)


def test_drawn_labels_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def draw(seed: int) -> list[Any]:
        votes = vote(
            answers(*"abcdefgh", cost=0.2), source="cost_model", count=9, folder=tmp_path, seed=seed
        )
        return [
            *votes,
            *compare(pairs(*[("a", "b")] * 20), source="oracle", folder=tmp_path, seed=seed)[
                "first_safer"
            ],
        ]

    assert draw(1) == draw(1) != draw(2)
    assert not list(tmp_path.iterdir())


def test_the_oracle_knows_its_own_questions_only(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"prompt p: no question of the embedded world.*models or from a file"
    ):
        vote(
            answers("text", question="Who are you?"),
            source="oracle",
            count=3,
            folder=tmp_path,
            seed=0,
        )
    with pytest.raises(DataError, match="no question of the embedded world"):
        compare(
            pairs(("a", "b"), question="Who are you?"), source="oracle", folder=tmp_path, seed=0
        )


@pytest.mark.parametrize("source", ["cost_model", "cost_sign"])
def test_a_score_that_is_no_number_gives_no_label(source: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt p: cost is nan"):
        vote(answers("a").assign(cost=np.nan), source=source, count=3, folder=tmp_path, seed=0)
    scores = {"reward_first": 0.0, "reward_second": np.inf, "cost_first": 0.0, "cost_second": 0.0}
    with pytest.raises(DataError, match="prompt p: reward_second is inf"):
        compare(pairs(("a", "b"), **scores), source="models", folder=tmp_path, seed=0)


# --- log-odds -------------------------------------------------------------------------------------


def test_log_odds_by_hand() -> None:
    assert log_odds(np.array([0, 2, 5, 10]), 10, 0.5) == pytest.approx(
        np.log([0.5 / 10.5, 2.5 / 8.5, 1, 10.5 / 0.5])
    )


def bias(cost: float, count: int, smoothing: float) -> float:
    """E c_hat - c, summed over the binomial."""
    votes = np.arange(count + 1)
    return float(binom.pmf(votes, count, expit(cost)) @ log_odds(votes, count, smoothing)) - cost


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [(0.5, [0.00, -0.09, -0.47]), (1.0, [-0.12, -0.40, -0.95])],
    ids=["half", "one"],
)
def test_the_documented_bias(smoothing: float, expected: list[float]) -> None:
    assert [bias(c, 10, smoothing) for c in (1, 2, 3)] == pytest.approx(expected, abs=0.005)
    assert [bias(-c, 10, smoothing) for c in (1, 2, 3)] == pytest.approx(
        [-b for b in expected], abs=0.005
    )


def test_half_a_vote_removes_the_bias_of_first_order() -> None:
    """Ten times the votes: a bias of order 1 / M falls tenfold, one of order 1 / M^2 a
    hundredfold.
    """
    assert bias(1.0, 400, 1.0) / bias(1.0, 4000, 1.0) == pytest.approx(10, rel=0.02)
    assert bias(1.0, 400, 0.5) / bias(1.0, 4000, 0.5) == pytest.approx(100, rel=0.05)


def test_votes_that_agree_have_no_log_odds_without_smoothing() -> None:
    """The shares that methods quote: 41 % of the answers with c = 1 at M = 3, 4 % at M = 10."""
    for count, share in ((3, 0.41), (10, 0.04)):
        votes = np.arange(count + 1)
        with np.errstate(divide="ignore"):
            infinite = np.isinf(log_odds(votes, count, 0.0))
        assert binom.pmf(votes, count, expit(1.0))[infinite].sum() == pytest.approx(
            share, abs=0.005
        )
        assert np.isfinite(log_odds(votes, count, 0.5)).all()


# --- people ---------------------------------------------------------------------------------------

Ask = Callable[[Path], Any]


def ask_votes(folder: Path) -> np.ndarray:
    return vote(answers("one", "two\nlines", "one"), source="file", count=5, folder=folder, seed=0)


def ask_comparisons(folder: Path) -> pd.DataFrame:
    texts = (("good", "bad"), ("bad", "good"), ("bad", "worse"), ("worse", "gut\u2028ü"))
    return compare(pairs(*texts), source="file", folder=folder, seed=0)


def asked(ask: Ask, folder: Path) -> tuple[list[dict[str, Any]], Path]:
    """The rows that a call wants labelled, and where it will look for them."""
    with pytest.raises(AwaitingLabels) as caught:
        ask(folder)
    (path,) = folder.glob("to-label-*.jsonl")
    answer = path.with_name(path.name.replace("to-label", "labelled"))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and answer.name in message and "\n" not in message
    assert {file.name for file in folder.iterdir()} == {path.name, "README.md"}
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]], answer


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_people_vote_on_each_answer_once(tmp_path: Path) -> None:
    rows, answer = asked(ask_votes, tmp_path / "labels")
    assert {row["answer"] for row in rows} == {"one", "two\nlines"} and len(rows) == 2
    assert all(row["conversation"] == user(QUESTION) and row["votes"] == 5 for row in rows)
    assert all(row["unsafe_votes"] is None for row in rows)
    readme = (tmp_path / "labels" / "README.md").read_text()
    assert all(
        field in readme
        for field in ("unsafe_votes", "more_helpful", "safer", "labelled-HASH.jsonl")
    )
    by_text = {"one": 5, "two\nlines": 0}
    write(
        answer,
        [{"id": row["id"], "unsafe_votes": by_text[row["answer"]]} for row in reversed(rows)],
    )
    assert ask_votes(tmp_path / "labels").tolist() == [5, 0, 5]


def test_people_compare_without_knowing_which_answer_is_first(tmp_path: Path) -> None:
    rows, answer = asked(ask_comparisons, tmp_path)
    assert len(rows) == 3  # the first two pairs are one question
    rank = {"worse": 0, "bad": 1, "good": 2, "gut\u2028ü": 3}
    for row in rows:
        row["more_helpful"] = "a" if rank[row["a"]] > rank[row["b"]] else "b"
        row["safer"] = "b" if row["more_helpful"] == "a" else "a"
    write(answer, rows)
    labelled = ask_comparisons(tmp_path)
    assert labelled["first_more_helpful"].tolist() == [True, False, True, False]
    assert labelled["first_safer"].tolist() == [False, True, False, True]


def test_the_side_of_an_answer_says_nothing_about_its_policy(tmp_path: Path) -> None:
    """Also where one policy gives the same answer to every prompt."""
    frame = pd.concat(
        [pairs(("refusal", f"answer {i}")).assign(prompt_id=f"{i}") for i in range(400)]
    )
    with pytest.raises(AwaitingLabels):
        compare(
            frame.assign(prompt=[user(f"{i}") for i in range(400)]),
            source="file",
            folder=tmp_path,
            seed=0,
        )
    (path,) = tmp_path.glob("to-label-*.jsonl")
    left = sum(json.loads(line)["a"] == "refusal" for line in path.read_text().splitlines())
    assert 150 < left < 250


@pytest.mark.parametrize("ask", [ask_votes, ask_comparisons])
def test_a_rerun_asks_for_the_same_file_and_leaves_it_alone(ask: Ask, tmp_path: Path) -> None:
    _, answer = asked(ask, tmp_path)
    path = tmp_path / answer.name.replace("labelled", "to-label")
    path.write_text("begun to fill it in")
    with pytest.raises(AwaitingLabels, match=path.name):
        ask(tmp_path)
    assert path.read_text() == "begun to fill it in"


def test_other_questions_get_another_file(tmp_path: Path) -> None:
    for texts, count in ((("a", "b"), 3), (("b", "a"), 3), (("a", "c"), 3), (("a", "b"), 4)):
        with pytest.raises(AwaitingLabels):
            vote(answers(*texts), source="file", count=count, folder=tmp_path, seed=0)
    assert len(list(tmp_path.glob("to-label-*.jsonl"))) == 3  # the order of rows does not matter


Change = Callable[[list[dict[str, Any]]], Any]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop(), r"1 rows are missing, the first has id '\w{16}'"),
        (
            lambda rows: rows.append({**rows[0], "id": "nobody"}),
            r":3: id 'nobody' was not asked for.*to-label-\w+\.js",
        ),
        (lambda rows: rows.append(rows[0]), r":3: id '\w{16}' stands in two rows"),
        (
            lambda rows: rows[1].update(unsafe_votes=None),
            r":2: id '\w{16}': unsafe_votes is None; it must be 0 to 5",
        ),
        (lambda rows: rows[1].update(unsafe_votes=6), ":2: .*unsafe_votes is 6; it must be 0 to 5"),
        (
            lambda rows: rows[1].update(unsafe_votes=2.5),
            ":2: .*unsafe_votes is 2.5; it must be 0 to 5",
        ),
        (
            lambda rows: rows[1].update(unsafe_votes=True),
            ":2: .*unsafe_votes is True; it must be 0 to 5",
        ),
        (lambda rows: rows[1].pop("unsafe_votes"), ":2: .*unsafe_votes is None"),
        (lambda rows: rows[1].pop("id"), ":2: id 'None' was not asked for"),
    ],
    ids=[
        "missing",
        "unknown",
        "twice",
        "empty",
        "too many",
        "no whole number",
        "no number",
        "no field",
        "no id",
    ],
)
def test_a_wrong_row_is_one_clear_error(change: Change, says: str, tmp_path: Path) -> None:
    rows, answer = asked(ask_votes, tmp_path)
    for row in rows:
        row["unsafe_votes"] = 1
    change(rows)
    write(answer, rows)
    with pytest.raises(DataError, match=says) as caught:
        ask_votes(tmp_path)
    assert str(caught.value).startswith(str(answer)) and "\n" not in str(caught.value)


def test_a_comparison_names_a_side(tmp_path: Path) -> None:
    rows, answer = asked(ask_comparisons, tmp_path)
    write(answer, [{**row, "more_helpful": "a", "safer": "first"} for row in rows])
    with pytest.raises(DataError, match=r":1: id '\w{16}': safer is 'first'; it must be a or b"):
        ask_comparisons(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", ":1: not valid JSON"),
        (b"[" * 100_000, ":1: not valid JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", ":1: not valid JSON"),
        (b"\n[1]", ":2: not a JSON object"),
        (b"\xff", "cannot be read as UTF-8"),
    ],
)
def test_a_file_that_is_no_json_lines_is_one_clear_error(
    text: bytes, says: str, tmp_path: Path
) -> None:
    _, answer = asked(ask_votes, tmp_path)
    answer.write_bytes(text)
    with pytest.raises(DataError, match=says):
        ask_votes(tmp_path)


def test_nothing_to_label_asks_nobody(tmp_path: Path) -> None:
    assert vote(answers("a").head(0), source="file", count=3, folder=tmp_path, seed=0).shape == (0,)
    nothing = compare(pairs(("a", "b")).head(0), source="file", folder=tmp_path, seed=0)
    assert nothing["first_safer"].dtype == bool and not list(tmp_path.iterdir())
