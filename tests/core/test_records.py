"""Files between stages that have the right syntax and the wrong shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dualign.core import records
from dualign.core.artifacts import read_optional_json, write_json
from dualign.core.errors import DataError
from dualign.core.records import (
    TRAINED,
    Certified,
    Evaluated,
    NotEvaluated,
    Record,
    SearchResult,
    SolvedDual,
    as_row,
    read_evaluated,
    read_optional_record,
    read_record,
    read_trained,
    solved_multiplier,
)
from tests.written import helpful, lagrangian, safety, searched, solved

RECORDS = {
    name: kind
    for name, kind in vars(records).items()
    if isinstance(kind, type) and issubclass(kind, Record) and kind.model_fields
}
WHOLE: dict[str, Any] = {
    "dual": (SolvedDual, solved(prices=[{"name": "short"}])),
    "search": (SearchResult, searched({})),
}


@pytest.mark.parametrize("kind", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("content", ["{}", "[]", "null", "3", '"text"'])
def test_another_shape_is_refused_with_file_and_key(
    tmp_path: Path, kind: Any, content: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(DataError) as told:
        read_record(path, kind)
    said = str(told.value)
    assert (
        said.startswith(f"{path}: ")
        and said.count("\n") == 0
        and "run the stage that wrote it again" in said
    )
    if content == "{}":
        assert said.split(": ")[1] in required(kind)


def required(kind: type[Record]) -> list[str]:
    """The keys that a record must have."""
    return [name for name, field in kind.model_fields.items() if field.is_required()]


@pytest.mark.parametrize("key", ["feasible", "history", "naive", "slater_radius"])
def test_what_only_some_searches_write_may_be_missing_but_not_wrong(
    tmp_path: Path, key: str
) -> None:
    path = tmp_path / "file.json"
    assert key not in required(SearchResult)
    write_json(path, {**searched({}), key: {"odd": []}})
    with pytest.raises(DataError, match=f"file.json: {key}"):
        read_record(path, SearchResult)


@pytest.mark.parametrize("name", WHOLE)
def test_every_key_must_be_there_and_of_its_type(tmp_path: Path, name: str) -> None:
    kind, whole = WHOLE[name]
    path = tmp_path / "file.json"
    write_json(path, whole)
    assert as_row(read_record(path, kind)) == json.loads(path.read_text()), "nothing is lost"
    for key in required(kind):
        for broken in ({k: v for k, v in whole.items() if k != key}, {**whole, key: {"odd": []}}):
            write_json(path, broken)
            with pytest.raises(DataError, match=f"file.json: {key}"):
                read_record(path, kind)


def test_a_row_inside_a_file_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "dual.json", solved() | {"prices": [{"name": "short"}]})
    with pytest.raises(DataError, match=r"dual.json: prices\.0\.quantity: field required"):
        read_record(tmp_path / "dual.json", SolvedDual)


def test_a_policy_has_the_metrics_of_its_stage(tmp_path: Path) -> None:
    written = {
        "sft": {"heldout_loss": None, "parameters": 8},
        "reward_dpo/a": helpful(),
        "safety_dpo/a": safety(),
        "safety_path/a": safety(),
        "lagrangian_dpo/a": lagrangian(),
        "lambda_path/a": lagrangian(),
    }
    assert {folder.partition("/")[0] for folder in written} == set(TRAINED)
    for folder, content in written.items():
        write_json(tmp_path / f"{folder}.json", content)
        assert as_row(read_trained(tmp_path, folder)) == content
    write_json(tmp_path / "safety_dpo/a.json", helpful())
    with pytest.raises(DataError, match=r"safety_dpo/a.json: lam: field required"):
        read_trained(tmp_path, "safety_dpo/a")


def test_files_that_may_be_missing(tmp_path: Path) -> None:
    assert read_optional_record(tmp_path / "dual.json", SolvedDual) is None
    assert read_evaluated(tmp_path, "sft") is None
    write_json(tmp_path / "evaluate/sft.json", {"policy": "sft", "absent": True})
    assert read_evaluated(tmp_path, "sft") == NotEvaluated(policy="sft", absent=True)
    for content in ([], {}):
        write_json(tmp_path / "evaluate/sft.json", content)
        with pytest.raises(DataError, match=r"evaluate/sft.json"):
            read_evaluated(tmp_path, "sft")
    write_json(tmp_path / "odd.json", [])
    with pytest.raises(DataError, match=r"odd.json: not a JSON object"):
        read_optional_json(tmp_path / "odd.json")
    assert required(Evaluated) and required(Certified)


def test_the_named_multiplier() -> None:
    known = SolvedDual(**solved(lam_margin=1.5))
    assert solved_multiplier(known, "dual") == 0.8 and solved_multiplier(known, "margin") == 1.5


def test_records_are_frozen() -> None:
    known = SolvedDual(**solved())
    with pytest.raises(ValidationError, match="frozen"):
        known.lam = 2.0  # type: ignore[misc]
