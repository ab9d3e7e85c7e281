"""Give a policy away: its folder with a full model card, to the hub or into a folder.

    dualign push certified/dualign --to owner/name
    dualign push aligned/sacpo --to file:///srv/models/sacpo

Whole weights go by default. `--adapter` sends the LoRA adapter alone, on a base that others have:
the run's own where that is a hub id, else the one that `--base` names. The hub's token is read from
where `hf auth login` puts it, or from HF_TOKEN; it is never printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dualign.core.artifacts import replacing
from dualign.core.errors import DataError, DualignError
from dualign.lm.publish import ADAPTER
from dualign.publishing.card import Published, policy_card, published

PROG = "python -m dualign.publishing.push"
FOLDER = "file://"

log = logging.getLogger("dualign")


def staged(policy: Published, name: str, out: Path, base: str | None) -> None:
    """Write what is pushed into folder `out`, which must not exist: the policy, or its adapter on
    `base`, with the full card.
    """
    source = policy.root / "models" / policy.folder
    if base is None:
        shutil.copytree(source, out)
    else:
        if not (source / ADAPTER).is_dir():
            raise DataError(f"{source}: has no adapter (rank 0 trains all weights); push it whole")
        shutil.copytree(source / ADAPTER, out)
        config = out / "adapter_config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {"base_model_name_or_path": base}, indent=2))
    (out / "README.md").write_text(str(policy_card(policy, name)))


def push(policy: Published, to: str, base: str | None = None, *, private: bool = False) -> str:
    """Push to `owner/name` or to `file://FOLDER`; returns where it lies.

    Raises DataError where the target is no such name or exists already as a folder, or the hub
    refuses.
    """
    if to.startswith(FOLDER):
        out = Path(to.removeprefix(FOLDER))
        if out.exists():
            raise DataError(f"{out}: exists already; name a new folder")
        with replacing(out) as temporary:
            staged(policy, out.name, temporary, base)
        return str(out)
    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise DataError(f"--to {to}: neither owner/name nor file://FOLDER ({error})") from error
    with tempfile.TemporaryDirectory(prefix="dualign-push-") as folder:
        out = Path(folder) / "policy"
        staged(policy, to, out, base)
        try:
            return _uploaded(out, to, private)
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{to}: cannot be pushed ({reason}); `hf auth login`?") from error


def _uploaded(out: Path, to: str, private: bool) -> str:
    hub = HfApi()
    hub.create_repo(to, private=private, exist_ok=True)
    done = hub.upload_folder(repo_id=to, folder_path=out, commit_message="A policy by dualign")
    return str(done.commit_url)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=prog, description="Push a policy of this run with its card."
    )
    made.add_argument("policy", help="a folder under models/, such as certified/dualign")
    made.add_argument("--to", required=True, metavar="WHERE", help="owner/name, or file://FOLDER")
    made.add_argument("--adapter", action="store_true", help="the LoRA adapter alone")
    made.add_argument("--base", metavar="ID", help="the base of the adapter, where others find it")
    made.add_argument("--private", action="store_true", help="a repository that others cannot see")
    made.add_argument("--card", action="store_true", help="print the card and push nothing")
    return made


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Push one policy; returns the exit status."""
    asked = parser(prog).parse_args(argv)
    folder = asked.policy.removeprefix("models/").strip("/")
    try:
        policy = published(Path.cwd(), folder)
        if asked.card:
            sys.stdout.write(str(policy_card(policy, asked.to)))
            return 0
        base = _base(policy, asked) if asked.adapter else None
        sys.stdout.write(f"{push(policy, asked.to, base, private=asked.private)}\n")
    except DualignError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _base(policy: Published, asked: argparse.Namespace) -> str:
    """The base that an adapter names. Raises DataError where only this run has it."""
    if asked.base:
        return str(asked.base)
    if policy.base.train or policy.base_id is None:
        raise DataError(
            "--adapter: its base is models/sft of this run, which nobody else has; push sft first"
            " and name it by --base owner/name"
        )
    return policy.base_id


if __name__ == "__main__":
    sys.exit(main())
