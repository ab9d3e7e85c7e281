"""Every method is a row of one table; nothing else distinguishes them.

| column    | choices                                                                                            |
|-----------|----------------------------------------------------------------------------------------------------|
| inner     | `safety`: DPO on safety pairs, coefficient beta / lambda to pi_r; `lagrangian`: joint labels       |
|           | sigma(Delta r - lambda Delta c), coefficient beta to pi_ref (label mode and weights: in params)    |
| reference | the model whose log-probabilities are the reference column                                         |
| start     | the folder of the policy at the first multiplier, trained by the stage before                      |
| rule      | how the next multiplier is found (see `dualign.search`)                                            |
| data      | `safety_pairs`, `scored_pairs`, or the `pool` of reference samples                                 |
| returns   | `last` policy, or the `best`: the most rewarding one within the limit                              |
| warm      | whether each training goes on from the policy before, or starts at the reference                   |
| before    | trainings that its start took in the stages before (counted in its budget)                         |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dualign.core.errors import ParamsError
from dualign.core.params import MethodName, MethodRow

Rule = Literal["grid", "dual_gradient", "projected_subgradient", "one_shot", "newton", "merge"]


@dataclass(frozen=True)
class Method:
    """One published method, or ours. `source` is where it is described."""

    name: MethodName
    title: str
    source: str
    inner: Literal["safety", "lagrangian"]
    reference: Literal["sft", "reward_dpo/helpful"]
    start: str
    rule: Rule
    data: Literal["safety_pairs", "scored_pairs", "pool"]
    returns: Literal["last", "best"]
    warm: bool
    before: int


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "sacpo",
            "SACPO",
            "2404.11049",
            "safety",
            "reward_dpo/helpful",
            "safety_dpo/stepwise",
            "grid",
            "safety_pairs",
            "best",
            False,
            2,
        ),
        Method(
            "p_sacpo",
            "P-SACPO",
            "2404.11049",
            "safety",
            "reward_dpo/helpful",
            "safety_dpo/stepwise",
            "merge",
            "safety_pairs",
            "best",
            False,
            2,
        ),
        Method(
            "c_dpo",
            "C-DPO",
            "2403.02475",
            "lagrangian",
            "sft",
            "lagrangian_dpo/bernoulli",
            "dual_gradient",
            "scored_pairs",
            "best",
            False,
            1,
        ),
        Method(
            "pd_dpo",
            "PD-DPO",
            "2510.05703",
            "safety",
            "reward_dpo/helpful",
            "safety_dpo/stepwise",
            "projected_subgradient",
            "safety_pairs",
            "last",
            False,
            2,
        ),
        Method(
            "mocan",
            "MoCAN",
            "2405.19544",
            "lagrangian",
            "sft",
            "lagrangian_dpo/bernoulli",
            "one_shot",
            "scored_pairs",
            "last",
            False,
            1,
        ),
        Method(
            "dualign",
            "dualign (ours)",
            "docs/methods.md",
            "lagrangian",
            "sft",
            "lagrangian_dpo/anchored",
            "newton",
            "pool",
            "best",
            True,
            1,
        ),
    )
}


def method(name: str, row: MethodRow) -> Method:
    """The table's row; the params row must agree with it. Raises ParamsError naming the key."""
    if name not in METHODS:
        raise ParamsError(f"methods.{name}: no such method; one of {', '.join(METHODS)}")
    found = METHODS[name]
    for key, given, expected in (("start", row.start, found.start), ("reference", row.reference, found.reference)):
        if given != expected:
            raise ParamsError(f"methods.{name}.{key} is {given!r}; this method needs {expected!r}")
    return found
