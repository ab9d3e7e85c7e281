"""Reward and cost models as served: calibrated scores of (prompt, answer), in params' units."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from pydantic import Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualign.core import ranks
from dualign.core.artifacts import listed, read_json, sha256, write_json
from dualign.core.errors import ModelError
from dualign.core.progress import Progress
from dualign.core.records import fault
from dualign.core.schema import Message
from dualign.lm.batches import by_length
from dualign.lm.folders import ADAPTER, SCORER
from dualign.lm.loading import context_of
from dualign.lm.models import adapter_base, merged, save
from dualign.lm.numerics import padded_rows
from dualign.lm.tokens import encode_conversations
from dualign.params.base import Frozen, Resources
from dualign.scoring.calibration import Calibration, Isotonic, Platt
from dualign.scoring.kinds import (
    KINDS,
    PLAIN,
    Loaded,
    Place,
    Reading,
    is_encoder,
    load_adapted,
    load_scorer,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One model, how it is read, and the steps from its raw output to its score.

    `unit` is the slope of P(chosen is better) in the score that its training aimed at, 0 where that
    is not known; `source` is what errors name."""

    loaded: Loaded
    reading: Reading = PLAIN
    steps: tuple[Calibration, ...] = ()
    unit: float = 1.0
    source: str = "the scorer"

    @property
    def longest(self) -> int:
        """The most tokens that the model reads."""
        context = context_of(self.loaded.model) or 1 << 20
        return min(self.loaded.tokenizer.model_max_length, context, 1 << 20)

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Sequence[Message]],
        answers: Sequence[str],
        batch_size: int,
        what: str,
        ended: Sequence[bool] | None,
    ) -> np.ndarray:
        """Scores in fp64, shape [rows]. Raises ModelError for one that is not finite."""
        kind = KINDS[self.reading.kind]
        rows = self._cut(kind.encode(self.loaded, self.reading, prompts, answers, ended))
        output = np.zeros(len(rows))
        pad = int(self.loaded.tokenizer.pad_token_id)
        device = self.loaded.model.device
        batches = list(by_length(range(len(rows)), list(map(len, rows)), batch_size))
        scored = []
        with Progress(what, len(rows)) as progress:
            for batch in ranks.share(batches):
                ids, mask, _ = padded_rows([()] * len(batch), [rows[i] for i in batch], pad)
                outputs = kind.outputs(self.loaded, self.reading, ids.to(device), mask.to(device))
                scored.append((batch, outputs.double().cpu().numpy()))
                progress.advance(len(batch), sum(len(rows[i]) for i in batch))
            for batch, scores in ranks.gathered(scored):
                output[batch] = scores
        for step in self.steps:
            output = np.asarray(step(output))
        self._check(output)
        return output

    def _cut(self, rows: list[list[int]]) -> list[list[int]]:
        """Rows beyond the context lose their beginning, but for an encoder's first token."""
        limit = self.longest
        kept = 1 if is_encoder(self.loaded.tokenizer) else 0
        long = sum(len(row) > limit for row in rows)
        if long:
            log.warning(
                "%d of %d conversations are longer than the %d tokens that %s reads; their"
                " beginning is cut off",
                long,
                len(rows),
                limit,
                self.source,
            )
        return [row if len(row) <= limit else row[:kept] + row[kept - limit :] for row in rows]

    def _check(self, output: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(output))
        if len(bad):
            raise ModelError(
                f"{self.source}: the score of row {bad[0] + 1} of {len(output)} is"
                f" {output[bad[0]]}; check the weights, or set resources.precision to fp32"
            )


class CalibrationCard(Frozen):
    """A calibration as a file holds it: a line, or a curve through (scores, costs)."""

    scale: float
    offset: float = 0.0
    scores: Sequence[float] | None = None
    costs: Sequence[float] | None = None

    def read(self) -> Calibration:
        """The calibration.

        >>> CalibrationCard(scale=2.0, offset=-1.0).read()
        Platt(scale=2.0, offset=-1.0)
        """
        if self.scores is None or self.costs is None:
            return Platt(self.scale, self.offset)
        return Isotonic(self.scale, tuple(self.scores), tuple(self.costs))


class MemberCard(Reading):
    """A member of a given scorer: its folder, how it is read, what its output goes through."""

    folder: str
    source: str
    unit: float
    steps: list[CalibrationCard]


class Card(CalibrationCard):
    """scorer.json: calibration; of given scorers members and the weight of their sd, of one in
    `adapter/` the hashes of its base's weights."""

    members: list[MemberCard] = Field(default=[])
    spread: float = 0.0
    base: dict[str, str] | None = None

    def write(self, path: Path) -> None:
        """Write what `read_card` reads."""
        write_json(path, self.model_dump(exclude_unset=True))


class Scorer:
    """Members whose scores are combined, and a calibration: usually one trained classifier.

    The score of several members is the calibration of their mean plus `spread` times their standard
    deviation."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, calibration: Calibration
    ) -> None:
        self.members: tuple[Member, ...] = (Member(Loaded(model, tokenizer)),)
        self.spread = 0.0
        self.calibration = calibration

    @classmethod
    def of(cls, members: Sequence[Member], calibration: Calibration, spread: float = 0.0) -> Scorer:
        """A scorer of any members."""
        first = members[0].loaded
        scorer = cls(first.model, first.tokenizer, calibration)
        scorer.members = tuple(members)
        scorer.spread = spread
        return scorer

    @classmethod
    def load(cls, folder: str | Path, resources: Resources) -> Scorer:
        """Load a folder that `save` wrote. Raises ModelError or DualignError naming the folder.

        A scorer that was trained as an adapter is one on its base, which it shares with policies,
        where that is here; elsewhere it has weights of its own."""
        card = read_card(Path(folder) / SCORER)
        if card.base is not None and weights_of(adapter_base(Path(folder) / ADAPTER)) == card.base:
            return cls.of(
                [Member(load_adapted(Path(folder), resources), source=str(folder))], card.read()
            )
        if not card.members:
            loaded = load_scorer(Place(str(folder)), PLAIN, resources)
            return cls.of([Member(loaded, source=str(folder))], card.read())
        members = [_loaded(Path(folder), member, resources) for member in card.members]
        return cls.of(members, card.read(), card.spread)

    @property
    def model(self) -> PreTrainedModel:
        """The model of the first member."""
        return self.members[0].loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the first member."""
        return self.members[0].loaded.tokenizer

    def save(self, folder: Path) -> None:
        """Write models, tokenizers and card; a lone classifier lies in the folder, an adapter
        beside the weights that it makes of its base."""
        first = self.members[0]
        if len(self.members) == 1 and first.reading == PLAIN and not first.steps:
            model = first.loaded.model
            card = Card(**asdict(self.calibration))
            if isinstance(model, PeftModel):
                save(model, first.loaded.tokenizer, folder / ADAPTER)
                base = weights_of(adapter_base(folder / ADAPTER))
                card = card.model_copy(update={"base": base})
                model = merged(copy.deepcopy(model))
            save(model, first.loaded.tokenizer, folder)
            card.write(folder / SCORER)
            return
        for i, member in enumerate(self.members):
            save(member.loaded.model, member.loaded.tokenizer, folder / str(i))
        cards = [_card_of(str(i), member) for i, member in enumerate(self.members)]
        card = Card(**asdict(self.calibration), spread=self.spread, members=cards)
        card.write(folder / SCORER)

    def calibrated(self, calibration: Calibration) -> Scorer:
        """The same members behind another calibration."""
        return Scorer.of(self.members, calibration, self.spread)

    def score(
        self,
        prompts: Sequence[Sequence[Message]],
        answers: Sequence[str],
        *,
        batch_size: int,
        what: str = "scores",
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Calibrated scores, fp64 [rows]; `ended` False marks answers cut at the limit."""
        prompts = list(prompts)
        answers = list(answers)
        table = np.stack(
            [member.score(prompts, answers, batch_size, what, ended) for member in self.members]
        )
        combined = table.mean(0) + self.spread * table.std(0) if self.spread else table.mean(0)
        return np.asarray(self.calibration(combined))


def read_card(path: Path) -> Card:
    """A scorer's card. Raises ModelError that names the file and the key that is wrong."""
    try:
        card = Card.model_validate(read_json(path))
    except ValidationError as error:
        why = fault(error, "the card")
        raise ModelError(f"{path}: {why}; run the stage that wrote it again") from error
    steps = [step for member in card.members for step in member.steps]
    curves = [each for each in (card, *steps) if each.scores]
    if any(len(curve.scores or ()) != len(curve.costs or ()) for curve in curves):
        raise ModelError(
            f"{path}: scores and costs differ in length; run the stage that wrote it again"
        )
    return card


def conversations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]], answers: Sequence[str]
) -> list[list[int]]:
    """Ids of templated conversations up to the turn's end, cut on the left to the limit."""
    limit = min(tokenizer.model_max_length, 1 << 20)
    rows = encode_conversations(tokenizer, list(prompts), list(answers))
    return [(prompt + answer)[-limit:] for prompt, answer in rows]


def weights_of(base: str) -> dict[str, str] | None:
    """The hashes of the files of weights in a folder, None where it has none."""
    files = listed(Path(base), "*.safetensors")
    return {file.name: sha256(file) for file in files} or None


def _loaded(folder: Path, card: MemberCard, resources: Resources) -> Member:
    """A member from its folder beside the card."""
    if card.kind not in KINDS:
        raise ModelError(
            f"{folder / SCORER}: {card.kind!r} is no kind of scorer; one of {', '.join(KINDS)}"
        )
    place = Place(str(folder / card.folder), url=card.url, root=card.source)
    reading = Reading(**card.model_dump(include=set(Reading.model_fields)))
    loaded = load_scorer(place, reading, resources)
    return Member(
        loaded, reading, tuple(step.read() for step in card.steps), card.unit, card.source
    )


def _card_of(folder: str, member: Member) -> MemberCard:
    """What `_loaded` reads."""
    return MemberCard(
        folder=folder,
        source=member.source,
        unit=member.unit,
        steps=[CalibrationCard(**asdict(step)) for step in member.steps],
        **member.reading.model_dump(),
    )
