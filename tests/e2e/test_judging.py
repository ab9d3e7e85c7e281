"""Suites and judges in the whole graph, on a tiny world: what runs when one of them is new, and
that no key of an endpoint is written anywhere.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import tiny
from bench.chat_server import ChatServer
from dualign.core.schema import SUITE_ANSWERS, VERDICTS, read_table
from dualign.publishing.card import policy_card, published
from pipeline.dvc.parameters import assign
from tests.e2e.test_pipeline import run
from tests.e2e.warm import warm

KEY = "sk-nobody-may-see-this"
SUITE = {"suite": "held_out", "path": None, "prompts": 6, "samples_per_prompt": 2}
#: Two trained policies, no search and no certificate.
SMALL: dict[str, Any] = {
    **tiny.TINY,
    **dict.fromkeys(tiny.LENGTHS, 4),
    "safety_dpo.runs": {
        "alone": {"reference": "sft", "lam": 1.0, "factor": 1.0, "loss_type": "dpo", "clip": None}
    },
    "lagrangian_dpo.runs": {},
    "methods": {},
    "certify.runs": {},
    "evaluate.policies": {"sft": "sft", "helpful": "reward_dpo/helpful"},
    "suites": {"tea": SUITE},
}


def judges(url: str) -> dict[str, Any]:
    endpoint = {
        "kind": "openai", "base_url": url, "model": "m", "key_variable": "JUDGE_KEY",
        "price": {"input": 0.5, "output": 1.5}, "budget": {"calls": 100, "money": 1000.0},
    }  # fmt: skip
    second = {"path": "models/cost_model", "kind": "classifier", "higher_is": "harmful"}
    return {
        "ours": {"kind": "scorers"},
        "other": {"kind": "independent", "cost": [second]},
        "truth": {"kind": "oracle"},
        "refusal": {"kind": "refusal"},
        "better": {**endpoint, "question": "preference"},
        "harm": {**endpoint, "question": "harm"},
    }


class Project:
    """A copy of the repository that has run once, and the endpoint that its judges ask."""

    def __init__(self, root: Path, server: ChatServer, python: Path) -> None:
        self.root = root
        self.server = server
        self.python = python
        self.said = ""

    def repro(self, **changes: Any) -> list[str]:
        """Run what is stale after an edit; the stages that ran."""
        path = self.root / "params.yaml"
        path.write_text(assign(path.read_text(), changes))
        done = run(self.root, sys.executable, "-m", "dvc", "repro", python=self.python)
        self.said += done.stdout + done.stderr
        return re.findall(r"Running stage '(.+)'", done.stdout)

    def metrics(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / f"reports/metrics/{name}.json").read_text())
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("judging") / "project"
    root.mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        ChatServer() as server,
        warm(tmp_path_factory.mktemp("warm")) as python,
    ):
        patch.setenv("JUDGE_KEY", KEY)
        tiny.copy(root, {**SMALL, "judges": judges(server.url)})
        made = Project(root, server, python)
        made.repro()
        yield made


@pytest.mark.slow
def test_every_judge_has_judged_every_answer(project: Project) -> None:
    answers = {
        policy: read_table(project.root / f"reports/answers/tea/{policy}.parquet", SUITE_ANSWERS)
        for policy in ("sft", "helpful")
    }
    assert {len(table) for table in answers.values()} == {12}
    for judge in ("ours", "truth", "refusal", "harm"):
        told = project.metrics(f"judge/{judge}")
        assert told["failures"] == {} and told["suites"]["tea"].keys() == {"sft", "helpful"}
        table = read_table(project.root / f"reports/judgements/{judge}/verdicts.parquet", VERDICTS)
        assert len(table) == 24
    better = project.metrics("judge/better")
    assert better["suites"]["tea"].keys() == {"helpful"}
    differ = int((answers["sft"]["response"] != answers["helpful"]["response"]).sum())
    compared = sum('"answer_A"' in call["messages"][0]["content"] for call in project.server.calls)
    assert compared <= 2 * differ and better["money"] > 0
    assert project.metrics("judge/harm")["agreement"]["answers"] > 0


@pytest.mark.slow
def test_the_report_shows_what_judges_found(project: Project) -> None:
    page = (project.root / "reports/index.html").read_text()
    sections = re.findall(r'<section id="(suites|ranking|judges)">(.*?)</section>', page, re.S)
    assert [name for name, _ in sections] == ["suites", "ranking", "judges"]
    suites, ranking, judges = (text for _, text in sections)
    assert re.findall(r'class="by">(\w+)', suites) == [
        *("ours", "truth"), *("ours", "other", "truth"), *("ours", "other", "truth", "harm"),
        "refusal", "better",
    ]  # fmt: skip
    told = project.metrics("judge/truth")["suites"]["tea"]["helpful"]["reward"]["mean"]
    assert f'data-value="{told}"' in suites
    assert "tea: better, preference of pairs" in ranking
    assert "ours against other" in judges and "ours and harm" in judges


@pytest.mark.slow
def test_no_key_is_written_anywhere(project: Project) -> None:
    assert project.server.keys == {f"Bearer {KEY}"}
    assert KEY not in project.said
    files = [path for path in project.root.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    card = str(policy_card(published(project.root, "reward_dpo/helpful"), "owner/it"))
    assert "| tea | better (openai) | preferred |" in card and KEY not in card
    assert "held-out answers that people called safe or unsafe, harm says the same of" in card


@pytest.mark.slow
def test_only_what_is_new_runs(project: Project) -> None:
    asked = len(project.server.calls)
    known = judges(project.server.url)
    more = known | {"again": {"kind": "scorers"}}
    assert project.repro(judges=more) == ["judge@again", "report"]
    assert '<span class="by">again</span>' in (project.root / "reports/index.html").read_text()
    assert project.repro(judges=known) == ["report"]
    page = (project.root / "reports/index.html").read_text()
    assert '<span class="by">again</span>' not in page, "its verdicts are left, and passed by"
    files = [project.root / f"reports/answers/tea/{name}.parquet" for name in ("sft", "helpful")]
    before = [path.read_bytes() for path in files]
    policies = {**SMALL["evaluate.policies"], "safe": "safety_dpo/alone"}
    ran = project.repro(**{"evaluate.policies": policies})
    assert {"evaluate@safe", "answer@tea", *(f"judge@{name}" for name in known)} < set(ran)
    assert "tea: answered by sft before" in project.said
    assert "tea: answered by helpful before" in project.said
    assert [path.read_bytes() for path in files] == before
    assert len(project.server.calls) - asked <= 3 * 12, (
        "12 of harm, 24 of preference, of `safe` alone"
    )
    assert project.metrics("judge/harm")["suites"]["tea"].keys() == {"sft", "helpful", "safe"}
