"""The files for GPUs of clouds, read by the tools' own parsers where these are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

POOLS = Path(__file__).resolve().parents[1] / "pools"


def test_skypilot_reads_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = pytest.importorskip("sky")
    monkeypatch.chdir(POOLS.parent)
    task = sky.Task.from_yaml(str(POOLS / "skypilot.yaml"))
    accelerators = [one.accelerators for one in task.resources]
    assert sorted(accelerators, key=str) == [{"A100": 1}, {"A10G": 1}, {"L4": 1}]
    assert task.envs == {"PARAMS": "params/smollm2-gpu.yaml"}
    assert "make repro" in task.run


def test_dstack_reads_its_task() -> None:
    configurations = pytest.importorskip("dstack._internal.core.models.configurations")
    content = YAML(typ="safe", pure=True).load(POOLS / "dstack.yml")
    task = configurations.parse_run_configuration(content)
    assert task.type == "task"
    assert task.resources.gpu.memory.min == 24
    assert task.env.as_dict() == {"PARAMS": "params/smollm2-gpu.yaml"}
    assert task.commands[-1] == 'make repro PARAMS="$PARAMS"'
