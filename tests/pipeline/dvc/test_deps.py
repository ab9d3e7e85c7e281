"""The import closure of a stage, and its place in dvc.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.dvc.deps import ImportRefused, closure, differences, main, write

GRAPH = """\
# The pipeline.
stages:
  sft:  # the first
    cmd: python -m stages.sft
    deps:
      - stages/sft.py
      - dualign/gone.py
      - data/sft.parquet
    outs:
      - models/sft

  # One for each run.
  safety_dpo:
    foreach: ${runs}
    do:
      cmd: python -m stages.safety_dpo ${key}
      deps:
        - stages/safety_dpo.py
        - models/${item}
      params: [seed]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {
        "dvc.yaml": GRAPH,
        "stages/sft.py": "import os\nfrom dualign import a\nfrom dualign.data.rows import read\n",
        "stages/safety_dpo.py": "import dualign.leaf\n",
        "dualign/__init__.py": "from dualign.unused import everything\n",
        "dualign/a.py": "def f():\n    from dualign.b import g\n    return g()\n",
        "dualign/b.py": "import dualign.a\n\nPAGE = 'templates/page.html'\n",
        "dualign/data/__init__.py": "",
        "dualign/data/rows.py": (
            "import typing\nif typing.TYPE_CHECKING:\n    from dualign.unused import T\n"
        ),
        "dualign/leaf.py": "",
        "dualign/unused.py": "",
        "dualign/templates/page.html": "",
        "dualign/templates/other.html": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_closure_follows_all_that_runs(root: Path) -> None:
    assert closure("stages/sft.py", root) == [
        "stages/sft.py",
        "dualign/a.py",
        "dualign/b.py",
        "dualign/data/rows.py",
        "dualign/templates/page.html",
    ]


def test_the_command_of_a_module_is_needed_by_its_script_alone(root: Path) -> None:
    guarded = "if __name__ == '__main__':\n    import dualign.unused\n"
    (root / "stages/safety_dpo.py").write_text(f"import dualign.leaf\n{guarded}")
    needed = ["stages/safety_dpo.py", "dualign/leaf.py", "dualign/unused.py"]
    assert closure("stages/safety_dpo.py", root) == needed
    (root / "dualign/leaf.py").write_text(guarded)
    (root / "stages/safety_dpo.py").write_text("import dualign.leaf\n")
    assert closure("stages/safety_dpo.py", root) == needed[:2]


def test_a_package_that_nearly_all_need_is_one_dependency(root: Path) -> None:
    for name, text in {
        "__init__.py": "",
        "errors.py": "import dualign.leaf\n",
        "names.py": "",
    }.items():
        (root / "dualign/core").mkdir(exist_ok=True)
        (root / "dualign/core" / name).write_text(text)
    (root / "stages/safety_dpo.py").write_text(
        "import dualign.core.errors\nimport dualign.core.names\n"
    )
    assert closure("stages/safety_dpo.py", root) == [
        "stages/safety_dpo.py",
        "dualign/core",
        "dualign/leaf.py",
    ]


def test_types_of_params_are_no_dependency(root: Path) -> None:
    (root / "dualign/params").mkdir()
    (root / "dualign/params/data.py").write_text("import dualign.leaf\n")
    before = closure("stages/safety_dpo.py", root)
    with (root / "stages/safety_dpo.py").open("a") as script:
        script.write("import dualign.params.data\n")
    assert closure("stages/safety_dpo.py", root) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from . import a", "relative import"),
        ("from dualign import everything", "dualign is not a module of its own"),
        ("from dualign.data import read", "dualign.data is not a module of its own"),
        ("import dualign.typo", "dualign.typo is not a module of its own"),
    ],
)
def test_an_import_that_hides_its_file_is_refused(root: Path, line: str, message: str) -> None:
    (root / "stages/sft.py").write_text(f"import os\n{line}\n")
    with pytest.raises(ImportRefused, match=rf"stages/sft\.py:2: {message}"):
        closure("stages/sft.py", root)


def test_differences_are_the_lines_to_edit(root: Path) -> None:
    sft, safety = differences(root)
    assert str(sft).splitlines() == [
        "dvc.yaml: sft: deps:",
        "+     - dualign/a.py",
        "+     - dualign/b.py",
        "+     - dualign/data/rows.py",
        "+     - dualign/templates/page.html",
        "-     - dualign/gone.py",
    ]
    assert (safety.missing, safety.extra) == (("dualign/leaf.py",), ())


def test_write_changes_only_the_code_dependencies(root: Path) -> None:
    write(root)
    added = ["dualign/a.py", "dualign/b.py", "dualign/data/rows.py", "dualign/templates/page.html"]
    expected = GRAPH.replace(
        "      - dualign/gone.py\n", "".join(f"      - {path}\n" for path in added)
    )
    expected = expected.replace(
        "        - models/${item}", "        - dualign/leaf.py\n        - models/${item}"
    )
    assert (root / "dvc.yaml").read_text() == expected
    assert differences(root) == []


def test_command_tells_then_mends(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([], root) == 1
    assert "dualign/gone.py" in caplog.text
    assert main(["--write"], root) == 0
    assert main([], root) == 0
    (root / "stages/sft.py").unlink()
    assert main([], root) == 2
