"""A checkpoint is whole or passed over: whatever of it is damaged, the run ends with the bytes of
one left in peace.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dualign.core.errors import TrainingError
from dualign.data import world
from dualign.lm.models import build_scratch, train_tokenizer
from dualign.training import run, supervised
from dualign.training.checkpoints import MANIFEST, fault, last_checkpoint, seal
from dualign.training.run import Job
from tests.tiny import TINY, on_cpu, short_training
from tests.training.conftest import same

SCRATCH = TINY.model_copy(update={"context": 64})
ANSWERS = [answer.text for answer in world.answers(world.prompts()[0])]
#: What a checkpoint of the Trainer on one CPU holds.
FILES = (
    "chat_template.jinja config.json generation_config.json manifest.json model.safetensors"
    " optimizer.pt rng_state.pth scheduler.pt tokenizer.json tokenizer_config.json"
    " trainer_state.json training_args.bin"
).split()

pytestmark = pytest.mark.usefixtures("one_thread")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def braces(file: Path) -> None:
    file.write_text("{}")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(ANSWERS, 300)


def job_in(scratch: Path) -> Job:
    """Six steps of two rows, a checkpoint at every other."""
    training = short_training(
        batch_size=2,
        learning_rate=1e-2,
        adam_beta2=0.999,
        warmup=0.25,
        schedule="cosine",
        max_length=60,
        max_steps=6,
    )
    return Job(
        training,
        on_cpu(
            micro_batch_size=None, gradient_checkpointing=False, checkpoint_steps=2, log_steps=1
        ),
        scratch,
        seed=3,
    )


def train(tokenizer: PreTrainedTokenizerBase, scratch: Path) -> dict[str, Tensor]:
    """The weights that a run in a scratch folder ends with."""
    model = build_scratch(SCRATCH, tokenizer, 0)
    rows = [([1, 2, 3], tokenizer(answer)["input_ids"]) for answer in ANSWERS[:12]]
    supervised.train_sft(model, tokenizer, rows, rows[:4], job_in(scratch))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Interruption(TrainerCallback):
    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 5:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    return train(tokenizer, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def interrupted(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The scratch folder of a run that was stopped after five steps, with the checkpoints of two
    and four.
    """
    scratch = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "Telling", lambda *_: Interruption())
        train(tokenizer, scratch)
    assert sorted(file.name for file in (scratch / "checkpoint-4").iterdir()) == FILES
    return scratch


@pytest.fixture
def scratch(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "scratch"))


@pytest.mark.parametrize(
    "damage", [cut, emptied, changed, braces, Path.unlink], ids=lambda damage: damage.__name__
)
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_damaged_file_is_not_whole(
    name: str, damage: Callable[[Path], None], scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(scratch / "checkpoint-4" / name)
    assert last_checkpoint(scratch) == scratch / "checkpoint-2"
    (record,) = caplog.records
    assert re.search(r"checkpoint-4 is passed over and removed: \S", record.getMessage())
    assert (name in record.getMessage() or name == MANIFEST) and "\n" not in record.getMessage()
    assert not (scratch / "checkpoint-4").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one_and_ends_with_the_same_bytes(
    name: str,
    scratch: Path,
    tokenizer: PreTrainedTokenizerBase,
    whole: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    emptied(scratch / "checkpoint-4" / name)
    with caplog.at_level(logging.INFO, logger="dualign"):
        assert same(train(tokenizer, scratch), whole)
    assert (
        f"checkpoint-4 is passed over and removed: {name} is not as it was written" in caplog.text
    )
    assert re.search(r"resuming from .*checkpoint-2", caplog.text)


def test_a_run_whose_checkpoints_are_all_torn_starts_afresh(
    scratch: Path,
    tokenizer: PreTrainedTokenizerBase,
    whole: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step in (2, 4):
        braces(
            scratch / f"checkpoint-{step}" / "trainer_state.json"
        )  # with no steps at all, it looked finished
    with caplog.at_level(logging.INFO, logger="dualign"):
        assert same(train(tokenizer, scratch), whole)
    assert "resuming" not in caplog.text and caplog.text.count("passed over") == 2


def test_what_is_no_checkpoint_is_left_alone(
    scratch: Path, tokenizer: PreTrainedTokenizerBase, whole: dict[str, Tensor]
) -> None:
    for name in ("checkpoint-old", "checkpoint-4-copy", "checkpoint-"):
        shutil.copytree(scratch / "checkpoint-2", scratch / name)
    assert same(train(tokenizer, scratch), whole)
    kept = {"checkpoint-4", "checkpoint-6", "checkpoint-old", "checkpoint-4-copy", "checkpoint-"}
    assert {path.name for path in scratch.iterdir() if path.is_dir()} == kept


def test_a_file_that_came_later_and_a_folder_without_a_manifest_are_told(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "weights").write_text("1")
    assert fault(folder) == f"it has no {MANIFEST}, which is written last"
    seal(folder)
    assert fault(folder) is None and last_checkpoint(tmp_path) == folder
    (folder / "more").touch()
    assert fault(folder) == "more is no part of it"


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_run_goes_on_later(
    scratch: Path, tokenizer: PreTrainedTokenizerBase, whole: dict[str, Tensor]
) -> None:
    (scratch / "checkpoint-6").touch()  # in its place
    with pytest.raises(
        TrainingError, match=r"a checkpoint cannot be written \(File exists.*run the stage again"
    ):
        train(tokenizer, scratch)
    (scratch / "checkpoint-6").unlink()
    assert same(train(tokenizer, scratch), whole)
