"""What tells the folders of policies and scorers apart, without loading anything of them."""

from __future__ import annotations

from pathlib import Path

#: The file by which a folder holds a mixture of policies, and that by which it holds a scorer.
MIXTURE = "mixture.json"
SCORER = "scorer.json"
#: Sub-folder of a published policy that holds its adapter.
ADAPTER = "adapter"


def is_policy(folder: str | Path) -> bool:
    """Whether a folder holds a policy: a model, an adapter or a mixture."""
    return any(
        (Path(folder) / name).is_file() for name in (MIXTURE, "config.json", "adapter_config.json")
    )


def adapter_in(policy: Path) -> Path:
    """The folder of a policy's adapter: `adapter/` of a published one, else its own."""
    inner = policy / ADAPTER
    return inner if inner.is_dir() else policy
