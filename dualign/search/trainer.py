"""Policies of a search, trained and saved in the folders of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import listed, replacing, write_json
from dualign.core.records import LossRow, read_record
from dualign.lm.models import load_policy, save, with_lora
from dualign.params.base import TrainingParams
from dualign.search.task import SearchTask
from dualign.training.pairwise import Pair, PairLossConfig, train_pairwise
from dualign.training.run import Job, Metrics, Model

#: What the file of a training's losses, beside its policy, is named after it.
_LOSSES = "-losses.json"


class PolicyTrainer:
    """Trains the policies of a search; checkpoints lie beside them."""

    def __init__(self, task: SearchTask, tokenizer: PreTrainedTokenizerBase) -> None:
        self._task = task
        self._tokenizer = tokenizer

    def fit(
        self, begin: Path, pairs: Sequence[Pair], pair_loss: PairLossConfig, seed: int, out: Path
    ) -> None:
        """Train the policy in `begin` on pairs and save it in `out`."""
        policy = self.adaptable(begin, seed)
        job = self.job(self._task.params.training, seed, out)
        metrics = train_pairwise(policy, self._tokenizer, pairs, pair_loss, job)
        self.save(policy, out, metrics)

    def job(self, training: TrainingParams, seed: int, out: Path) -> Job:
        """The training that ends in `out`."""
        checkpoints = out.with_name(f"{out.name}-checkpoints")
        name = f"{out.parent.name} {out.name}"
        return Job(training, self._task.resources, checkpoints, seed, name)

    def adaptable(self, folder: Path, seed: int) -> Model:
        """The policy in a folder, with adapters if params ask for them; `seed` draws new ones."""
        lora = self._task.params.lora
        policy = load_policy(folder, self._task.resources, trained=lora.rank == 0)
        return with_lora(policy, lora, seed)

    def save(self, policy: Model, out: Path, metrics: Metrics) -> None:
        """Save the losses of a training, then its policy: where one is, nothing trains again."""
        write_json(out.with_name(f"{out.name}{_LOSSES}"), metrics["losses"])
        with replacing(out) as temporary:
            save(policy, self._tokenizer, temporary)


def losses(scratch: Path, folders: Sequence[Path]) -> list[LossRow]:
    """The loss of every training in `folders`, by its place in `scratch` (step-1/policy)."""
    rows: list[LossRow] = []
    for path in (path for folder in folders for path in listed(folder, f"*{_LOSSES}")):
        training = path.relative_to(scratch).as_posix().removesuffix(_LOSSES)
        own = read_record(path, list[LossRow])
        rows += [row.model_copy(update={"training": training}) for row in own]
    return rows
