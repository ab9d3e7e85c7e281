"""What stages do, by the shipped params, and what they take from elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualign.core.schema import HELPFUL_PAIRS, POOL, user
from dualign.evaluation.effective_tilt import TILT_SAMPLES as TILT
from dualign.lm.numerics import CHUNK
from dualign.methods import METHODS
from pipeline.cost import reckoning, work
from pipeline.cost.tables import Table, Tables, read_tables
from pipeline.cost.work import Reckoner
from pipeline.errors import PipelineError
from stages.score import _SUPPORT_PAIRS
from tests.shipped import preset

TABLE = Table(1000, 100, 10.0, 6.0, measured=True)
TABLES = Tables(TABLE, TABLE, TABLE, drawn=5.0)


@pytest.fixture
def params() -> dict[str, Any]:
    return copy.deepcopy(preset("default"))


def test_facts_that_are_kept_elsewhere() -> None:
    assert {name: method.rule for name, method in METHODS.items()} == work.RULES
    pools = {name for name, method in METHODS.items() if method.data == "pool"}
    pairs = {name for name, method in METHODS.items() if method.data == "scored_pairs"}
    assert (set(work._ON_POOL), set(work._ON_PAIRS)) == (pools, pairs)
    assert (work.TILT_SAMPLES, work.SUPPORT_PAIRS) == (TILT, _SUPPORT_PAIRS)
    assert reckoning._CHUNK == CHUNK


def test_a_training_of_pairs_and_its_reference_columns(params: dict[str, Any]) -> None:
    trained, read = Reckoner(params, TABLES).work("reward_dpo@helpful").pieces
    # 400 steps of 32 pairs, both answers with their prompt
    assert (trained.kind, trained.rows, trained.steps) == ("train", 2 * 400 * 32, 400)
    assert trained.tokens == 2 * 400 * 32 * 16
    assert (read.kind, read.rows) == ("read", 2 * 1000)  # fewer rows than steps would take
    params["reward_dpo"]["runs"]["helpful"]["margin"] = "safety_dpo/alone"
    assert Reckoner(params, TABLES).work("reward_dpo@helpful").pieces[1].rows == 3 * 2 * 1000
    params["training"]["max_steps"] = params["reward_dpo"]["training"]["max_steps"] = None
    assert Reckoner(params, TABLES).work("reward_dpo@helpful").pieces[0].steps == 32


def test_every_member_of_a_soup_trains_and_draws(params: dict[str, Any]) -> None:
    row = params["lagrangian_dpo"]["runs"]["anchored"]
    for soup in (1, 3):
        row["soup"] = soup
        pieces = Reckoner(params, TABLES).work("lagrangian_dpo@anchored").pieces
        kinds = [piece.kind for piece in pieces]
        assert (kinds.count("train"), kinds.count("draw")) == (2 * soup, soup)
    row["refresh"] = None
    once = Reckoner(params, TABLES).work("lagrangian_dpo@anchored").pieces
    assert [piece.kind for piece in once] == ["train"] * 3

    strict = {
        "lam": 2.0,
        "begin": "sft",
        "learning_rate": None,
        "soup": 2,
        "pair_loss": row["pair_loss"],
    }
    params["lambda_path"]["runs"] = {"strict": strict}
    assert len(Reckoner(params, TABLES).work("lambda_path@strict").pieces) == 2


def test_answers_are_drawn_read_and_scored(params: dict[str, Any]) -> None:
    drawn, own, reference, reward, cost, tilt = (
        Reckoner(params, TABLES).work("evaluate@dualign").pieces
    )
    assert (drawn.kind, drawn.rows, drawn.tokens) == ("draw", 600 * 3, 600 * 3 * 5)
    assert [piece.kind for piece in (own, reference, reward, cost)] == ["read"] * 2 + ["score"] * 2
    assert {piece.rows for piece in (own, reference, reward, cost)} == {1800}
    assert tilt.rows == 1200 * 4
    # the reference itself is read once
    assert len(Reckoner(params, TABLES).work("evaluate@sft").pieces) == 5


def test_a_search_takes_at_most_what_its_rule_allows(params: dict[str, Any]) -> None:
    reckoner = Reckoner(params, TABLES)

    def counts(method: str) -> tuple[int, int]:
        pieces = reckoner.work(f"dual_search@{method}").pieces
        kinds = [piece.kind for piece in pieces]
        return kinds.count("train"), kinds.count("draw")

    assert counts("mocan") == (0, 1)
    assert counts("c_dpo") == (1, 2)
    assert counts("dualign") == (0, 4)  # its row merges
    params["methods"]["dualign"]["rule"] = None
    assert counts("dualign") == (1, 1 + 1 + 3 + 1)  # Newton's; the last are of its training
    assert reckoner.work("dual_search@mocan").at_most


@pytest.mark.parametrize(
    ("rule", "cost", "samples"),
    [("newton", None, 24), ("merge", "model", 24), ("newton", "feedback", 4), ("grid", None, 4)],
)
def test_a_policy_is_read_on_all_of_the_pool_where_that_has_a_say(
    rule: str, cost: str | None, samples: int, params: dict[str, Any]
) -> None:
    params["methods"]["dualign"] |= {"rule": rule, "cost": cost}
    pieces = Reckoner(params, TABLES).work("dual_search@dualign").pieces
    read = [piece.rows for piece in pieces if piece.kind == "read"]
    assert 1200 * samples in read


def test_lora_and_micro_batches(params: dict[str, Any]) -> None:
    params["lora"]["rank"] = 8
    params["resources"]["micro_batch_size"] = 4
    trained = Reckoner(params, TABLES).work("safety_dpo@alone").pieces[0]
    assert (trained.rank, trained.batch) == (8, 8)


@pytest.mark.parametrize(("micro", "batch"), [(None, 8), (1, 1), (64, 8)])
def test_a_micro_batch_is_that_of_one_process(
    params: dict[str, Any], micro: int | None, batch: int
) -> None:
    """As `dualign.training.run.micro_batch` takes it: of 64 rows each of 8 processes has 8."""
    params["safety_dpo"]["training"] = {**params["safety_dpo"]["training"], "batch_size": 64}
    params["resources"] |= {"processes": 4, "nodes": 2, "micro_batch_size": micro}
    trained = Reckoner(params, TABLES).work("safety_dpo@alone").pieces[0]
    assert trained.batch == 2 * batch
    assert trained.rows == 2 * 64 * trained.steps


def test_adapters_on_one_base_hold_it_once(params: dict[str, Any]) -> None:
    def held(stage: str) -> int:
        return Reckoner(params, TABLES).work(stage).held

    stages = (
        "score",
        "dual_search@c_dpo",
        "evaluate@reward_dpo",
        "evaluate@dualign",
        "evaluate@sft",
    )
    assert [held(stage) for stage in stages] == [2, 3, 3, 3, 2]
    params["lora"]["rank"] = 8
    assert [held(stage) for stage in stages] == [0, 0, 0, 1, 0]  # what is aligned leaves whole
    params["cost_model"]["lora"] = {"rank": 0}
    assert held("score") == 1 and held("certify@dualign") == 2


def test_stages_without_a_model(params: dict[str, Any]) -> None:
    reckoner = Reckoner(params, TABLES)
    assert [reckoner.work(name) for name in ("prepare", "dual_init", "report")] == [None] * 3
    params["sft"]["train"] = False
    assert [piece.kind for piece in reckoner.work("sft").pieces] == ["read"]


def test_unknown_rows_are_told_in_one_line(params: dict[str, Any]) -> None:
    unknown = Tables(*[Table(None, None, 1.0, 1.0)] * 3, drawn=5.0)
    params["training"]["max_steps"] = params["reward_dpo"]["training"]["max_steps"] = None
    with pytest.raises(PipelineError, match=r"reward_dpo: .*run --stage prepare first.*max_steps"):
        Reckoner(params, unknown).work("reward_dpo@helpful")


# --- tables ---------------------------------------------------------------------------------------


def test_lengths_and_rows_by_params(params: dict[str, Any], tmp_path: Path) -> None:
    found = read_tables(params, tmp_path)
    assert found.helpful == Table(43200, 4800, 64.0, 64.0)  # 48000 less a tenth; 128 tokens
    assert found.drawn == 40 and not found.measured
    params["prepare"]["helpful"] = [
        {"format": "world", "limit": 1000},
        {"format": "world", "limit": 10**6},
        {"format": "hh", "path": "x.jsonl", "limit": 1000},
    ]
    assert read_tables(params, tmp_path).helpful == Table(45000, 5000, 64.0, 64.0)
    params["prepare"]["helpful"] = [{"format": "hh", "path": "x.jsonl"}]
    assert read_tables(params, tmp_path).helpful.rows is None


def test_a_tokenizer_that_is_none_is_told_in_one_line(
    params: dict[str, Any], tmp_path: Path
) -> None:
    """A clone without LFS holds its address in place of the file."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    params["sft"]["base"] = "base"
    with pytest.raises(PipelineError, match=r"base/tokenizer\.json: cannot be read.*complete\?$"):
        read_tables(params, tmp_path)


def test_lengths_and_rows_of_data(params: dict[str, Any], tmp_path: Path) -> None:
    def pair(split: str, prompt: int, answer: int) -> dict[str, Any]:
        row = dict.fromkeys(HELPFUL_PAIRS.names)
        told = {"chosen": "a" * answer, "rejected": "b" * answer, "split": split}
        return {**row, **told, "prompt": user("q" * prompt)}

    rows = [
        pair("train", 40, 16),
        pair("train", 80, 32),
        pair("train", 4000, 4),
        pair("heldout", 4, 4),
    ]
    place = tmp_path / "data/prepared"
    place.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, HELPFUL_PAIRS), place / "helpful_pairs.parquet")
    found = read_tables(params, tmp_path)
    # four characters a token, four tokens around a turn, one that ends an answer; one row is longer
    # than max_length
    assert found.helpful == Table(3, 1, (10 + 4 + 20 + 4) / 2, (5 + 9) / 2, measured=True)
    (tmp_path / "data/scored").mkdir()
    drawn = [{**dict.fromkeys(POOL.names), "length": length} for length in (3, 5)]
    pq.write_table(pa.Table.from_pylist(drawn, POOL), tmp_path / "data/scored/pool.parquet")
    assert read_tables(params, tmp_path).drawn == 4
    (tmp_path / "data/scored/pool.parquet").write_text("none")
    with pytest.raises(PipelineError, match=r"pool\.parquet: cannot be read"):
        read_tables(params, tmp_path)
