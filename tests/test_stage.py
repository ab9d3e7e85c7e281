"""What surrounds a stage: exit codes, one line per error, provenance, and scratch folders that are
found again.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dualign import stage
from dualign.core.artifacts import read_json
from dualign.core.errors import AwaitingLabels, DataError, DualignError
from dualign.declared import data_of
from dualign.params.base import StageParams
from dualign.params.dual import DualInitParams
from dualign.params.evaluate import EvaluateParams
from dualign.params.loading import load, load_resources
from dualign.params.search import DualSearchParams
from dualign.params.training import SafetyDpoParams
from dualign.stage import Run, execute, finished
from pipeline.dvc.parameters import assign

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with params.yaml; what a stage does about signals is put back afterwards."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUALIGN_SCRATCH", raising=False)
    monkeypatch.setattr(stage, "AGAIN", 0.1)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    }
    yield tmp_path
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def a_run(item: str | None = None, **updates: object) -> Run[DualInitParams]:
    return Run("dual_init", item, load(DualInitParams).model_copy(update=updates), load_resources())


def test_a_stage_that_ends_writes_where_its_numbers_come_from(folder: Path) -> None:
    def main(run: Run[DualInitParams]) -> None:
        run.metrics({"lam": 1.5, "ess": float("nan")})
        run.throughput["prompts_per_second"] = 7.0

    execute(main, DualInitParams, [])
    assert read_json(folder / "reports/metrics/dual_init.json") == {"lam": 1.5, "ess": None}
    provenance = read_json(folder / "reports/provenance/dual_init.json")
    assert provenance["params"] == load(DualInitParams).model_dump(mode="json")
    assert provenance["seed"] == load(DualInitParams).seed
    assert provenance["throughput"] == {"prompts_per_second": 7.0}
    assert provenance["versions"]["torch"] and provenance["seconds"] >= 0


def edit(folder: Path, key: str, value: object) -> None:
    """Give a key of params.yaml another value, as a user does in an editor."""
    path = folder / "params.yaml"
    path.write_text(assign(path.read_text(), {key: value}))


def test_params_that_are_edited_while_a_stage_runs_end_it_before_its_checkpoints_go(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DVC reads params.yaml after the stage, and would record the new value for the old result."""
    before = load(DualInitParams)

    def main(run: Run[DualInitParams]) -> None:
        scratch = run.scratch()
        edit(folder, "constraint.limit", -0.9)
        run.metrics({"lam": 1.5})
        finished(scratch)

    with pytest.raises(SystemExit) as ended:
        execute(main, DualInitParams, [])
    assert ended.value.code == 2
    assert (
        f"params.yaml: constraint.limit was edited ({before.limit}, now -0.9) while dual_init"
        in (caplog.text)
    )
    assert not (folder / "reports/metrics/dual_init.json").exists()
    assert list((folder / ".scratch/dual_init").iterdir())


def test_params_that_are_edited_at_the_end_of_a_stage_end_it(folder: Path) -> None:
    with pytest.raises(SystemExit):
        execute(lambda run: edit(folder, "beta", 0.9), DualInitParams, [])
    assert not (folder / "reports/provenance/dual_init.json").exists()


def test_a_stage_that_no_launcher_has_started_speaks_whatever_rank_its_machine_has(
    folder: Path,
) -> None:
    """Jobs of Kubernetes and Slurm give each of their machines a RANK."""
    (folder / "wrong.py").write_text(SCRIPT.replace("print(run.scratch())", "run.pick({}, 'rows')"))
    told = {**os.environ, "RANK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "wrong.py"], env=told, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "which one of rows? none" in done.stderr


def test_what_another_stage_or_instance_reads_may_be_edited_meanwhile(folder: Path) -> None:
    own, other = list(load(SafetyDpoParams).runs)[:2]

    def main(run: Run[SafetyDpoParams]) -> None:
        edit(folder, f"safety_dpo.runs.{other}.factor", 9.0)
        edit(folder, "evaluate.prompts", 77)
        edit(folder, "sft.training", "a slip of the pen")
        run.metrics({})

    execute(main, SafetyDpoParams, [own])


def test_the_own_instance_may_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = next(iter(load(SafetyDpoParams).runs))

    def main(run: Run[SafetyDpoParams]) -> None:
        edit(folder, f"safety_dpo.runs.{own}.factor", 9.0)
        run.metrics({})

    with pytest.raises(SystemExit):
        execute(main, SafetyDpoParams, [own])
    assert f"safety_dpo.runs.{own}.factor was edited" in caplog.text


def test_an_item_has_files_of_its_own(folder: Path) -> None:
    def main(run: Run[DualInitParams]) -> None:
        run.metrics({"item": run.item})
        run.losses([{"step": 10, "loss": 0.5}])

    execute(main, DualInitParams, ["ours"])
    assert read_json(folder / "reports/metrics/dual_init/ours.json") == {"item": "ours"}
    assert read_json(folder / "reports/curves/dual_init/ours.json") == [{"step": 10, "loss": 0.5}]
    assert (folder / "reports/provenance/dual_init/ours.json").is_file()


def test_garbage_is_looked_for_again_once_a_stage_has_been_imported() -> None:
    code = "import sys, gc; sys.argv[0] = {argv!r}; import stages; sys.exit(gc.isenabled())"
    begun = [
        sys.executable,
        "-c",
        code.format(argv="-m"),
    ]  # what argv is while Python looks for `-m stages.NAME`
    assert subprocess.run(begun, cwd=ROOT, check=False).returncode == 0
    assert (
        subprocess.run([*begun[:2], code.format(argv="pytest")], cwd=ROOT, check=False).returncode
        == 1
    )
    gc.disable()
    try:
        execute(lambda run: run.metrics({"collecting": gc.isenabled()}), DualInitParams, [])
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()
    assert read_json("reports/metrics/dual_init.json") == {"collecting": True}


Main = Callable[[Run[DualInitParams]], None]


def failing(error: BaseException) -> Main:
    def main(run: Run[DualInitParams]) -> None:
        raise error

    return main


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_all_is_written_does_nothing(folder: Path, number: signal.Signals) -> None:
    execute(lambda run: run.metrics({}), DualInitParams, [])
    os.kill(os.getpid(), number)
    assert (folder / "reports/provenance/dual_init.json").is_file()


@pytest.mark.parametrize(
    ("main", "argv", "code", "says"),
    [
        (failing(DataError("rows.jsonl:3: no prompt")), [], 2, "rows.jsonl:3: no prompt"),
        (
            failing(AwaitingLabels("to-label.jsonl: fill it in")),
            [],
            3,
            "to-label.jsonl: fill it in",
        ),
        (failing(KeyboardInterrupt()), [], 130, "interrupted; checkpoints are kept"),
        (
            failing(AssertionError("never reached")),
            ["a", "b"],
            2,
            "usage: python -m stages.dual_init",
        ),
        (
            failing(AssertionError("never reached")),
            ["--help"],
            2,
            "usage: python -m stages.dual_init",
        ),
    ],
    ids=["bad input", "labels wanted", "interrupt", "too many words", "help"],
)
def test_what_a_user_can_act_on_is_one_line_and_an_exit_code(
    main: Main,
    argv: list[str],
    code: int,
    says: str,
    caplog: pytest.LogCaptureFixture,
    folder: Path,
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as caught:
        execute(main, DualInitParams, argv)
    assert caught.value.code == code
    (record,) = caplog.records
    assert (
        says in record.getMessage() and "\n" not in record.getMessage() and record.exc_info is None
    )
    assert not (folder / "reports/provenance").exists()


def test_a_mistake_in_params_is_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "params.yaml"
    path.write_text(path.read_text().replace("\nbeta:", "\nbetta:", 1))
    with pytest.raises(SystemExit) as caught:
        execute(failing(AssertionError()), DualInitParams, [])
    assert caught.value.code == 2
    assert "betta is not a known key; did you mean 'beta'?" in caplog.text


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        execute(failing(ZeroDivisionError()), DualInitParams, [])


def at_once() -> None:
    signal.raise_signal(signal.SIGTERM)


def in_a_destructor() -> None:
    class Left:
        def __del__(self) -> None:
            at_once()

    Left()


def in_a_callback() -> None:
    class Left: ...

    left = Left()
    ref = weakref.ref(left, lambda _: at_once())
    del left
    assert ref() is None


def where_all_is_caught() -> None:
    with contextlib.suppress(BaseException):
        at_once()


@pytest.mark.parametrize("told", [at_once, in_a_destructor, in_a_callback, where_all_is_caught])
def test_a_stage_stops_wherever_a_signal_comes(
    told: Callable[[], None], capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    def main(run: Run[DualInitParams]) -> None:
        told()
        time.sleep(20)
        run.metrics({})

    with pytest.raises(SystemExit) as caught:
        execute(main, DualInitParams, [])
    assert caught.value.code == 130
    assert "Traceback" not in capfd.readouterr().err
    assert not (folder / "reports").exists()


def test_what_cleans_up_after_a_signal_is_let_be(folder: Path) -> None:
    def main(run: Run[DualInitParams]) -> None:
        try:
            at_once()
        finally:
            time.sleep(0.3)
            try:
                (folder / "never written").unlink()
            except FileNotFoundError:
                at_once()
            (folder / "cleaned").touch()

    with pytest.raises(SystemExit) as caught:
        execute(main, DualInitParams, [])
    assert caught.value.code == 130 and (folder / "cleaned").exists()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


class Interrupted(DataError):
    """A fault during whose telling the stage is told to stop, as a launcher does to the others."""

    def __str__(self) -> str:
        at_once()
        return "rows.jsonl:3: no prompt"


def test_a_signal_while_a_fault_is_told_does_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as caught:
        execute(failing(Interrupted()), DualInitParams, [])
    assert caught.value.code == 2
    assert [record.getMessage() for record in caplog.records] == ["rows.jsonl:3: no prompt"]

    class Bug(ZeroDivisionError):
        __str__ = Interrupted.__str__

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one of several")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    monkeypatch.setattr(stage.launch, "join", lambda resources: None)
    with pytest.raises(SystemExit) as caught:
        execute(failing(Bug()), DualInitParams, [])
    assert caught.value.code == 1
    assert read_json(folder / "error.json")["message"].endswith("Bug: rows.jsonl:3: no prompt\n")


def test_what_else_is_dropped_is_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left:
        def __del__(self) -> None:
            raise ValueError("a fault of its own")

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    execute(lambda run: Left() and None, DualInitParams, [])
    assert "a fault of its own" in capfd.readouterr().err


def test_ctrl_c_stays_ignored_where_a_shell_has_set_it_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    execute(lambda run: signal.raise_signal(signal.SIGINT), DualInitParams, [])
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_scratch_is_found_again_and_is_anothers_when_anything_changes(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "rows").write_text("1")
    first = a_run().scratch("in")
    assert first.is_dir() and first == a_run().scratch("in")
    assert first.is_relative_to(Path(".scratch") / "dual_init")
    others = [a_run(seed=99).scratch("in"), a_run("item").scratch("in"), a_run().scratch()]
    (folder / "in" / "rows").write_text("2")
    others.append(a_run().scratch("in"))
    (folder / "in" / "rows").write_text("1")
    (folder / "in" / "rows").rename(folder / "in" / "lines")
    others.append(a_run().scratch("in"))
    assert len({first, *others}) == 6
    finished(first)
    assert not first.exists()


@pytest.mark.parametrize(
    ("cls", "key", "edit"),
    [
        (DualSearchParams, "methods", {"returns": "mixture"}),
        (SafetyDpoParams, "runs", {"factor": 9.0}),
        (EvaluateParams, "policies", "models/other"),
    ],
)
def test_scratch_is_kept_when_another_item_is_edited(
    cls: type[StageParams], key: str, edit: Any
) -> None:
    params = load(cls)
    items = getattr(params, key)
    own, other = list(items)[:2]

    def scratch(name: str) -> Path:
        changed = edit if isinstance(edit, str) else items[name].model_copy(update=edit)
        edited = params.model_copy(update={key: {**items, name: changed}})
        return Run(cls.section, own, edited, load_resources()).scratch()

    assert (
        scratch(other) == Run(cls.section, own, params, load_resources()).scratch() != scratch(own)
    )


SCRIPT = """
from dualign.params.dual import DualInitParams
from dualign.stage import execute

def main(run):
    print(run.scratch())

if __name__ == "__main__":
    execute(main, DualInitParams, [])
"""


@pytest.fixture
def own_stage(folder: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a script as `python -m stages.own`, which must succeed."""
    (folder / "stages").mkdir()
    (folder / "stages/__init__.py").touch()

    def ran(script: str) -> subprocess.CompletedProcess[str]:
        (folder / "stages/own.py").write_text(script)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "stages.own"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    return ran


def test_scratch_is_anothers_when_the_script_of_the_stage_changes(
    own_stage: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    """Under `python -m stages.NAME` the script is `__main__`."""
    first, again, other = (
        own_stage(script).stdout for script in (SCRIPT, SCRIPT, SCRIPT + "# another rule\n")
    )
    assert first == again != other


def test_code_that_is_edited_while_a_stage_runs_is_told(
    folder: Path, own_stage: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    """DVC reads it after the stage, and records the new code for the old result."""
    own_stage(SCRIPT)
    assert read_json(folder / "reports/provenance/dual_init.json")["edited"] == []
    edits = "open(__file__, 'a').write('# another rule')"
    told = own_stage(SCRIPT.replace("print(run.scratch())", edits)).stderr
    assert "edited while dual_init ran: stages/own.py; DVC takes the result for one of" in told
    assert "dvc repro --force --single-item dual_init" in told
    assert read_json(folder / "reports/provenance/dual_init.json")["edited"] == ["stages/own.py"]


GRAPH = """
stages:
  dual_init:
    deps: [stages/own.py, "${prepare.folder}", data/one.parquet, data/none.parquet]
  safety_dpo:
    foreach: ${safety_dpo.runs}
    do: {deps: [dualign/core, "models/${item.reference}", models/sft]}
"""


def test_data_that_is_edited_while_a_stage_runs_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DVC hashes it after the stage, and records the new data for the old result."""
    rows = folder / "data/raw/rows.jsonl"
    one = folder / "data/one.parquet"
    rows.parent.mkdir(parents=True, exist_ok=True)
    (folder / "dvc.yaml").write_text(GRAPH)
    for path in (rows, one, rows.with_name(".hidden")):
        path.write_text("1")

    def main(run: Run[DualInitParams]) -> None:
        rows.write_text("12")
        rows.with_name(".hidden").write_text("12")
        rows.with_name("new.jsonl").write_text("1")
        (folder / "data/other").write_text("1")

    execute(main, DualInitParams, [])
    edited = ["data/raw/new.jsonl", "data/raw/rows.jsonl"]
    assert read_json(folder / "reports/provenance/dual_init.json")["edited"] == edited
    assert f"edited while dual_init ran: {', '.join(edited)}; DVC takes" in caplog.text
    execute(lambda run: one.unlink(), DualInitParams, [])
    told = read_json(folder / "reports/provenance/dual_init.json")["edited"]
    assert told == ["data/one.parquet"]


def test_an_instance_reads_what_its_row_names(folder: Path) -> None:
    (folder / "dvc.yaml").write_text(GRAPH)
    own = next(iter(load(SafetyDpoParams).runs))
    reference = load(SafetyDpoParams).runs[own].reference
    found = data_of("safety_dpo", own, Path("params.yaml"))
    assert found == [Path("models") / reference, Path("models/sft")]
    assert data_of("unknown", None, Path("params.yaml")) == []


def test_scratch_wants_its_inputs_and_a_place_that_can_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DualignError, match=r"^models/sft: no such file or folder; run the stage that writes it"
    ):
        a_run().scratch("models/sft")
    (folder / "file").touch()
    monkeypatch.setenv("DUALIGN_SCRATCH", str(folder / "file"))
    with pytest.raises(
        DualignError, match=r"file/dual_init/\w+: checkpoints cannot be kept .*DUALIGN_SCRATCH"
    ):
        a_run().scratch()


def test_what_is_hidden_in_an_input_does_not_count(folder: Path) -> None:
    (folder / "in").mkdir()
    first = a_run().scratch("in")
    (folder / "in/.tmp-1").mkdir()
    (folder / "in/.tmp-1/rows").touch()
    assert a_run().scratch("in") == first


KILLED_AT = """
import os, signal, sys
from pathlib import Path

from dualign.stage import finished

event, at = sys.argv[2], int(sys.argv[3])
seen = []


def hook(name, arguments):
    if name == event:
        seen.append(name)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(hook)
finished(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("event", "at", "whole"),
    [("os.rename", 1, True), ("os.remove", 1, False), ("os.remove", 5, False)],
)
def test_a_kill_at_the_end_leaves_the_whole_scratch_folder_or_none(
    folder: Path, event: str, at: int, whole: bool
) -> None:
    files = 9
    scratch = folder / ".scratch/stage/run"
    scratch.mkdir(parents=True)
    for number in range(files):
        (scratch / str(number)).touch()
    command = [sys.executable, "-c", KILLED_AT, str(scratch), event, str(at)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert len(list(scratch.glob("*"))) == (files if whole else 0)
    finished(a_run().scratch())
    left = list(
        (folder / ".scratch").rglob(".tmp-*")
    )  # of another stage, whose next run will remove them
    assert len(left) == 2


def test_a_full_disk_is_one_line_wherever_it_is_met(caplog: pytest.LogCaptureFixture) -> None:
    def main(run: Run[DualInitParams]) -> None:
        with open("/dev/full", "w") as full:
            full.write("a")

    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as caught:
        execute(main, DualInitParams, [])
    assert (
        caught.value.code == 2
        and "No space left on device" in caplog.text
        and "Traceback" not in caplog.text
    )


def test_scratch_can_be_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALIGN_SCRATCH", str(folder / "elsewhere"))
    assert a_run().scratch().is_relative_to(folder / "elsewhere" / "dual_init")


@pytest.mark.parametrize("given", ["ours", "dual_init@ours", "../dvc.yaml:dual_init@ours"])
def test_an_item_may_be_named_as_dvc_names_its_stage(folder: Path, given: str) -> None:
    execute(lambda run: run.metrics({"item": run.item}), DualInitParams, [given])
    assert read_json(folder / "reports/metrics/dual_init/ours.json") == {"item": "ours"}


@pytest.mark.parametrize(
    "given", ["../../x", "evaluate@../x", "evaluate@", "", "x\ny", "x;y"], ids=ascii
)
def test_an_item_that_is_no_name_writes_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        execute(lambda run: run.metrics({}), DualInitParams, [given])
    assert caught.value.code == 2 and "is not the name of a run" in caplog.text
    assert len(caplog.messages) == 1 and len(caplog.messages[0].splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["params.yaml"]
