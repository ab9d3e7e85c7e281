"""What surrounds a stage: params, logging, scratch, provenance, and errors in one line."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from dualign import declared, launch
from dualign.core import ranks, reporting, work
from dualign.core.artifacts import is_full, listed, sha256, write_fault, write_json, write_rows
from dualign.core.errors import DualignError, ParamsError
from dualign.core.names import NAME, cut, shown
from dualign.core.peaks import peak_of
from dualign.core.temporaries import room_for, scratch_root, temporary_folder
from dualign.params.base import Resources, StageParams
from dualign.params.loading import for_run, section

log = logging.getLogger("dualign")

P = TypeVar("P", bound=StageParams)
Row = TypeVar("Row")
#: The parameters of the run.
PARAMS = Path("params.yaml")
#: Seconds after which a stage that was told to stop, and goes on, is told again.
AGAIN = 0.2
#: When this process began, in seconds since the epoch.
_STARTED = time.time()
_PACKAGES = ("dualign", "torch", "transformers", "trl", "peft", "datasets", "pandas", "numpy")


@dataclass
class Run(Generic[P]):
    """One execution of a stage. `item` is an instance of a fanned-out stage, a method's name say.

    `throughput` and `sources` (hub models with the commit that was read) are written into the
    provenance. `file` is where the params are from, if they are from one."""

    stage: str
    item: str | None
    params: P
    resources: Resources
    throughput: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    file: Path | None = None

    @property
    def name(self) -> str:
        """`stage` or `stage/item`, as metrics and provenance files are named."""
        return f"{self.stage}/{self.item}" if self.item else self.stage

    def pick(self, rows: Mapping[str, Row], where: str) -> tuple[str, Row]:
        """This instance's name and its row in the table `where`. Raises ParamsError without."""
        names = ", ".join(rows) or "none"
        if self.item is None:
            raise ParamsError(f"python -m stages.{self.stage} NAME: which one of {where}? {names}")
        if self.item not in rows:
            raise ParamsError(f"{where} has no {self.item!r}; one of {names}")
        return self.item, rows[self.item]

    def metrics(self, content: dict[str, Any]) -> None:
        """Write this stage's DVC metrics file. Raises ParamsError as `check_unedited` does."""
        self.check_unedited()
        write_json(Path("reports/metrics") / f"{self.name}.json", content)
        reporting.report(content, 0, "result")

    def check_unedited(self) -> None:
        """Raise ParamsError where the file has other params by now, of this instance: DVC reads it
        when the stage has ended, and would record the result as one of theirs.
        """
        if self.file is None:
            return
        cls = type(self.params)
        before = _of_item(self.params, self.item)
        after = _of_item(section(cls, self.file), self.item)
        keys = {name: cls.shared.get(name, f"{cls.section}.{name}") for name in before}
        edits = [_edits(before[name], after[name], key) for name, key in keys.items()]
        if edited := next(itertools.chain(*edits), ""):
            raise ParamsError(
                f"{self.file}: {edited} while {self.name} ran, and its result would pass for one of"
                " the new value; put the old one back, which goes on from the last checkpoint, or"
                " keep the new one, and run again"
            )

    def losses(
        self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ("step", "loss")
    ) -> None:
        """Write the loss by step of this stage's trainings for `dvc plots`; may be empty."""
        write_rows(Path("reports/curves") / f"{self.name}.json", rows, columns)

    def trained(self, metrics: Mapping[str, Any], scratch: Path) -> None:
        """What ends a stage that trains: its `losses`, its other metrics, and no checkpoints."""
        self.losses(metrics.get("losses", ()))
        self.metrics({key: value for key, value in metrics.items() if key != "losses"})
        finished(scratch)

    def scratch(self, *inputs: str | Path) -> Path:
        """Checkpoints' folder, the same for the same params, inputs, seed, code and libraries.

        `inputs` are all files and folders that the result depends on; their contents count. It lies
        outside the stage's outputs, which DVC deletes before it runs a stage; $DUALIGN_SCRATCH
        moves it. Raises DualignError where an input is missing or the folder cannot be made."""
        key = {
            "params": _of_item(self.params, self.item),
            "item": self.item,
            "inputs": [_digest(Path(path)) for path in inputs],
            "code": _code(),
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        if ranks.world() > 1 and self.resources.distributed != "ddp":
            key["distributed"] = self.resources.distributed  # a checkpoint of shards is another
        fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = scratch_root() / self.name / fingerprint
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DualignError(
                f"{folder}: checkpoints cannot be kept there ({write_fault(error)}); name a folder"
                " that can be written in $DUALIGN_SCRATCH"
            ) from error
        reporting.resume(folder)
        return folder


def execute(
    main: Callable[[Run[P]], None],
    cls: type[P],
    argv: list[str] | None = None,
    *,
    alone: bool = False,
) -> None:
    """Run a stage script: `python -m stages.NAME [ITEM]`; ITEM may also be DVC's name of the stage,
    `NAME@ITEM`. One that neither trains, samples nor scores is run by one process `alone`.

    Exits 2 after a DualignError, 3 where people's labels are awaited, 130 after an interrupt.
    """
    argv = sys.argv[1:] if argv is None else argv
    _collect_again()
    _quiet()
    quiet = launch.is_worker() and os.environ.get("RANK", "0") != "0"
    level = logging.CRITICAL if quiet else logging.INFO
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    for noisy in ("httpx", "httpx2", "openai", "datasets", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.unraisablehook = functools.partial(_dropped, sys.unraisablehook)
    try:
        with _interruptible():
            if len(argv) > 1 or argv[:1] in (["-h"], ["--help"]):
                raise DualignError(
                    f"usage: python -m stages.{cls.section} [ITEM]; knobs are in params.yaml"
                )
            item = _item(argv[0]) if argv else None
            run = Run(cls.section, item, *for_run(cls, PARAMS), file=PARAMS)
            _threads(run.resources)
            if not alone and launch.several(run.resources):
                launch.start(run.name, run.resources)
            else:
                _work(main, run)
    except DualignError as error:
        _end(str(error), error.status)
    except KeyboardInterrupt:
        _end(
            f"interrupted; checkpoints are kept in {scratch_root()}, run the stage again to go on"
            " from the last one",
            130,
        )
    except Exception as error:
        if is_full(error):
            _end(
                f"{write_fault(error)}; free space there and run the stage again",
                DualignError.status,
            )
        if launch.told(traceback.format_exc(), 1):
            sys.exit(1)
        raise


def _work(main: Callable[[Run[P]], None], run: Run[P]) -> None:
    """The stage itself, in each of its processes."""
    launch.join(run.resources)
    resources = run.resources
    work.begin(peak_of(resources.peak_tflops, resources.device, resources.precision))
    started = time.monotonic()
    data = declared.data_of(run.stage, run.item, PARAMS)
    before = declared.state(data)
    with reporting.reporting(resources.report_to, run.name, run.params.model_dump(mode="json")):
        main(run)
        run.check_unedited()
        edited = [*_edited(), *declared.changed(before, declared.state(data))]
        _provenance(run, time.monotonic() - started, edited)
    ranks.leave()


def _of_item(params: StageParams, item: str | None) -> dict[str, Any]:
    """All values as JSON has them, without the rows of other instances of the stage."""
    described = params.model_dump(mode="json")
    for fan in params.fans:
        if item in described.get(fan, {}):
            described[fan] = {item: described[fan][item]}
    return described


def _edits(before: Any, after: Any, key: str) -> Iterator[str]:
    """What became of each key that has another value, such as `seed was edited (1, now 2)`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            inner = f"{key}.{name}"
            yield from _edits(before.get(name), after.get(name), inner)
    elif before != after:
        yield f"{key} was edited ({cut(json.dumps(before))}, now {cut(json.dumps(after))})"


def _end(message: str, status: int) -> NoReturn:
    """One line and an exit status."""
    if not launch.told(message, status):
        log.error("%s", message)
    sys.exit(status)


def _item(given: str) -> str:
    """The item of `evaluate@sft`, as DVC calls its stage, or of plain `sft`."""
    name = given.rpartition("@")[2]
    if not NAME.fullmatch(name):
        raise ParamsError(f"{shown(given)} is not the name of a run; params.yaml has their names")
    return name


def finished(scratch: Path) -> None:
    """Remove the checkpoints of a run whose output has been written.

    They go as a whole, since a rerun would take half of them for all: a kill may come here too.
    """
    with ranks.by_one() as mine, contextlib.suppress(OSError):
        if mine:
            with temporary_folder(room_for(scratch.parent)) as place:
                scratch.rename(place / scratch.name)


def _collect_again() -> None:
    """Look for garbage again where `stages` put it off, but not among what was imported."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _quiet() -> None:
    """No progress bars or notices of the libraries: the stages log their own."""
    ignore_warnings()
    if "transformers" in sys.modules:
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        hf_logging.set_verbosity_error()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()


def _threads(resources: Resources) -> None:
    if "torch" in sys.modules and resources.threads is not None:
        import torch

        torch.set_num_threads(resources.threads)


def ignore_warnings() -> None:
    """Leave out what libraries warn of each other."""
    # TRL and PEFT call it by its old name; PEFT looks for experts' weights among modules.
    old_name = "`(is_)?gradient_checkpointing(_enable)?` is deprecated"
    warnings.filterwarnings("ignore", message=old_name, category=FutureWarning)
    unmatched = "The following (rank|alpha)_pattern keys did not match any targeted module"
    warnings.filterwarnings("ignore", message=unmatched, category=RuntimeWarning)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What stops a stage does so in here, and nothing afterwards, while its end is told."""
    _on_signals(_interrupt)
    try:
        yield
    finally:
        _on_signals(_too_late)


def _on_signals(handler: Callable[[int, Any], None]) -> None:
    """Have what stops a stage call `handler`; Ctrl-C unless a shell's background job ignores it."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(signum: int, frame: Any) -> None:
    """Stop here, and look a moment later whether that was heard.

    Python drops what is raised in a destructor, and a signal that comes while garbage is collected,
    a second at a time after imports, is heard in one; libraries have their bare `except` too. While
    an interrupt cleans up it is let be."""
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:
        raise KeyboardInterrupt


def _dropped(before: Callable[[Any], Any], told: Any) -> None:
    """Of what Python drops, an interrupt is no news: it comes again."""
    if not isinstance(told.exc_value, KeyboardInterrupt):
        before(told)


def _too_late(signum: int, frame: Any) -> None:
    """All is written, or has failed: an interrupt now would be a traceback and no more."""


def _digest(path: Path) -> str:
    """SHA-256 over the names and bytes of a file or folder, without what is hidden in it."""
    if not path.exists():
        raise DualignError(
            f"{path}: no such file or folder; run the stage that writes it first (`dvc repro`)"
        )
    digest = hashlib.sha256()
    files = [file for file in listed(path, "**/*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        digest.update(bytes.fromhex(sha256(file)))
    return digest.hexdigest()


def _code() -> str:
    """Digest of the sources loaded: a checkpoint of other code does not go on."""
    return hashlib.sha256("".join(_digest(file) for file in _loaded()).encode()).hexdigest()


def _edited() -> list[str]:
    """The sources loaded that were written since this process began."""
    return [
        os.path.relpath(file)
        for file in _loaded()
        if not file.exists() or file.stat().st_mtime > _STARTED
    ]


def _loaded() -> list[Path]:
    """The sources loaded, the stage's too. Types of params are no part of it: their values are in
    fingerprints and provenance.
    """
    files = set()
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None) if name == "__main__" else None
        own = spec.name if spec is not None else name  # `python -m stages.NAME` runs it as __main__
        code = own.startswith(("dualign.", "stages.")) and not own.startswith("dualign.params")
        if code and getattr(module, "__file__", None):
            files.add(Path(str(module.__file__)))
    return sorted(files)


def _tell_edited(run: Run[P], files: Sequence[str]) -> None:
    """Warn of code and data that were edited meanwhile: DVC reads them when the stage has ended."""
    if files:
        log.warning(
            "edited while %s ran: %s; DVC takes the result for one of what is there now. If that"
            " makes another result, run it again: dvc repro --force --single-item %s",
            run.name,
            ", ".join(files),
            run.name.replace("/", "@"),
        )


def _provenance(run: Run[P], seconds: float, edited: Sequence[str]) -> None:
    gpu = None
    _tell_edited(run, edited)
    if "torch" in sys.modules:
        import torch

        gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    content = {
        "stage": run.stage,
        "item": run.item,
        "params": run.params.model_dump(mode="json"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "seed": getattr(run.params, "seed", None),
        "device": _device_name(),
        "seconds": round(seconds, 2),
        "peak_rss_mib": round(1024 * work.host_peak(), 1),
        "peak_gpu_mib": gpu,
        "processes": ranks.world(),
        "throughput": run.throughput,
        "work": work.recorded(),
        "sources": run.sources,
        "edited": list(edited),
    }
    write_json(Path("reports/provenance") / f"{run.name}.json", content)
    log.info("%s done in %.1f s, peak memory %.0f MiB", run.name, seconds, content["peak_rss_mib"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name() -> str:
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"cpu ({os.cpu_count()} cores)"
