"""The signature of a certificate's folder: what was signed is accepted, whatever was changed is
named.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dualign.certify import certificate, command, signature
from dualign.certify.certificate import Terms
from dualign.certify.evidence import Evidence
from dualign.certify.requirement import Requirement
from dualign.core.artifacts import read_json, write_json, write_parquet
from dualign.core.errors import DataError, ParamsError
from dualign.core.schema import ANSWERS, prompt_id, user


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A certificate of one policy with its answers."""
    place = tmp_path / "reports" / "it"
    place.mkdir(parents=True)
    prompts = [user(f"question {number}") for number in range(30)]
    rows = pd.DataFrame(
        {
            "prompt": prompts,
            "prompt_id": list(map(prompt_id, prompts)),
            "sample": 0,
            "response": "x",
        }
    )
    costs = -1 + 0.1 * np.random.default_rng(0).normal(size=30)
    answers = rows.assign(tokens=[[1, 2]] * 30, length=2, ended=True, cost=costs)
    write_parquet(place / "answers.parquet", answers, ANSWERS)
    required = Requirement(name="c", quantity="cost", limit=0.0, method="clustered_t")
    files = Evidence(place / "answers.parquet")
    terms = Terms(["it"], [required], max_new_tokens=9)
    certificate.issue(place / certificate.FILE, terms, lambda name: files)
    return place


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    return tmp_path / "key"


@pytest.fixture
def signed(folder: Path, key: Path, tmp_path: Path) -> Path:
    signature.sign(folder, key, tmp_path / "signature.json")
    return tmp_path / "signature.json"


def test_the_signature_is_that_of_the_standard(folder: Path, key: Path, signed: Path) -> None:
    content = read_json(signed)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert content["files"] == hashes and len(hashes) == 2
    message = json.dumps(hashes, sort_keys=True).encode()
    assert content["signature"] == hmac.new(key.read_bytes(), message, "sha256").hexdigest()
    before = signed.read_bytes()
    signature.sign(folder, key, signed)
    assert signed.read_bytes() == before


def test_a_signed_folder_may_be_moved(
    folder: Path, key: Path, signed: Path, tmp_path: Path
) -> None:
    signature.check(folder, key, signed)
    shutil.move(folder, tmp_path / "elsewhere")
    signature.check(tmp_path / "elsewhere", key, signed)


def change_file(folder: Path, signed: Path) -> None:
    (folder / "certificate.json").write_text((folder / "certificate.json").read_text() + " ")


def change_signed_hash(folder: Path, signed: Path) -> None:
    """A forger without the key writes the new hash into the signature's file."""
    change_file(folder, signed)
    content = read_json(signed)
    content["files"]["certificate.json"] = hashlib.sha256(
        (folder / "certificate.json").read_bytes()
    ).hexdigest()
    write_json(signed, content)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change_file, r"certificate\.json was changed since"),
        (change_signed_hash, "not signed with the key of .*, or changed since"),
        (
            lambda folder, signed: (folder / "answers.parquet").unlink(),
            "answers.parquet is missing since",
        ),
        (
            lambda folder, signed: (folder / "more.parquet").write_text(""),
            "more.parquet was added since",
        ),
        (lambda folder, signed: write_json(signed, {}), "not a signature; write one with"),
        (lambda folder, signed: write_json(signed, []), "not a signature; write one with"),
        (
            lambda folder, signed: write_json(signed, read_json(signed) | {"files": []}),
            "not a signature by hmac-sha256",
        ),
        (
            lambda folder, signed: write_json(signed, read_json(signed) | {"signature": "é"}),
            "not signed with the key",
        ),
        (
            lambda folder, signed: write_json(signed, read_json(signed) | {"algorithm": "none"}),
            "by hmac-sha256",
        ),
    ],
)
def test_whatever_was_changed_is_named(
    folder: Path, key: Path, signed: Path, tamper: Callable[[Path, Path], object], message: str
) -> None:
    tamper(folder, signed)
    with pytest.raises(DataError, match=message) as raised:
        signature.check(folder, key, signed)
    assert "\n" not in str(raised.value)


def test_another_key_is_refused(folder: Path, key: Path, signed: Path) -> None:
    key.write_bytes(bytes(range(1, 33)))
    with pytest.raises(DataError, match="not signed with the key"):
        signature.check(folder, key, signed)


def test_keys_and_places_that_cannot_be_used(folder: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"lies in .*, whose files it signs"):
        signature.sign(folder, key, folder / "signature.json")
    secret = key.read_bytes()
    with pytest.raises(ParamsError, match="is the key itself"):
        signature.sign(folder, key, key)
    assert key.read_bytes() == secret
    key.write_bytes(b"short")
    with pytest.raises(ParamsError, match="5 bytes are too short to be a key"):
        signature.sign(folder, key, tmp_path / "signature.json")
    with pytest.raises(ParamsError, match="cannot be read"):
        signature.sign(folder, tmp_path / "none", tmp_path / "signature.json")
    assert not (tmp_path / "signature.json").exists()


def test_the_command_signs_and_checks(
    folder: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it.json"
    files = sorted(folder.iterdir())
    assert command.main(["sign", str(folder), "--key", str(key), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out} signs {folder}: 'it' keeps E[c] <= 0")
    assert sorted(folder.iterdir()) == files
    check = ["verify", str(folder), "--key", str(key), "--signature", str(out)]
    assert command.main(check) == 0
    _, left = capsys.readouterr().out.splitlines()
    assert "--key" not in left and "--rescore" in left
    change_file(folder, out)
    assert command.main(check) == 1
    assert "certificate.json was changed since" in capsys.readouterr().out
    assert command.main(["verify", str(folder)]) == 0  # consistent, and not what was signed


def test_what_does_not_hold_is_not_signed(folder: Path, key: Path, tmp_path: Path) -> None:
    write_json(folder / certificate.FILE, read_json(folder / certificate.FILE) | {"returned": None})
    assert (
        command.main(["sign", str(folder), "--key", str(key), "--out", str(tmp_path / "out.json")])
        == 1
    )
    assert not (tmp_path / "out.json").exists()


def test_a_key_needs_a_signature_and_one_certificate(folder: Path, key: Path, signed: Path) -> None:
    for wrong in (
        ["--key", str(key)],
        ["--key", str(key), "--signature", str(signed), str(folder)],
    ):
        with pytest.raises(SystemExit):
            command.main(["verify", str(folder), *wrong])
