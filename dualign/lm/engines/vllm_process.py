"""vLLM: in a process of its own, by this Python or another, or behind a server.

A policy that is a LoRA adapter is sampled without merging. One that vLLM cannot take as such is
merged into a temporary folder first."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import ModelError, ParamsError
from dualign.lm.engines.interface import Answer, Request
from dualign.lm.engines.ranks import RANKS, room_for
from dualign.lm.models import adapter_base, save
from dualign.lm.numerics import device_of, precision_of
from dualign.lm.publish import publish
from dualign.params.base import Resources

_WORKER = Path(__file__).with_name("vllm_worker.py")
#: What vLLM takes of a GPU's memory that this process leaves free.
_SHARE = 0.9
#: Variables of the launcher of several processes, beside those that begin with TORCHELASTIC_.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    resources: Resources,
) -> list[Answer]:
    """An answer to each row, with its tokens' log-probabilities. Each row has its own seed.

    Raises ParamsError where vLLM is not there or serves another policy, ModelError where it
    fails."""
    if not request.prompts:
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if resources.engine_url:
            # Its client takes half a second to import, and few engines are servers.
            from dualign.lm.engines import vllm_server

            policy, adapter = _served_folders(model, tokenizer, folder)
            return vllm_server.answer(policy, adapter, request, resources.engine_url)
        policy, adapter = folders(model, tokenizer, folder)
        asked = _asked(policy, adapter, request) | {
            "rank": _rank(model),
            "dtype": _dtype(resources),
            "memory": _memory(device_of(resources)),
        }
        own = environment(os.environ, device_of(resources))
        return _worked(asked, folder, _python(resources), own)


def folders(model: Any, tokenizer: PreTrainedTokenizerBase, room: Path) -> tuple[Path, Path | None]:
    """Weights to load and the adapter on them, written to `room` if they lie nowhere."""
    written = room / "written"
    if isinstance(model, PeftModel):
        save(model, tokenizer, written)
        if is_plain(model):
            return Path(adapter_base(written)).absolute(), written
        publish(written, room / "merged")
        return room / "merged", None
    model.save_pretrained(str(written))
    tokenizer.save_pretrained(str(written))
    return written, None


def is_plain(model: PeftModel) -> bool:
    """Whether vLLM can hold the adapter beside its base: LoRA alone, of a rank that it has."""
    config: Any = model.peft_config[model.active_adapter]
    more = (config.modules_to_save, config.use_dora, config.rank_pattern, config.bias != "none")
    return config.r <= RANKS[-1] and not any(more)


def _served_folders(
    model: Any, tokenizer: PreTrainedTokenizerBase, room: Path
) -> tuple[Path, Path | None]:
    """As `folders`, for a server that holds its weights already."""
    if not isinstance(model, PeftModel):
        return Path(model.name_or_path).absolute(), None
    if not is_plain(model):
        raise ParamsError(
            "resources.engine_url: vLLM cannot serve this policy's adapter beside its base (more"
            " than plain LoRA); set engine_url to null, which merges it, or engine to refill"
        )
    return folders(model, tokenizer, room)


def _rank(model: torch.nn.Module) -> int:
    """The least rank of vLLM's that holds the adapter."""
    if not isinstance(model, PeftModel):
        return RANKS[0]
    return room_for(model.peft_config[model.active_adapter].r)


def _dtype(resources: Resources) -> str:
    return "float32" if precision_of(resources) is torch.float32 else "bfloat16"


def _memory(device: torch.device) -> float | None:
    """The part of its GPU that vLLM may take, beside what this process holds there; None on a CPU.

    It would want nine tenths of the whole, and refuse to start where less is free."""
    if device.type == "cpu":
        return None
    gc.collect()
    torch.cuda.empty_cache()  # what a training before has left
    free, whole = torch.cuda.mem_get_info(device)
    return _SHARE * free / whole


def environment(variables: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """The worker's environment: it sees the GPU of this process alone, and takes itself for none of
    several processes, of which it would look for the others.

    >>> environment({"RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, torch.device("cuda", 1))
    {'CUDA_VISIBLE_DEVICES': '5', 'PYTHONSAFEPATH': '1'}
    """
    own = {
        name: value
        for name, value in variables.items()
        if not name.startswith(("TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_"))
        and name not in _LAUNCHED
    }
    if device.type == "cuda":
        at = device.index or 0
        seen = variables.get("CUDA_VISIBLE_DEVICES")
        own["CUDA_VISIBLE_DEVICES"] = seen.split(",")[at] if seen else str(at)
    # Without the worker's folder, whose modules might hide others.
    return own | {"PYTHONSAFEPATH": "1"}


def _asked(policy: Path, adapter: Path | None, request: Request) -> dict[str, Any]:
    return {
        "policy": str(policy),
        "adapter": None if adapter is None else str(adapter),
        "prompts": [list(prompt) for prompt in request.prompts],
        "seeds": list(request.seeds),
        "ends": list(request.ends),
        "max_new_tokens": request.max_new_tokens,
        "max_model_len": request.longest + request.max_new_tokens,
        "batch_size": request.batch_size,
    }


def _python(resources: Resources) -> str:
    """The Python that has vLLM."""
    if resources.engine_python is None and importlib.util.find_spec("vllm") is None:
        raise ParamsError(
            "resources.engine is vllm, which this Python does not have; set engine_python to one"
            " that has it, engine_url to a server, or engine to refill (docs/engines.md)"
        )
    return resources.engine_python or sys.executable


def _worked(
    asked: dict[str, Any], folder: Path, python: str, variables: dict[str, str]
) -> list[Answer]:
    """Ask the worker by files."""
    question = folder / "asked.json"
    reply = folder / "answered.json"
    question.write_text(json.dumps(asked))
    command = [python, str(_WORKER), str(question), str(reply)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=variables
        )
    except OSError as error:
        raise ParamsError(
            f"resources.engine_python: {python} cannot be run ({error.strerror}); name a Python"
            " that has vLLM"
        ) from error
    if done.returncode or not reply.is_file():
        why = _told(done.stderr) or f"status {done.returncode}"
        raise ModelError(f"resources.engine vllm: {python} failed ({why})")
    return [
        Answer(row["tokens"], row["log_probabilities"]) for row in json.loads(reply.read_text())
    ]


def _told(stderr: str) -> str:
    """The line that says why: the last with an error's name, since warnings come after it."""
    lines = stderr.strip().splitlines()
    named = [line for line in lines if "Error" in line]
    return (named or lines or [""])[-1].strip()[:300]
