"""A DPO step beside TRL's: pairs a second, processor seconds and memory, on the same real rows.

    python -m bench.dpo_speed --base FOLDER --data FOLDER
    python -m bench.dpo_speed --base FOLDER --data FOLDER --random 1.5b    # on a GPU

Three trainers in a process each take every step in turn, so that they share the machine's moods:
ours, TRL's `DPOTrainer` as it comes, and with its best settings (reference computed beforehand, no
checkpointing of activations). All have the same weights, batches, learning rate, optimiser and
threads. After every step the machine's rate of matrix products is measured, by torch's own product
and on a CPU by oneDNN's. On a GPU, and with random weights, one trainer runs after the other, for
the memory; a GPU's seconds are those of the clock."""

from __future__ import annotations

import logging
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback

from bench import options
from bench.options import knob
from dualign.core.errors import DualignError, one_line
from dualign.core.work import peak_memory
from dualign.data.formats import Usable
from dualign.data.sources import read
from dualign.lm import onednn
from dualign.lm.flops import ModelSize, Tokens, size_of, training_flop
from dualign.lm.models import load_policy, load_tokenizer, save
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.params.base import Resources, TrainingParams
from dualign.params.data import SourceSpec, WorldParams
from dualign.params.loading import load_resources
from dualign.training.pairs import with_reference
from dualign.training.pairwise import Pair, PairLossConfig, pairwise_trainer
from dualign.training.run import Job
from dualign.training.stock import stock_trainer

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.dpo_speed"
#: What is compared, and how it is called in the table.
SIDES = {
    "trl": {"ours": "ours", "defaults": "TRL, defaults", "best": "TRL, best"},
    "parts": {"ours": "ours", "padded": "padded rows", "before": "and torch's products"},
}
#: Sources of pairs: their format, the kind of pair, and the file in the folder of the rows.
ROWS: dict[str, tuple[Any, Any, str]] = {
    "PKU": ("pku", "safety", "pku_safety/pairs.jsonl"),
    "HH": ("hh", "helpful", "hh_rlhf/helpful-base.test.jsonl.gz"),
}
#: Kinds of work, and what the profiler's names of their operations have in them.
KINDS = {
    "matrix products": ("::mm", "::addmm", "::bmm", "::_linear_pointwise"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "varlen_attn"),
    "softmax over the vocabulary": ("log_softmax", "logsumexp"),
    "optimiser": ("adamw",),
}
_BETA = 0.1
#: Side of the square matrices whose product is timed, on a CPU and on a GPU.
_SQUARE = 2048
_SQUARE_CUDA = 8192
#: Qwen2.5's shapes: hidden size, layers, heads, heads of keys, and size of the layer between.
SHAPES = {"0.5b": (896, 24, 14, 2, 4864), "1.5b": (1536, 28, 12, 2, 8960)}
_QWEN_VOCABULARY = 151936
#: What rates are called in the table.
RATES = {"torch": "torch's", "onednn": "oneDNN's"}
#: The embedded world, which `read` wants to hear of and no source here is.
_NO_WORLD = WorldParams(sft_rows=1, helpful_pairs=1, safety_pairs=1, sharpness=1.0)


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    base: str = knob("models/base/smollm2", "folder of a causal language model")
    data: str = knob("", "folder with pku_safety/ and hh_rlhf/")
    batch: int = knob(4, "pairs of a step")
    steps: int = knob(5, "steps of each source that count, after one that does not")
    rate: float = knob(1e-6, "learning rate")
    tokens: int = knob(512, "longest prompt with an answer")
    precision: str = knob("fp32", "fp32 or bf16")
    against: str = knob("trl", "trl, or parts: ours without some of what makes it quick")
    threads: int = knob(1, "torch's threads")
    device: str = knob("auto", "auto, cpu or cuda")
    random: str = knob("", "0.5b or 1.5b: random weights of this shape, with the base's tokenizer")
    layers: int = knob(0, "layers of random weights (0: all)")
    seed: int = knob(0, "seed of the rows")

    def __post_init__(self) -> None:
        if min(self.batch, self.steps, self.tokens, self.threads) < 1 or not self.rate > 0:
            raise DualignError("batch, steps, tokens and threads must be at least 1, rate above 0")
        if self.precision not in ("fp32", "bf16"):
            raise DualignError(f"--precision {self.precision!r} is neither fp32 nor bf16")
        if self.against not in SIDES:
            raise DualignError(f"--against {self.against!r} is neither trl nor parts")
        if self.device not in ("auto", "cpu", "cuda"):
            raise DualignError(f"--device {self.device!r} is neither auto, cpu nor cuda")
        if self.random not in ("", *SHAPES):
            raise DualignError(f"--random {self.random!r} is none of {', '.join(SHAPES)}")

    @property
    def sides(self) -> dict[str, str]:
        """What is compared, and how it is called in the table."""
        return SIDES[self.against]

    @property
    def cuda(self) -> bool:
        """Whether the steps run on a GPU."""
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def alone(self) -> bool:
        """Whether one side runs after the other."""
        return self.cuda or bool(self.random)


# --- rows -----------------------------------------------------------------------------------------


def pairs_of(given: Settings) -> dict[str, list[Pair]]:
    """One step more than is counted of every source, without reference columns."""
    if not given.data or not Path(given.data).is_dir():
        raise DualignError(f"--data {given.data!r} is no folder; name one")
    return {source: _drawn(given, source) for source in ROWS}


def _drawn(given: Settings, source: str) -> list[Pair]:
    """Pairs of one source in a random order."""
    form, kind, path = ROWS[source]
    spec = SourceSpec(format=form, path=path)
    found = read(spec, kind, Path(given.data).absolute(), _NO_WORLD, given.seed)
    records = [item for item in found if isinstance(item, Usable)]
    random.Random(given.seed).shuffle(records)
    count = (given.steps + 1) * given.batch
    pairs = [
        pair for pair in _encoded(given, records[: 4 * count]) if _length(pair) <= given.tokens
    ]
    if len(pairs) < count:
        raise DualignError(f"{path}: too few rows of {given.tokens} tokens; raise --tokens")
    return pairs[:count]


def _encoded(given: Settings, records: Sequence[Usable]) -> Iterator[Pair]:
    tokenizer = load_tokenizer(given.base)
    prompts = encode_prompts(tokenizer, [record.prompt for record in records])
    chosen = encode_answers(tokenizer, [record.chosen for record in records])
    rejected = encode_answers(tokenizer, [str(record.rejected) for record in records])
    for ids in zip(prompts, chosen, rejected, strict=True):
        yield Pair(*ids, ref_first=float("nan"), ref_second=float("nan"))


def _length(pair: Pair) -> int:
    """Tokens of the longer conversation."""
    return len(pair.prompt) + max(len(pair.first), len(pair.second))


def save_random(given: Settings, folder: Path) -> None:
    """Random weights of a shape, in bf16, with the tokenizer of the base."""
    width, layers, heads, groups, between = SHAPES[given.random]
    config = Qwen2Config(
        vocab_size=_QWEN_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=given.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=between,
        tie_word_embeddings=True,
    )
    torch.manual_seed(given.seed)
    with torch.device("cuda" if given.cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save(model, load_tokenizer(given.base), folder)


# --- work of a step -------------------------------------------------------------------------------


def work(size: ModelSize, pairs: Sequence[Pair]) -> float:
    """GFLOP of a training step in the usual count, every answer with its prompt."""
    answers = [(len(p.prompt), len(answer)) for p in pairs for answer in (p.first, p.second)]
    rows = (Tokens.of(prompt, answer) for prompt, answer in answers)
    return training_flop(size, sum(rows, Tokens())) / 1e9


def tokens(pairs: Sequence[Pair]) -> dict[str, int]:
    """Tokens of a step as a padded batch, without padding, and with each prompt once."""
    lengths = [len(p.prompt) + len(answer) for p in pairs for answer in (p.first, p.second)]
    once = [len(p.prompt) + len(p.first) + len(p.second) for p in pairs]
    return {"padded": max(lengths) * len(lengths), "real": sum(lengths), "once": sum(once)}


def rates(cuda: bool = False, half: bool = False) -> dict[str, float]:
    """GFLOP of matrix products a second now: by torch, in bf16 with `half`, and on
    a CPU, of whose processor seconds are meant, by oneDNN.
    """
    side, device = (_SQUARE_CUDA, "cuda") if cuda else (_SQUARE, "cpu")
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16 if half else torch.float32)
    ways: dict[str, Callable[[], torch.Tensor]] = {"torch": lambda: left @ left}
    if cuda:
        left @ left  # the first product also chooses a kernel
    else:
        ways["onednn"] = lambda: onednn.product(left, left)
    found = {}
    for name, product in ways.items():
        began = seconds(cuda)
        product()
        found[name] = 2 * side**3 / 1e9 / (seconds(cuda) - began)
    return found


def seconds(cuda: bool) -> float:
    """Seconds of this process's processors, or of the clock once a GPU has done what was asked."""
    if not cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# --- one side -------------------------------------------------------------------------------------


class Paced(TrainerCallback):
    """Takes a step when told to, and tells what it took."""

    def __init__(self, given: Settings, talk: Connection, losses: list[float]) -> None:
        self.given = given
        self.talk = talk
        self.losses = losses
        self.began = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.talk.recv()
        self.began = (seconds(self.given.cuda), time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processor = seconds(self.given.cuda) - self.began[0]
        clock = time.perf_counter() - self.began[1]
        self.talk.send({"processor": processor, "clock": clock, "loss": self.losses[-1]})


def side(name: str, given: Settings, pairs: Sequence[Pair], talk: Connection) -> None:
    """A process: one trainer, paced by whoever holds the other end of `talk`."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        build = _ours if given.against == "parts" or name == "ours" else _stock
        trainer, told = build(name, given, pairs, Path(folder))
        losses: list[float] = []
        trainer.compute_loss = recorded(trainer.compute_loss, losses)
        trainer.add_callback(Paced(given, talk, losses))
        talk.send(told)
        trainer.train()
    talk.send(peak_memory())
    talk.recv()
    talk.send(profiled(given, trainer))


def kind_of(operation: str) -> str:
    """The kind of work that an operation of the profiler is."""
    for kind, names in KINDS.items():
        if any(name in operation for name in names):
            return kind
    return "all else"


def profiled(given: Settings, trainer: Any) -> dict[str, float]:
    """Seconds of one more step on the first batch, by kind of work: of the clock, or of a GPU."""
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(given.batch)])
    inputs = trainer._prepare_inputs(inputs)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if given.cuda else [])]
    with profile(activities=kinds) as seen:
        trainer.training_step(trainer.model, inputs)
        trainer.optimizer.step()
    found = dict.fromkeys((*KINDS, "all else"), 0.0)
    for event in seen.key_averages():
        found[kind_of(event.key)] += _own_time(given, event) / 1e6
    return found


def _own_time(given: Settings, event: Any) -> float:
    """Microseconds of an operation without those that it calls; its kernels have rows of their own
    in a GPU's profile.
    """
    if not given.cuda:
        return float(event.self_cpu_time_total)
    return float(event.self_device_time_total) if event.key.startswith("aten::") else 0.0


def recorded(compute_loss: Callable[..., Any], losses: list[float]) -> Callable[..., Any]:
    """A trainer's loss that notes its value."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    return noted


def _ours(
    name: str, given: Settings, pairs: Sequence[Pair], folder: Path
) -> tuple[Any, dict[str, Any]]:
    """Our trainer, and what was before its first step."""
    resources = uninterrupted(given.device, given.precision)
    tokenizer = load_tokenizer(given.base)
    model = load_policy(given.base, resources, trained=True)
    size = size_of(model)
    if name == "before":
        by_torch(model)
    began = seconds(given.cuda)
    known = with_reference(pairs, model, tokenizer, 2 * given.batch)
    reference = (seconds(given.cuda) - began) / len(pairs)
    training = schedule(given.batch, given.rate, given.tokens, len(pairs) // given.batch)
    job = Job(training, resources, folder, given.seed)
    trainer = pairwise_trainer(model, tokenizer, known, PairLossConfig(_BETA, _BETA), job)
    trainer.args.train_sampling_strategy = "sequential"
    if name in ("padded", "before"):
        trainer._packed = False
    return trainer, {"reference": reference, **asdict(size)}


def uninterrupted(device: str, precision: str) -> Resources:
    """The resources of params.yaml, for whole batches and without checkpoints."""
    changed = {"device": device, "precision": precision, "micro_batch_size": None}
    return load_resources().model_copy(update=changed | {"checkpoint_steps": 10**6, "log_steps": 1})


def schedule(batch: int, rate: float, tokens: int, steps: int) -> TrainingParams:
    """Steps at a constant learning rate."""
    return TrainingParams(
        epochs=1.0, batch_size=batch, optimiser="adamw", learning_rate=rate, adam_beta2=0.999,
        warmup=0.0, schedule="constant", weight_decay=0.0, max_length=tokens, max_steps=steps,
    )  # fmt: skip


def by_torch(model: torch.nn.Module) -> None:
    """Let the layers of a model multiply by torch's own product again."""
    for module in model.modules():
        if type(module) is onednn.OneDnnLinear:
            module.__class__ = torch.nn.Linear  # type: ignore[assignment]


def _stock(
    name: str, given: Settings, pairs: Sequence[Pair], folder: Path
) -> tuple[Any, dict[str, Any]]:
    """TRL's trainer, and what was before its first step."""
    best = name == "best"
    load = partial(AutoModelForCausalLM.from_pretrained, given.base, dtype=torch.float32)
    model = load()
    reference = None if best else load()
    arguments = {
        "output_dir": str(folder),
        "beta": _BETA,
        "max_steps": len(pairs) // given.batch,
        "per_device_train_batch_size": given.batch,
        "learning_rate": given.rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": given.precision == "bf16",
        "use_cpu": not given.cuda,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if best:
        arguments |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        arguments |= {"precompute_ref_batch_size": 2 * given.batch, "dataloader_pin_memory": False}
    began = seconds(given.cuda)
    tokenizer = load_tokenizer(given.base)
    trainer = stock_trainer(model, reference, tokenizer, pairs, arguments)
    spent = (seconds(given.cuda) - began) / len(pairs)
    return trainer, {"reference": spent if best else 0.0}


# --- all sides ------------------------------------------------------------------------------------


def measure(given: Settings) -> dict[str, Any]:
    """Every step of every side in turn; see `page` for what is kept."""
    drawn = pairs_of(given)
    pairs = [pair for source in drawn.values() for pair in source]
    groups = [[name] for name in given.sides] if given.alone else [list(given.sides)]
    with tempfile.TemporaryDirectory() as folder:
        own = replace(given, base=folder) if given.random else given
        if given.random:
            save_random(given, Path(folder))
        runs = [_together(group, own, pairs) for group in groups]
    told, peaks, profiles = (_of_all(runs, of) for of in _ENDS)
    steps = (run["steps"] for run in runs)
    taken = [_joined(rows) for rows in zip(*steps, strict=True)]
    size = {key: value for key, value in told["ours"].items() if key != "reference"}
    found: dict[str, Any] = {"size": size, "peak_gib": peaks, "profile": profiles, "sources": {}}
    found["reference"] = {name: row["reference"] for name, row in told.items()}
    for k, (source, rows) in enumerate(drawn.items()):
        first = k * (given.steps + 1) + 1
        found["sources"][source] = _summed(
            given, ModelSize(**size), rows[given.batch :], taken[first:][: given.steps]
        )
    return found


#: What a side tells before its first step and after its last.
_ENDS = ("told", "peaks", "profiles")


def _together(names: Sequence[str], given: Settings, pairs: Sequence[Pair]) -> dict[str, Any]:
    """All steps of some sides, which take turns: what they tell, by side, and rows by step."""
    context = multiprocessing.get_context("spawn")
    talks: dict[str, Any] = {}
    processes = []
    for name in names:
        talks[name], other = context.Pipe()
        processes.append(
            context.Process(target=side, args=(name, given, pairs, other), daemon=True)
        )
        processes[-1].start()
        other.close()
    told = {name: _answered(name, talk, None) for name, talk in talks.items()}
    torch.set_num_threads(given.threads)
    taken = [_step(given, talks, step) for step in range(len(pairs) // given.batch)]
    peaks = {name: _answered(name, talk, None) for name, talk in talks.items()}
    profiles = {name: _answered(name, talk, -1) for name, talk in talks.items()}
    for process in processes:
        process.join()
    return {"told": told, "steps": taken, "peaks": peaks, "profiles": profiles}


def _step(given: Settings, talks: Mapping[str, Any], step: int) -> dict[str, Any]:
    """One step of all sides, one after the other, and the machine's rates after it."""
    row: dict[str, Any] = {}
    for name, talk in talks.items():
        row[name] = _answered(name, talk, step)
        log.info("step %d, %s: %.2f s", step, name, row[name]["processor"])
    return {**row, "rates": rates(given.cuda, given.cuda and given.precision == "bf16")}


def _of_all(runs: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    """What sides tell, by side, of runs one after the other."""
    return {name: value for run in runs for name, value in run[what].items()}


def _joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same step of sides that ran one after the other; rates are means."""
    joined = {name: told for row in rows for name, told in row.items()}
    return {**joined, "rates": each(statistics.fmean, [row["rates"] for row in rows])}


def _answered(name: str, talk: Any, asked: int | None) -> Any:
    """What a side answers. Raises DualignError where it has ended."""
    try:
        if asked is not None:
            talk.send(asked)
        return talk.recv()
    except (EOFError, OSError):
        raise DualignError(
            f"{name}: its process ended; where no fault is shown it was out of memory, so lower"
            " --batch or --tokens"
        ) from None


def _summed(
    given: Settings, size: ModelSize, pairs: Sequence[Pair], taken: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The steps of one source, and their medians."""
    batches = [pairs[k : k + given.batch] for k in range(0, len(pairs), given.batch)]
    works = [work(size, batch) for batch in batches]
    counts = [tokens(batch) for batch in batches]
    found: dict[str, Any] = {"steps": taken, "gflop": works, "sides": {}}
    found["tokens"] = each(sum, counts)
    found["rates"] = each(statistics.median, [row["rates"] for row in taken])
    for name in given.sides:
        found["sides"][name] = medians(name, given.batch, works, taken)
    return found


def each(of: Callable[[list[Any]], Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A number of every column of rows, such as its sum.

    >>> each(sum, [{"padded": 3, "real": 2}, {"padded": 5, "real": 5}])
    {'padded': 8, 'real': 7}
    """
    columns = zip(*(row.values() for row in rows), strict=True)
    return {key: of(list(column)) for key, column in zip(rows[0], columns, strict=True)}


def medians(
    name: str, batch: int, works: Sequence[float], taken: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Medians over steps: seconds, pairs a second, times that ours is faster, GFLOP in a processor
    second; and the largest difference of a loss from ours.
    """
    own = [row[name] for row in taken]
    processor = [row["processor"] for row in own]
    ours = [row["ours"]["processor"] for row in taken]
    speed = [done / spent for done, spent in zip(works, processor, strict=True)]
    times = [theirs / mine for theirs, mine in zip(processor, ours, strict=True)]
    apart = [abs(row[name]["loss"] - row["ours"]["loss"]) for row in taken]
    clock = statistics.median(row["clock"] for row in own)
    return {
        "processor": statistics.median(processor),
        "clock": clock,
        "pairs_per_second": batch / clock,
        "times": statistics.median(times),
        "least_times": min(times),
        "gflops": statistics.median(speed),
        "loss_apart": max(apart),
    }


# --- the page -------------------------------------------------------------------------------------


def page(given: Settings, found: dict[str, Any]) -> str:
    """The results as Markdown."""
    what = {"trl": "TRL's", "parts": "ours without its parts"}[given.against]
    parts = [
        f"# A DPO step: ours beside {what}, {given.precision}",
        f"    {options.command(PROGRAM, given)}",
    ]
    for source, rows in found["sources"].items():
        parts += [f"## {source}", _table(given, found, rows), _about(rows)]
    parts += ["## Where the time of a step goes", _profiles(given, found["profile"])]
    return "\n\n".join([*parts, _NOTES]) + "\n"


def _profiles(given: Settings, found: Mapping[str, Mapping[str, float]]) -> str:
    """Shares of the clock seconds of one step, by kind of work."""
    lines = options.head(["", *given.sides.values()])
    for kind in (*KINDS, "all else"):
        shares = [found[name][kind] / sum(found[name].values()) for name in given.sides]
        lines.append(options.line([kind, *(f"{share:.0%}" for share in shares)]))
    return "\n".join(lines)


def _table(given: Settings, found: dict[str, Any], rows: dict[str, Any]) -> str:
    kind = "s a step" if given.cuda else "processor s a step"
    titles = ["", kind, "clock s", "pairs/s", "ours is faster, median (least)", "an epoch"]
    titles += ["peak GiB", "GFLOP/s", *(f"of {RATES[way]} rate" for way in rows["rates"])]
    titles += ["loss apart"]
    lines = options.head(titles)
    whole = {name: _epoch(given, found, rows, name) for name in given.sides}
    for name, title in given.sides.items():
        row = rows["sides"][name]
        cells = [title, f"{row['processor']:.2f}", f"{row['clock']:.2f}"]
        cells += [
            f"{row['pairs_per_second']:.2f}",
            f"{row['times']:.2f} ({row['least_times']:.2f})",
        ]
        cells += [f"{whole[name] / whole['ours']:.2f}", f"{found['peak_gib'][name]:.1f}"]
        cells += [f"{row['gflops']:.0f}"]
        cells += [f"{row['gflops'] / rate:.0%}" for rate in rows["rates"].values()]
        cells += [f"{row['loss_apart']:.1e}"]
        lines.append(options.line(cells))
    return "\n".join(lines)


def _epoch(given: Settings, found: dict[str, Any], rows: dict[str, Any], name: str) -> float:
    """Processor seconds that a pair takes in an epoch with its reference columns."""
    return float(rows["sides"][name]["processor"] / given.batch + found["reference"][name])


def _about(rows: dict[str, Any]) -> str:
    count = rows["tokens"]
    rates = [f"{rate:.0f} GFLOP/s by {RATES[way]} product" for way, rate in rows["rates"].items()]
    return (
        f"Median work {statistics.median(rows['gflop']):.0f} GFLOP a step. Tokens of all steps:"
        f" {count['padded']} padded, {count['real']} without padding, {count['once']} with each"
        f" prompt once. The machine's rate: {', '.join(rates)}."
    )


_NOTES = """\
Medians over steps; processor seconds are of all threads. *An epoch* has the pass for reference
columns in it, which TRL's defaults make at every step. Work is counted without padding, every
answer with its prompt, so a trainer that reads a prompt once gains in the share of the rate. A
process holds one trainer; its peak counts all that it has. *Loss apart*: the largest difference
from ours in any step."""


def _changed(given: Settings) -> list[str]:
    """What the names of the results say of a run that is not the usual one."""
    usual = Settings()
    return [
        str(getattr(given, name))
        for name in ("against", "precision", "random")
        if getattr(given, name) != getattr(usual, name)
    ]


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the laboratory; write dpo-speed.json and .md (dpo-speed-bf16, dpo-speed-parts)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    given, out = options.parse(Settings, PROGRAM, __doc__, argv)
    found = measure(given)
    given = replace(given, base=Path(given.base).name, data="FOLDER")
    name = "-".join(["dpo-speed", *_changed(given)])
    options.tell(out, name, PROGRAM, given, page(given, found), found=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
