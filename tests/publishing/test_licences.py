"""Which licence a policy's data ask for."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from dualign.params.data import SourceSpec
from dualign.publishing.licences import (
    DATASETS,
    FORMATS,
    Licence,
    licence_of,
    licence_of_base,
    together,
)

WORLD = SourceSpec(format="world")
PKU = SourceSpec(format="pku", path="PKU-Alignment/PKU-SafeRLHF-30K")
HH = SourceSpec(format="hh", path="hh/train.jsonl.gz")
HUB = SourceSpec(format="hh", path="Anthropic/hh-rlhf")
LIKE_PKU = SourceSpec(format="pku", path="own/train.jsonl")
OWN = SourceSpec(format="columns", path="own.jsonl", columns={"prompt": "question"})
#: A folder in a data set, as `prepare` takes it.
INNER = SourceSpec(
    format="columns", path="PKU-Alignment/BeaverTails/round0", columns={"prompt": "prompt"}
)


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        (PKU, Licence("cc-by-nc-4.0", "PKU-Alignment/PKU-SafeRLHF-30K", named=True)),
        (HH, Licence("mit", "Anthropic/hh-rlhf", named=False)),
        (INNER, Licence("cc-by-nc-4.0", "PKU-Alignment/BeaverTails", named=True)),
        (WORLD, Licence("apache-2.0", "world", named=True)),
        (OWN, None),
    ],
)
def test_an_id_tells_before_the_format(source: SourceSpec, licence: Licence | None) -> None:
    assert licence_of(source) == licence


@pytest.mark.parametrize(
    ("sources", "base", "name"),
    [
        ([HH, PKU, OWN], None, "cc-by-nc-4.0"),
        ([HUB, HUB], None, "mit"),
        ([HH, HH], None, "other"),
        ([LIKE_PKU], None, "cc-by-nc-4.0"),
        ([HH, OWN], None, "other"),
        ([WORLD], None, "apache-2.0"),
        ([WORLD, HH], None, "other"),
        ([WORLD], "apache-2.0", "apache-2.0"),
        ([WORLD], "llama3.2", "other"),
        ([HH], "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ([PKU], "other", "cc-by-nc-4.0"),
    ],
)
def test_the_strictest_licence_counts(
    sources: list[SourceSpec], base: str | None, name: str
) -> None:
    """Many a private file has the format of hh: that gives nobody leave to copy it."""
    assert together(sources, base) == name


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: llama3.2\n---\n# A base\n", "llama3.2"),
        ("---\ntags: [a]\n---\n# A base\n", "other"),
        ("# A base\n", "other"),
        ("---\nlicense: [\n---\n", "other"),
        (None, "other"),
    ],
)
def test_a_base_in_a_folder_has_the_licence_of_its_card(
    card: str | None, licence: str, tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of_base("models/base/it", tmp_path) == licence
    assert licence_of_base("scratch", tmp_path) is None


def test_every_format_is_one_that_prepare_reads() -> None:
    formats = set(get_args(SourceSpec.model_fields["format"].annotation))
    assert FORMATS.keys() - formats <= {"helpsteer2"} and set(FORMATS.values()) <= DATASETS.keys()
