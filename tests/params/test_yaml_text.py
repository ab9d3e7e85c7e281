"""YAML of a user: what is beyond a limit is refused in one line, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dualign.core.errors import ParamsError
from dualign.params import yaml_text

ROOT = Path(__file__).resolve().parents[2]
_LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
_CHAIN = "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60))
REFUSED = {
    "lists in lists": ("a: " + "[" * 100_000, "1: more than 20 lists and mappings"),
    "mappings in mappings": ("{a: " * 40_000, "1: more than 20 lists and mappings"),
    "dashes": ("- " * 90_000, "1: more than 20 lists and mappings"),
    "aliases of aliases": (
        f"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{_LAUGHS}",
        "more than 50000 values",
    ),
    "levels by aliases": (f"a0: &a0 [x]\n{_CHAIN}", "more than 20 lists and mappings"),
    "itself": ("a: &a [*a]", r"1: \*a repeats what has not ended"),
    "nothing": ("a: *b", r"1: \*b repeats what has not ended"),
    "digits": ("a: 1\nseed: " + "9" * 5000, "2: a number of 5000 digits"),
    "hexadecimal": ("a: 0x" + "f" * 5000, "1: a number of 5002 digits"),
    "no date": ("a: 2024-99-99", "1: 2024-99-99 is no decimal number"),
    "an infinite number": ("a: [.inf]", r"1: \.inf is no decimal number"),
    "a number too large": ("a: 1e400", "1: 1e400 is no decimal number"),
    "another base": ("a: 1\nb: 0x1F", "2: 0x1F is no decimal number"),
    "digits in groups": ("a: 1_000", "1: 1_000 is no decimal number"),
    "a zero ahead": ("a: -010", "1: -010 is no decimal number"),
    "a key": ("2024-11-29: 1", "1: 2024-11-29 is no decimal number"),
    "a tag": (
        "a: !!python/object/apply:os.system [ls]",
        "1: the tag tag:yaml.org,2002:python/object",
    ),
    "a long tag": ("a: !" + "x" * 5000 + " 1", "1: the tag !xxx"),
    "no number": ("a: !!float abc", "1: the tag"),
    "a large file": ("a: " + "x" * 300_000, "more than 200 kB"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "a control character": ("a: \x00", "not valid YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_beyond_a_limit_is_refused_in_one_line_at_once(case: str) -> None:
    text, says = REFUSED[case]
    started = time.process_time()
    with pytest.raises(ParamsError, match=says) as caught:
        yaml_text.load(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml:") and len(message.splitlines()) == 1 and len(message) < 400
    assert time.process_time() - started < 10


def test_values_are_those_of_yaml_1_2() -> None:
    text = "a: &a {x: 1, y: [1e-5, -.5, +0, null, yes]}\nb: {<<: *a, y: 2}\nc: *a\n"
    first = {"x": 1, "y": [1e-5, -0.5, 0, None, "yes"]}
    second = {"x": 1, "y": 2}
    found = yaml_text.load(f"{text}d: 1:30\n")
    assert found == {"a": first, "b": second, "c": first, "d": "1:30"}


def test_the_reader_of_the_pipeline_is_the_same_but_for_its_error() -> None:
    own = Path(yaml_text.__file__).read_text()
    other = (ROOT / "pipeline/yaml_text.py").read_text()
    error = "from pipeline.errors import PipelineError as Refused"
    assert other.replace(error, "from dualign.core.errors import ParamsError as Refused") == own


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"none\.yaml: no such file"):
        yaml_text.read(tmp_path / "none.yaml")
    with pytest.raises(ParamsError, match="cannot be read"):
        yaml_text.read(tmp_path)


def test_a_file_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(ParamsError, match="more than 200 kB"):
        yaml_text.read(Path("/dev/zero"))
