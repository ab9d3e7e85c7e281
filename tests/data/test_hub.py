"""Datasets that the library `datasets` saved: their rows, and nothing that lies beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk

from dualign.core.errors import DataError
from dualign.data.files import locate
from dualign.data.rows import BadRow, Row
from dualign.params.data import SourceSpec

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(3)]
OTHERS = [{"instruction": "q9", "output": "a9"}]


def rows_of(folder: Path, split: str = "train") -> list[tuple[int, Row | BadRow]]:
    spec = SourceSpec(format="alpaca", path=folder.name, split=split)
    _, files = locate(spec, folder.name, folder.parent, "prepare.sft")
    return [row for _, raw in files for row in raw]


def test_a_dataset_that_was_saved_alone_is_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "mine")
    assert rows_of(tmp_path / "mine") == list(enumerate(ROWS, start=1))


def test_of_a_saved_dict_the_split_is_read_and_no_file_of_the_cache(tmp_path: Path) -> None:
    """What `map` made of a loaded dataset lies in the folder of its rows."""
    folder = tmp_path / "mine"
    splits = {"train_prefs": Dataset.from_list(ROWS), "test": Dataset.from_list(OTHERS)}
    DatasetDict(splits).save_to_disk(folder)
    load_from_disk(folder)["train_prefs"].map(lambda row: {**row, "output": "edited"})
    assert len(list(folder.rglob("*.arrow"))) == 3
    assert rows_of(folder, "train_prefs") == list(enumerate(ROWS, start=1))
    assert rows_of(folder, "test") == list(enumerate(OTHERS, start=1))
    with pytest.raises(DataError, match=r"mine: has no split 'train'; .* has train_prefs, test$"):
        rows_of(folder)


def test_a_format_that_was_saved_along_hides_and_changes_nothing(tmp_path: Path) -> None:
    typed = Features({"instruction": Value("string"), "output": Value("string")})
    table = Dataset.from_list(ROWS, features=typed).with_format("numpy", columns=["output"])
    table.save_to_disk(tmp_path / "mine")
    assert rows_of(tmp_path / "mine") == list(enumerate(ROWS, start=1))


def test_a_saved_dataset_that_is_damaged_is_named(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "mine")
    for content in ("{}", "{", ""):
        (tmp_path / "mine/state.json").write_text(content)
        with pytest.raises(DataError, match="mine cannot be loaded as a dataset") as caught:
            rows_of(tmp_path / "mine")
        assert "\n" not in str(caught.value)
