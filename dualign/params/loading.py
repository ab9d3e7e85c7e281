"""Reads `params.yaml`: the whole file is checked before anything runs, for typos anywhere.

python -m dualign.params.loading params.yaml < params.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dualign.core.errors import ParamsError, one_line
from dualign.core.names import cut, shown
from dualign.params import yaml_text
from dualign.params.base import LoraParams, Resources, StageParams, TrainingParams
from dualign.params.consistency import check_across, check_prompts, params_of
from dualign.params.renamed import renamed_keys
from dualign.params.stages import STAGES

PROG = "python -m dualign.params.loading"
#: How pydantic begins to say what a value should be.
_ASKS = "Input should be "
_MISSING = "is missing; add it (params.yaml in the repository shows every key)"
#: Sections at the top that a stage's own section of the same name adds to: it says what differs.
BLOCKS: dict[str, type[BaseModel]] = {"training": TrainingParams, "lora": LoraParams}
_TOP_LEVEL = {
    "seed",
    "beta",
    "constraint",
    "generation",
    "pessimism",
    "resources",
    "methods",
    "suites",
    "judges",
    *BLOCKS,
    *STAGES,
}

P = TypeVar("P", bound=StageParams)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping (`1e-5` is a number). Raises ParamsError with file and line."""
    return mapping(yaml_text.load(yaml_text.read(Path(path)), path), path)


def mapping(content: Any, path: str | Path) -> dict[str, Any]:
    """The content of a file, which must be a mapping."""
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: expected a mapping of keys to values")
    return content


def load(cls: type[P], path: str | Path = "params.yaml") -> P:
    """Check the whole file, return a stage's params. Raises ParamsError with file, key, remedy.

    Estimates on more prompts than are drawn pass here: `for_run` and `check` refuse them.
    """
    return params_of(cls, load_all(path))


def load_all(path: str | Path = "params.yaml") -> dict[str, StageParams]:
    """As `load`, the params of every stage by its section."""
    content = read_yaml(path)
    with _named(path):
        return _sections(content, path)


def for_run(cls: type[P], path: str | Path = "params.yaml") -> tuple[P, Resources]:
    """The params of a stage that is to run and the `resources`, of one reading of the file.

    Raises ParamsError, also where the stage's own estimates ask for more prompts than are drawn for
    them."""
    content = read_yaml(path)
    with _named(path):
        stages = _sections(content, path)
        check_prompts(stages, cls.section)
        return params_of(cls, stages), _resources(content)


def section(cls: type[P], path: str | Path) -> P:
    """A stage's params by themselves: what the rest of the file holds does not matter."""
    content = read_yaml(path)
    with _named(path):
        return _build(cls, _with_shared(cls, content), cls.section)


def load_resources(path: str | Path = "params.yaml") -> Resources:
    """The `resources` section."""
    content = read_yaml(path)
    with _named(path):
        return _resources(content)


def check(content: dict[str, Any], path: str | Path) -> dict[str, StageParams]:
    """Validate every section of a params file; return the params of each stage by name."""
    with _named(path):
        stages = _sections(content, path)
        check_prompts(stages)
        return stages


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Around what checks the content of a file: errors begin with its name."""
    try:
        yield
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None


def _resources(content: dict[str, Any]) -> Resources:
    return _build(Resources, content.get("resources"), "resources")


def _sections(content: dict[str, Any], path: str | Path) -> dict[str, StageParams]:
    if "extends" in content:
        raise ParamsError(
            f"says only what differs from another file; `make repro PARAMS={path}` writes it out"
        )
    if old := renamed_keys(content):
        raise ParamsError(f"is of an earlier dualign: {', '.join(old)}; rename them")
    _refuse_unknown(content, _TOP_LEVEL, "")
    for key in sorted(_TOP_LEVEL - content.keys()):
        raise ParamsError(f"{key} {_MISSING}")
    for section in ("constraint", "generation"):
        if isinstance(content[section], dict):
            _refuse_unknown(content[section], _shared_keys(section), f"{section}.")
    for name, block in BLOCKS.items():
        _build(block, content[name], name)
    _resources(content)
    stages = {name: _build(cls, _with_shared(cls, content), name) for name, cls in STAGES.items()}
    check_across(content, stages)
    return stages


def _shared_keys(section: str) -> set[str]:
    """The keys of a shared section: those that some stage declares."""
    declared = {key for cls in STAGES.values() for key in cls.shared.values()}
    return {key.partition(".")[2] for key in declared if key.startswith(f"{section}.")}


def _with_shared(cls: type[StageParams], content: dict[str, Any]) -> dict[str, Any]:
    section = content[cls.section]
    if not isinstance(section, dict):
        raise ParamsError(f"{cls.section} must hold keys and values")
    for field in cls.shared:
        if field in section:
            raise ParamsError(
                f"{cls.section}.{field} belongs at {cls.shared[field]}; move it there"
            )
    _refuse_unknown(section, set(cls.model_fields), f"{cls.section}.")
    blocks = {
        name: _block(content, section, f"{cls.section}.{name}")
        for name in BLOCKS
        if name in cls.model_fields
    }
    return {
        **section,
        **blocks,
        **{field: _dig(content, key) for field, key in cls.shared.items()},
    }


def _block(content: dict[str, Any], section: dict[str, Any], where: str) -> dict[str, Any]:
    """A stage's `training` or `lora`: that at the top of the file, and what differs from it."""
    name = where.rpartition(".")[2]
    if name not in section:
        raise ParamsError(f"{where} is missing; write what differs from {name} at the top, or {{}}")
    if not isinstance(section[name], dict):
        raise ParamsError(
            f"{where} must hold the keys that differ from {name} at the top; {{}} for none"
        )
    return {**content[name], **section[name]}


def _dig(content: dict[str, Any], dotted: str) -> Any:
    value: Any = content
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ParamsError(f"{dotted} {_MISSING}")
        value = value[key]
    return value


M = TypeVar("M", bound=BaseModel)


def _build(cls: type[M], values: Any, where: str) -> M:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ParamsError(_explain(error, cls, where)) from None


def _explain(error: ValidationError, cls: type[BaseModel], where: str) -> str:
    """The first problem of a validation error in a line: file, key, fault, nearest valid key.

    An unknown key comes before a missing one, since a typo makes both.
    """
    problems = error.errors()
    first = next(
        (problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0]
    )
    loc, fields = _place(first, cls)
    shared = getattr(cls, "shared", {})
    key = ".".join(
        map(shown, [shared[loc[0]], *loc[1:]] if loc and loc[0] in shared else [where, *loc])
    )
    if first["type"] == "extra_forbidden":
        return f"{key} is not a known key{_nearest(loc[-1], fields)}"
    if first["type"].startswith("union_tag"):
        key += ".kind"
    if first["type"] == "union_tag_invalid":
        tags = first["ctx"]
        return f"{key}: input should be one of {tags['expected_tags']}, got {tags['tag']!r}"
    if first["type"] in ("missing", "union_tag_not_found"):
        return f"{key} {_MISSING}"
    given = "" if isinstance(first["input"], dict | list) else f", got {cut(repr(first['input']))}"
    same = [problem for problem in problems if _place(problem, cls)[0] == loc]
    return f"{key}: {_faults(same)}{given}"


def _place(problem: Mapping[str, Any], cls: type[BaseModel]) -> tuple[list[str], list[str]]:
    """Where a problem is, as `_walked` says it."""
    return _walked(cls, [str(part) for part in problem["loc"] if part != "[key]"])


def _faults(problems: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with one value: of a value that may be of several kinds, what each asks for."""
    told = [problem["msg"].partition(" or instance of ")[0] for problem in problems]
    first, *others = dict.fromkeys(told)
    message = first.removeprefix("Value error, ")
    asked = [other.removeprefix(_ASKS) for other in others if other.startswith(_ASKS)]
    return ", or ".join([f"{message[0].lower()}{message[1:]}", *asked])


def _walked(cls: type[BaseModel], loc: list[str]) -> tuple[list[str], list[str]]:
    """The keys that `loc` leads through, and the fields of the model that holds the last one.

    Walks through nested models, lists and dicts of models; of a row that may be of several kinds,
    pydantic puts the kind after the row's name, which is no key; nor is the type that it puts after
    a value that may be of several."""
    keys: list[str] = []
    models = [cls]
    named = True
    holders = [cls]
    several = False
    for part in loc:
        if several and not part.isdigit():
            several = False  # of a value that may be of several types, the name of one
            continue
        of_kind = [model for model in models if part in _kinds(model)]
        if len(models) > 1 and of_kind and not named:
            models = of_kind
            continue
        keys.append(part)
        holders = models
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        inner = [model for field in fields for model in _models_in(field.annotation)]
        several = not inner and any(_is_union(field.annotation) for field in fields)
        named = bool(inner) and get_origin(fields[0].annotation) is dict
        models = inner or models
    return keys, [name for model in holders for name in model.model_fields]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    """The values of a model's field `kind`."""
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _is_union(annotation: Any) -> bool:
    """Whether a value may be of several types beside null."""
    if get_origin(annotation) not in (Union, UnionType):
        return False
    return len([one for one in get_args(annotation) if one is not NoneType]) > 1


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]


def _nearest(key: str, valid: list[str] | set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid keys: {', '.join(sorted(valid))}"


def _refuse_unknown(content: dict[str, Any], valid: set[str], where: str) -> None:
    for key in content:
        if key not in valid:
            raise ParamsError(
                f"{where}{shown(str(key))} is not a known key{_nearest(str(key), valid)}"
            )


@one_line
def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command, called `prog`: check the params on standard input; returns the exit status."""
    name = parser(prog).parse_args(argv).name
    text = yaml_text.decoded(sys.stdin.buffer.read(yaml_text.LARGEST + 1), name)
    check(mapping(yaml_text.load(text, name), name), name)
    return 0


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of this command."""
    made = argparse.ArgumentParser(
        prog=prog, description="Check the params on standard input: `< params.yaml`."
    )
    made.add_argument(
        "name",
        nargs="?",
        default="params.yaml",
        help="what messages call them (default: %(default)s)",
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
