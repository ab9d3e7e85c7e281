"""What a search costs: the test that ends it, worked by hand, and every row on tiny models,
interrupted and gone on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from bench import search_cost, world
from bench.search_cost import (
    PARAMS,
    ROWS,
    Scored,
    Settings,
    first_policy,
    met,
    rows_of,
    run_row,
    seek,
    smaller,
)
from dualign.core.artifacts import read_json, write_json, write_parquet
from dualign.core.schema import (
    HELPFUL_PAIRS,
    PROMPTS,
    SAFETY_PAIRS,
    by_prompt,
    pair_id,
    prompt_id,
    user,
)
from dualign.data import world as embedded
from dualign.evaluation.effective_tilt import Tilt, effective_tilt
from dualign.evaluation.stats import Measurement
from dualign.lm.models import build_scratch, load_scorer_backbone, save, train_tokenizer
from dualign.math.dual.tilt import predict
from dualign.methods import plan
from dualign.params import loading
from dualign.params.loading import load, load_resources
from dualign.params.models import ScoreParams
from dualign.params.search import DualSearchParams
from dualign.params.training import LagrangianDpoParams
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer
from dualign.search.journal import Step
from dualign.search.loop import Ascent
from dualign.search.policy import Search, SearchContext
from dualign.search.screening import PoolCost, Screening
from dualign.stage import Run
from stages import score
from tests.shipped import preset
from tests.tiny import TINY
from tests.written import solved

SCRATCH = TINY.model_copy(update={"intermediate_size": 24})
TINY = {
    "pessimism.reward": 0.0,  # no pair is held out here
    "generation.max_new_tokens": 8,
    "score.samples_per_prompt": 4,
    "dual_search.prompts": 8,
    "dual_search.max_trainings": 2,
    "dual_search.refresh_prompts": 4,
    "dual_search.refresh_samples": 2,
    "resources.device": "cpu",
}
BY_NAME = {row.name: row for row in ROWS}

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(cost: float, se: float = 0.0) -> Measurement:
    return Measurement(cost, se, 0.0, 0.01, 0.2, 0.1, 0.5, 100)


# --- the test that ends a search ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "cost", "se", "expected"),
    [
        (1.0, -0.30, 0.0, True),
        (1.0, -0.34, 0.01, True),  # within the tolerance below
        (1.0, -0.36, 0.01, False),  # too safe
        (1.0, -0.28, 0.01, False),  # beyond the noise above, though within the tolerance
        (1.0, -0.28, 0.02, True),
        (1.0, -0.39, 0.10, True),
        (0.0, -0.90, 0.01, True),  # slack
        (0.0, -0.20, 0.01, False),
    ],
)
def test_a_policy_ends_the_search_within_the_limit_and_not_far_below(
    lam: float, cost: float, se: float, expected: bool
) -> None:
    assert met(lam, measured(cost, se), limit=-0.3, z=1.0) is expected


class Line:
    """Policies whose cost falls by `slope` for each unit of lambda from `cost`; a folder's name is
    its multiplier.
    """

    def __init__(self, cost: float, slope: float, first: float) -> None:
        self.cost = cost
        self.slope = slope
        self.lams = [first]

    def train(
        self, step: int, lam: float, warm: Step, prices: Sequence[float] | None = None
    ) -> str:
        self.lams.append(lam)
        folder = Path(warm.policy).parents[1] / f"step-{step}/policy"
        folder.mkdir(parents=True)
        return str(folder)

    def measure(self, step: int, policy: str) -> Measurement:
        return measured(self.cost - self.slope * self.lams[step], se=0.06)

    def tilt(self, policy: str) -> Tilt:
        """None to believe: no correction goes by it."""
        return effective_tilt(*np.zeros((4, 2, 2)))

    def screen(self, q: float) -> Screening:
        pytest.fail("no rule of these rows asks for it")

    def on_pool(self, policy: str) -> PoolCost:
        """Nothing that is believed."""
        return PoolCost(0.0, 1.0, 1.0)

    def ascend(self, step: int) -> Ascent:
        pytest.fail("no rule of these rows asks for it")

    def merge(self, step: int, q: float) -> str:
        pytest.fail("no rule of these rows asks for it")

    def blend(self, step: int, first: str, second: str, weight: float) -> str:
        pytest.fail("no policy of these rows goes beyond the limit")

    def mix(self, step: int, steps: Any) -> str:
        pytest.fail("no rule of these rows asks for it")


def sought(
    row: str, first: float, tmp_path: Path, *, slope: float, limit: float, **changes: Any
) -> list[float]:
    """The multipliers of a search on a line that starts at cost 0.5."""
    found = loading.check(preset(PARAMS.stem), PARAMS)["dual_search"]
    assert isinstance(found, DualSearchParams)
    params = found.model_copy(
        update={"max_trainings": 5, "limit": limit, "step_size": 1.0, "z": 1.0, **changes}
    )
    (tmp_path / "step-0/policy").mkdir(parents=True)
    line = Line(0.5, slope, first)
    chosen = plan(BY_NAME[row].method, found.methods[BY_NAME[row].method])
    search = Search(chosen, params, SearchContext(first, first))
    steps = seek(search, str(tmp_path / "step-0/policy"), line, tmp_path)
    assert [step.lam for step in steps] == line.lams
    return line.lams


def test_the_dual_gradient_trains_until_half_of_the_excess_is_gone_often_enough(
    tmp_path: Path,
) -> None:
    """Excess 0.8, 0.4, 0.2, 0.1, 0.05: four trainings after the first, and the last is within
    0.06.
    """
    lams = sought("c_dpo_1", 0.0, tmp_path, slope=0.5, limit=-0.3)
    assert lams == pytest.approx([0.0, 0.8, 1.2, 1.4, 1.5])


def test_a_search_that_starts_at_the_limit_ends_there(tmp_path: Path) -> None:
    assert sought("dualign", 1.6, tmp_path, slope=0.5, limit=-0.3) == [1.6]


def test_the_first_policy_counts_against_the_budget(tmp_path: Path) -> None:
    lams = sought("c_dpo_1", 0.0, tmp_path, slope=0.1, limit=-0.3, max_trainings=2)
    assert len(lams) == 3


# --- on models ------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for key, value in TINY.items():
        monkeypatch.setitem(search_cost.SMALLER, key, value)
    return Settings(seeds=(3,), limits=(0.0,), steps=2, pairs=4, work=str(tmp_path))


@pytest.fixture
def scored(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scored:
    """A seed's folder as the stages leave it: random tiny models, and their scores."""
    with (tmp_path / "search-cost.yaml").open("w") as handle:
        YAML().dump(smaller(settings), handle)
    lab = world.set_up(3, tmp_path / "search-cost.yaml", tmp_path)
    monkeypatch.chdir(lab.folder)
    resources = load_resources()
    tokenizer = train_tokenizer(
        [answer.text for answer in embedded.answers(embedded.prompts()[0])], 300
    )
    for seed, name in enumerate(("sft", *search_cost.SHARED, "lambda_path/strict")):
        save(build_scratch(SCRATCH, tokenizer, seed), tokenizer, Path("models") / name)
    for name in ("reward_model", "cost_model"):
        backbone = load_scorer_backbone("models/sft", tokenizer, resources)
        torch.nn.init.normal_(backbone.score.weight, std=0.5)
        Scorer(backbone, tokenizer, Platt(1.0, 0.0)).save(Path("models") / name)
    for name, places in (
        ("pool", slice(0, 800, 100)),
        ("search", slice(50, 850, 100)),
        ("eval", slice(25, 425, 100)),
    ):
        questions = [user(question) for question in embedded.prompts()[places]]
        rows = [
            {"prompt_id": prompt_id(prompt), "prompt": prompt, "source": "world"}
            for prompt in questions
        ]
        write_parquet(f"data/prepared/{name}.parquet", rows, PROMPTS)
    for name, label, schema in (
        ("helpful", "better", HELPFUL_PAIRS),
        ("safety", "safer", SAFETY_PAIRS),
    ):
        write_parquet(f"data/prepared/{name}_pairs.parquet", pairs(f"{label}_response_id"), schema)
    score.main(Run("score", None, load(ScoreParams), resources))
    for name in search_cost.STAGES:
        write_json(f"reports/provenance/{name.replace('@', '/')}.json", {"seconds": 2.0})
    return Scored(3, lab.folder)


def pairs(label: str) -> list[dict[str, Any]]:
    rows = []
    for row in embedded.pku_rows(12, seed=1, sharpness=1.0):
        prompt = user(row["prompt"])
        winner = row[label]
        chosen = row[f"response_{winner}"]
        rejected = row[f"response_{1 - winner}"]
        rows.append(
            {
                "pair_id": pair_id(prompt, chosen, rejected),
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "source": "world",
                "split": "train",
                "chosen_is_safe": None,
                "rejected_is_safe": None,
            }
        )
    return rows


def reachable(scored: Scored) -> float:
    """A limit that the pool's tilt meets at lambda 1."""
    reward = by_prompt(scored.pool, "reward")
    cost = by_prompt(scored.pool, "cost")
    return float(predict(reward, cost, 1.0, scored.params.beta, cost).mean())


def test_every_row_says_what_it_took_and_a_second_run_only_reads(
    scored: Scored, tmp_path: Path
) -> None:
    limit = reachable(scored)
    params = tmp_path / "search-cost.yaml"
    rows = [found for row in ROWS for found in rows_of(row, (limit,), params, 3)]
    assert [row["row"] for row in rows] == [row.name for row in ROWS]
    assert not list((scored.folder / "searches").iterdir())
    for row in rows:
        assert row["trainings"] == (0 if row["row"] == "path" else len(row["steps"])) <= 3
        assert (
            row["policies"] == len(row["steps"]) and row["gradient_steps"] == 2 * row["trainings"]
        )
        assert row["generated_tokens"] == sum(step["generated_tokens"] for step in row["steps"]) > 0
        assert row["met"] or row["policies"] == 3 or row["row"].startswith(("pd_dpo", "path"))
        assert row["before"] == {"pd": 1, "pa": 2}.get(row["row"][:2], 0) and row["seconds"] > 0
    firsts = {row["row"]: row["steps"][0]["lam"] for row in rows}
    assert firsts["dualign"] == firsts["caid"] == firsts["c_dpo_pool"] == pytest.approx(1.0)
    assert (
        firsts["path"] == 3.0
        and firsts["c_dpo_1"] == 0.0
        and firsts["pd_dpo_1"] == scored.params.lambda_min
    )
    assert (
        len(list((scored.folder / "first").iterdir())) == 4
    )  # two losses at the pool's multiplier, two without
    kept = scored.folder / f"rows/{limit:g}-caid.json"
    write_json(kept, {**read_json(kept), "trainings": 99})
    (scored.folder / f"rows/{limit:g}-dualign.json").unlink()
    assert rows_of(BY_NAME["caid"], (limit,), params, 3)[0]["trainings"] == 99
    again = rows_of(BY_NAME["dualign"], (limit,), params, 3)[0]
    seconds = {"seconds": 0.0}
    assert {**again, **seconds} == {**rows[0], **seconds}


def test_an_interrupted_search_starts_again_from_its_first_policy(scored: Scored) -> None:
    limit = reachable(scored)
    whole = run_row(scored, BY_NAME["c_dpo_1"], limit)
    left = scored.folder / f"searches/{limit:g}-c_dpo_1/step-1/policy"
    left.mkdir(parents=True)
    again = run_row(scored, BY_NAME["c_dpo_1"], limit)
    assert {**again, "seconds": 0.0} == {**whole, "seconds": 0.0}


def test_the_first_policy_is_that_of_the_stage(scored: Scored) -> None:
    """Same loss, learning rate, seed and pairs: the weights are those that lagrangian_dpo
    writes.
    """
    from stages import lagrangian_dpo

    spec = load(LagrangianDpoParams)
    anchored = spec.runs["anchored"].model_copy(update={"lam": 0.7, "refresh": None})
    params = spec.model_copy(update={"runs": {"anchored": anchored}})
    write_json("data/dual/dual.json", solved(lam=0.7))
    lagrangian_dpo.main(Run("lagrangian_dpo", "anchored", params, scored.resources))
    found, seconds = first_policy(scored, plan("dualign", scored.params.methods["dualign"]), 0.7)
    stage = scored.folder / "models/lagrangian_dpo/anchored/model.safetensors"
    assert (
        found / "step-0/policy/model.safetensors"
    ).read_bytes() == stage.read_bytes() and seconds > 0


@pytest.mark.bench
def test_the_command_writes_a_page_of_all_rows(
    scored: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = round(reachable(scored), 2)
    argv = [
        "--seeds",
        "3",
        "--limits",
        str(limit),
        "--steps",
        "2",
        "--pairs",
        "4",
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    assert search_cost.main(argv) == 0
    content = read_json(tmp_path / "search-cost.json")
    page = (tmp_path / "search-cost.md").read_text()
    assert capsys.readouterr().out == page and len(content["rows"]) == len(ROWS)
    shared = content["shared"][0]
    assert (
        shared["pool_tokens"] == scored.pool["length"].sum() and shared["seconds"]["score"] == 2.0
    )
    assert all(row.title in page for row in ROWS) and f"--limits {limit}" in content["command"]


# --- the page -------------------------------------------------------------------------------------


def made(row: str, trainings: int, **numbers: Any) -> dict[str, Any]:
    zeros = dict.fromkeys((*search_cost._MEANS,), 0.0)
    return {
        "row": row,
        "limit": -0.3,
        "met": True,
        "before": 0,
        "trainings": trainings,
        **zeros,
        **numbers,
    }


def test_the_table_counts_trainings_and_marks_searches_that_did_not_end() -> None:
    rows = [made(row.name, 1 if row.name == "dualign" else 4) for row in ROWS]
    rows += [made(row.name, 2, met=row.name != "caid", limit=-0.5) for row in ROWS]
    line = next(line for line in search_cost.table(rows) if line.startswith("| dualign from λ̂ |"))
    assert [cell.strip() for cell in line.strip("|").split("|")][1:5] == ["2/2", "1.5", "1.5", "2"]
    assert "| CAID from λ̂, η = 1 | 4 | 2+ |" in search_cost.by_limit(rows)


def test_the_best_step_size_is_that_of_the_fewest_trainings() -> None:
    rows = [made(row.name, 3 if row.step_size == 2.0 else 5) for row in ROWS]
    lines = search_cost.best_step_sizes(rows)
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        "C-DPO from 0",
        "PD-DPO from λ_min",
    ]
    assert all("η = 2, 3.0 trainings" in line for line in lines)
    assert not search_cost.best_step_sizes([found for found in rows if found["row"].endswith("_1")])


def test_all_trainings_take_the_same_number_of_steps(tmp_path: Path) -> None:
    with (tmp_path / "params.yaml").open("w") as handle:
        YAML().dump(smaller(Settings(steps=7)), handle)
    content = loading.read_yaml(tmp_path / "params.yaml")
    loading.check(content, tmp_path / "params.yaml")
    assert {content[name]["training"]["max_steps"] for name in search_cost.TRAININGS} == {7}
    before = preset(PARAMS.stem)
    assert before["sft"] == content["sft"] and before["reward_model"] == content["reward_model"]
