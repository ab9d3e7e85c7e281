"""dualign: constrained alignment of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualign.training.pairwise import PairwiseConfig, PairwiseTrainer

__all__ = ["PairwiseConfig", "PairwiseTrainer"]


def __getattr__(name: str) -> Any:
    """Load the trainer once it is asked for: `import dualign` alone loads neither torch nor TRL."""
    if name in __all__:
        from dualign.training import pairwise

        return getattr(pairwise, name)
    raise AttributeError(f"module 'dualign' has no attribute {name!r}")
