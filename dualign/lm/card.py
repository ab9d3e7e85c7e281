"""The model card of an aligned policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualign.core.records import SearchResult, SearchStep
from dualign.params.search import DualSearchParams

if TYPE_CHECKING:
    from dualign.methods import Plan

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [dualign, dpo, safety]
---
"""
MODEL = "Load with `AutoModelForCausalLM.from_pretrained`; the tokenizer holds the chat template."
_MIXTURE = """\
This is a mixture: each answer comes from one component, drawn by the weights in `mixture.json`.
In dualign `policy_at(FOLDER, load_resources())` (`dualign.lm.mixture`, `dualign.params.loading`) \
loads it and
`dualign.lm.sampling.sample` draws from it. Elsewhere draw a component yourself; each folder \
`component-*` loads with
`AutoModelForCausalLM.from_pretrained`, and its tokenizer holds the chat template."""


def model_card(plan: Plan, search: SearchResult, params: DualSearchParams) -> str:
    """README.md of a policy's folder: what it is, how it was found, what was measured."""
    step = search.steps[search.chosen]
    mixture = step.closing and plan.method.returns == "mixture"
    return f"""{HEAD}
# {plan.title}

Aligned by dualign: expected reward as high as possible, less {params.beta:g} times the KL \
divergence to the reference
policy, with expected cost at most {params.limit:g} (cost above 0 is unsafe). \
Method: {plan.method.title} ({plan.method.source}).

| on the search prompts | |
|---|---|
| {"mean multiplier of the components" if mixture else "multiplier lambda"} | {step.lam:.4f} |
{_costs(step, search, params)}
| reward | {step.reward:.4f} (standard error {step.reward_se:.4f}) |
| KL to the reference | {step.kl:.4f} |
| share of answers scored unsafe | {step.p_unsafe:.4f} |
| trainings, generated tokens | {search.trainings}, {search.generated_tokens} |

These are the scores of learned reward and cost models, not of people, on prompts that the search \
used. Held-out figures
are in the report. {_MIXTURE if mixture else MODEL}
"""


def _costs(step: SearchStep, search: SearchResult, params: DualSearchParams) -> str:
    """The row of the cost that the search went by; by labels, a second of the model's."""
    kept = "feasible: no limit is" if search.feasible else "NOT feasible: a limit is"
    verdict = f"{kept} exceeded by more than {params.z:g} standard errors"
    row = f"{step.cost:.4f} (standard error {step.cost_se:.4f}), {verdict} |"
    if step.model_cost is None:
        return f"| cost | {row}"
    model = (
        f"| cost by the cost model | {step.model_cost:.4f} (standard error"
        f" {step.model_cost_se:.4f}) |"
    )
    return f"| cost by {search.labels} safety labels | {row}\n{model}"
