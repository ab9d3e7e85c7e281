"""Class labels are read by their names, in whatever form `datasets` wrote them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from dualign.data.files import locate
from dualign.data.labels import features_of, with_names
from dualign.params.data import SourceSpec

#: 0 is safe, and as a number it would be read as False.
TYPED = Features({"prompt": Value("string"), "safe": ClassLabel(names=["safe", "unsafe"])})
TABLE = Dataset.from_dict({"prompt": ["a", "b", "c"], "safe": [0, 1, -1]}, features=TYPED)
ROWS = [
    (1, {"prompt": "a", "safe": "safe"}),
    (2, {"prompt": "b", "safe": "unsafe"}),
    (3, {"prompt": "c", "safe": None}),
]


def as_folder(folder: Path) -> None:
    TABLE.save_to_disk(folder / "mine")


def as_parquet(folder: Path) -> None:
    TABLE.to_parquet(folder / "mine")
    (folder / "mine").rename(folder / "mine.parquet")


@pytest.mark.parametrize(
    ("write", "name"), [(as_folder, "mine"), (as_parquet, "mine.parquet")]
)  # fmt: skip
def test_labels_are_read_by_their_names(write: object, name: str, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path)
    spec = SourceSpec(format="columns", path=name, columns={"prompt": "prompt"})
    _, files = locate(spec, name, tmp_path, "prepare.sft")
    assert [row for _, raw in files for row in raw] == ROWS


def test_numbers_of_other_files_stay_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"safe": [0, 1]}), tmp_path / "plain.parquet")
    schema = pq.read_schema(tmp_path / "plain.parquet")
    assert features_of(schema) == {}
    assert features_of(schema.with_metadata({"huggingface": "no JSON"})) == {}
    assert features_of(schema.with_metadata({"huggingface": '{"info": null}'})) == {}
    assert list(with_names([(1, {"safe": 0})], {"safe": {"_type": "Value"}})) == [(1, {"safe": 0})]
