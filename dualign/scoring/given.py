"""Scorers that exist already, read as params say (docs/scorers.md)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from dualign.core.errors import ModelError
from dualign.lm.folders import SCORER
from dualign.params.base import Resources
from dualign.params.models import GivenScorer
from dualign.scoring.calibration import Platt
from dualign.scoring.kinds import KINDS, PLAIN, Place, Reading, load_scorer
from dualign.scoring.scorers import Member, Scorer

log = logging.getLogger(__name__)

Meaning = Literal["harmful", "helpful"]


def load_given(
    specs: Sequence[GivenScorer], meaning: Meaning, spread: float, resources: Resources
) -> Scorer:
    """The given scorers as one, not calibrated yet, higher being `meaning`.

    Both a reward and a cost are pessimistic: disagreement lowers the mean of rewards and raises
    that of costs. Raises ModelError that names the scorer."""
    members = [_member(spec, meaning, resources) for spec in specs]
    return Scorer.of(members, Platt(), spread if meaning == "harmful" else -spread)


def _member(spec: GivenScorer, meaning: Meaning, resources: Resources) -> Member:
    own = spec.url is None and (Path(spec.path) / SCORER).is_file()
    member = _calibrated(spec, resources) if own else _foreign(spec, resources)
    log.info("%s: given, kind %s, higher is %s", spec.path, spec.kind, spec.higher_is)
    if spec.higher_is == meaning:
        return member
    return replace(member, steps=(*member.steps, Platt(-1.0, 0.0)))


def _foreign(spec: GivenScorer, resources: Resources) -> Member:
    """A scorer of another maker, whose scale is not known."""
    place = Place(spec.path, spec.revision, spec.template, spec.url, root=spec.path)
    reading = Reading(**spec.model_dump(include=set(Reading.model_fields)))
    loaded = load_scorer(place, reading, resources)
    if KINDS[spec.kind].becomes_plain:
        reading = PLAIN
    return Member(loaded, reading, loaded.steps, 0.0, spec.path)


def _calibrated(spec: GivenScorer, resources: Resources) -> Member:
    """A scorer that dualign wrote: what it served is its raw score here."""
    scorer = Scorer.load(spec.path, resources)
    if spec.kind != "classifier" or spec.template is not None:
        raise ModelError(
            f"{spec.path}: was written by dualign; give it as kind classifier, without a template"
        )
    if len(scorer.members) > 1:
        raise ModelError(
            f"{spec.path}: holds several scorers; list the folders of its members instead"
        )
    (member,) = scorer.members
    return replace(
        member,
        steps=(*member.steps, scorer.calibration),
        unit=member.unit / scorer.calibration.scale,
        source=spec.path,
    )
