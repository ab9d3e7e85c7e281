"""A GGUF file as a plain Hugging Face folder, bf16, that `sft.base` can name.

    python -m dualign.lm.convert FILE.gguf FOLDER

Needs the extra `gguf`. The weights are dequantised: what the file's quantisation lost stays lost.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dualign.core.errors import ModelError, one_line

PROG = "python -m dualign.lm.convert"

log = logging.getLogger(__name__)


def convert(file: Path, out: Path) -> None:
    """Write the model of a GGUF file to a new folder `out`. Raises ModelError where it cannot."""
    _check(file, out)
    import torch  # here, for --help and completion to be quick
    from transformers import AutoModelForCausalLM

    from dualign.core.artifacts import replacing
    from dualign.lm.loading import load_model
    from dualign.lm.models import fit_vocabulary, load_tokenizer, save

    tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
    model = load_model(AutoModelForCausalLM, file.parent, dtype=torch.float32, gguf_file=file.name)
    model.to(torch.bfloat16)
    fit_vocabulary(model, tokenizer)
    with replacing(out) as folder:
        save(model, tokenizer, folder)
    log.info("%s: %d weights", out, sum(weight.numel() for weight in model.parameters()))


def _check(file: Path, out: Path) -> None:
    if out.exists():
        raise ModelError(f"{out}: exists already; name a new folder")
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); name a GGUF file") from error
    if magic != b"GGUF":
        raise ModelError(f"{file}: no GGUF file, or a download that broke off; fetch it again")


@one_line
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command, called `prog`; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asked = parser(prog).parse_args(argv)
    convert(asked.file, asked.out)
    return 0


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of this command."""
    made = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("file", type=Path, metavar="FILE.gguf")
    made.add_argument("out", type=Path, metavar="FOLDER")
    return made


if __name__ == "__main__":
    sys.exit(main())
