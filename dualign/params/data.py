"""Params of prepare: where rows come from, and how many prompts are kept for what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dualign.core.names import Inside, Place
from dualign.params.base import Count, Frozen, Positive, Seed, Share, StageParams

#: The keys of `dualign.data.formats.FORMATS`.
SourceFormat = Literal["world", "pku", "hh", "alpaca", "helpsteer2", "columns"]


class SourceSpec(Frozen):
    """Where rows come from.

    `format` names the reader, `path` a file (relative to `prepare.folder`) or a hub dataset id;
    `split` and `revision` belong to a hub dataset. `columns` maps our column names to the file's
    (format `columns` only). `limit` keeps the first rows only."""

    format: SourceFormat
    path: Inside | None = None
    split: Place = "train"
    revision: Place | None = None
    columns: dict[str, str] = {}
    limit: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> SourceSpec:
        if self.format == "world" and self.path is not None:
            raise ValueError(
                "the world is generated and takes no path; remove it, or choose another format"
            )
        if self.format != "world" and self.path is None:
            raise ValueError(
                f"format {self.format!r} needs a path: a file in prepare.folder, or a hub"
                " dataset id"
            )
        if self.format == "columns" and not self.columns:
            raise ValueError(
                "format 'columns' needs columns, e.g. {prompt: question, chosen: best, rejected:"
                " worst}"
            )
        return self


class WorldParams(Frozen):
    """The embedded data: rows of each kind, and the annotators' sharpness (1 = Bradley-Terry)."""

    sft_rows: Count
    helpful_pairs: Count
    safety_pairs: Count
    sharpness: Positive


class PrepareParams(StageParams):
    """Data sources and splits."""

    section = "prepare"
    shared = {"seed": "seed"}

    seed: Seed
    folder: Place
    sft: Annotated[list[SourceSpec], Field(min_length=1)]
    helpful: Annotated[list[SourceSpec], Field(min_length=1)]
    safety: Annotated[list[SourceSpec], Field(min_length=1)]
    world: WorldParams
    pool_prompts: Count
    search_prompts: Count
    certify_prompts: Count
    eval_prompts: Count
    heldout_share: Annotated[float, Field(gt=0, lt=0.5)]
    max_rejected_share: Share
    max_prompt_chars: Count
    max_response_chars: Count
