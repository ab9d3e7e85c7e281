"""sft: base model and supervised rows -> models/sft, the reference policy pi_ref.

    python -m stages.sft

The base is a hub id, a folder, or `scratch`: a small Llama and a tokenizer built here from the data.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import replacing
from dualign.core.params import SftParams
from dualign.core.schema import SFT, read_table
from dualign.core.stage import Run, execute, finished
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
from dualign.lm.tokens import encode_answers, encode_prompts
from dualign.training.run import Job, Model
from dualign.training.supervised import train_sft

ROWS = Path("data/prepared/sft.parquet")
OUT = Path("models/sft")


def main(run: Run[SftParams]) -> None:
    """Run the stage."""
    params = run.params
    rows = read_table(ROWS, SFT)
    model, tokenizer = base(run, rows)
    model = with_lora(model, params.lora)
    parts = {
        split: list(
            zip(encode_prompts(tokenizer, part["prompt"]), encode_answers(tokenizer, part["response"]), strict=True)
        )
        for split, part in rows.groupby("split")
    }
    scratch = run.scratch(ROWS)
    job = Job(params.training, run.resources, scratch, params.seed)
    metrics = train_sft(model, tokenizer, parts["train"], parts["heldout"], job)
    with replacing(OUT) as folder:
        save(merged(model), tokenizer, folder)
    run.metrics({**metrics, "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)})
    finished(scratch)


def base(run: Run[SftParams], rows: pd.DataFrame) -> tuple[Model, PreTrainedTokenizerBase]:
    """The model to start from and its tokenizer."""
    params = run.params
    if params.base != "scratch":
        tokenizer = load_tokenizer(params.base, params.revision, params.chat_template)
        model = load_policy(params.base, run.resources, params.revision)
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


if __name__ == "__main__":
    execute(main, SftParams)
