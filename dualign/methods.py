"""Every method is a row of one table; nothing else distinguishes them.

| column    | choices                                                                                            |
|-----------|----------------------------------------------------------------------------------------------------|
| inner     | `safety`: DPO on safety pairs, coefficient beta / lambda to pi_r; `lagrangian`: joint labels       |
|           | sigma(Delta r - lambda Delta c), coefficient beta to pi_ref (label mode and weights: in params)    |
| rule      | how the next multiplier is found (see `dualign.search`)                                            |
| data      | `safety_pairs`, `scored_pairs`, or the `pool` of reference samples                                 |
| returns   | the `last` policy; the `best`: the most rewarding one within the limit; the `mixture` of all; or   |
|           | one trained at the `tail_average`, the mean of the last half of the multipliers                    |
| warm      | whether each training goes on from the policy before, or starts at the reference                   |
| cost      | what the rule goes by: scores of the cost `model`, or binary `feedback`                            |

A row of `methods` in params names a method, where it starts and its reference, and may replace the last four columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dualign.core.errors import ParamsError
from dualign.core.params import CostSource, MethodName, MethodRow, Returns, Rule

#: Rules that train again and again, each time at a multiplier that the cost of the policy before asks for.
ITERATIVE = ("dual_gradient", "projected_subgradient", "newton")
#: Rules that each inner loss can follow: the safety loss divides by lambda, so its multipliers must stay off zero.
_RULES = {
    "safety": ("grid", "one_shot", "projected_subgradient"),
    "lagrangian": ("grid", "one_shot", *ITERATIVE),
}


@dataclass(frozen=True)
class Method:
    """One published method, or ours. `source` is where it is described."""

    name: MethodName
    title: str
    source: str
    inner: Literal["safety", "lagrangian"]
    rule: Rule
    data: Literal["safety_pairs", "scored_pairs", "pool"]
    returns: Returns
    warm: bool = False
    cost: CostSource = "model"


_SACPO, _CAN = "2404.11049", "2405.19544"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sacpo", "SACPO", _SACPO, "safety", "grid", "safety_pairs", "best"),
        Method("p_sacpo", "P-SACPO", _SACPO, "safety", "merge", "safety_pairs", "best"),
        Method("c_dpo", "C-DPO", "2403.02475", "lagrangian", "dual_gradient", "scored_pairs", "best"),
        Method("pd_dpo", "PD-DPO", "2510.05703", "safety", "projected_subgradient", "safety_pairs", "last"),
        Method("mocan", "MoCAN", _CAN, "lagrangian", "one_shot", "scored_pairs", "last"),
        Method("pecan", "PeCAN", _CAN, "lagrangian", "one_shot", "scored_pairs", "last"),
        Method("caid", "CAID", "2505.19387", "lagrangian", "dual_gradient", "scored_pairs", "last", warm=True),
        Method("dualign", "dualign (ours)", "docs/methods.md", "lagrangian", "newton", "pool", "best", warm=True),
    )
}


@dataclass(frozen=True)
class Plan:
    """A row of params with its method's defaults filled in. `start` and `reference` are folders under models/."""

    name: str
    method: Method
    start: str
    reference: str

    @property
    def title(self) -> str:
        """The method's title, with the row's name where that is not the method's own."""
        return self.method.title if self.name == self.method.name else f"{self.method.title} ({self.name})"


def plan(name: str, row: MethodRow) -> Plan:
    """The row `methods.NAME` over the table. Raises ParamsError naming the key that does not go with the others."""
    options = {key: value for key in ("rule", "warm", "returns", "cost") if (value := getattr(row, key)) is not None}
    method = replace(METHODS[row.method], **options)
    problems = _problems(method, row)
    if problems:
        raise ParamsError(f"methods.{name}.{problems[0]}")
    return Plan(name, method, row.start, row.reference)


def _problems(method: Method, row: MethodRow) -> list[str]:
    """Each key that does not go with the others, and why."""
    rules = ("merge",) if method.name == "p_sacpo" else _RULES[method.inner]
    stages = {"safety": ["safety_dpo"], "lagrangian": ["lagrangian_dpo"]}[method.inner]
    if method.inner == "safety" and method.rule == "one_shot":
        stages.append("reward_dpo")  # safety first, then helpfulness: nothing can be retrained at another multiplier
    iterates = method.rule in ITERATIVE
    checks = {
        "rule": (method.rule in rules, f"{method.rule!r} does not go with {method.name}; one of {', '.join(rules)}"),
        "start": (
            row.start.partition("/")[0] in stages,
            f"{row.start!r} is not trained with the loss of {method.name}; one of {'/..., '.join(stages)}/...",
        ),
        "reference": (
            not row.start.startswith("reward_dpo") or row.reference.startswith("safety_dpo/"),
            f"{row.reference!r} is no safe policy; a start in reward_dpo/ goes on from one in safety_dpo/...",
        ),
        "returns": (
            iterates or method.returns in ("last", "best"),
            f"{method.returns!r} needs a rule that trains again and again, not {method.rule!r}; last or best",
        ),
        "warm": (
            not row.warm or iterates or method.rule == "grid",
            f"rule {method.rule!r} trains nothing that could go on from the policy before; leave it out",
        ),
        "cost": (
            method.cost == "model" or method.rule != "one_shot",
            "rule 'one_shot' looks at no cost, so labels would be spent on nothing; leave it out",
        ),
    }
    return [f"{key}: {problem}" for key, (holds, problem) in checks.items() if not holds]
