"""The stage answer: what policies answer to a suite, and what makes one of them answer again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import DualignError, ParamsError
from dualign.core.schema import (
    CHOICES,
    PROMPTS,
    SFT,
    SUITE,
    SUITE_ANSWERS,
    prompt_id,
    read_table,
    user,
)
from dualign.data import world
from dualign.lm.models import build_scratch, save
from dualign.params.base import Resources
from dualign.params.evaluate import SuiteSpec
from dualign.params.judging import AnswerParams
from dualign.params.loading import load
from dualign.stage import Run
from stages import answer
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
POLICIES = {"sft": "sft", "helpful": "reward_dpo/helpful"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def asked(workspace: Path) -> Path:
    """The folder of the stages with six prompts of the world, held out."""
    prompts = [user(question) for question in world.prompts()[::900]]
    rows = [{"prompt_id": prompt_id(p), "prompt": p, "source": "world"} for p in prompts]
    write_parquet(workspace / "data/prepared/eval.parquet", rows, PROMPTS)
    write_parquet(workspace / "data/prepared/sft.parquet", [], SFT)
    return workspace


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many prompts the policies were asked, call by call."""
    calls: list[int] = []
    real = answer.draw

    def counting(policy: Any, tokenizer: Any, prompts: Any, *decoding: Any, **how: Any) -> Any:
        calls.append(len(prompts))
        return real(policy, tokenizer, prompts, *decoding, **how)

    monkeypatch.setattr(answer, "draw", counting)
    return calls  # type: ignore[return-value]


def spec(suite: str = "held_out", **changes: Any) -> SuiteSpec:
    given = {"suite": suite, "path": None, "prompts": None, "samples_per_prompt": 2}
    return SuiteSpec.model_validate({**given, **changes})


def run(resources: Resources, name: str = "tea", **changes: Any) -> dict[str, Any]:
    """Run the stage for one suite; its metrics."""
    given = {"suites": {"tea": spec()}, "policies": POLICIES, "max_new_tokens": 6}
    params = load(AnswerParams, ROOT / "params.yaml").model_copy(update={**given, **changes})
    answer.main(Run("answer", name, params, resources))
    found: dict[str, Any] = read_json(f"reports/metrics/answer/{name}.json")
    return found


def answers(policy: str, suite: str = "tea") -> pd.DataFrame:
    return read_table(f"reports/answers/{suite}/{policy}.parquet", SUITE_ANSWERS)


def test_every_policy_answers_every_prompt(asked: Path, resources: Resources) -> None:
    told = run(resources)
    suite = read_table("reports/answers/tea/_suite.parquet", SUITE)
    for policy in POLICIES:
        rows = answers(policy)
        assert rows["prompt_id"].tolist() == [p for p in suite["prompt_id"] for _ in range(2)]
        assert rows["sample"].tolist() == [0, 1] * len(suite)
        assert told["policies"][policy]["answers"] == len(rows) == 2 * told["prompts"]
        assert told["policies"][policy]["length"] == rows["length"].mean()
    assert answers("sft")["response"].tolist() != answers("helpful")["response"].tolist()


def test_prompts_that_begin_as_training_rows_do_are_counted(
    asked: Path, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever follows in the training row, and however it is spelt; held-out rows are not seen."""
    assert run(resources)["seen"] == 0 and "training row" not in caplog.text
    first, second, third, *_ = world.prompts()[::900]
    dialogue = [*user(first.upper()), {"role": "assistant", "content": "So."}, *user("And?")]
    row = {"prompt_id": "a", "prompt": dialogue, "response": "Yes.", "split": "train"}
    more = {**row, "prompt_id": "b", "prompt": user(second)}
    heldout = {**row, "prompt_id": "c", "prompt": user(third), "split": "heldout"}
    write_parquet(asked / "data/prepared/sft.parquet", [row, more, heldout], SFT)
    assert run(resources)["seen"] == 2
    assert "tea: 2 of 6 prompts begin with a question of a training row" in caplog.text


def test_another_policy_or_suite_makes_nothing_anew(
    asked: Path, resources: Resources, drawn: list[int]
) -> None:
    run(resources)
    before = {
        policy: (asked / f"reports/answers/tea/{policy}.parquet").read_bytes()
        for policy in POLICIES
    }
    assert drawn == [6, 6]
    more = {**POLICIES, "safe": "safety_dpo/alone"}
    run(resources, policies=more)
    assert drawn == [6, 6, 6]
    both = {"tea": spec(), "less": spec(prompts=2)}
    run(resources, policies=more, suites=both)
    assert drawn == [6, 6, 6]
    run(resources, "less", policies=more, suites=both)
    assert drawn == [6, 6, 6, 2, 2, 2]
    for policy, content in before.items():
        assert (asked / f"reports/answers/tea/{policy}.parquet").read_bytes() == content


def test_what_an_answer_depends_on_makes_it_anew(
    asked: Path, resources: Resources, drawn: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    run(resources)
    run(resources, seed=8)
    assert len(drawn) == 4
    run(resources, max_new_tokens=5)
    assert len(drawn) == 6
    run(resources, suites={"tea": spec(samples_per_prompt=1)})
    assert len(drawn) == 8
    save(build_scratch(TINY, tokenizer, 9), tokenizer, asked / "models/reward_dpo/helpful")
    run(resources)
    assert len(drawn) == 9, "the other policy is as it was"


def test_a_suite_says_how_its_answers_are_made(
    asked: Path, resources: Resources, drawn: list[int]
) -> None:
    greedy = {"temperature": 0.0, "samples_per_prompt": 1}
    run(resources, suites={"tea": spec(**greedy)})
    first = answers("sft")
    assert first["cut"].isna().all()
    run(resources, seed=8, suites={"tea": spec(**greedy)})
    assert answers("sft")["response"].tolist() == first["response"].tolist()
    assert len(drawn) == 4
    run(resources, suites={"tea": spec(**greedy, max_new_tokens=3)})
    assert answers("sft")["length"].max() <= 3 < first["length"].max()
    with pytest.raises(ParamsError, match=r"and suites\.tea\.max_new_tokens: .* is 128; lower it"):
        run(resources, suites={"tea": spec(max_new_tokens=128)})


def test_stop_words_cut_the_answers_that_are_kept_whole(asked: Path, resources: Resources) -> None:
    run(resources)
    letters = [letter for text in answers("sft")["response"] for letter in text.strip()[1:]]
    stop = max(set(letters) - {" "}, key=letters.count)
    told = run(resources, suites={"tea": spec(stop=[stop])})
    table = answers("sft")
    assert table["response"].tolist() == table["response"].tolist()
    whole = table["response"].str.strip()
    assert table["cut"].tolist() == [text.partition(stop)[0] for text in whole]
    shorter = (table["cut"] != whole).mean()
    assert told["policies"]["sft"]["cut"] == shorter > 0


def test_a_run_that_ends_early_keeps_the_policies_before(
    asked: Path, resources: Resources, drawn: list[int]
) -> None:
    weights = asked / "models/reward_dpo/helpful/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"torn")
    with pytest.raises(DualignError):
        run(resources)
    assert drawn == [6] and not (asked / "reports/answers/tea").exists()
    weights.write_bytes(kept)
    run(resources)
    assert drawn == [6, 6]


def test_a_kill_loses_the_part_at_hand_and_changes_nothing(
    asked: Path, resources: Resources, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "PART", 2)
    run(resources, policies={"sft": "sft"})
    whole = (asked / "reports/answers/tea/sft.parquet").read_bytes()
    assert drawn == [2, 2, 2]
    monkeypatch.setenv("DUALIGN_SCRATCH", str(asked / "elsewhere"))
    counting = answer.draw

    def killed(*given: Any) -> Any:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return counting(*given)

    monkeypatch.setattr(answer, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        run(resources, policies={"sft": "sft"})
    monkeypatch.setattr(answer, "draw", counting)
    run(resources, policies={"sft": "sft"})
    assert drawn == [2, 2, 2, 2, 2, 2], "the first two of the second run were kept"
    assert (asked / "reports/answers/tea/sft.parquet").read_bytes() == whole
    assert not [*(asked / "elsewhere").rglob("part-*")]


def test_a_policy_that_was_not_certified_is_left_out(asked: Path, resources: Resources) -> None:
    (asked / "models/certified/ours").mkdir(parents=True)
    told = run(resources, policies={**POLICIES, "certified": "certified/ours"})
    assert told["policies"]["certified"] == {"absent": True}
    assert not (asked / "reports/answers/tea/certified.parquet").exists()


def test_choices_are_weighed_by_their_likelihood(
    asked: Path, resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    short = TINY.model_copy(update={"context": 2048})
    for seed, folder in enumerate(POLICIES.values()):
        torch.manual_seed(seed)
        save(build_scratch(short, tokenizer, seed), tokenizer, asked / "models" / folder)
    rows = [
        {
            "question": f"What is {i}?",
            "mc1_targets": {f"It is {i}.": 1, "Nothing.": 0, "A cup.": 0},
            "mc2_targets": {f"It is {i}.": 1, "A number.": 1, "A cup.": 0},
        }
        for i in range(4)
    ]
    (asked / "data/suites").mkdir(parents=True)
    (asked / "data/suites/mc_task.json").write_text(json.dumps(rows))
    suites = {name: spec(f"truthfulqa_{name}") for name in ("mc1", "mc2")}
    told = {name: run(resources, name, suites=suites) for name in suites}
    for name in suites:
        for policy in POLICIES:
            table = read_table(f"reports/answers/{name}/{policy}.parquet", CHOICES)
            scores = [
                float(max(row) == row[0]) if name == "mc1" else share(row) for row in table["logp"]
            ]
            assert table["score"].tolist() == pytest.approx(scores)
            assert told[name]["policies"][policy] == {
                "questions": 4, "score": pytest.approx(sum(scores) / 4),
            }  # fmt: skip


def share(logp: Any) -> float:
    """The share of the first two of three choices."""
    mass = torch.tensor(logp, dtype=torch.float64).exp()
    return float(mass[:2].sum() / mass.sum())
