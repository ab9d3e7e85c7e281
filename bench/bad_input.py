"""Bad input of every kind, given at the front door: whether each is refused in one clear line.

    python -m bench.bad_input

Takes the tiny world of `bench.tiny`, spoils one file or argument at a time, and runs the command
that reads it. Clear is an error of one line that names the file, key or argument, says what to do,
and ends with an exit status. Not clear are a traceback, an error that names nothing, and bad input
that is taken."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from safetensors.numpy import load, save

from bench import options
from bench.tiny import World
from dualign.certify import certificate, command
from dualign.params.stages import STAGES
from dualign.stage import execute
from pipeline import __main__ as pipeline
from pipeline.dvc import preset

log = logging.getLogger(__name__)

#: The longest error that is still one line to read.
LONGEST = 700
#: How an error says what would be right, or what to do.
_REMEDY = re.compile(
    r"; |must|should|one of|did you mean|expected|write key=|in place of|for example|e\.g\."
)
Command = Callable[[], object]
Content = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One mistake: `changes` are new contents of files (None removes one), `names` what the error
    must name.
    """

    kind: str
    what: str
    names: tuple[str, ...]
    command: Command
    changes: Mapping[str, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What came of a case; `unclear` is empty where the error was clear."""

    kind: str
    what: str
    said: str
    unclear: str


# --- commands -------------------------------------------------------------------------------------


def stage(name: str, item: str | None = None) -> Command:
    """`python -m stages.NAME [ITEM]`."""
    module = importlib.import_module(f"stages.{name}")
    return lambda: execute(module.main, STAGES[name], [] if item is None else [item])


def verify(*arguments: str) -> Command:
    return lambda: sys.exit(command.main(["verify", *arguments]))


def runs(*arguments: str) -> Command:
    """`python -m pipeline ...`."""
    return lambda: sys.exit(pipeline.main(arguments))


def presets(*arguments: str) -> Command:
    return lambda: sys.exit(preset.main([*arguments], Path.cwd()))


# --- params and names -----------------------------------------------------------------------------

#: Tables whose keys are names that a user gives.
TABLES = (
    "reward_dpo.runs",
    "safety_dpo.runs",
    "safety_path.runs",
    "lagrangian_dpo.runs",
    "lambda_path.runs",
    "methods",
    "certify.runs",
    "evaluate.policies",
    "constraint.additional",
)
HOSTILE = (
    "x;touch PWNED",
    "$(touch PWNED)",
    "`id`",
    "a'b",
    'a"b',
    "a\nb",
    "../up",
    "/abs",
    "a/b",
    "-rf",
    ".hidden",
    "",
    "a" * 65,
    "café",
    "a b",
    "a\x00b",
    "${key}",
)
TEXTS = {
    "empty": b"",
    "a list": b"- 1\n",
    "a number": b"3\n",
    "not UTF-8": b"\xff\xfe\x00a",
    "a tab": b"a:\n\tb: 1\n",
    "an open bracket": b"a: [1, 2\n",
    "a key twice": b"seed: 1\nseed: 2\n",
    "deep nesting": b"a: " + b"[" * 50_000,
    "a huge number": b"seed: " + b"9" * 5_000 + b"\n",
    "an unknown anchor": b"seed: *x\n",
    "many aliases": b"a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b]\n",
    "a foreign tag": b"seed: !!python/object/apply:os.system ['id']\n",
}


def params_cases(root: Path) -> Iterator[Case]:
    """Every key with a value of the wrong type, keys that are missing or unknown, and texts that
    are no params.
    """
    whole = _params(root)
    for path in _leaves(whole):
        key = ".".join(map(str, path))
        told = next((str(part) for part in reversed(path) if not isinstance(part, int)), key)
        yield _params_case(
            "params", f"{key}: a mapping in place of a value", told, whole, path, {"odd": [1]}
        )
    for section in [name for name, value in whole.items() if isinstance(value, dict)]:
        yield _params_case(
            "params", f"{section}: a key too many", "oddity", whole, (section, "oddity"), 1
        )
        for key in whole[section]:
            if f"{section}.{key}" not in TABLES and section != "methods":
                yield _params_case(
                    "params", f"{section}.{key} is missing", key, whole, (section, key), None
                )
    for what, text in TEXTS.items():
        yield Case("params", what, ("params.yaml",), stage("prepare"), {"params.yaml": text})
    for place, extreme in _extremes():
        yield _params_case(
            "params", f"{'.'.join(place)}: {extreme!r:.30}", place[-1], whole, place, extreme
        )
    for section, item in (("dual_search", "sacpo"), ("certify", "dualign"), ("evaluate", "sft")):
        case = _params_case(
            "params",
            f"{section}.prompts beyond what is drawn",
            "prompts",
            whole,
            (section, "prompts"),
            999,
        )
        yield replace(case, command=stage(section, item))


def _extremes() -> Iterator[tuple[tuple[str, ...], Any]]:
    for value in (-1, 2**32, 10**30, 1.5, True, "7"):
        yield ("seed",), value
    for value in (float("nan"), float("inf"), -1.0, 0):
        yield ("beta",), value
        yield ("constraint", "delta"), value
    for key in ("batch_size", "max_length", "max_steps"):
        for value in (0, -3, 10**18):
            yield ("training", key), value
    for key in ("threads", "micro_batch_size", "sampling_batch_size"):
        for value in (0, -1, 10**11):
            yield ("resources", key), value


def names_cases(root: Path) -> Iterator[Case]:
    """Every table of names with every hostile name."""
    whole = _params(root)
    for table in TABLES:
        place = table.split(".")
        rows = _at(whole, place)
        row = next(iter(rows.values()), None) or {"quantity": "length", "limit": 9.0}
        for name in HOSTILE:
            what = f"{table} has the name {name!r:.24}"
            yield _params_case("names", what, table.split(".")[0], whole, (*place, name), row)


def _params_case(
    kind: str, what: str, told: str, whole: Content, path: Sequence[Any], value: Any
) -> Case:
    """params.yaml with a value at `path`, or without that key where it is None."""
    content = json.loads(json.dumps(whole))
    inner = _at(content, path[:-1])
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    text = io.BytesIO()
    YAML(typ="safe").dump(content, text)
    return Case(
        kind, what, ("params.yaml", told), stage("prepare"), {"params.yaml": text.getvalue()}
    )


def _params(root: Path) -> Content:
    content: Content = YAML(typ="safe").load((root / "params.yaml").read_text())
    return content


def _at(content: Any, path: Sequence[Any]) -> Any:
    for key in path:
        content = content[key]
    return content


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values that are no mapping."""
    if not isinstance(value, dict):
        yield path
        return
    for key, inner in value.items():
        yield from _leaves(inner, (*path, key))


# --- data and labels ------------------------------------------------------------------------------

PAIR = {"prompt": "How do I clean a window?", "chosen": "With water.", "rejected": "With sand."}
COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}


def data_cases(root: Path) -> Iterator[Case]:
    """Files of every sort that hold nothing usable, and sources that do not say what is where."""
    whole = _params(root)
    line = json.dumps(PAIR).encode() + b"\n"
    broken = {
        "rows.jsonl": (
            b"",
            b"\n\n",
            b"{",
            b"[1]\n",
            b"3\n",
            b"null\n",
            b"\xff\xfe",
            line[:-9],
            b'{"prompt": 1}\n',
            json.dumps(PAIR | {"chosen": None}).encode(),
            json.dumps(PAIR | {"chosen": ""}).encode(),
            json.dumps(PAIR | {"rejected": PAIR["chosen"]}).encode(),
            json.dumps(PAIR | {"prompt": []}).encode(),
            b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}\n',
        ),
        "rows.json": (b"", b"{}", b"[]", b"[1, 2]", b"[{]", b"\x00\x01", b'"text"'),
        "rows.csv": (
            b"",
            b"a,b,c\n1,2,3\n",
            b"prompt,chosen,rejected\n",
            b"prompt,prompt,chosen\n1,2,3\n",
            b"\xff\xfe",
        ),
        "rows.parquet": (b"", b"PAR1", b"PAR1" + b"\x00" * 64 + b"PAR1", line),
        "rows.jsonl.gz": (b"", b"\x1f\x8b\x08", line),
        "rows.txt": (line,),
        "rows.xlsx": (b"PK\x03\x04",),
    }
    for name, contents in broken.items():
        for content in contents:
            changes = {f"data/raw/{name}": content, "params.yaml": _with_source(whole, path=name)}
            yield Case("data", f"{name}: {content[:40]!r}", (name,), stage("prepare"), changes)
    for told, source in (
        ("nowhere.jsonl", {"path": "nowhere.jsonl"}),
        ("path", {"path": "../params.yaml"}),
        ("path", {"path": ""}),
        ("folder", {"path": "folder"}),
        ("format", {"format": "odd"}),
        ("answer", {"columns": {**COLUMNS, "chosen": "answer"}}),
        ("columns", {"columns": {}}),
        ("limit", {"limit": 0}),
        ("limit", {"limit": -1}),
        ("better", {"columns": {"better": "x"}}),
    ):
        changes = {
            "data/raw/rows.jsonl": line,
            "data/raw/folder/.keep": b"",
            "params.yaml": _with_source(whole, **source),
        }
        yield Case("data", f"a source with {source}", (told,), stage("prepare"), changes)


def _with_source(whole: Content, **changes: Any) -> bytes:
    """params.yaml with one source of helpful pairs."""
    content = json.loads(json.dumps(whole))
    content["prepare"]["helpful"] = [
        {"format": "columns", "path": "rows.jsonl", "columns": COLUMNS, **changes}
    ]
    return _yaml(content)


def label_cases(root: Path) -> Iterator[Case]:
    """Labels of people: files that are not what was asked for."""
    content = json.loads(json.dumps(_params(root)))
    content["certify"]["labels"] = {
        "source": "file",
        "prompts": 5,
        "votes": 1,
        "limit": 0.5,
        "folder": "data/labels",
    }
    params = _yaml(content)
    ask = Case("labels", "", (), stage("certify", "dualign"), {"params.yaml": params})
    with spoiled(root, ask.changes):
        outcome(ask)
    [asked] = (root / "data/labels").glob("to-label-*.jsonl")
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    name = asked.name.replace("to-label", "labelled", 1)
    labels = [key for key, value in rows[0].items() if value is None]
    filled = [row | dict.fromkeys(labels, 0) for row in rows]
    nameless = [row.copy() for row in filled]
    for row in nameless:
        del row["id"]
    bad: dict[str, str] = {
        "nothing": "", "no JSON": "{", "a list": "[1]\n", "a row too few": _lines(filled[:-1]),
        "a row twice": _lines([*filled, filled[0]]), "labels left out": _lines(rows),
        "a label that is no count": _lines([row | dict.fromkeys(labels, "yes") for row in rows]),
        "more votes than asked": _lines([row | dict.fromkeys(labels, 7) for row in rows]),
        "a negative label": _lines([row | dict.fromkeys(labels, -1) for row in rows]),
        "half a vote": _lines([row | dict.fromkeys(labels, 0.5) for row in rows]),
        "an unknown id": _lines([filled[0] | {"id": "odd"}, *filled[1:]]),
        "no id": _lines(nameless),
    }  # fmt: skip
    for what, text in bad.items():
        changes = {"params.yaml": params, f"data/labels/{name}": text.encode()}
        yield Case("labels", what, (name,), ask.command, changes)
    changes = {"params.yaml": params, f"data/labels/{name}": b"\xff\xfe\x00"}
    yield Case("labels", "not UTF-8", (name,), ask.command, changes)


def _lines(rows: Sequence[Content]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _yaml(content: Content) -> bytes:
    text = io.BytesIO()
    YAML(typ="safe").dump(content, text)
    return text.getvalue()


# --- what stages hand over, and models ------------------------------------------------------------

#: A file and a stage that reads it.
HANDED = {
    "data/dual/dual.json": ("lagrangian_dpo", "anchored"),
    "data/dual/frontier.json": ("report", None),
    "data/dual/betas.json": ("report", None),
    "reports/metrics/cost_model.json": ("dual_init", None),
    "reports/metrics/safety_dpo/stepwise.json": ("dual_search", "sacpo"),
    "reports/metrics/lagrangian_dpo/anchored.json": ("dual_search", "dualign"),
    "reports/metrics/evaluate/sft.json": ("report", None),
    "reports/metrics/certify/dualign.json": ("report", None),
    "reports/search/dualign.json": ("report", None),
    "reports/provenance/sft.json": ("report", None),
    "models/reward_model/scorer.json": ("score", None),
    "models/cost_model/scorer.json": ("score", None),
    "models/sft/config.json": ("score", None),
    "models/sft/tokenizer.json": ("score", None),
    "models/sft/tokenizer_config.json": ("score", None),
}
SHAPES = (b"", b"{}", b"[]", b"null", b'"text"', b'{"lam": ', b"\xff\xfe\x00", b"[" * 100_000)
TABLE_READERS = {
    "data/prepared/sft.parquet": ("sft", None),
    "data/prepared/helpful_pairs.parquet": ("reward_model", None),
    "data/prepared/safety_pairs.parquet": ("cost_model", None),
    "data/prepared/pool.parquet": ("score", None),
    "data/prepared/search.parquet": ("dual_search", "dualign"),
    "data/prepared/certify.parquet": ("certify", "dualign"),
    "data/prepared/eval.parquet": ("evaluate", "sft"),
    "data/scored/pool.parquet": ("dual_init", None),
    "data/scored/scored_pairs.parquet": ("lagrangian_dpo", "bernoulli"),
    "reports/evaluation/sft/answers.parquet": ("report", None),
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"


def handed_cases(root: Path) -> Iterator[Case]:
    """JSON of another shape, tables that are cut, emptied or of other columns, and files that are
    not there.
    """
    for file, (name, item) in HANDED.items():
        missing = () if name == "report" or file.startswith("models/sft/tokenizer_c") else (None,)
        for content in (*SHAPES, *missing):
            if (
                file.endswith("tokenizer_config.json") and content == b"{}"
            ):  # the defaults of transformers
                continue
            what = f"{file}: {'missing' if content is None else repr(content[:12])}"
            yield Case("stage inputs", what, (Path(file).name,), stage(name, item), {file: content})
    other = (root / "data/prepared/eval.parquet").read_bytes()
    for file, (name, item) in TABLE_READERS.items():
        whole = (root / file).read_bytes()
        for what, content in {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "text": b"a,b\n",
            "missing": None,
            "another table": (
                None if Path(file).stem in ("pool", "search", "certify", "eval") else other
            ),
        }.items():
            if (name == "report" or what == "another table") and content is None:
                continue
            yield Case(
                "stage inputs",
                f"{file}: {what}",
                (Path(file).name,),
                stage(name, item),
                {file: content},
            )


def model_cases(root: Path) -> Iterator[Case]:
    """Weights that are cut, missing, of other names, shapes or values, and files that only point at
    weights.
    """
    for folder, (name, item) in {
        "models/sft": ("score", None), "models/reward_model": ("score", None),
        "models/aligned/dualign": ("evaluate", "dualign"),
        "models/safety_dpo/alone": ("evaluate", "safety_only"),
    }.items():  # fmt: skip
        [file] = sorted((root / folder).rglob("model.safetensors"))[:1]
        place = file.relative_to(root).as_posix()
        for what, content in _damaged(file.read_bytes()).items():
            yield Case(
                "models",
                f"{place}: {what}",
                (Path(folder).name,),
                stage(name, item),
                {place: content},
            )
        config = file.with_name("config.json")
        told = json.loads(config.read_text())
        for what, change in {
            "another architecture": {"architectures": ["BertModel"], "model_type": "bert"},
            "an unknown type": {"model_type": "odd"},
            "a wider model": {"hidden_size": 24},
            "code of its own": {
                "model_type": "odd",
                "auto_map": {"AutoModelForCausalLM": "m.M", "AutoConfig": "m.C"},
            },
            "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            **(
                {}
                if name == "score" and "reward" in folder
                else {"a short context": {"max_position_embeddings": 4}}
            ),
        }.items():
            changes = {config.relative_to(root).as_posix(): json.dumps(told | change).encode()}
            yield Case(
                "models", f"{folder}: {what}", (Path(folder).name,), stage(name, item), changes
            )


def _damaged(whole: bytes) -> dict[str, bytes | None]:
    tensors = load(whole)
    first, *_ = [key for key in tensors if tensors[key].ndim == 2]
    wide = np.concatenate([tensors[first], tensors[first]], 0)
    return {
        "missing": None,
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "cut in the header": whole[:20],
        "a git-lfs pointer": LFS,
        "text": b"weights",
        "no tensors": save({}),
        "a tensor short": save({key: value for key, value in tensors.items() if key != first}),
        "other names": save({f"other.{key}": value for key, value in tensors.items()}),
        "another shape": save(tensors | {first: np.ascontiguousarray(wide)}),
        "not finite": save(tensors | {first: np.full_like(tensors[first], np.nan)}),
    }


def template_cases(root: Path) -> Iterator[Case]:
    """Chat templates that are no template, refuse rows or ignore them."""
    content = _params(root)
    shutil.copytree(root / "models/sft", root / "models/base/whole")
    bad: dict[str, bytes | None] = {
        "missing": None,
        "empty": b"",
        "not UTF-8": b"\xff\xfe\x00",
        "an open block": b"{% for m in messages %}",
        "an unknown filter": b"{{ messages | odd }}",
        "an unknown tag": b"{% odd %}",
        "refuses": b"{{ raise_exception('no') }}",
        "ignores the messages": b"hello",
        "divides by zero": b"{{ 1 / 0 }}",
        "reads a name that is not there": b"{{ nobody.content }}",
        "the answer first": b"{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "loses the answer": b"{% for m in messages if m.role == 'user' %}{{ m.content }}"
        b"{% endfor %}",
        "reaches for the system": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    }
    for what, text in bad.items():
        content["sft"] |= {"base": "models/base/whole", "chat_template": "models/base/odd.jinja"}
        changes = {"params.yaml": _yaml(content), "models/base/odd.jinja": text}
        yield Case("templates", what, ("odd.jinja",), stage("sft"), changes)


# --- command line and certificates ----------------------------------------------------------------


def command_cases(root: Path) -> Iterator[Case]:
    """Arguments that name nothing, or too much."""
    for name in (
        "reward_dpo",
        "safety_dpo",
        "lagrangian_dpo",
        "dual_search",
        "certify",
        "evaluate",
        "safety_path",
    ):
        for item in ("nobody", "../sft", "", "a b"):
            yield Case("command line", f"stages.{name} {item!r}", (item,), stage(name, item))
        yield Case("command line", f"stages.{name} without an item", (name,), stage(name))
    for arguments, told in {
        ("run", "--stage", "nobody"): "nobody",
        ("run", "--set", "seed"): "seed",
        ("run", "--set", "no.such=1"): "no.such",
        ("run", "--set", "seed=[1"): "seed",
        ("run", "--params", "nobody.yaml"): "nobody",
        ("run", "--jobs", "0"): "0",
        ("run", "--jobs", "x"): "x",
        ("plan", "--odd"): "--odd",
        ("sweep", "seed"): "seed",
        ("odd",): "odd",
        (): "COMMAND",
        ("status", "--last", "-1"): "-1",
        ("work",): "POOL",
        ("run", "--set", "=1"): "=1",
        ("sweep",): "KEY",
    }.items():
        yield Case("command line", f"pipeline {' '.join(arguments)}", (told,), runs(*arguments))
    for arguments, told in {
        ("nobody",): "nobody",
        ("params/../../x",): "x",
        ("params.yaml", "--data", "nowhere"): "nowhere",
        (): "preset",
        ("data/raw",): "raw",
        ("dvc.yaml",): "dvc.yaml",
    }.items():
        yield Case(
            "command line",
            f"pipeline.dvc.preset {' '.join(arguments)}",
            (told,),
            presets(*arguments),
        )
    for arguments, told in {
        ("nowhere",): "nowhere",
        ("params.yaml",): "params.yaml",
        ("data",): "data",
    }.items():
        yield Case(
            "command line", f"certificate verify {' '.join(arguments)}", (told,), verify(*arguments)
        )


def certificate_cases(root: Path) -> Iterator[Case]:
    """Certificates with a key missing or of another type, and answers that are not those that were
    certified.
    """
    folder = root / "reports/certificate/dualign"
    place = folder.relative_to(root).as_posix()
    content = json.loads((folder / certificate.FILE).read_text())
    file = f"{place}/{certificate.FILE}"
    spoils: dict[str, bytes | None] = {f"{shape[:12]!r}": shape for shape in SHAPES}
    for key in content:
        spoils[f"{key} is missing"] = json.dumps(
            {k: v for k, v in content.items() if k != key}
        ).encode()
        spoils[f"{key} is of another type"] = json.dumps({**content, key: {"odd": [1]}}).encode()
    for what, spoil in spoils.items():
        yield Case("certificates", what, (certificate.FILE,), verify(), {file: spoil})
    for table in sorted(folder.glob("*.parquet")):
        whole = table.read_bytes()
        for what, spoil in {
            "empty": b"",
            "cut": whole[:-99],
            "missing": None,
            "text": b"a",
        }.items():
            changes = {f"{place}/{table.name}": spoil}
            yield Case("certificates", f"{table.name}: {what}", (table.name,), verify(), changes)


KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "params": params_cases,
    "names": names_cases,
    "data": data_cases,
    "labels": label_cases,
    "models": model_cases,
    "stage inputs": handed_cases,
    "templates": template_cases,
    "command line": command_cases,
    "certificates": certificate_cases,
}


# --- running and judging --------------------------------------------------------------------------


@contextlib.contextmanager
def spoiled(root: Path, changes: Mapping[str, bytes | None]) -> Iterator[None]:
    """The workspace with these files changed, and put right again."""
    before = {
        path: (root / path).read_bytes() if (root / path).is_file() else None for path in changes
    }
    _put(root, changes)
    try:
        yield
    finally:
        _put(root, before)


def _put(root: Path, contents: Mapping[str, bytes | None]) -> None:
    for path, content in contents.items():
        if content is None:
            (root / path).unlink(missing_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)


def outcome(case: Case) -> tuple[object, str]:
    """The exit status and the errors of a command; a traceback where it ends in one."""
    errors = io.StringIO()
    printed = io.StringIO()
    handler = logging.StreamHandler(errors)
    handler.setLevel(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            case.command()
        status: object = 0
    except SystemExit as ended:
        status = ended.code or 0
    except Exception:
        status = "traceback"
        errors.write(traceback.format_exc())
    finally:
        logging.getLogger().removeHandler(handler)
    said = errors.getvalue().strip() or printed.getvalue().strip()
    return status, said


def judge(case: Case) -> Verdict:
    """Run a case and say whether its error is clear."""
    status, said = outcome(case)
    lines = said.splitlines() or [""]
    usage = lines[0].startswith("usage:")
    line = lines[-1] if usage else said
    unnamed = [name for name in case.names if name not in line]
    helps = usage or _REMEDY.search(line)
    if status == 0:
        unclear = "taken"
    elif status == "traceback" or "Traceback" in said:
        unclear = "traceback"
    elif not usage and len(lines) > 1:
        unclear = f"{len(lines)} lines"
    elif len(line) > LONGEST:
        unclear = f"{len(line)} characters"
    elif unnamed:
        unclear = f"does not name {unnamed[0]!r}"
    elif not helps:
        unclear = "does not say what to do"
    else:
        unclear = ""
    return Verdict(case.kind, case.what, line if unclear != "traceback" else said[-500:], unclear)


def judged(root: Path, kinds: Sequence[str]) -> Iterator[Verdict]:
    """The verdicts of all cases of these kinds, in a workspace of their own."""
    os.chdir(root)
    for kind in kinds:
        for case in KINDS[kind](root):
            with spoiled(root, case.changes):
                verdict = judge(case)
            log.log(logging.WARNING if verdict.unclear else logging.DEBUG, "%s", verdict)
            yield verdict
        shutil.rmtree(root / ".scratch", ignore_errors=True)


def page(verdicts: Sequence[Verdict]) -> str:
    """The table by kind, and every case that is not clear."""
    tried = Counter(verdict.kind for verdict in verdicts)
    unclear = Counter(verdict.kind for verdict in verdicts if verdict.unclear)
    lines = [
        "# Bad input",
        "",
        "    python -m bench.bad_input",
        "",
        *options.head(["kind", "tried", "clear", "unclear"]),
    ]
    rows = [*tried.items(), ("all", len(verdicts))]
    for kind, count in rows:
        wrong = sum(unclear.values()) if kind == "all" else unclear[kind]
        lines.append(f"| {kind} | {count} | {count - wrong} | {wrong} |")
    lines += [
        "",
        *(f"- {v.kind}, {v.what}: {v.unclear}: `{v.said[:200]}`" for v in verdicts if v.unclear),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases; write bad-input.json and bad-input.md. Returns 1 if a case is not clear."""
    parser = options.parser("python -m bench.bad_input", __doc__)
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="(default: all)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".scratch/bench-kills"), help="folder of the tiny world"
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    out = given.out.absolute()
    yard = given.work.absolute() / "spoiled"
    shutil.rmtree(yard, ignore_errors=True)
    shutil.copytree(World(given.work.absolute(), []).folder, yard)
    verdicts = list(judged(yard, given.kinds))
    text = page(verdicts)
    options.publish(out, "bad-input", [asdict(verdict) for verdict in verdicts], text)
    sys.stdout.write(text)
    return int(any(verdict.unclear for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
