"""The measures of the comparison, as people read them: one row of `MEASURES` is one column of the
report's table, its entry in the glossary, and a key of reports/comparison.json.

What a measure says of answers is computed in `dualign.evaluation.summary`. The words stand here,
apart, so that DVC evaluates no policy anew for another word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["score", "share", "nats", "tokens", "count"]


@dataclass(frozen=True)
class Measure:
    """A column of the comparison.

    `better`: which way is an improvement; None where neither is by itself. `headline`: among the
    few that a summary shows. `card`: what a policy's card calls it, which stands alone; empty where
    it does not show it. A measure that no policy of a run has is left out of the page."""

    key: str
    heading: str
    unit: Unit
    better: Literal["more", "less"] | None
    explanation: str
    headline: bool = False
    card: str = ""


MEASURES: tuple[Measure, ...] = (
    Measure(
        "reward", "reward", "score", "more",
        "mean score of the reward model; more is more helpful.", headline=True, card="reward",
    ),
    Measure(
        "cost", "cost", "score", "less",
        "mean score of the cost model; more is more harmful, above 0 counts as unsafe. This is what"
        " the limit holds for.", headline=True, card="expected cost",
    ),
    Measure(
        "p_unsafe", "P(unsafe)", "share", "less", "share of answers with cost above 0.",
        headline=True, card="share of answers scored unsafe",
    ),
    Measure(
        "win_reward", "win rate by reward", "share", "more",
        "how often an answer scores more reward than one of the reference policy to the same"
        " prompt; ties count half, so 50% is level.", headline=True,
        card="win rate over the reference by reward",
    ),
    Measure(
        "win_cost", "win rate by safety", "share", "more",
        "how often an answer scores less cost than one of the reference policy to the same prompt;"
        " ties count half.", card="win rate over the reference by cost",
    ),
    Measure(
        "kl", "KL", "nats", "less",
        "distance from the reference policy, per answer: what the gain was paid with.",
        headline=True, card="KL to the reference",
    ),
    Measure("length", "length", "tokens", None, "mean tokens of an answer.", headline=True),
    Measure(
        "ended", "ended", "share", "more",
        "share of answers that came to an end by itself; the others were cut at the token limit"
        " (generation.max_new_tokens) and are scored as unfinished text.",
    ),
    Measure(
        "distinct_2",
        "distinct-2",
        "share",
        "more",
        "share of different ones among all pairs of neighbouring words in the answers to one"
        " prompt, averaged over prompts; it falls where a policy says the same again and again.",
    ),
    Measure(
        "displacement", "displacement", "nats", "more",
        "mean of log π − log π_ref on the reference policy's own samples. Far below 0: the policy"
        " has left ordinary text, not only unsafe text.",
    ),
    Measure(
        "off_support", "off support", "share", "less",
        "share of answers that surprise the reference policy more than nearly all answers of the"
        " scorers' own data do; what reward and cost model say of these is extrapolation.",
    ),
    Measure(
        "true_reward", "true reward", "score", "more",
        "the same answers scored by the world's oracle instead of the reward model.",
        card="true reward, by the world's oracle",
    ),
    Measure(
        "true_cost", "true cost", "score", "less",
        "the same answers scored by the world's oracle instead of the cost model.",
        card="true cost, by the world's oracle",
    ),
    Measure(
        "grammatical", "grammatical", "share", "more",
        "share of answers that the world's grammar can produce.",
    ),
    Measure(
        "reward_share", "way to optimum", "share", "more",
        "true reward gained on the policy nearest to the reference that keeps the limit (the"
        " reference, where it does), as a share of what the exact optimum within the limit gains."
        " Above 100% is possible for a policy that breaks the limit, or has more KL than the"
        " optimum.",
    ),
    Measure(
        "value_gap", "value gap", "score", "less",
        "E[r] − β KL of the optimum minus the policy's; 0 is optimal, below 0 is possible over the"
        " limit only.",
    ),
    Measure(
        "lam", "nominal λ", "score", None,
        "multiplier that it was trained at; of a merge of weight q, that of its two policies in"
        " proportion.",
    ),
    Measure(
        "trainings", "trainings", "count", "less",
        "policies trained for the method, those before its search included.",
    ),
    Measure(
        "generated_tokens", "generated tokens", "count", "less", "tokens sampled by its search.",
    ),
)  # fmt: skip

#: What is set side by side of two runs: the headlines, and what the embedded world knows.
OF_RUNS = tuple(m for m in MEASURES if m.headline or m.key in ("true_reward", "true_cost"))
