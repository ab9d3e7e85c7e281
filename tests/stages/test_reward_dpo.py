"""reward_dpo on a tiny model: each loss from each reference, SafeDPO's table and offset, MODPO's
margin.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dualign.core.artifacts import read_json, write_parquet
from dualign.core.errors import DataError, ParamsError
from dualign.core.schema import HELPFUL_PAIRS
from dualign.lm.models import load_policy
from dualign.lm.sampling import log_probabilities
from dualign.params.base import Resources
from dualign.params.loading import load
from dualign.params.training import RewardDpoParams, RewardRun
from dualign.stage import Run
from dualign.training.pairwise import Pair
from stages.reward_dpo import PAIRS, main, training_pairs

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {
    "batch_size": 8,
    "max_steps": 2,
    "max_length": 128,
    "learning_rate": 2e-3,
    "warmup": 0.0,
}
BETA = 0.5

pytestmark = pytest.mark.usefixtures("one_thread", "workspace")


def run_of(resources: Resources, **changes: Any) -> Run[RewardDpoParams]:
    """The run `it` with these changes, two steps of all eight pairs."""
    params = load(RewardDpoParams, ROOT / "params.yaml")
    spec = RewardRun(**{**params.runs["helpful"].model_dump(), **changes})
    training = params.training.model_copy(update=TRAINING)
    return Run(
        "reward_dpo",
        "it",
        params.model_copy(update={"beta": BETA, "runs": {"it": spec}, "training": training}),
        resources,
    )


def pairs_of(run: Run[RewardDpoParams], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    spec = run.params.runs["it"]
    return training_pairs(
        run, spec, load_policy(f"models/{spec.reference}", run.resources), tokenizer
    )


def logps(
    name: str, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> torch.Tensor:
    """Log-probabilities of first and second answers under a policy, each alone; shape [2,
    pairs].
    """
    prompts = [p.prompt for p in pairs] * 2
    answers = [p.first for p in pairs] + [p.second for p in pairs]
    policy = load_policy(f"models/{name}", resources)
    return log_probabilities(policy, tokenizer, prompts, answers, batch_size=1).reshape(2, -1)


def columns(pairs: list[Pair]) -> torch.Tensor:
    return torch.tensor(
        [[p.ref_first for p in pairs], [p.ref_second for p in pairs]], dtype=torch.float64
    )


def losses() -> list[float]:
    """The loss at each step of the run."""
    return [row["loss"] for row in read_json("reports/curves/reward_dpo/it.json")]


@pytest.mark.parametrize("reference", ["sft", "safety_dpo/alone"])
@pytest.mark.parametrize(
    ("loss_type", "first"),
    [("dpo", math.log(2)), ("robust", math.log(2)), ("ipo", 1.0), ("kto", 0.5)],
)
def test_a_run_starts_at_logit_zero_from_its_own_reference(
    resources: Resources, reference: str, loss_type: str, first: float
) -> None:
    """The first loss is that of log-ratio 0; then it falls, and the policy is no longer its
    reference.
    """
    options = {"epsilon": 0.1} if loss_type == "robust" else {}
    main(run_of(resources, reference=reference, loss_type=loss_type, **options))
    before, after = losses()
    assert before == pytest.approx(first, rel=1e-4) and after < before - 1e-3
    trained, started = (
        load_policy(f"models/{name}", resources) for name in ("reward_dpo/it", reference)
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(trained.parameters(), started.parameters(), strict=True)
    )


def test_a_run_by_a_loss_without_a_reference_tells_its_option(resources: Resources) -> None:
    main(run_of(resources, loss_type="simpo", gamma=0.5))
    metrics = read_json("reports/metrics/reward_dpo/it.json")
    assert (metrics["loss_type"], metrics["gamma"], metrics["clip"]) == ("simpo", 0.5, None)
    before, after = losses()
    assert after < before - 1e-3


def test_a_clip_changes_the_policy_and_the_search_is_told(resources: Resources) -> None:
    """The first step is the same, since the clip is the identity at 0; the second is not."""
    curves = []
    for clip in (None, 0.01):
        main(run_of(resources, clip=clip))
        metrics = read_json("reports/metrics/reward_dpo/it.json")
        assert (metrics["reference"], metrics["loss_type"], metrics["clip"]) == ("sft", "dpo", clip)
        assert (metrics["margin"], metrics["safe_offset"]) == ("sft", None)
        curves.append(losses())
    assert (
        curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)
        and abs(curves[0][1] - curves[1][1]) > 1e-3
    )


def test_the_reference_of_the_other_order_is_the_safe_policy(
    resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = pairs_of(run_of(resources, reference="safety_dpo/alone"), tokenizer)
    assert len(pairs) == 8
    assert torch.allclose(
        columns(pairs), logps("safety_dpo/alone", pairs, tokenizer, resources), atol=1e-3
    )
    assert not torch.allclose(columns(pairs), logps("sft", pairs, tokenizer, resources), atol=1e-1)


@pytest.mark.parametrize("reference", ["sft", "safety_dpo/alone"])
def test_a_margin_policy_is_folded_into_the_columns(
    resources: Resources, tokenizer: PreTrainedTokenizerBase, reference: str
) -> None:
    run = run_of(resources, reference=reference, margin="safety_dpo/alone", margin_weight=2.5)
    pairs = pairs_of(run, tokenizer)
    own, base, margin = (
        logps(name, pairs, tokenizer, resources) for name in (reference, "sft", "safety_dpo/alone")
    )
    assert torch.allclose(columns(pairs), own + 2.5 * (margin - base), atol=1e-2)
    main(run)
    first = losses()[0]
    gap = (
        -BETA * 2.5 * ((margin - base)[0] - (margin - base)[1])
    )  # the logits of the policy that it starts from
    assert first == pytest.approx(float(torch.nn.functional.softplus(-gap).mean()), rel=1e-3)


def test_safe_dpo_trains_on_the_transformed_table_with_its_offset(
    resources: Resources, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of the eight pairs one lacks flags and one has two unsafe answers; one is swapped; three are
    mixed.
    """
    run = run_of(resources, safe_offset=4.0)
    plain = pairs_of(run_of(resources), tokenizer)
    pairs = pairs_of(run, tokenizer)
    given = [(p.first, p.second) for p in plain]
    kept = [given[0], given[1], given[2][::-1], *given[4:7]]
    assert [(p.first, p.second) for p in pairs] == kept
    shift = columns(pairs) - logps("sft", pairs, tokenizer, resources)
    expected = torch.tensor([[0, 8, 8, 0, 0, 8], [0] * 6], dtype=torch.float64)  # Delta / beta
    assert torch.allclose(shift, expected, atol=1e-3)
    main(run)
    first = losses()[0]
    assert first == pytest.approx((math.log(2) + math.log1p(math.exp(4))) / 2, rel=1e-3)


def test_safe_dpo_needs_flags(resources: Resources, tokenizer: PreTrainedTokenizerBase) -> None:
    frame = pd.read_parquet(PAIRS).assign(chosen_is_safe=None, rejected_is_safe=None)
    write_parquet(PAIRS, frame, HELPFUL_PAIRS)
    with pytest.raises(DataError) as caught:
        main(run_of(resources, safe_offset=4.0))
    message = str(caught.value)
    assert "helpful_pairs.parquet" in message and "reward_dpo.runs.it.safe_offset" in message
    assert (
        "prepare.helpful" in message
        and "set safe_offset to null" in message
        and "\n" not in message
    )
    assert (
        len(pairs_of(run_of(resources), tokenizer)) == 8
    )  # without the offset no flag is asked for


def test_an_unknown_run_is_named(resources: Resources) -> None:
    run = run_of(resources)
    run.item = "nobody"
    with pytest.raises(ParamsError, match=r"reward_dpo\.runs has no 'nobody'; one of it"):
        main(run)
