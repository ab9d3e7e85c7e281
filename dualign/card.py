"""The model card of an aligned policy."""

from __future__ import annotations

from typing import Any

from dualign.core.params import DualSearchParams
from dualign.methods import Method


def model_card(method: Method, search: dict[str, Any], params: DualSearchParams) -> str:
    """README.md of a policy folder: what it is, how it was found, and what was measured on the search prompts."""
    step = search["steps"][search["chosen"]]
    verdict = "within" if search["feasible"] else "NOT within"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [dualign, dpo, safety]
---

# {method.title}

Aligned by dualign: expected reward as high as possible, less {params.beta:g} times the KL divergence to the reference
policy, with expected cost at most {params.limit:g} (cost above 0 is unsafe). Method: {method.title} ({method.source}).

| on the search prompts | |
|---|---|
| multiplier lambda | {step["lam"]:.4f} |
| cost | {step["cost"]:.4f} (standard error {step["cost_se"]:.4f}), {verdict} the limit (z = {params.z:g}) |
| reward | {step["reward"]:.4f} (standard error {step["reward_se"]:.4f}) |
| KL to the reference | {step["kl"]:.4f} |
| share of answers scored unsafe | {step["p_unsafe"]:.4f} |
| trainings, generated tokens | {search["trainings"]}, {search["generated_tokens"]} |

These are the scores of learned reward and cost models, not of people, on prompts that the search used. Held-out figures
are in the report. Load with `AutoModelForCausalLM.from_pretrained`; the tokenizer holds the chat template.
"""
