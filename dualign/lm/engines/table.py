"""The engines by name."""

from __future__ import annotations

from dualign.lm.engines import continuous, generate, refill, vllm_process
from dualign.lm.engines.interface import Engine
from dualign.params.base import EngineName

ENGINES: dict[EngineName, Engine] = {
    "generate": generate.answer,
    "refill": refill.answer,
    "continuous": continuous.answer,
    "vllm": vllm_process.answer,
}
