"""The command `dualign` as it is installed, in a checkout and elsewhere; and what a wheel holds."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dualign.command import COMMANDS, PIPELINE, main

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (
    "import sys\nfrom importlib.metadata import entry_points\n"
    + "sys.exit(entry_points(group='console_scripts', name='dualign')['dualign'].load()())\n"
)
#: A stage that tells where it runs, with which library, and what it was told.
HELLO = """
import json, pathlib, sys
import dualign
if __name__ == "__main__":
    folder = str(pathlib.Path.cwd())
    told = {"arguments": sys.argv[1:], "folder": folder, "library": dualign.__file__}
    pathlib.Path("told.json").write_text(json.dumps(told))
    sys.exit(3)
"""
STAGE = """
stages:
  write:
    cmd: python -c "import sys; open('written', 'w').write(sys.executable)"
    outs: [written]
"""
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that setuptools makes of this tree."""
    place = tmp_path_factory.mktemp("tree")
    hidden = shutil.ignore_patterns("__pycache__")
    for room in ("dualign", "pipeline", "stages", "params"):
        shutil.copytree(ROOT / room, place / room, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, place / name)
    subprocess.run(
        [sys.executable, "-c", BUILD, "dist"], cwd=place, check=True, capture_output=True
    )
    return next((place / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds that wheel, and a script as pip writes it."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    (place / "bin").mkdir()
    (place / "bin" / "dualign").write_text(SCRIPT)
    return place


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the code and params of this one, and stages of its own."""
    root = tmp_path / "checkout"
    (root / "stages").mkdir(parents=True)
    (root / "docs").mkdir()
    for room in ("pipeline", "dualign", "params", "params.yaml"):
        (root / room).symlink_to(ROOT / room)
    (root / "stages" / "__init__.py").touch()
    (root / "stages" / "hello.py").write_text(HELLO)
    (root / "dvc.yaml").write_text(STAGE)
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], cwd=root, check=True
    )
    return root


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    place = tmp_path / "empty"
    place.mkdir()
    return place


def dualign(
    site: Path, folder: Path, *arguments: str, given: str = "", beside: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The installed command, run in a folder; Python finds what lies `beside` it too."""
    path = os.pathsep.join(map(str, filter(None, [site, beside])))
    environment = {**os.environ, "PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(site / "bin" / "dualign"), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )


# --- what is installed ----------------------------------------------------------------------------


def test_a_wheel_holds_the_library_its_types_and_its_files(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [
        path
        for path in (ROOT / "dualign").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= held
    assert "dualign/py.typed" in held
    assert {name.split("/")[0] for name in held} == {
        "dualign",
        next(n for n in held if "METADATA" in n).split("/")[0],
    }


# --- anywhere -------------------------------------------------------------------------------------


def test_help_lists_every_command_in_a_line(site: Path, elsewhere: Path) -> None:
    told = dualign(site, elsewhere, "--help")
    assert told.returncode == 0 and not told.stderr
    for name, command in COMMANDS.items():
        assert re.search(
            rf"^ +{name} +{re.escape(command.about)}$", told.stdout, flags=re.MULTILINE
        ), name
    bare = dualign(site, elsewhere)
    assert bare.returncode == 2 and bare.stderr == told.stdout


def test_the_version_is_that_of_the_package(site: Path, elsewhere: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert dualign(site, elsewhere, "--version").stdout == f"dualign {declared}\n"


@pytest.mark.parametrize(
    ("name", "hint"), [("pland", "did you mean plan?"), ("xyz", "one of repro, preset, plan, ")]
)
def test_a_slip_is_told_in_one_line(site: Path, elsewhere: Path, name: str, hint: str) -> None:
    told = dualign(site, elsewhere, name)
    assert told.returncode == 2 and not told.stdout
    assert (
        told.stderr.startswith(f"dualign {name}: no such command; {hint}")
        and told.stderr.count("\n") == 1
    )


def test_an_option_that_there_is_not(site: Path, elsewhere: Path) -> None:
    told = dualign(site, elsewhere, "--verion")
    assert told.returncode == 2 and "unrecognized arguments: --verion" in told.stderr


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.of_project])
def test_a_command_of_a_project_says_where_to_run_it(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(elsewhere)
    assert importlib.import_module("dualign.command").main([name]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(f"dualign {name}: {elsewhere} lies in no checkout of dualign")
        and told.count("\n") == 1
    )


def test_certificates_are_verified_anywhere(site: Path, elsewhere: Path) -> None:
    told = dualign(site, elsewhere, "certify", "verify", "here")
    assert (
        told.returncode == 1
        and told.stdout.startswith("here: holds no certificate")
        and not told.stderr
    )
    assert dualign(site, elsewhere, "certify", "--help").stdout.startswith(
        "usage: dualign certify "
    )


def test_a_reader_that_has_enough_is_no_fault(repo_root: Path) -> None:
    """As of `dualign completion bash | head`; nor is it told as success, which it may not be."""
    command = [sys.executable, "-m", "dualign", "completion", "bash"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=repo_root, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


class Interrupting(io.RawIOBase):
    """A standard input at which somebody presses Ctrl-C."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        raise KeyboardInterrupt


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Interrupting())))
    assert main(["params"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_params_are_checked_anywhere(site: Path, elsewhere: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    assert dualign(site, elsewhere, "params", given=text).returncode == 0
    told = dualign(site, elsewhere, "params", "mine", given=text.replace("\nseed:", "\nsede:"))
    assert (
        told.returncode == 2 and told.stderr.startswith("mine: ") and told.stderr.count("\n") == 1
    )


# --- in a checkout --------------------------------------------------------------------------------


def test_plan_and_repro_from_a_folder_below(site: Path, checkout: Path) -> None:
    assert (
        dualign(site, checkout / "docs", "plan").stdout.splitlines()[0] == "write  stale  never run"
    )
    done = dualign(site, checkout / "docs", "repro", "--quiet")
    assert done.returncode == 0, done.stderr
    assert (checkout / "written").read_text() == sys.executable  # though it does not lead PATH
    assert dualign(site, checkout, "plan").stdout == "1 of 1 stages are up to date\n"


def test_the_code_is_that_of_the_checkout_though_python_finds_another(
    site: Path, checkout: Path
) -> None:
    (checkout / "pipeline").unlink()
    (checkout / "pipeline").mkdir()
    (checkout / "pipeline" / "__init__.py").touch()
    (checkout / "pipeline" / "__main__.py").write_text("main = lambda argv, prog: len(argv) + 40\n")
    assert dualign(site, checkout / "docs", "plan", "a", beside=ROOT).returncode == 42


def test_repro_refuses_params_that_no_stage_takes(site: Path, checkout: Path) -> None:
    (checkout / "params.yaml").unlink()
    (checkout / "params.yaml").write_text("seed: -1\n")
    refused = dualign(site, checkout, "repro")
    assert refused.returncode == 2 and refused.stderr.startswith("params.yaml: ")
    assert not (checkout / "written").exists()
    (checkout / "params.yaml").unlink()
    (checkout / "params.yaml").write_bytes(b"\xff")
    refused = dualign(site, checkout, "repro")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    (checkout / "params.yaml").unlink()
    assert "lacks params.yaml" in dualign(site, checkout, "repro").stderr


def test_options_are_those_of_the_command_under_the_one_name(site: Path, checkout: Path) -> None:
    assert dualign(site, checkout, "run", "--help").stdout.startswith(
        "usage: dualign run [-h] [--stage S]"
    )
    wrong = dualign(site, checkout, "run", "--stge", "write")
    assert wrong.returncode == 2 and "dualign" in wrong.stderr and "--stge" in wrong.stderr
    unknown = dualign(site, checkout, "run", "--stage", "wirte")
    assert unknown.returncode == 2 and "did you mean write?" in unknown.stderr
    assert dualign(site, checkout, "preset", "smollm2-cpo").stderr.endswith(
        "did you mean params/smollm2-cpu.yaml?\n"
    )


def test_a_stage_runs_in_the_checkout_with_its_library(site: Path, checkout: Path) -> None:
    assert dualign(site, checkout / "docs", "stage", "hello", "item", "--flag").returncode == 3
    told = json.loads((checkout / "told.json").read_text())
    assert told["arguments"] == ["item", "--flag"] and told["folder"] == str(checkout)
    assert told["library"] == str(checkout / "dualign" / "__init__.py")
    slip = dualign(site, checkout, "stage", "helo")
    assert (slip.returncode, slip.stderr) == (
        2,
        "dualign stage helo: no such stage; did you mean hello?\n",
    )
    assert (
        dualign(site, checkout, "stage").stderr
        == "usage: dualign stage NAME ...; NAME is one of hello\n"
    )


# --- completion -----------------------------------------------------------------------------------

ASK = (
    'source "$0"; COMP_WORDS=(dualign "$@"); COMP_CWORD=$#; _shtab_dualign; echo "${COMPREPLY[@]}"'
)


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    answer = subprocess.run(
        ["bash", "-c", ASK, str(script), *words],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(answer.stdout.split())


@pytest.fixture(scope="module")
def scripts(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Path]]:
    """Completion for bash, printed in a checkout and outside of one."""
    place = tmp_path_factory.mktemp("completion")
    for name, folder in (("inside", ROOT), ("outside", place)):
        made = dualign(site, folder, "completion", "bash")
        assert made.returncode == 0, made.stderr
        (place / name).write_text(made.stdout)
    (place / "reports").mkdir()
    yield {name: place / name for name in ("inside", "outside")}


def test_completion_knows_commands_options_and_files(scripts: Mapping[str, Path]) -> None:
    inside = scripts["inside"]
    assert completed(inside, "") >= set(COMMANDS)
    assert {"--stage", "--set", "--cluster"} <= completed(inside, "run", "--")
    assert {"verify", "sign"} <= completed(inside, "certify", "")
    assert "reports" in completed(inside, "certify", "verify", "rep")
    assert completed(inside, "stage", "rew") == {"reward_dpo", "reward_model"}
    assert completed(inside, "deploy", "--type", "ku") == {"kubernetes"}


def test_completion_outside_of_a_checkout_has_the_library(scripts: Mapping[str, Path]) -> None:
    outside = scripts["outside"]
    assert completed(outside, "") >= set(COMMANDS)
    assert "--rescore" in completed(outside, "certify", "verify", "--")
    assert "--stage" not in completed(outside, "run", "--")


def test_completion_is_quick(repo_root: Path) -> None:
    code = (
        "import sys; from dualign.completion import main; main(['zsh']); "
        "sys.exit(str([m for m in ('torch', 'prefect') if m in sys.modules]))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert made.stderr.strip() == "[]" and made.stdout.startswith("#compdef dualign")


# --- the table ------------------------------------------------------------------------------------


def test_the_table_has_every_command_of_the_pipeline_as_it_calls_it() -> None:
    parser = importlib.import_module(PIPELINE).parser()
    told = next(
        action for action in parser._actions if isinstance(action.choices, dict)
    )._choices_actions
    ours = {name: command.about for name, command in COMMANDS.items() if command.module == PIPELINE}
    assert ours == {choice.dest: choice.help for choice in told}


def test_every_command_has_a_main_that_takes_its_name() -> None:
    for command in COMMANDS.values():
        if not command.scripts:
            main = importlib.import_module(command.module).main
            assert "prog" in inspect.signature(main).parameters, command.module
