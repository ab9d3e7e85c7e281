"""Which licence a policy's data ask for."""

from __future__ import annotations

from typing import get_args

import pytest

from dualign.params.data import SourceSpec
from dualign.publishing.licences import DATASETS, FORMATS, Licence, licence_of, together

WORLD = SourceSpec(format="world")
PKU = SourceSpec(format="pku", path="PKU-Alignment/PKU-SafeRLHF-30K")
HH = SourceSpec(format="hh", path="hh/train.jsonl.gz")
OWN = SourceSpec(format="columns", path="own.jsonl", columns={"prompt": "question"})
#: A folder in a data set, as `prepare` takes it.
INNER = SourceSpec(
    format="columns", path="PKU-Alignment/BeaverTails/round0", columns={"prompt": "prompt"}
)


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        (PKU, Licence("cc-by-nc-4.0", "PKU-Alignment/PKU-SafeRLHF-30K")),
        (HH, Licence("mit", "Anthropic/hh-rlhf")),
        (INNER, Licence("cc-by-nc-4.0", "PKU-Alignment/BeaverTails")),
        (WORLD, Licence("apache-2.0", "world")),
        (OWN, None),
    ],
)
def test_an_id_tells_before_the_format(source: SourceSpec, licence: Licence | None) -> None:
    assert licence_of(source) == licence


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        ([HH, PKU, OWN], "cc-by-nc-4.0"),
        ([HH, HH], "mit"),
        ([HH, OWN], "other"),
        ([WORLD], "apache-2.0"),
        ([WORLD, HH], "other"),
    ],
)
def test_the_strictest_licence_counts(sources: list[SourceSpec], name: str) -> None:
    assert together(sources) == name


def test_every_format_is_one_that_prepare_reads() -> None:
    formats = set(get_args(SourceSpec.model_fields["format"].annotation))
    assert FORMATS.keys() - formats <= {"helpsteer2"} and set(FORMATS.values()) <= DATASETS.keys()
