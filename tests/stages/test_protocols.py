"""The presets of published evaluations, with their suites and judges as they are, on tiny policies:
files of the authors' form, scorers of the layout of theirs and a local server take the places of
what is on the hub and behind the endpoint.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from bench.chat_server import ChatServer
from dualign.core.artifacts import read_json, write_parquet
from dualign.core.schema import PROMPTS, SFT, SUITE_ANSWERS, prompt_id, read_table, user
from dualign.data import world
from dualign.lm.models import build_scratch, save
from dualign.params.base import Resources
from dualign.params.loading import check
from dualign.stage import Run
from stages import answer, judge
from tests import shipped
from tests.test_presets import write_beaver
from tests.tiny import TINY

POLICIES = {"sft": "sft", "helpful": "reward_dpo/helpful"}
QUESTIONS = ["What is tea?", "How is it made?", "Who drinks it?"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def asked(workspace: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Path]:
    """The folder of the stages with held-out prompts and the suites' files; its policies read more
    tokens than elsewhere.
    """
    for seed, folder in enumerate(POLICIES.values()):
        model = build_scratch(TINY.model_copy(update={"context": 2048}), tokenizer, seed)
        one, other = (tokenizer(letter)["input_ids"][-1] for letter in ("ab", "no")[seed])
        with torch.no_grad():  # whichever way the row points, one of the two is the likeliest
            model.lm_head.weight[one] *= 50
            model.lm_head.weight[other] = -model.lm_head.weight[one]
        save(model, tokenizer, workspace / "models" / folder)
    prompts = [user(question) for question in world.prompts()[::900]]
    rows = [{"prompt_id": prompt_id(p), "prompt": p, "source": "world"} for p in prompts]
    write_parquet(workspace / "data/prepared/eval.parquet", rows, PROMPTS)
    write_parquet(workspace / "data/prepared/sft.parquet", [], SFT)
    (workspace / "data/suites").mkdir(parents=True)
    write_suites(workspace / "data/suites")
    yield workspace


def write_suites(folder: Path) -> None:
    """Three questions in the form of each benchmark."""
    plain = [{"prompt": text, "category": "tea"} for text in QUESTIONS]
    targets = {"It is a leaf.": 1, "It is a stone.": 0}
    choices = [
        {"question": text, "mc1_targets": targets, "mc2_targets": targets} for text in QUESTIONS
    ]
    for name, rows in (
        ("helpful_problem.json", plain),
        ("safety_problem.json", plain),
        ("mc_task.json", choices),
    ):
        (folder / name).write_text(json.dumps(rows))
    kinds = ("homonyms", "contrast_homonyms", "definitions")
    labels = [{"prompt": text, "type": kind} for text, kind in zip(QUESTIONS, kinds, strict=True)]
    facts = [{"Question": text, "Category": "tea"} for text in QUESTIONS]
    for name, rows in (("xstest_prompts.csv", labels), ("TruthfulQA.csv", facts)):
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def brought_here(content: dict[str, Any], root: Path, url: str) -> dict[str, Any]:
    """The preset with places of this machine in it, and answers of few tokens."""
    for suite in content["suites"].values():
        suite["path"] = None
        if "max_new_tokens" in suite:
            suite["max_new_tokens"] = 8
    for spec in content["judges"].values():
        spec.update({"base_url": url} if "base_url" in spec else {})
        for seed, kind in enumerate(("reward", "cost")):
            for scorer in spec.get(kind, ()):
                scorer["path"] = str(root / kind)
                write_beaver(root / kind, seed)
    content["generation"]["max_new_tokens"] = 8
    return content


@pytest.fixture
def results(
    asked: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch, request: Any
) -> tuple[dict[str, Any], ChatServer]:
    """The metrics of every suite and judge of a preset by their names, and the server that was
    asked.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with ChatServer() as server:
        content = brought_here(shipped.preset(request.param), asked, server.url)
        params = check(content, request.param)
        few = {"policies": POLICIES}
        for name in content["suites"]:
            answering = params["answer"].model_copy(update=few)
            answer.main(Run("answer", name, answering, resources))  # type: ignore[arg-type]
        for name in content["judges"]:
            judge.main(Run("judge", name, params["judge"], resources))  # type: ignore[arg-type]
    files = [*Path("reports/metrics/answer").iterdir(), *Path("reports/metrics/judge").iterdir()]
    return {path.stem: read_json(path) for path in files}, server


def protocol(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("results", [f"{name}-protocol"], indirect=True)


@protocol("sacpo")
def test_sacpo_wins_are_of_the_first_paragraph_and_of_the_whole(
    results: tuple[dict[str, Any], ChatServer],
) -> None:
    metrics, server = results
    for question, suite in (("more_helpful", "helpful"), ("less_harmful", "red_team")):
        judged = metrics[question]["suites"]
        assert judged.keys() == {suite, f"{suite} (cut)"}
        for row in judged.values():
            assert row["helpful"]["verdicts"] == 3 * len(QUESTIONS), "three repeats"
            assert 0 <= row["helpful"]["win"]["mean"] <= 1
    assert server.calls, "the two policies answer differently"
    assert {call["temperature"] for call in server.calls} == {0.7}
    assert {call["model"] for call in server.calls} == {"gpt-4-0125-preview"}
    table = read_table("reports/answers/helpful/sft.parquet", SUITE_ANSWERS)
    assert len(table) == len(QUESTIONS) and table["cut"].notna().all()


@protocol("c-dpo")
def test_c_dpo_scores_five_answers_to_each_prompt(
    results: tuple[dict[str, Any], ChatServer],
) -> None:
    metrics, _ = results
    told = metrics["prompts"]
    assert told["policies"]["helpful"]["answers"] == 5 * told["prompts"] == 30
    row = metrics["beaver"]["suites"]["prompts"]["helpful"]
    assert row["verdicts"] == 30 and {"reward", "cost"} <= row.keys()


@protocol("safedpo")
def test_safedpo_harmless_ratio_and_over_refusal(
    results: tuple[dict[str, Any], ChatServer],
) -> None:
    metrics, _ = results
    harmless = metrics["beaver"]["suites"]
    assert harmless.keys() == {"prompts"} and 0 <= harmless["prompts"]["sft"]["unsafe"]["mean"] <= 1
    labels = metrics["refusal"]["suites"]["xstest"]["helpful"]["labels"]
    assert {name: row["verdicts"] for name, row in labels.items()} == {"safe": 2, "unsafe": 1}


@protocol("pd-dpo")
def test_pd_dpo_truthfulqa_by_likelihood_and_in_words(
    results: tuple[dict[str, Any], ChatServer],
) -> None:
    metrics, _ = results
    for name in ("mc1", "mc2"):
        told = metrics[name]["policies"]["helpful"]
        assert told["questions"] == len(QUESTIONS) and 0 <= told["score"] <= 1
    assert metrics["truthfulqa"]["policies"]["sft"]["answers"] == len(QUESTIONS)
    assert metrics["beaver"]["suites"].keys() == {"prompts"}
