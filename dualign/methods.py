"""Every method is a row of one table; nothing else distinguishes them.

| column   | choices                                                                              |
|----------|--------------------------------------------------------------------------------------|
| inner    | `safety`: DPO on safety pairs, coefficient beta / lambda to pi_r; `lagrangian`:      |
|          | joint labels sigma(Delta r - lambda Delta c), coefficient beta to pi_ref (label mode |
|          | and weights: in params); `policy_gradient`: REINFORCE on r - lambda c of its own     |
|          | answers, from pi_ref                                                                 |
| rule     | how the next multiplier is found (see `dualign.search.policy`)                       |
| data     | `safety_pairs`; these and `fresh_pairs` of every policy against the reference;       |
|          | `scored_pairs`; the `pool` of reference samples; or its `prompts` alone              |
| returns  | the `last` policy; the `best`: the most rewarding one within the limit; the          |
|          | `mixture` of all; or one trained at the `tail_average`, the mean of the last half of |
|          | the multipliers                                                                      |
| warm     | whether each training goes on from the policy before, or starts at the reference     |
| cost     | what the rule goes by: scores of the cost `model`, or binary `feedback`              |
| target   | the cost that the rule steers to: the `limit`, or below it by the safety `margin` of |
|          | the dual                                                                             |

A row of `methods` in params names a method, where it starts and its reference, and may replace the
last five columns and the rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dualign.core.errors import ParamsError
from dualign.params.search import CostSource, MethodName, MethodRow, Returns, Rule, Target

#: Rules that train again and again, each time at a multiplier that the cost of the policy before
#: asks for.
ITERATIVE = ("dual_gradient", "projected_subgradient", "newton")
#: Rules that each inner loss can follow: the safety loss divides by lambda, so its multipliers must
#: stay off zero; a policy gradient moves lambda itself.
_RULES = {
    "safety": ("grid", "one_shot", "projected_subgradient"),
    "lagrangian": ("grid", "one_shot", *ITERATIVE),
    "policy_gradient": ("ascent",),
}
#: Methods with rules of their own: a merge trains nothing, and a round of comparisons is PD-DPO's.
#: Ours merges two policies of lambda_path, or its start and pi_r.
_ONLY = {
    "p_sacpo": ("merge",),
    "o_pd_dpo": ("projected_subgradient",),
    "dualign": (*_RULES["lagrangian"], "merge"),
}
#: Where the policy at the first multiplier may lie.
_STARTS = {
    "safety": ["safety_dpo/...", "safety_path/..."],
    "lagrangian": ["lagrangian_dpo/..."],
    "policy_gradient": ["sft"],
}


@dataclass(frozen=True)
class Method:
    """One published method, or ours. `source` is where it is described."""

    name: MethodName
    title: str
    source: str
    inner: Literal["safety", "lagrangian", "policy_gradient"]
    rule: Rule
    data: Literal["safety_pairs", "fresh_pairs", "scored_pairs", "pool", "prompts"]
    returns: Returns
    warm: bool = False
    cost: CostSource = "model"
    target: Target = "limit"


_SACPO = "2404.11049"
_C_DPO = "2403.02475"
_PD_DPO = "2510.05703"
_CAN = "2405.19544"
_CAID = "2505.19387"
_RLHF = "2310.12773"
_OURS = "docs/methods.md"
_TABLE = (
    Method("sacpo", "SACPO", _SACPO, "safety", "grid", "safety_pairs", "best"),
    Method("p_sacpo", "P-SACPO", _SACPO, "safety", "merge", "safety_pairs", "best"),
    Method("c_dpo", "C-DPO", _C_DPO, "lagrangian", "dual_gradient", "scored_pairs", "best"),
    Method("pd_dpo", "PD-DPO", _PD_DPO, "safety", "projected_subgradient", "safety_pairs", "last"),
    Method(
        "o_pd_dpo", "O-PD-DPO", _PD_DPO, "safety", "projected_subgradient", "fresh_pairs", "last"
    ),
    Method("mocan", "MoCAN", _CAN, "lagrangian", "one_shot", "scored_pairs", "last"),
    Method("pecan", "PeCAN", _CAN, "lagrangian", "one_shot", "scored_pairs", "last"),
    Method("caid", "CAID", _CAID, "lagrangian", "dual_gradient", "scored_pairs", "last", warm=True),
    Method("safe_rlhf", "Safe RLHF", _RLHF, "policy_gradient", "ascent", "prompts", "last"),
    Method("dualign", "dualign (ours)", _OURS, "lagrangian", "newton", "pool", "best", warm=True),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


@dataclass(frozen=True)
class Plan:
    """A row of params with its method's defaults; `start`, `reference` lie in models/."""

    name: str
    method: Method
    start: str
    reference: str

    @property
    def title(self) -> str:
        """The method's title, with the row's name where that is not the method's own."""
        title = self.method.title
        return title if self.name == self.method.name else f"{title} ({self.name})"


def plan(name: str, row: MethodRow) -> Plan:
    """The row `methods.NAME` over the table. Raises ParamsError for a key that does not fit."""
    keys = ("rule", "warm", "returns", "cost", "target")
    options = {key: value for key in keys if (value := getattr(row, key)) is not None}
    method = replace(METHODS[row.method], **options)
    problems = _problems(method, row)
    if problems:
        raise ParamsError(f"methods.{name}.{problems[0]}")
    return Plan(name, method, row.start, row.reference)


def _problems(method: Method, row: MethodRow) -> list[str]:
    """Each key that does not go with the others, and why."""
    rules = _ONLY.get(method.name, _RULES[method.inner])
    starts = list(_STARTS[method.inner])
    if method.inner == "safety" and method.rule == "one_shot":
        # Safety first, then helpfulness: no other multiplier can be trained from there.
        starts.append("reward_dpo/...")
    if method.inner == "lagrangian" and method.rule == "merge":
        starts = ["lambda_path/...", "lagrangian_dpo/..."]
    iterates = method.rule in ITERATIVE
    checks = {
        "rule": (
            method.rule in rules,
            f"{method.rule!r} does not go with {method.name}; one of {', '.join(rules)}",
        ),
        "start": (
            row.start.partition("/")[0] in [start.partition("/")[0] for start in starts],
            f"{row.start!r} is not where {method.name} starts; one of {', '.join(starts)}",
        ),
        "reference": _reference(method, row),
        "returns": (
            iterates or method.returns in ("last", "best"),
            f"{method.returns!r} needs a rule that trains again and again, not {method.rule!r};"
            " last or best",
        ),
        "warm": (
            not row.warm or iterates or method.rule == "grid",
            f"rule {method.rule!r} trains nothing that could go on from the policy before;"
            " leave it out",
        ),
        "cost": (
            method.cost == "model" or method.rule not in ("one_shot", "ascent"),
            f"rule {method.rule!r} does not go by this cost, so labels would be spent on"
            " nothing; leave it out",
        ),
        "target": (
            method.target == "limit" or method.rule not in ("one_shot", "ascent"),
            f"rule {method.rule!r} does not steer by measured costs; leave it out",
        ),
    }
    needed = {
        "feedback": method.cost == "feedback",
        "online": method.data == "fresh_pairs",
        "policy_gradient": method.inner == "policy_gradient",
    }
    for key, needs in needed.items():
        why = "is missing; docs/methods.md shows its keys"
        if not needs:
            why = f"{method.name} with cost {method.cost!r} does not read it; leave it out"
        checks[key] = ((getattr(row, key) is not None) == needs, why)
    return [f"{key}: {problem}" for key, (holds, problem) in checks.items() if not holds]


def _reference(method: Method, row: MethodRow) -> tuple[bool, str]:
    """Whether the reference goes with the start, and what to name if not."""
    if method.inner == "policy_gradient":
        return (
            row.reference == "sft",
            f"{row.reference!r} is not where {method.name} starts, its reference; name sft",
        )
    if method.inner == "lagrangian" and method.rule == "merge":
        holds = row.reference.startswith(("lambda_path/", "reward_dpo/"))
        return (
            holds,
            f"{row.reference!r} is no policy to merge with; name lambda_path/... or reward_dpo/...",
        )
    swapped = row.start.startswith("reward_dpo")
    problem = (
        f"{row.reference!r} is no safe policy; a start in reward_dpo/ goes on from one in"
        " safety_dpo/... or safety_path/..."
    )
    return not swapped or row.reference.startswith(("safety_dpo/", "safety_path/")), problem
