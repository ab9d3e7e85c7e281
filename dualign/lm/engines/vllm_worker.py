"""What runs vLLM, by whatever Python has it: draw answers and write them to a file.

    PYTHON dualign/lm/engines/vllm_worker.py ASKED.json ANSWERED.json

Imports nothing of dualign, which that Python need not have."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def drawn(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Token ids of an answer to each prompt, and the log-probability of each token."""
    memory = {} if asked["memory"] is None else {"gpu_memory_utilization": asked["memory"]}
    engine = LLM(
        asked["policy"],
        dtype=asked["dtype"],
        max_model_len=asked["max_model_len"],
        max_num_seqs=asked["batch_size"],
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_lora=asked["adapter"] is not None,
        max_lora_rank=asked["rank"],
        **memory,
    )
    adapter = asked["adapter"] and LoRARequest("adapter", 1, asked["adapter"])
    sampling = [
        SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=asked["max_new_tokens"],
            stop_token_ids=asked["ends"],
            seed=seed,
            logprobs=0,
            detokenize=False,
        )
        for seed in asked["seeds"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    outputs = engine.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
    return [_answer(one.outputs[0]) for one in outputs]


def _answer(output: Any) -> dict[str, Any]:
    tokens = list(output.token_ids)
    steps = zip(tokens, output.logprobs, strict=True)
    return {"tokens": tokens, "log_probabilities": [step[token].logprob for token, step in steps]}


def main(asked: str, answered: str) -> None:
    """Answer one file with another."""
    # On a CPU vLLM takes a share of the memory for keys and values unless it is told.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    Path(answered).write_text(json.dumps(drawn(json.loads(Path(asked).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
