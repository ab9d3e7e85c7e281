"""The spool: records come back as they were, and rows with one identity are found together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dualign.core import schema
from dualign.core.schema import Message, user
from dualign.data.formats import Usable, Where
from dualign.data.spool import FLAGS, Spool


def record(line: int, prompt: str = "How?", **texts: str | bool | None) -> Usable:
    values = {"chosen": "so", "rejected": "not so"} | texts
    return Usable(Where("pku:a.json", "a.json", line), user(prompt), **values)  # type: ignore[arg-type]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with closing(Spool(tmp_path / "spool")) as opened:
        yield opened


def test_records_come_back_in_any_order_as_they_were(spool: Spool) -> None:
    system: list[Message] = [{"role": "system", "content": "Be brief."}, *user("Why\n“so”?")]
    rows = [
        record(1, chosen_is_safe=True, rejected_is_safe=None),
        Usable(Where("hh:b", "b", 7), system, "an answer", None),
        record(3, "x" * 10_000),
    ]
    for row in rows:
        spool.add(row)
    assert [spool[at] for at in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
    assert len(spool) == 3
    assert [spool.names[source] for source in spool.sources] == ["pku:a.json", "hh:b", "pku:a.json"]


def test_identities_are_those_of_the_schema(spool: Spool) -> None:
    turns = [*user("How?"), Message(role="assistant", content="so"), *user("And then?")]
    spool.add(record(1))
    spool.add(Usable(Where("s", "f", 2), turns, "so", "not so", False, True))
    assert [f"{key:016x}" for key in spool.prompts] == [
        schema.prompt_id(user("How?")),
        schema.prompt_id(turns),
    ]
    assert f"{spool.keys[1]:016x}" == schema.pair_id(turns, "so", "not so")
    assert spool.families[0] == spool.families[1] == spool.prompts[0]
    assert FLAGS[spool.flags[1]] == (False, True)


def test_a_pair_turned_round_and_another_spelling_are_of_one_group(spool: Spool) -> None:
    for row in (
        record(1),
        record(2, "Else?"),
        record(3, "HOW", chosen="not so", rejected="so"),
        record(4, "Else?", rejected="no"),
        record(5),
    ):
        spool.add(row)
    assert [group.tolist() for group in spool.groups()] == [[0, 2, 4], [1], [3]]
    assert spool.ahead[0] != spool.ahead[2] and spool.ahead[0] == spool.ahead[4]


def test_supervised_rows_are_alike_where_prompt_and_answer_are(spool: Spool) -> None:
    for answer in ("a", "b", "a"):
        spool.add(Usable(Where("s", "f", 1), user("How?"), answer, None))
    assert [group.tolist() for group in spool.groups()] == [[0, 2], [1]]


def test_an_empty_spool_has_no_groups(spool: Spool) -> None:
    assert list(spool.groups()) == [] and len(spool.prompts) == 0
