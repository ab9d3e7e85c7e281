"""Tables that trainers read."""

from __future__ import annotations

from datasets import Dataset

from dualign.training.columns import id_column, table_of


def test_a_table_holds_what_a_list_of_rows_does() -> None:
    ids = [list(range(start, start + start % 7)) for start in range(9000)]
    labels = [row[0] / 2 if row else -1.0 for row in ids]
    flags = [[1, -1]] * len(ids)

    ours = table_of({"ids": id_column(iter(ids)), "label": labels, "flags": flags})

    plain = Dataset.from_dict({"ids": ids, "label": labels, "flags": flags})
    assert ours.to_dict() == plain.to_dict()
    assert ours[8191] == plain[8191]
    assert ours.select([5, 8999, 3])["ids"][:] == [ids[5], ids[8999], ids[3]]


def test_an_id_takes_four_bytes() -> None:
    rows = [[7] * 100] * 10_000
    table = table_of({"ids": id_column(rows)})
    assert table.data.nbytes < 4.1 * 100 * len(rows)


def test_no_rows_are_a_table_too() -> None:
    assert table_of({"ids": id_column([])}).column_names == ["ids"]


def test_a_tables_fingerprint_is_its_own() -> None:
    first, second = (table_of({"ids": id_column([[1]])}) for _ in range(2))
    assert first._fingerprint != second._fingerprint
