"""Model soups: the mean weights of trainings that differ in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualign.training.run import Job, Metrics
from dualign.training.soup import soup
from tests.tiny import on_cpu, short_training


def job_in(folder: Path) -> Job:
    return Job(short_training(), on_cpu(), folder / "scratch", seed=7)


class Trainer:
    """Saves weights that its seed draws; breaks off before its training number `stops`."""

    def __init__(self, stops: int | None = None) -> None:
        self.seeds: list[int] = []
        self.names: list[str] = []
        self.stops = stops

    def __call__(self, job: Job, out: Path) -> Metrics:
        if len(self.seeds) == self.stops:
            raise KeyboardInterrupt
        self.seeds.append(job.seed)
        self.names.append(job.name)
        (job.scratch / "checkpoint-2").mkdir(parents=True)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        save_file(drawn(job.seed), out / "model.safetensors", metadata={"format": "pt"})
        rows = [{"step": step, "loss": float(job.seed + step)} for step in (1, 2)]
        sums = {"trainings": 2, "generated_tokens": 5}
        return {"steps": 2, "loss": rows[-1]["loss"], "losses": rows, **sums}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_soup_is_the_mean_of_its_members(tmp_path: Path, count: int) -> None:
    trainer = Trainer()
    told = soup(count, trainer, job_in(tmp_path), tmp_path / "out")

    assert trainer.seeds[0] == 7 and len(set(trainer.seeds)) == count
    expected = torch.stack([drawn(seed)["weight"] for seed in trainer.seeds]).double().mean(0)
    found = load_file(tmp_path / "out/model.safetensors")["weight"]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)

    mean = sum(trainer.seeds) / count
    assert told["losses"] == [{"step": 1, "loss": mean + 1}, {"step": 2, "loss": mean + 2}]
    assert (told["steps"], told["loss"]) == (2, mean + 2)
    assert (told["trainings"], told["generated_tokens"]) == (2 * count, 5 * count)


def test_seeds_of_members_are_apart_from_those_of_other_runs(tmp_path: Path) -> None:
    """A second training of a member has the seed after its own, a run of the next seed too."""
    trainer = Trainer()
    soup(3, trainer, job_in(tmp_path), tmp_path / "out")
    assert min(abs(seed - 7) for seed in trainer.seeds[1:]) > 100


def test_a_soup_that_was_interrupted_trains_no_member_twice(tmp_path: Path) -> None:
    soup(3, Trainer(), job_in(tmp_path / "whole"), tmp_path / "whole/out")
    job = job_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        soup(3, Trainer(stops=2), job, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    again = Trainer()
    soup(3, again, job, tmp_path / "out")
    assert len(again.seeds) == 1
    whole = (tmp_path / "whole/out/model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole


def test_members_have_names_of_their_own_and_leave_no_checkpoints(tmp_path: Path) -> None:
    """Logs and trackers tell them apart, and a disk holds the checkpoints of one of them."""
    trainer = Trainer()
    soup(2, trainer, job_in(tmp_path), tmp_path / "out")
    assert trainer.names == ["member-0 training", "member-1 training"]
    assert not list(tmp_path.rglob("checkpoint-*"))
    alone = Trainer()
    soup(1, alone, job_in(tmp_path / "one"), tmp_path / "one/out")
    assert alone.names == ["training"]
