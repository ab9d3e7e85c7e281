"""Files in one text."""

from __future__ import annotations

import base64
import zlib

import pytest

from pipeline.errors import PipelineError
from pipeline.prefect.parcel import packed, unpacked

FILES = {"data/labels/labelled-1.jsonl": '{"x": "ü 漢字"}\n', "reports/seeds/8.json": "{}"}


def test_files_come_out_as_they_went_in() -> None:
    parcel = packed(FILES)
    assert parcel.isascii() and parcel.isprintable()
    assert unpacked(parcel) == FILES
    assert packed({}) == "" and unpacked("") == {}


def test_what_repeats_itself_takes_little() -> None:
    row = '{"reward": {"mean": 0.123, "low": 0.1}, "cost": {"mean": -0.8, "low": -0.9}}\n'
    assert len(packed({"a.json": row * 1000})) < len(row) * 1000 / 20


@pytest.mark.parametrize(
    "text",
    ["{}", "not base64!", base64.b64encode(b"not compressed").decode(),
     base64.b64encode(zlib.compress(b"no json")).decode()],
)  # fmt: skip
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(PipelineError, match="files: not what a coordinator packs"):
        unpacked(text)
