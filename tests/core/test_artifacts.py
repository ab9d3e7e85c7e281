"""Files are written whole or not at all, and a place that cannot be written is named."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from dualign.core.artifacts import (
    listed,
    read_json,
    read_optional_json,
    replacing,
    stream_parquet,
    write_json,
    write_parquet,
    write_rows,
)
from dualign.core.errors import DualignError


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("new, cut sh")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert not leftovers(tmp_path)


def test_an_exception_leaves_the_old_folder_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
        raise KeyboardInterrupt
    assert (path / "weights").read_text() == "old"
    assert not leftovers(tmp_path)


def test_a_folder_replaces_the_whole_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert not leftovers(path.parent)


def test_a_table_of_records_holds_its_columns_and_is_never_empty(tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    write_rows(
        path,
        [{"loss": 0.5, "step": 1, "accuracy": 0.9}, {"step": 2, "loss": float("nan")}],
        ("step", "loss"),
    )
    assert read_json(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    write_rows(path, [], ("step", "loss"))
    assert read_json(path) == [{"step": None, "loss": None}]
    with pytest.raises(KeyError):
        write_rows(path, [{"step": 1}], ("step", "loss"))


def test_a_streamed_table_is_that_of_all_rows_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = pa.schema([("a", pa.int32()), ("b", pa.string())])
    rows = [{"a": n, "b": None if n % 3 else f"text {n}", "else": 1} for n in range(20)]
    write_parquet(tmp_path / "whole.parquet", rows, columns)
    stream_parquet(tmp_path / "one.parquet", iter(rows), columns)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    monkeypatch.setattr("dualign.core.artifacts._BATCH", 3)
    monkeypatch.setattr("dualign.core.artifacts._BATCHES", 2)
    stream_parquet(tmp_path / "many.parquet", iter(rows), columns)
    assert pq.ParquetFile(tmp_path / "many.parquet").num_row_groups == 4
    assert pq.read_table(tmp_path / "many.parquet") == pq.read_table(tmp_path / "whole.parquet")


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("content")
        assert not path.exists() and temporary.exists()
    assert path.read_text() == "content"


@pytest.mark.parametrize("place", ["file/report.json", "file/deep/report.json"])
def test_a_place_below_a_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("I am no folder")
    with pytest.raises(DualignError) as caught:
        write_json(tmp_path / place, {})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / place}: cannot be written") and "\n" not in message


def test_a_kernel_folder_is_refused_in_one_line_that_names_it() -> None:
    with pytest.raises(DualignError, match=r"^/proc/dualign/report\.json: cannot be written"):
        write_json("/proc/dualign/report.json", {})


FULL = """
import logging, resource, signal, sys
import numpy, pyarrow, torch
from pathlib import Path
from safetensors.torch import save_file
from dualign.core.artifacts import replacing, write_parquet
from dualign.core.errors import DualignError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
many = {"a": torch.rand(100_000)}
schema = pyarrow.schema([("a", pyarrow.float64())])
rows = [{"a": float(value)} for value in numpy.random.default_rng(0).random(20_000)]
writes = {
    "text": lambda path: path.write_text("a" * 100_000),
    "safetensors": lambda path: save_file(many, path),
    "torch": lambda path: torch.save(many, path),
}
for name, write in writes.items():
    try:
        with replacing(name) as temporary:
            write(temporary)
    except DualignError as error:
        print(error)
try:
    write_parquet("parquet", rows, schema)
except DualignError as error:
    print(error)
"""


def test_a_disk_that_is_full_is_one_line_whoever_writes(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["text", "safetensors", "torch", "parquet"]
    assert all("cannot be written (" in line for line in lines)
    assert (
        sum("File too large" in line and "ulimit" in line for line in lines) == 3
    )  # torch does not say why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "umask, mode, folder", [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_weights_may_be_read_by_whoever_may_read_other_files(
    umask: int, mode: int, folder: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "model") as made:
            made.mkdir()
            save_file({"weight": torch.zeros(1)}, made / "model.safetensors")
            (made / "config.json").write_text("{}")
            (made / "run.sh").write_text("")
            (made / "run.sh").chmod(0o700)
    finally:
        os.umask(before)
    found = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()
    }
    assert found == {"model.safetensors": mode, "config.json": mode, "run.sh": 0o700}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == folder


def test_what_is_hidden_is_not_listed(tmp_path: Path) -> None:
    for name in ("b/a.json", "a.json", ".tmp-1/a.json", ".c.json", "b/.d/a.json"):
        write_json(tmp_path / name, {})
    assert listed(tmp_path, "**/*.json") == [tmp_path / "a.json", tmp_path / "b/a.json"]
    assert listed(tmp_path, "*/a.json") == [tmp_path / "b/a.json"]
    assert listed(tmp_path / "none", "*") == []


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DualignError, match="a: cannot be written"):
        write_json(tmp_path / "a", {})
    assert (tmp_path / "a").is_dir() and not leftovers(tmp_path)


def test_json_has_null_for_what_is_not_finite_and_plain_numbers_for_numpys(tmp_path: Path) -> None:
    content = {
        "nan": float("nan"),
        "rows": [np.float64("inf"), -np.inf, np.float32(0.5), np.int64(3), np.bool_(True)],
        "pair": (1, {"deep": np.nan}),
        7: "seven",
        "text": "naïve",
    }
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == {
        "nan": None,
        "rows": [None, None, 0.5, 3, True],
        "pair": [1, {"deep": None}],
        "7": "seven",
        "text": "naïve",
    }
    assert "NaN" not in (tmp_path / "a.json").read_text()


def test_the_same_content_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [2.5]})
    write_json(tmp_path / "b.json", {"a": [2.5], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [2.5], "b": 1}


def test_json_that_is_missing_or_cut_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(DualignError, match=r"none\.json: no such file; run the stage"):
        read_json(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"a": 1,\n "b": ')
    with pytest.raises(DualignError, match=r"cut\.json:2: not valid JSON"):
        read_json(tmp_path / "cut.json")
    wrong = {"JSON nested too deeply": "[" * 100_000, "no JSON of a stage": "9" * 5000}
    for why, text in wrong.items():
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(DualignError, match=rf"odd\.json: {why}"):
            read_json(tmp_path / "odd.json")


def test_json_that_a_stage_may_not_have_written_is_empty_and_one_cut_short_still_named(
    tmp_path: Path,
) -> None:
    assert read_optional_json(tmp_path / "none.json") == {}
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_optional_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(DualignError, match=r"cut\.json:1: not valid JSON"):
        read_optional_json(tmp_path / "cut.json")


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.int32())])
    path = tmp_path / "t.parquet"
    write_parquet(path, [{"x": 1}, {"x": 2}], schema)
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        write_parquet(path, [{"x": "no number"}], schema)
    assert pd.read_parquet(path)["x"].tolist() == [1, 2]
    before = path.read_bytes()
    write_parquet(path, pd.DataFrame({"x": [1, 2], "extra": [0, 0]}), schema)
    assert path.read_bytes() == before
    assert not leftovers(tmp_path)
