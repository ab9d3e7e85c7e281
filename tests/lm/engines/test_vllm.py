"""vLLM itself, where $DUALIGN_VLLM_PYTHON names a Python that has it: the engine's contract, in a
process of its own and behind `vllm serve`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from bench.ports import free_port
from dualign.core.errors import ModelError, ParamsError
from dualign.core.schema import user
from dualign.lm.engines.vllm_process import environment, folders, is_plain
from dualign.lm.models import build_scratch, load_policy, save
from dualign.lm.sampling import Draws, draw
from dualign.lm.tokens import encode_prompts
from dualign.params.base import Resources
from dualign.params.loading import load_resources
from tests.tiny import DEVICES, TINY
from tests.vllm import PYTHON, has_vllm, serving

ROOT = Path(__file__).resolve().parents[3]
#: Heads of 32 and more are those that vLLM has on a CPU.
SCRATCH = TINY.model_copy(update={"hidden_size": 64, "layers": 2, "intermediate_size": 96})
QUESTIONS = ["How do I cook the rice at home?", "Why?", "How do I poison the pond with my kids?"]
WANTED = Draws(8, 24, 3)

pytestmark = [pytest.mark.usefixtures("one_thread")]


def resources(**others: object) -> Resources:
    own = load_resources(ROOT / "params.yaml").model_dump()
    own |= {"device": "cpu", "precision": "fp32", "engine": "vllm", "sampling_batch_size": 8}
    return Resources(**(own | others))


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return encode_prompts(tokenizer, [user(question) for question in QUESTIONS])


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy whose generation_config.json asks for another distribution."""
    folder = tmp_path_factory.mktemp("base")
    model = build_scratch(SCRATCH, tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.5
    model.generation_config.top_k = 5
    save(model, tokenizer, folder)
    return folder


def adapted(base: Path, **options: object) -> PeftModel:
    model = load_policy(base, resources())
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    policy = get_peft_model(model, LoraConfig(**(config | options)))
    policy.peft_config["default"].base_model_name_or_path = str(base)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    return policy


def test_an_adapter_is_sampled_on_its_base_and_merged_where_vllm_has_no_room(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plain = adapted(base)
    assert is_plain(plain)
    policy, adapter = folders(plain, tokenizer, tmp_path / "plain")
    assert policy == base and adapter is not None
    other = adapted(base, use_dora=True)
    assert not is_plain(other)
    merged, none = folders(other, tokenizer, tmp_path / "other")
    assert none is None
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        found = load_policy(merged, resources())(input_ids=ids).logits
        assert torch.allclose(found, other(input_ids=ids).logits, atol=1e-3)
    with pytest.raises(ParamsError, match="more than plain LoRA"):
        draw(other, tokenizer, [[5]], WANTED, resources(engine_url="http://127.0.0.1:9/v1"))


def test_a_worker_of_one_of_several_processes_looks_for_no_others() -> None:
    """Its own process group begins, as vLLM's does; torch takes the launcher's variables for a
    store of the launcher's, and waits for it."""
    code = f"""
import datetime, torch.distributed as d
d.init_process_group("gloo", init_method="tcp://127.0.0.1:{free_port()}", rank=0, world_size=1,
                     timeout=datetime.timedelta(seconds=2))
"""
    launched = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "sft",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
    }
    given = {**os.environ, **launched}
    for variables, begins in ((given, False), (environment(given, torch.device("cpu")), True)):
        done = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, check=False
        )
        assert (done.returncode == 0) == begins, done.stderr


def test_a_worker_sees_the_gpu_of_its_process_alone() -> None:
    second = torch.device("cuda", 1)
    assert environment({}, second)["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, second)["CUDA_VISIBLE_DEVICES"] == (
        "GPU-b"
    )
    assert environment({"A": "1"}, torch.device("cuda"))["CUDA_VISIBLE_DEVICES"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, torch.device("cpu"))


@has_vllm
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [False, True])
def test_vllm_draws_from_the_policy_itself(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    lora: bool,
    device: str,
) -> None:
    """The check holds log-probabilities and draws against ours; temperature 0.5 of the folder's own
    settings would fail it.
    """
    own = resources(engine_python=PYTHON, device=device)
    policy = (adapted(base) if lora else load_policy(base, own)).to(device)
    drawn = draw(policy, tokenizer, prompts, WANTED, own)
    assert [one.prompt for one in drawn] == [row // 8 for row in range(24)]
    assert all(one.ended or len(one.tokens) == 24 for one in drawn)
    assert len({tuple(one.tokens) for one in drawn}) > 12


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vllm serve` on loopback."""
    log = tmp_path_factory.mktemp("log") / "serve.log"
    lora = ("--enable-lora", "--max-lora-rank", "8")
    with serving(base, log, *lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as url:
        yield url


@has_vllm
@pytest.mark.slow
def test_a_server_draws_from_the_policy_itself(
    server: str, base: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Whole weights and an adapter on them; other weights are refused, whether it can be seen from
    their folder or not.
    """
    own = resources(engine_url=server)
    policy = load_policy(base, own)
    drawn = draw(policy, tokenizer, prompts, WANTED, own)
    assert [one.prompt for one in drawn] == [row // 8 for row in range(24)]
    assert drawn == draw(policy, tokenizer, prompts, WANTED, own)
    assert len(draw(adapted(base), tokenizer, prompts, WANTED, own)) == 24
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.3)
    with pytest.raises(ModelError, match="nats off ours"):
        draw(policy, tokenizer, prompts, WANTED, own)
    policy.name_or_path = "/elsewhere"
    with pytest.raises(ParamsError, match="the policy is /elsewhere; start `vllm serve"):
        draw(policy, tokenizer, prompts, WANTED, own)
