"""Ranks of LoRA that vLLM makes room for, known without loading anything."""

from __future__ import annotations

#: What its `--max-lora-rank` may be (its LoRAConfig); 16 unless it is told.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def room_for(rank: int) -> int:
    """The least of them that holds an adapter of a rank, the greatest where none does.

    >>> room_for(24)
    32
    """
    return next((each for each in RANKS if each >= rank), RANKS[-1])
