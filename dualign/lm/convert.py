"""A GGUF file as a plain Hugging Face folder, bf16, that `sft.base` can name.

    python -m dualign.lm.convert FILE.gguf FOLDER

Needs the extra `gguf`. The weights are dequantised: what the file's quantisation lost stays lost.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dualign.core.artifacts import replacing
from dualign.core.errors import DualignError
from dualign.lm.loading import load_model
from dualign.lm.models import fit_vocabulary, load_tokenizer, save

log = logging.getLogger(__name__)


def convert(file: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to folder `out`. Raises ModelError where it cannot be read."""
    tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
    model = load_model(AutoModelForCausalLM, file.parent, dtype=torch.float32, gguf_file=file.name)
    model.to(torch.bfloat16)
    fit_vocabulary(model, tokenizer)
    with replacing(out) as folder:
        save(model, tokenizer, folder)
    log.info("%s: %d weights", out, sum(weight.numel() for weight in model.parameters()))


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(argv) != 2:
        log.error("usage: python -m dualign.lm.convert FILE.gguf FOLDER")
        return 2
    try:
        convert(Path(argv[0]), Path(argv[1]))
    except DualignError as error:
        log.error("%s", error)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
