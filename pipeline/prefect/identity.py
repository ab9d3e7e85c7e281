"""Which workspace this is, among all of a Prefect server: clones are alike in all else.

The name goes into the deployment of `serve`, into the tags of runs, and into the keys of cards.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import socket
import uuid
from pathlib import Path

from pipeline.errors import PipelineError

#: The environment variable that gives a workspace a name of one's own choice.
VARIABLE = "DUALIGN_WORKSPACE"
#: Before the name, in a tag of flow runs.
TAG = "workspace:"
_BANNED = re.compile(r"[/%&<>\s]")


def name(root: Path) -> str:
    """The workspace's name: `$DUALIGN_WORKSPACE`, else folder, host and six digits of a hash.

    Raises PipelineError for a name that Prefect does not take.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    if _BANNED.search(chosen):
        raise PipelineError(f"{VARIABLE}={chosen}: a name without blanks and without / % & < >")
    digits = hashlib.sha256(place(root).encode()).hexdigest()[:6]
    return chosen or _BANNED.sub("-", f"{root.resolve().name}-{socket.gethostname()}-{digits}")


def place(root: Path) -> str:
    """Where it lies, for people: `alice@node1:/home/alice/dualign`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have a user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{root.resolve()}"


def token(root: Path) -> str:
    """What no other workspace has, whatever its name: made once, in an ignored folder."""
    path = root / ".dvc" / "tmp" / "workspace"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def tag(workspace: str) -> str:
    """The tag of runs of a workspace."""
    return f"{TAG}{workspace}"


def of_tags(tags: list[str] | set[str]) -> str:
    """The name of the workspace that the tags of a run tell; empty where they tell none."""
    return next((tag.removeprefix(TAG) for tag in sorted(tags) if tag.startswith(TAG)), "")
