"""The stage prepare: what it refuses before any row is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dualign.core.errors import DataError, ParamsError
from dualign.params.data import PrepareParams
from dualign.params.loading import load, load_resources
from dualign.stage import Run
from stages import prepare

ROOT = Path(__file__).resolve().parents[2]


def test_a_row_that_does_not_fit_stops_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text()
    row = "  mocan: {start: lagrangian_dpo/bernoulli, reference: sft"
    assert row in text
    Path("params.yaml").write_text(text.replace(row, f"{row}, rule: merge"))
    with pytest.raises(ParamsError, match=r"^methods\.mocan\.rule: 'merge' does not go with mocan"):
        prepare.main(Run("prepare", None, load(PrepareParams), load_resources()))
    assert not Path("data").exists() and not Path("reports").exists()


def test_rejected_rows_are_kept_where_the_error_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a workspace, whose temporary folders are elsewhere and go with the stage."""
    monkeypatch.chdir(tmp_path)
    content = YAML(typ="safe").load(ROOT / "params.yaml")
    source = {
        "format": "columns",
        "path": "rows.jsonl",
        "columns": {n: n for n in ("prompt", "chosen", "rejected")},
    }
    content["prepare"]["helpful"] = [source]
    with Path("params.yaml").open("w") as file:
        YAML(typ="safe").dump(content, file)
    Path("dvc.yaml").touch()
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/rows.jsonl").write_text('{"prompt": "a", "chosen": "", "rejected": "b"}\n')
    with pytest.raises(DataError, match=r"see data/quarantine-failed\.jsonl, then mend the rows"):
        prepare.main(Run("prepare", None, load(PrepareParams), load_resources()))
    assert '"empty_answer"' in Path("data/quarantine-failed.jsonl").read_text()
