"""Whole checkpoints: each ends with a manifest; one that does not match it is passed over."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dualign.core.artifacts import sha256, write_json
from dualign.core.ranks import by_one, gathered, rank

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
#: How many checkpoints of a run stay, so that one is there while the next is written, or found to
#: be torn.
_KEPT = 2
_NAME = re.compile("checkpoint-([0-9]+)")


class Sealing(TrainerCallback):
    """Seals every checkpoint once all else of it is on the disk, and then removes older ones."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir))
        with by_one() as mine:  # all have written their part of it
            if not (mine and state.is_world_process_zero):
                return
            seal(folder / f"checkpoint-{state.global_step}")
            for old in _newest_first(folder)[_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the manifest, size and SHA-256 of every file, once these are on the disk."""
    for file in _files(folder):
        _sync(file)
    write_json(folder / MANIFEST, {_named(file, folder): _facts(file) for file in _files(folder)})
    _sync(folder / MANIFEST)
    _sync(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; newer ones that are not are told of and removed."""
    (found,) = gathered([_last_whole(folder)] if rank() == 0 else [])
    return found


def _last_whole(folder: Path) -> Path | None:
    for path in _newest_first(folder):
        why = fault(path)
        if why is None:
            return path
        log.warning("%s is passed over and removed: %s", path, why)
        shutil.rmtree(path, ignore_errors=True)
    return None


def fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None where it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        facts = {_named(file, folder): file for file in _files(folder)}
        differ = sorted(manifest.keys() ^ facts.keys())
        if differ:
            return f"{differ[0]} is {'missing' if differ[0] in manifest else 'no part of it'}"
        changed = next(
            (name for name, file in facts.items() if manifest[name] != _facts(file)), None
        )
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, AttributeError):
        return f"its {MANIFEST} cannot be read, or a file that it names"
    return None if changed is None else f"{changed} is not as it was written"


def _newest_first(folder: Path) -> list[Path]:
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _named(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
