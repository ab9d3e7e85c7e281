"""Names in params.yaml reach no shell and no path outside, by whichever door they come in: params,
pipeline, DVC.
"""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dvc.dvcfile import load_file
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.trie import build_outs_trie
from ruamel.yaml import YAML

from dualign.core.errors import ParamsError
from dualign.core.names import NAME
from dualign.params import loading
from pipeline import names
from pipeline.__main__ import main
from pipeline.errors import PipelineError
from pipeline.prefect import flow, worker
from tests.params.mistakes import Content, put
from tests.pipeline.project import environment
from tests.shipped import preset

ROOT = Path(__file__).resolve().parents[1]
#: Where params.yaml names runs, and policies.
KEYS = (
    "reward_dpo.runs",
    "safety_dpo.runs",
    "lagrangian_dpo.runs",
    "lambda_path.runs",
    "safety_path.runs",
    "methods",
    "certify.runs",
    "suites",
    "judges",
    "evaluate.policies",
    "constraint.additional",
)
#: Where it names folders under models/.
REFERENCES = (
    "reward_dpo.runs.helpful.reference",
    "reward_dpo.runs.helpful.margin",
    "safety_dpo.runs.alone.reference",
    "lagrangian_dpo.runs.bernoulli.reward",
    "lagrangian_dpo.runs.bernoulli.cost",
    "lambda_path.runs.slack.begin",
    "safety_path.runs.strict.reference",
    "methods.sacpo.start",
    "methods.sacpo.reference",
    "certify.runs.dualign.policy",
    "certify.runs.dualign.partner",
    "certify.runs.dualign.fallback",
    "evaluate.policies.sft",
)
PARTS = (
    "../",
    "/",
    "..",
    ".",
    "'",
    '"',
    "\n",
    "\r",
    "\t",
    " ",
    ";touch PWNED;",
    "$(touch PWNED)",
    "`touch PWNED`",
    "|touch PWNED",
    "&",
    ">PWNED",
    "\\",
    "*",
    "?",
    "[a]",
    "${key}",
    "${HOME}",
    "$DVC_STAGE",
    "@",
    "#",
    "~",
    "-",
    "ä",
    "\u2028",
    "%",
    "x",
    "sft",
    "victim",
    "reward_dpo",
    "evaluate",
)


def hostile(count: int) -> list[str]:
    """Texts that are no names, the same ones every time."""
    draw = random.Random(7)
    found: dict[str, None] = dict.fromkeys(
        ["", ".", "..", "../victim", "x;touch PWNED", "-x", "x" * 65, "sft\n", "a/b"]
    )
    while len(found) < count:
        text = "".join(draw.choices(PARTS, k=draw.randint(1, 5)))
        if not NAME.fullmatch(text):
            found[text] = None
    return list(found)


HOSTILE = hostile(150)


@pytest.fixture(scope="module")
def whole() -> Content:
    """The params, with a run in every section that has none."""
    content = loading.read_yaml(ROOT / "params.yaml")
    content["lambda_path"]["runs"] = preset("any-limit")["lambda_path"]["runs"]
    content["safety_path"]["runs"] = {
        "strict": {"reference": "sft", "lam": 4.0, "loss_type": "dpo", "clip": None}
    }
    content["suites"] = {
        "tea": {"suite": "held_out", "path": None, "prompts": 4, "samples_per_prompt": 1}
    }
    content["judges"] = {"ours": {"kind": "scorers"}}
    content["constraint"]["additional"] = {"short": {"quantity": "length", "limit": 25}}
    return content


def renamed(content: Content, key: str, name: str) -> Content:
    """The content with one more row, of that name, at `key`."""
    place: Any = content
    for part in key.split("."):
        place = place[part]
    row = next(iter(place.values()))
    return put(
        copy.deepcopy(content),
        key,
        {**place, name: {"method": "sacpo", **row} if key == "methods" else row},
    )


# --- params ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*KEYS, *REFERENCES])
def test_params_take_no_such_name_and_say_so_in_one_line(whole: Content, key: str) -> None:
    for name in HOSTILE:
        content = (
            put(copy.deepcopy(whole), key, name) if key in REFERENCES else renamed(whole, key, name)
        )
        if key in REFERENCES and re.fullmatch(rf"{NAME.pattern}/{NAME.pattern}", name):
            continue  # of this form, and then no stage writes it
        with pytest.raises(ParamsError) as caught:
            loading.check(content, "my.yaml")
        message = str(caught.value)
        assert (
            message.startswith(f"my.yaml: {key}")
            and len(message.splitlines()) == 1
            and len(message) < 400
        )
        assert (
            "a name has letters" in message
            or "the name of a run has no" in message
            or "NAME or STAGE/NAME" in message
        )


@pytest.mark.parametrize("key", KEYS)
def test_params_take_the_names_that_are_names(whole: Content, key: str) -> None:
    for name in (
        "a",
        "7",
        "A-b_c",
        "x" * 64,
        *(["v1.5"] if key in ("evaluate.policies", "constraint.additional") else []),
    ):
        loading.check(renamed(whole, key, name), "my.yaml")


@pytest.mark.parametrize("key", KEYS[:9])
def test_a_run_has_no_dot_in_its_name_for_dvc_would_not_find_it(
    whole: Content, tmp_path: Path, key: str
) -> None:
    content = renamed(whole, key, "v1.5")
    with pytest.raises(ParamsError, match=r"v1\.5: the name of a run has no '\.'"):
        loading.check(content, "my.yaml")
    with pytest.raises(PipelineError, match=r"v1\.5: DVC takes '\.'"):
        names.check(repository(tmp_path, content))


# --- the pipeline ---------------------------------------------------------------------------------


def repository(folder: Path, content: Content) -> Path:
    """A DVC repository with this graph and these params."""
    for name in ("dvc.yaml", ".dvcignore"):
        (folder / name).write_text((ROOT / name).read_text())
    (folder / "params.yaml").write_text(json.dumps(content))
    if not (folder / ".dvc").exists():
        Repo.init(str(folder), no_scm=True).close()
    return folder


def test_the_pipeline_has_the_pattern_of_the_params() -> None:
    assert names.NAME.pattern == NAME.pattern


def test_the_pipeline_checks_the_name_of_every_run_and_each_folder_that_it_names(
    whole: Content, tmp_path: Path
) -> None:
    root = repository(tmp_path, whole)
    names.check(root)
    for key in [key for key in (*KEYS, *REFERENCES) if key != "constraint.additional"]:
        for name in HOSTILE[9:15]:
            content = (
                put(copy.deepcopy(whole), key, name)
                if key in REFERENCES
                else renamed(whole, key, name)
            )
            if key in REFERENCES and all(map(NAME.fullmatch, name.split("/"))):
                continue
            with pytest.raises(PipelineError) as caught:
                names.check(root, json.dumps(content))
            assert (
                str(caught.value).startswith(f"params.yaml: {key}")
                and len(str(caught.value).splitlines()) == 1
            )


@pytest.mark.parametrize("name", ["../victim", "x;touch PWNED", "a\nb"], ids=ascii)
def test_no_door_of_the_pipeline_lets_a_name_in(
    whole: Content,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    root = repository(tmp_path, whole)
    monkeypatch.chdir(root)
    before = (root / "params.yaml").read_text()
    policies = {"sft": "sft", name: "sft"}
    setting = f"evaluate.policies={json.dumps(policies)}"
    for arguments in (
        ["run", "--set", setting],
        ["sweep", setting.replace("{", "[{", 1).replace("}", "}]", 1)],
    ):
        assert main(arguments) == 2, arguments
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1, told
    with (  # what the form of Prefect calls
        pytest.raises(PipelineError, match=r"params\.yaml: evaluate\.policies"),
        flow.chosen(root, "", {"evaluate.policies": policies}),
    ):
        pass
    assert (root / "params.yaml").read_text() == before
    repository(root, renamed(whole, "evaluate.policies", name))
    for command in (
        ["plan"],
        ["run"],
        ["run", "--cluster"],
        ["sweep", "seed=1,2"],
        ["work", "gpu"],
    ):
        monkeypatch.setattr("pipeline.prefect.server.need", lambda: None)
        assert main(command) == 2, command
        told = capsys.readouterr().err
        assert told.startswith("params.yaml: evaluate.policies.") and len(told.splitlines()) == 1
    assert not (root / "PWNED").exists()


@pytest.mark.parametrize(
    "name", ["--help", "evaluate@../x", "evaluate@", "@x", "a@b@c", "../x", "x\n", ""], ids=ascii
)
def test_a_worker_takes_no_stage_that_is_none(name: str) -> None:
    with pytest.raises(PipelineError, match="no such stage"):
        names.check_stage(name)
    assert "check_stage" in worker.stage.fn.__code__.co_names


# --- DVC by itself --------------------------------------------------------------------------------

GRAPH: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
FANNED = {stage: definition["do"] for stage, definition in GRAPH.items() if "foreach" in definition}
#: The folders in which outputs of runs lie.
FOLDERS = {
    path.partition("/${key}")[0]
    for definition in FANNED.values()
    for path in definition["outs"] + definition["metrics"]
}


def outputs(repo: Repo, stages: Any, name: str) -> list[Path]:
    """The outputs of a stage as DVC sees them, relative to the root; DvcException where it refuses
    the stage.
    """
    stage = stages[name]
    build_outs_trie([stage])  # as for the graph, which has no two outputs in one place
    return [Path(out.fs_path).relative_to(repo.root_dir) for out in stage.outs]


@pytest.mark.parametrize("stage", FANNED)
def test_dvc_takes_no_output_out_of_the_folders_of_the_stages(
    whole: Content, tmp_path: Path, stage: str
) -> None:
    """Some spellings of a name in place are left (x/../sft), which no shell sees and the stage
    refuses.
    """
    key = GRAPH[stage]["foreach"][2:-1]
    spelled = [
        "x/../y",
        "../base",
        "../base/mine",
        "../../x",
        "x/..",
        "x/.",
        "x/",
        *(f"../{one}/x" for one in FANNED),
    ]
    content = copy.deepcopy(whole)
    for name in ("plain", *HOSTILE, *spelled):
        content = renamed(content, key, name)
    root = repository(tmp_path, content)
    taken = []
    with Repo(str(root)) as repo:
        stages = load_file(repo, str(root / "dvc.yaml")).stages
        assert len(outputs(repo, stages, f"{stage}@plain")) == len(
            FANNED[stage]["outs"] + FANNED[stage]["metrics"]
        )
        for name in (*HOSTILE, *spelled):
            if "@" in name or not name:
                continue  # DVC looks for another stage, or breaks off
            try:
                found = outputs(repo, stages, f"{stage}@{name}")
            except DvcException:
                continue
            taken.append(name)
            assert {path.parent.as_posix() for path in found} <= FOLDERS, name
            assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.name) for path in found), (
                name
            )
    assert len(taken) < 15, taken


def test_dvcignore_knows_every_stage() -> None:
    lines = (ROOT / ".dvcignore").read_text().splitlines()
    metrics = {
        path.partition("/${key}")[0]
        for one in GRAPH.values()
        for path in one.get("do", one)["metrics"]
    }
    allowed = {line[2:] for line in lines if line.startswith("!/reports/metrics/")}
    assert allowed == {path for path in metrics if path.startswith("reports/metrics/")}
    for top in ("reports", "models"):
        others = {stage for stage in FANNED if f"{top}/{stage}" not in FOLDERS}
        assert {
            line.split("/")[2] for line in lines if re.fullmatch(rf"/{top}/\w+", line)
        } == others


#: Tells its arguments, and writes what `evaluate` writes for a run, in a folder for each.
SCRIPT = """
import hashlib, json, pathlib, sys
with open("argv.jsonl", "a") as stream:
    stream.write(json.dumps(sys.argv[1:]) + chr(10))
name = sys.argv[1].partition("@")[2]
for path in ("evaluation/{}", "provenance/evaluate/{}.json", "metrics/evaluate/{}.json"):
    file = pathlib.Path("reports", path.format(name))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
"""


def project(folder: Path, policies: list[str]) -> Path:
    """A DVC repository whose one stage is `evaluate` as dvc.yaml has it, with a script that only
    says what it got.
    """
    definition = {**FANNED["evaluate"], "deps": ["stages/evaluate.py"], "params": ["seed"]}
    stages = {"evaluate": {"foreach": "${evaluate.policies}", "do": definition}}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (folder / "params.yaml").write_text(
        json.dumps({"seed": 1, "evaluate": {"policies": dict.fromkeys(policies, "sft")}})
    )
    (folder / "stages").mkdir()
    (folder / "stages/__init__.py").touch()
    (folder / "stages/evaluate.py").write_text(SCRIPT)
    Repo.init(str(folder), no_scm=True).close()
    return folder


def repro(root: Path, shell: str = "/bin/sh", *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    told = {**environment(), "SHELL": shell, "PYTHONPATH": ""}
    return subprocess.run(command, cwd=root, env=told, capture_output=True, text=True, check=False)


SHELL_TEXTS = [
    "x;touch PWNED",
    "x'; touch PWNED; '",
    'x"; touch PWNED; "',
    "x\ntouch PWNED\n",
    "x$(touch PWNED)",
    "x`touch PWNED`",
    "x'\ntouch PWNED\n'",
    "x|touch PWNED",
    "x & touch PWNED",
    "x > PWNED",
    "$HOME",
    "x *",
    "-c",
    "--help",
    "\\",
    "'",
    '"',
    "EOF\ntouch PWNED\nEOF",
    "$DVC_STAGE",
    "x y",
    "x#y",
    "%s",
    "ä",
]


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_no_shell_sees_a_name_when_dvc_runs_a_stage(tmp_path: Path, shell: str) -> None:
    """Even where no `.dvcignore` keeps such names away."""
    root = project(tmp_path, SHELL_TEXTS)
    done = repro(root, shell)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line) for line in (root / "argv.jsonl").read_text().splitlines()]
    assert sorted(told) == sorted([f"evaluate@{name}"] for name in SHELL_TEXTS)
    assert not list(root.rglob("PWNED"))


@pytest.mark.parametrize(
    "name",
    ["../victim", "x;touch PWNED/../y", "x\ntouch PWNED", "a/../../victim", "../../reports/victim"],
    ids=ascii,
)
def test_dvc_deletes_and_runs_nothing_for_a_name_that_leads_elsewhere(
    tmp_path: Path, name: str
) -> None:
    root = project(tmp_path, ["plain", name])
    (root / ".dvcignore").write_text((ROOT / ".dvcignore").read_text())
    mine = root / "reports/victim/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    alone = (
        [] if name.startswith("../../") else [["--single-item", f"evaluate@{name}"]]
    )  # DVC looks at no graph then
    for arguments in ([], ["--force"], *alone):
        done = repro(root, "/bin/sh", *arguments)
        assert done.returncode == 0 if name.endswith("/../y") else done.returncode != 0, (
            done.stdout + done.stderr
        )
        assert mine.read_text() == "mine" and not list(root.rglob("PWNED"))
