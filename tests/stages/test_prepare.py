"""The stage prepare: what it refuses before any row is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualign.core.errors import ParamsError
from dualign.core.loading import load, load_resources
from dualign.core.params import PrepareParams
from dualign.core.stage import Run
from stages import prepare

ROOT = Path(__file__).resolve().parents[2]


def test_a_row_that_does_not_fit_stops_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text()
    row = "  mocan: {start: lagrangian_dpo/bernoulli, reference: sft"
    assert row in text
    Path("params.yaml").write_text(text.replace(row, f"{row}, rule: merge"))
    with pytest.raises(ParamsError, match=r"^methods\.mocan\.rule: 'merge' does not go with mocan"):
        prepare.main(Run("prepare", None, load(PrepareParams), load_resources()))
    assert not Path("data").exists() and not Path("reports").exists()
