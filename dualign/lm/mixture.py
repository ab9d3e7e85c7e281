"""A mixture of policies in one folder: `mixture.json` and a sub-folder for each component.

It draws a component for every *answer*, so pi(y | x) = sum_k w_k pi_k(y | x) over whole answers;
mixing the next-token distributions would be another policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dualign.core.artifacts import copy_folder, write_json
from dualign.core.errors import DataError, ModelError
from dualign.core.names import NAME, shown
from dualign.core.records import Record, as_row, read_record
from dualign.lm.folders import MIXTURE
from dualign.lm.models import load_policy
from dualign.params.base import Resources


class Recipe(Record):
    """mixture.json: the components' sub-folders, their weights, and the multipliers they are at."""

    weights: list[float]
    components: list[str]
    lambdas: list[float] | None = None


def components(folder: str | Path) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Weights and sub-folders of a mixture. Raises ModelError for a file not ours."""
    path = Path(folder) / MIXTURE
    try:
        recipe = read_record(path, Recipe)
    except DataError as error:
        raise ModelError(
            f"{path}: lists no weights and components; run the search that wrote it again"
        ) from error
    weights = tuple(recipe.weights)
    names = tuple(recipe.components)
    positive = min(weights, default=0.0) > 0
    if not positive or len(weights) != len(names) or not abs(sum(weights) - 1) <= 1e-6:
        raise ModelError(
            f"{path}: weights must be positive, sum to 1, and be one for each component"
        )
    for name in names:
        if not NAME.fullmatch(name):
            raise ModelError(
                f"{path}: component {shown(name)} is no folder beside it; run the search that wrote"
                " it again"
            )
    return weights, names


@dataclass(frozen=True)
class Mixture:
    """Weights (of sum 1) and folders of the components, loaded one at a time when needed."""

    weights: tuple[float, ...]
    folders: tuple[Path, ...]
    resources: Resources

    @classmethod
    def load(cls, folder: str | Path, resources: Resources) -> Mixture:
        """The mixture in a folder. Raises ModelError where its file and it do not agree."""
        weights, names = components(folder)
        return cls(weights, tuple(Path(folder) / name for name in names), resources)

    def component(self, k: int) -> torch.nn.Module:
        """The k-th policy, loaded."""
        return load_policy(self.folders[k], self.resources)

    def draw(self, count: int, seed: int) -> list[int]:
        """The component of each of `count` answers."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return torch.multinomial(weights, count, replacement=True, generator=generator).tolist()


Policy = torch.nn.Module | Mixture


def policy_at(folder: str | Path, resources: Resources) -> Policy:
    """The policy in a folder: a mixture where it holds `mixture.json`, else one model."""
    if (Path(folder) / MIXTURE).is_file():
        return Mixture.load(folder, resources)
    return load_policy(folder, resources)


def mixture_log_probability(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """log sum_k w_k exp(parts_k) [rows]; parts [components, rows] in nats, weights [components]."""
    return torch.logsumexp(parts + torch.tensor(weights, dtype=parts.dtype).log().unsqueeze(1), 0)


def write_mixture(policies: Sequence[str | Path], lams: Sequence[float], out: Path) -> None:
    """Copy policies to folder `out` as a mixture in equal parts; `lams` are their multipliers."""
    names = [f"component-{k}" for k in range(len(policies))]
    for name, policy in zip(names, policies, strict=True):
        copy_folder(Path(policy), out / name)
    weights = [1 / len(names)] * len(names)
    recipe = Recipe(weights=weights, components=names, lambdas=list(lams))
    write_json(out / MIXTURE, as_row(recipe))
