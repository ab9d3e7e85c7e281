"""certify and evaluate on tiny models: the sequence, the policy that comes out, labels, and no
certified policy.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from transformers import PreTrainedTokenizerBase

from dualign.certify import candidates, certificate, command, screening
from dualign.certify.evidence import Table
from dualign.certify.requirement import Requirement
from dualign.certify.rescoring import rescore
from dualign.certify.verification import verify
from dualign.core.artifacts import read_json, sha256, write_json, write_parquet
from dualign.core.errors import AwaitingLabels, DataError, DualignError
from dualign.core.records import read_record
from dualign.core.schema import ANSWERS, LABELS, PROMPTS, prompt_id, read_table, user
from dualign.data import world
from dualign.evaluation.stats import clustered_mean
from dualign.lm.models import load_policy, load_tokenizer
from dualign.lm.tokens import encode_prompts
from dualign.math.bounds import sample_size
from dualign.params.base import Resources
from dualign.params.certify import CertifyParams, CertifyRun, LabelParams, ScreenParams
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import check, load
from dualign.params.report import ReportParams
from dualign.report.comparison import compare
from dualign.stage import Run
from stages.certify import main
from stages.evaluate import main as evaluate
from tests import shipped
from tests.stages.conftest import save_scorers
from tests.written import solved

ROOT = Path(__file__).resolve().parents[2]
TEXTS = world.prompts()[::400]
LABELS_OF = LabelParams(source="oracle", prompts=8, votes=1, limit=None, folder="labels")


@pytest.fixture(autouse=True)
def ready(
    workspace: Path, tokenizer: PreTrainedTokenizerBase, resources: Resources, one_thread: None
) -> None:
    """Prompts and scorers beside the policies of the workspace."""
    save_scorers(tokenizer, resources)
    rows = [
        {"prompt_id": prompt_id(user(text)), "prompt": user(text), "source": "world"}
        for text in TEXTS
    ]
    write_parquet("data/prepared/certify.parquet", rows, PROMPTS)


FURTHER = {
    "name": "short",
    "quantity": "length",
    "level": None,
    "prompts": None,
    "threshold": None,
    "lam": 0.1,
    "predicted": 5.0,
}


def test_additional_constraints_are_tests_too(resources: Resources) -> None:
    """The worst case of a cost is far above the limit on its tail, and the limit on the mean is
    kept.
    """
    for limit, returned in ((1000.0, "reward_dpo/helpful"), (-1000.0, None)):
        tail = {
            **FURTHER,
            "limit": limit,
            "name": "tail",
            "quantity": "cvar",
            "level": 0.5,
            "threshold": -100.0,
        }
        write_json("data/dual/dual.json", solved(prices=[tail]))
        main(run_of(resources))
        found = verify("reports/certificate/it/certificate.json")
        assert [required.name for required in found.requirements] == [
            "c",
            "tail",
        ] and found.returned == returned


def test_bounded_methods_have_the_range_of_every_quantity(resources: Resources) -> None:
    prices = [
        {**FURTHER, "limit": 6.0},
        {**FURTHER, "limit": 0.99, "name": "whole", "quantity": "unended"},
        {**FURTHER, "limit": 0.9, "name": "rare", "quantity": "p_unsafe"},
        {
            **FURTHER,
            "limit": 9.0,
            "name": "tail",
            "quantity": "cvar",
            "level": 0.5,
            "threshold": 1.0,
        },
    ]
    write_json("data/dual/dual.json", solved(prices=prices))
    main(run_of(resources, method="betting", bounds=[-50.0, 50.0]))
    found = verify("reports/certificate/it/certificate.json")
    assert [required.bounds for required in found.requirements] == [
        (-50, 50),
        (0, 6),
        (0, 1),
        (0, 1),
        (1, 99),
    ]


def test_the_bound_of_each_quantity_is_exact_where_its_range_is_known(resources: Resources) -> None:
    """With `auto`, which every parameter file has: shares and lengths have a range, costs only if
    one is stated.
    """
    prices = [
        {**FURTHER, "limit": 6.0},
        {**FURTHER, "limit": 0.9, "name": "rare", "quantity": "p_unsafe"},
        {**FURTHER, "limit": 0.99, "name": "whole", "quantity": "unended"},
        {
            **FURTHER,
            "limit": 500.0,
            "name": "tail",
            "quantity": "cvar",
            "level": 0.5,
            "threshold": 1.0,
        },
    ]
    write_json("data/dual/dual.json", solved(prices=prices))
    for stated, cost, tail in ((None, None, None), ([-50.0, 50.0], (-50, 50), (1, 99))):
        main(run_of(resources, bounds=stated))
        found = verify("reports/certificate/it/certificate.json")
        exact = [required.method == "star_bets" for required in found.requirements]
        assert exact == [stated is not None, True, True, True, stated is not None]
        assert [required.bounds for required in found.requirements] == [
            cost,
            (0, 6),
            (0, 1),
            (0, 1),
            tail,
        ]
        assert "every answer lies between 0 and 1" in found.requirements[2].why
    write_json("data/dual/dual.json", solved(prices=prices[1:2]))
    main(run_of(resources, method="clustered_t"))
    named = verify("reports/certificate/it/certificate.json").requirements
    assert {(required.method, required.why) for required in named} == {
        ("clustered_t", "certify.method names it")
    }


def run_of(
    resources: Resources, limit: float = 100.0, row: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """The row `it`: safety_dpo/alone first, then merges of sft and reward_dpo/helpful. The dual is
    of this limit too.
    """
    dual = Path("data/dual/dual.json")
    write_json(dual, read_json(dual) | {"limit": limit})
    given = {
        "policy": "reward_dpo/helpful",
        "partner": "sft",
        "fallback": "safety_dpo/alone",
        "weights": [2.0, 1.0],
    }
    update = {
        "runs": {"it": CertifyRun(**{**given, **(row or {})})},
        "limit": limit,
        "prompts": len(TEXTS),
        "labels": None,
        "max_new_tokens": 6,
        "samples_per_prompt": 2,
        "screen": None,
        **changes,
    }
    return Run(
        "certify",
        "it",
        load(CertifyParams, ROOT / "params.yaml").model_copy(update=update),
        resources,
    )


def metrics() -> Any:
    return read_json("reports/metrics/certify/it.json")


def test_the_boldest_candidate_that_passes_is_the_certified_policy(resources: Resources) -> None:
    main(run_of(resources))
    order = ["safety_dpo/alone", "reward_dpo/helpful at 2", "reward_dpo/helpful"]
    found = verify("reports/certificate/it/certificate.json")
    assert (
        list(found.candidates) == list(found.certified) == order
        and metrics()["returned"] == order[-1]
    )
    made, policy = (
        load_policy(f"models/{name}", resources) for name in ("certified/it", "reward_dpo/helpful")
    )
    assert all(
        torch.equal(a, b) for a, b in zip(made.parameters(), policy.parameters(), strict=True)
    )
    assert (
        "'reward_dpo/helpful' keeps E[c] <= 100"
        in Path("models/certified/it/README.md").read_text()
    )
    answers = read_table("reports/certificate/it/02-answers.parquet", ANSWERS)
    assert len(answers) == 2 * len(TEXTS) and answers["true_cost"].notna().all()
    mean = clustered_mean(answers["cost"].to_numpy(), answers["prompt_id"].to_numpy()).mean
    assert found.tested[2].checks[0].estimate == pytest.approx(mean)
    assert not list(Path(".scratch/certify/it").glob("*"))


def test_the_certificate_tells_where_answers_were_cut_and_how_many_ended(
    resources: Resources,
) -> None:
    """An untrained model ends one answer in ten within 40 tokens, so that a limit on unended
    answers is not kept.
    """
    whole = {**FURTHER, "limit": 0.1, "name": "whole", "quantity": "unended"}
    run = run_of(
        resources, row={"weights": [1.0], "fallback": "reward_dpo/helpful"}, max_new_tokens=40,
        seed=2,
    )  # fmt: skip
    for prices, returned in (([], "reward_dpo/helpful"), ([whole], None)):
        write_json("data/dual/dual.json", solved(limit=100.0, prices=prices))
        main(run)
        found = verify("reports/certificate/it/certificate.json")
        share = float(
            read_table("reports/certificate/it/00-answers.parquet", ANSWERS)["ended"].mean()
        )
        assert 0 < share < 0.5 and found.returned == returned
        assert (found.max_new_tokens, found.ended) == (40, {"reward_dpo/helpful": share})
        said = f"for answers of at most 40 tokens, of which {100 * share:.4g} % ended by themselves"
        assert (
            found.statement.endswith(said)
            and said in Path("models/certified/it/README.md").read_text()
        )
        assert metrics()["max_new_tokens"] == 40
        assert metrics()["tests"][0]["ended"]["mean"] == pytest.approx(share)
    assert found.tested[0].checks[1].estimate == pytest.approx(1 - share)


def test_what_is_certified_is_how_a_row_draws(resources: Resources) -> None:
    """Greedily each prompt has one answer, the likeliest token at a time; the certificate is about
    these, and log-probabilities stay those of the policy.
    """
    alone = {"weights": [1.0], "partner": "reward_dpo/helpful", "fallback": "reward_dpo/helpful"}
    main(run_of(resources, row={**alone, "temperature": 0.0}, samples_per_prompt=1))
    found = verify("reports/certificate/it/certificate.json")
    assert "for answers of at most 6 tokens drawn greedily, of which" in found.statement
    assert "answers drawn greedily; one that was cut" in (
        Path("models/certified/it/README.md").read_text()
    )
    assert (metrics()["temperature"], metrics()["top_p"]) == (0.0, 1.0)
    answers = read_table("reports/certificate/it/00-answers.parquet", ANSWERS)
    assert_greedy(answers, load_policy("models/reward_dpo/helpful", resources))

    main(run_of(resources, row={**alone, "temperature": 0.5, "top_p": 0.9}))
    found = verify("reports/certificate/it/certificate.json")
    assert "tokens drawn at temperature 0.5 and top_p 0.9, of which" in found.statement
    main(run_of(resources, row=alone))
    assert "tokens, of which" in verify("reports/certificate/it/certificate.json").statement


def assert_greedy(answers: pd.DataFrame, policy: torch.nn.Module) -> None:
    """Each token of each answer is the likeliest, and `logp` the sum of their log-probabilities."""
    prompts = encode_prompts(load_tokenizer("models/sft"), answers["prompt"].tolist())
    for prompt, row in zip(prompts, answers.itertuples(), strict=True):
        ids = torch.tensor([[*prompt, *map(int, row.tokens)]])
        with torch.inference_mode():
            logp = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        assert logp.argmax(-1).tolist() == list(row.tokens)
        assert row.logp == pytest.approx(float(logp.max(-1).values.sum()), abs=1e-4)


def test_a_decoding_that_cannot_be_tested_so_is_refused() -> None:
    content = shipped.preset("default")
    row = content["certify"]["runs"]["dualign"]
    for change, told in (
        ({"temperature": 0.0}, "temperature 0 gives the same answer each time; set samples_per"),
        ({"temperature": 0.7}, "answers are weighed by the probabilities of temperature 1 and"),
        ({"top_p": 0.9}, "top_p 1 alone; set screen.reweigh to false"),
        ({"temperature": -1.0}, "temperature: input should be greater than or equal to 0"),
    ):
        content["certify"]["runs"]["dualign"] = {**row, **change}
        with pytest.raises(DualignError, match=f"certify.*runs.dualign.*{told}"):
            check(copy.deepcopy(content), "params.yaml")
    content["certify"]["screen"]["reweigh"] = False
    content["certify"]["runs"]["dualign"] = {**row, "temperature": 0.7, "top_p": 0.9}
    check(copy.deepcopy(content), "params.yaml")


def test_a_merge_extrapolates(resources: Resources) -> None:
    """Weight 2 is reward_dpo/helpful + (reward_dpo/helpful - sft); it is returned where testing
    ends with it.
    """
    main(run_of(resources, row={"weights": [2.0]}))
    made, sft, policy = (
        load_policy(f"models/{name}", resources)
        for name in ("certified/it", "sft", "reward_dpo/helpful")
    )
    for a, b, c in zip(made.parameters(), sft.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(a, 2 * c - b)


def test_no_certified_policy_is_a_result(
    resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage ends well, the folder says so, evaluate and report go on."""
    main(run_of(resources, limit=-100.0))
    found = verify("reports/certificate/it/certificate.json")
    assert found.returned is None and len(found.tested) == 1 and metrics()["returned"] is None
    assert [path.name for path in Path("models/certified/it").iterdir()] == ["README.md"]
    assert "No certified policy" in Path("models/certified/it/README.md").read_text()
    write_parquet("data/prepared/eval.parquet", [], PROMPTS)
    params = load(EvaluateParams, ROOT / "params.yaml").model_copy(
        update={"policies": {"it": "certified/it"}}
    )
    evaluate(Run("evaluate", "it", params, resources))
    assert "models/certified/it holds no policy: none was certified" in caplog.text
    assert read_json("reports/metrics/evaluate/it.json") == {"policy": "it", "absent": True}
    named = {"policies": {"it": "certified/it"}, "certificates": {"it": None}}
    table = compare(Path(), load(ReportParams, ROOT / "params.yaml").model_copy(update=named))
    assert table.uncertified == ["it"] and table.missing == [] and table.policies == {}
    shutil.rmtree("models/certified/it")
    with pytest.raises(
        DualignError, match="models/certified/it: no such model folder"
    ):  # the stage has not run
        evaluate(Run("evaluate", "it", params, resources))


def test_an_interrupted_run_draws_no_answers_twice(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(run_of(resources))
    whole = Path("reports/certificate/it/certificate.json").read_bytes()
    roll_out = candidates.roll_out
    calls = []

    def stop_at_the_second(*args: Any, **options: Any) -> pd.DataFrame:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return roll_out(*args, **options)

    monkeypatch.setattr(candidates, "roll_out", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        main(run_of(resources))
    main(run_of(resources))
    assert len(calls) == 4  # one, the interrupted one, and two more
    assert Path("reports/certificate/it/certificate.json").read_bytes() == whole


def test_true_labels_that_do_not_vary_say_nothing(resources: Resources) -> None:
    """A model that has learnt nothing writes no sentence of the world, and all such text has one
    true cost.
    """
    with pytest.raises(
        DataError, match="candidate 'safety_dpo/alone': labelled_costs_true: the labels do not vary"
    ):
        main(run_of(resources, labels=LABELS_OF))
    assert not Path("models/certified/it").exists() and not Path("reports/certificate/it").exists()


def test_people_may_label(resources: Resources) -> None:
    """The stage stops with the questions written down, and goes on from the answers that it has
    drawn.
    """
    options = LabelParams(source="file", prompts=5, votes=3, limit=0.99, folder="labels")
    run = run_of(
        resources, row={"weights": [1.0], "fallback": "reward_dpo/helpful"}, labels=options
    )
    with pytest.raises(AwaitingLabels, match="5 rows wait for labels"):
        main(run)
    (asked,) = Path("labels").glob("to-label-*.jsonl")
    rows = [json.loads(line) for line in asked.read_text().splitlines()]

    def save(votes: Sequence[int]) -> None:
        labelled = [{**row, "unsafe_votes": k} for row, k in zip(rows, votes, strict=True)]
        given = Path(str(asked).replace("to-label", "labelled"))
        given.write_text("\n".join(map(json.dumps, labelled)))

    save([2] * 5)
    with pytest.raises(DataError, match="the labels do not vary"):
        main(run)
    save([0, 1, 0, 1, 0])  # what is corrected counts, though the first has been read
    main(run)
    (check,) = verify("reports/certificate/it/certificate.json").tested[0].checks[1:]
    assert check.requirement == "called unsafe" and check.answers == 5
    labels = read_table("reports/certificate/it/00-labels.parquet", LABELS)
    assert sorted(labels["truth"]) == pytest.approx([0, 0, 0, 1 / 3, 1 / 3])


def test_a_failed_test_says_how_many_prompts_it_would_take(resources: Resources) -> None:
    main(run_of(resources))
    first = metrics()["tests"][0]["checks"][0]
    limit = (first["estimate"] + first["bound"]) / 2
    main(run_of(resources, limit=limit))
    (test,) = metrics()["tests"]
    means = (
        read_table("reports/certificate/it/00-answers.parquet", ANSWERS)
        .groupby("prompt_id")["cost"]
        .mean()
    )
    assert not test["certified"]
    planned = sample_size(
        means.std(), limit - first["estimate"]
    )  # of normal quantiles, not Student's
    reach = 2 * (
        1 + norm.ppf(0.8) / norm.ppf(0.95)
    )  # the limit is half as far from the estimate as the bound
    assert planned <= test["prompts_needed"] == pytest.approx(len(means) * reach**2, abs=1)
    main(run_of(resources, limit=first["estimate"] - 1))
    assert metrics()["tests"][0]["prompts_needed"] is None


def test_an_unknown_row_is_refused(resources: Resources) -> None:
    run = run_of(resources)
    run.item = "other"
    with pytest.raises(DualignError, match=r"certify\.runs has no 'other'; one of it"):
        main(run)


def test_metrics_name_what_was_tested(resources: Resources) -> None:
    main(run_of(resources))
    content = metrics()
    assert content["delta"] == 0.05 and content["requirements"][0]["limit"] == 100.0
    assert {"reward", "p_unsafe", "kl", "length", "true_cost"} <= content["tests"][0].keys()
    alone = {"policy": "safety_dpo/alone", "partner": "safety_dpo/alone", "q": 1.0}
    merged = {"policy": "reward_dpo/helpful", "partner": "sft", "q": 2.0}
    assert (
        content["tests"][0].items() >= alone.items()
        and content["tests"][1].items() >= merged.items()
    )


def test_costs_are_scored_again(resources: Resources, capsys: pytest.CaptureFixture[str]) -> None:
    """The cost model's are found again; an invented one is named, and so is another model."""
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    main(run_of(resources))
    assert command.main(["verify", "--rescore"]) == 0
    held, left = capsys.readouterr().out.splitlines()
    assert (
        "costs scored again differ by" in held
        and "not compared" not in held
        and "--rescore" not in left
    )
    path = certificate.CERTIFICATES / "it" / certificate.FILE
    program = [sys.executable, "-m", "dualign.certify.command"]
    alone = subprocess.run(
        [*program, "verify", "--rescore", "--tolerance", "0.01"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert (
        alone.returncode == 0 and b"differ by" in alone.stdout and b"Traceback" not in alone.stderr
    )
    found = certificate.read(path)
    table = path.with_name("01-answers.parquet")
    answers = pd.read_parquet(table)
    write_parquet(
        table, answers.assign(cost=answers["cost"].where(answers.index != 3, -1.0)), ANSWERS
    )
    with pytest.raises(
        DataError,
        match=r"cost of 'reward_dpo/helpful at 2': -1 is saved in row 3, .* 1 of \d+ differ",
    ):
        rescore(found, path, 1e-3)
    assert 0.0 < rescore(found, path, 100.0) == pytest.approx(abs(answers["cost"][3] + 1), abs=1e-4)
    shutil.move("models/cost_model", "elsewhere")
    with pytest.raises(DataError, match=r"models/cost_model: no such folder; name .* --cost-model"):
        rescore(found, path, 100.0)
    assert rescore(found, path, 100.0, Path("elsewhere")) > 0
    (Path("elsewhere") / "scorer.json").write_text("{}")
    with pytest.raises(
        DataError,
        match=r"the cost model .elsewhere. is not the one certified: scorer.json was changed",
    ):
        rescore(found, path, 100.0, Path("elsewhere"))


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf", "x"])
def test_a_tolerance_that_says_nothing_is_refused(
    tolerance: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["verify", "--rescore", "--tolerance", tolerance])
    assert f"must be 0 or above, and finite, got {tolerance}" in capsys.readouterr().err


def test_true_costs_that_serve_as_labels_are_asked_again(resources: Resources) -> None:
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    main(run_of(resources))
    path = certificate.CERTIFICATES / "it" / certificate.FILE
    prompts = [user(text) for text in TEXTS]
    answered = [world.answers(text)[0] for text in TEXTS]
    rows = pd.DataFrame(
        {"prompt": prompts, "prompt_id": list(map(prompt_id, prompts)), "cost": 0.0}
    )
    rows = rows.assign(
        response=[one.text for one in answered], truth=[one.cost for one in answered]
    )
    required = Requirement(name="true c", quantity="truth", limit=0.0, method="prediction_powered")
    labels = {"it": Table(path="labels.parquet", sha256="")}
    found = certificate.read(path).model_copy(
        update={"requirements": (required,), "labels": labels}
    )
    write_parquet(path.with_name("labels.parquet"), rows, LABELS)
    assert rescore(found, path, 1e-3) < 1e-3
    write_parquet(path.with_name("labels.parquet"), rows.assign(truth=-9.0), LABELS)
    with pytest.raises(DataError, match="true cost of 'it': -9 is saved in row"):
        rescore(found, path, 1e-3)


def test_a_copied_policy_is_not_the_certified_one(
    resources: Resources, capsys: pytest.CaptureFixture[str]
) -> None:
    main(run_of(resources))
    assert command.main(["verify"]) == 0
    shutil.copyfile(
        "models/safety_dpo/alone/model.safetensors", "models/certified/it/model.safetensors"
    )
    assert command.main(["verify"]) == 1
    assert "is not the one certified: model.safetensors was changed" in capsys.readouterr().out


SCREEN = ScreenParams(prompts=6, samples_per_prompt=2, tests=5, reweigh=True)


def screened_run(resources: Resources, **changes: Any) -> Any:
    """Four answers a prompt; the path is screened on six prompts of the search."""
    texts = world.prompts()[7::500]
    rows = [
        {"prompt_id": prompt_id(user(text)), "prompt": user(text), "source": "world"}
        for text in texts
    ]
    write_parquet("data/prepared/search.parquet", rows, PROMPTS)
    given = {"screen": SCREEN, "samples_per_prompt": 4, "row": {"weights": [2.0, 1.0, 0.5]}}
    return run_of(resources, **{**given, **changes})


def test_a_screened_path_is_tested_by_one_draw(resources: Resources) -> None:
    """Costs weighed by the ratio of probabilities, on one policy's answers; verify recomputes the
    whole.
    """
    main(screened_run(resources))
    found = verify("reports/certificate/it/certificate.json")
    screen = read_record(Path("reports/certificate/it/screen.json"), screening.Screen)
    plan = screening.sequence(screen)
    assert (
        found.plan is not None
        and tuple(found.plan.weights) == plan.weights
        and found.returned == found.candidates[-1]
    )
    assert screen.knots[0].name == "safety_dpo/alone" and len(screen.knots) == 4
    assert plan.drawn and found.drawn == tuple(found.candidates[at] for at in plan.drawn)
    direct = found.tested[: plan.own]
    weighed = found.tested[plan.own :]
    assert all(test.ess is None for test in direct) and all(
        0 < (test.ess or 0) <= 1 for test in weighed
    )
    assert {test.name for test in weighed} >= set(found.drawn)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    assert rescore(found, Path("reports/certificate/it/certificate.json"), 1e-3) < 1e-3
    table = pd.read_parquet(
        f"reports/certificate/it/{list(found.candidates).index(weighed[0].name):02d}-answers.parquet"
    )
    weight = np.exp(table["logp"] - table["logp_drawn"])
    assert weight.max() <= len(found.drawn) + 1e-3  # it is one of those who drew
    value = 100.0 + weight * (table["cost"] - 100.0)
    assert weighed[0].checks[0].estimate == pytest.approx(
        value.groupby(table["prompt_id"]).mean().mean()
    )


def test_a_screen_that_was_edited_is_found(resources: Resources) -> None:
    main(screened_run(resources))
    path = Path("reports/certificate/it/certificate.json")
    screen = read_json(path.with_name("screen.json"))
    screen["knots"][1]["q"] = 1.9
    write_json(path.with_name("screen.json"), screen)
    with pytest.raises(DataError, match=r"its screen .* are not those certified: sha256 differs"):
        verify(path)
    content = read_json(path)
    content["screen"]["sha256"] = sha256(path.with_name("screen.json"))
    write_json(path, content)
    with pytest.raises(DataError, match=r"candidates follow from it|the screen gives"):
        verify(path)


def test_limits_with_a_range_are_tested_on_answers_of_the_candidates_own(
    resources: Resources,
) -> None:
    write_json("data/dual/dual.json", solved(prices=[{**FURTHER, "limit": 6.0}]))
    main(screened_run(resources))
    found = verify("reports/certificate/it/certificate.json")
    assert found.drawn == () and all(test.ess is None for test in found.tested)
    assert (
        found.samples_per_prompt == 4
    )  # no candidate is sure to pass by a bound that is not that of the plan


def test_an_interrupted_screen_is_not_drawn_twice(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = screened_run(resources)
    drawn = list[int]()
    real = candidates.roll_out

    def count(policy: Any, prompts: Any, scorers: Any, **options: Any) -> Any:
        drawn.append(len(prompts))
        if len(drawn) > 5:
            raise KeyboardInterrupt
        return real(policy, prompts, scorers, **options)

    monkeypatch.setattr(candidates, "roll_out", count)
    with pytest.raises(KeyboardInterrupt):
        main(run)
    first = drawn[:]
    drawn[:] = []
    main(run)
    assert len(first) == 6 and 6 not in drawn
