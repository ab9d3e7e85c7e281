"""A signature of a folder's files: who holds the same key sees whether anything was changed.

    dualign certify sign reports/certificate/dualign --key KEY --out
    dualign.signature.json

The signature is HMAC-SHA256 (RFC 2104) over the names and hashes of all files, by the bytes of a
key file. Whoever has the key can sign, so it tells outsiders from those who share it, and these not
from each other. It is written beside the folder, not into it: DVC owns the folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path

from dualign.certify.evidence import changes
from dualign.core.artifacts import hashes, read_json, write_json
from dualign.core.errors import DataError, ParamsError

_ALGORITHM = "hmac-sha256"
_LEAST_KEY = 16  # bytes


def sign(folder: Path, key: Path, out: Path) -> None:
    """Write the signature of a folder's files to `out`.

    Raises ParamsError where the key file cannot be used, or `out` is it, or lies in the folder.
    """
    if out.resolve() == key.resolve():
        raise ParamsError(f"--out {out} is the key itself; name another file")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ParamsError(
            f"--out {out} lies in {folder}, whose files it signs; name a place outside of it"
        )
    files = hashes(folder)
    write_json(out, {"algorithm": _ALGORITHM, "files": files, "signature": _signature(files, key)})


def check(folder: Path, key: Path, signature: Path) -> None:
    """Raises DataError where `signature` is not that of the folder's files by the key."""
    content = read_json(signature)
    if not isinstance(content, dict) or content.keys() != {"algorithm", "files", "signature"}:
        raise DataError(f"{signature}: not a signature; write one with `dualign certify sign`")
    recorded = content["files"]
    if content["algorithm"] != _ALGORITHM or not isinstance(recorded, dict):
        raise DataError(f"{signature}: not a signature by {_ALGORITHM}")
    if not hmac.compare_digest(
        _signature(recorded, key).encode(), str(content["signature"]).encode()
    ):
        raise DataError(f"{signature}: not signed with the key of {key}, or changed since")
    for name, how in changes(recorded, hashes(folder)):
        raise DataError(f"{folder / name} {how} since {signature} was written")


def _signature(found: Mapping[str, str], key: Path) -> str:
    message = json.dumps(found, sort_keys=True, ensure_ascii=True).encode()
    return hmac.new(_key(key), message, hashlib.sha256).hexdigest()


def _key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ParamsError(f"--key {path}: cannot be read ({error.strerror})") from error
    if len(key) < _LEAST_KEY:
        raise ParamsError(
            f"--key {path}: {len(key)} bytes are too short to be a key; `head -c 32 /dev/urandom >"
            f" {path}` makes one"
        )
    return key
