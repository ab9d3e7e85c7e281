"""Choose the parameters of the next run: make params.yaml a preset, written out whole.

    python -m pipeline.dvc.preset params/real-rows-cpu.yaml --data ../rows
    python -m pipeline.dvc.preset default

`default` is the params.yaml of the last commit. A params.yaml that you edited is never lost: the
command refuses, or, with --force, keeps it as params.yaml.saved. Params that no stage would take do
not replace those that are there."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.dvc import locks
from pipeline.dvc.checkout import asked
from pipeline.dvc.overlay import differences, whole
from pipeline.dvc.parameters import replace_file, span
from pipeline.errors import PipelineError

PROG = "python -m pipeline.dvc.preset"
ROOT = Path(__file__).resolve().parents[2]
#: A copy of what was chosen last: the preset itself may have changed since.
LAST = Path(".scratch/params.yaml")
#: Characters of a value that are shown.
_SHOWN = 80
_REMARK = re.compile(r"(?:^|\s)#\s*(.*\S)", re.MULTILINE)

logger = logging.getLogger(__name__)


def select(preset: str, data: str | None = None, force: bool = False, root: Path = ROOT) -> None:
    """Make `root`/params.yaml a copy of a preset, with `prepare.folder` set to `data` if given.

    `preset` is a path, the name of a file in params/ with or without its suffix, or `default`. A
    relative `data` is relative to `root`.

    Raises:
        PipelineError: no such preset, or one that no stage would take; no such folder;
            params.yaml holds the user's own edits and `force` is not set; or a DVC command works
            here.
    """
    text = _preset_text(preset, root)
    if data is not None:
        if not (root / data).is_dir():
            raise PipelineError(
                f"{data}: no such folder; --data takes the folder that holds the data files"
            )
        text = _with_folder(text, data, preset)
    if refused := _refusal(text, preset, root):
        raise PipelineError(refused)
    locks.check_free(root)
    target = root / "params.yaml"
    if target.exists() and is_edited(_text(target), root):
        if not force:
            raise PipelineError(
                "params.yaml holds your own edits; copy it into params/ under a name of its own, "
                f"or have it kept as params.yaml.saved: {PROG} {shlex.quote(preset)} --force"
            )
        logger.info("params.yaml held your own edits: kept as %s", _save(target).name)
    for path in (target, root / LAST):
        replace_file(path, text)
    logger.info("params.yaml is now %s%s", preset, f" with prepare.folder {data}" if data else "")
    for key, value in _differences(preset, root).items():
        logger.info("  %s", _line(key, value))


def _preset_text(preset: str, root: Path) -> str:
    if preset == "default":
        committed = _committed(root)
        if committed is None:
            raise PipelineError("default: there is no commit with a params.yaml to go back to")
        return committed
    path = _preset_file(preset, root)
    if path is not None:
        return whole(path)
    names = {"default": "default", **{path.stem: f"params/{path.name}" for path in _presets(root)}}
    near = difflib.get_close_matches(Path(preset).stem, names, n=1, cutoff=0.5)
    hint = f"did you mean {names[near[0]]}?" if near else f"one of {', '.join(names.values())}"
    raise PipelineError(f"{preset}: no such preset; {hint}")


def _preset_file(preset: str, root: Path) -> Path | None:
    places = (root / preset, root / "params" / preset, root / "params" / f"{preset}.yaml")
    return next((path for path in places if path.is_file()), None)


def _differences(preset: str, root: Path) -> dict[str, Any]:
    """What a preset changes of the file that it extends; nothing for a whole one."""
    path = None if preset == "default" else _preset_file(preset, root)
    return {} if path is None else differences(path)


def _line(key: str, value: Any) -> str:
    """A key and its value on one line, long ones cut."""
    text = json.dumps(value, ensure_ascii=False)
    return f"{key}: {text}" if len(text) <= _SHOWN else f"{key}: {text[:_SHOWN]}..."


def check_change(before: str, after: str, root: Path) -> None:
    """Raise PipelineError for new values that no stage takes.

    Where none took the params before either, it is for the stages to say what is wrong."""
    refused = _refusal(after, "params.yaml", root)
    if refused and not _refusal(before, "params.yaml", root):
        raise PipelineError(refused)


def _refusal(text: str, name: str, root: Path) -> str:
    """What the library says against these params, or nothing; asked as a command, since it must not
    be imported here.
    """
    checked = subprocess.run(
        [sys.executable, "-m", "dualign.params.loading", name],
        cwd=root,
        input=text.encode(errors="replace"),
        capture_output=True,
        check=False,
    )
    if checked.returncode == 0:
        return ""
    said = checked.stderr.decode(errors="replace").strip().splitlines()
    unchecked = f"{name}: cannot be checked; python -m dualign.params.loading does not run"
    return said[-1] if said else unchecked


def _whole(path: Path) -> str:
    """What a file in params/ is written out as; its own text where it cannot be."""
    try:
        return whole(path)
    except PipelineError:
        return _text(path)


def _text(path: Path) -> str:
    """The text of a file of the user's, whatever it holds."""
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}); remove it") from None


def _presets(root: Path) -> list[Path]:
    return sorted((root / "params").glob("*.yaml"))


def _committed(root: Path) -> str | None:
    """params.yaml as of the last commit; None outside of git, or where no commit has it."""
    shown = asked(root, "show", "HEAD:./params.yaml")
    return shown.stdout if shown.returncode == 0 else None


def is_edited(text: str, root: Path) -> bool:
    """Whether `text` is neither committed, nor a preset, nor the last choice, folder aside."""
    own = _without_folder(text)
    return own not in map(_without_folder, _known(root)) and not _rewritten(own, root)


def _rewritten(own: str, root: Path) -> bool:
    """Whether a text says what the last choice or the commit does: `dvc exp run -S` writes
    params.yaml anew in a layout of its own, with all values and remarks.
    """
    last = root / LAST
    known = (_text(last) if last.is_file() else "", _committed(root) or "")
    return any(_said(_without_folder(other)) == _said(own) for other in known)


def _said(text: str) -> tuple[Any, list[str]]:
    """The values and the remarks of a parameter file; of one that cannot be read its text."""
    try:
        return yaml_text.load(text), _REMARK.findall(text)
    except PipelineError:
        return text, []


def _known(root: Path) -> Iterator[str]:
    """The texts that params.yaml may be without being the user's own, likely ones first."""
    yield _committed(root) or ""
    for path in filter(Path.is_file, (root / LAST, *_presets(root))):
        yield _whole(path)


def _without_folder(text: str) -> str:
    place = span(text, "prepare.folder")
    return text[: place[0]] + text[place[1] :] if place else text


def _with_folder(text: str, folder: str, name: str) -> str:
    place = span(text, "prepare.folder")
    if place is None:
        raise PipelineError(f"{name}: it has no key prepare.folder to hold --data")
    return text[: place[0]] + json.dumps(folder, ensure_ascii=False) + text[place[1] :]


def _save(path: Path) -> Path:
    """Copy a file to the first free of NAME.saved, NAME.saved.2, ..."""
    names = itertools.chain(
        [f"{path.name}.saved"], (f"{path.name}.saved.{n}" for n in itertools.count(2))
    )
    saved = next(place for name in names if not (place := path.with_name(name)).exists())
    shutil.copy2(path, saved)
    return saved


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of this command."""
    made = argparse.ArgumentParser(prog=prog, description="Make params.yaml a copy of a preset.")
    made.add_argument(
        "preset", help="a file in params/, a path, or `default`: the params.yaml of the last commit"
    )
    made.add_argument(
        "--data", metavar="FOLDER", help="set prepare.folder, the folder that holds the data files"
    )
    made.add_argument(
        "--force",
        action="store_true",
        help="replace an edited params.yaml, keeping it as params.yaml.saved",
    )
    return made


def main(argv: list[str] | None = None, root: Path = ROOT, prog: str = PROG) -> int:
    """The command, called `prog`; returns its exit status."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parser(prog).parse_args(argv)
    try:
        select(arguments.preset, arguments.data, arguments.force, root)
    except PipelineError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
