"""The stage judge: verdicts of every kind of judge on the answers of two policies, and what they
come to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from bench.chat_server import ChatServer
from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import DataError, DualignError
from dualign.core.schema import (
    SAFETY_PAIRS,
    SUITE,
    SUITE_ANSWERS,
    VERDICTS,
    last_user_text,
    prompt_id,
    read_table,
    user,
)
from dualign.data import world
from dualign.evaluation.refusals import refuses_by_rules
from dualign.lm.models import build_scratch, save
from dualign.params.base import Resources
from dualign.params.judging import JudgeParams
from dualign.params.loading import load
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.stage import Run
from stages import judge
from tests.stages.conftest import rows, save_scorers
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
SUITE_SPEC = {"suite": "held_out", "path": None, "prompts": None, "samples_per_prompt": 1}
PLAIN = {"price": {"input": 1.0, "output": 1.0}, "budget": {"calls": 500, "money": 1e6}}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def answered(
    workspace: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> Iterator[Path]:
    """The folder of the stages with two suites answered by two policies, scorers and labelled
    answers.
    """
    save_scorers(
        tokenizer, resources, Platt(1.0, 0.5), ("reward_model", "cost_model", "other_cost")
    )
    write_suite(
        "tea", [(question, "safe", world.answers(question)) for question in world.prompts()[:4]]
    )
    other = [world.Answer(text, 0.0, 0.0) for text in ("poison", "please", "poison, please")]
    write_suite("cups", [("What is in it?", "", other), ("And in that?", "unsafe", other)])
    (workspace / "reports/answers/README.md").write_text("It stands in every checkout.")
    pairs = [{**row, "split": "heldout"} for row in rows("safer_response_id")]
    write_parquet(workspace / "data/prepared/safety_pairs.parquet", pairs, SAFETY_PAIRS)
    yield workspace


def write_suite(name: str, content: list[tuple[str, str, Any]]) -> None:
    """Prompts with label and answers, of which `sft` gives the first and `ours` the second."""
    prompts = [
        {"prompt_id": prompt_id(user(text)), "prompt": user(text), "category": "", "label": label}
        for text, label, _ in content
    ]
    folder = Path("reports/answers") / name
    write_parquet(folder / "_suite.parquet", prompts, SUITE)
    for place, policy in enumerate(("sft", "ours")):
        answers = [
            {**prompt, "sample": 0, "response": texts[place].text, "length": 3, "ended": True}
            for prompt, (_, _, texts) in zip(prompts, content, strict=True)
        ]
        write_parquet(folder / f"{policy}.parquet", answers, SUITE_ANSWERS)


def run(resources: Resources, spec: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Run the stage for one judge; its metrics."""
    params = load(JudgeParams, ROOT / "params.yaml").model_dump()
    suites = dict.fromkeys(("tea", "cups"), SUITE_SPEC)
    params = {**params, "suites": suites, "judges": {"it": spec}, **changes}
    params = JudgeParams.model_validate(params)
    judge.main(Run("judge", "it", params, resources))
    found: dict[str, Any] = read_json("reports/metrics/judge/it.json")
    return found


def verdicts(file: str = "verdicts") -> pd.DataFrame:
    return read_table(f"reports/judgements/it/{file}.parquet", VERDICTS)


def test_the_scorers_score_every_answer_and_agree_with_people_so_far(
    answered: Path, resources: Resources
) -> None:
    told = run(resources, {"kind": "scorers"})
    table = verdicts()
    assert len(table) == 2 * (4 + 2) and table["failure"].isna().all()
    assert (table["unsafe"] == (table["cost"] > 0)).all()
    ours = table[(table["suite"] == "tea") & (table["policy"] == "ours")]
    assert told["suites"]["tea"]["ours"]["reward"]["mean"] == pytest.approx(ours["reward"].mean())
    assert told["suites"]["tea"]["ours"]["labels"].keys() == {"safe"}
    assert told["suites"]["cups"]["sft"]["labels"]["unsafe"]["verdicts"] == 1
    flagged = [row for row in rows("safer_response_id") if row["chosen_is_safe"] is not None]
    assert told["agreement"]["answers"] == 2 * len(flagged) == len(verdicts("labelled"))
    assert 0 <= told["agreement"]["ece"] <= 1 and told["money"] is None


def test_an_independent_cost_is_another_one(answered: Path, resources: Resources) -> None:
    run(resources, {"kind": "scorers"})
    trained = verdicts()["cost"].to_numpy()
    given = {"path": "models/other_cost", "kind": "classifier", "higher_is": "harmful"}
    told = run(resources, {"kind": "independent", "cost": [given]})
    table = verdicts()
    assert not np.allclose(table["cost"].to_numpy(), trained) and table["reward"].isna().all()
    assert told["suites"]["tea"]["sft"].keys() == {"verdicts", "failed", "cost", "unsafe", "labels"}
    other = Scorer.load("models/other_cost", resources)
    row = read_table("reports/answers/cups/ours.parquet", SUITE_ANSWERS).iloc[0]
    expected = other.score([row["prompt"]], [row["response"]], batch_size=1)[0]
    mine = table[(table["suite"] == "cups") & (table["policy"] == "ours")].iloc[0]
    assert mine["cost"] == pytest.approx(expected, abs=1e-4)


def test_the_oracle_tells_the_truth_of_the_world_and_nothing_else(
    answered: Path, resources: Resources
) -> None:
    told = run(resources, {"kind": "oracle"})
    assert told["suites"].keys() == {"tea"}
    rows_ = read_table("reports/answers/tea/ours.parquet", SUITE_ANSWERS)
    truth = [world.score(last_user_text(r.prompt), r.response)[1] for r in rows_.itertuples()]
    assert told["suites"]["tea"]["ours"]["cost"]["mean"] == pytest.approx(np.mean(truth))
    assert told["agreement"]["answers"] > 0


def test_refusals_by_rules_or_by_what_people_labelled(answered: Path, resources: Resources) -> None:
    told = run(resources, {"kind": "refusal"})
    said = [refuses_by_rules(text) for text in texts("tea", "ours")]
    assert told["suites"]["tea"]["ours"]["refused"]["mean"] == np.mean(said)
    assert told["agreement"] is None
    labelled = [
        {"prompt": f"{i}?", "response": text, "label": label}
        for i in range(20)
        for text, label in ((f"No cup, no {i}.", "refusal"), (f"please, {i}.", "compliance"))
    ]
    (answered / "labelled.json").write_text(json.dumps(labelled))
    fitted = run(resources, {"kind": "refusal", "labelled": "labelled.json"})
    assert fitted["suites"]["cups"]["ours"]["refused"]["mean"] == 0, "please"


def test_what_stop_words_leave_is_judged_beside_the_whole(
    answered: Path, resources: Resources
) -> None:
    """One generation, two scores: the harm stands behind the word at which the answer is cut."""
    file = Path("reports/answers/cups/ours.parquet")
    table = read_table(file, SUITE_ANSWERS)
    table["response"] = [" please\n\npoison ", "please"]
    table["cut"] = "please"
    write_parquet(file, table.assign(ended=False), SUITE_ANSWERS)
    with ChatServer() as server:
        spec = {
            "kind": "openai", "base_url": server.url, "model": "m", "key_variable": None,
            "question": "harm", **PLAIN,
        }  # fmt: skip
        told = run(resources, spec)["suites"]
    assert told.keys() == {"cups", "cups (cut)", "tea"}
    assert told["cups"]["ours"]["unsafe"]["mean"] == 0.5
    assert told["cups (cut)"]["ours"]["unsafe"]["mean"] == 0
    assert told["cups (cut)"]["ours"]["labels"].keys() == {"unsafe"}
    assert "sft" not in told["cups (cut)"], "it has no stop words"


def test_a_judge_may_judge_some_suites_alone(answered: Path, resources: Resources) -> None:
    for name in ("sft", "ours"):
        file = Path(f"reports/answers/cups/{name}.parquet")
        table = read_table(file, SUITE_ANSWERS)
        write_parquet(file, table.assign(cut=table["response"]), SUITE_ANSWERS)
    told = run(resources, {"kind": "refusal", "suites": ["cups"]})
    assert told["suites"].keys() == {"cups", "cups (cut)"}
    suite = Path("reports/answers/cups/_suite.parquet")
    chosen = read_table(suite, SUITE)
    chosen["choices"] = [["yes", "no"]] * len(chosen)
    write_parquet(suite, chosen, SUITE)
    with pytest.raises(DataError, match="holds no answers to judge"):
        run(resources, {"kind": "refusal", "suites": ["cups"]})


def test_the_less_harmful_of_two_answers_is_asked_for_by_its_own_words(
    answered: Path, resources: Resources
) -> None:
    with ChatServer() as server:
        spec = {
            "kind": "openai", "base_url": server.url, "model": "m", "key_variable": None,
            "question": "harmlessness", "repeats": 2, "suites": ["cups"], **PLAIN,
        }  # fmt: skip
        told = run(resources, spec)
        asked = [call["messages"][-1]["content"] for call in server.calls]
    assert told["suites"]["cups"]["ours"]["win"]["mean"] == 1.0
    assert len(asked) == 2 * 2 * 2 and all("which is less harmful" in text for text in asked)


def test_the_truth_of_answers_is_asked_for_and_none_of_what_people_called_safe(
    answered: Path, resources: Resources
) -> None:
    with ChatServer() as server:
        spec = {
            "kind": "openai", "base_url": server.url, "model": "m", "key_variable": None,
            "question": "truth", "suites": ["cups"], **PLAIN,
        }  # fmt: skip
        told = run(resources, spec)
        asked = [call["messages"][-1]["content"] for call in server.calls]
    assert told["suites"]["cups"]["sft"]["truthful"]["mean"] == 0.0
    assert told["suites"]["cups"]["ours"]["truthful"]["mean"] == 1.0
    assert len(asked) == 4 and told["agreement"] is None and not len(verdicts("labelled"))
    assert verdicts()["truthful"].notna().all() and verdicts()["unsafe"].isna().all()


def test_an_answer_that_a_word_cut_has_ended(answered: Path) -> None:
    rows_ = pd.DataFrame(
        {
            "suite": "cups",
            "response": [" one\n\ntwo", " one ", "one"],
            "cut": ["one", "one", "one"],
            "ended": [False, False, True],
        }
    )
    left = judge.cut(rows_)
    assert left["ended"].tolist() == [True, False, True]
    assert left["response"].tolist() == ["one"] * 3 and set(left["suite"]) == {"cups (cut)"}


def texts(suite: str, policy: str) -> list[str]:
    table = read_table(f"reports/answers/{suite}/{policy}.parquet", SUITE_ANSWERS)
    return [str(text) for text in table["response"]]


def test_an_endpoint_compares_both_orders_and_reads_harm(
    answered: Path, resources: Resources
) -> None:
    with ChatServer() as server:
        given = {
            "kind": "openai",
            "base_url": server.url,
            "model": "m",
            "key_variable": None,
            **PLAIN,
        }
        preferred = run(resources, {**given, "question": "preference", "repeats": 2})
        assert preferred["suites"]["cups"]["ours"]["win"]["mean"] == 1.0
        assert preferred["suites"]["tea"]["ours"]["win"]["mean"] == 0.5
        assert preferred["agreement"] is None and "sft" not in preferred["suites"]["cups"]
        assert len(server.calls) == 2 * 2 * (4 + 2), "two repeats, two orders"
        bought = len(server.calls)
        harm = run(resources, {**given, "question": "harm"})
        assert harm["suites"]["cups"]["sft"]["unsafe"]["mean"] == 1
        assert harm["suites"]["cups"]["ours"]["unsafe"]["mean"] == 0
        assert harm["money"] == pytest.approx(0.11 * (len(server.calls) - bought))
        asked = len(server.calls)
        assert run(resources, {**given, "question": "harm"}) == harm and len(server.calls) == asked


def test_a_judge_that_fails_too_often_stops_and_asks_only_for_the_rest_again(
    answered: Path, resources: Resources
) -> None:
    with ChatServer(lambda text, before: "refusal" if "poison" in text else "well") as server:
        spec = {
            "kind": "openai", "base_url": server.url, "model": "m", "key_variable": None,
            "question": "harm", **PLAIN,
        }  # fmt: skip
        told = (
            r"judges\.it: 2 of \d+ verdicts failed \(\{'refused': 2\}\), more than judge\.max_fai"
        )
        with pytest.raises(DualignError, match=told):
            run(resources, spec, max_failed=0.05)
        assert not Path("reports/judgements/it").exists()
        asked = len(server.calls)
        metrics = run(resources, spec, max_failed=0.5)
        assert len(server.calls) == asked + 4 and metrics["failures"] == {"refused": 2}
        assert metrics["suites"]["cups"]["sft"] == {
            "verdicts": 0, "failed": 2, "labels": {"unsafe": {"verdicts": 0, "failed": 1}},
        }  # fmt: skip


def test_a_local_model_judges_by_the_odds_of_its_first_word(
    answered: Path, resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    wide = TINY.model_copy(update={"context": 2048})
    save(build_scratch(wide, tokenizer, 3), tokenizer, answered / "models/base/judge")
    spec = {"kind": "local", "path": "models/base/judge"}
    told = run(resources, {**spec, "question": "harm"})
    table = verdicts()
    assert table["failure"].isna().all() and (table["unsafe"] == (table["cost"] > 0)).all()
    assert "ece" in told["agreement"]
    preferred = run(resources, {**spec, "question": "preference"})
    assert set(verdicts()["win"]) <= {0.0, 0.5, 1.0}
    assert preferred["suites"]["tea"].keys() == {"ours"}
    short = run(resources, {**spec, "path": "models/sft", "question": "harm"}, max_failed=1.0)
    assert short["failures"].keys() == {"longer than the 128 tokens that the model reads"}


def test_without_answers_there_is_nothing_to_judge(workspace: Path, resources: Resources) -> None:
    with pytest.raises(DataError, match=r"reports/answers/cups/_suite\.parquet: no such file"):
        run(resources, {"kind": "scorers"})


def test_a_suite_that_params_name_no_more_is_not_judged(
    answered: Path, resources: Resources
) -> None:
    """Its answers stay on the disk; a judge that is paid for would be asked of them."""
    told = run(resources, {"kind": "refusal"}, suites={"tea": SUITE_SPEC})
    assert told["suites"].keys() == {"tea"} == set(verdicts()["suite"])
