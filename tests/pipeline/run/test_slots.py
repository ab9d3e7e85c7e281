"""GPUs are handed out once each, and no more stages run than there are places."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.run.slots import Slots, visible_gpus


def test_every_gpu_is_in_one_hand_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    slots = Slots(["g0", "g1", "g2"], jobs=1)
    held = set[str]()
    most = []
    mutex = threading.Lock()

    def work(count: int) -> None:
        for _ in range(50):
            with slots.take(count) as environment:
                mine = set(environment["CUDA_VISIBLE_DEVICES"].split(","))
                with mutex:
                    assert len(mine) == count and not mine & held
                    held.update(mine)
                    most.append(len(held))
                with mutex:
                    held.difference_update(mine)

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 200 and max(most) == 3


def test_a_stage_without_gpu_sees_none_and_waits_for_a_place_only() -> None:
    slots = Slots(["g0"], jobs=1)
    waiting = threading.Event()
    with slots.take(1, pytest.fail), slots.take(0, pytest.fail) as environment:
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        second = threading.Thread(target=lambda: slots.take(0, waiting.set).__enter__())
        second.start()
        assert waiting.wait(10)
        second.join(0.1)
        assert second.is_alive()
    second.join(10)
    assert not second.is_alive()


def test_slots_are_handed_out_in_the_order_in_which_they_were_asked_for() -> None:
    slots = Slots(["g0", "g1"], jobs=1)
    order = list[str]()
    threads: list[threading.Thread] = []

    def ask(name: str, gpus: int) -> None:
        waiting = threading.Event()

        def work() -> None:
            with slots.take(gpus, waiting.set):
                order.append(name)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        assert waiting.wait(10)

    with slots.take(0):
        with slots.take(1):
            ask("both", 2)
            ask("one", 1)  # there is a GPU for it, but it came later
            for i in range(20):
                ask(f"place {i}", 0)
        threads[1].join(10)
        assert order == ["both", "one"]
    for thread in threads:
        thread.join(10)
    assert order == ["both", "one", *(f"place {i}" for i in range(20))]


def test_without_gpus_all_stages_share_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Slots([], jobs=1).take(1) as environment:
        assert environment == {}
    with Slots([], jobs=2).take(8) as environment:
        assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_the_gpus_are_those_of_the_environment_else_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-a\necho GPU-b\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_gpus() == ("3", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ("GPU-a", "GPU-b")
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert visible_gpus() == ()
