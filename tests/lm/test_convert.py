"""What is no GGUF file is told as such, and a folder that is there is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualign.lm.convert import main


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.gguf", "none.gguf: cannot be read (No such file or directory); name a GGUF file"),
        ("empty.gguf", "empty.gguf: no GGUF file, or a download that broke off; fetch it again"),
        ("own", "own: exists already; name a new folder"),
    ],
)
def test_a_mistake_is_one_line_and_replaces_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.gguf").touch()
    Path("own").mkdir()
    Path("own/thesis.txt").write_text("precious")
    assert main([name, "new"] if name.endswith("gguf") else ["empty.gguf", name]) == 2
    assert capsys.readouterr().err == f"{told}\n"
    assert Path("own/thesis.txt").read_text() == "precious" and not Path("new").exists()
