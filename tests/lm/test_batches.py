"""Padded rows are those of torch's `pad_sequence`, on either side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dualign.lm.batches import padded, unpadded


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_padded_as_torch_pads_them(left: bool) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 99, length).tolist() for length in (3, 0, 7, 7, 1)]
    side = "left" if left else "right"
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    expected = pad_sequence(tensors, batch_first=True, padding_value=5, padding_side=side)
    ones = [torch.ones_like(row) for row in tensors]
    ids, mask = padded(rows, 5, left=left)
    assert torch.equal(ids, expected) and ids.dtype == expected.dtype
    assert torch.equal(mask, pad_sequence(ones, batch_first=True, padding_side=side))
    assert unpadded(ids, mask) == rows


def test_positions_are_a_multiple() -> None:
    ids, mask = padded([[1, 2], [3]], 0, multiple=4)
    assert ids.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert mask.sum(1).tolist() == [2, 1]


def test_rows_without_ids_have_no_positions() -> None:
    ids, mask = padded([[], []], 0)
    assert ids.shape == mask.shape == (2, 0) and ids.dtype == torch.long
