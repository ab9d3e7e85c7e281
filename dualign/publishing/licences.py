"""What may be done with data and bases: licences of the hub's preference data, as their cards say.

A policy trained on rows of a non-commercial licence is no commercial one. Local files have no card:
of these the format says whose rows they look like, and the card of the policy asks to check. Other
rows may have the same format, so its head takes no permission from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from dualign.params.data import SourceSpec

NON_COMMERCIAL = "cc-by-nc-4.0"
#: What the hub calls a licence that it has no name for.
UNKNOWN = "other"


@dataclass(frozen=True)
class Licence:
    """A licence by the hub's name, and the data set whose card says so; `named` where the source
    names that data set, and not its format alone."""

    name: str
    dataset: str
    named: bool


#: By the hub id of the data set, as its card says.
DATASETS: dict[str, str] = {
    "PKU-Alignment/PKU-SafeRLHF": NON_COMMERCIAL,
    "PKU-Alignment/PKU-SafeRLHF-30K": NON_COMMERCIAL,
    "PKU-Alignment/PKU-SafeRLHF-10K": NON_COMMERCIAL,
    "PKU-Alignment/BeaverTails": NON_COMMERCIAL,
    "Anthropic/hh-rlhf": "mit",
    "tatsu-lab/alpaca": NON_COMMERCIAL,
    "nvidia/HelpSteer2": "cc-by-4.0",
}
#: The embedded world, which dualign generates and gives away as itself.
OWN = "apache-2.0"
#: Whose rows a format is made for.
FORMATS: dict[str, str] = {
    "pku": "PKU-Alignment/PKU-SafeRLHF",
    "hh": "Anthropic/hh-rlhf",
    "alpaca": "tatsu-lab/alpaca",
    "helpsteer2": "nvidia/HelpSteer2",
}


def licence_of(source: SourceSpec) -> Licence | None:
    """The licence of a source's rows; None where neither its id nor its format tells.

    >>> licence_of(SourceSpec(format="pku", path="PKU-Alignment/PKU-SafeRLHF-30K")).name
    'cc-by-nc-4.0'
    """
    if source.format == "world":
        return Licence(OWN, "world", named=True)
    named = "/".join((source.path or "").split("/")[:2])  # an id may go on with a folder in it
    dataset = named if named in DATASETS else FORMATS.get(source.format)
    return Licence(DATASETS[dataset], dataset, dataset == named) if dataset else None


def licence_of_base(base: str, folder: Path) -> str | None:
    """The licence of a base, by the hub's name: of one in a folder that of its README.md, `other`
    where that says none, or for a hub id; None for a model built from scratch.
    """
    if base == "scratch":
        return None
    card = folder / "README.md"
    try:
        found = ModelCard.load(card).data.license if card.is_file() else None
    except Exception:  # YAML, or a file of another kind: not a card of the hub's form
        found = None
    return found if isinstance(found, str) else UNKNOWN


def together(sources: Iterable[SourceSpec], base: str | None) -> str:
    """The licence that a model card names for a policy trained on all of these rows from a base
    under licence `base`: non-commercial as soon as one is or looks so, `other` where several differ
    or one is unknown.

    >>> together([SourceSpec(format="world")], None)
    'apache-2.0'
    """
    names = {_in_the_head(licence_of(source)) for source in sources}
    names.update([base] if base else [])
    if NON_COMMERCIAL in names:
        return NON_COMMERCIAL
    return names.pop() if len(names) == 1 else UNKNOWN


def _in_the_head(found: Licence | None) -> str:
    """What rows of a licence allow for sure."""
    if found is None or not (found.named or found.name == NON_COMMERCIAL):
        return UNKNOWN
    return found.name
