"""Params of suites and judges: what is refused, by the row's own keys, and that no key is shown."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dualign.core.errors import ParamsError
from dualign.params import loading
from dualign.params.judging import JudgeParams, LocalJudge, OpenaiJudge
from tests.params.mistakes import Content, put, refusal

ROOT = Path(__file__).resolve().parents[2]
SUITE = {"suite": "held_out", "path": None, "prompts": 4, "samples_per_prompt": 1}
OPENAI: dict[str, Any] = {
    "kind": "openai",
    "question": "preference",
    "base_url": "https://api.example.org/v1",
    "model": "m",
    "key_variable": "JUDGE_KEY",
    "price": {"input": 0.001, "output": 0.002},
    "budget": {"calls": 10, "money": 1.0},
}


@pytest.fixture
def judged(content: Content) -> Content:
    """The shipped params with a suite and a judge of every kind."""
    put(content, "suites", {"tea": dict(SUITE)})
    guard = {"path": "g", "kind": "guard", "higher_is": "harmful"}
    judges = {
        "openai": {"kind": "local", "question": "harm", "path": "models/base/judge"},
        "gpt": copy.deepcopy(OPENAI),
        "ours": {"kind": "scorers"},
        "other": {"kind": "independent", "cost": [guard]},
        "refusal": {"kind": "refusal"},
        "truth": {"kind": "oracle"},
    }
    put(content, "judges", judges)
    return content


def test_every_kind_of_judge_is_read(judged: Content) -> None:
    params = loading.check(judged, "my.yaml")["judge"]
    assert isinstance(params, JudgeParams)
    assert isinstance(params.judges["openai"], LocalJudge)
    gpt = params.judges["gpt"]
    assert isinstance(gpt, OpenaiJudge) and gpt.parameters == {
        "temperature": 0.0,
        "max_tokens": 100,
    }


def test_the_example_of_the_guide_is_valid(content: Content) -> None:
    guide = (ROOT / "docs/evaluation.md").read_text()
    example = YAML(typ="safe").load(guide.partition("```yaml\n")[2].partition("```")[0])
    assert len(example["suites"]) == 2 and len(example["judges"]) == 4
    loading.check({**content, **example}, "docs/evaluation.md")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (
            "judges.gpt.kind",
            "gpt",
            "judges.gpt.kind: input should be one of 'scorers'",
        ),
        ("judges.gpt", {}, "judges.gpt.kind is missing"),
        ("judges.gpt.modle", "m", "judges.gpt.modle is not a known key; did you mean 'model'?"),
        ("judges.openai.pth", "m", "judges.openai.pth is not a known key; did you mean 'path'?"),
        ("judges.gpt.repeats", 0, "judges.gpt.repeats: input should be greater than"),
        ("judges.gpt.budget.calls", -1, "judges.gpt.budget.calls: input should be greater than"),
        ("judges.other.cost", [], "judges.other.cost: list should have at least 1 item"),
        ("judges.other", {"kind": "independent"}, "judges.other: independent judges need a reward"),
        ("judges.ours.cost", 1, "judges.ours.cost is not a known key"),
        ("suites.tea.prompts", 0, "suites.tea.prompts: input should be greater than"),
        ("judges.ours.suites", [], "judges.ours.suites: list should have at least 1 item"),
        ("judges.ours.suites", ["cups"], "judges.ours.suites: 'cups' is not one of ['tea']"),
        ("suites.tea.temperature", -1.0, "suites.tea.temperature: input should be greater than"),
        ("suites.tea.temperature", 1e-9, "suites.tea: temperature is 0, which is greedy, or at l"),
        ("suites.tea.top_p", 0.0, "suites.tea.top_p: input should be greater than 0"),
        (
            "suites.tea",
            {**SUITE, "temperature": 0.0, "top_p": 0.9},
            "suites.tea: top_p must be 1 at temperature 0",
        ),
        ("suites.tea.max_new_tokens", 0, "suites.tea.max_new_tokens: input should be greater"),
        ("suites.tea.stop", "USER", "suites.tea.stop: input should be a valid list"),
        ("suites.tea.stop", [""], "suites.tea.stop.0: string should have at least 1 character"),
        (
            "suites.tea",
            {**SUITE, "temperature": 0.0, "samples_per_prompt": 2},
            "suites.tea: samples_per_prompt must be 1 at temperature 0",
        ),
        (
            "suites.tea",
            {**SUITE, "suite": "truthfulqa_mc2", "stop": ["USER"], "temperature": 0.0},
            "suites.tea: truthfulqa_mc2 weighs given answers and draws none; remove stop, temp",
        ),
        ("suites", {}, "judges judge answers to suites, and suites is empty"),
        ("judge.max_failed", 1.5, "judge.max_failed: input should be less than"),
        ("judge.judges", {}, "judge.judges belongs at judges; move it there"),
    ],
)
def test_a_mistake_is_told_by_the_keys_of_the_file(
    judged: Content, key: str, value: Any, told: str
) -> None:
    put(judged, key, value)
    assert refusal(judged).startswith(told)


@pytest.mark.parametrize("key", ["judges.gpt.key_variable", "judges.gpt.base_url"])
def test_a_key_that_is_pasted_into_the_file_is_not_shown(judged: Content, key: str) -> None:
    put(judged, key, "https://me:sk-12345@api.example.org" if "url" in key else "sk-12345")
    with pytest.raises(ParamsError) as caught:
        loading.check(judged, "my.yaml")
    assert "sk-12345" not in str(caught.value) and str(caught.value).startswith(
        "my.yaml: judges.gpt"
    )
