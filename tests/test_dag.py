"""dvc.yaml: its dependencies, its params, its form, and what an edit makes run again."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from dualign.params.loading import BLOCKS
from dualign.params.search import ROW_SECTIONS
from dualign.params.stages import STAGES
from pipeline.dvc.dag import StageSpec, load_dag
from pipeline.dvc.deps import ROOT, closure, differences, script_of
from pipeline.dvc.overlay import whole
from tests.shipped import PRESETS, preset

# Keys that a foreach stage lists by item, so that an edit to one item leaves the others alone. The
# policies of `evaluate` need no key of their own: the folder that an item names is a dependency.
BY_ITEM: dict[str, dict[str, list[str]]] = {
    "reward_dpo": {"reward_dpo.runs": ["reward_dpo.runs.${key}"]},
    "safety_dpo": {"safety_dpo.runs": ["safety_dpo.runs.${key}"]},
    "lagrangian_dpo": {"lagrangian_dpo.runs": ["lagrangian_dpo.runs.${key}"]},
    "lambda_path": {"lambda_path.runs": ["lambda_path.runs.${key}"]},
    "safety_path": {"safety_path.runs": ["safety_path.runs.${key}"]},
    "dual_search": {"methods": ["methods.${key}"]},
    "certify": {"certify.runs": ["certify.runs.${key}"]},
    "evaluate": {"evaluate.policies": []},
    "answer": {"suites": ["suites.${key}"]},
    "judge": {"judges": ["judges.${key}"]},
}


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path)


DEFINITIONS: dict[str, Any] = {
    name: stage.get("do", stage) for name, stage in read(ROOT / "dvc.yaml")["stages"].items()
}
every_stage = pytest.mark.parametrize("stage", DEFINITIONS)


# --- dependencies and params ----------------------------------------------------------------------


def test_code_dependencies_are_the_import_closure() -> None:
    found = differences(ROOT)
    assert not found, "\n".join(
        ["run `python -m pipeline.dvc.deps --write`, or edit:", *map(str, found)]
    )


#: Stages that run again after an edit, a reworded message, say, to a module of the mathematics.
AFTER_AN_EDIT = {
    "dualign/math/dual/advice.py": {"dual_init"},
    "dualign/math/dual/joint.py": {"dual_init"},
    "dualign/math/dual/margin.py": {"dual_init"},
    "dualign/math/pricing.py": {"dual_init"},
    "dualign/math/dual/reach.py": {"dual_init", "lagrangian_dpo", "dual_search"},
    "dualign/math/dual/root.py": {"dual_init", "lagrangian_dpo", "dual_search"},
}


@pytest.mark.parametrize("module", AFTER_AN_EDIT)
def test_advice_makes_no_training_stale(module: str) -> None:
    needing = {stage for stage in STAGES if module in closure(f"stages/{stage}.py")}
    assert needing == AFTER_AN_EDIT[module]


def test_every_data_file_of_the_code_is_a_dependency() -> None:
    listed = {dep for definition in DEFINITIONS.values() for dep in definition["deps"]}
    files = [
        path
        for room in ("dualign", "stages")
        for path in (ROOT / room).rglob("*")
        if path.is_file()
    ]
    data = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.suffix not in {".py", ".pyc", ".typed"}
    }
    unseen = {path for path in data if not {path, *map(str, Path(path).parents)} & listed}
    assert not unseen, f"no module names {sorted(unseen)}, so no stage runs again when they change"


@every_stage
def test_params_are_the_fields_of_the_class(stage: str) -> None:
    cls = STAGES[stage]
    own = (
        set(cls.model_fields) - set(cls.shared) - set(ROW_SECTIONS)
    )  # these stand in the rows of `methods`
    keys = [*cls.shared.values(), *(f"{stage}.{name}" for name in own), *own & set(BLOCKS)]
    expected = {item for key in keys for item in BY_ITEM.get(stage, {}).get(key, [key])}
    listed = set(DEFINITIONS[stage]["params"])
    if (
        stage in listed
    ):  # the whole section as one, of which the stage must read every key that there is
        assert own == set(read(ROOT / "params.yaml")[stage])
        expected = {key for key in expected if not key.startswith(f"{stage}.")} | {stage}
    edits = [f"{'+' if key in expected else '-'}     - {key}" for key in sorted(expected ^ listed)]
    assert not edits, "\n".join([f"dvc.yaml: {stage}: params:", *edits])


@every_stage
def test_paths_in_the_script_are_declared(stage: str) -> None:
    definition = DEFINITIONS[stage]
    script = ast.parse((ROOT / script_of(definition)).read_text())
    used = {path for path in paths(script) if re.fullmatch(r"(data|models|reports)/[\w./-]+", path)}
    known = [
        path.split("${")[0].rstrip("/")
        for key in ("deps", "outs", "metrics")
        for path in definition[key]
    ]
    undeclared = {path for path in used if not any(map(partial(related, path), known))}
    assert not undeclared, (
        f"{script_of(definition)} uses {sorted(undeclared)}, which dvc.yaml does not list for"
        f" {stage}"
    )


def paths(script: ast.Module) -> Iterator[str]:
    """Every string, and every `NAME / "file"` where `NAME = Path("folder")`."""
    folders = {}
    for node in ast.walk(script):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(args=[ast.Constant(value=str(folder))])
            ):
                folders[name] = folder
            case ast.Constant(value=str(text)):
                yield text
            case ast.BinOp(
                left=ast.Name(id=name), op=ast.Div(), right=ast.Constant(value=str(file))
            ) if name in folders:
                yield f"{folders[name]}/{file}"


def related(path: str, other: str) -> bool:
    return within(path, other) or within(other, path)


def within(path: str, folder: str, separator: str = "/") -> bool:
    return path == folder or path.startswith(f"{folder}{separator}")


def test_stages_are_those_of_params() -> None:
    assert set(DEFINITIONS) == set(STAGES)


# --- form -----------------------------------------------------------------------------------------


@every_stage
def test_command_is_the_same_everywhere(stage: str) -> None:
    definition = DEFINITIONS[stage]
    name = (
        ' "$DVC_STAGE"' if stage in BY_ITEM else ""
    )  # no ${key}, which a shell would read as text of its own
    assert definition["cmd"] == f"python -m stages.{stage}{name}"
    assert script_of(definition) == f"stages/{stage}.py"


@every_stage
def test_stage_is_described(stage: str) -> None:
    definition = DEFINITIONS[stage]
    assert 10 <= len(definition["desc"]) <= 80
    meta = definition["meta"]
    assert set(meta) == {"pool", "gpus", "retries", "memory_gib"}
    assert meta["pool"] == ("gpu" if meta["gpus"] else "cpu")


@every_stage
def test_outputs_are_cached_and_never_kept(stage: str) -> None:
    definition = DEFINITIONS[stage]
    outputs = definition["outs"] + definition["metrics"]
    assert definition["metrics"]
    assert all(isinstance(path, str) for path in outputs), (
        "an output with options (cache: false, persist) does not travel"
    )
    assert all(path.split("/")[0] in {"data", "models", "reports"} for path in outputs)


def test_plots_draw_outputs_by_templates_that_are_there() -> None:
    """Whether the columns are there as well is seen on a real run, in tests/e2e."""
    outs = [path for definition in DEFINITIONS.values() for path in definition["outs"]]
    for name, plot in (
        (name, plot) for item in read(ROOT / "dvc.yaml")["plots"] for name, plot in item.items()
    ):
        undeclared = [file for file in plot["y"] if not any(map(partial(within, file), outs))]
        assert not undeclared, f"dvc.yaml: plots: {name}: no stage writes {undeclared[0]}"
        template = ROOT / f".dvc/plots/{plot['template']}.json"
        assert plot["template"] == "simple" or "<DVC_METRIC_DATA>" in template.read_text(), name


# --- what an edit makes run again -----------------------------------------------------------------


#: Stages whose runs each write a policy.
TRAININGS = ("reward_dpo", "safety_dpo", "lagrangian_dpo", "lambda_path", "safety_path")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository with this graph and these params, small files for all it reads and writes,
    all up to date.
    """
    root = tmp_path_factory.mktemp("workspace")
    for name in ("dvc.yaml", ".dvcignore"):
        (root / name).write_text((ROOT / name).read_text())
    params = read(ROOT / "params.yaml")
    params["prepare"]["folder"] = "data/raw"
    params["lambda_path"]["runs"] = preset("any-limit")["lambda_path"]["runs"]
    params["safety_path"]["runs"] = {
        "strict": {"reference": "sft", "lam": 4.0, "loss_type": "dpo", "clip": None}
    }
    suite = {"suite": "held_out", "path": None, "prompts": 4, "samples_per_prompt": 1}
    params["suites"] = {"tea": suite}
    params["judges"] = {"ours": {"kind": "scorers"}}
    runs = (params[stage]["runs"] for stage in TRAININGS)
    for items in (*runs, params["methods"], params["suites"], params["judges"]):
        items["twin"] = next(iter(items.values()))
    write(root / "params.yaml", params)
    Repo.init(str(root), no_scm=True).close()
    dag = load_dag(root)
    written = [path for stage in dag.values() for path in (*stage.outs, *stage.metrics)]
    for path in [*written, "data/raw/rows.jsonl", "reports/search/README.md"]:
        touch(root / path)
    for path in (
        path for stage in dag.values() for path in stage.deps if not (root / path).exists()
    ):
        touch(root / path)
    with contextlib.chdir(root), Repo() as repo:
        repo.commit(force=True)
    return root


@pytest.fixture(scope="module")
def dag(workspace: Path) -> dict[str, StageSpec]:
    return load_dag(workspace)


def touch(path: Path) -> None:
    """A file at `path`, or in it if it has no suffix and so is a folder."""
    file = path if path.suffix else path / "file"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(path))


def write(path: Path, content: Any) -> None:
    """Write YAML in which no two keys share a value by an anchor, so that an edit is an edit to one
    key.
    """
    path.write_text(json.dumps(content))


def status(root: Path, *edits: tuple[str, Any]) -> dict[str, set[str]]:
    """The stages that DVC finds out of date after these edits to params.yaml, which are then
    undone, and why.

    The reason is a set of params and of paths.
    """
    path = root / "params.yaml"
    before = path.read_text()
    params = read(path)
    for key, value in edits:
        *sections, last = key.split(".")
        place = params
        for section in sections:
            place = place[section]
        place[last] = value
    write(path, params)
    try:
        with contextlib.chdir(root), Repo() as repo:
            return {stage: set(reasons(entries)) for stage, entries in repo.status().items()}
    finally:
        path.write_text(before)


def reasons(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for cause in entry.values() if isinstance(entry, dict) else [{entry: ""}]:
            for path, what in cause.items():
                yield from what if isinstance(what, dict) else [path]


def matching(dag: dict[str, StageSpec], *patterns: str) -> set[str]:
    return {name for pattern in patterns for name in fnmatch.filter(dag, pattern)}


def downstream(dag: dict[str, StageSpec], names: set[str]) -> set[str]:
    """`names` and all stages that may run again after them."""
    reached = set(names)
    for name, stage in dag.items():
        if reached & set(stage.upstream):
            reached.add(name)
    return reached


EVERY_RUN = (*(f"{stage}@*" for stage in TRAININGS), "dual_search@*", "evaluate@*")
ASKING = ("answer@*", "judge@*")
SCORERS = ("reward_model", "cost_model")
EDITS = {
    "seed": (
        123,
        ("prepare", "sft", *SCORERS, "score", "dual_init", *EVERY_RUN, "certify@*", *ASKING),
    ),
    "beta": (0.123, ("dual_init", *EVERY_RUN, "report")),
    "constraint.limit": (
        -1.23,
        ("dual_init", "dual_search@*", "certify@*", "evaluate@*", "report"),
    ),
    "constraint.delta": (0.123, ("dual_init", "certify@*")),
    "constraint.power": (0.7, ("dual_init",)),
    "constraint.additional": (
        {"short": {"quantity": "length", "limit": 9.0}},
        ("dual_init", "evaluate@*"),
    ),
    "generation.max_new_tokens": (
        123,
        ("score", "lagrangian_dpo@*", "dual_search@*", "certify@*", "evaluate@*", "answer@*"),
    ),
    "training.batch_size": (
        123,
        ("sft", *SCORERS, *(f"{stage}@*" for stage in TRAININGS), "dual_search@*"),
    ),
    "lora.rank": (123, ("sft", *SCORERS, *(f"{stage}@*" for stage in TRAININGS), "dual_search@*")),
    "prepare.search_prompts": (123, ("prepare",)),
    "prepare.sft": ([], ("prepare",)),
    "sft.training.learning_rate": (0.123, ("sft",)),
    "reward_model.training.epochs": (12.3, ("reward_model",)),
    "cost_model.training.learning_rate": (0.123, ("cost_model",)),
    "score.samples_per_prompt": (123, ("score",)),
    "dual_init.bootstrap": (123, ("dual_init",)),
    "reward_dpo.lora.rank": (123, ("reward_dpo@*",)),
    "safety_dpo.training.batch_size": (123, ("safety_dpo@*",)),
    "lagrangian_dpo.training.batch_size": (123, ("lagrangian_dpo@*",)),
    "lambda_path.training.batch_size": (123, ("lambda_path@*",)),
    "safety_path.training.batch_size": (123, ("safety_path@*",)),
    "dual_search.z": (1.23, ("dual_search@*",)),
    "dual_search.max_tokens": (12345, ("dual_search@*",)),
    "certify.prompts": (123, ("dual_init", "certify@*")),
    "certify.method": ("betting", ("certify@*",)),
    "evaluate.samples_per_prompt": (123, ("evaluate@*",)),
    "evaluate.confidence": (0.678, ("evaluate@*", "judge@*", "report")),
    "answer.folder": ("data/raw", ("answer@*",)),
    "judge.labelled": (123, ("judge@*",)),
    "report.title": ("Another", ("report",)),
    "resources.log_steps": (123, ()),
}


#: Edits to one run of several: the value, the stage of the run, and what runs again besides.
RUNS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "reward_dpo.runs.twin.margin_weight": (1.23, "reward_dpo", ("report",)),
    "safety_dpo.runs.twin.factor": (1.23, "safety_dpo", ("report",)),
    "lagrangian_dpo.runs.twin.lam": (1.23, "lagrangian_dpo", ("report",)),
    "lambda_path.runs.twin.lam": (1.23, "lambda_path", ("report",)),
    "safety_path.runs.twin.lam": (1.23, "safety_path", ("report",)),
    "methods.twin.reference": ("elsewhere", "dual_search", ("report",)),
    "suites.twin.prompts": (5, "answer", ("judge@*", "report")),
    "judges.twin.kind": ("oracle", "judge", ("report",)),
}


@pytest.fixture(scope="module")
def readers(workspace: Path) -> dict[str, set[str]]:
    """The stages that each edit puts out of date; DVC says which key it is, so all are made at
    once.
    """
    edits = {key: value for key, (value, *_) in (EDITS | RUNS).items()}
    found = status(workspace, *edits.items())
    readers: dict[str, set[str]] = {key: set() for key in edits}
    for key, (stage, listed) in product(edits, found.items()):
        if any(within(key, one, ".") for one in listed):
            readers[key].add(stage)
    return readers


def test_nothing_runs_again_without_an_edit(workspace: Path) -> None:
    assert status(workspace) == {}


def test_what_a_killed_process_left_beside_an_output_makes_nothing_run_again(
    workspace: Path,
) -> None:
    """Where the scratch folder is on another file system, temporaries lie in the folders of
    outputs.
    """
    left = []
    for folder in (
        "models",
        "reports/evaluation",
        "reports/certificate",
        "reports/provenance",
        "data",
    ):
        place = workspace / folder / ".tmp-0a1b2c3d"
        touch(place / "sft/weights.bin")
        place.with_name(f"{place.name}.lock").touch()
        touch(workspace / folder / ".sft.9.tmp/weights.bin")  # of versions before
        left += [place, place.with_name(f"{place.name}.lock"), workspace / folder / ".sft.9.tmp"]
    try:
        assert status(workspace) == {}
    finally:
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_the_provenance_of_the_report_does_not_rerun_it(workspace: Path) -> None:
    touch(workspace / "reports/provenance/report.json")
    assert status(workspace) == {}


@pytest.mark.parametrize("key", EDITS)
def test_an_edit_reruns_the_stages_that_read_it(
    readers: dict[str, set[str]], dag: dict[str, StageSpec], key: str
) -> None:
    assert readers[key] == matching(dag, *EDITS[key][1])


@pytest.mark.parametrize("key", RUNS)
def test_an_edit_to_one_run_leaves_the_others(
    readers: dict[str, set[str]], dag: dict[str, StageSpec], key: str
) -> None:
    _, stage, besides = RUNS[key]
    assert len(matching(dag, f"{stage}@*")) > 1
    assert readers[key] == {f"{stage}@twin"} | matching(dag, *besides)


def test_a_new_run_leaves_the_others(workspace: Path) -> None:
    new = {"reference": "sft", "lam": 1.0, "factor": 1.0, "loss_type": "kto", "clip": None}
    edits = [("safety_dpo.runs.another", new), ("evaluate.policies.another", "sft")]
    answers = {"answer@tea", "answer@twin"}  # which ask the new policy alone (stages/answer.py)
    trained = {"safety_dpo@another", "evaluate@another"}
    assert set(status(workspace, *edits)) == trained | answers | {"report"}


def test_without_suites_and_judges_the_graph_has_no_stage_of_theirs() -> None:
    dag = load_dag(ROOT)
    assert not matching(dag, "answer*", "judge*")


def test_a_new_judge_runs_alone_and_a_new_suite_before_all_judges(
    workspace: Path, dag: dict[str, StageSpec]
) -> None:
    """Beside the report, which shows what they find."""
    suite = {"suite": "xstest", "path": None, "prompts": None, "samples_per_prompt": 1}
    judges = matching(dag, "judge@*")
    assert set(status(workspace, ("suites.new", suite))) == {"answer@new", "report"} | judges
    assert set(status(workspace, ("judges.new", {"kind": "oracle"}))) == {"judge@new", "report"}


def test_answers_wait_for_every_policy_and_judges_for_every_answer(
    dag: dict[str, StageSpec],
) -> None:
    policies = matching(
        dag, "sft", "dual_search@*", "certify@*", *(f"{one}@*" for one in TRAININGS)
    )
    for name in ("answer@tea", "answer@twin"):
        assert policies <= set(dag[name].upstream)
    for name in ("judge@ours", "judge@twin"):
        assert {"answer@tea", "answer@twin", "reward_model", "cost_model"} <= set(
            dag[name].upstream
        )


def test_a_new_limit_retrains_nothing_before_the_dual(
    readers: dict[str, set[str]], dag: dict[str, StageSpec]
) -> None:
    again = downstream(dag, readers["constraint.limit"])
    assert not again & {
        "prepare",
        "sft",
        "reward_model",
        "cost_model",
        "score",
        "reward_dpo@helpful",
    }
    for path in ("lambda_path@*", "safety_path@*"):
        assert not again & matching(dag, path) and matching(dag, path)


def test_one_policy_for_any_limit_is_merged_anew_without_training(tmp_path: Path) -> None:
    """With its preset a new limit runs the dual, the merge and what judges it; the path is trained
    one by one.
    """
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text(whole(ROOT / "params/any-limit.yaml"))
    Repo.init(str(tmp_path), no_scm=True).close()
    dag = load_dag(tmp_path)
    readers = {name for name, stage in dag.items() if "constraint.limit" in stage.params}
    assert not {name for name in downstream(dag, readers) if "_dpo" in name or "_path" in name}
    assert "dual_search@dualign" in readers
    assert set(dag["dual_search@dualign"].upstream) >= {"lambda_path@slack", "lambda_path@strict"}
    assert "lambda_path@slack" in dag["lambda_path@strict"].upstream
    assert "lambda_path@strict" not in dag["lambda_path@slack"].upstream


def test_a_new_cost_model_leaves_the_rewards(
    readers: dict[str, set[str]], dag: dict[str, StageSpec]
) -> None:
    again = downstream(dag, readers["cost_model.training.learning_rate"])
    assert {"score", "dual_init", "report"} < again
    assert not again & {
        "prepare",
        "sft",
        "reward_model",
        "reward_dpo@helpful",
        *matching(dag, "safety_path@*"),
    }


def test_a_run_that_policies_score_waits_for_them(tmp_path: Path) -> None:
    params = read(ROOT / "params.yaml")
    runs = params["lagrangian_dpo"]["runs"]
    runs["pecan"] = {
        **runs["bernoulli"],
        "reward": "reward_dpo/helpful",
        "cost": "safety_dpo/alone",
    }
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    write(tmp_path / "params.yaml", params)
    Repo.init(str(tmp_path), no_scm=True).close()
    dag = load_dag(tmp_path)
    assert {"reward_dpo@helpful", "safety_dpo@alone"} <= set(dag["lagrangian_dpo@pecan"].upstream)
    assert not {"reward_dpo@helpful", "safety_dpo@alone"} & set(
        dag["lagrangian_dpo@bernoulli"].upstream
    )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_the_graph_holds_with_every_preset(path: Path, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text(whole(path))
    Repo.init(str(tmp_path), no_scm=True).close()
    dag = load_dag(tmp_path)
    assert {name.split("@")[0] for name in dag} >= {
        "prepare",
        "sft",
        "score",
        "dual_init",
        "evaluate",
        "report",
    }
    assert set(dag["report"].upstream) >= matching(
        dag, "prepare", "dual_init", "dual_search@*", "evaluate@*"
    )


def test_runs_on_preferences_wait_for_their_reference_and_margin(tmp_path: Path) -> None:
    """SACPO's steps in either order, and MODPO's margin policy, which is trained first."""
    params = read(ROOT / "params.yaml")
    helpful = params["reward_dpo"]["runs"]["helpful"]
    params["reward_dpo"]["runs"] |= {
        "after_safety": helpful | {"reference": "safety_dpo/alone"},
        "modpo": helpful | {"margin": "safety_dpo/alone"},
    }
    write(tmp_path / "params.yaml", params)
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    Repo.init(str(tmp_path), no_scm=True).close()
    dag = load_dag(tmp_path)
    waits = {}
    for name in matching(dag, "*_dpo@*"):
        waits[name] = {up for up in dag[name].upstream if "_dpo" in up}
    assert waits["reward_dpo@after_safety"] == waits["reward_dpo@modpo"] == {"safety_dpo@alone"}
    assert waits["safety_dpo@stepwise"] == {"reward_dpo@helpful"}
    assert waits["reward_dpo@helpful"] == waits["safety_dpo@alone"] == set()
