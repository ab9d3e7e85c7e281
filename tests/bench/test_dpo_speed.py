"""The laboratory of the DPO step: what it counts, and that all sides take the same steps."""

from __future__ import annotations

from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from bench import dpo_speed
from bench.dpo_speed import Settings, measure, medians, page, pairs_of, tokens, work
from dualign.core.errors import DualignError
from dualign.lm.flops import ModelSize, size_of
from dualign.lm.models import build_scratch, load_tokenizer, save
from dualign.params.models import ScratchParams
from dualign.training.pairwise import Pair
from tests.tiny import llama

PAIR = Pair([1] * 3, [2] * 2, [3] * 5, 0.0, 0.0)


def test_the_work_of_a_step_by_hand() -> None:
    shape = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 6}
    size = size_of(llama(**shape, num_hidden_layers=3, num_key_value_heads=1))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 6
    assert size == ModelSize(3 * layer, 0, 80, True, 3, 8)
    expected = 6 * 3 * layer * (5 + 8) + 6 * 80 * (2 + 5) + 6 * 3 * 8 * (5**2 + 8**2)
    assert work(size, [PAIR]) == pytest.approx(expected / 1e9)


def test_tokens_with_padding_without_and_with_each_prompt_once() -> None:
    other = Pair([1] * 4, [2] * 1, [3] * 1, 0.0, 0.0)
    assert tokens([PAIR, other]) == {"padded": 32, "real": 23, "once": 16}


def test_medians_compare_step_by_step() -> None:
    def row(ours: float, theirs: float, loss: float) -> dict[str, Any]:
        sides = {"ours": (ours, 0.5), "best": (theirs, loss)}
        return {
            name: {"processor": spent, "clock": 2 * spent, "loss": loss}
            for name, (spent, loss) in sides.items()
        }

    taken = [row(1.0, 2.0, 0.5), row(2.0, 8.0, 0.75), row(1.0, 3.0, 0.5)]
    found = medians("best", 4, [6.0, 8.0, 6.0], taken)
    assert found["processor"] == 3.0 and found["pairs_per_second"] == pytest.approx(4 / 6)
    assert (found["times"], found["least_times"]) == (3.0, 2.0)
    assert found["gflops"] == 2.0 and found["loss_apart"] == 0.25


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(DualignError, match=r"--data '.*nowhere' is no folder; name one"):
        pairs_of(Settings(data=str(tmp_path / "nowhere")))
    with pytest.raises(DualignError, match="--precision 'fp8' is neither fp32 nor bf16"):
        Settings(precision="fp8")
    with pytest.raises(DualignError, match="--against 'us' is neither trl nor parts"):
        Settings(against="us")


def test_a_side_whose_process_ended_is_named() -> None:
    talk, other = Pipe()
    other.close()
    with pytest.raises(DualignError, match="best: its process ended"):
        dpo_speed._answered("best", talk, 0)


def test_results_are_named_for_what_is_unusual() -> None:
    assert dpo_speed._changed(Settings(batch=2)) == []
    assert dpo_speed._changed(Settings(precision="bf16", against="parts")) == ["parts", "bf16"]


@pytest.mark.bench
@pytest.mark.slow
@pytest.mark.parametrize("against", ["trl", "parts"])
def test_all_sides_take_the_same_steps(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: str
) -> None:
    """A small model and real rows, in processes of their own: equal losses to 1e-5."""
    monkeypatch.setattr(dpo_speed, "_SQUARE", 64)
    tokenizer = load_tokenizer(real_data / "tokenizers" / "smollm2")
    shape = ScratchParams(
        tokenizer="train",
        vocab_size=49152,
        hidden_size=128,
        layers=1,
        heads=2,
        intermediate_size=64,
        context=1024,
    )
    save(build_scratch(shape, tokenizer, 0), tokenizer, tmp_path / "base")
    given = Settings(
        base=str(tmp_path / "base"),
        data=str(real_data),
        batch=2,
        steps=2,
        tokens=256,
        rate=1e-4,
        against=against,
    )
    found = measure(given)
    for rows in found["sources"].values():
        assert max(side["loss_apart"] for side in rows["sides"].values()) < 1e-5
        assert len({step["ours"]["loss"] for step in rows["steps"]}) == 2
        assert rows["tokens"]["once"] < rows["tokens"]["real"] < rows["tokens"]["padded"]
    assert all(parts["matrix products"] > 0 for parts in found["profile"].values())
    text = page(given, found)
    assert "\n| optimiser |" in text
    assert all(text.count(f"\n| {title} |") == 2 for title in given.sides.values())
    assert min(found["peak_gib"].values()) > 0.1


def test_operations_of_the_profiler_are_told_apart() -> None:
    kinds = {
        "aten::mm": "matrix products",
        "mkldnn::_linear_pointwise": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::_efficient_attention_forward": "attention",
        "aten::_flash_attention_backward": "attention",
        "aten::mul": "all else",
    }
    assert {name: dpo_speed.kind_of(name) for name in kinds} == kinds
