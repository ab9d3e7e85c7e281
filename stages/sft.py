"""sft: base model and supervised rows -> models/sft, the reference policy pi_ref.

    python -m stages.sft

The base is a hub id, a folder (with `gguf_file` a GGUF file in it), or `scratch`: a small Llama and
a tokenizer built here from the data. With `train: false` the base itself is pi_ref; its format is
checked and its held-out loss measured."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dualign.core.artifacts import replacing
from dualign.core.errors import DataError, ModelError
from dualign.core.records import ReferenceMetrics, as_row
from dualign.core.schema import SFT, read_table
from dualign.lm.loading import check_causal, check_context, load_model
from dualign.lm.models import (
    build_scratch,
    fit_vocabulary,
    load_policy,
    load_tokenizer,
    merged,
    save,
    train_tokenizer,
    with_lora,
)
from dualign.lm.numerics import precision_of
from dualign.lm.quantised import check_installed, is_quantised, quantise
from dualign.lm.sampling import check_engine, check_prompts
from dualign.lm.tokens import encode_conversations
from dualign.params.consistency import lengths_on_base, params_of
from dualign.params.loading import load_all
from dualign.params.models import ScoreParams, SftParams
from dualign.stage import Run, execute
from dualign.training.run import Job, Model
from dualign.training.supervised import heldout_loss, train_sft

ROWS = Path("data/prepared/sft.parquet")
OUT = Path("models/sft")


def main(run: Run[SftParams]) -> None:
    """Run the stage."""
    params = run.params
    if params.lora.quantise:
        check_installed("lora.quantise nf4")
    rows = read_table(ROWS, SFT)
    scratch = run.scratch(ROWS, *local_inputs(params))
    model, tokenizer = base(run, rows)
    check_context(model, params.training.max_length, "sft.training.max_length")
    check_later_stages(run, model, tokenizer)
    train, heldout = encoded(rows, tokenizer)
    job = Job(params.training, run.resources, scratch, params.seed)
    if params.train:
        model = with_lora(model, params.lora, params.seed)
        metrics = train_sft(model, tokenizer, train, heldout, job)
    else:
        metrics = {"heldout_loss": heldout_loss(model, tokenizer, heldout, job)}
    parameters = sum(weight.numel() for weight in model.parameters())
    with replacing(OUT) as folder:
        save(merged(model) if params.train else untouched(params, tokenizer), tokenizer, folder)
        if params.lora.quantise:
            quantise(folder)
            narrow = load_policy(folder, run.resources)
            metrics["heldout_loss_in_4_bits"] = heldout_loss(narrow, tokenizer, heldout, job)
    told = ReferenceMetrics(
        heldout_loss=metrics["heldout_loss"],
        parameters=parameters,
        vocabulary=len(tokenizer),
        trained=bool(params.train),
    )
    run.trained(metrics | as_row(told), scratch)


def check_later_stages(
    run: Run[SftParams], model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse rows and prompts of the stages to come that the base cannot read, and a sampling
    engine that cannot draw from it, before it is trained. Raises ParamsError and DataError.
    """
    check_engine(model, run.resources)
    stages = load_all()
    for key, longest in lengths_on_base(stages).items():
        check_context(model, longest, key)
    longest = params_of(ScoreParams, stages).max_new_tokens
    check_prompts(model, tokenizer, ROWS.parent, longest)


def base(run: Run[SftParams], rows: pd.DataFrame) -> tuple[Model, PreTrainedTokenizerBase]:
    """The model to start from and its tokenizer."""
    params = run.params
    if (Path(params.base) / "adapter_config.json").is_file():
        raise ModelError(
            f"sft.base: {params.base} holds an adapter; name its base, or a folder that has it"
            " folded in"
        )
    if params.base != "scratch":
        tokenizer = load_tokenizer(
            params.base, params.revision, params.chat_template, params.gguf_file
        )
        whole = bool(params.train) and params.lora.rank == 0
        model = load_policy(
            params.base, run.resources, params.revision,
            gguf_file=params.gguf_file, trained=whole, rounded=bool(params.train),
        )  # fmt: skip
        if is_quantised(model):
            raise ModelError(
                f"sft.base: {params.base} is in 4 bits already; name the base that it was made of"
            )
        run.sources["sft.base"] = getattr(model.config, "_commit_hash", None) or params.base
        check_causal(model, params.base, precision_of(run.resources))
        fit_vocabulary(model, tokenizer)
        return model, tokenizer
    if params.scratch.tokenizer == "train":
        train = rows[rows["split"] == "train"]
        texts = [
            f" {turn['content']} {answer}"
            for p, answer in zip(train["prompt"], train["response"], strict=True)
            for turn in p
        ]
        tokenizer = train_tokenizer(texts, params.scratch.vocab_size)
    else:
        tokenizer = load_tokenizer(params.scratch.tokenizer, None, params.chat_template)
    tokenizer.model_max_length = params.scratch.context
    return build_scratch(params.scratch, tokenizer, params.seed), tokenizer


def untouched(params: SftParams, tokenizer: PreTrainedTokenizerBase) -> Model:
    """The base in the precision that it is stored in, whatever the run computes with."""
    model = load_model(
        AutoModelForCausalLM,
        params.base,
        dtype="auto",
        revision=params.revision,
        gguf_file=params.gguf_file,
    )
    fit_vocabulary(model, tokenizer)
    return model


def local_inputs(params: SftParams) -> list[Path]:
    """The files beside the data that the result depends on, by what lies in them."""
    named = (params.base, params.chat_template, params.scratch.tokenizer)
    return [Path(name) for name in named if name is not None and Path(name).exists()]


def encoded(
    rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase
) -> list[list[tuple[list[int], list[int]]]]:
    """Ids of the training rows and of the held-out ones. Raises DataError for a row by number."""
    try:
        ids = encode_conversations(tokenizer, rows["prompt"].tolist(), rows["response"].tolist())
    except DataError as error:
        raise DataError(f"{ROWS}: {error}") from error
    splits = rows["split"].tolist()
    by_split: dict[str, list[tuple[list[int], list[int]]]] = {"train": [], "heldout": []}
    for row, split in zip(ids, splits, strict=True):
        by_split[split].append(row)
    return list(by_split.values())


if __name__ == "__main__":
    execute(main, SftParams)
