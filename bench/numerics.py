"""What bf16 does to a model: log-ratios at step 0, the steps that training takes, and the memory of
the head.

    python -m bench.numerics --base models/base/smollm2

Part 1: log(pi / pi_ref) in nats of answers under a policy that no step has changed, against its
reference column, by batch size, for full weights and LoRA. Part 2: the change of the weights after
some steps of supervised training in bf16 (fp32 masters), in pure bf16, and in fp32, from one start.
Part 3: the memory that the log-probabilities of long answers take with the chunked head, beside the
logits of all positions at once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import options
from bench.memory import peak
from bench.options import knob
from dualign.core.errors import DualignError
from dualign.lm.models import load_policy, load_tokenizer, with_lora
from dualign.lm.numerics import answer_log_probabilities
from dualign.lm.sampling import log_probabilities
from dualign.params.base import LoraParams, Resources, TrainingParams
from dualign.training.run import Job
from dualign.training.supervised import train_sft

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.numerics"
PRECISIONS = ("fp32", "bf16", "pure_bf16")
_LORA = LoraParams(rank=8, alpha=16.0, dropout=0.0, target_modules="all-linear", quantise=None)
_RESOURCES = Resources(
    device="auto",
    precision="bf16",
    engine="generate",
    engine_url=None,
    engine_python=None,
    processes=1,
    nodes=1,
    distributed="ddp",
    report_to=[],
    peak_tflops=None,
    micro_batch_size=None,
    sampling_batch_size=8,
    scoring_batch_size=8,
    gradient_checkpointing=False,
    checkpoint_steps=1000,
    log_steps=1000,
    threads=None,
)


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    base: str = knob("models/base/smollm2", "folder or hub id of a causal language model")
    answers: int = knob(8, "answers of part 1")
    tokens: int = knob(256, "tokens of an answer in parts 1 and 3")
    steps: int = knob(40, "training steps of part 2")
    rate: float = knob(1e-6, "learning rate of part 2")
    rows: int = knob(16, "rows of part 3")
    seed: int = knob(0, "seed of all draws")

    def __post_init__(self) -> None:
        if min(self.answers, self.tokens, self.steps, self.rows) < 1 or not self.rate > 0:
            raise DualignError("answers, tokens, steps and rows must be at least 1, rate above 0")


def log_ratios(given: Settings) -> list[dict[str, Any]]:
    """Part 1: the largest |log-ratio| in nats at step 0, by kind of policy and batch size."""
    tokenizer = load_tokenizer(given.base)
    prompts, answers = _conversations(given, given.answers)
    frozen = load_policy(given.base, _RESOURCES)
    reference = log_probabilities(frozen, tokenizer, prompts, answers, batch_size=8)
    policies = {
        "full weights": load_policy(given.base, _RESOURCES, trained=True),
        "LoRA": with_lora(load_policy(given.base, _RESOURCES), _LORA, given.seed),
    }
    rows = []
    for name, policy in policies.items():
        for batch in (1, 3, 8):
            found = log_probabilities(policy, tokenizer, prompts, answers, batch_size=batch)
            largest = float((found - reference).abs().max())
            rows.append({"policy": name, "batch": batch, "log_ratio": largest})
            log.info("step 0, %s, batch %d: |log-ratio| at most %.5f", name, batch, largest)
    return rows


def training(given: Settings) -> list[dict[str, Any]]:
    """Part 2: the change of the weights in each precision beside that in fp32, and how far log pi
    moved.
    """
    moved = {precision: _moved(given, precision) for precision in PRECISIONS}
    exact, _ = moved["fp32"]
    rows = []
    for precision, (change, shift) in moved.items():
        cosine = torch.nn.functional.cosine_similarity(change, exact, dim=0)
        unmoved = float((change == 0).double().mean())
        ratio = float(change.norm() / exact.norm())
        rows.append(
            {
                "precision": precision,
                "cosine": float(cosine),
                "norm": ratio,
                "unmoved": unmoved,
                "shift": shift,
            }
        )
        log.info(
            "%s: cosine %.4f, norm %.3f of fp32's, %.1f %% unmoved",
            precision,
            cosine,
            ratio,
            100 * unmoved,
        )
    return rows


def _moved(given: Settings, precision: str) -> tuple[torch.Tensor, float]:
    """The change of all matrices, in one vector, and of the mean log-probability of the training
    answers in nats.
    """
    resources = _RESOURCES.model_copy(update={"precision": precision})
    tokenizer = load_tokenizer(given.base)
    model = load_policy(given.base, resources, trained=True)
    before = [weight.detach().float().clone() for weight in model.parameters()]
    pairs = list(zip(*_conversations(given, 16, length=32), strict=True))
    start = _mean(model, tokenizer, pairs)
    schedule = TrainingParams(
        epochs=1.0,
        batch_size=4,
        optimiser="adamw",
        learning_rate=given.rate,
        adam_beta2=0.99,
        warmup=0.0,
        schedule="constant",
        weight_decay=0.0,
        max_length=512,
        max_steps=given.steps,
    )
    with tempfile.TemporaryDirectory() as scratch:
        train_sft(
            model, tokenizer, pairs, pairs[:2], Job(schedule, resources, Path(scratch), given.seed)
        )
    after = [weight.detach().float() for weight in model.parameters()]
    change = torch.cat([(new - old).flatten() for new, old in zip(after, before, strict=True)])
    return change.double(), _mean(model, tokenizer, pairs) - start


def memory(given: Settings) -> list[dict[str, Any]]:
    """Part 3: peak memory in MiB above that of the loaded model, each way in a process of its
    own.
    """
    rows = []
    for way in ("chunked", "plain"):
        command = [
            sys.executable,
            "-m",
            "bench.numerics",
            "--measure",
            way,
            json.dumps(asdict(given)),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"head": way, "mib": float(done.stdout.strip().splitlines()[-1])})
        log.info("head %s: %.0f MiB", way, rows[-1]["mib"])
    return rows


def measure(way: str, given: Settings) -> float:
    """Peak memory in MiB that log-probabilities of `rows` long answers add to a loaded model,
    without gradients.
    """
    model = load_policy(given.base, _RESOURCES).eval()
    ids = torch.randint(
        100, 1000, (given.rows, given.tokens), generator=torch.Generator().manual_seed(given.seed)
    )
    mask = torch.ones_like(ids)
    ids, mask = ids.to(model.device), mask.to(model.device)
    _peak(model.device)  # of loading, which takes more than the model holds
    before = _peak(model.device)
    with torch.inference_mode():
        if way == "chunked":
            answer_log_probabilities(model, ids, mask, ids)
        else:
            logits = (
                model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            )
            torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).sum()
    return _peak(model.device) - before


def _peak(device: torch.device) -> float:
    """Peak memory in MiB since the last call; of a CPU that of the process, as Linux counts it."""
    if device.type == "cpu":
        return peak()
    held = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return held


def _conversations(
    given: Settings, count: int, length: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of a few ids and answers of random ids: what the model thinks of them does not matter
    here.
    """
    generator = torch.Generator().manual_seed(given.seed)
    drawn = torch.randint(
        100, 1000, (count, 16 + (length or given.tokens)), generator=generator
    ).tolist()
    return [row[:16] for row in drawn], [row[16:] for row in drawn]


def _mean(model: Any, tokenizer: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    prompts, answers = zip(*pairs, strict=True)
    return float(log_probabilities(model, tokenizer, prompts, answers, batch_size=8).mean())


def page(given: Settings, found: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown."""
    lines = [
        f"`{options.command(PROGRAM, given)}`",
        "",
        *options.head(["policy at step 0", "batch", "largest log-ratio, nats"]),
    ]
    lines += [
        f"| {row['policy']} | {row['batch']} | {row['log_ratio']:.5f} |"
        for row in found["log_ratios"]
    ]
    titles = ["training", "cosine to fp32's change", "its norm", "weights unmoved"]
    lines += ["", *options.head([*titles, "shift of log pi"])]
    lines += [
        f"| {row['precision']} | {row['cosine']:.4f} | {row['norm']:.3f} | {row['unmoved']:.1%} |"
        f" {row['shift']:+.3f} |"
        for row in found["training"]
    ]
    lines += ["", *options.head(["head", "MiB above the model"])]
    lines += [f"| {row['head']} | {row['mib']:.0f} |" for row in found["memory"]]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; its files hold the rows. Returns the status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    found = {"log_ratios": log_ratios(given), "training": training(given), "memory": memory(given)}
    options.publish(out, "numerics", {"settings": asdict(given), **found}, page(given, found))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sys.stdout.write(f"{measure(sys.argv[2], Settings(**json.loads(sys.argv[3])))}\n")
    else:
        sys.exit(main())
