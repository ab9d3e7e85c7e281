"""Every training, sampling and scoring on tiny weights, in one process and in several.

    python -m tests.training.ranked PROCESSES,DISTRIBUTED,DEVICE,PRECISION,PARTS,FOLDER,KIND,... ...

PARTS is `whole`, or `resumed` for a training that then goes on from a checkpoint, too. All are
copies of one process, since to import takes longer than to train; the launcher, which starts each
anew, has its own tests."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.ports import free_port
from dualign import launch
from dualign.core.artifacts import write_json
from dualign.core.ranks import by_one, leave
from dualign.core.schema import user
from dualign.data import world
from dualign.lm.models import build_scratch, load_scorer_backbone, save, train_tokenizer, with_lora
from dualign.lm.numerics import in_precision
from dualign.lm.sampling import log_probabilities, sample
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.base import LoraParams, Resources
from dualign.scoring.calibration import Platt
from dualign.scoring.scorers import Scorer, conversations
from dualign.training.checkpoints import last_checkpoint
from dualign.training.pairs import with_mismatched, with_reference
from dualign.training.pairwise import Pair, PairLossConfig, train_pairwise
from dualign.training.policy_gradient import PolicyGradient, train_policy_gradient
from dualign.training.run import Job, Metrics, Model
from dualign.training.scorer import ScoredPair, train_scorer
from dualign.training.supervised import train_sft
from tests.tiny import WIDER, on_cpu, short_training

SCRATCH = WIDER.model_copy(update={"layers": 2})
LORA = LoraParams(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", quantise=None)
#: Seven steps of four rows: an epoch of 18 or 19 rows is five, of which the last has two or three.
TRAINING = short_training(schedule="linear", weight_decay=0.01, max_length=120, max_steps=7)
QUESTIONS = world.prompts()[:2]
ANSWERS = [answer.text for answer in world.answers(QUESTIONS[0])][:38]
TOKENIZER = train_tokenizer([*ANSWERS, *QUESTIONS], 300)
PROMPTS = encode_prompts(TOKENIZER, [user(question) for question in QUESTIONS])

#: A training, and the same where it goes on from a checkpoint, and where it had ended.
PARTS = {"whole": ("whole",), "resumed": ("whole", "resumed", "ended")}

LOSSES = {
    "dpo": PairLossConfig(0.5, 0.5),
    "safety_dpo": PairLossConfig(2.0, 0.5, loss_type="dpo", clip=3.0),
    "kto": PairLossConfig(0.7, 0.7, loss_type="kto"),
    "lagrangian": PairLossConfig(0.8, 1.7, anchor=0.3, nll=0.02),
    "bernoulli": PairLossConfig(0.8, 1.7, labels="bernoulli"),
    "adapter": PairLossConfig(0.5, 0.5),
    "muon": PairLossConfig(0.8, 1.7, anchor=0.3, nll=0.02),
}

GRADIENT = PolicyGradient(
    beta=0.5,
    limit=-0.2,
    samples=4,
    max_new_tokens=5,
    lambda_init=1.5,
    lambda_rate=0.02,
    lambda_min=0.1,
    lambda_max=20.0,
    window=12,
)


def resources(processes: int, distributed: str, device: str, precision: str) -> Resources:
    """Shards as a 7B on eight GPUs has them (docs/cluster.md): a row in a forward pass, and
    activations checkpointed."""
    sharded = distributed == "fsdp2"
    return on_cpu(
        device=device,
        precision=precision,
        processes=processes,
        distributed=distributed,
        micro_batch_size=1 if sharded else None,
        gradient_checkpointing=sharded,
        sampling_batch_size=4,
        checkpoint_steps=4,
        log_steps=1,
        threads=1,
    )


def policy(how: Resources, seed: int = 0) -> Model:
    return in_precision(build_scratch(SCRATCH, TOKENIZER, seed), how, trained=True)


def classifier(folder: Path, how: Resources) -> Model:
    with by_one() as mine:
        if mine:
            save(policy(how, 7), TOKENIZER, folder)
    model = load_scorer_backbone(str(folder), TOKENIZER, how)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model


def pairs(how: Resources, count: int = 19) -> list[Pair]:
    """Pairs with soft labels, weights, anchors on some, and answers to another prompt."""
    ids = encode_answers(TOKENIZER, ANSWERS)
    rows = [
        Pair(
            PROMPTS[i % 2],
            ids[i],
            ids[count + i],
            math.nan,
            math.nan,
            label=0.05 + 0.9 * i / count,
            anchors=(0.1 * i - 1, math.nan if i % 3 else 1 - 0.1 * i),
            weights=(0.1 * i, 2.0) if i % 3 else None,
            desirable=(i % 4 != 0, i % 5 == 0),
        )
        for i in range(count)
    ]
    return with_reference(with_mismatched(rows), policy(how, 1), TOKENIZER, 16)


def scored_pairs() -> list[ScoredPair]:
    ids = conversations(TOKENIZER, [user(QUESTIONS[0])] * len(ANSWERS), ANSWERS)
    flags = [(None, None), (True, None), (True, False), (False, None)]
    return [ScoredPair(ids[i], ids[19 + i], flags[i % 4]) for i in range(19)]


def supervised_rows() -> list[tuple[list[int], list[int]]]:
    answers = encode_answers(TOKENIZER, ANSWERS)
    return [(PROMPTS[i % 2], answers[i]) for i in range(18)]


def trained(kind: str, job: Job, folder: Path) -> tuple[Model, Metrics]:
    """A fresh model after its training, or the rest of it."""
    if kind in ("reward", "cost"):
        model = classifier(folder / "base", job.resources)
        weights = {"sign_weight": 0.7, "regularisation": 0.01} if kind == "cost" else {}
        return model, train_scorer(model, TOKENIZER, scored_pairs(), job, **weights)
    model = policy(job.resources)
    if kind == "sft":
        rows = supervised_rows()
        return model, train_sft(model, TOKENIZER, rows, rows[:7], job)
    model = with_lora(model, LORA, 3) if kind.endswith("adapter") else model
    if kind.startswith("gradient"):
        return model, ascended(model, job, folder)
    return model, train_pairwise(model, TOKENIZER, pairs(job.resources), LOSSES[kind], job)


def ascended(model: Model, job: Job, folder: Path) -> Metrics:
    """After policy gradients on four answers each to two prompts a step, drawn four at a time."""
    raw = classifier(folder / "base", job.resources), classifier(folder / "base", job.resources)
    reward, cost = (
        Scorer(each, TOKENIZER, Platt(scale, 0.0))
        for each, scale in zip(raw, (1.0, -2.0), strict=True)
    )
    prompts = [user(question) for question in QUESTIONS]
    how = job.training.model_copy(update={"batch_size": 8})
    return train_policy_gradient(
        model, TOKENIZER, prompts, reward, cost, GRADIENT, replace(job, training=how)
    )


def training(kind: str, how: Resources, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """The course of a training and what came of it, for each of its parts."""
    optimiser = "muon" if kind == "muon" else "adamw"
    settings = TRAINING.model_copy(update={"optimiser": optimiser})
    job = Job(settings, how, folder / kind, seed=3)
    found = {}
    for name in parts:
        model, metrics = trained(kind, job, folder)
        found[name] = {**metrics, "weights": summed(model)}
        last = last_checkpoint(job.scratch)
        with by_one() as mine:
            if mine and name == "whole" and last is not None:
                shutil.rmtree(last)
    shards = list(job.scratch.rglob("*.distcp"))
    return {**found, "sharded": bool(shards)}


def summed(model: Model) -> dict[str, list[float]]:
    """Sum and norm of every weight."""
    return {
        name: [float(weight.double().sum()), float(weight.double().norm())]
        for name, weight in model.state_dict().items()
    }


def drawn(how: Resources, folder: Path) -> dict[str, Any]:
    """Answers in batches of four, their log-probabilities and scores."""
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    model = policy(how)
    answers = sample(model, TOKENIZER, prompts, count=5, max_new_tokens=9, batch_size=4, seed=11)
    asked = [prompts[answer.prompt] for answer in answers]
    logps = log_probabilities(
        model, TOKENIZER, asked, [answer.tokens for answer in answers], batch_size=4
    )
    scorer = Scorer(classifier(folder / "base", how), TOKENIZER, Platt())
    texts = [answer.text for answer in answers]
    scores = scorer.score([user(QUESTIONS[0])] * len(texts), texts, batch_size=4)
    tokens = [answer.tokens for answer in answers]
    return {"tokens": tokens, "logps": logps.tolist(), "scores": scores.tolist()}


def everything(
    kinds: list[str], how: Resources, folder: Path, parts: Sequence[str]
) -> dict[str, Any]:
    made: dict[str, Callable[[], dict[str, Any]]] = {"drawn": lambda: drawn(how, folder)}
    found = {}
    for kind in kinds:
        found[kind] = made[kind]() if kind in made else training(kind, how, folder, parts)
    return found


def in_rank(
    rank: int, how: Resources, folder: Path, kinds: list[str], parts: Sequence[str]
) -> None:
    """What one of the processes does; the environment is that of the launcher."""
    if how.processes != 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(how.processes),
            LOCAL_WORLD_SIZE=str(how.processes), TORCHELASTIC_RUN_ID="ranked",
        )  # fmt: skip
    elif how.device == "cuda":  # one process is to see one GPU
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = first
    launch.join(how)
    write_json(folder / "found.json", everything(kinds, how, folder, parts))
    leave()


def in_all(how: Resources, *what: Any) -> bool:
    """Whether all of them ended well; each is a copy of this process, which has imported."""
    processes = int(how.processes)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=in_rank, args=(rank, how, *what)) for rank in range(processes)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    return not any(each.exitcode for each in ranks)


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as a stage does
    for run in sys.argv[1:]:
        processes, distributed, device, precision, parts, folder, *kinds = run.split(",")
        how = resources(int(processes), distributed, device, precision)
        if not in_all(how, Path(folder), kinds, PARTS[parts]):
            sys.exit(f"{run}: failed")


if __name__ == "__main__":
    main()
