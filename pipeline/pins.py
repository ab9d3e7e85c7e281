"""Bring constraints.txt up to date: the newest releases that pyproject.toml allows.

    python -m pipeline.pins [--keep torch] [--folder .scratch/pins]

Makes an environment, installs this repository there without constraints.txt but for the packages to
keep, writes what was installed into constraints.txt, and runs the tests there. What changed is told
line by line; `git checkout constraints.txt` takes it back."""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROG = "python -m pipeline.pins"
ROOT = Path(__file__).resolve().parents[1]
#: What an environment has of itself, and the project.
_OWN = {"pip", "dualign"}

logger = logging.getLogger(__name__)


def pins(text: str) -> dict[str, str]:
    """Versions by package of a file of pins, or of what `pip freeze` prints; the build of a version
    (`+cpu`) is the machine's own.

    >>> pins("# a comment\\ntorch==2.13.0+cpu\\n-e /here")
    {'torch': '2.13.0'}
    """
    found = re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.MULTILINE)
    return {name: version for name, version in found if name.lower() not in _OWN}


def renewed(text: str, found: Mapping[str, str]) -> str:
    """A file of pins with these in place of its own; comments at its head stay."""
    head = [line for line in text.splitlines() if line.startswith("#")]
    known = {canonical(name): name for name in pins(text)}
    named = {known.get(canonical(name), name): version for name, version in found.items()}
    lines = sorted((f"{name}=={version}" for name, version in named.items()), key=str.lower)
    return "\n".join([*head, *lines]) + "\n"


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """A line for each package whose pin changes."""
    for name in sorted({*old, *new}, key=str.lower):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name, 'new')} -> {new.get(name, 'no longer needed')}"


def canonical(name: str) -> str:
    """The name under which package indexes know it: `ruamel.yaml` and `ruamel_yaml` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _install(folder: Path, kept: Sequence[str]) -> Path:
    """An environment with the newest releases; returns its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--editable", ".[test,dev]", *kept]
    subprocess.run(install, cwd=ROOT, check=True)
    return python


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the status of the tests."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--keep", nargs="*", default=["torch"], help="(default: torch)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".scratch/pins", help="environment")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="(default: all)")
    given = parser.parse_args(argv)
    file = ROOT / "constraints.txt"
    old = pins(file.read_text())
    python = _install(given.folder, [f"{name}=={old[name]}" for name in given.keep])
    freeze = [str(python), "-m", "pip", "freeze", "--all"]
    frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    file.write_text(renewed(file.read_text(), pins(frozen)))
    for line in changes(old, pins(file.read_text())):
        logger.info("%s", line)
    tests = [str(python), "-m", "pytest", "-q", *given.tests]
    return subprocess.run(tests, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
