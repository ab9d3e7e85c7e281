"""Files that travel with a stage, in one text: servers of Prefect take little of a parameter, and
tables in JSON are five times as long as they need to be."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping

from pipeline.errors import PipelineError


def packed(files: Mapping[str, str]) -> str:
    """Texts by path as one text, in ASCII; empty without files."""
    if not files:
        return ""
    return base64.b64encode(zlib.compress(json.dumps(files).encode(), 9)).decode()


def unpacked(parcel: str) -> dict[str, str]:
    """The texts by path. Raises PipelineError for a text that `packed` did not make."""
    if not parcel:
        return {}
    try:
        files = json.loads(zlib.decompress(base64.b64decode(parcel, validate=True)))
    except (ValueError, zlib.error) as error:
        raise PipelineError(
            "files: not what a coordinator packs; leave it empty, or start the stage by"
            " `python -m pipeline run --cluster`"
        ) from error
    return {str(path): str(text) for path, text in files.items()}
