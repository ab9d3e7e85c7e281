"""A policy's folder with its full model card, pushed to the hub or into a folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dualign.core.artifacts import replacing
from dualign.core.errors import DataError
from dualign.lm.publish import adapter_in, publish
from dualign.publishing.card import Published, policy_card

FOLDER = "file://"


def name_at(to: str) -> str:
    """What a policy is called at the target of a push: `owner/name`, or its folder's name."""
    return Path(to.removeprefix(FOLDER)).name if to.startswith(FOLDER) else to


def staged(policy: Published, name: str, out: Path, base: str | None) -> None:
    """Write to a new folder `out` what is pushed: policy or adapter on `base`, and the card."""
    source = policy.root / "models" / policy.folder
    if base is None:
        publish(source, out)
    else:
        adapter = adapter_in(source)
        if not (adapter / "adapter_config.json").is_file():
            raise DataError(f"{source}: has no adapter (rank 0 trains all weights); push it whole")
        shutil.copytree(adapter, out)
        config = out / "adapter_config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {"base_model_name_or_path": base}, indent=2))
    (out / "README.md").write_text(str(policy_card(policy, name, base)))


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
            staged(policy, name_at(to), temporary, base)
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
        except Exception as error:  # the hub's client has errors of its own, its network others
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{to}: cannot be pushed ({reason}); look after the network and `hf auth login`"
            ) from error


def _uploaded(out: Path, to: str, private: bool) -> str:
    hub = HfApi()
    hub.create_repo(to, private=private, exist_ok=True)
    done = hub.upload_folder(repo_id=to, folder_path=out, commit_message="A policy by dualign")
    return str(done.commit_url)


def base_of_adapter(policy: Published, named: str | None) -> str:
    """The base that an adapter names, or `named`. Raises DataError where only this run has it."""
    if named:
        return named
    if policy.base.train or policy.base_id is None:
        raise DataError(
            "--adapter: its base is models/sft of this run, which nobody else has; push sft first"
            " and name it by --base owner/name"
        )
    return policy.base_id
