"""What `bench.engine` runs with vLLM's own Python: draw answers to prompts of token ids, and say
how each one ended.

PYTHON bench/vllm_side.py POLICY ASKED.json ANSWERED.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(policy: str, asked: str, answered: str) -> None:
    """Sample at temperature 1 with nothing said about where to stop: that is in the policy's own
    folder.
    """
    given = json.loads(Path(asked).read_text())
    engine = LLM(policy, dtype="float32", max_model_len=1024, enforce_eager=True)
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_tokens=given["max_new_tokens"], seed=7, logprobs=0
    )
    drawn = engine.generate([{"prompt_token_ids": ids} for ids in given["ids"]], sampling)
    tokenizer = engine.get_tokenizer()
    rows = []
    for turns, one in zip(given["prompts"], drawn, strict=True):
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        answer = one.outputs[0]
        rows.append(
            {
                "prompt": tokenizer.encode(rendered, add_special_tokens=False),
                "ids": list(answer.token_ids),
                "ended": answer.finish_reason == "stop",
                "logp": answer.cumulative_logprob,
            }
        )
    Path(answered).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
