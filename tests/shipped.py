"""The shipped params files: whole, whether they are written so or as overlays of the default."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from dualign.params import yaml_text
from pipeline.dvc.overlay import whole

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "params").glob("*.yaml"))
SHIPPED = [ROOT / "params.yaml", *PRESETS]


@cache
def text_of(path: Path) -> str:
    """A shipped params file written out whole, once for all tests."""
    return whole(path)


def preset(name: str) -> dict[str, Any]:
    """The content of params/NAME.yaml written out whole."""
    content: dict[str, Any] = yaml_text.load(text_of(ROOT / f"params/{name}.yaml"), name)
    return content


def written(path: Path, folder: Path) -> Path:
    """A params file written out whole into a folder."""
    place = folder / path.name
    place.write_text(text_of(path))
    return place
